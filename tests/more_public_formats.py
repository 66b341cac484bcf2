"""More sets in the true formats of public data sets: X2I2, BAGEL, energon, a folder, stamps, clip art."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.public_formats import HUB_IMAGE, hub_image, jpeg, write_table, write_tar
from tests.shards import png


def write_x2i2(folder: Path) -> list[dict[str, Any]]:
    """Four subsets: edits, prompts, subjects of several images, and `reflect` with its own names."""
    subsets: dict[str, list[dict[str, Any]]] = {
        "inpaint_edit": [
            {"task_type": "edit", "instruction": "加一只猫", "input_images": ["a/0.png"], "output_image": "a/1.png"}
        ],
        "video_icgen": [
            {"task_type": "ic", "instruction": "both", "input_images": ["0.png", "1.png"], "output_image": "2.png"},
            {"task_type": "t2i", "instruction": "a red fish", "output_image": "3.png"},
        ],
        "reflect": [
            {
                "instruction": "short",
                "long_instruction": "a long instruction",
                "used_instruction": "long_instruction",
                "input_images": ["0.png"],
                "image": "1.png",
            }
        ],
        "video_interleave": [
            {
                "task_type": "ic",
                "instruction": "as <img><|image_1|></img>",
                "input_images": ["0.png"],
                "output_image": "1.png",
            }
        ],
    }
    for number, (subset, items) in enumerate(subsets.items()):
        file = folder / "jsons" / subset / f"{subset}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
        for item in items:
            for path in [*item.get("input_images", []), item.get("output_image", item.get("image"))]:
                image = folder / "images" / subset / path
                image.parent.mkdir(parents=True, exist_ok=True)
                image.write_bytes(x2i2_image(number, path))
    return [item for items in subsets.values() for item in items]


def x2i2_image(subset: int, path: str) -> bytes:
    """The image of a path in the subset of this number."""
    return png(100 * subset + int(Path(path).stem))


def write_bagel(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """t2i/*.parquet, editing/*.parquet and vlm/*.jsonl with its images."""
    t2i = [{"image": jpeg(i), "captions": json.dumps({"short": f"c{i}", "long": f"caption {i}"})} for i in range(2)]
    write_table(folder / "t2i/0.parquet", [("image", pa.binary()), ("captions", pa.string())], t2i)
    edits = [
        {"image_list": [png(1), png(2), png(3)], "instruction_list": [["make it red", "red, please"], ["now blue"]]},
        {"image_list": [png(4), png(5)], "instruction_list": [["turn"]]},
    ]
    schema = [("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))]
    write_table(folder / "editing/0.parquet", schema, edits)
    vlm = [
        {
            "image": ["1.png", "2.png"],
            "conversations": [
                {"from": "human", "value": "Is <image> in <image>?"},
                {"from": "gpt", "value": "No."},
            ],
        }
    ]
    (folder / "vlm/images").mkdir(parents=True)
    for i in (1, 2):
        (folder / f"vlm/images/{i}.png").write_bytes(png(i))
    (folder / "vlm/vlm.jsonl").write_text("".join(json.dumps(item) + "\n" for item in vlm))
    return {"t2i": t2i, "editing": edits, "vlm": vlm}


def write_energon(folder: Path, kind: str, field_map: dict[str, str], members: list[tuple[str, bytes]]) -> None:
    """Tars with .nv-meta/dataset.yaml, as `energon prepare` writes it."""
    write_tar(folder / "shard_000.tar", members)
    (folder / ".nv-meta").mkdir()
    lines = ["sample_type:", "  __module__: megatron.energon", f"  __class__: {kind}"]
    lines += ["field_map:", *(f"  {ours}: {theirs}" for ours, theirs in field_map.items())] if field_map else []
    (folder / ".nv-meta/dataset.yaml").write_text("\n".join(lines) + "\n")
    (folder / ".nv-meta/split.yaml").write_text("split_parts:\n  train: [shard_000.tar]\n")
    (folder / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": {"shard_000.tar": 2}}))


def write_gpt_image_edit(folder: Path, name: str = "gpt-edit") -> list[dict[str, Any]]:
    """The layout of GPT-Image-Edit-1.5M, which is refused; under another `name` only its rows and files show it."""
    rows = [
        {
            "id": f"omniedit_swap_{i}",
            "dataset_source": "omniedit",
            "task": "swap",
            "input": f"input/{i}.png",
            "output": f"output/{i}.png",
            "instruction": "swap the cat",
            "instruction_type": "original",
            "input_description": "a cat",
        }
        for i in range(2)
    ]
    swap = folder / name / "omniedit" / "swap"
    for kind in ("input", "output", "metadata"):
        (swap / kind).mkdir(parents=True)
    for i in range(2):
        (swap / f"input/{i}.png").write_bytes(png(i))
        (swap / f"output/{i}.png").write_bytes(png(i + 2))
    (swap / "metadata/omniedit_swap.json").write_text(json.dumps(rows))
    return rows


def write_any_parquet(folder: Path) -> list[dict[str, Any]]:
    """Columns of nobody's format: an edit set with a score."""
    schema = [("before", HUB_IMAGE), ("after", HUB_IMAGE), ("how", pa.string()), ("clip", pa.float64())]
    rows = [
        {"before": hub_image(png(i)), "after": hub_image(png(i + 9)), "how": f"h{i}", "clip": i / 4} for i in range(3)
    ]
    write_table(folder / "part-0.parquet", schema, rows)
    return rows


def write_stamps(folder: Path) -> None:
    """Two stamps of Tux Paint, one of them with a mirrored drawing."""
    animals = folder / "animals" / "birds"
    animals.mkdir(parents=True)
    for number, name in enumerate(("owl", "owl_mirror", "duck")):
        (animals / f"{name}.png").write_bytes(png(number))
    (animals / "owl.txt").write_text(
        "An owl.\nde.utf8=Eine Eule.\nzh_CN.utf8=猫头鹰。\nzz.utf8=Zz.\n", encoding="utf-8"
    )
    (animals / "duck.txt").write_text("A duck.\n", encoding="utf-8")


def write_clip_art(folder: Path) -> None:
    """Drawings in named folders."""
    (folder / "food/fruit").mkdir(parents=True)
    (folder / "food/fruit/red_apple_01.png").write_bytes(png(1))
    (folder / "food/0001.png").write_bytes(png(2))
