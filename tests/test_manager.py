"""The manager: its two calling habits, clusters of data, guidance, steps, saving and resuming."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn as nn
from toys import backward, digits, make_net, same

import hybrid_optimization
from hybrid_optimization import (
    HybridOptimizationManager,
    HybridTrainingConfig,
    text_features,
)

STEP_KEYS = {
    "loss",
    "learning_rate",
    "lr_multiplier",
    "trust_radius",
    "update_magnitude",
    "constraint_active",
    "gradient_magnitude",
}
SUMMARY_KEYS = {
    "final_loss",
    "metrics_history",
    "trust_radius",
    "total_steps",
    "avg_lr_multiplier",
    "constraint_activation_rate",
}


def test_flat_gradients_update_every_parameter():
    """Calling habit 1, the flat concatenation in model.parameters() order."""
    model, (x, y) = make_net(), digits()
    manager = HybridOptimizationManager(HybridTrainingConfig(max_steps=10))
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        loss = backward(model, x, y)
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        info = manager.optimization_step(
            model=model, loss=loss, gradients=flat, cluster_id=step % 8, step=step
        )
    assert info.keys() >= STEP_KEYS
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert manager.get_summary().keys() >= SUMMARY_KEYS
    assert manager.get_summary()["total_steps"] == 3


def test_flat_gradients_equal_own_gradients():
    a, b, (x, y) = make_net(), make_net(), digits()
    one, two = HybridOptimizationManager(), HybridOptimizationManager()
    for step in range(3):
        one.optimization_step(a, backward(a, x, y), None, 0, step)
        loss = backward(b, x, y)
        flat = torch.cat([p.grad.flatten() for p in b.parameters()])
        two.optimization_step(b, loss, flat, 0, step)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_manager_counts_for_who_does_not():
    """Steps and skipped ones, also after it was saved and loaded."""
    x, y = digits()
    config = HybridTrainingConfig(max_steps=40, base_learning_rate=6e-3)
    told, counts = make_net(), make_net()
    one, two = HybridOptimizationManager(config), HybridOptimizationManager(config)
    rates = []
    for step in range(30):
        if step == 20:
            saved = copy.deepcopy(two.state_dict())
            two = HybridOptimizationManager(config)
            two.load_state_dict(saved, counts)
        losses = [float("nan") if step == 7 else backward(m, x, y) for m in (told, counts)]
        first = one.optimization_step(told, losses[0], None, step=step)
        second = two.optimization_step(counts, losses[1], None)
        assert first["learning_rate"] == second["learning_rate"]
        rates.append(second["learning_rate"])
    assert all(
        torch.equal(p, q) for p, q in zip(told.parameters(), counts.parameters(), strict=True)
    )
    assert rates[-1] < max(rates) / 2  # the schedule went on


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_gradient_norm_only_advises(as_tensor):
    """Calling habit 2: the caller steps an optimiser of its own."""
    model = make_net()
    manager = HybridOptimizationManager()
    before = copy.deepcopy(model.state_dict())
    norm = torch.tensor(3.0) if as_tensor else 3.0
    info = manager.optimization_step(
        model=model, loss=1.5, gradients=norm, cluster_id=0, step=100, base_lr=0.01
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert info["gradient_magnitude"] == 3.0
    assert info["learning_rate"] == pytest.approx(0.01)
    assert info["update_magnitude"] == 0


def test_wrong_length_of_gradients_is_refused():
    with pytest.raises(ValueError, match="entries"):
        HybridOptimizationManager().optimization_step(make_net(), 1.0, torch.ones(7), 0, 0)


def test_a_forgotten_backward_pass_is_refused():
    with pytest.raises(ValueError, match=r"loss\.backward"):
        HybridOptimizationManager().optimization_step(make_net(), 1.0, None, 0, 0)
    frozen = make_net().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        HybridOptimizationManager().optimization_step(frozen, 1.0, None, 0, 0)


def test_clusters_come_from_the_gradients_that_are_passed():
    """With nothing in p.grad at the first step, too."""
    x, y = digits()
    labels = []
    for passed in (False, True):
        config = HybridTrainingConfig(parameter_clusters=5)
        model, manager = make_net(), HybridOptimizationManager(config)
        loss = backward(model, x, y)
        flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()]) if passed else None
        if passed:
            model.zero_grad()
        manager.optimization_step(model, loss, flat, 0, 0)
        labels.append(manager.parameter_labels)
    assert labels[0] == labels[1]


def test_a_parameter_unfrozen_later_is_not_silently_left_out():
    model, (x, y) = make_net(), digits()
    model[0].weight.requires_grad_(False)
    manager = HybridOptimizationManager()
    manager.optimization_step(model, backward(model, x, y), None, 0, 0)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.weight was frozen"):
        manager.optimization_step(model, backward(model, x, y), None, 0, 1)
    model[0].weight.requires_grad_(False)
    manager.optimization_step(model, backward(model, x, y), None, 0, 1)


class Scaled(nn.Module):
    """With a scalar, as CLIP's logit scale, and parameters without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.none = nn.Parameter(torch.zeros(0))
        self.flat = nn.Parameter(torch.zeros(0, 5))
        self.thin = nn.Parameter(torch.zeros(5, 0))
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nothing = self.none.sum() + self.flat.sum() + self.thin.sum()
        return self.scale * self.linear(x) + nothing


