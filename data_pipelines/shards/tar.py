"""Reads a WebDataset tar record by record: a record is the consecutive members with one key. One record is in memory.

Python's tarfile is not used, because it keeps all headers in memory and takes 10 us for each: a shard can have a
hundred thousand, and a reader opens thousands of records per second.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this platform; zlib gives the same numbers at a fifth of the speed
    from zlib import crc32

TAR_BLOCK = 512
REGULAR_TYPES, LONG_NAME_TYPE, PAX_TYPES = (b"0", b"\0"), b"L", (b"x", b"X")
TAR_READ_BYTES = 16 << 20
MAX_MEMBER_BYTES = 1 << 30
"""Records are read into memory; a tar with a larger member, such as a file with a hole, is taken for a broken one."""


class BrokenTar(Exception):
    """The file is cut off or is not a tar. The message completes "broken tar, it ..."."""


class Readable(Protocol):
    """A file that is read from start to end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass
class Group:
    """One record of a tar: its members and the range of bytes they occupy."""

    key: str
    offset: int
    """Of its first header, in the tar."""
    size: int = 0
    """Number of bytes up to the end of its last member's padding."""
    crc32: int = 0
    """Of these bytes."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Content by the name after the key: json, img0.webp, ..."""
    repeated: list[str] = field(default_factory=list)
    """Names of members that occur more than once; `members` holds the last of each."""


def groups(file: Readable) -> Iterator[Group]:
    """Records of a tar, in order. Members without a WebDataset name are ignored. Raises BrokenTar."""
    group: Group | None = None
    headers: list[bytes] = []
    for offset, name, content, raw in _members(file):
        key, part = split_name(name)
        if not part:
            headers += raw
            continue
        if group is None or key != group.key:
            if group is not None:
                yield group
            group, headers = Group(key, offset), []
        for piece in (*headers, *raw):
            group.crc32 = crc32(piece, group.crc32)
            group.size += len(piece)
        headers = []
        if part in group.members:
            group.repeated.append(part)
        group.members[part] = content
    if group is not None:
        yield group


def read_group(data: bytes) -> dict[str, memoryview]:
    """Members of one record by the name after the key, from the record's bytes. Copies and verifies nothing."""
    members, position, override = {}, 0, _Override()
    view = memoryview(data)
    while position + TAR_BLOCK <= len(data):
        name, size, kind = _header(data[position : position + TAR_BLOCK])
        name, size = override.name or name, size if override.size is None else override.size
        content = view[position + TAR_BLOCK : position + TAR_BLOCK + size]
        position += TAR_BLOCK + size + -size % TAR_BLOCK
        if override.takes(kind, content):
            continue
        override = _Override()
        part = split_name(name)[1]
        if part and kind in REGULAR_TYPES:
            members[part] = content
    return members


def split_name(name: str) -> tuple[str, str]:
    """(key, part) of a member's name, split at the first dot of the file name, as webdataset does.

    Two empty strings for a name that is not of a record: a hidden file, no extension, or __meta__.
    """
    folder, slash, file = name.rpartition("/")
    stem, _, part = file.partition(".")
    if not stem or not part or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    return folder + slash + stem, part


def _members(file: Readable) -> Iterator[tuple[int, str, bytes, list[bytes]]]:
    """(offset, name, content, all bytes including headers) of each member. The name is empty if it is not a file."""
    start, position, raw, override = 0, 0, [], _Override()
    while (block := file.read(TAR_BLOCK)).strip(b"\0"):
        if len(block) < TAR_BLOCK:
            raise BrokenTar(f"ends within the header at byte {position}")
        try:
            name, size, kind = _header(block)
            is_header = int(block[148:156].strip(b" \0"), 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
        except ValueError:
            is_header = False
        if not is_header:
            raise BrokenTar(f"has no tar header at byte {position}")
        name, size = override.name or name, size if override.size is None else override.size
        if size < 0:
            raise BrokenTar(f"has a header with a negative size at byte {position}")
        if size > MAX_MEMBER_BYTES:
            raise BrokenTar(f"has a member of {size:,} bytes at byte {position}, more than {MAX_MEMBER_BYTES:,}")
        padded = _exactly(file, size + -size % TAR_BLOCK)
        position += TAR_BLOCK + len(padded)
        if len(padded) < size:
            raise BrokenTar(f"ends within {name}, at byte {position}")
        raw += [block, padded]
        content = padded[:size]
        try:
            if override.takes(kind, content):
                continue
        except (ValueError, IndexError):
            raise BrokenTar(f"has an extended header before byte {position} that cannot be read") from None
        yield start, name if kind in REGULAR_TYPES else "", content, raw
        start, raw, override = position, [], _Override()


class _Override:
    """Name and size of the next member, from an extended header (pax or GNU) before it."""

    def __init__(self) -> None:
        self.name = ""
        self.size: int | None = None

    def takes(self, kind: bytes, content: bytes | memoryview) -> bool:
        """Whether this member is an extended header; if so, keeps its values."""
        if kind == LONG_NAME_TYPE:
            self.name = _text(bytes(content))
        elif kind in PAX_TYPES:
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
    # If the first bit is set, the size is a binary number and not octal text (GNU, for sizes over 8 GiB).
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
    """`size` bytes, or fewer at the end of the file. Reads in pieces, so that a wrong size allocates no memory."""
    if size <= TAR_READ_BYTES:
        return file.read(size)
    pieces = []
    while size > 0 and (piece := file.read(min(size, TAR_READ_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
