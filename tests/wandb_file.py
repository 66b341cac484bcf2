"""Reads the files of W&B's offline runs."""

import json
import struct
import time
from pathlib import Path
from typing import Any


def wandb_records(path: Path) -> list[Any]:
    """Reads a .wandb file: a 7-byte header, then a LevelDB log of 32 KiB blocks with protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, partial, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack("<HB", data[offset + 4 : offset + 7])
        partial += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records


def wandb_runs(folder: Path, ended: int, timeout_s: float = 60) -> list[Any]:
    """Records of all offline runs below a folder, once `ended` have ended: W&B writes in a process of its own."""
    end, records = time.monotonic() + timeout_s, []
    while time.monotonic() < end:
        files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
        records = [record for file in files for record in wandb_records(file)]
        if sum(r.HasField("exit") for r in records) >= ended:
            return records
        time.sleep(0.1)
    raise AssertionError(f"{ended} runs should have ended: {len(records)} records")


def history(records: list[Any]) -> list[dict[str, Any]]:
    """Rows of the history, by key."""
    return [
        {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.HasField("history")
    ]
