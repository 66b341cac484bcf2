"""The tensors of a checkpoint, whole and one at a time, in one process: what Tensors is to safetensors files."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from emma_train.checkpoint.dcp import Reader
from emma_train.errors import RunError, UserError
from emma_train.storage.paths import StoragePath
from emma_train.storage.safetensors_io import DTYPES, Spec


class Shards:
    """Raises UserError where a folder's table of contents cannot be read."""

    def __init__(self, folders: Sequence[StoragePath]) -> None:
        """`folders`: the DCP folders that hold the checkpoint's tensors."""
        self._readers: dict[str, _Reader] = {}
        self.specs: dict[str, Spec] = {}
        for folder in folders:
            reader = _Reader(folder)
            for name, entry in reader.contents.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    self._readers[name] = reader
                    self.specs[name] = Spec.of(entry.properties.dtype, entry.size)

    def read(self, name: str) -> Tensor:
        """A whole tensor, as it was stored."""
        reader, spec = self._readers[name], self.specs[name]
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that one process is one process
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        return tensor


class _Reader(Reader):
    """Reads the table of contents once: it lists every tensor's part on every rank, and a read wants one of them."""

    def __init__(self, folder: StoragePath) -> None:
        super().__init__(folder)
        try:
            self.contents: Metadata = super().read_metadata()
        except RunError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: cannot read the checkpoint's table of contents ({error})") from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents
