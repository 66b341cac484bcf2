"""Stores a pack in one block of memory, to send it from a worker to the trainer.

torch sends every tensor through a separate block of shared memory, each with a file handle; a hundred packs read ahead
would need more open files than most systems allow. One block needs one handle, and one pinned buffer.
"""

import io
import math
import pickle
from dataclasses import dataclass, replace
from typing import Any

import torch

from emma_train.sequence.pack import PackedBatch

ALIGN = 64
"""Each tensor starts at a multiple of this many bytes."""


@dataclass
class PackBuffer:
    """A PackedBatch whose tensors lie one after the other in `buffer`."""

    buffer: torch.Tensor
    """uint8 [bytes]."""
    tensors: list[tuple[int, torch.dtype, tuple[int, ...]]]
    """Offset, dtype and shape of each tensor."""
    skeleton: bytes
    """The pickled pack, with the index of a tensor instead of each tensor."""
    extra: Any = None
    """Any picklable value that is sent along."""

    @classmethod
    def of(cls, batch: PackedBatch, extra: Any = None, shared: bool = False) -> "PackBuffer":
        """Copy a pack into one buffer. `shared` puts it into shared memory, for sending to another process."""
        pickler = _Pickler()
        pickler.dump(batch)
        tensors, end = [], 0
        for tensor in pickler.tensors:
            tensors.append((end, tensor.dtype, tuple(tensor.shape)))
            end += -(-tensor.nbytes // ALIGN) * ALIGN
        # Allocate the final memory at once: torch would copy a tensor of ordinary memory again when it is sent.
        storage = torch.UntypedStorage._new_shared(end) if shared else torch.UntypedStorage(end)
        result = cls(torch.empty(0, dtype=torch.uint8).set_(storage), tensors, pickler.file.getvalue(), extra)
        for number, tensor in enumerate(pickler.tensors):
            result.view(number).copy_(tensor)
        return result

    def pin_memory(self) -> "PackBuffer":
        """A copy in pinned memory. DataLoader calls this method if it has pin_memory=True."""
        return replace(self, buffer=self.buffer.pin_memory())

    def batch(self) -> PackedBatch:
        """The pack; its tensors are views of the buffer."""
        return _Unpickler(self).load()

    def view(self, number: int) -> torch.Tensor:
        """One of the tensors, as a view of the buffer."""
        offset, dtype, shape = self.tensors[number]
        length = math.prod(shape) * dtype.itemsize
        return self.buffer[offset : offset + length].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Collects tensors in a list and writes their index."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        self.tensors: list[torch.Tensor] = []
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Replaces each index by a view of the buffer."""

    def __init__(self, pack_buffer: PackBuffer) -> None:
        super().__init__(io.BytesIO(pack_buffer.skeleton))
        self.pack_buffer = pack_buffer

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.pack_buffer.view(number)
