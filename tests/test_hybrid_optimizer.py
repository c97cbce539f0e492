"""`HybridOptimizer` in plain loops and in the trainers that people use."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from toys import backward, digits, make_net, same

from hybrid_optimization import ConstrainedOptimizer, HybridOptimizer


def train(model: nn.Module, optimizer: Any, steps: int, n: int = 64) -> float:
    x, y = digits(n)
    for _ in range(steps):
        loss = backward(model, x, y)
        optimizer.step()
    return float(loss.detach())


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("horizon", [None, 40, 8, 400])
@pytest.mark.parametrize("how", ["module", "named", "parameters"])
def test_one_line_trains(horizon, how):
    """Without a horizon, and with one that is five times too short or ten times too long."""
    model = make_net()
    given = {
        "module": lambda: model,
        "named": model.named_parameters,
        "parameters": model.parameters,
    }[how]()
    assert train(model, HybridOptimizer(given, max_steps=horizon), 40) < 0.25


def test_kinds_and_decay():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))

    def kinds(optimizer: HybridOptimizer) -> dict[str, tuple[int, float]]:
        return {g["kind"]: (len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups}

    by_module = {"embedding": (1, 0.0), "matrix": (2, 0.1), "vector": (4, 0.0)}
    assert kinds(HybridOptimizer(model, weight_decay=0.1)) == by_module
    named = [("embed_tokens.weight" if n == "0.weight" else n, p)
             for n, p in model.named_parameters()]  # fmt: skip
    assert kinds(HybridOptimizer(named, weight_decay=0.1)) == by_module
    groups = [{"params": list(model.parameters()), "weight_decay": 0.3}]
    assert [g["weight_decay"] for g in HybridOptimizer(groups).param_groups] == [0.3]


def test_the_rate_is_the_callers():
    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=20, lr=2e-3)
    train(model, optimizer, 10)
    assert {g["lr"] for g in optimizer.param_groups} == {2e-3}
    assert all(g["guided_lr"] > 0 for g in optimizer.param_groups)
    train(model, optimizer, 10)
    before = state_of(model)
    optimizer.max_steps = 10**6  # far behind: the rate of overtime is not nothing
    train(model, optimizer, 1)
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def guided(optimizer: HybridOptimizer) -> float:
    return optimizer.param_groups[0]["guided_lr"] / optimizer.RELATIVE_GAIN


def test_a_scheduler_replaces_the_schedule():
    """Whatever the rates of a scheduler are relative to its peak is what steps are."""
    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=4, guided=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 6 else 0.25)
    used = []
    for _ in range(8):
        train(model, optimizer, 1)
        used.append(optimizer.param_groups[0]["guided_lr"])
        scheduler.step()
    assert used == pytest.approx([6e-3] * 6 + [1.5e-3] * 2)


def test_a_rate_that_a_loop_writes_replaces_the_schedule():
    """As in nanoGPT: for group in param_groups: group["lr"] = ..., before each step."""
    model = make_net()
    optimizer = HybridOptimizer(model, guided=False)
    used = []
    for lr in (1e-3, 2e-3, 6e-3, 3e-3, 0.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        train(model, optimizer, 1)
        used.append(optimizer.param_groups[0]["guided_lr"])
    assert used == pytest.approx([1e-3, 2e-3, 6e-3, 3e-3, 0.0])
    before = state_of(model)
    train(model, optimizer, 1)  # at 0
    same(before, state_of(model))


def test_the_schedule_without_a_horizon_and_its_end():
    optimizer = HybridOptimizer(make_net())
    shares = [optimizer.schedule(t) for t in range(1000)]
    assert shares[:20] == pytest.approx([(t + 1) / 20 for t in range(20)])
    assert set(shares[20:101]) == {1.0}
    assert shares[400] == pytest.approx(0.25)
    optimizer.steps = 400
    optimizer.end_in(100)
    assert optimizer.schedule(400) == pytest.approx(0.25)
    assert optimizer.schedule(450) == pytest.approx(0.5 * 100 / 450)
    assert optimizer.schedule(500) == optimizer.schedule(600) == 0.0
    with pytest.raises(ValueError, match="steps must be"):
        optimizer.end_in(0)


def test_the_size_of_the_rate_does_not_matter():
    """Six decades of it, and the same steps; with a scheduler, too."""
    found = {}
    for lr in (1e-6, 6e-3, 1.0):
        for scheduled in (False, True):
            model = make_net()
            optimizer = HybridOptimizer(model, max_steps=40, lr=lr)
            if scheduled:
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
            for _ in range(12):
                loss = train(model, optimizer, 1)
                if scheduled:
                    scheduler.step()
            found[lr, scheduled] = loss
    for scheduled in (False, True):
        same = [x for (_, s), x in found.items() if s == scheduled]
        assert same == pytest.approx([same[0]] * 3, rel=1e-3)
    assert found[1.0, False] != pytest.approx(found[1.0, True], rel=1e-3)


@pytest.mark.parametrize("length", [0.024, 0.6])
def test_guidance_finds_its_length(length):
    """From a fifth, or from five times the usual."""
    model = make_net()
    assert train(model, HybridOptimizer(model, max_steps=60, step_length=length), 60) < 0.1


def test_a_closure_is_called_once_and_shows_its_loss():
    model, calls = make_net(), []
    x, y = digits()
    optimizer = HybridOptimizer(model, max_steps=5)

    def closure() -> torch.Tensor:
        calls.append(1)
        return backward(model, x, y)

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert optimizer.guidance.fast.mean == pytest.approx(float(loss.detach()))


# ----------------------------------------------------------------------------- copies and states


def copied(optimizer: HybridOptimizer, model: nn.Module) -> tuple[HybridOptimizer, nn.Module]:
    return copy.deepcopy((optimizer, model))


def pickled(optimizer: HybridOptimizer, model: nn.Module) -> tuple[HybridOptimizer, nn.Module]:
    return pickle.loads(pickle.dumps((optimizer, model)))


def loaded(optimizer: HybridOptimizer, model: nn.Module) -> tuple[HybridOptimizer, nn.Module]:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = make_net(1)
    twin.load_state_dict(saved["model"])
    resumed = HybridOptimizer(twin)
    resumed.load_state_dict(saved["optimizer"])
    return resumed, twin


def checkpointed(optimizer: HybridOptimizer, model: nn.Module) -> tuple[HybridOptimizer, nn.Module]:
    """By names of parameters, as torch.distributed.checkpoint has it."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert "0.weight" in state["state"]
    twin = make_net(1)
    twin.load_state_dict(model.state_dict())
    resumed = HybridOptimizer(twin)
    set_optimizer_state_dict(twin, resumed, state)
    return resumed, twin


