"""`ConstrainedOptimizer` as PyTorch users expect an optimiser to be."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn as nn
from toys import backward, digits, losses_plain_and_compiled, make_net, same

from hybrid_optimization import ConstrainedOptimizer


def test_gradient_scaler_unscales_and_skips():
    """Scaled gradients step as plain ones; an overflow is skipped and halves the scale."""
    x, y = digits(128)
    models = [make_net(), make_net()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for model, scale in zip(models, (None, scaler), strict=True):
        opt = ConstrainedOptimizer(model, lr=2e-3)
        for _ in range(3):
            loss = backward(model, x, y)
            if scale is not None:
                model.zero_grad()
                scale.scale(nn.functional.cross_entropy(model(x), y)).backward()
                scale.step(opt)
                scale.update()
            else:
                opt.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(models[1].state_dict())
    for p in models[1].parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(loss)
    scaler.step(opt)
    scaler.update()
    same(before, models[1].state_dict())
    assert scaler.get_scale() == 2.0**9


def test_closure_schedulers_and_copies():
    """A deep copy of model and optimiser goes on exactly as the original."""
    x, y = digits(128)
    model = make_net()
    opt = ConstrainedOptimizer(model, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=20, cycle_momentum=False)
    for _ in range(4):
        opt.step(lambda: backward(model, x, y))
        schedule.step()
    twin, other = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (twin, other)):
        for _ in range(3):
            backward(m, x, y)
            o.step()
    same(model.state_dict(), twin.state_dict())


def test_bfloat16_parameters_move():
    x, y = digits(128)
    model = make_net().to(torch.bfloat16)
    opt = ConstrainedOptimizer(model, lr=5e-3)
    first = backward(model, x.bfloat16(), y).item()
    for _ in range(20):
        backward(model, x.bfloat16(), y)
        opt.step()
    assert backward(model, x.bfloat16(), y).item() < 0.8 * first
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_parameters_without_gradient_are_left_alone():
    x, y = digits(64)
    model = make_net()
    frozen = model[0].weight.requires_grad_(False)
    before = frozen.clone()
    opt = ConstrainedOptimizer(list(model.parameters()), lr=1e-2)
    backward(model, x, y)
    opt.step()
    assert torch.equal(frozen, before)
    model.zero_grad()
    after = copy.deepcopy(model.state_dict())
    assert opt.info.update_magnitude > 0
    opt.step()  # no gradients at all
    same(after, model.state_dict())
    assert opt.info.update_magnitude == 0


@pytest.mark.parametrize("never_wait", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_types_resume_exactly(monkeypatch, dtype, never_wait):
    """torch casts a loaded state to the parameters' type; ours is float32 whatever they are."""
    monkeypatch.setattr(ConstrainedOptimizer, "never_wait", never_wait)
    x, y = digits(64)
    models = make_net().to(dtype), make_net().to(dtype)
    opt, other = (ConstrainedOptimizer(m, lr=2e-3) for m in models)

    def go(model, optimizer):
        for _ in range(3):
            backward(model, x.to(dtype), y)
            optimizer.step(keep_step=True)

    go(models[0], opt)
    saved = copy.deepcopy(opt.state_dict())
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    for model, optimizer in zip(models, (opt, other), strict=True):
        go(model, optimizer)
    same(models[0].state_dict(), models[1].state_dict())
    same(before, saved)


def test_the_norm_of_half_precision_gradients_does_not_overflow():
    p = nn.Parameter(torch.zeros(9, dtype=torch.float16))
    p.grad = torch.full((9,), 3e4, dtype=torch.float16)
    assert float(ConstrainedOptimizer([p]).gradient_norm()) == pytest.approx(9e4, rel=1e-3)


