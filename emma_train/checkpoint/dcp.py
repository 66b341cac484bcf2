"""Tensors in and out of a checkpoint through torch.distributed.checkpoint (DCP), for any number of ranks.

A checkpoint has several DCP folders: its parts, and the frozen weights that it refers to (folder.py). Only this file
knows which folder holds a tensor; callers use its name alone.
"""

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from typing import IO, Any, cast

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
from emma_train.checkpoint.dcp_metadata import load_dcp_metadata
from emma_train.checkpoint.state import CheckpointState
from emma_train.engine.flat_shard import FlatShard
from emma_train.errors import RunError, UserError
from emma_train.storage.paths import StoragePath, as_remote, storage_of
from emma_train.storage.storage_error import store_errors

DCP_METADATA = ".metadata"
FETCH_BYTES = 256 << 20
"""Bytes that are fetched from an object store at once; a larger tensor is fetched alone."""
# Warnings of torch about itself. A temporary filter would not do: checkpoints are written in a thread of their own.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write_dcp(
    folder: StoragePath,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    group: dist.ProcessGroup,
    key: str = "",
) -> None:
    """Write one DCP folder; every rank of `group` calls it. `tensors` gives the layout and `values` the content: this
    rank's parts by name, live or staged. Writes with the same `key` reuse their plan while the layout stays the same.

    Raises CheckpointException on every rank where one of them fails.
    """
    planner = _Planner(values, key)
    dcp.save(dict(tensors), storage_writer=DcpWriter(folder), planner=planner, process_group=group)


def files_of_rank(folder: StoragePath, rank: int) -> list[StoragePath]:
    """The files of a DCP folder that a rank has written."""
    names = storage_of(folder).listdir(folder)
    shards = sorted(path for path in names if fnmatch(path.name, f"__{rank}_*.distcp"))
    return [*shards, folder / DCP_METADATA] if rank == 0 else shards


def load_training(checkpoint: StoragePath, state: CheckpointState) -> None:
    """Restore a model in training in place. Raises UserError where a tensor is missing or has another shape."""
    wanted, stored = state.all, tensor_shapes(checkpoint)
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


