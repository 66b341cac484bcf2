"""Recording a metric on a GPU must not wait for the device."""

import pytest
import torch

from emma_train.engine.grad_norm import record_squares
from emma_train.metrics import record_metric, recording
from emma_train.training.metric_reduction import to_host
from emma_train.training.source_losses import pop_source_losses, record_source_losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_recording_does_not_wait_for_the_device() -> None:
    values = torch.arange(5.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with recording() as recorded:
            for _ in range(2):
                record_metric("sum", values, "sum")
                record_metric("max", values > 3, "max")
                record_metric("mean", values.bfloat16(), "mean")
                record_metric("mean", 4.0, "mean")
            with pytest.raises(RuntimeError, match="synchroniz"):
                values.tolist()  # the debug mode does notice it
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = to_host(recorded)
    assert host["sum"].value == 20 and host["max"].value == 1
    assert host["mean"].value / host["mean"].num_values == 28 / 12


def test_losses_by_source_and_norms_by_group_do_not_wait_for_the_device() -> None:
    losses, owner = torch.arange(6.0, device="cuda"), torch.tensor([0, 0, 1, 1, 2, 2], device="cuda")
    squares = torch.arange(3.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with recording() as recorded:
            record_source_losses(["i2t", "i2t", "t2i"], ["a", "b", ""], owner, losses)
            record_squares(["vision.x", "decoder.a", "decoder.b"], squares, sp_size=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = {name: metric.value for name, metric in to_host(recorded).items()}
    assert pop_source_losses(values) == {"loss/i2t/a": 0.5, "loss/i2t/b": 2.5}
    assert values == {"grad_square/vision": 0.0, "grad_square/decoder": 3.0}
