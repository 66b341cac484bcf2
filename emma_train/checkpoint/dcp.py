"""Tensors in and out of a checkpoint through torch.distributed.checkpoint (DCP), for any number of ranks.

A checkpoint has several DCP folders: its parts, and the frozen weights that it refers to (folder.py). Which of them
holds a tensor is looked up by name, so nothing outside of this file needs to know.
"""

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from upath import UPath

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.state import State
from emma_train.engine.flat_shard import FlatShard
from emma_train.errors import RunError, UserError
from emma_train.storage.paths import StoragePath, asking, children, there

METADATA = ".metadata"
FETCH = 256 << 20
"""Bytes that are fetched from a store at once; a larger tensor comes alone."""
# Of torch's own making. Filters cannot be set for a while only: checkpoints are written in a thread of their own.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write(
    folder: StoragePath,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    group: dist.ProcessGroup,
    key: str = "",
) -> None:
    """Write one DCP folder; every rank of `group` calls it. The layout is that of `tensors`, the content `values`: this
    rank's parts by name, live or staged. Writes of one `key` share a plan for as long as the layout stays the same.

    Raises CheckpointException on every rank where one of them fails.
    """
    planner = _Planner(values, key)
    dcp.save(dict(tensors), storage_writer=_FileSystemWriter(folder), planner=planner, process_group=group)


def written_by(folder: StoragePath, rank: int) -> list[StoragePath]:
    """The files of a DCP folder that a rank has written."""
    own = sorted(path for path in children(folder) if fnmatch(path.name, f"__{rank}_*.distcp"))
    return [*own, folder / METADATA] if rank == 0 else own


def load_training(checkpoint: StoragePath, state: State) -> None:
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


def load_weights(checkpoint: StoragePath, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Fill weights from stored tensors: `names` maps a weight's name to the stored tensor's, each given once."""
    _load(checkpoint, {stored: weights[name].detach() for name, stored in names.items()})


def tensors(checkpoint: StoragePath) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all stored tensors. Raises UserError where the checkpoint cannot be read."""
    return {
        name: tuple(entry.size)
        for place in places(checkpoint)
        for name, entry in _contents(place).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def names(place: StoragePath) -> set[str]:
    """Names of what a DCP folder holds. Raises UserError likewise."""
    return set(_contents(place).state_dict_metadata)


def places(checkpoint: StoragePath) -> list[StoragePath]:
    """The DCP folders of a checkpoint, with the frozen weights that it refers to."""
    frozen = folders.frozen_folder(checkpoint, folders.read_meta(checkpoint) or {})
    found = [checkpoint / part for part in folders.PARTS] + ([frozen] if frozen else [])
    return [place for place in found if there(place / METADATA)]


def _load(checkpoint: StoragePath, wanted: dict[str, Tensor]) -> None:
    left = dict(wanted)
    for place in places(checkpoint):
        here = _contents(place).state_dict_metadata
        found: dict[str, Any] = {name: left.pop(name) for name in list(left) if name in here}
        if found:
            try:
                dcp.load(found, storage_reader=Reader(place), no_dist=not dist.is_initialized())
            except CheckpointException as error:
                for caught, _ in error.failures.values():
                    if isinstance(caught, RunError):
                        raise caught from None
                raise
    assert not left, f"{checkpoint} lacks {sorted(left)}"


def _contents(place: StoragePath) -> Metadata:
    try:
        return Reader(place).read_metadata()
    except RunError:
        raise
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
        return value.__get_tensor_shard__(index) if isinstance(value, FlatShard) else value


class Reader(dcp.FileSystemReader):
    """Reads a DCP folder wherever it lies; from a store many tensors at once, for each answer takes its time."""

    def __init__(self, folder: StoragePath) -> None:
        super().__init__(str(folder))
        self._fetched: dict[tuple[str, int], bytes] = {}
        if isinstance(folder, UPath):
            self.fs, self.path = _Store(folder), folder.path  # type: ignore[assignment]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if not isinstance(self.fs, _Store):
            return super().read_data(plan, planner)
        left = [(item, self.storage_data[item.storage_index]) for item in plan.items]
        while left:
            batch = [left.pop()]
            size = batch[0][1].length
            while left and (size := size + left[-1][1].length) <= FETCH:
                batch.append(left.pop())
            self._fetched = self.fs.fetch([(part.relative_path, part.offset, part.length) for _, part in batch])
            super().read_data(replace(plan, items=[item for item, _ in batch]), planner)
        self._fetched = {}
        done: Future[None] = Future()
        done.set_result(None)
        return done

    # Of torch's own, and not public: where it goes, a store is asked for every tensor again, several times.
    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        if (fetched := self._fetched.get((sinfo.relative_path, sinfo.offset))) is None:
            return super()._slice_file(file, sinfo)
        return io.BytesIO(fetched)


class _FileSystemWriter(dcp.FileSystemWriter):
    """Says what the file system said: torch's zip writer would hide it behind a complaint about positions."""

    def __init__(self, folder: StoragePath) -> None:
        # A store has nothing to flush, and torch would flush every disk of the machine instead.
        super().__init__(str(folder), sync_files=isinstance(folder, Path))
        if isinstance(folder, UPath):
            self.fs, self.path = _Store(folder), folder.path  # type: ignore[assignment]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, str(self.path)) from None
            raise


class _Store(FileSystemBase):
    """What DCP does with files, done in a store; paths are the store's own."""

    def __init__(self, folder: UPath) -> None:
        self._folder, self._fs = folder, folder.fs

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with asking(self._folder), self._fs.open(os.fspath(path), mode) as stream:
            yield stream

    def fetch(self, ranges: list[tuple[str, int, int]]) -> dict[tuple[str, int], bytes]:
        """Parts of files, each given by its file's name, offset and length, by name and offset."""
        names, starts, lengths = zip(*ranges, strict=True)
        files = [(self._folder / name).path for name in names]
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        with asking(self._folder):
            found = self._fs.cat_ranges(files, list(starts), ends, on_error="raise")
        return dict(zip(zip(names, starts, strict=True), found, strict=True))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return path

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        with asking(self._folder):
            self._fs.mv(path, new_path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """A store has no folders, and some packages would make a bucket that is not there, as after a slip."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return there(self._folder / os.path.basename(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        with asking(self._folder):
            self._fs.rm_file(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
