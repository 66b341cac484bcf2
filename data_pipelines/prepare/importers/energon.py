"""megatron-energon's tars with .nv-meta/dataset.yaml: captions, questions, text, and crude ones through --map."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml
from braceexpand import braceexpand

from data_pipelines.prepare.importers.field_map import check_map, mapped_sample
from data_pipelines.prepare.importers.item import ImportOptions, ImportPart, Outcome, Reject, outcome
from data_pipelines.prepare.importers.source_files import relative_name, source_files
from data_pipelines.prepare.importers.tar_groups import tar_groups
from data_pipelines.shards.excluded import refuse_members
from emma_train.errors import UserError

log = logging.getLogger(__name__)
FIELDS = {
    "CaptioningSample": {"image": "image", "caption": "caption"},
    "VQASample": {"image": "image", "context": "question", "answers": "answer"},
    "OCRSample": {"image": "image", "text": "caption"},
    "TextSample": {"text": "text"},
}
"""Field of energon's sample type -> field of our map, for the types that are imported without --map."""


def energon_parts(source: Path, options: ImportOptions, split_part: str = "train") -> list[ImportPart]:
    """One part for each tar that .nv-meta/split.yaml lists in a split part; all tars where there is no such file.
    Raises UserError where neither the set's own map nor --map makes samples."""
    tars = source_files(source, (".tar",))
    if (listed := _split_tars(source, split_part)) is not None:
        num_all, tars = len(tars), [tar for tar in tars if relative_name(tar, source) in listed]
        if num_all > len(tars):
            log.info("%s: %d of %d tars are in the split part %s", source, len(tars), num_all, split_part)
    if not tars:
        return []
    fields = dict(options.fields) or energon_map(source)
    check_map(fields)
    return [ImportPart(relative_name(tar, source), partial(_read, tar, fields)) for tar in tars]


def energon_map(source: Path) -> dict[str, str]:
    """The field map in .nv-meta/dataset.yaml under the names of ours. Raises UserError where it has none."""
    file = (source if source.is_dir() else source.parent) / ".nv-meta" / "dataset.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "no YAML"
        raise UserError(
            f"{file}: cannot be read ({reason}); name the members with --map image=jpg caption=txt"
        ) from None
    settings = settings if isinstance(settings, dict) else {}
    kinds = settings.get("sample_type")
    kind = kinds.get("__class__") if isinstance(kinds, dict) else settings.get("__class__")
    names = FIELDS.get(str(kind))
    stored = settings.get("field_map")
    if names is None or not isinstance(stored, dict):
        raise UserError(
            f"{file}: its samples are {kind}, which code of the set cooks; name the members with --map, such as "
            "--map image=jpg caption=txt or turns=json[conversations]"
        )
    fields = {ours: str(stored[theirs]) for theirs, ours in names.items() if theirs in stored}
    if missing := [theirs for theirs in names if theirs not in stored]:
        raise UserError(f"{file}: its field_map has no {', '.join(missing)}; name the members with --map")
    return fields


def _split_tars(source: Path, part: str) -> set[str] | None:
    """The tars that .nv-meta/split.yaml has in a split part, or None where it has no parts. Raises UserError."""
    file = source / ".nv-meta" / "split.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'no YAML'})") from None
    parts = settings.get("split_parts") if isinstance(settings, dict) else None
    if not isinstance(parts, dict):
        return None
    if not isinstance(parts.get(part), list):
        raise UserError(f"{file}: has no split part {part}; it has {', '.join(map(str, parts))}")
    excluded = settings.get("exclude")
    names = {name for pattern in parts[part] for name in _expanded(str(pattern))}
    return names - set(map(str, excluded if isinstance(excluded, list) else []))


def _expanded(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError:  # a brace that is part of the name
        return [pattern]


def _read(tar: Path, fields: dict[str, str], start: int) -> Iterator[Outcome]:
    for group in tar_groups(tar, start):
        if isinstance(group, Reject):
            yield group
        else:
            refuse_members(group.key, group.members, tar)
            yield outcome(group.key, {}, partial(mapped_sample, group.members, fields, group.key))
