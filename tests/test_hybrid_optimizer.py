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

from hybrid_optimization import (
    AuxiliaryNeuralNetwork,
    ConstrainedOptimizer,
    Guidance,
    HybridOptimizer,
)


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


def test_a_trainer_evaluates_the_average_and_resumes(tmp_path):
    """transformers calls eval() and train() itself; a checkpoint is saved after an evaluation,
    with the average in the model, and still goes on from the weights that were trained."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ends, seen = [], []

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            seen.append(getattr(optimizer, "optimizer", optimizer)._averaged)

    for resumes in (False, True):
        model = tiny_gpt()
        optimizer = HybridOptimizer(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=16, use_cpu=True,
            lr_scheduler_type="constant", report_to=[], disable_tqdm=True, eval_strategy="steps",
            eval_steps=10, save_steps=10, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Words(), eval_dataset=Words(),
            optimizers=(optimizer, None), callbacks=[Watch()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10") if resumes else None)
        optimizer.train()
        ends.append(state_of(model))
    assert seen == [True] * 3
    same(*ends)


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


@pytest.mark.parametrize(
    ("pretrained", "kappa", "decades"),
    [(False, -0.6, 0.0), (False, -1.0, -0.08), (True, -0.6, -0.08), (True, -0.3, 0.0)],
)
def test_swings_shorten_steps_near_a_start_that_is_worth_keeping(pretrained, kappa, decades):
    """The gain is 0.4 decades for each unit of kappa below -0.8, from a teacher's weights -0.4."""

    class AfterStep:
        RELATIVE_GAIN = ConstrainedOptimizer.RELATIVE_GAIN

        @staticmethod
        def slope() -> torch.Tensor:
            return torch.tensor(-kappa)

    low = HybridOptimizer(nn.Linear(2, 2), pretrained=pretrained).guidance.shrink_below
    guidance = Guidance(AuxiliaryNeuralNetwork(), 0.12, low)
    guidance.peak, guidance.promised = 1e-3, -1.0
    before = guidance.length
    guidance.lead(AfterStep(), guidance.describe(1.0, 1.0, 0, 1), left=1.0)  # type: ignore[arg-type]
    assert guidance.kappa == pytest.approx(kappa)
    assert guidance.length - before == pytest.approx(decades, abs=1e-6)


# ------------------------------------------------------------------------------ averaged weights


def test_the_average_is_a_running_mean_of_the_weights():
    """In float64, step by step: the weight of step t is 9 / (t + 8)."""
    model = make_net().double()
    optimizer = HybridOptimizer(model)
    x, y = digits()
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for t in range(1, 31):
        backward(model, x.double(), y)
        optimizer.step()
        for n, p in model.named_parameters():
            wanted[n] += (p.detach() - wanted[n]) * min(9 / (t + 8), 1)
    trained = state_of(model)
    optimizer.eval()
    optimizer.eval()  # once is enough
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[n], rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match=r"call the optimiser's train\(\)"):
        optimizer.step()
    optimizer.train()
    same(trained, state_of(model))
    train(model.float(), HybridOptimizer(model), 1)


def test_looking_at_the_average_changes_nothing():
    ends = []
    for looks in (False, True):
        model = make_net()
        optimizer = HybridOptimizer(model)
        for _ in range(12):
            train(model, optimizer, 1)
            if looks:
                optimizer.train(False)
                optimizer.train()
        ends.append(state_of(model))
    same(*ends)


@pytest.mark.parametrize("how", ["horizon", "end_in", "scheduler"])
def test_where_the_rate_falls_to_nothing_the_average_ends_at_the_weights(how):
    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=20 if how == "horizon" else None, average=True)
    scheduler = None
    if how == "scheduler":
        line = torch.optim.lr_scheduler.LambdaLR
        scheduler = line(optimizer, lambda t: max(1 - t / 19, 0.0))
    for t in range(20):
        if how == "end_in" and t == 10:
            optimizer.end_in(10)
        train(model, optimizer, 1)
        if scheduler is not None:
            scheduler.step()
        if t == 5:
            trained = state_of(model)
            optimizer.eval()
            assert not torch.equal(trained["0.weight"], model[0].weight)
            optimizer.train()
    trained = state_of(model)
    optimizer.eval()
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, trained[k], rtol=0, atol=1e-7)


