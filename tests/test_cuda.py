"""What must hold on a GPU, too: on demand, with ``pytest -m cuda``."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from toys import digits, losses_plain_and_compiled, make_net, same

import benchmark_hybrid_optimization as benchmark
import distillation
from hybrid_optimization import ConstrainedOptimizer, HybridOptimizationManager
from lowbit.files.packed import load_packed
from lowbit.generate import generate
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.calibration import calibrate
from lowbit.quantization.layers import quantize_model, snapshot_codes
from studies.tasks import METHODS

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def put_gradients(model: nn.Module, seed: int) -> None:
    """Of a fixed mean and much noise, the same on every device."""
    fixed, noise = (torch.Generator().manual_seed(s) for s in (0, seed))
    for p in model.parameters():
        g = torch.randn(p.shape, generator=fixed) + torch.randn(p.shape, generator=noise)
        p.grad = g.to(p.device)


def to_cpu(state: dict) -> dict:
    return {k: v.cpu() for k, v in state.items()}


def test_steps_are_those_of_a_cpu():
    """Eigenvalues and early decisions there, Newton's iteration and no waiting here."""
    models = [make_net(), make_net().to(DEVICE)]
    opts = [
        ConstrainedOptimizer(m, lr=2e-3, weight_decay=0.1, product_dtype=torch.float32)
        for m in models
    ]
    for t in range(30):
        for model, opt in zip(models, opts, strict=True):
            put_gradients(model, t)
            opt.step()
    there, here = (to_cpu(m.state_dict()) for m in models)
    for name, value in there.items():
        torch.testing.assert_close(here[name], value, rtol=1e-3, atol=1e-3)
    a, b = (opt.info for opt in opts)
    assert b.update_magnitude == pytest.approx(a.update_magnitude, rel=1e-2)


def test_no_step_waits_for_the_gpu():
    """torch's debug mode raises where the host synchronises. The first step copies constants."""
    model = make_net().to(DEVICE)
    opt = ConstrainedOptimizer(model, lr=2e-3)
    for t in range(8):
        put_gradients(model, t)
        torch.cuda.set_sync_debug_mode("error" if t else "default")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_resume_is_bit_exact(tmp_path: Path):
    straight = make_net().to(DEVICE)
    opt = ConstrainedOptimizer(straight, lr=2e-3, weight_decay=0.1)
    for t in range(20):
        if t == 9:
            torch.save([straight.state_dict(), opt.state_dict()], tmp_path / "state.pt")
        put_gradients(straight, t)
        opt.step()
    resumed = make_net(seed=5).to(DEVICE)
    other = ConstrainedOptimizer(resumed, lr=1.0)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for t in range(9, 20):
        put_gradients(resumed, t)
        other.step()
    same(straight.state_dict(), resumed.state_dict())


def test_a_gradient_that_is_not_finite_touches_nothing():
    model = make_net().to(DEVICE)
    manager = HybridOptimizationManager()
    for t in range(3):
        put_gradients(model, t)
        manager.optimization_step(model, 1.0, None, 0, t)
    before = copy.deepcopy(model.state_dict())
    next(model.parameters()).grad[0] = float("nan")
    assert manager.optimization_step(model, 1.0, None, 0, 3)["skipped"]
    manager.constrained_opt.step()  # without the manager's own look
    same(before, model.state_dict())


def test_mixed_precision_with_a_gradient_scaler():
    """float16 autocast: it learns; an overflow is skipped and halves the scale."""
    model = make_net().to(DEVICE)
    x, y = (t.to(DEVICE) for t in digits(256))
    opt = ConstrainedOptimizer(model, lr=2e-3)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(loss)
    scaler.step(opt)
    scaler.update()
    same(before, model.state_dict())
    assert scaler.get_scale() == scale / 2


def test_compiled_model_trains_as_the_plain_one():
    plain, compiled = losses_plain_and_compiled(DEVICE, 256)
    assert plain == pytest.approx(compiled, rel=1e-2)


@pytest.mark.parametrize("mode", ["ternary", "1bit"])
def test_calibration_is_that_of_a_cpu(mode):
    config = ModelConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    ids = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(0))
    codes = []
    for device in ("cpu", DEVICE):
        teacher = CausalLM(config).initialise(0).to(device)
        student = CausalLM(config).initialise(0).to(device)
        codes.append(
            snapshot_codes(calibrate(quantize_model(student, mode), teacher, [ids.to(device)]))
        )
    for name, there in codes[0].items():
        # Rounding with feedback carries a tie that falls the other way along its row.
        assert (codes[1][name].cpu() == there).float().mean() > 0.95


@pytest.mark.parametrize(
    "flags", [["--student_init", "teacher"], ["--student_init", "random"], ["--learnable_scale"]]
)
def test_main_job(flags, tmp_path, text_file, tiny_teacher, capsys):
    """bfloat16 forward passes: the student ends near the CPU's, and a CPU reads its file."""
    losses = []
    for device in ("cpu", DEVICE):
        folder = tmp_path / device
        words = "--hybrid --ternary --qat --epochs 4 --seq_len 64 --batch_size 8"
        command = [*words.split(), "--samples_per_epoch", "64", "--data", str(text_file), *flags]
        command += ["--teacher", str(tiny_teacher), "--device", device, "--output_dir", str(folder)]
        assert distillation.main(command) == 0
        out = capsys.readouterr().out
        found = re.search(r"student, quantized +(\d+\.\d+)", out)
        assert found is not None
        losses.append(float(found[1]))
        student = load_packed(folder / "student_quantized_ternary_1.58bit_qat.npz")[0].eval()
        assert len(generate(student, [65, 66], 8)) == 8
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize("method", [m for m in METHODS if "Hybrid -" not in m])
def test_every_method_trains(method, text_file, tiny_teacher):
    start = "teacher" if "calibration" in method else "random"
    for package in re.findall("schedulefree|prodigy", " ".join(METHODS[method])):
        pytest.importorskip({"prodigy": "prodigyopt"}.get(package, package))
    task = (
        f"--ternary --qat --student_init {start} --seq_len 64 --batch_size 8 --device {DEVICE} "
        f"--samples_per_epoch 64 --epochs 3 --data {text_file} --teacher {tiny_teacher}"
    )
    rate = {"sgd": "0.1", "prodigy": "1"}
    words = METHODS[method]
    extra = [x for name, r in rate.items() if name in words for x in ("--lr", r)]
    found = benchmark.run_once(method, [*words, *extra], task.split(), 0)
    assert found["steps"] == 24
    assert found["curve"][-1][1] < found["curve"][0][1]


def test_a_transformers_teacher(tmp_path, text_file, capsys):
    """Calibration block by block and the loss in chunks: the student ends near the CPU's."""
    pytest.importorskip("transformers")
    from families import tiny_folder

    teacher, losses = tiny_folder(tmp_path / "teacher", "llama"), []
    for device in ("cpu", DEVICE):
        words = "--hybrid --ternary --qat --epochs 2 --seq_len 32 --samples_per_epoch 64"
        command = [*words.split(), "--data", str(text_file), "--teacher", str(teacher)]
        command += ["--device", device, "--output_dir", str(tmp_path / device)]
        assert distillation.main(command) == 0
        found = re.search(r"student, quantized +(\d+\.\d+)", capsys.readouterr().out)
        assert found is not None
        losses.append(float(found[1]))
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
