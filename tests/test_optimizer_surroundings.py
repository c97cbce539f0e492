"""Models that change while they are trained, and libraries around the optimiser."""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_hybrid_optimizer import state_of, tiny_gpt, train
from toys import backward, digits, make_net, same

from hybrid_optimization import ConstrainedOptimizer, HybridOptimizer


def tokens_loss(model: nn.Module, optimizer: Any, steps: int) -> float:
    ids = torch.arange(16)[None]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_vocabulary_that_grows():
    """transformers resizes the parameter in place; its state starts anew, the others' go on."""
    model = tiny_gpt()
    optimizer = HybridOptimizer(model, max_steps=40)
    tokens_loss(model, optimizer, 4)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(40)
    embedding = model.transformer.wte.weight
    before = embedding.detach().clone()
    assert tokens_loss(model, optimizer, 36) < 1.0  # from 3.4
    assert not torch.equal(before[:31], embedding[:31])
    assert optimizer.state[embedding]["step"] == 36
    assert optimizer.state[model.transformer.wpe.weight]["step"] == 40


def test_a_layer_that_is_replaced_is_added():
    model = make_net()
    optimizer = HybridOptimizer(model, max_steps=60)
    train(model, optimizer, 5)
    torch.manual_seed(1)
    model[6] = nn.Linear(16, 10)
    before = state_of(model)
    train(model, optimizer, 1)
    assert torch.equal(before["6.weight"], model[6].weight)  # nobody told the optimiser
    optimizer.add_param_group({"params": [model[6].weight], "kind": "head"})
    optimizer.add_param_group({"params": model[6].bias})
    assert [g["weight_decay"] for g in optimizer.param_groups[-2:]] == [0.5, 0.0]
    assert train(model, optimizer, 54) < 0.1
    assert all(g["guided_lr"] > 0 for g in optimizer.param_groups)


def test_a_group_with_a_larger_rate_is_no_schedule():
    """Added before the first step or later, with names or without; a mixed group does not decay."""
    model = make_net()
    params = list(model.named_parameters())
    optimizer = HybridOptimizer([{"params": params[:3]}], max_steps=40)
    optimizer.add_param_group({"params": params[3:5], "lr": 0.1})
    shares = []
    for t in range(20):
        if t == 10:
            optimizer.add_param_group({"params": params[5:], "lr": 0.5})
        train(model, optimizer, 1)
        shares.append(optimizer.guidance.share)
    assert shares == pytest.approx([optimizer.schedule(t) for t in range(20)])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0] * 3
    assert optimizer.param_groups[2]["param_names"] == [n for n, _ in params[5:]]


@pytest.mark.parametrize("kind", [ConstrainedOptimizer, HybridOptimizer])
def test_frozen_thawed_and_frozen_again(kind):
    model = make_net()
    model[4].requires_grad_(False)
    optimizer = kind(model, lr=2e-3)
    start = model[4].weight.clone()
    train(model, optimizer, 3)
    assert torch.equal(start, model[4].weight)
    model[4].requires_grad_(True)
    train(model, optimizer, 3)
    thawed = model[4].weight.clone()
    assert not torch.equal(start, thawed)
    model[4].requires_grad_(False)
    train(model, optimizer, 3)
    assert torch.equal(thawed, model[4].weight)


def test_a_cell_that_is_run_twice_leaves_nothing_behind():
    """No hooks on the model, and no cycle that keeps the first optimiser's moments alive."""
    model = make_net()
    gone = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            optimizer = HybridOptimizer(model, max_steps=20)
            train(model, optimizer, 3)
            mean = optimizer.state[model[0].weight]["mean"]
            gone += [weakref.ref(optimizer), weakref.ref(mean)]
            del mean
        assert [ref() is None for ref in gone] == [True, True, False, False]
        del optimizer
        assert all(ref() is None for ref in gone)
    finally:
        gc.enable()
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_what_are_no_parameters_is_refused_in_words():
    p = nn.Parameter(torch.ones(3))
    for given in (["a"], [("a", p), p], {"params": [p]}, [p, "a"]):
        with pytest.raises(TypeError, match="params: give a module"):
            HybridOptimizer(given)


