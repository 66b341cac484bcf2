"""Recording a metric on a GPU must not wait for the device."""

import pytest
import torch

from emma_train.metrics import record_metric, recording
from emma_train.training.metric_reduction import to_host

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
