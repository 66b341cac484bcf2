"""Fresh scenes of the tiny world, rendered without npm, and ways to damage their images."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from data_pipelines.emoji.build import single_scene
from data_pipelines.emoji.drawing_sheet import DrawingSheet
from data_pipelines.emoji.edits import DrawingPool, layered_scene
from data_pipelines.emoji.scenes import BACKGROUNDS, OFF_CENTRE_SIZE, WORDS, Layer, Scene, draw_word, paste_corner
from data_pipelines.emoji.seeded_rng import pick
from emma_train.config.schema import AutoencoderConfig
from emma_train.model.autoencoder import Autoencoder

SIDE = 128
EMOJI = Path(__file__).parents[1] / "recipes" / "tiny" / "assets" / "emoji"
Damage = Callable[[np.ndarray], np.ndarray]


def fresh_scenes(sheet: DrawingSheet, rng: np.random.Generator, count: int) -> list[Scene]:
    """`count` scenes, as many of one drawing as of two, of three, and of a drawing with a word."""
    pool = DrawingPool(sheet.drawings)
    scenes: list[Scene] = []
    while len(scenes) < count:
        lead, kind = pick(rng, sheet.drawings), len(scenes) % 4
        if kind == 0:
            scenes.append(single_scene(rng, lead))
        elif kind == 3:
            layer = Layer(lead, "top", OFF_CENTRE_SIZE)
            scenes.append(Scene(pick(rng, list(BACKGROUNDS)), (layer,), pick(rng, WORDS)))
        elif (scene := layered_scene(rng, lead, pool, kind + 1)) is not None:
            scenes.append(scene)
    return scenes


def altered_scene(scene: Scene, sheet: DrawingSheet, rng: np.random.Generator) -> Scene:
    """The scene with one other fact: background, word, number of drawings; concept, style or position of a drawing."""
    *others, last = scene.layers
    drawing = last.drawing
    choices = [replace(scene, background=pick(rng, [b for b in BACKGROUNDS if b != scene.background]))]
    new = [d for d in sheet.drawings if d.concept != drawing.concept and d.style == drawing.style]
    restyled = [d for d in sheet.drawings if d.concept == drawing.concept and d.style != drawing.style]
    for candidates in filter(None, (new, restyled)):
        choices.append(replace(scene, layers=(*others, replace(last, drawing=pick(rng, candidates)))))
    free = [p for p in ("left", "right", "top", "bottom") if p not in {layer.position for layer in scene.layers}]
    choices.append(replace(scene, layers=(*others, replace(last, position=pick(rng, free)))))
    if others:
        choices.append(replace(scene, layers=tuple(others)))
    if scene.word:
        choices.append(replace(scene, word=pick(rng, [w for w in WORDS if w != scene.word])))
    return pick(rng, choices)


def render(scene: Scene, sheet: DrawingSheet) -> np.ndarray:
    """The scene drawn from the sheet: uint8 [SIDE, SIDE, 3]."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])
    for layer in scene.layers:
        pixels = round(layer.size * SIDE)
        cell = Image.fromarray(sheet.pixels[sheet.drawings.index(layer.drawing)])
        cell = cell.resize((pixels, pixels), Image.Resampling.LANCZOS)
        image.paste(cell, paste_corner(layer.position, pixels, SIDE), cell)
    if scene.word:
        draw_word(ImageDraw.Draw(image), scene.word, SIDE, (0, 0, 0))
    return np.array(image)


def noise(deviation: float, rng: np.random.Generator) -> Damage:
    """Gaussian noise on the values 0 to 255."""
    return lambda image: (image + rng.normal(0, deviation, image.shape)).clip(0, 255).astype(np.uint8)


def blur(radius: float) -> Damage:
    """A Gaussian of `radius` pixels."""
    return lambda image: np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def shift(pixels: int, rng: np.random.Generator) -> Damage:
    """Moved to one side; the edge is repeated."""

    def move(image: np.ndarray) -> np.ndarray:
        axis, step = int(rng.integers(2)), pick(rng, (-pixels, pixels))
        width = [(0, 0)] * 3
        width[axis] = (max(step, 0), max(-step, 0))
        padded = np.pad(image, width, mode="edge")
        return padded.take(range(max(-step, 0), max(-step, 0) + SIDE), axis)

    return move


def round_trip(latent_noise: float, seed: int) -> Damage:
    """Encoded and decoded by the tiny DC-AE, with noise of so many standard deviations on the latents."""
    generator = torch.Generator().manual_seed(seed)

    def encode_and_decode(image: np.ndarray) -> np.ndarray:
        autoencoder = tiny_autoencoder()
        [latent] = autoencoder.encode([torch.from_numpy(image)])
        change = torch.randn(latent.shape, generator=generator) / autoencoder.scale
        return autoencoder.decode(latent + latent_noise * change, SIDE // 32, SIDE // 32).numpy()

    return encode_and_decode


@cache
def tiny_autoencoder() -> Autoencoder:
    return Autoencoder(AutoencoderConfig(path=str(EMOJI.parent / "autoencoder")), torch.device("cpu"))


def damages(seed: int) -> dict[str, Damage]:
    """All ways to damage an image, by name."""
    rng = np.random.default_rng(seed)
    return {
        "clean": lambda image: image,
        "noise 40": noise(40, rng),
        "noise 80": noise(80, rng),
        "blur 1.5 px": blur(1.5),
        "blur 3 px": blur(3),
        "shift 4 px": shift(4, rng),
        "shift 8 px": shift(8, rng),
        "DC-AE": round_trip(0, seed),
        "DC-AE, noise 0.5": round_trip(0.5, seed),
    }