@pytest.mark.parametrize("how", [copied, pickled, loaded, checkpointed])
@pytest.mark.parametrize("steps", [1, 6])
def test_goes_on_to_the_bit(how: Callable, steps: int):
    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=12)
    train(model, optimizer, steps)
    other, twin = how(optimizer, model)
    train(model, optimizer, 12 - steps)
    train(twin, other, 12 - steps)
    same(state_of(model), state_of(twin))
    same(optimizer.guidance.state_dict(), other.guidance.state_dict())


def test_states_that_do_not_fit_are_refused():
    model = make_net()
    adam = torch.optim.AdamW(model.parameters())
    train(model, adam, 1)
    ours = HybridOptimizer(model.parameters())
    with pytest.raises(ValueError, match="not the state of a HybridOptimizer"):
        ours.load_state_dict(adam.state_dict())
    plain = ConstrainedOptimizer(model.parameters())
    for state in (adam.state_dict(), torch.optim.AdamW(model.parameters()).state_dict()):
        with pytest.raises(ValueError, match="this is the state of another optimiser"):
            plain.load_state_dict(state)
    a, b = nn.Linear(3, 2), nn.Linear(4, 2)
    first, second = ConstrainedOptimizer(a.parameters()), ConstrainedOptimizer(b.parameters())
    F.mse_loss(a(torch.ones(1, 3)), torch.ones(1, 2)).backward()
    first.step()
    with pytest.raises(ValueError, match=r"parameter 0 of its group has shape \(2, 4\), its state"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": 0}, "max_steps must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"step_length": -1.0}, "step_length must be"),
        ({"warmup_fraction": 0.9}, "warmup_fraction must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_nonsense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        HybridOptimizer(make_net(), **options)
    with pytest.raises(ValueError, match="nothing to train"):
        HybridOptimizer([])


# -------------------------------------------------------------------------------- what models do


def test_a_layer_that_is_thawed_is_trained():
    model = make_net()
    model[4].requires_grad_(False)
    optimizer = HybridOptimizer(model, max_steps=20)
    train(model, optimizer, 3)
    before = model[4].weight.clone()
    model[4].requires_grad_(True)
    train(model, optimizer, 3)
    assert not torch.equal(before, model[4].weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=20)
    train(model, optimizer, 3)
    before = state_of(model), copy.deepcopy(optimizer.guidance.state_dict())
    backward(model, *digits())
    model[4].weight.grad[0, 0] = bad
    optimizer.step()
    same(before, (state_of(model), optimizer.guidance.state_dict()))
    assert train(model, optimizer, 16) < 2.0  # and goes on


def test_two_at_once_and_a_rate_that_is_a_tensor():
    model = make_net()
    half = len(list(model.parameters())) // 2
    both = [
        HybridOptimizer(list(model.parameters())[:half], max_steps=40, lr=torch.tensor(6e-3)),
        HybridOptimizer(list(model.parameters())[half:], max_steps=40),
    ]

    class Both:
        def step(self) -> None:
            for optimizer in both:
                optimizer.step()

    assert train(model, Both(), 40) < 0.1


def test_sharded_tensors_are_refused_in_words(monkeypatch):
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    p.grad.device_mesh = "a mesh"
    with pytest.raises(RuntimeError, match="cannot step sharded tensors"):
        HybridOptimizer([p]).step()


# -------------------------------------------------------------------------- trainers of others


def test_grad_scaler_unscales_and_skips():
    """Groups are there before the first step; an overflow skips."""
    model = make_net()
    x, y = digits()
    optimizer = HybridOptimizer(model, max_steps=40)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step == 5:
            model[0].weight.grad[0] = float("inf")
        scaler.unscale_(optimizer)
        if step != 5:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            assert norm < 1e3  # unscaled
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.steps == 39
    assert float(loss.detach()) < 0.2


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) * (1 + i % 3) + i) % 31
        return {"input_ids": ids, "labels": ids}


