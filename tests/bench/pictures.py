"""Draws what models make, edit and answer, side by side, for the first screen of the README.

    python tests/bench/pictures.py docs/images/models.png --fresh runs/emoji-fresh "the demo=runs/demo" "shipped=tiny"
    python tests/bench/pictures.py docs/images/tiny.png --fresh runs/emoji-fresh --short "the model=tiny"

`--short` leaves out the data's own images and the drawings that the models have never seen. `--fresh` is a set of
drawings that the models know, in positions, colours and pairs drawn with another seed than their training set:

    emma-data import fluent-emoji runs/emoji-fresh --world tiny --seed 1 --samples 400 70 0 \\
        --package recipes/tiny/assets/emoji/drawings.tgz

Nothing is chosen by eye: in the order of read_requests, which depends on the records' keys alone, there are the first
prompts of the fresh set and of the held-out drawings, the first edit of each kind in the fresh set, and the first
question of each kind about the held-out drawings.
"""

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.loader.requests import read_requests
from emma_train.commands.model_arguments import shipped_or_given
from emma_train.config.schema import Recipe
from emma_train.generate.generator import Generator
from emma_train.generate.load import load_generator
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.sequence.request import Request

HELDOUT = Path("recipes/tiny/assets/emoji/heldout_drawings")
COLUMNS, SIDE, GAP, LABEL, LINE = 7, 104, 8, 76, 15
LETTERS = 16
DATA = "data"
RIGHT, WRONG, GREY = (0, 128, 93), (213, 94, 0), (110, 110, 110)


@dataclass
class Row:
    """Seven cells: images, or texts with their colours."""

    label: str
    images: Sequence[np.ndarray] = ()
    texts: Sequence[tuple[str, tuple[int, int, int]]] = ()

    @property
    def height(self) -> int:
        lines = [len(textwrap.wrap(text, LETTERS)) for text, _ in self.texts]
        return SIDE if self.images else LINE * max(lines, default=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", metavar="LABEL=MODEL")
    parser.add_argument("--fresh", type=Path, required=True)
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    labels = [model.partition("=")[0] for model in arguments.models]
    loaded = [load_generator(shipped_or_given(model.partition("=")[2])) for model in arguments.models]
    models = [(label, generator, recipe) for label, (generator, recipe, _) in zip(labels, loaded, strict=True)]
    _, _, recipe = models[0]
    seen, unseen = (_requests(folder, "t2i", recipe) for folder in (arguments.fresh / "train", HELDOUT))
    edits = _first_of_each_kind(_requests(arguments.fresh / "train", "it2i", recipe))
    questions = _first_of_each_kind(_requests(HELDOUT, "i2t", recipe))
    blocks = [
        ("Images from text, of drawings that it knows, newly arranged", _image_rows(models, seen[:COLUMNS])),
        ("Images from text, of drawings that it has never seen", _image_rows(models, unseen[:COLUMNS])),
        ("Edits of drawings that it knows", _image_rows(models, edits)),
        ("Questions about drawings and charts that it has never seen", _answer_rows(models, questions)),
    ]
    if arguments.short:
        blocks = [(title, [row for row in rows if row.label != DATA]) for title, rows in blocks]
        del blocks[1]
    draw(blocks).save(arguments.out)


def _requests(folder: Path, task: str, recipe: Recipe) -> list[Request]:
    return read_requests(folder, task, recipe.data, recipe.model.autoencoder.pixels)


def _first_of_each_kind(requests: Iterable[Request]) -> list[Request]:
    firsts: dict[str, Request] = {}
    for request in requests:
        firsts.setdefault(request.kind, request)
    return [firsts[kind] for kind in sorted(firsts)][:COLUMNS]


def _image_rows(models: Sequence[tuple[str, Generator, Recipe]], requests: Sequence[Request]) -> list[Row]:
    rows = [Row("", texts=[(request.text, (0, 0, 0)) for request in requests])]
    if requests[0].images:
        rows.append(Row("before", [request.images[0] for request in requests]))
    for label, generator, recipe in models:
        rows.append(Row(label, list(generator.generate_images(requests, FlowSettings.of(recipe)))))
    return [*rows, Row(DATA, [request.target for request in requests if request.target is not None])]


def _answer_rows(models: Sequence[tuple[str, Generator, Recipe]], requests: Sequence[Request]) -> list[Row]:
    rows = [Row("", texts=[(request.text, (0, 0, 0)) for request in requests])]
    rows.append(Row("image", [request.images[0] for request in requests]))
    for label, generator, _ in models:
        answers = [answer.strip() for answer in generator.generate_text(requests, TextSettings(max_tokens=12))]
        colours = [RIGHT if a == r.truth else WRONG for a, r in zip(answers, requests, strict=True)]
        rows.append(Row(label, texts=list(zip(answers, colours, strict=True))))
    return [*rows, Row(DATA, texts=[(request.truth or "", GREY) for request in requests])]


def draw(blocks: Sequence[tuple[str, Sequence[Row]]]) -> Image.Image:
    """The blocks one below the other, each a title and its rows."""
    height = sum(2 * LINE + GAP + sum(row.height + GAP for row in rows) for _, rows in blocks)
    sheet = Image.new("RGB", (LABEL + COLUMNS * (SIDE + GAP), height), "white")
    pen, font, title_font = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    y = 0
    for title, rows in blocks:
        pen.text((GAP, y + GAP), title, fill="black", font=title_font)
        y += 2 * LINE + GAP
        for row in rows:
            pen.text((GAP, y), row.label, fill=GREY, font=font)
            for column, image in enumerate(row.images):
                scaled = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                sheet.paste(scaled, (LABEL + column * (SIDE + GAP), y))
            for column, (text, colour) in enumerate(row.texts):
                wrapped = "\n".join(textwrap.wrap(text, LETTERS))
                pen.multiline_text((LABEL + column * (SIDE + GAP), y), wrapped, fill=colour, font=font, spacing=2)
            y += row.height + GAP
    return sheet


if __name__ == "__main__":
    main()
