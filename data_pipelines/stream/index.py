"""The index beside a shard and the manifest of a folder: all that a planner needs, without opening a tar.

shard-000000.tar              plain WebDataset: one group {key}.json + {key}.NAME.webp per record
shard-000000.idx.parquet      one row per (record, task): where its bytes are, and how long each alternative is
manifest.json                 schema, tokenizer, and each shard's size, rows and hash
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from emma_train.config.check import TASKS
from emma_train.config.errors import UserError
from emma_train.config.files import write_atomic
from emma_train.sequence import layout
from emma_train.sequence.tokens import TextTokenizer

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("task", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("text_tokens", pa.list_(pa.int32())),
        ("supervised_tokens", pa.list_(pa.int32())),
        ("context", pa.list_(pa.list_(pa.int16()))),
        ("target", pa.list_(pa.int16())),
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("tags", pa.list_(pa.string())),
    ]
)
"""`offset` and `size` bound the record's group in the tar. `text_tokens`, `supervised_tokens`, `context` (pictures
shown) and
`target` (picture to make, -1 for none) have one entry per alternative; pictures are numbered in the order of their
names."""


@dataclass(frozen=True)
class Group:
    """One record of a tar: its members' bytes and where they lie."""

    key: str
    offset: int
    size: int
    members: dict[str, bytes]
    """Content by the name after the key: json, img0.webp, ..."""


def groups(file: BinaryIO) -> Iterator[Group]:
    """Records of a tar, in order. Raises tarfile.ReadError on a broken archive."""
    key, start, end = "", 0, 0
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            name, _, part = member.name.partition(".")
            if name != key and members:
                yield Group(key, start, end - start, members)
                members = {}
            if not members:
                key, start = name, member.offset
            extracted = tar.extractfile(member)
            assert extracted is not None
            members[part] = extracted.read()
            end = member.offset_data + (member.size + 511) // 512 * 512
    if members:
        yield Group(key, start, end - start, members)


def read_group(data: bytes) -> dict[str, bytes]:
    """Members of one record from its bytes alone, by the name after the key."""
    members, at = {}, 0
    while at + 512 <= len(data):
        header = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "strict")
        members[header.name.partition(".")[2]] = data[at + 512 : at + 512 + header.size]
        at += 512 + (header.size + 511) // 512 * 512
    return members


def picture_names(members: dict[str, bytes]) -> list[str]:
    """Members that are pictures (img0.webp, ...), in the order that the index numbers them."""
    return sorted(name for name in members if name != "json" and not name.endswith((".json", ".txt")))


def layouts(record: dict[str, Any], task: str, tokenizer: TextTokenizer) -> list[list[layout.Segment]]:
    """The layout of each alternative of a record's task."""
    return [alternative_layout(alternative, task, tokenizer) for alternative in record.get(task, [])]


def alternative_layout(alternative: dict[str, Any], task: str, tokenizer: TextTokenizer) -> list[layout.Segment]:
    """The layout of one alternative as it stands in the record."""
    if task == "i2t":
        turns = [(turn["role"], turn["text"]) for turn in alternative["turns"]]
        return layout.i2t(tokenizer, alternative["images"], turns)
    return layout.it2i(tokenizer, alternative.get("images", []), alternative["text"], alternative["target"])


