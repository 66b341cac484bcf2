"""Copies of a rank's tensors in host memory, so that training can change the tensors while the copies are written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from emma_train.engine.flat_shard import FlatShard, local

LARGEST = 2**28
"""Bytes of a pinned allocation, unless one tensor has more."""
ALIGNMENT = 512
"""Bytes: a tensor starts at a multiple of it in its allocation."""


class Staging:
    """Buffers in host memory, as large as the tensors; allocated once and used by every save.

    On a GPU they are pinned, and copies run on a separate stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._layout: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_compute(self) -> None:
        """Wait until the device has finished the training thread's work. The training thread calls it before another
        thread copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Host copies of this rank's parts of the tensors, by name. They are valid until the next copy."""
        parts = {name: local(tensor) for name, tensor in tensors.items()}
        if self._layout != (layout := {name: (part.shape, part.dtype) for name, part in parts.items()}):
            self._buffers = {}  # frees the old ones first
            self._buffers = allocate(parts, pinned=self._stream is not None)
            self._layout = layout
        with torch.no_grad():
            for name, part in parts.items():
                self._buffers[name].copy_(part, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return {name: _with_values(tensor, self._buffers[name]) for name, tensor in tensors.items()}

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run this thread's device work in a separate stream, so that it does not wait for the training thread's."""
        if self._stream is not None:
            # A new thread's device is the first of the machine, to which torch would go back at the end of the block;
            # CUDA then makes a context there, of half a gigabyte, for each rank of the node.
            torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            yield


def allocate(parts: Mapping[str, Tensor], pinned: bool) -> dict[str, Tensor]:
    """Empty host tensors like the parts. They share allocations of LARGEST bytes at most, because torch rounds every
    pinned one up to a power of two: one for each tensor would take up to twice the memory."""
    sizes = {name: -(-part.nbytes // ALIGNMENT) * ALIGNMENT for name, part in parts.items()}
    buffers: dict[str, Tensor] = {}
    for names in group(sizes):
        memory = torch.empty(sum(sizes[name] for name in names), dtype=torch.uint8, pin_memory=pinned).numpy()
        start = 0
        for name in names:
            part = parts[name]
            # A tensor made from numpy has its own storage; torch.distributed.checkpoint copies views of a larger one.
            values = torch.from_numpy(memory[start : start + part.nbytes])
            buffers[name] = values.view(part.dtype).view(part.shape)
            start += sizes[name]
    return buffers


def group(sizes: Mapping[str, int]) -> Sequence[Sequence[str]]:
    """Names in groups whose sizes add up to LARGEST at most, largest first, each in the first group with room."""
    groups: list[tuple[list[str], int]] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        fits = next((i for i, (_, used) in enumerate(groups) if used + sizes[name] <= LARGEST), len(groups))
        names, used = groups[fits] if fits < len(groups) else ([], 0)
        groups[fits : fits + 1] = [([*names, name], used + sizes[name])]
    return [names for names, _ in groups]


def _with_values(tensor: Tensor, buffer: Tensor) -> Tensor:
    return FlatShard(buffer, tensor.start, tensor.shape) if isinstance(tensor, FlatShard) else buffer
