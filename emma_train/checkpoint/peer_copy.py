"""Sends files of a rank to a rank on another node, through host memory and in small parts."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

PART_BYTES = 16 << 20
"""Bytes that are sent at once; each connection needs one buffer of this size."""
Files = Sequence[tuple[str, int]]
"""Path below the folder and bytes of each file."""


def exchange_files(
    folder: Path, to: int | None, sent: Files, received: Mapping[int, Files], group: dist.ProcessGroup
) -> None:
    """Send files of `folder` to the rank `to`, and write those that other ranks send into it, by sending rank.

    Every rank of `group` that sends or receives calls it. Raises OSError of a file after all is exchanged, so that no
    other rank waits; and RuntimeError where a rank is gone or does not answer within the timeout of the group.
    """
    errors: list[OSError] = []
    outgoing = _read_parts(folder, sent, errors) if to is not None else iter(())
    incoming = {rank: _write_parts(folder, files, errors) for rank, files in received.items()}
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


def _read_parts(folder: Path, files: Files, errors: list[OSError]) -> Iterator[Tensor]:
    """The parts of files; zeros where a file cannot be read."""
    for name, size in files:
        try:
            file = open(folder / name, "rb")  # noqa: SIM115 - it must stay open between two parts
        except OSError as error:
            errors.append(error)
            yield from (torch.zeros(length, dtype=torch.uint8) for length in _lengths(size))
            continue
        with file:
            for length in _lengths(size):
                part = bytearray(length)
                try:
                    file.readinto(part)
                except OSError as error:
                    errors.append(error)
                yield torch.frombuffer(part, dtype=torch.uint8)


def _write_parts(folder: Path, files: Files, errors: list[OSError]) -> Iterator[Tensor]:
    """Buffers to receive into. A buffer is written when the next one is taken, or dropped after an error."""
    for name, size in files:
        parts = (bytearray(length) for length in _lengths(size))
        try:
            (folder / name).parent.mkdir(exist_ok=True)
            with open(folder / name, "wb") as file:
                for part in parts:
                    yield torch.frombuffer(part, dtype=torch.uint8)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            errors.append(error)
            yield from (torch.frombuffer(part, dtype=torch.uint8) for part in parts)


def _lengths(size: int) -> Iterator[int]:
    return (min(PART_BYTES, size - start) for start in range(0, size, PART_BYTES))