def index_folder(folder: Path, tokenizer: Path | str, provenance: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the index of every tar of a folder and its manifest; returns the manifest. Raises UserError."""
    folder, text = Path(folder), TextTokenizer(tokenizer)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: holds no *.tar to index")
    shards: list[dict[str, Any]] = []
    seen: set[str] = set()
    for tar in tars:
        rows: list[dict[str, Any]] = []
        data = tar.read_bytes()
        try:
            with open(tar, "rb") as file:
                for group in groups(file):
                    if group.key in seen:
                        raise UserError(f"{tar}: key {group.key} occurs twice in {folder}; keys are unique in a folder")
                    seen.add(group.key)
                    rows += _rows(group, zlib.crc32(data[group.offset : group.offset + group.size]), text, tar)
        except tarfile.TarError as error:
            raise UserError(f"{tar}: broken tar ({error}); write it again") from None
        index = index_path(tar)
        pq.write_table(pa.Table.from_pylist(rows, COLUMNS), index)
        shards.append(
            {
                "name": tar.name,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
                "rows": {task: sum(row["task"] == task for row in rows) for task in TASKS},
            }
        )
    manifest = {
        "schema": SCHEMA_VERSION,
        "tokenizer_sha256": text.sha256,
        "samples": {task: sum(shard["rows"][task] for shard in shards) for task in TASKS},
        "shards": shards,
        "provenance": provenance or {},
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a shard folder. Raises UserError where there is none or it is of another version."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except OSError as error:
        raise UserError(
            f"{folder / MANIFEST}: cannot read ({error.strerror}); `emma-data index {folder} --tokenizer FILE` makes it"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST}: not valid JSON ({error}); `emma-data index` makes it anew") from None
    if manifest.get("schema") != SCHEMA_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}; index again"
        )
    for shard in manifest["shards"]:
        tar = folder / shard["name"]
        for path in (tar, index_path(tar)):
            if not path.is_file():
                raise UserError(
                    f"{path}: missing, but {folder / MANIFEST} lists it; bring the shard back or index again"
                )
        if tar.stat().st_size != shard["bytes"]:
            raise UserError(f"{tar}: has {tar.stat().st_size} bytes, the manifest says {shard['bytes']}; copy it again")
        if "tags" not in shard:  # INTERIM
            shard["tags"] = {}
            for row in pq.read_table(index_path(tar), columns=["task", "tags"]).to_pylist():
                counts = shard["tags"].setdefault(row["task"], {})
                counts["|".join(sorted(row["tags"]))] = counts.get("|".join(sorted(row["tags"])), 0) + 1
    return manifest


def read_columns(folder: str, name: str, task: str) -> pa.Table:
    """The rows of a task of one shard's index."""
    return pq.read_table(index_path(Path(folder) / name), filters=[("task", "=", task)])


def check_folder(folder: Path) -> list[str]:
    """Everything that is wrong with a shard folder, a line each: hashes of tars and indexes, crc and pictures of
    records."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    for shard in manifest["shards"]:
        tar = folder / shard["name"]
        data = tar.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            problems.append(f"{tar}: content differs from its sha256 in the manifest")
        if hashlib.sha256(index_path(tar).read_bytes()).hexdigest() != shard["index_sha256"]:
            problems.append(f"{index_path(tar)}: content differs from its sha256 in the manifest")
        for row in pq.read_table(index_path(tar)).to_pylist():
            group = data[row["offset"] : row["offset"] + row["size"]]
            if zlib.crc32(group) != row["crc32"]:
                problems.append(f"{tar}: record {row['key']} differs from its crc32")
                continue
            members = read_group(group)
            for name in picture_names(members):
                try:
                    picture_size(members[name])
                except OSError as error:
                    problems.append(f"{tar}: picture {row['key']}.{name} cannot be read ({error})")
    return problems


def index_path(tar: Path) -> Path:
    """The index of a shard."""
    return tar.with_suffix(".idx.parquet")


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) from a picture's header alone. Raises OSError."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def _rows(group: Group, crc32: int, tokenizer: TextTokenizer, tar: Path) -> Iterator[dict[str, Any]]:
    try:
        record = json.loads(group.members["json"])
        names = picture_names(group.members)
        sizes = [picture_size(group.members[name]) for name in names]
        numbers = {name.partition(".")[0]: i for i, name in enumerate(names)}
        for task in TASKS:
            alternatives = record.get(task, [])
            if not alternatives:
                continue
            counts = [layout.num_text_tokens(segments) for segments in layouts(record, task, tokenizer)]
            yield {
                "key": group.key,
                "task": task,
                "offset": group.offset,
                "size": group.size,
                "crc32": crc32,
                "text_tokens": [text for text, _ in counts],
                "supervised_tokens": [supervised for _, supervised in counts],
                "context": [[numbers[name] for name in a.get("images", [])] for a in alternatives],
                "target": [numbers[a["target"]] if "target" in a else -1 for a in alternatives],
                "widths": [width for width, _ in sizes],
                "heights": [height for _, height in sizes],
                "tags": record.get("tags", []),
            }
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{tar}: record {group.key} cannot be indexed ({type(error).__name__}: {error})") from None
