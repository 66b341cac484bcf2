"""Reads an image of the emoji world back into its scene, by comparing it with all drawings at all positions.

Analysis by synthesis, without learned weights. An image is brought to WORK_SIDE x WORK_SIDE pixels, and the colour of
its border is its background. A drawing at a position explains energy: by how much the squared difference between image
and background shrinks if the drawing is put there, up to MAX_SHIFT pixels away. Of the layouts that the world has, the
reading is the one whose drawings explain most. What no drawing explains says whether the image can be read at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw

from data_pipelines.emoji.drawing_sheet import CELL, DrawingSheet
from data_pipelines.emoji.edits import LAYOUTS
from data_pipelines.emoji.scenes import (
    BACKGROUNDS,
    BIG_SIZES,
    CORNER_SIZE,
    OFF_CENTRE_SIZE,
    SMALL_SIZE,
    WORDS,
    Layer,
    Scene,
    draw_word,
    paste_corner,
)

WORK_SIDE = 32
RENDER_SIDE = 128
"""Side in pixels of the tiny worlds' images: positions are whole pixels at this size."""
CELL_MARGIN = 16
"""Transparent pixels around a drawing's cell, from which the pixels at the edges of its template take their part."""
MAX_SHIFT = 2
BORDER = 2
LAYER_PRICE = 1.0
"""Energy that a drawing must explain to be worth a layer: squared differences of values in [0, 1], summed."""
MAX_UNEXPLAINED = 0.5
"""An image is readable if less than this share of its energy is unexplained."""
IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class Reading:
    """What an image shows. `unexplained`: share of its energy that the scene does not explain, 0 to 1."""

    scene: Scene
    unexplained: float

    @property
    def is_readable(self) -> bool:
        return self.unexplained < MAX_UNEXPLAINED


@dataclass(frozen=True)
class Slot:
    """Where a drawing of a layout may be, with the templates of all that it may be.

    `position` is "" for words, whose templates are those of WORDS.
    """

    position: str
    size: float
    top: int
    left: int
    height: int
    width: int
    templates: np.ndarray
    """Premultiplied colour and alpha, float32 [templates, 4 * height * width]."""
    products: np.ndarray
    """Sums over pixels of colour², colour x alpha (of each channel) and alpha²: float32 [templates, 5]."""


class SceneReader:
    """Reads images of a world whose drawings are known."""

    def __init__(self, sheet: DrawingSheet) -> None:
        self.drawings = sheet.drawings
        layouts = list(_layouts())
        keys = sorted({key for layout in layouts for key in layout})
        cells = _padded_cells(sheet)
        self.slots = [_word_slot() if key == WORD_KEY else _drawing_slot(cells, *key) for key in keys]
        self.layouts = np.zeros((len(layouts), len(keys)), np.float32)
        for row, layout in enumerate(layouts):
            self.layouts[row, [keys.index(key) for key in layout]] = 1

    def read(self, images: Sequence[np.ndarray]) -> list[Reading]:
        """The scenes of images, uint8 [H, W, 3] of any size."""
        batches = [images[start : start + IMAGES_AT_ONCE] for start in range(0, len(images), IMAGES_AT_ONCE)]
        return [reading for batch in batches for reading in self._read(batch)]

    def _read(self, images: Sequence[np.ndarray]) -> list[Reading]:
        pixels = np.stack([_shrink(image) for image in images])
        names, colours = find_background(pixels)
        residual = pixels - colours[:, None, None]
        energy = np.square(residual).sum((1, 2, 3))
        weighted = np.concatenate([residual, -(residual * colours[:, None, None]).sum(-1, keepdims=True)], -1)
        margin = ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0))
        weighted = np.pad(weighted, margin)
        gains = [explained_energy(slot, weighted, colours) for slot in self.slots]
        best = np.stack([gain.max(1) for gain in gains], 1)
        which = np.stack([gain.argmax(1) for gain in gains], 1)
        choice = ((best - LAYER_PRICE) @ self.layouts.T).argmax(1)
        readings = []
        for image, (background, layout) in enumerate(zip(names, self.layouts[choice], strict=True)):
            slots = np.flatnonzero(layout)
            rest = float(energy[image] - best[image, slots].sum())
            scene = self._scene(background, slots, which[image])
            readings.append(Reading(scene, max(rest, 0.0) / max(float(energy[image]), 1e-6)))
        return readings

    def _scene(self, background: str, slots: np.ndarray, which: np.ndarray) -> Scene:
        chosen = [(self.slots[slot], int(which[slot])) for slot in slots]
        layers = tuple(Layer(self.drawings[row], slot.position, slot.size) for slot, row in chosen if slot.position)
        return Scene(background, layers, next((WORDS[row] for slot, row in chosen if not slot.position), None))


