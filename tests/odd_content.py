"""Changes one thing in a file of a public set: a value, a column, a member, or its bytes.

damage_bytes(path, rng)      cuts, flips, empties, doubles ... a file as a broken copy would
change_content(path, rng)    puts something odd in one place of a parquet, JSON, tar, zip, text or image file

Both return what they did. They draw from `rng` alone, so that a case can be made again.
"""

import csv
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.odd_images import IMAGES

TEXTS = (
    *("", "   ", "\0", "<image><image>", "<image>", "\ufeffx", "<|im_end|><|vision_start|>", "\u202e猫\u2028b"),
    *("é" * 20_000, "../../x.png", "/etc/passwd", '{"a": [', "\x85\x1c", "NaN", "-1"),
)
NUMBERS = (float("nan"), float("inf"), -1e300, -1, 0, 2**62, 2**80)
PAX = (b"0 path=a\n", b"x path=a\n", b"30 size=-9\n", b"15 path=b\xff.jpg", b"\0" * 9, b"10 size=zz\n")
"""Content of extended headers of a tar."""
DEEP = "@deep@"
"""Stands for a list of 3,000 levels."""


def damage_bytes(path: Path, rng: random.Random) -> str:
    """Damage a file as a broken disk or copy does."""
    data = path.read_bytes()
    kind = rng.choice(("cut", "cut", "flip", "flip", "empty", "zeros", "twice", "hole"))
    at = rng.randrange(len(data)) if data else 0
    changed = {
        "cut": data[:at],
        "flip": data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :] if data else b"",
        "empty": b"",
        "zeros": data[:at] + b"\0" * len(data[at : at + 512]) + data[at + 512 :],
        "twice": data + data,
        "hole": data[:at] + data[at + 100 :],
    }[kind]
    path.write_bytes(changed)
    return f"{kind} at {at}"


def change_content(path: Path, rng: random.Random) -> str:
    """Put something odd in one place of a file; empty where the file is of no kind that has one."""
    changes: dict[str, Callable[[Path, random.Random], str]] = {
        ".parquet": _change_parquet,
        ".json": _change_json,
        ".jsonl": _change_json,
        ".tar": _change_tar,
        ".zip": _change_zip,
        ".csv": _change_csv,
    }
    change = changes.get(path.suffix, _change_plain)
    return change(path, rng)


def odd_json(rng: random.Random) -> Any:
    return rng.choice((None, True, [], {}, ["a"], {"a": None}, [[]], DEEP, *NUMBERS, *TEXTS, "\ud800"))


def odd_image(rng: random.Random) -> tuple[str, bytes | None]:
    """An image's name, and its bytes."""
    name = rng.choice(list(IMAGES))
    return name, IMAGES[name][0]


def _change_parquet(path: Path, rng: random.Random) -> str:
    table = pq.read_table(path)
    if rng.random() < 0.35:
        table, what = _with_odd_column(table, rng)
    else:
        rows, name = table.to_pylist(), rng.choice(table.column_names)
        row = rng.randrange(len(rows))
        rows[row][name] = _odd_value(table.schema.field(name).type, rows[row][name], rng)
        table, what = pa.Table.from_pylist(rows, table.schema), f"value {name}[{row}] is {str(rows[row][name])[:60]!r}"
    pq.write_table(table, path, row_group_size=2)
    return what


def _with_odd_column(table: pa.Table, rng: random.Random) -> tuple[pa.Table, str]:
    number = rng.randrange(table.num_columns)
    name, column = table.column_names[number], table.column(number)
    kind = rng.choice(("dropped", "renamed", "last", "twice", "numbers", "texts", "nulls", "no UTF-8"))
    if kind == "dropped":
        changed = table.remove_column(number)
    elif kind == "renamed":
        changed = table.rename_columns([f"{n}_2" if n == name else n for n in table.column_names])
    elif kind == "last":
        changed = table.remove_column(number).append_column(name, column)
    elif kind == "twice":
        changed = table.append_column(name, column)
    else:
        values = {
            "numbers": pa.array(range(len(table)), pa.int64()),
            "texts": pa.array([f"text {i}" for i in range(len(table))]),
            "nulls": pa.nulls(len(table)),
            "no UTF-8": pa.array([b"\xff\xfe cat"] * len(table)).view(pa.string()),
        }
        changed = table.set_column(number, name, values[kind])
    return changed, f"column {name}: {kind}"


def _odd_value(kind: pa.DataType, value: Any, rng: random.Random) -> Any:
    """Another value that fits a type: odd, or null."""
    if rng.random() < 0.15:
        return None
    if pa.types.is_struct(kind):
        field = kind.field(rng.randrange(kind.num_fields))
        return {**(value or {}), field.name: _odd_value(field.type, (value or {}).get(field.name), rng)}
    if pa.types.is_list(kind):
        values = list(value or [])
        how = rng.choice(("empty", "null in it", "one more", "one changed"))
        if how == "empty" or not values:
            return [] if how != "null in it" else [None]
        if how == "one changed":
            at = rng.randrange(len(values))
            return [*values[:at], _odd_value(kind.value_type, values[at], rng), *values[at + 1 :]]
        return [*values, None if how == "null in it" else values[0]]
    if pa.types.is_binary(kind):
        return odd_image(rng)[1]
    if pa.types.is_string(kind):
        return rng.choice(TEXTS)
    if pa.types.is_floating(kind):
        return float(rng.choice(NUMBERS))
    return rng.choice((-1, 0, 2**62)) if pa.types.is_integer(kind) else None


