"""safetensors files: one or several are read as one table, in full or in slices, and written tensor by tensor."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emma_train.errors import UserError
from emma_train.storage.files import replacing, write_atomic
from emma_train.storage.urls import is_inner_path

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch types by their names in safetensors files."""


@dataclass(frozen=True)
class Spec:
    """Type and shape of a stored tensor."""

    dtype: str
    """Its name in safetensors files: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Iterable[int]) -> "Spec":
        return cls(next(name for name, known in DTYPES.items() if known is dtype), tuple(shape))


class Tensors:
    """The tensors of folder/STEM.safetensors, or of the files that STEM.safetensors.index.json names.

    Files are memory-mapped, so only what is read is loaded. Raises UserError naming the file if one is missing or
    truncated.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            files = _indexed_files(index)
        else:
            raise UserError(f"{folder}: holds neither {single.name} nor {index.name}")
        self._slices: dict[str, Any] = {}
        self.specs: dict[str, Spec] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self._slices[name] = file.get_slice(name)
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{path}: not a complete safetensors file ({reason}); copy or download it again"
                ) from None
        for name, tensor in self._slices.items():
            spec = self.specs[name] = Spec(str(tensor.get_dtype()), tuple(tensor.get_shape()))
            if spec.dtype not in DTYPES:
                raise UserError(f"{folder}: holds {name} as {spec.dtype}; use a checkpoint that is not quantised")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or the part of it that `index` selects (one slice per dimension)."""
        part: Tensor = self._slices[name][index or ...]
        return part


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names. Raises UserError where it is no index, or one lies outside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map; copy or download it again")
    for name in weight_map.values():
        if not is_inner_path(name):
            raise UserError(f"{index}: weight_map names {name!r}, which is no file in its folder")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def write_safetensors(path: Path, specs: Mapping[str, Spec], value: Callable[[str], Tensor]) -> None:
    """Write one safetensors file with one tensor at a time in memory. A crash leaves the old file.

    The library's own writer needs all tensors of a file at once, which may not fit into host memory.
    """
    # Largest element size first, so that every tensor is aligned to its type.
    names = sorted(specs, key=lambda name: (-DTYPES[specs[name].dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name in names:
        spec, start = specs[name], stop
        stop += spec.num_bytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, stop]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with replacing(path) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name in names:
            tensor = value(name).contiguous().reshape(-1).view(torch.uint8)
            assert len(tensor) == specs[name].num_bytes, name
            file.write(tensor.numpy().data)


def write_sharded(
    folder: Path, specs: Mapping[str, Spec], value: Callable[[str], Tensor], limit: float, stem: str = "model"
) -> None:
    """Write folder/STEM.safetensors, or, where that would exceed `limit` bytes, several files and then their index."""
    files: list[dict[str, Spec]] = [{}]
    room = limit
    for name, spec in specs.items():
        if files[-1] and spec.num_bytes > room:
            files.append({})
            room = limit
        files[-1][name] = spec
        room -= spec.num_bytes
    if len(files) == 1:
        write_safetensors(folder / f"{stem}.safetensors", specs, value)
        return
    names = [f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, part in zip(names, files, strict=True):
        write_safetensors(folder / name, part, value)
    weight_map = {key: name for name, part in zip(names, files, strict=True) for key in part}
    total = sum(spec.num_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
