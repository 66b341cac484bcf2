"""Where this rank's values lie in a full tensor, for all kinds: FSDP shards (DTensor), runs of values as ZeRO cuts them
(FlatShard), and full tensors."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from emma_train.engine.torch_private import local_size_and_offset, make_wrapper_tensor

aten = torch.ops.aten
_ALIKE = (aten.detach.default, aten.clone.default, aten._to_copy.default, aten.zeros_like.default)


class FlatShard(torch.Tensor):
    """A run of a tensor's values in flattened order, [start, start + len(values)): what ZeRO gives to one rank.

    Its shape is that of the full tensor, as with a DTensor. `to_local()` is the 1-D tensor of the run, which may be
    empty. torch.distributed.checkpoint saves it and loads into it as the rectangles that the run consists of.
    """

    _run: Tensor
    start: int

    @staticmethod
    def __new__(cls, values: Tensor, start: int, shape: torch.Size) -> "FlatShard":
        shard: FlatShard = make_wrapper_tensor(cls, shape, values.dtype, values.device)
        shard._run = values.detach()
        shard.start = start
        return shard

    def to_local(self) -> Tensor:
        return self._run

    def as_rectangles(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
        """(offset, size, values) of every rectangle; values are views."""
        first = 0
        for offset, size in as_rectangles(self.shape, self.start, self.start + len(self._run)):
            yield offset, size, self._run[first : first + prod(size)].view(size)
            first += prod(size)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FlatShard({self.start}:{self.start + len(self._run)} of {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Only copies: all other operations would need values that other ranks have."""
        if func in _ALIKE:
            shard: FlatShard = args[0]
            return FlatShard(func(shard._run, **(kwargs or {})), shard.start, shard.shape)
        if func is aten.copy_.default and isinstance(args[1], FlatShard) and args[0].start == args[1].start:
            args[0]._run.copy_(args[1]._run)
            return args[0]
        raise NotImplementedError(f"{func} needs values of a FlatShard that other ranks have")

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._run)
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(offset)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(offset, size), properties, self.shape),
            )
            for offset, size, _ in self.as_rectangles()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(offset, size) for offset, size, _ in self.as_rectangles()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(values for offset, _, values in self.as_rectangles() if torch.Size(offset) == index.offset)


class Run(NamedTuple):
    """Where this rank's fp32 values of a parameter lie in the optimizer's memory."""

    flat: Tensor
    """1-D tensor with the values of many parameters, or a shard of one."""
    first: int
    """Index of the first value in `flat`."""
    start: int
    """Index of the first value in the flattened parameter."""
    length: int


def local_chunks(tensor: Tensor) -> list[tuple[tuple[slice, ...], Tensor]]:
    """This rank's part of a tensor: (slices of the full tensor, values), where values are views to read or write."""
    if isinstance(tensor, FlatShard):
        return [(_slices(offset, size), values) for offset, size, values in tensor.as_rectangles()]
    if isinstance(tensor, DTensor):
        size, offset = local_size_and_offset(tensor)
        return [(_slices(offset, size), tensor.to_local())] if prod(size) else []
    return [((), tensor)]


def local(tensor: Tensor) -> Tensor:
    """This rank's values as one plain tensor: of a DTensor, a FlatShard, a ZeRO-3 parameter or a full tensor."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if isinstance(tensor, DTensor | FlatShard) else tensor


def as_rectangles(shape: Sequence[int], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of the rectangles that values [start, stop) of a flattened tensor consist of, in order.

    There is at most one with full rows, and before and after it one for every further dimension.
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # full rows are [first, last)
    if first > last:  # all inside one row
        return [((last, *o), (1, *s)) for o, s in as_rectangles(shape[1:], start - last * inner, stop - last * inner)]
    head = [
        ((first - 1, *o), (1, *s))
        for o, s in as_rectangles(shape[1:], start - (first - 1) * inner, inner)
        if start % inner
    ]
    rows = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if last > first else []
    tail = [((last, *o), (1, *s)) for o, s in as_rectangles(shape[1:], 0, stop - last * inner)]
    return [*head, *rows, *tail]


def _chunk(offset: Sequence[int], size: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), torch.Size(size))


def _slices(offset: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(offset, size, strict=True))
