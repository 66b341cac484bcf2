"""Images put together from drawings, so that every caption and answer about them is exact."""

from dataclasses import dataclass
from functools import lru_cache

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.emoji.drawings import Drawing, rasterise

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (186, 186, 190),
    "yellow": (255, 230, 120),
    "orange": (255, 186, 110),
    "green": (150, 212, 140),
    "blue": (135, 188, 245),
    "purple": (188, 160, 236),
    "pink": (250, 186, 214),
}
"""Soft colours: black lines and bright drawings both stand out."""

PLACES: dict[str, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
"""Name -> middle of the drawing, as shares of width and height from the top left corner."""

BIG = (0.78, 0.86)
SMALL = 0.5
PLACED = 0.55
CORNER = 0.46
WORDS = ("HI", "OK", "YES", "NO", "GO", "WOW")


@dataclass(frozen=True)
class Layer:
    """A drawing somewhere in the image; `size` is its side as a share of the image's."""

    drawing: Drawing
    place: str = "centre"
    size: float = BIG[1]

    @property
    def is_small(self) -> bool:
        """In the centre a drawing is big unless the caption says small; elsewhere there is one size."""
        return self.place == "centre" and self.size < BIG[0]


@dataclass(frozen=True)
class Scene:
    """A background, the drawings on it, and perhaps a word at the bottom."""

    background: str
    layers: tuple[Layer, ...]
    word: str | None = None

    @property
    def is_single(self) -> bool:
        return len(self.layers) == 1 and self.word is None

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        return tuple(layer.drawing for layer in self.layers)


def render(scene: Scene, side: int) -> Image.Image:
    """The scene as an RGB image of side x side pixels; the same scene gives the same pixels."""
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for layer in scene.layers:
        pixels = round(layer.size * side)
        drawing = rasterise(layer.drawing.path, pixels)
        x, y = (round(share * side - pixels / 2) for share in PLACES[layer.place])
        corner = (min(max(x, 0), side - pixels), min(max(y, 0), side - pixels))
        image.paste(drawing, corner, drawing)
    if scene.word:
        pen = ImageDraw.Draw(image)
        pen.text((side / 2, side * 0.87), scene.word, fill=(0, 0, 0), font=font(round(side * 0.24)), anchor="mm")
    return image


@lru_cache(maxsize=16)
def font(pixels: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold, which comes with matplotlib."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", pixels)


def words(name: str) -> str:
    """A style or tone as a caption says it: `high-contrast` -> `high contrast`."""
    return name.replace("-", " ")


def article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def noun(drawing: Drawing) -> str:
    """`waving hand with dark skin`; the yellow default tone goes without saying."""
    if drawing.tone in (None, "default"):
        return drawing.concept
    return f"{drawing.concept} with {words(drawing.tone or '')} skin"


def where(place: str) -> str:
    """`left` -> `on the left`, `bottom right` -> `at the bottom right`."""
    if place == "centre":
        return "in the centre"
    return f"{'on' if place in ('left', 'right') else 'at'} the {place}"


def captions(scene: Scene) -> list[str]:
    """All phrasings of what the scene shows, each complete: a painter could paint the scene from any one of them."""
    return single_captions(scene) if scene.is_single else [layered_caption(scene)]


def single_captions(scene: Scene) -> list[str]:
    (layer,) = scene.layers
    drawing = layer.drawing
    style = words(drawing.style)
    ground = f"{scene.background} background"
    whole = article(f"{'small ' if layer.is_small else ''}{style} {noun(drawing)}")
    centred = layer.place == "centre"
    skin = "" if drawing.tone in (None, "default") else f", {words(drawing.tone or '')} skin"
    spot = ", small" if layer.is_small else "" if centred else f", {layer.place}"
    return [
        f"{whole} on {article(ground)}" + ("" if centred else f", {where(layer.place)}"),
        f"{drawing.concept}{skin}, {style} style, {ground}{spot}",
        f"{article(ground)} with {whole}" + ("" if centred else f" {where(layer.place)}"),
    ]


def layered_caption(scene: Scene) -> str:
    shown = " and ".join(
        f"{article(f'{words(layer.drawing.style)} {noun(layer.drawing)}')} {where(layer.place)}"
        for layer in scene.layers
    )
    word = f", with the word {scene.word}" if scene.word else ""
    return f"{shown}, on {article(scene.background)} background{word}"