def load_checkpoint_weights(checkpoint: StoragePath, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Fill weights from stored tensors. `names` maps a weight's name to the stored tensor's; each stored tensor is used
    once."""
    _load(checkpoint, {stored: weights[name].detach() for name, stored in names.items()})


def tensor_shapes(checkpoint: StoragePath) -> dict[str, tuple[int, ...]]:
    """Shapes of all stored tensors by name. Raises UserError where the checkpoint cannot be read."""
    return {
        name: tuple(entry.size)
        for folder in dcp_folders(checkpoint)
        for name, entry in read_dcp_metadata(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def tensor_names(folder: StoragePath) -> set[str]:
    """Names of the tensors in one DCP folder. Raises UserError where it cannot be read."""
    return set(read_dcp_metadata(folder).state_dict_metadata)


def dcp_folders(checkpoint: StoragePath) -> list[StoragePath]:
    """The DCP folders of a checkpoint, including the frozen weights that it refers to."""
    frozen = folders.frozen_folder(checkpoint, folders.read_meta(checkpoint) or {})
    paths = [checkpoint / part for part in folders.CHECKPOINT_PARTS] + ([frozen] if frozen else [])
    return [path for path in paths if storage_of(path).exists(path / DCP_METADATA)]


def _load(checkpoint: StoragePath, wanted: dict[str, Tensor]) -> None:
    remaining = dict(wanted)
    for folder in dcp_folders(checkpoint):
        stored = read_dcp_metadata(folder).state_dict_metadata
        tensors: dict[str, Any] = {name: remaining.pop(name) for name in list(remaining) if name in stored}
        if tensors:
            try:
                dcp.load(tensors, storage_reader=DcpReader(folder), no_dist=not dist.is_initialized())
            except CheckpointException as error:
                for cause, _ in error.failures.values():
                    if isinstance(cause, RunError):
                        raise cause from None
                    if isinstance(cause, OSError):
                        folders.check_gone(folder, cause)
                raise
    assert not remaining, f"{checkpoint} lacks {sorted(remaining)}"


def read_dcp_metadata(folder: StoragePath) -> Metadata:
    """The table of contents of a DCP folder. Raises UserError where it is damaged or foreign."""
    try:
        return DcpReader(folder).read_metadata()
    except OSError as error:
        folders.check_gone(folder / DCP_METADATA, error)
        raise UserError(f"{folder / DCP_METADATA}: is missing") from None
    except ValueError as error:
        raise UserError(f"{folder / DCP_METADATA}: {error}") from None


class _Planner(DefaultSavePlanner):
    """Plans by the layout of the live tensors and writes the given values."""

    def __init__(self, values: Mapping[str, Tensor], key: str) -> None:
        super().__init__(enable_plan_caching=bool(key))
        self._cached_plans_key = f"emma-{key}"
        self._values = values

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        value = self._values[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, FlatShard) else value


class DcpReader(dcp.FileSystemReader):
    """Reads a DCP folder. From an object store it fetches many tensors at once, because each answer takes time."""

    def __init__(self, folder: StoragePath) -> None:
        super().__init__(str(folder))
        self._fetched: dict[tuple[str, int], bytes] = {}
        if (remote := as_remote(folder)) is not None:
            self.fs, self.path = FsspecFileSystem(remote), remote.path  # type: ignore[assignment]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's table of contents. Raises OSError or StorageError, and ValueError where it is foreign."""
        with self.fs.create_stream(self.fs.concat_path(self.path, DCP_METADATA), "rb") as file:
            return load_dcp_metadata(cast(IO[bytes], file))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if not isinstance(self.fs, FsspecFileSystem):
            return super().read_data(plan, planner)
        remaining = [(item, self.storage_data[item.storage_index]) for item in plan.items]
        while remaining:
            batch = [remaining.pop()]
            size = batch[0][1].length
            while remaining and (size := size + remaining[-1][1].length) <= FETCH_BYTES:
                batch.append(remaining.pop())
            self._fetched = self.fs.fetch([(part.relative_path, part.offset, part.length) for _, part in batch])
            super().read_data(replace(plan, items=[item for item, _ in batch]), planner)
        self._fetched = {}
        done: Future[None] = Future()
        done.set_result(None)
        return done

    # A private method of torch: should it go, every tensor is requested again, several times, but read correctly.
    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        if (fetched := self._fetched.get((sinfo.relative_path, sinfo.offset))) is None:
            return super()._slice_file(file, sinfo)
        return io.BytesIO(fetched)


class DcpWriter(dcp.FileSystemWriter):
    """Writes a DCP folder. Raises the file system's own error, which torch's zip writer would hide."""

    def __init__(self, folder: StoragePath) -> None:
        remote = as_remote(folder)
        # An object store has nothing to flush, and torch would flush every disk of the machine instead.
        super().__init__(str(folder), sync_files=remote is None)
        if remote is not None:
            self.fs, self.path = FsspecFileSystem(remote), remote.path  # type: ignore[assignment]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, str(self.path)) from None
            raise


class FsspecFileSystem(FileSystemBase):
    """DCP's file operations in an object store; paths are those of fsspec's file system."""

    def __init__(self, folder: UPath) -> None:
        self._folder = folder
        self._fs = folder.fs

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with store_errors(self._folder), self._fs.open(os.fspath(path), mode) as stream:
            yield stream

    def fetch(self, ranges: list[tuple[str, int, int]]) -> dict[tuple[str, int], bytes]:
        """Ranges of files, each given as (file name, offset, length), by (file name, offset)."""
        names, starts, lengths = zip(*ranges, strict=True)
        files = [(self._folder / name).path for name in names]
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        with store_errors(self._folder):
            contents = self._fs.cat_ranges(files, list(starts), ends, on_error="raise")
        return dict(zip(zip(names, starts, strict=True), contents, strict=True))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return path

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        with store_errors(self._folder):
            self._fs.mv(path, new_path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: an object store has no folders, and some packages would make a missing bucket."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return storage_of(self._folder).exists(self._folder / os.path.basename(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        with store_errors(self._folder):
            self._fs.rm_file(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
