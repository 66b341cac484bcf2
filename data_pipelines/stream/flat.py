"""A pack as one run of bytes, for its way from a worker to the trainer: one file handle, one pinned buffer.

torch would move every tensor of a pack through shared memory of its own, and a hundred packs read ahead would need
more open files than most systems allow.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from emma_train.sequence.pack import PackedBatch

ALIGN = 64


@dataclass
class Flat:
    """A PackedBatch whose tensors lie one after the other in `buffer`."""

    buffer: torch.Tensor
    """uint8."""
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """Offset, type and shape of each tensor, by its field."""
    rest: PackedBatch
    """The pack without its tensors."""
    other: Any = None
    """What goes along."""

    @classmethod
    def of(cls, batch: PackedBatch, other: Any = None, shared: bool = False) -> "Flat":
        """Flatten a pack; into memory that processes share, if it is to be sent."""
        tensors = {f.name: t for f in fields(batch) if isinstance(t := getattr(batch, f.name), torch.Tensor)}
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = (end, tensor.dtype, tuple(tensor.shape))
            end += -(-tensor.nbytes // ALIGN) * ALIGN
        # Made where it will stay; a tensor of ordinary memory would be copied once more when it is sent.
        storage = torch.UntypedStorage._new_shared(end) if shared else torch.UntypedStorage(end)
        without: dict[str, Any] = dict.fromkeys(tensors)
        flat = cls(torch.empty(0, dtype=torch.uint8).set_(storage), places, replace(batch, **without), other)
        for name, tensor in tensors.items():
            flat._view(name).copy_(tensor)
        return flat

    def pin_memory(self) -> "Flat":
        """The same in pinned memory; torch's loader calls it where it pins."""
        return replace(self, buffer=self.buffer.pin_memory())

    def batch(self) -> PackedBatch:
        """The pack; its tensors are views of the buffer."""
        tensors: dict[str, Any] = {name: self._view(name) for name in self.places}
        return replace(self.rest, **tensors)

    def _view(self, name: str) -> torch.Tensor:
        offset, dtype, shape = self.places[name]
        length = math.prod(shape) * dtype.itemsize
        return self.buffer[offset : offset + length].view(dtype).view(shape)
