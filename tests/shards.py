"""Writes small shard folders, for tests that damage them or count their samples."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.shards.build_index import index_folder
from tests.helpers import ASSETS

Content = tuple[str, dict[str, Any], dict[str, bytes]]
"""Key, record, and images by the name that they have after the key (img0.png)."""


def png(seed: int, side: int = 32) -> bytes:
    """An image of noise."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def jpeg_with_orientation(orientation: int, width: int = 64, height: int = 32) -> bytes:
    """A black image with a white block that people see in the upper left corner, stored as a camera does that was
    turned: with an EXIF orientation. `width` and `height` are those of the upright image."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[: height // 2, : width // 4] = 255
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def sixteen_bit_png(width: int = 64, height: int = 32) -> bytes:
    """A grey image of 16 bits: black on the left to white (65535) on the right."""
    file = io.BytesIO()
    Image.fromarray(np.tile(np.linspace(0, 65535, width).astype(np.uint16), (height, 1))).save(file, "PNG")
    return file.getvalue()


def question(key: str, answers: Sequence[str] = ("a cat",), tags: Sequence[str] = (), side: int = 32) -> Content:
    """A record with one i2t alternative per answer."""
    turns = [[{"role": "user", "text": "What is this?"}, {"role": "assistant", "text": text}] for text in answers]
    record = {"i2t": [{"images": ["img0"], "turns": t, "kind": "concept"} for t in turns], "tags": list(tags)}
    return key, record, {"img0.png": png(_seed(key), side)}


def prompt(key: str, text: str = "a red fish", side: int = 32) -> Content:
    """A record with one t2i alternative."""
    return key, {"t2i": [{"target": "img0", "text": text}], "tags": []}, {"img0.png": png(_seed(key), side)}


def edit(key: str, side: int = 32) -> Content:
    """A record with an edit in both directions."""
    alternatives = [
        {"images": ["img0"], "target": "img1", "text": "add a fish", "kind": "add"},
        {"images": ["img1"], "target": "img0", "text": "remove the fish", "kind": "remove"},
    ]
    images = {f"img{i}.png": png(_seed(key) + i, side) for i in range(2)}
    return key, {"it2i": alternatives, "tags": []}, images


def every_task(num: int, side: int = 32) -> list[Content]:
    """`num` records of each task, in turn."""
    kinds = (("q", question), ("p", prompt), ("e", edit))
    return [make(f"{letter}{i:03d}", side=side) for i in range(num) for letter, make in kinds]


def write_shards(
    folder: Path, contents: Iterable[Content], per_shard: int | Sequence[int] = 1000, index: bool = True
) -> Path:
    """Write tars of `per_shard` records (or a cycle of sizes), with index and manifest; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    remaining, sizes = list(contents), repeat(per_shard) if isinstance(per_shard, int) else cycle(per_shard)
    for number, size in enumerate(sizes):
        if not remaining:
            break
        of_shard, remaining = remaining[:size], remaining[size:]
        with tarfile.open(folder / f"shard-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, record, images in of_shard:
                for name, data in {"json": json.dumps(record).encode(), **images}.items():
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if index:
        index_folder(folder, ASSETS / "tokenizer")
    return folder


def damage(tar: Path, member: str, how_many: int = 64) -> None:
    """Overwrite the last bytes of a member; the tar keeps its size."""
    with tarfile.open(tar) as archive:
        info = archive.getmember(member)
    with open(tar, "r+b") as file:
        file.seek(info.offset_data + info.size - min(how_many, info.size))
        file.write(b"\xff" * min(how_many, info.size))


def _seed(key: str) -> int:
    return int.from_bytes(key.encode()[-4:], "little")
