"""Several processes that train one model take the same steps."""

from __future__ import annotations

import pytest
import torch
from toys import backward, digits, distributed_run, make_net, same

from hybrid_optimization import ConstrainedOptimizer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="no gloo",
)


def two_ranks(folder, how: str) -> list[dict]:
    arguments = (2, str(folder), how)
    torch.multiprocessing.spawn(distributed_run, arguments, nprocs=2)
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(2)]


def test_the_step_on_two_processes_is_that_on_their_batches_together(tmp_path):
    first, second = two_ranks(tmp_path, "optimizer")
    same(first["model"], second["model"])
    model = make_net()
    # As in distributed_run: half the precision would make more of the gradients' last digits,
    # which differ, than the tolerance allows.
    optimizer = ConstrainedOptimizer(model, lr=2e-3, product_dtype=torch.float32)
    for _ in range(8):
        backward(model, *digits())
        optimizer.step()
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], weights, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("how", ["manager", "compiled"])
def test_managers_agree_though_losses_and_clusters_differ(tmp_path, how):
    first, second = two_ranks(tmp_path, how)
    same(first["model"], second["model"])
    shared = ("loss", "learning_rate", "lr_multiplier", "trust_radius", "cluster_rate", "skipped")
    for one, other in zip(first["steps"], second["steps"], strict=True):
        assert all(one[k] == other[k] or one["skipped"] for k in shared)
    assert [s["skipped"] for s in first["steps"]] == [s["skipped"] for s in second["steps"]]
    assert [s["skipped"] for s in first["steps"]].count(True) == 1  # NaN on one rank
    assert first["steps"][0]["learning_rate"] > 0
    assert not torch.equal(first["model"]["6.bias"], make_net().state_dict()["6.bias"])
