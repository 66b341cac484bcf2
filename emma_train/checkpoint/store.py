"""Tensors in and out of a checkpoint through torch.distributed.checkpoint (DCP), for any number of ranks.

A checkpoint has several DCP folders: its parts, and the frozen weights that it refers to (folder.py). Which of them
holds a tensor is looked up by name, so nothing outside of this file needs to know.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.state import State
from emma_train.config.errors import UserError
from emma_train.engine.fragment import Fragment

METADATA = ".metadata"
# Of torch's own making. Filters cannot be set for a while only: checkpoints are written in a thread of their own.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write(
    folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], group: dist.ProcessGroup, key: str = ""
) -> None:
    """Write one DCP folder; every rank of `group` calls it. The layout is that of `tensors`, the content `values`: this
    rank's parts by name, live or staged. Writes of one `key` share a plan for as long as the layout stays the same.

    Raises CheckpointException on every rank where one of them fails.
    """
    planner = _Planner(values, key)
    dcp.save(dict(tensors), storage_writer=_FileSystemWriter(folder), planner=planner, process_group=group)


def written_by(folder: Path, rank: int) -> list[Path]:
    """The files of a DCP folder that a rank has written."""
    own = sorted(folder.glob(f"__{rank}_*.distcp"))
    return [*own, folder / METADATA] if rank == 0 else own


def load_training(checkpoint: Path, state: State) -> None:
    """Restore a model in training in place. Every tensor must be there in its shape; raises UserError otherwise."""
    wanted, stored = state.all, tensors(checkpoint)
    if missing := sorted(wanted.keys() - stored.keys()):
        raise UserError(
            f"{checkpoint}: lacks {missing[0]} and {len(missing) - 1} more; it is of another model or stage"
        )
    for name, tensor in wanted.items():
        if stored[name] != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint}: {name} has shape {list(stored[name])} there and {list(tensor.shape)} in this recipe; "
                "make the model section agree"
            )
    _load(checkpoint, wanted)


def load_weights(checkpoint: Path, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Fill weights from stored tensors: `names` maps a weight's name to the stored tensor's, each given once."""
    _load(checkpoint, {stored: weights[name].detach() for name, stored in names.items()})


def tensors(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all stored tensors. Raises UserError where the checkpoint cannot be read."""
    return {
        name: tuple(entry.size)
        for place in places(checkpoint)
        for name, entry in _contents(place).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def names(place: Path) -> set[str]:
    """Names of what a DCP folder holds. Raises UserError likewise."""
    return set(_contents(place).state_dict_metadata)


def places(checkpoint: Path) -> list[Path]:
    """The DCP folders of a checkpoint, with the frozen weights that it refers to."""
    frozen = folders.frozen_folder(checkpoint, folders.read_meta(checkpoint) or {})
    found = [checkpoint / part for part in folders.PARTS] + ([frozen] if frozen else [])
    return [place for place in found if (place / METADATA).is_file()]


def _load(checkpoint: Path, wanted: dict[str, Tensor]) -> None:
    left = dict(wanted)
    for place in places(checkpoint):
        here = _contents(place).state_dict_metadata
        found: dict[str, Any] = {name: left.pop(name) for name in list(left) if name in here}
        if found:
            dcp.load(found, storage_reader=dcp.FileSystemReader(place), no_dist=not dist.is_initialized())
    assert not left, f"{checkpoint} lacks {sorted(left)}"


def _contents(place: Path) -> Metadata:
    try:
        return dcp.FileSystemReader(place).read_metadata()
    except Exception as error:
        raise UserError(f"{place}: cannot read the table of contents ({error})") from None


class _Planner(DefaultSavePlanner):
    """Plans by the live tensors' layout and takes their content from elsewhere."""

    def __init__(self, values: Mapping[str, Tensor], key: str) -> None:
        super().__init__(enable_plan_caching=bool(key))
        self._cached_plans_key = f"emma-{key}"
        self._values = values

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        value = self._values[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, Fragment) else value


class _FileSystemWriter(dcp.FileSystemWriter):
    """Says what the file system said: torch's zip writer would hide it behind a complaint about positions."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, str(self.path)) from None
            raise
