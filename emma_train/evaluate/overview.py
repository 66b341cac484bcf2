"""What a folder of a benchmark's images gets when they are written: a contact sheet and the scorer's index."""

import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem
from emma_train.evaluate.image_folder import ImageFolder, png
from emma_train.generate.items import EvaluationItem
from emma_train.generate.results import SHEET_IMAGES, SHEET_SIDE, contact_sheet
from emma_train.storage.files import write_atomic


def write_overview(
    benchmark: Benchmark, folder: ImageFolder, items: Sequence[BenchmarkItem], prompts: Sequence[str]
) -> None:
    """Write sheet.png, with images from all parts of the benchmark above their prompts, and the index file."""
    step = max(1, len(items) // SHEET_IMAGES)
    shown = [_sheet_item(benchmark, folder, item, prompts[item.number]) for item in items[::step][:SHEET_IMAGES]]
    write_atomic(folder.out / "sheet.png", png(contact_sheet(shown)))
    if benchmark.index_file:
        index = folder.index(benchmark, items)
        write_atomic(folder.out / benchmark.index_file, json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def _sheet_item(benchmark: Benchmark, folder: ImageFolder, item: BenchmarkItem, prompt: str) -> EvaluationItem:
    entry = EvaluationItem(benchmark.name, "", "", item.name, prompt, 0, {})
    with Image.open(folder.images / next(iter(benchmark.image_files(item)))) as image:
        image.thumbnail((4 * SHEET_SIDE, 4 * SHEET_SIDE))
        entry.image = np.asarray(image.convert("RGB"))
    return entry