def test_scalars_and_parameters_without_entries():
    torch.manual_seed(0)
    model, manager = Scaled(), HybridOptimizationManager()
    for step in range(5):
        model.zero_grad()
        loss = (model(torch.ones(4, 3)) - 2).square().mean()
        loss.backward()
        info = manager.optimization_step(model, loss, None, 0, step)
        assert info["update_magnitude"] > 0
    assert model.scale.item() != 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_rate_of_zero_moves_nothing():
    """As a caller's schedule has it in its first or last step."""
    model, (x, y) = make_net(), digits()
    manager = HybridOptimizationManager()
    for step, rate in enumerate((0.0, 1e-3, 0.0)):
        before = copy.deepcopy(model.state_dict())
        info = manager.optimization_step(model, backward(model, x, y), None, 0, step, rate)
        if rate:
            assert info["update_magnitude"] > 0
        else:
            assert (info["learning_rate"], info["update_magnitude"]) == (0, 0)
            same(before, model.state_dict())


def test_the_optimiser_that_a_caller_holds_stays():
    model, (x, y) = make_net(), digits()
    manager = HybridOptimizationManager(HybridTrainingConfig())
    held = manager.constrained_opt
    manager.config.momentum = 0.5  # before the first step: counts
    manager.optimization_step(model, backward(model, x, y), None, 0, 0)
    assert manager.constrained_opt is held
    assert {g["momentum"] for g in held.param_groups} == {0.5}
    held.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_scalers_gradients_are_unscaled_from_the_first_step_on():
    """Bound beforehand, a manager trains as without a scaler, and skips what overflowed."""
    ends = []
    for scale in (1.0, 2.0**16):
        model, (x, y) = make_net(), digits()
        manager = HybridOptimizationManager(HybridTrainingConfig(max_steps=30))
        manager.bind(model)
        labels = manager.parameter_labels
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(30):
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if step == 5:
                model[0].weight.grad[0] = float("inf")
            scaler.unscale_(manager.constrained_opt)
            info = manager.optimization_step(model, loss, None)
            assert info["skipped"] == (step == 5)
            scaler.update()
        assert scaler.get_scale() == scale / 2  # it has seen the overflow
        assert manager.parameter_labels is labels
        ends.append(model.state_dict())
    same(*ends)
    with pytest.raises(ValueError, match="already steps another model"):
        manager.bind(make_net())


def test_number_of_parameter_clusters_can_be_set_until_the_first_step():
    model, (x, y) = make_net(), digits()
    manager = HybridOptimizationManager()
    manager.config.parameter_clusters = 2
    manager.optimization_step(model, backward(model, x, y), None, 0, 0)
    assert set(manager.parameter_labels.values()) == {0, 1}


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    loss = model(torch.tensor([1])).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        HybridOptimizationManager().optimization_step(model, loss, None, 0, 0)


