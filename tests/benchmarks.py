"""Small benchmarks in the form of the official files, made on the spot.

geneval_data(folder, num)    evaluation_metadata.jsonl; counting items have `exclude`
dpg_data(folder, num)        prompts/*.txt
files_of(folder)             {path: content} of everything in a folder
"""

import json
from pathlib import Path


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


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