def tiny_gpt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_in_transformers_trainer(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny_gpt()
    optimizer = HybridOptimizer(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=16, use_cpu=True,
        lr_scheduler_type=kind, warmup_steps=4, report_to=[], disable_tqdm=True,
        gradient_accumulation_steps=2, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Words(), optimizers=(optimizer, None)
    )
    trainer.train()
    assert optimizer.steps == 40
    found = trainer.evaluate(Words())["eval_loss"]
    assert found < 2.0  # 3.43 at the start


def test_in_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=40)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    x, y = digits()
    for i in range(80):
        half = slice(32 * (i % 2), 32 * (i % 2) + 32)
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x[half]), y[half])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.optimizer.steps == 40
    assert float(loss.detach()) < 0.2


def test_a_compiled_model():
    model = make_net()
    compiled = torch.compile(model, backend="eager")
    optimizer = HybridOptimizer(compiled, max_steps=40)
    assert train(compiled, optimizer, 40) < 0.1
    assert all(not n.startswith("_orig") for n, _ in model.named_parameters())


# ------------------------------------------------------------------- schedules of the caller's


@pytest.mark.parametrize("peak", [1e-4, 6e-3, 0.5])
def test_one_cycle_rises_and_falls(peak):
    """Its group's lr starts at a 25th of max_lr, which is the peak."""
    model = make_net()
    optimizer = HybridOptimizer(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=40)
    shares = []
    for _ in range(39):
        train(model, optimizer, 1)
        shares.append(optimizer.guidance.share)
        scheduler.step()
    assert shares[0] == pytest.approx(0.04)
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] < 0.01


