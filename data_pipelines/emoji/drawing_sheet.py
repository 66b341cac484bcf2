"""All drawings of a world in one image, beside its splits: what reading a scene back from an image needs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.emoji.drawings import Drawing, rasterise
from emma_train.errors import UserError

SHEET_IMAGE, SHEET_NAMES = "drawings.webp", "drawings.json"
CELL = 64
"""Pixels of a drawing's side in the sheet."""


@dataclass(frozen=True)
class DrawingSheet:
    """Drawings and their pixels, uint8 [drawings, CELL, CELL, 4] (RGBA)."""

    drawings: tuple[Drawing, ...]
    pixels: np.ndarray


def make_sheet(drawings: Sequence[Drawing]) -> DrawingSheet:
    """Rasterise drawings. Raises UserError on a broken SVG."""
    return DrawingSheet(tuple(drawings), np.stack([np.asarray(rasterise(d.path, CELL)) for d in drawings]))


def write_sheet(folder: Path, sheet: DrawingSheet) -> None:
    """Write drawings.webp (lossless; rows of drawings) and drawings.json into a folder."""
    columns = math.ceil(math.sqrt(len(sheet.drawings)))
    rows = math.ceil(len(sheet.drawings) / columns)
    cells = np.zeros((rows * columns, CELL, CELL, 4), np.uint8)
    cells[: len(sheet.drawings)] = sheet.pixels
    grid = cells.reshape(rows, columns, CELL, CELL, 4).transpose(0, 2, 1, 3, 4).reshape(rows * CELL, columns * CELL, 4)
    Image.fromarray(grid).save(folder / SHEET_IMAGE, lossless=True, method=6)
    entries = [{"id": d.id, "concept": d.concept, "tone": d.tone, "group": d.group} for d in sheet.drawings]
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    (folder / SHEET_NAMES).write_text(f"[\n {lines}\n]\n", encoding="utf-8")


def read_sheet(folder: Path) -> DrawingSheet:
    """The sheet of a data set's folder. Raises UserError if it is missing or damaged."""
    path = folder / SHEET_NAMES
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        drawings = tuple(_drawing(entry) for entry in entries)
        path = folder / SHEET_IMAGE
        grid = np.asarray(Image.open(path).convert("RGBA"))
        rows, columns = grid.shape[0] // CELL, grid.shape[1] // CELL
        cells = grid.reshape(rows, CELL, columns, CELL, 4).swapaxes(1, 2).reshape(rows * columns, CELL, CELL, 4)
        if len(drawings) > len(cells):
            raise ValueError(f"{len(cells)} cells for {len(drawings)} drawings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no readable sheet of drawings ({type(error).__name__}: {error}); "
            "emma-data import fluent-emoji writes one beside the splits of a tiny world"
        ) from None
    return DrawingSheet(drawings, cells[: len(drawings)])


def _drawing(entry: dict[str, str | None]) -> Drawing:
    """An entry as a drawing; its path is only a name."""
    style, _, name = str(entry["id"]).partition("/")
    return Drawing(str(entry["concept"]), style, entry["tone"], entry["group"], Path(f"{name}.svg"))