def find_background(pixels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names [N] and colours [N, 3] of the backgrounds of `pixels` [N, side, side, 3] in [0, 1].

    Each pixel of the border votes for the nearest colour of the world; the colour is the median of those that voted for
    the most frequent one, so that a slightly other shade explains the image as well.
    """
    border = np.ones(pixels.shape[1:3], bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    palette = np.array(list(BACKGROUNDS.values()), np.float32) / 255
    edge = pixels[:, border]
    votes = np.square(edge[:, :, None] - palette).sum(-1).argmin(-1)
    winners = [int(np.bincount(row, minlength=len(palette)).argmax()) for row in votes]
    colours = np.stack([np.median(e[row == n], 0) for e, row, n in zip(edge, votes, winners, strict=True)])
    return [list(BACKGROUNDS)[n] for n in winners], colours.astype(np.float32)


def explained_energy(slot: Slot, weighted: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Energy that each template explains at its best shift: [N, templates].

    With d the difference that a template makes to the background and r that of the image, it is 2 r·d - d·d. As
    d = colour - alpha * background, r·d is one product of the templates with `weighted`: r and -r·background, padded by
    MAX_SHIFT, [N, side, side, 4]. `colours`: the backgrounds [N, 3].
    """
    bottom, right = slot.top + slot.height + 2 * MAX_SHIFT, slot.left + slot.width + 2 * MAX_SHIFT
    windows = sliding_window_view(weighted[:, slot.top : bottom, slot.left : right], (slot.height, slot.width), (1, 2))
    num, shifts = len(weighted), windows.shape[1] * windows.shape[2]
    dots = windows.reshape(num * shifts, -1) @ slot.templates.T
    squared, crossed, alpha = slot.products[:, 0], slot.products[:, 1:4], slot.products[:, 4]
    norms = squared - 2 * colours @ crossed.T + np.square(colours).sum(1, keepdims=True) * alpha
    return 2 * dots.reshape(num, shifts, -1).max(1) - norms


SlotKey = tuple[str, float]
WORD_KEY: SlotKey = ("", 0.0)


def _layouts() -> Iterator[tuple[SlotKey, ...]]:
    """All layouts of the world's scenes, and the empty one: positions and sizes of drawings, and the word."""
    yield ()
    yield from ((("centre", size),) for size in (*BIG_SIZES, SMALL_SIZE))
    yield from (((position, OFF_CENTRE_SIZE),) for position in ("left", "right", "top", "bottom"))
    corners = {part for layout in LAYOUTS for n in range(1, len(layout) + 1) for part in combinations(layout, n)}
    yield from (tuple((position, CORNER_SIZE) for position in part) for part in sorted(corners))
    yield (("top", OFF_CENTRE_SIZE), WORD_KEY)


def _padded_cells(sheet: DrawingSheet) -> list[Image.Image]:
    """The drawings with premultiplied colours and a transparent margin."""
    cells = np.zeros((len(sheet.pixels), CELL + 2 * CELL_MARGIN, CELL + 2 * CELL_MARGIN, 4), np.uint8)
    cells[:, CELL_MARGIN:-CELL_MARGIN, CELL_MARGIN:-CELL_MARGIN] = sheet.pixels
    return [Image.fromarray(cell).convert("RGBa") for cell in cells]


def _drawing_slot(cells: Sequence[Image.Image], position: str, size: float) -> Slot:
    pixels = round(size * RENDER_SIDE)
    left, top = paste_corner(position, pixels, RENDER_SIDE)
    scale = RENDER_SIDE // WORK_SIDE
    rows, columns = (range(start // scale, -(-(start + pixels) // scale)) for start in (top, left))

    def in_cell(end: int, start: int) -> float:
        return CELL_MARGIN + (scale * end - start) * CELL / pixels

    upper = in_cell(columns.start, left), in_cell(rows.start, top)
    box = (*upper, in_cell(columns.stop, left), in_cell(rows.stop, top))
    shape = (len(columns), len(rows))
    images = np.stack([np.asarray(cell.resize(shape, Image.Resampling.BOX, box=box)) for cell in cells])
    return _slot(position, size, rows.start, columns.start, images.astype(np.float32) / 255)


def _word_slot() -> Slot:
    images = np.zeros((len(WORDS), WORK_SIDE, WORK_SIDE, 4), np.float32)
    for word, image in zip(WORDS, images, strict=True):
        mask = Image.new("L", (RENDER_SIDE, RENDER_SIDE))
        draw_word(ImageDraw.Draw(mask), word, RENDER_SIDE, 255)
        image[..., 3] = _shrink(np.asarray(mask))
    rows, columns = (np.flatnonzero(images[..., 3].any((0, axis))) for axis in (2, 1))
    return _slot(
        *WORD_KEY, int(rows[0]), int(columns[0]), images[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    )


def _slot(position: str, size: float, top: int, left: int, images: np.ndarray) -> Slot:
    """A slot of premultiplied images [templates, height, width, 4] whose corner is at (top, left)."""
    colour, alpha = images[..., :3], images[..., 3:]
    sums = [np.square(colour).sum((1, 2, 3)), *(colour * alpha).sum((1, 2)).T, np.square(alpha).sum((1, 2, 3))]
    templates = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return Slot(position, size, top, left, images.shape[1], images.shape[2], templates, np.stack(sums, 1))


def _shrink(image: np.ndarray) -> np.ndarray:
    """An image as float32 [WORK_SIDE, WORK_SIDE, ...] in [0, 1]."""
    small = Image.fromarray(image).resize((WORK_SIDE, WORK_SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255