def test_double_precision_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        model, (x, y) = make_net(), digits()
        manager = HybridOptimizationManager()
        for step in range(3):
            loss = backward(model, x.double(), y)
            manager.optimization_step(model, loss, None, 0, step)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in manager.auxiliary_nn.parameters()} == {torch.float32}


def test_training_on_digits_learns():
    model, (x, y) = make_net(), digits(512)
    manager = HybridOptimizationManager(HybridTrainingConfig(max_steps=150))
    first = backward(model, x, y).item()
    for step in range(150):
        manager.optimization_step(model, backward(model, x, y), None, 0, step)
    assert backward(model, x, y).item() < 0.2 * first


def test_get_cluster_batch_knows_its_indices():
    data = torch.arange(100.0)[:, None] % 10
    manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=4))
    labels = manager.setup_data_clustering(data)
    batch, indices = manager.get_cluster_batch(data, 7, 2, return_indices=True)
    assert torch.equal(batch, data[torch.from_numpy(indices)])
    assert (labels[indices] == 2).all()
    assert torch.is_tensor(manager.get_cluster_batch(data, 7, 2))


def test_a_cluster_is_walked_without_replacement():
    data = np.random.default_rng(0).normal(size=(60, 3))
    manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=3))
    labels = manager.setup_data_clustering(data)
    size = int((labels == 0).sum())
    seen = [
        int(i)
        for _ in range(size)
        for i in manager.get_cluster_batch(data, 1, 0, return_indices=True)[1]
    ]
    assert sorted(seen) == np.flatnonzero(labels == 0).tolist()


def test_token_ids_are_symbols_not_numbers():
    """Relabelling the vocabulary leaves the clusters' quality: texts from two alphabets part."""
    rng = np.random.default_rng(0)
    a = rng.choice([1, 200, 17], size=(40, 64))
    b = rng.choice([2, 199, 18], size=(40, 64))
    manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=2))
    labels = manager.setup_data_clustering(torch.tensor(np.concatenate([a, b])))
    assert len(set(labels[:40])) == 1
    assert len(set(labels[40:])) == 1
    assert labels[0] != labels[-1]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_more_clusters_than_samples(n):
    manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=8))
    labels = manager.setup_data_clustering(torch.randint(0, 256, (n, 32)))
    assert len(labels) == n
    for k in range(8):
        assert len(manager.get_cluster_batch(torch.zeros(n), 3, k)) == 3


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_features_in_parts_are_the_features(monkeypatch, rows):
    """To the bit, of features and of clusters, of windows on a sample and of all."""
    windows = np.random.default_rng(0).integers(0, 300, (100, 24))

    def found() -> tuple[np.ndarray, list[int]]:
        manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=4))
        return text_features(windows), list(manager.setup_data_clustering(windows))

    for many in (hybrid_optimization.MANY_SAMPLES, 60):
        monkeypatch.setattr(hybrid_optimization, "MANY_SAMPLES", many)
        monkeypatch.setattr(hybrid_optimization, "GRAM_ROWS", 1 << 20)
        features, labels = found()
        monkeypatch.setattr(hybrid_optimization, "GRAM_ROWS", rows)
        again, same = found()
        assert again.tobytes() == features.tobytes()
        assert same == labels