def _change_json(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8")
    is_lines = path.suffix == ".jsonl"
    items: Any = [json.loads(line) for line in text.split("\n") if line.strip()] if is_lines else json.loads(text)
    changed, what = changed_json(items, rng)
    if is_lines and isinstance(changed, list):
        path.write_bytes(b"".join(_dumped(item) + b"\n" for item in changed))
    else:
        path.write_bytes(_dumped(changed))
    return what


def changed_json(value: Any, rng: random.Random, where: str = "") -> tuple[Any, str]:
    """A JSON value in which something at a random depth is another value, missing, or present twice."""
    if not isinstance(value, list | dict) or not value or (where and rng.random() < 0.2):
        odd = odd_json(rng)
        return odd, f"{where} is {str(odd)[:60]!r}"
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}, f"{where}.{key} is missing"
        changed, what = changed_json(value[key], rng, f"{where}.{key}")
        return {**value, key: changed}, what
    at = rng.randrange(len(value))
    if rng.random() < 0.15:
        return [*value[:at], value[at], *value[at:]], f"{where}[{at}] comes twice"
    changed, what = changed_json(value[at], rng, f"{where}[{at}]")
    return [*value[:at], changed, *value[at + 1 :]], what


def _dumped(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    return text.replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).encode("utf-8", "surrogatepass")


def _change_tar(path: Path, rng: random.Random) -> str:
    with tarfile.open(path) as tar:
        members = [(m, (tar.extractfile(m) or io.BytesIO()).read()) for m in tar.getmembers()]
    at = rng.randrange(len(members))
    member, data = members[at]
    name, key = member.name, member.name.partition(".")[0]
    kind = rng.choice(("content", "content", "content", "no UTF-8", "member twice", "key twice", "gone", "link",
                       "folder", "long name", "pax", "hidden"))  # fmt: skip
    what = f"{name}: {kind}"
    if kind == "content":
        data, what = _odd_member(name, data, rng)
        members[at] = member, data
    elif kind == "no UTF-8":
        for of_key, _ in members:
            of_key.name = of_key.name.replace(key, f"{key}\udcff", 1) if of_key.name.startswith(key) else of_key.name
    elif kind == "member twice":
        members.insert(at, members[at])
    elif kind == "key twice":
        members += [pair for pair in members if pair[0].name.startswith(key)]
    elif kind == "gone":
        del members[at]
    elif kind == "long name":
        member.name = f"{'folder/' * 30}{name}"
    elif kind == "hidden":
        members.insert(at, (tarfile.TarInfo(f"._{name}"), b"x"))
    elif kind == "link":
        member.type, member.linkname, members[at] = tarfile.SYMTYPE, "/etc/passwd", (member, b"")
    else:
        extra = tarfile.TarInfo("extra")
        extra.type = tarfile.DIRTYPE if kind == "folder" else tarfile.XHDTYPE
        pax = rng.choice(PAX)
        members.insert(at, (extra, b"" if kind == "folder" else pax))
        what += f" {pax!r}" if kind == "pax" else ""
    with tarfile.open(path, "w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return what


def _odd_member(name: str, data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Other content for a member or file of this name, and what it is."""
    if name.endswith(".json") and rng.random() < 0.8:
        value, what = changed_json(json.loads(data), rng)
        return _dumped(value), f"{name}: {what}"
    if name.endswith((".txt", ".json", ".yaml", ".tsv")):
        text = rng.choice((*(text.encode() for text in TEXTS), b"\xff\xfe", b"\xed\xa0\x80"))
        return text, f"{name}: {text[:40]!r}"
    kind, image = odd_image(rng)
    return image or b"", f"{name}: image {kind}"


def _change_zip(path: Path, rng: random.Random) -> str:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, data = members[at]
    kind = rng.choice(("content", "content", "gone", "renamed", "twice"))
    what = f"{name}: {kind}"
    if kind == "content":
        data, what = _odd_member(name, data, rng)
    members[at : at + 1] = {
        "content": [(name, data)],
        "gone": [],
        "renamed": [(f"{name}.bak", data)],
        "twice": [(name, data), (name, data)],
    }[kind]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members:
            archive.writestr(zipfile.ZipInfo(member), content)
    return what


def _change_csv(path: Path, rng: random.Random) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    at = rng.randrange(1, len(rows))
    column = rng.randrange(len(rows[at]))
    rows[at][column] = rng.choice([text for text in TEXTS if "\0" not in text])
    if rng.random() < 0.3:
        rows[at] = rows[at][:-1] if rng.random() < 0.5 else [*rows[at], "more"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return f"row {at} is {str(rows[at])[:60]}"


def _change_plain(path: Path, rng: random.Random) -> str:
    data, what = _odd_member(path.name, path.read_bytes(), rng)
    path.write_bytes(data)
    return what
