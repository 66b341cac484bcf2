"""Copies of a rank's tensors in host memory, so that training can change the tensors while the copies are written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from emma_train.engine.flat_shard import FlatShard, local


class Staging:
    """Buffers in host memory, as large as the tensors; allocated once and used by every save.

    On a GPU they are pinned, and copies run on a separate stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_compute(self) -> None:
        """Wait until the device has finished the training thread's work. The training thread calls it before another
        thread copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Host copies of this rank's parts of the tensors, by name. They are valid until the next copy."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                part = local(tensor)
                buffer = self._buffers.get(name)
                if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                    buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=self._stream is not None)
                    self._buffers[name] = buffer
                buffer.copy_(part, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return {name: _with_values(tensor, self._buffers[name]) for name, tensor in tensors.items()}

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run this thread's device work in a separate stream, so that it does not wait for the training thread's."""
        with torch.cuda.stream(self._stream):
            yield


def _with_values(tensor: Tensor, buffer: Tensor) -> Tensor:
    return FlatShard(buffer, tensor.start, tensor.shape) if isinstance(tensor, FlatShard) else buffer
