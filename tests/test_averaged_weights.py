"""The weights that `HybridOptimizer` averages where no horizon is known."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn as nn
from test_hybrid_optimizer import Words, state_of, tiny_gpt, train
from toys import backward, digits, make_net, same

from hybrid_optimization import HybridOptimizer


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
