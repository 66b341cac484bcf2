"""Trains the demo's tiny DC-AE: a `diffusers.AutoencoderDC` of at most 4 M parameters, 32x, 32 latent channels.

    python -m data_pipelines.emoji.train_autoencoder --drawings node_modules/fluentui-emoji/icons --out autoencoder

The training images are composed on the fly: one or a few drawings on a flat background, sometimes with a word, and
formulas and charts. Some concepts are held out, in all styles and skin tones. The PSNR is measured on these, with the
weights as stored (bf16), in fp32 arithmetic.
"""

import argparse
import json
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d, ResBlock
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_pipelines.emoji.drawings import rasterise, split_tone
from data_pipelines.emoji.scenes import BACKGROUNDS, WORDS, load_font
from data_pipelines.emoji.splits import is_heldout_concept
from data_pipelines.emoji.stem import make_stem, render_stem
from emma_train.errors import UserError

log = logging.getLogger(__name__)

SIDE = 128
"""Pixels of an image's side; its latent is 32 x 4 x 4."""
DRAWING_SIDE = 144
"""Pixels of a rasterised drawing, slightly more than an image ever shows."""

ARCHITECTURE: dict[str, Any] = {
    "latent_channels": 32,
    "encoder_block_out_channels": (16, 16, 32, 64, 128, 128),
    "decoder_block_out_channels": (16, 16, 32, 64, 128, 256),
    "encoder_layers_per_block": (0, 1, 1, 2, 1, 1),
    "decoder_layers_per_block": (0, 2, 2, 3, 3, 0),
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
    "downsample_block_type": "conv",
    "upsample_block_type": "pixel_shuffle",
}
"""A small encoder (it runs for every image of every task), a larger decoder, and no attention: on a 4 x 4 grid, 3x3
convolutions already reach everything. The first level has no layers: at full resolution, which is slow on a CPU, only
one convolution runs, between 128 and 64 pixels."""

TRAIN_BATCH_SIZE = 32
MUON_RATE = 3e-3
ADAM_RATE = 2e-3
WARM_UP_STEPS = 100
AVERAGE_DECAY = 0.999
"""Decay per step of the moving average of the weights; the average is stored."""
LATENT_NOISE = 0.05
"""Noise on the latents as a fraction of their standard deviation: the decoder must tolerate the imperfect latents of
a generating model."""

