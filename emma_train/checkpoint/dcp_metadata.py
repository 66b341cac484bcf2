"""Reads the table of contents of a DCP folder (.metadata), which is a pickle, without running anything that it names.

Unpickling calls whatever a pickle names, so a foreign checkpoint could run commands. Here each name stands for a record
without behaviour; any other name is an error. DCP's own objects are then made from the records, field by field.
"""

import pickle
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from emma_train.storage.safetensors_io import DTYPES
from emma_train.storage.urls import is_file_name

_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
RECORDS = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "StorageMeta"),
    (_FILESYSTEM, "_StorageInfo"),
}
"""The classes of DCP that a table of contents of tensors consists of. BytesStorageMetadata is not among them: what it
describes is a pickle too."""
VALUES: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    (_METADATA, "_MEM_FORMAT_ENCODING"): int,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}
"""Types of plain values; sizes, the deprecated layout and memory format, and the path where it was written."""
_TENSOR_TYPES = frozenset(DTYPES.values())
_is_file_name = lru_cache(maxsize=4096)(is_file_name)
"""A table of contents names few files, and each of them many times."""


def load_dcp_metadata(file: IO[bytes]) -> Metadata:
    """The table of contents in `file`. Raises ValueError where it names anything but RECORDS, VALUES and types of
    tensors, or where a field has another type than DCP writes."""
    try:
        stored = _Unpickler(file).load()
    except ValueError:
        raise
    except Exception as error:  # a crafted or damaged pickle can raise anything
        raise ValueError(f"is damaged: {type(error).__name__}") from None
    try:
        return _metadata(stored)
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"does not hold what DCP writes: {error}") from None


class _Record:
    """The fields of a pickled object."""

    __slots__ = ("fields",)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict | tuple):
            raise TypeError("the state of a record is neither a dict nor a tuple")
        self.fields: dict[str, Any] = state if isinstance(state, dict) else {str(n): v for n, v in enumerate(state)}

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    """Knows RECORDS, VALUES and the types of tensors."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        # New classes for every file: a pickle may set attributes of the classes that it gets.
        self._classes: dict[tuple[str, str], Any] = {
            key: type(key[1], (_Record,), {"__slots__": ()}) for key in RECORDS
        }

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in self._classes:
            return self._classes[key]
        if key in VALUES:
            return VALUES[key]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if dtype not in _TENSOR_TYPES:
            raise ValueError(f"names {module}.{name}, which no table of contents of tensors needs; do not trust it")
        return dtype

    def persistent_load(self, key: Any) -> Any:
        raise ValueError("refers to objects outside it")


def _metadata(stored: Any) -> Metadata:
    fields = _fields(stored, "Metadata")
    tensors: dict[str, Any] = {_text(name): _tensor(entry) for name, entry in fields["state_dict_metadata"].items()}
    files = {_index(key): _part(part) for key, part in fields["storage_data"].items()}
    return Metadata(tensors, storage_data=files, storage_meta=StorageMeta(), version=fields.get("version"))


def _tensor(stored: Any) -> TensorStorageMetadata:
    fields = _fields(stored, "TensorStorageMetadata")
    dtype = _fields(fields["properties"], "TensorProperties")["0"]
    if dtype not in _TENSOR_TYPES:
        raise TypeError(f"{dtype!r} is no type of a tensor")
    chunks = []
    for entry in fields["chunks"]:
        chunk = _fields(entry, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])))
    return TensorStorageMetadata(TensorProperties(dtype), _size(fields["size"]), chunks)


def _index(stored: Any) -> MetadataIndex:
    fields = _fields(stored, "MetadataIndex")
    offset, number = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]), None if offset is None else _size(offset), None if number is None else _count(number)
    )


def _part(stored: Any) -> _StorageInfo:
    fields = _fields(stored, "_StorageInfo")
    name = _text(fields["relative_path"])
    if not _is_file_name(name):
        raise ValueError(f"names a file outside its folder: {name}")
    if fields.get("transform_descriptors"):
        raise ValueError("holds compressed tensors, which this version does not write")
    return _StorageInfo(name, _count(fields["offset"]), _count(fields["length"]))


def _fields(stored: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(stored, _Record) or type(stored).__name__ != kind:
        raise TypeError(f"{type(stored).__name__} stands where {kind} should")
    return stored.fields


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} stands where a name should")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no number of bytes or elements")
    return value


def _size(value: Any) -> torch.Size:
    # The types are compared as a set: a large checkpoint has a hundred thousand sizes.
    if not isinstance(value, tuple) or not {type(length) for length in value} <= {int} or min(value, default=0) < 0:
        raise TypeError(f"{value!r} is no size of a tensor")
    return torch.Size(value)
