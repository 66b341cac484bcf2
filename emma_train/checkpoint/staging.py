"""Host copies of what a rank has, so that weights may move on while they are written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from emma_train.engine.flat_shard import FlatShard, local


class Staging:
    """Buffers in host memory, as large as what is copied into them; made once and used by every save.

    On a GPU they are pinned, and copies run on a stream of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_compute(self) -> None:
        """To be called by the training thread before another thread copies: wait for what it has still to compute."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of the tensors, by name, as host tensors that hold until the next copy."""
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
        return {name: _in_place_of(tensor, self._buffers[name]) for name, tensor in tensors.items()}

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Within, this thread's work on the device queues behind nothing of the training thread's."""
        with torch.cuda.stream(self._stream):
            yield


def _in_place_of(tensor: Tensor, buffer: Tensor) -> Tensor:
    return FlatShard(buffer, tensor.start, tensor.shape) if isinstance(tensor, FlatShard) else buffer