def test_state_saved_without_pickle_resumes_exactly(tmp_path):
    """As PyTorch's own test of saving and loading with weights_only."""
    x, y = digits(128)
    model, twin = make_net(), make_net()
    opt, other = ConstrainedOptimizer(model, lr=2e-3), ConstrainedOptimizer(twin, lr=1.0)
    for _ in range(3):
        backward(model, x, y)
        opt.step()
    torch.save([model.state_dict(), opt.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    for m, o in ((model, opt), (twin, other)):
        backward(m, x, y)
        o.step()
    same(model.state_dict(), twin.state_dict())


def test_memory_layout_of_weights_does_not_matter():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8)
    for model in (plain, last):
        opt = ConstrainedOptimizer(model, lr=1e-2)
        for _ in range(3):
            model.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    opt = ConstrainedOptimizer(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        opt.step()


def test_hooks_and_printing():
    seen = []
    p = nn.Parameter(torch.ones(3, 4))
    opt = ConstrainedOptimizer([p], lr=1e-2)
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.step()
    assert seen == ["before", "after"]
    assert "lr: 0.01" in repr(opt)


@pytest.mark.parametrize("schedule", ["StepLR", "CosineAnnealingLR", "ReduceLROnPlateau"])
def test_goes_downhill_with_torch_schedulers(schedule):
    """The convex problem of PyTorch's own optimiser tests, with a rate that may fall to 0."""
    kinds = torch.optim.lr_scheduler
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
    x = torch.randn(5)
    opt = ConstrainedOptimizer([{"params": [weight]}, {"params": [bias], "lr": 1e-2}], lr=1e-3)
    scheduler = {
        "StepLR": lambda: kinds.StepLR(opt, gamma=0.9, step_size=10),
        "CosineAnnealingLR": lambda: kinds.CosineAnnealingLR(opt, 20),
        "ReduceLROnPlateau": lambda: kinds.ReduceLROnPlateau(opt, threshold=0.3),
    }[schedule]()
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        opt.step()
        scheduler.step(*([loss.detach()] if schedule == "ReduceLROnPlateau" else []))
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_same_gradients_on_every_rank_give_the_same_step():
    """What data-parallel training needs: equal parameters and gradients step bit-identically."""
    x, y = digits(128)
    ranks = [make_net(), make_net()]
    opts = [ConstrainedOptimizer(m, lr=2e-3) for m in ranks]
    for _ in range(12):
        for m, o in zip(ranks, opts, strict=True):
            backward(m, x, y)
            o.step()
    same(ranks[0].state_dict(), ranks[1].state_dict())


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def stack_of_equals() -> nn.Module:
    """Matrices of equal shapes, square, wide and tall, their biases, and two numbers."""
    torch.manual_seed(0)
    sizes = [36, 24, 24, 36, 24, 24, 36, 10]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(
        nn.AvgPool2d((2, 1)), nn.Flatten(), nn.Linear(32, 36), *layers, Gain(), Gain()
    )


def test_the_way_of_a_gpu_is_the_same_step():
    """Where the host does not wait and equal shapes are one tensor, steps are the same: also after
    loading what no longer lies together, and where one of them has had fewer steps. One
    that is not finite leaves nothing behind but a count."""
    x, y = digits(128)
    models = [stack_of_equals(), stack_of_equals()]
    opts = [
        ConstrainedOptimizer(
            m, lr=2e-3, weight_decay=0.1, refresh_every=1, largest_block=12,
            product_dtype=torch.float32,
        )
        for m in models
    ]  # fmt: skip
    opts[1].never_wait = True
    for t in range(16):
        if t == 5:
            saved = opts[1].state_dict()
            saved["state"] = {
                key: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
                for key, state in saved["state"].items()
            }
            opts[1].load_state_dict(saved)
        for m, o in zip(models, opts, strict=True):
            backward(m, x, y)
            if t == 3:
                m[4].weight.grad = None
            if t == 13:  # a spike, which both cut
                torch._foreach_mul_([p.grad for p in m.parameters()], 1e4)
            for group, factor in zip(o.param_groups, (1, 2), strict=False):
                group["lr"] = factor * 2e-3 / (1 + t)
            o.step(keep_step=t % 2 == 0)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a, b = (o.info.update_magnitude for o in opts)
        assert a == pytest.approx(b, rel=1e-4)
        torch.testing.assert_close(opts[0].slope(), opts[1].slope(), rtol=1e-3, atol=1e-6)
        assert opts[0].proposal_log10 == pytest.approx(opts[1].proposal_log10, abs=1e-4)
    model, opt = models[1], opts[1]
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    next(model.parameters()).grad[0] = float("nan")
    opt.step()
    assert opt.info.update_magnitude == 0
    same(model.state_dict(), before[0])
    for key, state in opt.state_dict()["state"].items():
        for name, value in state.items():
            if name not in ("step", "rooted", "taken", "inner_root", "outer_root"):
                torch.testing.assert_close(value, before[1][key][name], rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_model():
    """A model under torch.compile trains as the plain one (slow: it compiles)."""
    plain, compiled = losses_plain_and_compiled("cpu", 128)
    assert plain == pytest.approx(compiled, rel=1e-3)
