"""What an importer gives for each item of its source: a sample in the record format, or a reject with its reason.

An importer is a function (source, options) -> parts. Parts are read independently, each from start to end, and give one
outcome for each item, in the same order every time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.checked_image import image_extension
from data_pipelines.shards.excluded import refuse_row
from data_pipelines.shards.record import missing_part, read_record
from data_pipelines.shards.write import Record, compact_json
from emma_train.sequence.layout import check_marks
from emma_train.sequence.tasks import RECORD_KEYS, TASKS


@dataclass(frozen=True)
class ImportOptions:
    """What the command line says about a source."""

    dataset: str
    """Name of the data set, for provenance and keys."""
    licence: str = "unknown"
    tags: tuple[str, ...] = ()
    """Tags of every record."""
    images: str = ""
    """Folder or zip with the images, where they are not beside the annotations."""
    decode: bool = True
    """Whether images are decoded; otherwise only their headers are read."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """`--map`: field of a record -> column, key or member of the source."""


@dataclass(frozen=True)
class ImportedSample:
    """An item that became a record."""

    source_id: str
    """How the source names it."""
    record: Record
    images: dict[str, bytes]
    """Files by image name (img0, ...), their bytes as in the source."""
    captions: tuple[str, ...] = ()
    """Texts of a caption pair; the record then lists no tasks."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the source says about the item beside its content, such as scores."""
    config: str = ""
    """ImportPart of the data set that it is from."""


@dataclass(frozen=True)
class Reject:
    """An item that became no record, or several at once."""

    source_id: str
    reason: str
    count: int = 1
    """Number of items; 0 for what breaks off a file, whose further items nobody can count."""


Outcome = ImportedSample | Reject


@dataclass(frozen=True)
class ImportPart:
    """A piece of a source that one process reads."""

    name: str
    """Relative path of its file, for messages."""
    read: Callable[[int], Iterator[Outcome]]
    """First outcome to give -> outcomes. Can be pickled."""


Importer = Callable[[Path, ImportOptions], list[ImportPart]]


def outcome(source_id: object, row: Mapping[str, Any], make: Callable[[], ImportedSample]) -> Outcome:
    """What `make` returns, or a reject with the reason why it cannot: foreign data can raise anything.

    Raises UserError where the row is of the excluded set.
    """
    refuse_row(row, f"item {source_id}")
    try:
        return make()
    except ValueError as error:
        return Reject(str(source_id), str(error))
    except (KeyError, TypeError, AttributeError, IndexError, OSError, OverflowError) as error:
        return Reject(str(source_id), f"{type(error).__name__}: {error}")


def shard_members(sample: ImportedSample, options: ImportOptions) -> dict[str, bytes]:
    """The members of a sample's record by the name after the key: json, img0.jpg, txt, ... Raises ValueError where the
    record would not be used as it is."""
    provenance = {"dataset": options.dataset, "config": sample.config, "row": sample.source_id}
    tags = sorted({*options.tags, *sample.record.get("tags", [])})
    record = {**sample.record, "tags": tags, "provenance": {**provenance, "licence": options.licence}}
    members = {"json": compact_json(record)}
    for name, data in sample.images.items():
        try:
            members[f"{name}.{image_extension(data, options.decode)}"] = data
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for number, caption in enumerate(sample.captions):
        members[f"c{number}.txt" if sample.captions[1:] else "txt"] = caption.encode()
    check_members(members, set(sample.images))
    return members


def check_members(members: Mapping[str, bytes], images: set[str]) -> None:
    """Raise ValueError where a record has no task, an alternative that cannot be learned, or a name without image."""
    record = read_record(members)
    tasks = [task for task in RECORD_KEYS if record.get(task)]
    if not tasks:
        raise ValueError("neither a caption nor an answer nor an instruction in it")
    for task in tasks:
        for alternative in record[task]:
            if missing := missing_part(alternative, task):
                raise ValueError(missing)
            names = [*alternative.get("images", []), *([alternative["target"]] if "target" in alternative else [])]
            if unknown := [name for name in names if name not in images]:
                raise ValueError(f"it names images that it does not have: {', '.join(unknown)}")
            if not TASKS[task].makes_image:
                turns = [(turn["role"], turn["text"]) for turn in alternative["turns"]]
                check_marks(turns, len(alternative.get("images", [])))


def is_text_only(members: Sequence[str]) -> bool:
    """Whether a record has neither images nor captions of one."""
    return set(members) == {"json"}


def clean_text(value: object) -> str:
    """A text of the source without white space around it; empty for null. Raises ValueError on anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where a text should stand")
    return value.strip()
