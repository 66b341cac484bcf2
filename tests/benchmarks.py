"""Small benchmarks in the form of the official files, made on the spot.

geneval_data(folder, num)    evaluation_metadata.jsonl; counting items have `exclude`
dpg_data(folder, num)        prompts/*.txt
wise_data(folder, num)       three JSON files, with ids from 1 to 3 num
geneval2_data(folder, num)   geneval2_data.jsonl
imgedit_data(folder, num)    basic_edit.json and original_images/
gedit_data(folder, num)      data/train.parquet: so many instructions in each language, sources 60 x 40 and 90 x 60
files_of(folder)             {path: content} of everything in a folder
"""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

GEDIT_TASKS = ("background_change", "subject-add", "tone_transfer")


def geneval_data(folder: Path, num: int = 6) -> Path:
    lines = []
    for number in range(num):
        line = {"tag": "counting", "include": [{"class": "cow", "count": number + 1}], "prompt": f"{number + 1} cows"}
        if number % 2:
            line["exclude"] = [{"class": "cow", "count": number + 2}]
        lines.append(json.dumps(line))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def dpg_data(folder: Path, num: int = 6) -> Path:
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    for number in range(num):
        (folder / "prompts" / f"whoops{number}.txt").write_text(f"a red frog that counts to {number}, on blue\n")
    return folder


def wise_data(folder: Path, num: int = 2, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
    for part, name in enumerate(names):
        entries = [
            {
                "Prompt": f"{name} {n}",
                "Explanation": "why",
                "Category": name,
                "Subcategory": "x",
                "prompt_id": part * num + n,
            }
            for n in range(1, num + 1)
        ]
        (folder / f"{name}{suffix}.json").write_text(json.dumps(entries))
    return folder


def geneval2_data(folder: Path, num: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    skills = ["object", "attribute", "count", "position", "verb"]
    lines = [
        {"prompt": f"{n} frogs", "atom_count": 3 + n % 8, "vqa_list": [["Any?", "Yes"]] * 5, "skills": skills}
        for n in range(num)
    ]
    (folder / "geneval2_data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def encoded(height: int, width: int, seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def imgedit_data(folder: Path, num: int = 6) -> Path:
    entries = {}
    for number in range(num):
        path = folder / "original_images" / "animal" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(40 + 30 * (number % 2), 60, number, "JPEG"))
        kind = ("adjust", "style", "action")[number % 3]
        entries[str(1000 - number)] = {"id": f"animal/{number:03d}.jpg", "prompt": f"edit {number}", "edit_type": kind}
    (folder / "basic_edit.json").write_text(json.dumps(entries))
    return folder


def gedit_data(folder: Path, num: int = 3) -> Path:
    rows = [
        {
            "key": f"{language}key{number}",
            "task_type": GEDIT_TASKS[number % len(GEDIT_TASKS)],
            "instruction": f"{'把背景换成' if language == 'cn' else 'change it to'} {number}",
            "instruction_language": language,
            "input_image": {"bytes": encoded(40, 60, number), "path": None},
            "input_image_raw": {"bytes": encoded(60, 90, number), "path": None},
            "Intersection_exist": number % 2 == 0,
        }
        for number in range(num)
        for language in ("en", "cn")
    ]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "data" / "train.parquet", row_group_size=4)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
