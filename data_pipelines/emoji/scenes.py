"""Composes images from drawings, so that every caption and answer about them is exact."""

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
"""Soft colours, on which both black lines and bright drawings are clearly visible."""

POSITIONS: dict[str, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
"""Name -> centre of the drawing (x, y), as fractions of width and height from the top left corner."""

BIG_SIZES = (0.78, 0.86)
"""Sides of drawings as fractions of the image's side; so are the next three."""
SMALL_SIZE = 0.5
OFF_CENTRE_SIZE = 0.55
CORNER_SIZE = 0.46
WORDS = ("HI", "OK", "YES", "NO", "GO", "WOW")


@dataclass(frozen=True)
class Layer:
    """A drawing at a position of the image; `size` is its side as a fraction of the image's side."""

    drawing: Drawing
    position: str = "centre"
    size: float = BIG_SIZES[1]

    @property
    def is_small(self) -> bool:
        """Only drawings in the centre come in two sizes: big and small."""
        return self.position == "centre" and self.size < BIG_SIZES[0]


@dataclass(frozen=True)
class Scene:
    """A background, the drawings on it, and optionally a word at the bottom."""

    background: str
    layers: tuple[Layer, ...]
    word: str | None = None

    @property
    def is_single(self) -> bool:
        return len(self.layers) == 1 and self.word is None

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        return tuple(layer.drawing for layer in self.layers)


def render_scene(scene: Scene, side: int) -> Image.Image:
    """The scene as an RGB image of side x side pixels; the same scene gives the same pixels."""
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for layer in scene.layers:
        pixels = round(layer.size * side)
        drawing = rasterise(layer.drawing.path, pixels)
        image.paste(drawing, paste_corner(layer.position, pixels, side), drawing)
    if scene.word:
        draw_word(ImageDraw.Draw(image), scene.word, side, (0, 0, 0))
    return image


def paste_corner(position: str, pixels: int, side: int) -> tuple[int, int]:
    """Left and top pixel of a drawing of `pixels` x `pixels` at a position of an image of side x side pixels."""
    x, y = (round(share * side - pixels / 2) for share in POSITIONS[position])
    return min(max(x, 0), side - pixels), min(max(y, 0), side - pixels)


def draw_word(pen: ImageDraw.ImageDraw, word: str, side: int, fill: int | tuple[int, int, int]) -> None:
    """Write the word of a scene at the bottom of an image of side x side pixels."""
    pen.text((side / 2, side * 0.87), word, fill=fill, font=load_font(round(side * 0.24)), anchor="mm")


@lru_cache(maxsize=16)
def load_font(pixels: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold, which comes with matplotlib."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", pixels)


def without_hyphens(name: str) -> str:
    """A style or tone as a caption writes it: `high-contrast` -> `high contrast`."""
    return name.replace("-", " ")


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def drawing_name(drawing: Drawing) -> str:
    """`waving hand with dark skin`; the yellow default tone is not mentioned."""
    if drawing.tone in (None, "default"):
        return drawing.concept
    return f"{drawing.concept} with {without_hyphens(drawing.tone or '')} skin"


def position_phrase(position: str) -> str:
    """`left` -> `on the left`, `bottom right` -> `at the bottom right`."""
    if position == "centre":
        return "in the centre"
    return f"{'on' if position in ('left', 'right') else 'at'} the {position}"


def captions(scene: Scene) -> list[str]:
    """All captions of a scene; each describes it completely."""
    return single_captions(scene) if scene.is_single else [layered_caption(scene)]


def single_captions(scene: Scene) -> list[str]:
    (layer,) = scene.layers
    drawing = layer.drawing
    style = without_hyphens(drawing.style)
    ground = f"{scene.background} background"
    subject = with_article(f"{'small ' if layer.is_small else ''}{style} {drawing_name(drawing)}")
    centred = layer.position == "centre"
    skin = "" if drawing.tone in (None, "default") else f", {without_hyphens(drawing.tone or '')} skin"
    spot = ", small" if layer.is_small else "" if centred else f", {layer.position}"
    return [
        f"{subject} on {with_article(ground)}" + ("" if centred else f", {position_phrase(layer.position)}"),
        f"{drawing.concept}{skin}, {style} style, {ground}{spot}",
        f"{with_article(ground)} with {subject}" + ("" if centred else f" {position_phrase(layer.position)}"),
    ]


def layered_caption(scene: Scene) -> str:
    parts = []
    for layer in scene.layers:
        name = f"{without_hyphens(layer.drawing.style)} {drawing_name(layer.drawing)}"
        parts.append(f"{with_article(name)} {position_phrase(layer.position)}")
    word = f", with the word {scene.word}" if scene.word else ""
    return f"{' and '.join(parts)}, on {with_article(scene.background)} background{word}"
