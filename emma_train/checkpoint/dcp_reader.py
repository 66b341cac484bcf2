"""The tensors of a checkpoint, complete and one at a time, in one process; `Tensors` does it for safetensors files."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from emma_train.checkpoint.dcp import DcpReader, read_dcp_metadata
from emma_train.storage.paths import StoragePath
from emma_train.storage.safetensors_io import DTYPES, Spec


class CheckpointTensors:
    """Raises UserError where a folder's table of contents cannot be read."""

    def __init__(self, folders: Sequence[StoragePath]) -> None:
        """`folders`: the DCP folders that hold the checkpoint's tensors."""
        self._readers: dict[str, _CachedDcpReader] = {}
        self.specs: dict[str, Spec] = {}
        for folder in folders:
            reader = _CachedDcpReader(folder)
            for name, entry in reader.contents.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    self._readers[name] = reader
                    self.specs[name] = Spec.of(entry.properties.dtype, entry.size)

    def read(self, name: str) -> Tensor:
        """A full tensor, in the type in which it was stored."""
        reader, spec = self._readers[name], self.specs[name]
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that only one process loads
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        return tensor


class _CachedDcpReader(DcpReader):
    """Reads the table of contents once. It lists every part of every tensor, and each read needs one tensor only."""

    def __init__(self, folder: StoragePath) -> None:
        super().__init__(folder)
        self.contents = read_dcp_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents
