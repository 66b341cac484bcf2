"""Writes small sets in the true formats of public data sets, as the hub or a tool delivers them; nothing is copied."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.shards import png

HUB_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SIZE = 40


def jpeg(seed: int, side: int = SIZE) -> bytes:
    """A JPEG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def hub_image(data: bytes | None, path: str = "image.png") -> dict[str, Any] | None:
    return None if data is None else {"bytes": data, "path": path}


def write_llava_pretrain(folder: Path, num: int = 4) -> list[dict[str, Any]]:
    """blip_laion_cc_sbu_558k.json, its meta file, and images.zip."""
    folder.mkdir(parents=True)
    items: list[dict[str, Any]] = []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(num):
            path = f"{i % 2:05d}/{i:09d}.jpg"
            archive.writestr(path, jpeg(i))
            question = "Describe it.\n<image>" if i % 2 else "<image>\nWhat is this?"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"caption {i} with é and 猫"}]
            items.append({"id": f"{i:09d}", "image": path, "conversations": turns})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(items, indent=2))
    meta = [
        {"id": item["id"], "image": item["image"], "caption": "c", "blip_caption": "b", "url": "https://e.org/x.jpg"}
        for item in items
    ]
    (folder / "blip_laion_cc_sbu_558k_meta.json").write_text(json.dumps(meta))
    return items


def write_table(path: Path, schema: Sequence[tuple[str, pa.DataType]], rows: Sequence[Mapping[str, Any]]) -> None:
    """A parquet file with two rows in a row group, so that several groups are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(schema)), path, row_group_size=2)


def write_onevision(folder: Path, config: str = "ai2d(gpt4v)", num: int = 3) -> list[dict[str, Any]]:
    """Parquet of one config of LLaVA-OneVision-Data; the last row is text only."""
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = [
        ("id", pa.string()),
        ("image", HUB_IMAGE),
        ("conversations", pa.list_(turn)),
        ("data_source", pa.string()),
    ]
    rows = []
    for i in range(num):
        is_text = i == num - 1
        question = f"Question {i}?" if is_text else f"<image>\nQuestion {i}?"
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"Answer {i}."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "Because."},
        ]
        image = None if is_text else hub_image(png(i))
        rows.append({"id": f"row-{i}", "image": image, "conversations": turns, "data_source": config})
    write_table(folder / config / "train-00000-of-00001.parquet", schema, rows)
    return rows


QUALITIES = ("relevance", "image_correspondence", "visual_dependency", "formatting")


def write_finevision(folder: Path, config: str, reverse: bool = False, num: int = 3) -> list[dict[str, Any]]:
    """Parquet of one config of FineVision. `reverse` turns round the order of columns and of the fields of a text."""
    fields = [("user", pa.string()), ("assistant", pa.string())]
    text = pa.struct(fields[::-1] if reverse else fields)
    schema: list[tuple[str, pa.DataType]] = [("images", pa.list_(HUB_IMAGE)), ("texts", pa.list_(text))]
    schema.append(("source", pa.string()))
    for quality in QUALITIES:
        schema += [(f"{quality}_ratings", pa.list_(pa.int64())), (f"{quality}_min", pa.int64())]
    rows = []
    for i in range(num):
        row: dict[str, Any] = {
            "images": [hub_image(png(10 * i + k)) for k in range(i)],
            "texts": [{"user": f"Question {i}.{t}?", "assistant": f"Answer {i}.{t}."} for t in range(2)],
            "source": config,
        }
        for number, quality in enumerate(QUALITIES):
            ratings = [1 + (i + number) % 5, None] if i != 1 else [None, None]
            row[f"{quality}_ratings"] = ratings
            row[f"{quality}_min"] = None if i == 1 else ratings[0]
        rows.append(row)
    write_table(folder / config / "train-00000-of-00001.parquet", schema[::-1] if reverse else schema, rows)
    return rows


def write_omniedit(folder: Path, num: int = 3) -> list[dict[str, Any]]:
    """data/train-*.parquet of OmniEdit-Filtered-1.2M."""
    numbers = ("width", "height", "sc_score_1", "sc_score_2")
    schema: list[tuple[str, pa.DataType]] = [("omni_edit_id", pa.string()), ("task", pa.string())]
    schema += [("src_img", HUB_IMAGE), ("edited_img", HUB_IMAGE), ("edited_prompt_list", pa.list_(pa.string()))]
    schema += [(name, pa.int64()) for name in numbers]
    schema += [("sc_reasoning", pa.string()), ("pq_score", pa.int64()), ("pq_reasoning", pa.string())]
    schema += [("o_score", pa.float64())]
    rows = [
        {
            "omni_edit_id": f"task_obj_swap_{i}",
            "task": "swap",
            "src_img": hub_image(jpeg(2 * i)),
            "edited_img": hub_image(jpeg(2 * i + 1)),
            "edited_prompt_list": [f"swap {i}", f"please swap {i}"],
            **dict.fromkeys(numbers, SIZE),
            "sc_reasoning": "good",
            "pq_score": 9,
            "pq_reasoning": "sharp",
            "o_score": 8.5 + i,
        }
        for i in range(num)
    ]
    write_table(folder / "data" / "train-00000-of-00001.parquet", schema, rows)
    return rows


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """A plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_img2dataset(folder: Path, num: int = 5, score: str = "AESTHETIC_SCORE") -> list[dict[str, Any]]:
    """00000.tar, 00000.parquet and 00000_stats.json of img2dataset; the second row failed to download."""
    rows, members = [], []
    for i in range(num):
        key, is_failed = f"{i:09d}", i == 1
        row: dict[str, Any] = {
            "url": f"https://example.org/{i}.jpg",
            "caption": f"a caption {i}",
            "WIDTH": 640.0 + i,
            "HEIGHT": 480.0,
            "similarity": 0.3 + i / 100,
            "punsafe": 0.001 * i,
            "pwatermark": float("nan") if i == 2 else 0.25,
            "hash": 2**60 + i,
            score: 5.0 + i / 10,
            "key": key,
            "status": "failed_to_download" if is_failed else "success",
            "error_message": "HTTP Error 404: Not Found" if is_failed else None,
            "width": None if is_failed else SIZE,
            "height": None if is_failed else SIZE,
            "original_width": None if is_failed else 640,
            "original_height": None if is_failed else 480,
            "exif": None if is_failed else "{}",
            "sha256": None if is_failed else f"{i:064x}",
        }
        rows.append(row)
        if not is_failed:
            text = json.dumps(row, indent=4)
            members += [
                (f"{key}.jpg", jpeg(i)),
                (f"{key}.txt", row["caption"].encode()),
                (f"{key}.json", text.encode()),
            ]
    write_tar(folder / "00000.tar", members)
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": num, "successes": num - 1}))
    return rows
