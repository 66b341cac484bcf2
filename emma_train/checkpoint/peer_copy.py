"""Sends files of a rank to a rank on another node, in small parts through host memory, and hashes them on the way."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

PART_BYTES = 16 << 20
"""Bytes that are sent at once; each connection needs one buffer of this size."""
Files = Sequence[tuple[str, int]]
"""Path below the folder and bytes of each file."""
Hashes = dict[str, str]
"""SHA-256 of files, by path below the folder."""


def exchange_files(
    folder: Path, to: int | None, sent: Files, received: Mapping[int, Files], group: dist.ProcessGroup
) -> Hashes:
    """Send files of `folder` to the rank `to`, and write those that other ranks send into it, by sending rank. Returns
    the hashes of what was read and of what was received; `to` None sends nothing and reads nothing.

    Every rank of `group` that sends or receives calls it. Raises OSError of a file after all is exchanged, so that no
    other rank waits; and RuntimeError where a rank is gone or does not answer within the timeout of the group. What is
    written is not forced to the disk: a copy serves while this node lives, and a restart checks every byte.
    """
    hashes: Hashes = {}
    errors: list[OSError] = []
    outgoing = _read_parts(folder, sent, hashes, errors) if to is not None else iter(())
    incoming = {rank: _write_parts(folder, files, hashes, errors) for rank, files in received.items()}
    buffers = {rank: next(parts, None) for rank, parts in incoming.items()}
    # Round i of a rank needs round i of its partners and nothing later, so ranks cannot wait in a circle.
    while True:
        works = [dist.irecv(buffer, rank, group) for rank, buffer in buffers.items() if buffer is not None]
        if (part := next(outgoing, None)) is not None:
            works.append(dist.isend(part, to, group))
        for work in works:
            assert work is not None  # it is None only for ranks outside of the group
            work.wait()
        if not works:
            break
        buffers = {rank: next(incoming[rank], None) for rank, buffer in buffers.items() if buffer is not None}
    if errors:
        raise errors[0]
    return hashes


def _read_parts(folder: Path, files: Files, hashes: Hashes, errors: list[OSError]) -> Iterator[Tensor]:
    """The parts of files; zeros where a file cannot be read."""
    for name, size in files:
        try:
            file = open(folder / name, "rb")  # noqa: SIM115 - it must stay open between two parts
        except OSError as error:
            errors.append(error)
            yield from (torch.zeros(length, dtype=torch.uint8) for length in _lengths(size))
            continue
        digest = hashlib.sha256()
        with file:
            for length in _lengths(size):
                part = bytearray(length)
                try:
                    file.readinto(part)
                except OSError as error:
                    errors.append(error)
                digest.update(part)
                yield torch.frombuffer(part, dtype=torch.uint8)
        hashes[name] = digest.hexdigest()


def _write_parts(folder: Path, files: Files, hashes: Hashes, errors: list[OSError]) -> Iterator[Tensor]:
    """Buffers to receive into. A buffer is written when the next one is taken, or dropped after an error."""
    for name, size in files:
        parts = (bytearray(length) for length in _lengths(size))
        digest = hashlib.sha256()
        try:
            (folder / name).parent.mkdir(exist_ok=True)
            with open(folder / name, "wb") as file:
                for part in parts:
                    yield torch.frombuffer(part, dtype=torch.uint8)
                    digest.update(part)
                    file.write(part)
            hashes[name] = digest.hexdigest()
        except OSError as error:
            errors.append(error)
            yield from (torch.frombuffer(part, dtype=torch.uint8) for part in parts)


def _lengths(size: int) -> Iterator[int]:
    return (min(PART_BYTES, size - start) for start in range(0, size, PART_BYTES))
