"""Says what a source holds, and which importer is nearest, where an importer cannot read it."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.prepare.importers.json_items import json_items
from data_pipelines.prepare.importers.parquet_rows import parquet_columns
from data_pipelines.prepare.importers.source_files import relative_name, source_files
from data_pipelines.shards.excluded import refuse_columns, refuse_names
from data_pipelines.shards.images import EXTENSIONS
from data_pipelines.shards.tar import BrokenTar, groups
from emma_train.errors import UserError

NAMES_SHOWN = 12
FILES_READ = 20
"""Files of each kind of which the columns, keys or members are read."""


@dataclass
class SourceContent:
    """What a source holds, by kind of file."""

    suffixes: Counter[str] = field(default_factory=Counter)
    columns: list[str] = field(default_factory=list)
    """Of its parquet files."""
    keys: list[str] = field(default_factory=list)
    """Of the items in its JSON files."""
    members: list[str] = field(default_factory=list)
    """Of the records in its tars."""
    member_keys: list[str] = field(default_factory=list)
    """Of the JSON in these."""
    has_energon: bool = False

    def text(self) -> str:
        """What it holds, in one line."""
        kinds = ", ".join(f"{num} {suffix or 'without suffix'}" for suffix, num in self.suffixes.most_common(6))
        texts = [f"files: {kinds or 'none'}"]
        lists = {"columns": self.columns, "keys": self.keys, "members": self.members, "JSON keys": self.member_keys}
        for name, values in lists.items():
            if values:
                more = f" and {len(values) - NAMES_SHOWN} more" if values[NAMES_SHOWN:] else ""
                texts.append(f"{name}: {', '.join(values[:NAMES_SHOWN])}{more}")
        return "; ".join(texts)

    def nearest(self) -> str:
        """Name of the importer that fits best; empty where none does."""
        columns, keys = set(self.columns), set(self.keys)
        extensions = {suffix.lstrip(".").lower() for suffix in self.suffixes}
        rules = (
            (self.has_energon, "energon"),
            ({"src_img", "edited_img"} <= columns, "omniedit"),
            ({"images", "texts"} <= columns, "finevision"),
            ({"image", "conversations"} <= columns, "llava-onevision"),
            ("image_list" in columns or {"image", "captions"} <= columns, "bagel"),
            ({"key", "status", "url"} <= columns and bool(self.members), "img2dataset"),
            ("output_image" in keys and "instruction" in keys, "x2i2"),
            (bool(keys & {"conversations", "messages"}), "llava-json"),
            ("txt" in self.members, "img2dataset"),
            (bool(self.members), "energon with --map"),
            (bool(columns), "hf-parquet with --map"),
            (bool(extensions & EXTENSIONS), "folder"),
        )
        return next((name for fits, name in rules if fits), "")


def source_content(source: Path) -> SourceContent:
    """What a source holds. Raises UserError where something in it is of the excluded set."""
    content = SourceContent()
    for path in source_files(source, ("",)):
        refuse_names([relative_name(path, source)], source)
        content.suffixes[path.suffix] += 1
    content.has_energon = (source / ".nv-meta").is_dir()
    for path in source_files(source, (".parquet",))[:FILES_READ]:
        names = parquet_columns(path)
        refuse_columns(names, path)
        _extend(content.columns, names)
    for path in source_files(source, (".json", ".jsonl"))[:FILES_READ]:
        for item in itertools.islice(json_items(path), 3):
            if isinstance(item, Mapping):
                refuse_columns(item, path)
                _extend(content.keys, list(item))
    for path in source_files(source, (".tar",))[:FILES_READ]:
        _read_tar(path, content)
    return content


def nothing_to_import(importer: str, source: Path, content: SourceContent) -> UserError:
    """The error where an importer finds nothing in a source."""
    nearest = content.nearest()
    advice = f"the nearest importer is {nearest}" if nearest and nearest != importer else "name its fields with --map"
    return UserError(f"{source}: nothing that import {importer} reads; it has {content.text()}; {advice}")


def _read_tar(path: Path, content: SourceContent) -> None:
    try:
        with open(path, "rb") as file:
            for group in itertools.islice(groups(file), 3):
                _extend(content.members, list(group.members))
                if "json" in group.members:
                    values = json.loads(group.members["json"])
                    if isinstance(values, dict):
                        refuse_columns(values, path)
                        _extend(content.member_keys, list(values))
    except (OSError, BrokenTar, ValueError, RecursionError):
        return


def _extend(names: list[str], others: Sequence[str]) -> None:
    names += [str(name) for name in dict.fromkeys(others) if name not in names]
