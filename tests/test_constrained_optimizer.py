"""The constrained step: against float64 twins and closed forms."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import backward, digits, make_net, same

from hybrid_optimization import (
    ConstrainedOptimizer,
    equal_blocks,
    inverse_square_root,
    named_kinds,
    native_bfloat16,
    newton_inverse_square_root,
)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(1e-6, 1e6),
)
@settings(max_examples=200, deadline=None)
def test_apply_constraint_projects(values, radius):
    update = torch.tensor(values)
    cut, active = ConstrainedOptimizer.apply_constraint(update, radius)
    norm = float(torch.linalg.vector_norm(update.double()))
    assert float(torch.linalg.vector_norm(cut.double())) <= radius * (1 + 1e-6) or norm <= radius
    assert active == (norm > radius)
    if not active:
        assert torch.equal(cut, update)
    elif norm < 1e20:
        cosine = float(cut.double() @ update.double())
        cosine /= max(norm * float(torch.linalg.vector_norm(cut.double())), 1e-300)
        assert cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_apply_constraint_of_something_not_finite_is_zero(value):
    cut, active = ConstrainedOptimizer.apply_constraint(torch.tensor([1.0, value]), 1.0)
    assert active
    assert cut.tolist() == [0, 0]


@pytest.mark.parametrize("radius", [-1.0, float("nan")])
def test_apply_constraint_refuses_what_is_no_radius(radius):
    with pytest.raises(ValueError, match="constraint_radius must be at least 0"):
        ConstrainedOptimizer.apply_constraint(torch.ones(2), radius)


def test_region_grows_when_inactive_and_shrinks_when_active():
    p = nn.Parameter(torch.ones(4, 4))
    radii = {}
    for lr in (1e-6, 1.0):
        opt = ConstrainedOptimizer([p], lr=lr)
        p.grad = torch.randn(4, 4)
        before = opt.radii().clone()
        opt.step()
        radii[lr] = float(opt.radii() / before)
        assert opt.info.constraint_active == (lr == 1.0)
    assert radii[1e-6] > 1
    assert radii[1.0] < 1


def test_fixed_radius_stays():
    model, (x, y) = make_net(), digits()
    opt = ConstrainedOptimizer(model, lr=0.1, initial_radius=0.02, adapt_radius=False)
    for _ in range(5):
        backward(model, x, y)
        opt.step()
    assert opt.radii().tolist() == pytest.approx([0.02])


def reference_root(gram: np.ndarray, damping: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(gram)
    return (vectors / np.sqrt(values + damping * values.mean())) @ vectors.T


def reference_direction(grads: list[np.ndarray], block: int, beta=0.9, decay=0.9, damping=0.1):
    """float64 twin of the matrix direction with roots refreshed at every step; block: rows of the
    larger side's metric."""
    if grads[0].shape[0] < grads[0].shape[1]:
        return reference_direction([g.T for g in grads], block, beta, decay, damping).T
    large, small = grads[0].shape
    parts = [slice(i, i + block) for i in range(0, large, block)]
    mean = inner = square = np.zeros(())
    outer = [np.zeros(())] * len(parts)
    for t, g in enumerate(grads, 1):
        mean = beta * mean + (1 - beta) * g
        inner = decay * inner + (1 - decay) * (g.T @ g)
        root = reference_root(inner / (1 - decay**t), damping)
        half = g @ root
        outer = [
            decay * x + (1 - decay) * (half[p] @ half[p].T)
            for x, p in zip(outer, parts, strict=True)
        ]
        factor = beta / (1 - beta**t)  # the length's only
        ahead = (mean + (1 - beta) / factor * g) @ root
        d = np.concatenate(
            [
                reference_root(x / (1 - decay**t), damping) @ ahead[p]
                for x, p in zip(outer, parts, strict=True)
            ]
        )
        square = 0.95 * square + 0.05 * d * d
    d = d / np.sqrt(square)
    d *= factor * np.linalg.norm(ahead) / np.linalg.norm(d)
    return d * 0.75 * math.sqrt(large * min(large / small, 4))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((6, 6), 6),
        ((4, 8), 4),
        ((8, 4), 4),
        ((4, 9), 3),
        ((7, 4), 1),
        ((256, 8), 8),
        ((150, 140), 75),
    ],
)
def test_matrix_step_equals_its_float64_twin(shape, block):
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape)
    p = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    opt = ConstrainedOptimizer(
        [p], lr=1e-3, use_trust_region=False, refresh_every=1, product_dtype=torch.float32
    )
    grads = []
    for _ in range(5):
        g = rng.normal(size=shape)
        grads.append(g)
        p.grad = torch.tensor(g, dtype=torch.float32)
        opt.step()
        d = reference_direction(grads, block)
        w = w - 1e-3 * 20 * np.sqrt((w**2).mean()) * d
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
def test_products_in_bfloat16_give_the_same_direction(shape):
    rng = np.random.default_rng(0)
    basis = rng.normal(size=shape) * np.geomspace(1, 1e-2, shape[1])  # unequal eigenvalues
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(shape))
        opt = ConstrainedOptimizer(
            [p], lr=1e-3, use_trust_region=False, refresh_every=1, product_dtype=dtype
        )
        noise = np.random.default_rng(1)
        for _ in range(5):
            p.grad = torch.tensor(basis * noise.normal(size=shape), dtype=torch.float32)
            before = p.detach().clone()
            opt.step()
        steps[dtype] = (p.detach() - before).double().flatten()
    exact, fast = steps[torch.float32], steps[torch.bfloat16]
    assert float((fast - exact).norm() / exact.norm()) < 0.02
    assert not torch.equal(fast, exact)