PixelArray = NDArray[np.uint8]
Compose = Callable[[np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Drawings:
    """RGBA drawings: uint8 [N, DRAWING_SIDE, DRAWING_SIDE, 4], and the `style/name` of each."""

    pixels: PixelArray
    names: list[str]

    def concepts(self) -> list[str]:
        """The concept of each drawing: its name without style and skin tone."""
        stems = [name.split("/")[-1] for name in self.names]
        toned = {stem.removesuffix("-default") for stem in stems if stem.endswith("-default")}
        return [split_tone(stem, toned)[0].replace("-", " ") for stem in stems]

    def split(self) -> tuple["Drawings", "Drawings"]:
        """(drawings to train on, drawings of the concepts that the data sets hold out).

        A concept's drawings of another gender look nearly the same, so they are held out too.
        """
        concepts = self.concepts()
        held_out = {without_gender(concept) for concept in concepts if is_heldout_concept(concept)}
        rows: dict[bool, list[int]] = {False: [], True: []}
        for row, concept in enumerate(concepts):
            rows[without_gender(concept) in held_out].append(row)
        return self.take(rows[False]), self.take(rows[True])

    def take(self, rows: list[int]) -> "Drawings":
        return Drawings(self.pixels[rows], [self.names[row] for row in rows])


def without_gender(concept: str) -> str:
    return re.sub(r"^(man|woman|person|men|women|people) ", "", concept)


def load_drawings(path: Path) -> Drawings:
    """Drawings of a folder of SVGs (STYLE/NAME.svg, as in the npm package), or of X.npy with X_names.json beside it.

    Raises UserError if there are none.
    """
    if path.suffix == ".npy" and path.is_file():
        return Drawings(np.load(path), json.loads(path.with_name(f"{path.stem}_names.json").read_text()))
    files = sorted(path.glob("*/*.svg"))
    if not files:
        raise UserError(f"--drawings {path}: no STYLE/NAME.svg in it; give the icons folder of npm's fluentui-emoji")
    log.info("rasterising %d drawings", len(files))
    pixels = np.stack([np.asarray(rasterise(file, DRAWING_SIDE)) for file in files])
    return Drawings(pixels, [f"{file.parent.name}/{file.stem}" for file in files])


class ImageComposer:
    """Composes RGB images of SIDE x SIDE pixels; an image depends on its random generator alone."""

    def __init__(self, drawings: Drawings, held_out: bool = False, stems: int = 600):
        self.drawings = drawings
        rows = defaultdict(list)
        for row, concept in enumerate(drawings.concepts()):
            rows[concept].append(row)
        self.rows = [rows[concept] for concept in sorted(rows)]
        drawn = (make_stem(np.random.default_rng((held_out, n))) for n in range(8 * stems))
        contents = {stem.content: stem for stem in drawn if stem.is_heldout == held_out}
        self.stems = [render_stem(stem, SIDE) for stem in list(contents.values())[:stems]]

    def any(self, rng: np.random.Generator) -> Image.Image:
        """An image of the training mix."""
        kinds: list[Compose] = [self.single, self.scene, self.stem]
        return kinds[rng.choice(3, p=(0.6, 0.28, 0.12))](rng)

    def single(self, rng: np.random.Generator) -> Image.Image:
        """One drawing that covers at least half of the side."""
        image = background(rng)
        self.paste(image, rng, rng.uniform(0.5, 1.0))
        return image

    def scene(self, rng: np.random.Generator) -> Image.Image:
        """Two or three smaller drawings, and sometimes a word."""
        image = background(rng)
        for _ in range(rng.integers(2, 4)):
            self.paste(image, rng, rng.uniform(0.35, 0.58))
        if rng.random() < 0.3:
            x, y = (rng.uniform(0.2, 0.87, 2) * SIDE).tolist()
            word = str(rng.choice(WORDS)) if rng.random() < 0.5 else "".join(rng.choice([*ascii_uppercase], 3))
            pen = ImageDraw.Draw(image)
            pen.text((x, y), word, fill=(0, 0, 0), font=load_font(int(rng.integers(20, 36))), anchor="mm")
        return image

    def stem(self, rng: np.random.Generator) -> Image.Image:
        """A formula or a chart, moved a little."""
        image = Image.new("RGB", (SIDE, SIDE), "white")
        x, y = rng.integers(-6, 7, 2).tolist()
        image.paste(self.stems[rng.integers(len(self.stems))], (x, y))
        return image

    def alone(self, row: int) -> Image.Image:
        """Drawing number `row` alone on white, as large as the image: the hardest case."""
        image = Image.new("RGB", (SIDE, SIDE), "white")
        drawing = Image.fromarray(self.drawings.pixels[row]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.paste(drawing, (0, 0), drawing)
        return image

    def paste(self, image: Image.Image, rng: np.random.Generator, share: float) -> None:
        """Paste a random drawing, with that share of the image's side, anywhere; all concepts are equally likely."""
        rows = self.rows[rng.integers(len(self.rows))]
        side = round(share * SIDE)
        drawing = Image.fromarray(self.drawings.pixels[rows[rng.integers(len(rows))]])
        drawing = drawing.resize((side, side), Image.Resampling.BICUBIC)
        x, y = rng.integers(0, SIDE - side + 1, 2).tolist()
        image.paste(drawing, (x, y), drawing)


def background(rng: np.random.Generator) -> Image.Image:
    """A plain image in one of the data sets' colours, most often white, or in any colour."""
    named = ["white", "white", "white", *BACKGROUNDS]
    colour = BACKGROUNDS[str(rng.choice(named))] if rng.random() < 0.7 else tuple(rng.integers(0, 256, 3).tolist())
    return Image.new("RGB", (SIDE, SIDE), colour)


class ComposedImages(Dataset[Tensor]):
    """An unlimited number of images, uint8 [3, SIDE, SIDE]; image n depends on (seed, n) alone."""

    def __init__(self, compose: Compose, seed: int):
        self.compose = compose
        self.seed = seed

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(self.compose(np.random.default_rng((self.seed, index))))

    def first(self, count: int) -> Tensor:
        """The first images: uint8 [count, 3, SIDE, SIDE]."""
        return torch.stack([self[index] for index in range(count)])


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images: Tensor) -> Tensor:
    """uint8 images as fp32 in [-1, 1], the range of the autoencoder."""
    return images.float().contiguous(memory_format=torch.channels_last).div_(127.5).sub_(1.0)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Muon), for the convolutions inside the network.

    In 90 seconds it reached 2.6 dB more than AdamW alone. torch.optim.Muon only takes matrices.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(average, group["momentum"]).flatten(1))
                weight.add_(update.reshape(weight.shape), alpha=-group["lr"])


