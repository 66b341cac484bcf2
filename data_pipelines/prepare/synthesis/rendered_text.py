"""`rendered-text`: images that show a given text, for text rendering (paper §3.2), with a prompt that quotes it: by
fonts, or by a diffusers pipeline whose images OCR checks. The source is a file with one text a line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.prepare.operator import Rejected
from data_pipelines.prepare.synthesis.synthetic_record import SyntheticRecord, lossless
from emma_train.errors import UserError
from emma_train.sequence.seeds import choice_of, seed_of, uniform_of

SURFACES = {
    "a poster": {"yellow": (250, 214, 80), "red": (200, 50, 45), "white": (248, 246, 240), "blue": (40, 80, 160)},
    "a sign": {"green": (20, 110, 70), "blue": (30, 90, 170), "white": (250, 250, 250), "black": (25, 25, 28)},
    "a card": {"pink": (250, 200, 214), "cream": (252, 244, 220), "grey": (196, 198, 202)},
}
"""What shows the text, and its colours by name."""
PROMPTS = ('{surface} in {colour} that says "{text}"', 'the words "{text}" on {surface} in {colour}')
CHINESE_PROMPTS = ("{colour}的背景上写着“{text}”",)
CHINESE_COLOURS = {
    "yellow": "黄色", "red": "红色", "white": "白色", "blue": "蓝色", "green": "绿色", "black": "黑色", "pink": "粉色",
    "cream": "米色", "grey": "灰色",
}  # fmt: skip
MAX_CHARACTERS = 200
NO_FONT = (
    "no font has all of its characters; name fonts that have them with --set 'fonts=[PATH]', for Chinese such as "
    "/usr/share/fonts/truetype/wqy of Debian's package fonts-wqy-microhei"
)


def is_covered(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font has a glyph of its own for each character: the others are drawn as its box for missing ones."""
    missing = bytes(font.getmask("\U0010fffe"))
    return all(character.isspace() or bytes(font.getmask(character)) != missing for character in text)


def find_fonts(folders: Sequence[str]) -> list[Path]:
    """Font files, and those in folders, in the order of their names; DejaVu Sans of matplotlib where none are named.
    Raises UserError."""
    if not folders:
        try:
            import matplotlib
        except ModuleNotFoundError:
            raise UserError("name font files with --set fonts=[...], or pip install 'emma-train[data]'") from None
        folders = [f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"]
    fonts: list[Path] = []
    for path in map(Path, folders):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".ttf", ".otf", ".ttc")]
        if not files:
            raise UserError(f"--set fonts: {path} is no font and holds none")
        fonts += sorted(files)
    return fonts


@lru_cache(maxsize=64)
def load_font_at(path: Path, pixels: int) -> ImageFont.FreeTypeFont:
    """Raises UserError."""
    try:
        return ImageFont.truetype(str(path), pixels)
    except OSError as error:
        raise UserError(f"{path}: no font that can be read ({error})") from None