def test_a_plateau_scheduler_multiplies_the_schedule():
    """ReduceLROnPlateau leaves no initial_lr; a fall is a fall."""
    model = make_net()
    optimizer = HybridOptimizer(model, guided=False)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    used = []
    for t in range(300):
        train(model, optimizer, 1)
        used.append(optimizer.param_groups[0]["guided_lr"])
        if t in (198, 199):
            scheduler.step(1.0)
    assert used[199] == pytest.approx(6e-3 * 100 / 199)
    assert used[200] == pytest.approx(3e-3 * 100 / 200)
    flat = HybridOptimizer(make_net(), schedule=False)
    assert [flat.schedule(t) for t in (0, 10, 10_000)] == [1.0] * 3


def test_groups_keep_their_ratio_and_one_may_rest():
    model = make_net()
    params = list(model.parameters())
    groups = [{"params": params[:2], "lr": 0.0}, {"params": params[2:5], "lr": 1e-3},
              {"params": params[5:], "lr": 2e-3}]  # fmt: skip
    optimizer = HybridOptimizer(groups, max_steps=10)
    before = [p.clone() for p in params]
    train(model, optimizer, 1)
    rates = [g["guided_lr"] for g in optimizer.param_groups]
    assert rates[0] == 0
    assert rates[2] == pytest.approx(2 * rates[1])
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert moved == [False, False] + [True] * (len(params) - 2)


def test_an_end_is_not_for_schedules_of_others():
    model = make_net()
    optimizer = HybridOptimizer(model)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="a schedule of the caller's rules"):
        optimizer.end_in(10)


@pytest.mark.parametrize("first", ["zero", "not finite", "none"])
def test_steps_that_move_nothing_cost_nothing(first):
    """Regions are fitted to the first steps that move."""
    model = make_net()
    x, y = digits()
    optimizer = HybridOptimizer(model, max_steps=60)
    for _ in range(5):
        backward(model, x, y)
        for p in model.parameters():
            p.grad = None if first == "none" else p.grad * (0.0 if first == "zero" else torch.nan)
        optimizer.step()
    assert train(model, optimizer, 50) < 0.1


def test_hooks_are_called_once():
    model = make_net()
    ConstrainedOptimizer(make_net())  # torch wraps its step, too
    optimizer, calls = HybridOptimizer(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 2)
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("horizon", [None, 40])
def test_a_checkpoint_in_files_goes_on(tmp_path, horizon):
    """Read into the state of a fresh optimiser, as torch.distributed.checkpoint does; it has to
    hold the same tensors, so it averages if the saved one did."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=horizon)
    train(model, optimizer, 6)
    dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    twin = make_net()
    twin.load_state_dict(model.state_dict())
    resumed = HybridOptimizer(twin, average=horizon is None)
    state = {"o": get_optimizer_state_dict(twin, resumed)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, resumed, state["o"])
    same(optimizer.guidance.state_dict()["network"], resumed.guidance.state_dict()["network"])
    assert (resumed.steps, resumed.max_steps) == (6, horizon)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert ("average" in resumed.state[q]) == (horizon is None)
        if horizon is None:
            assert torch.equal(optimizer.state[p]["average"], resumed.state[q]["average"])
    assert train(twin, resumed, 34) == pytest.approx(train(model, optimizer, 34), rel=0.05)


def test_names_of_embeddings():
    def kind(name: str, *shape: int) -> str:
        groups = HybridOptimizer([(name, nn.Parameter(torch.ones(shape)))]).param_groups
        return groups[0]["kind"]

    for name in ("wte", "model.embed_tokens", "bert.embeddings.word_embeddings", "pos_emb"):
        assert kind(f"{name}.weight", 8, 4) == "embedding"
    assert kind("embeddings.LayerNorm.weight", 8) == "vector"
    assert kind("patch_embed.proj.weight", 8, 4) == "matrix"
    assert kind("time_embed.0.weight", 8, 4) == "matrix"


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    HybridOptimizer([nn.Parameter(torch.ones(2, 2))])
    first = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(1))


def test_a_closure_without_a_loss():
    model = make_net()
    optimizer = HybridOptimizer(model)
    x, y = digits()

    def closure() -> None:
        backward(model, x, y)

    assert optimizer.step(closure) is None
    with pytest.raises(TypeError, match="not one tensor"):
        HybridOptimizer(nn.Parameter(torch.ones(2)))
