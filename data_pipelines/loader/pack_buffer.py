"""A pack as one run of bytes, for its way from a worker to the trainer: one file handle, one pinned buffer.

torch would move every tensor of a pack through shared memory of its own, and a hundred packs read ahead would need
more open files than most systems allow.
"""

import io
import math
import pickle
from dataclasses import dataclass, replace
from typing import Any

import torch

from emma_train.sequence.pack import PackedBatch

ALIGN = 64


@dataclass
class PackBuffer:
    """A PackedBatch whose tensors lie one after the other in `buffer`."""

    buffer: torch.Tensor
    """uint8."""
    places: list[tuple[int, torch.dtype, tuple[int, ...]]]
    """Offset, type and shape of each tensor."""
    rest: bytes
    """The pack, pickled, with the numbers of its tensors in their place."""
    other: Any = None
    """What goes along."""

    @classmethod
    def of(cls, batch: PackedBatch, other: Any = None, shared: bool = False) -> "PackBuffer":
        """Flatten a pack; into memory that processes share, if it is to be sent."""
        pickler = _Pickler()
        pickler.dump(batch)
        places, end = [], 0
        for tensor in pickler.tensors:
            places.append((end, tensor.dtype, tuple(tensor.shape)))
            end += -(-tensor.nbytes // ALIGN) * ALIGN
        # Made where it will stay; a tensor of ordinary memory would be copied once more when it is sent.
        storage = torch.UntypedStorage._new_shared(end) if shared else torch.UntypedStorage(end)
        flat = cls(torch.empty(0, dtype=torch.uint8).set_(storage), places, pickler.file.getvalue(), other)
        for number, tensor in enumerate(pickler.tensors):
            flat.view(number).copy_(tensor)
        return flat

    def pin_memory(self) -> "PackBuffer":
        """The same in pinned memory; torch's loader calls it where it pins."""
        return replace(self, buffer=self.buffer.pin_memory())

    def batch(self) -> PackedBatch:
        """The pack; its tensors are views of the buffer."""
        return _Unpickler(self).load()

    def view(self, number: int) -> torch.Tensor:
        """One of the tensors."""
        offset, dtype, shape = self.places[number]
        length = math.prod(shape) * dtype.itemsize
        return self.buffer[offset : offset + length].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    def __init__(self) -> None:
        self.file, self.tensors = io.BytesIO(), list[torch.Tensor]()
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, flat: PackBuffer) -> None:
        super().__init__(io.BytesIO(flat.rest))
        self.flat = flat

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.flat.view(number)