def draw_text(text: str, font_path: Path, colour: tuple[int, int, int], width: int, height: int) -> Image.Image:
    """The text in lines, as large as fits, on a plain background, dark on light or light on dark."""
    image = Image.new("RGB", (width, height), colour)
    ink = (20, 20, 24) if sum(colour) > 380 else (250, 250, 250)
    for pixels in range(height // 3, 11, -2):
        font = load_font_at(font_path, pixels)
        lines = break_lines(text, font, round(width * 0.9))
        left, top, right, bottom = ImageDraw.Draw(image).multiline_textbbox(
            (0, 0), "\n".join(lines), font, align="center"
        )
        if right - left <= width * 0.9 and bottom - top <= height * 0.85:
            corner = ((width - left - right) / 2, (height - top - bottom) / 2)
            ImageDraw.Draw(image).multiline_text(corner, "\n".join(lines), ink, font, align="center")
            return image
    raise ValueError("too long for the image")


def break_lines(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces; a text without spaces between characters."""
    spaced = " " in text
    lines = [""]
    for piece in text.split() if spaced else text:
        longer = f"{lines[-1]} {piece}".strip() if spaced else lines[-1] + piece
        if lines[-1] and font.getlength(longer) > width:
            lines.append(piece)
        else:
            lines[-1] = longer
    return lines


class TextRenderer:
    """Makes a record of each text."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError where fonts or models are missing."""
        self.settings = settings
        self.pipeline = self.reader = None
        if settings["pipeline"]:
            from data_pipelines.prepare.operators.ocr import TextReader
            from data_pipelines.prepare.synthesis.image_pipeline import ImagePipeline

            self.pipeline = ImagePipeline(settings["pipeline"], Path(settings["weights"]), settings["steps"])
            self.reader = TextReader()
        else:
            self.fonts = find_fonts(settings["fonts"])

    def __call__(self, key: str, text: str) -> SyntheticRecord | Rejected:
        """The record of a text, or why there is none."""
        if not text.strip() or len(text) > MAX_CHARACTERS:
            return Rejected(f"no text of 1 to {MAX_CHARACTERS} characters")
        surface, colour, prompt = self._choose(key, text)
        fields = {"tags": [], "synthesis": {"text": text, "pipeline": self.settings["pipeline"] or "fonts"}}
        try:
            image = (
                self._generate(key, text, prompt) if self.pipeline else self._draw(key, text, SURFACES[surface][colour])
            )
        except ValueError as error:
            return Rejected(str(error))
        return SyntheticRecord({"t2i": [{"target": "img0", "text": prompt}], **fields}, {"img0.webp": lossless(image)})

    def _choose(self, key: str, text: str) -> tuple[str, str, str]:
        """(surface, colour, prompt)."""

        def pick(values: Sequence[str], what: str) -> str:
            return values[choice_of(len(values), self.settings["seed"], 0, key, what)]

        surface = pick(list(SURFACES), "surface")
        colour = pick(list(SURFACES[surface]), "colour")
        if any("\u4e00" <= character <= "\u9fff" for character in text):
            prompt = pick(CHINESE_PROMPTS, "prompt")
            return surface, colour, prompt.format(colour=CHINESE_COLOURS[colour], text=text)
        return surface, colour, pick(PROMPTS, "prompt").format(surface=surface, colour=colour, text=text)

    def _draw(self, key: str, text: str, colour: tuple[int, int, int]) -> Image.Image:
        covering = [path for path in self.fonts if is_covered(load_font_at(path, 24), text)]
        if not covering:
            raise ValueError(NO_FONT)
        font = covering[choice_of(len(covering), self.settings["seed"], 0, key, "font")]
        side = self.settings["side"]
        width = side if uniform_of(self.settings["seed"], 0, key, "aspect") < 0.5 else side * 3 // 2
        return draw_text(text, font, colour, width, side)

    def _generate(self, key: str, text: str, prompt: str) -> Image.Image:
        assert self.pipeline is not None and self.reader is not None
        image = self.pipeline.run(prompt, seed_of(self.settings["seed"], 0, key, "image"))
        read = "".join(line.text for line in self.reader.lines(np.asarray(image)))
        if "".join(read.lower().split()) != "".join(text.lower().split()):
            raise ValueError(f"OCR reads {read[:100]!r}")
        return image


RENDERED_TEXT_SETTINGS = {"fonts": [], "side": 1024, "seed": 0, "pipeline": "", "weights": "", "steps": 50}
"""fonts: files or folders; a text is drawn with those that have all of its characters. side: height in pixels; the
width is equal or half as much more. With a pipeline: that makes the image, and OCR must read exactly the text."""


def read_texts(file: Path) -> Iterator[str]:
    """The texts of a file: one a line, or a JSON string or object with `text` a line. Raises UserError."""
    try:
        with open(file, encoding="utf-8") as opened:
            for line in opened:
                text = line.strip()
                if text[:1] in ('"', "{"):
                    value = json.loads(text)
                    text = value["text"] if isinstance(value, dict) else value
                if text:
                    yield str(text)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: no file of texts, one a line ({error})") from None
