"""A WebDataset tar as records: the members that share a key and stand together, in one pass, one record in memory.

Python's tarfile keeps every header that it has seen and takes 10 us for each; shards of others have a hundred thousand,
and a reader opens thousands of records a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this platform: the same numbers, at a fifth of the speed
    from zlib import crc32

BLOCK = 512
REGULAR, LONG_NAME, PAX = (b"0", b"\0"), b"L", (b"x", b"X")
CHUNK = 16 << 20


class BrokenTar(Exception):
    """An archive that ends too early or is none."""


class Readable(Protocol):
    """A file that is read from its start to its end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass
class Group:
    """One record of a tar: its members' bytes and where they lie."""

    key: str
    offset: int
    """Of its first header in the tar."""
    size: int = 0
    """To the end of its last member's padding."""
    crc32: int = 0
    """Of these bytes."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Content by the name after the key: json, img0.webp, ..."""
    offsets: dict[str, int] = field(default_factory=dict)
    """Where each content begins, counted from the group's offset."""


def groups(file: Readable) -> Iterator[Group]:
    """Records of a tar, in order; what has no name of a WebDataset member is passed over. Raises BrokenTar."""
    group: Group | None = None
    between: list[bytes] = []
    for offset, name, content, raw in _members(file):
        key, part = split_name(name)
        if not part:
            between += raw
            continue
        if group is None or key != group.key:
            if group is not None:
                yield group
            group, between = Group(key, offset), []
        for piece in (*between, *raw):
            group.crc32 = crc32(piece, group.crc32)
            group.size += len(piece)
        between = []
        group.members[part] = content
        group.offsets[part] = group.size - len(raw[-1])
    if group is not None:
        yield group


def read_group(data: bytes) -> dict[str, memoryview]:
    """Members of one record from its bytes alone, by the name after the key. Nothing is copied or verified."""
    members, at, override = {}, 0, _Override()
    view = memoryview(data)
    while at + BLOCK <= len(data):
        name, size, kind = _header(data[at : at + BLOCK])
        name, size = override.name or name, size if override.size is None else override.size
        content = view[at + BLOCK : at + BLOCK + size]
        at += BLOCK + size + -size % BLOCK
        if override.takes(kind, content):
            continue
        override = _Override()
        part = split_name(name)[1]
        if part and kind in REGULAR:
            members[part] = content
    return members


def split_name(name: str) -> tuple[str, str]:
    """Key and part of a member as webdataset splits them, at the first dot of the file's name; two empty strings for
    what is none (a hidden file, no extension, __meta__)."""
    folder, slash, file = name.rpartition("/")
    stem, _, part = file.partition(".")
    if not stem or not part or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    return folder + slash + stem, part


def _members(file: Readable) -> Iterator[tuple[int, str, bytes, list[bytes]]]:
    """(offset, name, content, all of its bytes) of each member; the name of a folder, link or the like is empty."""
    start, at, raw, override = 0, 0, [], _Override()
    while (block := file.read(BLOCK)).strip(b"\0"):
        if len(block) < BLOCK:
            raise BrokenTar(f"ends within the header at byte {at}")
        try:
            name, size, kind = _header(block)
            whole = int(block[148:156].strip(b" \0"), 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
        except ValueError:
            whole = False
        if not whole:
            raise BrokenTar(f"has no tar header at byte {at}")
        name, size = override.name or name, size if override.size is None else override.size
        padded = _exactly(file, size + -size % BLOCK)
        at += BLOCK + len(padded)
        if len(padded) < size:
            raise BrokenTar(f"ends within {name}, at byte {at}")
        raw += [block, padded]
        content = padded[:size]
        if override.takes(kind, content):
            continue
        yield start, name if kind in REGULAR else "", content, raw
        start, raw, override = at, [], _Override()


class _Override:
    """Name and size that an extended header (pax, GNU) gives to the member after it."""

    def __init__(self) -> None:
        self.name = ""
        self.size: int | None = None

    def takes(self, kind: bytes, content: bytes | memoryview) -> bool:
        """Whether this is such a header; it is remembered."""
        if kind == LONG_NAME:
            self.name = _text(bytes(content))
        elif kind in PAX:
            values = _pax(bytes(content))
            self.name = values.get("path", self.name)
            self.size = int(values["size"]) if "size" in values else self.size
        else:
            return False
        return True


def _header(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and type of a header block."""
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    digits = block[124:136]
    # The first bit of a size says that it is no octal text but a number (GNU, for sizes over 8 GiB).
    size = int.from_bytes(digits[1:], "big") if digits[0] & 0x80 else int(digits.strip(b" \0") or b"0", 8)
    return name, size, block[156:157]


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Records "length key=value\\n" of a pax header."""
    values = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        values[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return values


def _exactly(file: Readable, size: int) -> bytes:
    """`size` bytes, or what is left; in pieces, so that a size that is a lie costs no memory."""
    if size <= CHUNK:
        return file.read(size)
    pieces = []
    while size > 0 and (piece := file.read(min(size, CHUNK))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