def test_features_take_little_memory():
    """Fewer than 60 bytes a token (it was 150)."""
    windows = np.random.default_rng(0).integers(0, 200, (12_000, 64))
    tracemalloc.start()
    hybrid_optimization._gram_counts(windows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * windows.size


def test_duplicates_only():
    assert text_features(np.zeros((10, 16), int)).shape[0] == 10
    manager = HybridOptimizationManager()
    assert set(manager.setup_data_clustering(np.zeros((50, 16), int))) == {0}


# ------------------------------------------------------------------------------- guidance


def test_the_base_rate_hardly_matters():
    """Rates a factor 30 apart: after the first steps the same updates, with other multipliers."""
    x, y = digits(256)
    found = {}
    for rate in (1e-3, 3e-2):
        model = make_net()
        config = HybridTrainingConfig(base_learning_rate=rate, max_steps=60)
        manager = HybridOptimizationManager(config)
        for step in range(60):
            info = manager.optimization_step(model, backward(model, x, y), None, 0, step)
            if step == 30:
                found[rate] = info
        found[rate]["final"] = backward(model, x, y).item()
    slow, fast = found[1e-3], found[3e-2]
    assert slow["learning_rate"] == pytest.approx(fast["learning_rate"], rel=0.5)
    assert slow["lr_multiplier"] > 10 * fast["lr_multiplier"]
    assert slow["final"] == pytest.approx(fast["final"], abs=0.01)


@pytest.mark.parametrize("rate", [0.03, 3.0])
def test_rates_out_of_the_multipliers_reach_are_held_by_the_region(rate):
    """A base rate hundreds of times too large: every step is cut to the wanted length."""
    x, y = digits(256)
    model = make_net()
    config = HybridTrainingConfig(base_learning_rate=rate, max_steps=60)
    manager = HybridOptimizationManager(config)
    first = backward(model, x, y).item()
    for step in range(60):
        manager.optimization_step(model, backward(model, x, y), None, 0, step)
    assert backward(model, x, y).item() < 0.6 * first


def test_wanted_length_grows_where_steps_promise_more():
    """Noise-free quadratic, far from its minimum: kappa is near 1, so the steps lengthen."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    target = 10 * torch.randn(8, 8)
    manager = HybridOptimizationManager(
        HybridTrainingConfig(max_steps=300, initial_trust_radius=1e-3, lr_schedule="constant")
    )
    start = manager.guidance.length
    for step in range(30):
        model.zero_grad()
        loss = (model.weight - target).square().sum() / 2
        loss.backward()
        manager.optimization_step(model, loss, None, 0, step)
    assert manager.kappa > 0.5
    assert manager.guidance.length > start + 0.5


# ------------------------------------------------------------------ steps through the manager


@pytest.mark.parametrize("radius", [0.001, 0.01, 0.3])
def test_every_step_stays_in_every_region(radius):
    """||dTheta_c|| <= mu_c ||Theta_c|| for each cluster, on every step of a real run."""
    model, (x, y) = make_net(), digits(256)
    config = HybridTrainingConfig(
        base_learning_rate=0.05, initial_trust_radius=radius, max_steps=40, parameter_clusters=3
    )
    manager = HybridOptimizationManager(config)
    cut = 0
    for step in range(40):
        loss = backward(model, x, y)
        before = {n: p.detach().double() for n, p in model.named_parameters()}
        before = {n: p.clone() for n, p in before.items()}
        info = manager.optimization_step(model, loss, None, 0, step)
        cut += info["active_share"] > 0
        names = manager.parameter_labels
        for k in set(names.values()):
            moved = sum(
                float((p.detach().double() - before[n]).square().sum())
                for n, p in model.named_parameters()
                if names[n] == k
            )
            size = sum(float(before[n].square().sum()) for n in names if names[n] == k)
            assert moved**0.5 <= info["trust_radius"] * size**0.5
    assert cut > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_touches_nothing(bad, where):
    model, (x, y) = make_net(), digits()
    manager = HybridOptimizationManager()
    for step in range(3):
        manager.optimization_step(model, backward(model, x, y), None, 0, step)
    weights = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(manager.constrained_opt.state_dict())
    network = copy.deepcopy(manager.auxiliary_nn.training_state())
    loss = backward(model, x, y)
    if where == "gradient":
        next(model.parameters()).grad.view(-1)[0] = bad
    info = manager.optimization_step(model, bad if where == "loss" else loss, None, 0, 3)
    assert info["skipped"]
    assert manager.get_summary()["skipped_steps"] == 1
    same(weights, model.state_dict())
    same(moments, manager.constrained_opt.state_dict())
    same(network, manager.auxiliary_nn.training_state())
    manager.optimization_step(model, backward(model, x, y), None, 0, 4)
    assert manager.consecutive_skips == 0


def test_resume_is_bit_exact():
    """2N steps equal N steps, saving, a fresh manager and model, and N steps."""
    x, y = digits()
    config = HybridTrainingConfig(max_steps=20, parameter_clusters=3)

    def go(model, manager, start, stop):
        for step in range(start, stop):
            manager.optimization_step(model, backward(model, x, y), None, step % 2, step)

    straight, one = make_net(), HybridOptimizationManager(config)
    go(straight, one, 0, 14)
    model, manager = make_net(), HybridOptimizationManager(config)
    go(model, manager, 0, 7)
    saved = copy.deepcopy((model.state_dict(), manager.state_dict()))
    model, manager = make_net(seed=5), HybridOptimizationManager(config)
    model.load_state_dict(saved[0])
    manager.load_state_dict(saved[1], model)
    go(model, manager, 7, 14)
    same(straight.state_dict(), model.state_dict())
    same(one.get_summary(), manager.get_summary())
    same(one.auxiliary_nn.training_state(), manager.auxiliary_nn.training_state())


def test_state_is_complete_plain_and_copied(tmp_path):
    x, y = digits()
    model, manager = make_net(), HybridOptimizationManager()
    manager.setup_data_clustering(x.flatten(1))
    manager.get_cluster_batch(x, 3, 1)

    def go(start, stop):
        for step in range(start, stop):
            manager.optimization_step(model, backward(model, x, y), None, 0, step)

    go(0, 3)
    torch.save([model.state_dict(), manager.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    before = copy.deepcopy(state)
    fresh = HybridOptimizationManager()
    with pytest.raises(ValueError, match="pass the model"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, make_net())
    features = x.flatten(1).numpy()
    found = fresh.data_clusterer.predict(features)
    np.testing.assert_array_equal(found, manager.data_clusterer.predict(features))
    (_, ours), (_, theirs) = (
        m.get_cluster_batch(x, 3, 1, return_indices=True) for m in (fresh, manager)
    )
    np.testing.assert_array_equal(ours, theirs)
    # Back to where it was, by the manager that went on; without its model. Twice: what was
    # loaded is not what steps change.
    ends = []
    for _ in range(2):
        model.load_state_dict(weights)
        manager.load_state_dict(state)
        assert manager.constrained_opt.state_dict()["state"][0]["step"] == 3
        go(3, 6)
        ends.append(copy.deepcopy((model.state_dict(), manager.state_dict())))
        same(before, state)
    same(ends[0][0], ends[1][0])
    same(ends[0][1]["plain"], ends[1][1]["plain"])


def test_four_parameter_clusters_by_default():
    model, (x, y) = make_net(), digits()
    manager = HybridOptimizationManager()
    manager.optimization_step(model, backward(model, x, y), None, 0, 0)
    assert set(manager.parameter_labels.values()) == {0, 1, 2, 3}
    assert manager.constrained_opt.radii().shape == (4,)


# ----------------------------------------------------------------------------- cluster rates


def test_cluster_rates_favour_what_can_still_be_learned():
    manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=3, max_steps=100))
    for _ in range(100):
        manager.observe_clusters([0, 1, 2], [0.1, 0.2, 0.4])
    rates = manager.cluster_rates(0)
    assert rates[0] < rates[1] < rates[2]
    assert ((rates >= 0.5) & (rates <= 2)).all()
    assert rates.mean() == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(manager.cluster_rates(100), 1)


def test_one_spike_does_not_move_the_running_loss():
    manager = HybridOptimizationManager()
    for step in range(50):
        manager.compute_training_state(1.0 + 0.01 * (step % 3), 1.0, 0, step)
    before = manager.compute_training_state(1.0, 1.0, 0, 50).loss_trend
    after = manager.compute_training_state(1e9, 1.0, 0, 51).loss_trend
    assert abs(after - before) < 0.1


def test_losses_that_begin_all_equal_are_not_for_ever():
    """Twelve losses without deviation say nothing of how far the next may be from them."""
    manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=2, max_steps=10**6))
    for loss in [0.0] * 12 + [4.0] * 300:
        manager.observe_clusters([0, 1], [loss, 1.0])
    rates = manager.cluster_rates(0)
    assert rates[0] > 1.2 > 0.8 > rates[1]
