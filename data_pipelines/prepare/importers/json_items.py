"""Reads items of a JSON array or of JSON lines one by one: the file is never in memory as a unit."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
MAX_ITEM_CHARS = 64 << 20
"""A longer item is taken for a broken file."""


class BrokenItem:
    """An item that is no valid JSON. `ends` says that nothing after it can be read."""

    def __init__(self, reason: str, ends: bool = False) -> None:
        self.reason, self.ends = reason, ends


def json_items(path: Path) -> Iterator[Any]:
    """The items of a file: a JSON array, or one item a line. Broken ones are given as BrokenItem."""
    with open(path, "rb") as file:
        first = file.read(3)
        start = 3 if first == codecs.BOM_UTF8 else 0
        file.seek(start)
        while (byte := file.read(1)).isspace():
            start += 1
        file.seek(start)
        yield from _array_items(file) if byte == b"[" else _line_items(file)


def _line_items(file: BinaryIO) -> Iterator[Any]:
    while line := file.readline(MAX_ITEM_CHARS):
        if line.isspace():
            continue
        try:
            yield json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            yield BrokenItem(f"no valid JSON ({_problem(error)})")


def _array_items(file: BinaryIO) -> Iterator[Any]:
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    buffer, position, wanted, ended = decode(file.read(CHUNK_BYTES)), 1, CHUNK_BYTES, False
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if buffer[position : position + 1] == "]":
            return
        problem = "it ends within the array"
        try:
            value, end = scan(buffer, position)
            if end < len(buffer):  # a number could go on in the next chunk
                yield value
                position, wanted = end, CHUNK_BYTES
                continue
        except (ValueError, RecursionError) as error:
            problem = _problem(error)
        if ended or len(buffer) - position > MAX_ITEM_CHARS:
            yield BrokenItem(f"the JSON array breaks off here ({problem}); no item after it can be read", ends=True)
            return
        data = file.read(wanted)
        wanted *= 2  # so that a long item is not scanned again for every chunk
        ended = not data
        buffer, position = buffer[position:] + decode(data, final=ended), 0


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