def test_hooks_of_states_and_gradients_that_are_kept():
    """torch's contract: four hooks on states, step's hook before the closure, zero_grad."""
    model, calls = make_net(), []
    optimizer = HybridOptimizer(model, max_steps=20)
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    x, y = digits()

    def closure() -> torch.Tensor:
        calls.append("closure")
        assert torch.is_grad_enabled()
        return backward(model, x, y)

    assert optimizer.step(closure=closure).requires_grad
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step", "closure", "save", "saved", "load", "loaded"]
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_averaged_weights():
    """torch's exponential average beside the optimiser: nothing to do for either."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, x, y = make_net(), *digits()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = HybridOptimizer(model, max_steps=40)
    for _ in range(40):
        train(model, optimizer, 1)
        average.update_parameters(model)
    assert float(F.cross_entropy(average(x), y).detach()) < 0.1
    assert not any(torch.equal(a, b) for a, b in zip(average.module.parameters(),
                                                     model.parameters(), strict=True))  # fmt: skip


def test_low_rank_adapters():
    """peft's: only they move, their state is saved and goes on to the bit."""
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        return peft.get_peft_model(tiny_gpt(), config)

    model = adapted()
    base = model.base_model.model.transformer.wte.weight.clone()
    optimizer = HybridOptimizer(model, max_steps=40)
    first = tokens_loss(model, optimizer, 1)
    tokens_loss(model, optimizer, 19)
    twin = adapted()
    peft.set_peft_model_state_dict(twin, peft.get_peft_model_state_dict(model))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = HybridOptimizer(twin)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    last = tokens_loss(model, optimizer, 20)
    assert last < first - 0.2
    assert tokens_loss(twin, resumed, 20) == last
    assert torch.equal(base, model.base_model.model.transformer.wte.weight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_lightning(tmp_path, precision):
    """Automatic optimisation hands the optimiser a closure; a checkpoint goes on."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = make_net(), 0

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.calls += 1
            self.loss = F.cross_entropy(self.net(batch[0]), batch[1])
            return self.loss

        def configure_optimizers(self) -> HybridOptimizer:
            return HybridOptimizer(self, max_steps=40)

    data = torch.utils.data.TensorDataset(*digits())
    batches = torch.utils.data.DataLoader(data, batch_size=64)
    path, model = tmp_path / "saved.ckpt", Net()
    for begin, end in ((0, 20), (20, 40)):
        model = Net()
        trainer = lightning.Trainer(
            max_steps=end, max_epochs=-1, accelerator="cpu", precision=precision, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            gradient_clip_val=5.0, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, batches, ckpt_path=path if begin else None)
        trainer.save_checkpoint(path)
        assert model.calls == end - begin  # each closure once
        assert trainer.optimizers[0].steps == end
        assert trainer.optimizers[0].guidance.fast.mean > 0  # it is shown the loss
    assert float(model.loss.detach()) < 0.1


@pytest.mark.parametrize("how", ["FSDP2", "FSDP1"])
def test_real_sharded_parameters_are_refused_at_once(monkeypatch, tmp_path, how):
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed import fsdp

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if how == "FSDP2":
                mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
                model = fsdp.fully_shard(model, mesh=mesh)
            else:
                cpu = torch.device("cpu")
                model = fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
        with pytest.raises(RuntimeError, match="cannot step sharded tensors"):
            HybridOptimizer(model)
    finally:
        dist.destroy_process_group()


def test_several_optimisers_step_parts_as_if_alone():
    """What one does to its part does not depend on what the other does to the rest."""
    ends = []
    for others in (False, True):
        model = make_net()
        mine, rest = model[:4], model[4:]
        optimizer = HybridOptimizer(mine, max_steps=20)
        second = HybridOptimizer(rest, max_steps=20)
        for _ in range(5):
            backward(model, *digits())
            gradients = [torch.ones_like(p) for p in mine.parameters()]
            for p, g in zip(mine.parameters(), gradients, strict=True):
                p.grad = g
            optimizer.step()
            if others:
                second.step()
        ends.append(state_of(mine))
    same(*ends)
