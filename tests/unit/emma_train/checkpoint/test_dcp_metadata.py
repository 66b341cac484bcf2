"""A table of contents is read as pickle would read it, and runs nothing that it names."""

import io
import pickle
from pathlib import PosixPath
from typing import Any

import pytest
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

from emma_train.checkpoint.dcp_metadata import load_dcp_metadata


def contents(**fields: Any) -> Metadata:
    """A table of contents of two tensors, each with one chunk."""
    tensors: dict[str, Any] = {}
    files = {}
    for number, (name, dtype) in enumerate({"model.a": torch.bfloat16, "model.b": torch.int64}.items()):
        size, offset = torch.Size([4, 2]), torch.Size([0, 0])
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype), size, [ChunkStorageMetadata(offset, size)])
        files[MetadataIndex(name, offset, 0)] = _StorageInfo("__0_0.distcp", 100 * number, 100)
    values = {"storage_data": files, "planner_data": {"model.a": ("model.a",)}, "version": "1.0.0"}
    return Metadata(tensors, **{**values, "storage_meta": StorageMeta(PosixPath("runs/x"), "id"), **fields})


def load(value: Any) -> Metadata:
    return load_dcp_metadata(io.BytesIO(value if isinstance(value, bytes) else pickle.dumps(value)))


def test_it_reads_what_pickle_reads() -> None:
    original, read = contents(), load(contents())
    assert read.state_dict_metadata == original.state_dict_metadata
    assert read.storage_data == original.storage_data
    assert all(read.storage_data[index] == part for index, part in original.storage_data.items())
    assert (read.version, type(read.state_dict_metadata["model.a"].size)) == ("1.0.0", torch.Size)


class _Call:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (contents(planner_data=_Call()), "names builtins.print, which no table of contents"),
        (contents(planner_data=torch.load), "names torch.serialization.load, which no table of contents"),
        (contents(planner_data=torch.nn.Linear), "names torch.nn.modules.linear.Linear"),
        (contents(storage_data={MetadataIndex("a"): 3}), "int stands where _StorageInfo should"),
        (contents(storage_data={MetadataIndex("a"): _StorageInfo("../a", 0, 1)}), "names a file outside its folder"),
        (contents(storage_data={MetadataIndex("a"): _StorageInfo("a", -1, 1)}), "-1 is no number of bytes"),
        ([1, 2], "list stands where Metadata should"),
        (b"garbage", "is damaged"),
        (b"", "is damaged: EOFError"),
        (pickle.dumps(contents())[:-20], "is damaged"),
    ],
)
def test_it_refuses_anything_else(value: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        load(value)
    assert capsys.readouterr().out == ""


def test_a_pickle_cannot_change_the_classes_that_it_gets() -> None:
    """BUILD with a slot state sets attributes of whatever object is on the stack, a class too."""
    crafted = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nStorageMeta\n"
        b"N}X\x06\x00\x00\x00loadedI1\ns\x86b."
    )  # fmt: skip
    with pytest.raises(ValueError, match="is damaged"):
        load(crafted)
    assert not hasattr(StorageMeta, "loaded")