def test_a_short_end_of_a_long_run_is_what_is_averaged():
    """Nothing of the 2,000 steps before is left in the mean after 50 in which the rate falls."""
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    optimizer = HybridOptimizer([p], guided=False, use_trust_region=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.steps = optimizer._moved = optimizer.state[p]["step"] = 2000
    optimizer.state[p]["average"].fill_(1e6)
    optimizer.end_in(50)
    for _ in range(50):
        optimizer.step()
    optimizer.eval()
    assert float(p.detach().abs().max()) < 2.0


def test_the_average_of_a_noisy_bowl_is_nearer_to_its_bottom():
    """Under a rate that never falls the weights shake around it."""
    torch.manual_seed(0)
    bottom = torch.randn(32, 32)
    p = nn.Parameter(torch.zeros(32, 32))
    optimizer = HybridOptimizer([p], schedule=False, weight_decay=0.0)
    for _ in range(300):
        p.grad = p.detach() - bottom + torch.randn(32, 32)
        optimizer.step()
    shaking = float((p.detach() - bottom).norm())
    optimizer.eval()
    assert float((p.detach() - bottom).norm()) < 0.6 * shaking


@pytest.mark.parametrize("looking", [False, True])
def test_a_run_with_an_average_goes_on_to_the_bit(looking):
    """Saved while training, or with the average in the model, as Trainer does after evaluation."""
    model = make_net()
    optimizer = HybridOptimizer(model)
    train(model, optimizer, 8)
    if looking:
        optimizer.eval()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = make_net()
    twin.load_state_dict(saved["model"])
    resumed = HybridOptimizer(twin)
    resumed.load_state_dict(saved["optimizer"])
    for m, o in ((model, optimizer), (twin, resumed)):
        o.train()
        train(m, o, 5)
        o.eval()
    same(state_of(model), state_of(twin))


def test_a_parameter_that_was_resized_is_averaged_anew():
    """With a gradient, without one, and between eval() and train()."""
    model = nn.ModuleList([nn.Embedding(6, 4), nn.Linear(4, 4)])
    optimizer = HybridOptimizer(model)

    def step(ids: int) -> None:
        optimizer.zero_grad()
        model[1](model[0](torch.arange(ids))).square().sum().backward()
        optimizer.step()

    step(6)
    table = model[0].weight
    for rows in (8, 10, 12):
        if rows == 12:
            optimizer.eval()
        optimizer.zero_grad()
        table.data = torch.ones(rows, 4)
        if rows == 10:
            table.requires_grad_(False)
        optimizer.train()
        step(6)
        table.requires_grad_(True)
        assert optimizer.state[table]["average"].shape == (rows, 4)
    optimizer.eval()
    assert torch.isfinite(table).all()


def test_a_model_that_is_cast_goes_on():
    model = make_net()
    optimizer = HybridOptimizer(model)
    train(model, optimizer, 3)
    model.double()
    x, y = digits()
    backward(model, x.double(), y)
    optimizer.step()
    optimizer.eval()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_checkpoint_without_the_trained_weights_is_refused():
    model = make_net()
    optimizer = HybridOptimizer(model)
    train(model, optimizer, 2)
    optimizer.eval()
    saved = optimizer.state_dict()
    state = {k: {n: x for n, x in v.items() if n != "trained"} for k, v in saved["state"].items()}
    with pytest.raises(ValueError, match=r"saved between eval\(\) and train\(\)"):
        HybridOptimizer(make_net()).load_state_dict({**saved, "state": state})


def test_averages_of_half_precision_are_float32():
    model = make_net().bfloat16()
    optimizer = HybridOptimizer(model)
    x, y = digits()
    for _ in range(6):
        backward(model, x.bfloat16(), y)
        optimizer.step()
    trained = state_of(model)
    means = {id(p): s["average"] for p, s in optimizer.state.items()}
    assert {m.dtype for m in means.values()} == {torch.float32}
    optimizer.eval()
    for p in model.parameters():
        assert torch.equal(p.detach(), means[id(p)].bfloat16())
    optimizer.train()
    same(trained, state_of(model))


def test_nothing_is_averaged_where_the_horizon_is_known_unless_asked():
    for options, average in (
        ({"max_steps": 8}, False),
        ({"max_steps": 8, "average": True}, True),
        ({"average": False}, False),
        ({}, True),
    ):
        model = make_net()
        optimizer = HybridOptimizer(model, **options)
        train(model, optimizer, 2)
        before = state_of(model)
        optimizer.eval()
        assert average == any("average" in state for state in optimizer.state.values())
        if not average:
            same(before, state_of(model))
            train(model, optimizer, 1)
    with pytest.raises(ValueError, match="average must be True or False"):
        HybridOptimizer(make_net(), average=1)


def test_the_average_of_what_was_thawed_is_of_its_own_steps():
    model = make_net()
    model[4].requires_grad_(False)
    optimizer = HybridOptimizer(model)
    train(model, optimizer, 30)
    model[4].requires_grad_(True)
    seen = []
    for _ in range(9):
        train(model, optimizer, 1)
        seen.append(model[4].weight.detach().clone())
    wanted = torch.zeros_like(seen[0])
    for t, w in enumerate(seen, 1):
        wanted += (w - wanted) * min(9 / (t + 8), 1)
    optimizer.eval()
    torch.testing.assert_close(model[4].weight.detach(), wanted)


# ------------------------------------------------------------------------------ the least share


def low_rank(rows: int, columns: int, t: int) -> torch.Tensor:
    """A gradient of rank 1 that swings."""
    a, b = torch.linspace(1, 2, rows), torch.linspace(-1, 1, columns)
    return torch.outer(a, b) * (-1) ** t


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (8, 3, 2, 2)])
def test_a_step_has_at_least_its_share_of_the_longest(shape):
    """Closed form: 2 % of the weights' root mean square at lr 1e-3, times 0.75 sqrt(aspect)."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    large, small = max(rows, columns), min(rows, columns)
    longest = 1e-3 * 20 * 0.75 * min(large / small, 4) ** 0.5
    shares = {}
    for least in (0.0, 0.3):
        p = nn.Parameter(torch.ones(shape))
        group = {"params": [p], "kind": "matrix"}
        optimizer = ConstrainedOptimizer([group], least_share=least, use_trust_region=False)
        for t in range(12):
            p.grad = low_rank(rows, columns, t).reshape(shape)
            before = p.detach().clone()
            optimizer.step()
            size = float(before.square().mean().sqrt())
            shares[least] = float((p.detach() - before).square().mean().sqrt()) / size / longest
    assert shares[0.0] < 0.15
    assert shares[0.3] == pytest.approx(0.3, rel=1e-3)


def test_matrices_that_step_together_take_the_steps_of_one_alone():
    """As on a GPU: three of one shape as one tensor; least share and average included. Two steps:
    later matrices take turns at fresh roots, in another order."""
    ends = []
    for together in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 40))
        optimizer = HybridOptimizer(model)
        optimizer.never_wait = together
        x = torch.randn(32, 12)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        optimizer.eval()
        ends.append(state_of(model))
    for k, v in ends[0].items():
        torch.testing.assert_close(v, ends[1][k], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_fades_takes_its_step_along():
    """Of zeros it leaves what momentum leaves without a least share; of a tenth, a tenth."""
    lengths: dict[float, list[float]] = {}
    for least in (0.0, 0.9):
        p = nn.Parameter(torch.ones(16, 16))
        group = {"params": [p], "kind": "matrix"}
        optimizer = ConstrainedOptimizer([group], least_share=least, use_trust_region=False)
        torch.manual_seed(0)
        for t in range(30):
            p.grad = torch.randn(16, 16) if t < 10 else torch.zeros(16, 16)
            before = p.detach().clone()
            optimizer.step()
            moved = float((p.detach() - before).norm() / before.norm())
            lengths.setdefault(least, []).append(moved)
    assert min(lengths[0.9][:10]) > 1.9 * max(lengths[0.0][5:10])
    assert lengths[0.9][10:] == pytest.approx(lengths[0.0][10:], rel=0.02)


def test_guidance_shortens_to_a_fifth_at_most():
    """Swings far beyond the minimum along each step, for a hundred steps: kappa is far below -1."""
    optimizer = HybridOptimizer([nn.Parameter(torch.ones(8, 8))], max_steps=2000)
    guidance = optimizer.guidance
    state = guidance.describe(1.0, 1.0, 0, 0)
    guidance.peak, guidance.share = guidance.step_length / optimizer.RELATIVE_GAIN, 1.0
    optimizer.slope = lambda: torch.tensor(5.0)
    for _ in range(100):
        guidance.promised = -1.0
        guidance.lead(optimizer, state, 1.0)
    assert guidance.kappa == pytest.approx(-5.0)
    assert 10**guidance.length == pytest.approx(guidance.step_length / 5)
