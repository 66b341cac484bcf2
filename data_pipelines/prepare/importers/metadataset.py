"""megatron-energon's metadatasets: a YAML file that blends several sets, each of which is imported to a folder."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.prepare.importers.source_files import check_source
from emma_train.errors import UserError
from emma_train.storage.files import write_atomic

log = logging.getLogger(__name__)
BLEND_FILE = "sources.yaml"
"""The imported sets with their weights, as `data.sources` of a recipe has them."""
TRAIN_PART = "train"
LISTS = ("blend", "datasets", "blend_epochized")
"""Keys of a list of sets; `datasets` is that of version 1. In the last one, numbers are repetitions of each set."""
MAX_DEPTH = 8


@dataclass(frozen=True)
class BlendedSet:
    """A set of a blend."""

    path: Path
    part: str
    """Split part of the set that is read."""
    share: float
    """Of the samples; with `is_repeated`, how often each sample comes."""
    is_repeated: bool = False

    @property
    def name(self) -> str:
        return self.path.name if self.part == TRAIN_PART else f"{self.path.name}-{self.part}"


def is_metadataset(source: Path) -> bool:
    """Whether a source is a YAML file and no folder of shards."""
    return source.suffix in (".yaml", ".yml") and source.is_file()


def blended_sets(file: Path) -> dict[str, BlendedSet]:
    """The sets of the blend for training, by the name of the folder that each is imported to. Raises UserError."""
    sets: dict[str, BlendedSet] = {}
    for one in _sets(file, TRAIN_PART, 0):
        name, number = one.name, 2
        while name in sets and (sets[name].path, sets[name].part) != (one.path, one.part):
            name, number = f"{one.name}-{number}", number + 1
        known = sets.get(name)
        sets[name] = one if known is None else replace(one, share=one.share + known.share)
    if len({one.is_repeated for one in sets.values()}) > 1:
        raise UserError(f"{file}: mixes weights and repetitions in one blend; import each of its metadatasets")
    return sets


def write_sources(out: Path, sets: Mapping[str, BlendedSet], samples: Mapping[str, int]) -> None:
    """Write BLEND_FILE; `samples` are those of each imported set."""
    lines = []
    for name, one in sets.items():
        weight = one.share * samples[name] if one.is_repeated else one.share
        source = {"path": (out / name).as_posix(), "weight": round(weight, 6)}
        lines.append(f"- {json.dumps(source, ensure_ascii=False)}\n")
    write_atomic(out / BLEND_FILE, "".join(lines))
    log.info("%s: %d sets; the recipe's data.sources are in %s", out, len(sets), out / BLEND_FILE)


def _sets(file: Path, split: str, depth: int) -> Iterator[BlendedSet]:
    """The sets of a split of a metadataset, those of metadatasets in it too."""
    if depth > MAX_DEPTH:
        raise UserError(f"{file}: metadatasets in metadatasets, more than {MAX_DEPTH} deep; does one contain itself?")
    blend = _splits(file).get(split)
    if not isinstance(blend, dict):
        raise UserError(f"{file}: has no splits.{split}; energon's metadatasets name their sets there")
    if "path" in blend:
        yield from _referred(file, blend, 1.0, False, split, depth)
        return
    key = next((key for key in LISTS if isinstance(blend.get(key), list) and blend[key]), None)
    if key is None:
        keys = ", ".join(map(str, blend))
        raise UserError(f"{file}: splits.{split} has {keys}; only path and {', '.join(LISTS)} can be read")
    is_repeated = key == "blend_epochized"
    for number, entry in enumerate(blend[key]):
        where = f"{file}: splits.{split}.{key}[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(f"{where}: has no path; sets that are joined record by record cannot be imported")
        share = entry.get("repetitions" if is_repeated else "weight", 1)
        if not isinstance(share, int | float) or not math.isfinite(share) or share < 0:
            raise UserError(f"{where}: its weight or repetitions are {share!r}; give a number of 0 or more")
        if share > 0:
            yield from _referred(file, entry, float(share), is_repeated, split, depth)


def _referred(
    file: Path, entry: Mapping[str, Any], share: float, is_repeated: bool, split: str, depth: int
) -> Iterator[BlendedSet]:
    """What an entry of a blend names: a set, or the sets of another metadataset."""
    path = file.parent / str(entry["path"])
    check_source(path if "://" not in str(entry["path"]) else Path(entry["path"]))
    part = str(entry.get("split_part") or split)
    if not is_metadataset(path):
        yield BlendedSet(path, part, share, is_repeated)
        return
    inner = list(_sets(path, part, depth + 1))
    total = 1.0 if is_repeated else sum(one.share for one in inner)
    for one in inner:
        if one.is_repeated != is_repeated and len(inner) > 1:
            raise UserError(f"{path}: mixes weights and repetitions in one blend; import each of its metadatasets")
        yield replace(one, share=share * one.share / total, is_repeated=is_repeated)


def _splits(file: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'no YAML'})") from None
    kind = values.get("__class__") if isinstance(values, dict) else None
    splits = values.get("splits") if isinstance(values, dict) else None
    if kind not in ("Metadataset", "MetadatasetV2") or not isinstance(splits, dict):
        raise UserError(f"{file}: is no metadataset of energon (__class__ {kind}); give it, or the folder of a set")
    return splits