def test_products_are_in_bfloat16_only_where_the_processor_has_them(monkeypatch):
    assert not native_bfloat16(torch.device("cuda"))
    for found, expected in (({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda x=found: x, raising=False)
        assert native_bfloat16(torch.device("cpu")) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not native_bfloat16(torch.device("cpu"))


def test_roots_are_fresh_at_first_and_cheap_later(monkeypatch):
    """At most 2 + t/16 steps old at step t, every ``refresh_every`` steps in the end."""
    import hybrid_optimization

    due: list[int] = []
    p = nn.Parameter(torch.randn(4, 6))
    opt = ConstrainedOptimizer([p], refresh_every=10)
    root = hybrid_optimization.inverse_square_root

    def note(gram, damping):
        due.append(opt.state[p]["step"])
        return root(gram, damping)

    monkeypatch.setattr(hybrid_optimization, "inverse_square_root", note)
    for _ in range(300):
        p.grad = torch.randn(4, 6)
        opt.step()
    assert due == sorted([*set(due), *set(due)])  # both sides at once
    due = sorted(set(due))
    assert due[0] == 1
    gaps = np.diff(due)
    assert (gaps <= np.minimum(2 + np.array(due[1:]) // 16, 10)).all()
    assert gaps[:10].max() <= 2
    assert set(gaps[-5:]) == {10}


def test_no_matrix_loses_its_turn_for_roots():
    """Turns move while the time between them grows; no roots are older than promised."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(2, 2)) for _ in range(24)]
    opt = ConstrainedOptimizer(params)
    roots: dict[nn.Parameter, torch.Tensor] = {}
    for t in range(1, 401):
        for p in params:
            p.grad = torch.randn(2, 2)
        opt.step()
        for p in params:
            state = opt.state[p]
            assert t - state["rooted"] < min(20, 2 + t // 16)
            assert (state["inner_root"] is not roots.get(p)) == (state["rooted"] == t)
            roots[p] = state["inner_root"]


def test_cap_cuts_the_whole_proposal():
    """Decay, too: without regions a quarter of the proposal is a quarter of the step."""
    steps = []
    for cap in (1.0, 0.25):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
        before = p.detach().clone()
        opt = ConstrainedOptimizer([p], weight_decay=0.5, use_trust_region=False)
        p.grad = torch.randn(6, 4, dtype=torch.float64)
        opt.step(cap=cap)
        steps.append(p.detach() - before)
    torch.testing.assert_close(steps[1], 0.25 * steps[0], rtol=1e-5, atol=0)


def test_vectors_step_as_adam_with_look_ahead():
    """The diagonal metric against its formula in float64, and against torch's Adam at momentum 0
    (where there is no look-ahead)."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=7)
    p = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    ours = ConstrainedOptimizer([p], lr=1e-2, use_trust_region=False)
    a, b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(w))
    plain = ConstrainedOptimizer([a], lr=1e-2, momentum=0.0, use_trust_region=False)
    adam = torch.optim.Adam([b], lr=3e-2, betas=(0.0, 0.95), eps=1e-12)
    mean, square = np.zeros(7), np.zeros(7)
    for t in range(1, 7):
        g = rng.normal(size=7)
        mean = 0.9 * mean + 0.1 * g
        square = 0.95 * square + 0.05 * g * g
        ahead = 0.9 * mean / (1 - 0.9**t) + 0.1 * g
        w = w - 3e-2 * ahead / np.sqrt(square / (1 - 0.95**t))
        p.grad = torch.tensor(g, dtype=torch.float32)
        a.grad, b.grad = torch.tensor(g), torch.tensor(g)
        for optimizer in (ours, plain, adam):
            optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def polar(g: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(5, 5), (8, 5), (5, 8)])
def test_first_whitened_step_has_the_signs_of_the_polar_factor(shape):
    """Without noise and damping whitening gives the orthogonal polar factor; blocks of the larger
    side (two of four) become polar factors of their own. Entries of its signs, as Adam's first
    step has of the gradient's, sqrt(n) times the polar factor's length."""
    torch.manual_seed(0)
    g = torch.randn(shape)
    p = nn.Parameter(torch.ones(shape))
    opt = ConstrainedOptimizer(
        [p], lr=0.05, damping=0.0, use_trust_region=False, product_dtype=torch.float32
    )
    p.grad = g
    opt.step()
    expected = polar(g)
    if shape != (5, 5):
        tall = expected if shape == (8, 5) else expected.mT
        blocks = torch.cat([polar(tall[:4]), polar(tall[4:])])
        expected = blocks if shape == (8, 5) else blocks.mT
    small, large = sorted(shape)
    length = math.sqrt(small / g.numel())  # of the polar factor, an entry
    expected = 0.75 * math.sqrt(large * large / small) * length * expected.sign()
    torch.testing.assert_close(1 - p.detach(), expected, rtol=1e-3, atol=1e-4)


def test_inverse_square_root():
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    gram = a @ a.T
    root = inverse_square_root(gram, 0.0)
    torch.testing.assert_close(root @ gram @ root, torch.eye(6, dtype=torch.float64))
    assert torch.isfinite(inverse_square_root(torch.zeros(3, 3), 1e-2)).all()
    assert not inverse_square_root(torch.zeros(2, 3, 3), 1e-2).any()
    batch = torch.stack([gram, 3 * gram])
    for root_of in (inverse_square_root, newton_inverse_square_root):
        roots = root_of(batch, 0.1)
        torch.testing.assert_close(roots, torch.stack([root_of(x, 0.1) for x in batch]))
    one = torch.tensor([[[4.0]], [[0.0]]])
    torch.testing.assert_close(inverse_square_root(one, 0.0)[0], torch.tensor([[0.5]]))


@pytest.mark.parametrize(("side", "at_most", "n"), [(8, 8, 1), (9, 4, 3), (7, 4, 7), (512, 128, 4)])
def test_equal_blocks(side, at_most, n):
    assert equal_blocks(side, at_most) == n


@pytest.mark.parametrize("spread", [0, 2, 6])
def test_newton_root_is_the_root(spread):
    """Eigenvalues over ``spread`` decades, float32, against eigenvalues in float64."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64))
    gram = (q * torch.logspace(0, -spread, 48, dtype=torch.float64)) @ q.T
    want = inverse_square_root(gram, 0.02)
    got = newton_inverse_square_root(gram.float(), 0.02).double()
    error = torch.linalg.matrix_norm(got - want) / torch.linalg.matrix_norm(want)
    assert error < 1e-3
    assert torch.isfinite(newton_inverse_square_root(torch.zeros(3, 3), 0.02)).all()


def test_zero_gradients_and_zero_weights_do_not_divide_by_zero():
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    opt = ConstrainedOptimizer(model, lr=0.1)
    for value in (0.0, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        opt.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all((p != 0).all() for p in model.parameters())


def test_optimizer_works_alone():
    """param groups, a scheduler, a closure called once, state_dict round trip."""
    x, y = digits(128)
    model = make_net()
    opt = ConstrainedOptimizer(model, lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    calls = []

    def closure():
        calls.append(1)
        return backward(model, x, y)

    first = opt.step(closure)
    assert len(calls) == 1
    schedule.step()
    assert opt.param_groups[0]["lr"] == 1e-3
    twin = make_net()
    twin.load_state_dict(model.state_dict())
    other = ConstrainedOptimizer(twin, lr=1.0)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (twin, other)):
        backward(m, x, y)
        o.step()
    same(model.state_dict(), twin.state_dict())
    assert backward(model, x, y).item() < first.item()


def test_plain_parameters_and_added_groups():
    a, b = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))
    opt = ConstrainedOptimizer([a], lr=1e-2)
    opt.add_param_group({"params": [b], "lr": 1e-3})
    a.grad, b.grad = torch.ones(3, 4), torch.ones(5)
    opt.step()
    assert (a < 1).all()
    assert (b < 1).all()


def test_added_clusters_get_a_region_of_their_own():
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = ConstrainedOptimizer([{"params": [a], "clusters": np.array([0])}], adapt_radius=False)
    a.grad = torch.ones(3)
    opt.step()
    opt.add_param_group({"params": [b, c], "clusters": [0, 2], "initial_radius": 0.2})
    with pytest.raises(TypeError, match="set"):
        opt.add_param_group({"params": {nn.Parameter(torch.ones(3))}})
    for p in (a, b, c):
        p.grad = torch.ones(3)
    opt.step()
    np.testing.assert_allclose(opt.radii(), [0.01, 0.01, 0.2], rtol=1e-6)
    assert all((p < 1).all() for p in (a, b, c))


@pytest.mark.parametrize("clusters", [[0, 1], [-1], [0.5], ["a"]])
def test_clusters_are_checked(clusters):
    with pytest.raises(ValueError, match="clusters must be an integer of at least 0 for each"):
        ConstrainedOptimizer([{"params": [nn.Parameter(torch.ones(3))], "clusters": clusters}])


def test_kinds():
    model = nn.ModuleDict(
        {
            "emb": nn.Embedding(9, 4),
            "norm": nn.LayerNorm(4),
            "fc": nn.Linear(4, 4),
            "head": nn.Linear(4, 9, bias=False),
        }
    )
    kinds = {n: k for n, _, k in named_kinds(model)}
    assert kinds == {
        "emb.weight": "embedding",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "fc.weight": "matrix",
        "fc.bias": "vector",
        "head.weight": "head",
    }


def stepped(gradients, **options) -> tuple[torch.Tensor, ConstrainedOptimizer]:
    """The weights after these gradients, from one start."""
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(6, 4))
    opt = ConstrainedOptimizer([p], lr=1e-3, **options)
    for g in gradients:
        p.grad = g.clone()
        opt.step()
    return p.detach(), opt


@pytest.mark.parametrize("never_wait", [False, True])
def test_a_spike_is_cut_the_more_the_longer_it_is(monkeypatch, never_wait):
    monkeypatch.setattr(ConstrainedOptimizer, "never_wait", never_wait)
    unit = [torch.nn.functional.normalize(torch.randn(24), dim=0).view(6, 4) for _ in range(16)]
    spiked = [*unit[:12], 30 * unit[12], *unit[13:]]
    cut = [*unit[:12], 3**2 / 30 * unit[12], *unit[13:]]
    found, opt = stepped(spiked, spike_limit=3)
    torch.testing.assert_close(found, stepped(cut, spike_limit=math.inf)[0])
    # The mean took it for 3: 1 so far, then 3 with a share of 1/13, then three times 1.
    mean = 1 + 2 / 13 * (13 / 14) * (14 / 15) * (15 / 16)
    assert float(opt.state_dict()["param_groups"][0]["region"]["norm"]) == pytest.approx(
        mean, rel=1e-5
    )
    assert not torch.allclose(found, stepped(spiked, spike_limit=math.inf)[0], atol=1e-4)


def test_a_usual_gradient_is_left_alone():
    torch.manual_seed(0)
    gradients = [(0.5 + 1.5 * (t % 2)) * torch.randn(6, 4) for t in range(30)]
    a, b = (stepped(gradients, spike_limit=x)[0] for x in (3.0, math.inf))
    assert torch.equal(a, b)


def test_a_lasting_change_of_scale_is_followed():
    gradients = [torch.ones(6, 4) * (1.0 if t < 12 else 1e4) for t in range(112)]
    _, opt = stepped(gradients)
    norm = float(opt.state_dict()["param_groups"][0]["region"]["norm"])
    assert norm > 1e4 * 24**0.5 / 3  # from here on nothing is cut


@pytest.mark.parametrize("never_wait", [False, True])
@pytest.mark.parametrize("nothing", [1, 2, 3, 12, 25])
def test_gradients_that_begin_at_zero(monkeypatch, never_wait, nothing):
    """Roots may be older than the first gradient that is not zero."""
    monkeypatch.setattr(ConstrainedOptimizer, "never_wait", never_wait)
    start = stepped([torch.zeros(6, 4)] * nothing)[0]
    assert torch.equal(start, stepped([])[0])
    end, opt = stepped([torch.zeros(6, 4)] * nothing + [torch.ones(6, 4)] * 12)
    assert bool(torch.isfinite(end).all())
    assert 1e-4 < float((end - start).abs().max()) < 1
    assert float(opt.state_dict()["param_groups"][0]["region"]["norm"]) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("initial_radius", 5),
        ("spike_limit", 0),
        ("spike_limit", float("nan")),
        ("weight_decay", -1),
        ("active_share", 5),
        ("momentum", 1.0),
        ("metric_decay", 1.0),
        ("matrix_metric_decay", -0.1),
        ("refresh_every", 0),
        ("largest_block", 0.5),
        ("damping", -1),
        ("product_dtype", torch.int8),
        ("use_trust_region", 1),
        ("kind", "matrx"),
    ],
)
def test_options_are_checked_by_name(name, value):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{name} must be"):
        ConstrainedOptimizer([{"params": [p], name: value}])
    if name != "kind":
        with pytest.raises(ValueError, match=f"{name} must be"):
            ConstrainedOptimizer([p], **{name: value})


@pytest.mark.parametrize("params", [[], nn.ReLU(), make_net().requires_grad_(False)])
def test_nothing_to_train_is_refused(params):
    with pytest.raises(ValueError, match="nothing to train"):
        ConstrainedOptimizer(params)