def orthogonalise(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix, approximated by five Newton-Schulz steps, in the size of Adam's updates."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype) * (0.2 * math.sqrt(max(matrix.shape)))


def reconstruct(model: AutoencoderDC, images: Tensor) -> Tensor:
    """Encode and decode images [N, 3, H, W] in [-1, 1], with a little noise on the latents."""
    latents = model.encoder(images)
    noise = torch.randn_like(latents) * (LATENT_NOISE * latents.detach().float().std())
    return model.decoder(latents + noise).float()


def train_autoencoder(
    images: Dataset[Tensor],
    minutes: float,
    seed: int = 0,
    steps: int | None = None,
    batch: int = TRAIN_BATCH_SIZE,
    compiled: bool = False,
    report: Callable[[AutoencoderDC], str] = lambda model: "",
) -> tuple[AutoencoderDC, list[float]]:
    """Train for `minutes`, or for `steps` if given. Returns the averaged model and the loss of each step.

    The loss is the mean over images of the root mean squared error. Compared with PSNR, easy images count less.
    """
    torch.manual_seed(seed)
    model = AutoencoderDC(**ARCHITECTURE).to(memory_format=torch.channels_last)
    average = deepcopy(model).requires_grad_(False)
    inner = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[:2]) >= 16]
    outer = [p for p in model.parameters() if not any(p is weight for weight in inner)]
    optimizers = [Muon(inner, MUON_RATE), torch.optim.AdamW(outer, ADAM_RATE, betas=(0.9, 0.95), fused=True)]
    peaks = (MUON_RATE, ADAM_RATE)
    forward = torch.compile(reconstruct) if compiled else reconstruct
    losses: list[float] = []
    start = logged = time.monotonic()
    for drawn in DataLoader(images, batch, num_workers=1, prefetch_factor=8):
        done = len(losses)
        if done == 1:
            start = time.monotonic()  # the first step also compiles
        progress = done / steps if steps else (time.monotonic() - start) / (60 * minutes)
        if progress >= 1:
            break
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            cosine = math.cos(math.pi / 2 * progress) ** 2
            optimizer.param_groups[0]["lr"] = peak * min(1, (done + 1) / WARM_UP_STEPS) * cosine
        target = normalise(drawn)
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(model, target)
        loss = ((output - target).square().mean((1, 2, 3)) + 1e-4).sqrt().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(outer, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        decay = min(AVERAGE_DECAY, (1 + done) / (10 + done))
        torch._foreach_lerp_([*average.parameters()], [p.detach() for p in model.parameters()], 1 - decay)
        losses.append(loss.item())
        if time.monotonic() - logged > 30:
            logged = time.monotonic()
            log.info("%3.0f %%  step %d  loss %.4f  %s", 100 * progress, done, np.mean(losses[-50:]), report(average))
    return average, losses


@torch.no_grad()
def psnr(model: AutoencoderDC, images: Tensor) -> Tensor:
    """PSNR in dB [N] of the reconstructions of uint8 images [N, 3, H, W]; outputs are clipped to the valid range."""
    errors = [
        F.mse_loss(model(x).sample.clamp(-1, 1), x, reduction="none").mean((1, 2, 3)) / 4
        for x in map(normalise, images.split(64))
    ]
    return -10 * torch.cat(errors).log10()


@torch.no_grad()
def encode_images(model: AutoencoderDC, images: Tensor) -> Tensor:
    """Latents [N, 32, H/32, W/32] of uint8 images [N, 3, H, W], without the scaling factor."""
    return torch.cat([model.encode(normalise(x)).latent for x in images.split(64)])


@torch.no_grad()
def shrink_latents(model: AutoencoderDC, factor: float) -> None:
    """Divide the latents by a power of two, by changing the weights in place; reconstructions do not change.

    The scale of the two residual streams is arbitrary, because everything that is added to them is normalised, and the
    decoder's output too; in training it grows to thousands. Exact in bf16: only exponents change.
    """
    model.encoder.conv_in.conv.weight.div_(factor)
    for module in model.modules():
        if isinstance(module, ResBlock):
            module.conv1.weight.mul_(factor)
            module.norm.weight.div_(factor)
            module.norm.bias.div_(factor)
        elif isinstance(module, DCDownBlock2d | DCUpBlock2d) and module is not model.decoder.conv_out:
            module.conv.bias.div_(factor)
    model.encoder.conv_out.bias.div_(factor)
    model.decoder.conv_in.bias.div_(factor)


def save_autoencoder(model: AutoencoderDC, out: Path, images: Tensor) -> AutoencoderDC:
    """Write a diffusers folder in bf16, with latents of unit deviation over `images`. Returns it, read back in fp32."""
    stored = deepcopy(model).bfloat16()
    deviation = float(encode_images(deepcopy(stored).float(), images).std())
    factor = 2.0 ** round(math.log2(deviation))
    shrink_latents(stored, factor)
    stored.register_to_config(scaling_factor=round(factor / deviation, 6))
    stored.save_pretrained(out)
    return load_autoencoder(out)


def load_autoencoder(folder: Path) -> AutoencoderDC:
    """The autoencoder of a folder, in fp32."""
    model: AutoencoderDC = AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    return model.eval()


def held_out_sets(composer: ImageComposer) -> dict[str, Tensor]:
    """Named sets of images, uint8 [N, 3, SIDE, SIDE]: single drawings, scenes, STEM, each style alone on white."""
    sets = {
        "single": ComposedImages(composer.single, 1).first(256),
        "scene": ComposedImages(composer.scene, 1).first(256),
        "stem": ComposedImages(composer.stem, 1).first(2 * len(composer.stems)),
    }
    by_style: dict[str, list[Tensor]] = defaultdict(list)
    for rows in composer.rows:  # one drawing of each concept and style
        first = {composer.drawings.names[row].split("/")[0]: row for row in reversed(rows)}
        for style, row in first.items():
            by_style[style].append(to_tensor(composer.alone(row)))
    return sets | {f"whole, {style}": torch.stack(images) for style, images in sorted(by_style.items())}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--drawings", type=Path, required=True, help="folder of STYLE/NAME.svg, or X.npy")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in diffusers' format")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time (default: 25, two cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile: 40 %% faster, wants a C++ compiler")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    seen, unseen = load_drawings(options.drawings).split()
    composer, heldout_composer = ImageComposer(seen), ImageComposer(unseen, held_out=True, stems=60)
    sets = held_out_sets(heldout_composer)
    log.info("%d drawings to train on, %d of held-out concepts", len(seen.names), len(unseen.names))
    images = ComposedImages(composer.any, options.seed)
    model, _ = train_autoencoder(
        images,
        options.minutes,
        options.seed,
        compiled=options.compile,
        report=lambda model: f"held out {float(psnr(model, sets['single'][:64]).mean()):.2f} dB",
    )
    stored = save_autoencoder(model, options.out, images.first(2048))
    log.info("%d parameters, scaling factor %g", stored.num_parameters(), stored.config.scaling_factor)
    for name, held_out in sets.items():
        log.info("PSNR, held out, %s (%d): %.2f dB", name, len(held_out), float(psnr(stored, held_out).mean()))


if __name__ == "__main__":
    main()
