"""Small models, recipes and samples, in memory, for every test that needs one.

tiny_model()                 ModelConfig: hidden 32, 4 decoder layers, 3 vision layers, 32 pixels per token
tiny_emma(config)            Emma with every weight random, so that no output is zero by construction
write_export(out, recipe)    an export of tiny_emma as if a stage had made it; returns the model
recipe_values(stage, ...)    the plain values of a valid recipe; dotted keys override
tiny_recipe(stage, ...)      the same as a checked Recipe
write_recipe(path, values)   the same as a YAML file
image(rows, columns)       uint8 image of so many visual tokens
block_order(rows, columns)   raster index of each patch, in block order
pixels(rows, columns)        the same as Pixels, with a latent
i2t_sample, t2i_sample, it2i_sample, mixed_samples    Samples, laid out by the real layouts
random_sample(rng)           any mixture of text and images of all roles, for property tests
kept_bytes(model, run)       bytes that autograd keeps for backward while run() calls the model
assert_same_pack(one, other) compares two packs bit for bit
FakeAutoencoder              the interface of Autoencoder without weights: encode is linear, decode a blank
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from emma_train.config.load import from_dict
from emma_train.config.schema import AutoencoderConfig, DecoderConfig, ModelConfig, Recipe, VisionConfig
from emma_train.export import export
from emma_train.model.emma import Emma
from emma_train.sequence import layout
from emma_train.sequence.geometry import to_patches
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment
from emma_train.sequence.pack import ImageTokens, PackedBatch, Sample
from emma_train.sequence.seeds import seed_of
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.safetensors_io import Spec

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "recipes" / "tiny" / "assets"
PATCH, SHUFFLE, CHANNELS, VOCAB = 16, 2, 32, 1024
SIDE = PATCH * SHUFFLE
VISION = {
    "hidden": 32,
    "num_layers": 3,
    "heads": 2,
    "intermediate_size": 48,
    "position_grid": 4,
    "expert_layers": 1,
    "router_hidden": 16,
}
DECODER: dict[str, Any] = {
    "hidden": 32,
    "num_layers": 4,
    "num_shared_layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab": VOCAB,
    "rope_theta": 10000.0,
}


def tiny_model(vision: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None) -> ModelConfig:
    """A small model of EMMA's full structure; `vision` and `decoder` override single fields."""
    return ModelConfig(
        vision=VisionConfig(**{**VISION, **(vision or {})}),
        decoder=DecoderConfig(**{**DECODER, **(decoder or {})}),
        autoencoder=AutoencoderConfig(path=str(ASSETS / "autoencoder")),
        time_features=16,
    )


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Every parameter random by name: norms near 1, matrices N(0, scale²/fan_in), the rest N(0, 0.1²)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(seed_of(seed, 0, name, "test"))
            )
            if parameter.ndim == 1:
                parameter.copy_(0.1 * value + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(scale * value / parameter[0].numel() ** 0.5)


def tiny_emma(config: ModelConfig | None = None, seed: int = 0) -> Emma:
    """Emma with random weights everywhere, the velocity head and the placeholder too."""
    model = Emma(config or tiny_model())
    randomise(model, seed)
    return model


def write_export(out: Path, recipe: Recipe, seed: int = 0) -> Emma:
    """Emma with random weights as an export of the recipe's stage."""
    model = tiny_emma(recipe.model, seed)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    specs = {name: Spec.of(value.dtype, value.shape) for name, value in weights.items()}
    meta = {"stage": recipe.stage.name, "step": 1}
    export.write_export(out, specs, weights.__getitem__, recipe, meta, tokenizer().path)
    return model


def recipe_values(stage: str = "stage1", **dotted: Any) -> dict[str, Any]:
    """Plain values of a valid recipe. `dotted` overrides them, with __ for the dot: train__steps=3."""
    understanding = stage in ("stage0", "stage4_expert", "stage4_router")
    values: dict[str, Any] = {
        "run": {"root": "runs", "name": f"test-{stage}"},
        "stage": {"name": stage},
        "model": {
            "vision": {**VISION, "stem_expert": stage.startswith("stage4"), "router": stage == "stage4_router"},
            "decoder": dict(DECODER),
            "autoencoder": {"path": str(ASSETS / "autoencoder")},
            "time_features": 16,
        },
        "data": {
            "sources": [{"path": str(ASSETS / "emoji" / "train")}],
            "tokenizer": str(ASSETS / "tokenizer"),
            "slots": 4,
            "samples_per_step": 12,
            "pack_tokens": 512,
            "und": {"side": 64},
            "gen": {"side": 64},
        },
        "mix": {"i2t": 1} if understanding else {"i2t": 1, "t2i": 1, "it2i": 1},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 4, "log_every": 1, "save_every": 2},
        "engine": {"precision": "fp32", "device": "cpu"},
    }
    for key, value in dotted.items():
        *sections, leaf = key.split("__")
        section_values = values
        for section in sections:
            section_values = section_values.setdefault(section, {})
        section_values[leaf] = value
    return values


def tiny_recipe(stage: str = "stage1", **dotted: Any) -> Recipe:
    """recipe_values as a Recipe."""
    return from_dict(recipe_values(stage, **dotted), "test")


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """Write values as a recipe file and return its path."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@lru_cache(maxsize=1)
def tokenizer() -> TextTokenizer:
    """The tiny recipes' tokenizer."""
    return TextTokenizer(ASSETS / "tokenizer")


def make_image(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [32*rows, 32*columns, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (rows * SIDE, columns * SIDE, 3), dtype=np.uint8)


def block_order(rows: int, columns: int) -> Tensor:
    """Raster index of each patch of so many visual tokens, in block order: int64 [patches]."""
    raster = torch.arange(rows * columns * SHUFFLE**2).view(rows, SHUFFLE, columns, SHUFFLE)
    return raster.transpose(1, 2).reshape(-1)


def pixels(
    rows: int, columns: int, seed: int = 0, cached: bool = True, stem: int = -1, patch: int = PATCH
) -> ImageTokens:
    """An image of noise as ImageTokens; its latent is N(0, 1) and unscaled."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (rows * patch * SHUFFLE, columns * patch * SHUFFLE, 3), dtype=np.uint8)
    latent = rng.standard_normal((rows * columns, CHANNELS), dtype=np.float32) if cached else None
    return ImageTokens((rows, columns), to_patches(image, patch, SHUFFLE), latent, stem)


def i2t_sample(
    key: str = "question",
    grids: Sequence[tuple[int, int]] = ((2, 2),),
    answer: str = "a cat",
    seed: int = 0,
    stem: int = -1,
) -> Sample:
    """A question about images, with its answer supervised."""
    names = [f"img{i}" for i in range(len(grids))]
    segments = layout.understanding(tokenizer(), names, [("user", "What is this?"), ("assistant", answer)])
    return Sample(key, "i2t", segments, _images(key, names, grids, seed, stem))


def t2i_sample(key: str = "prompt", grid: tuple[int, int] = (2, 2), text: str = "a red fish", seed: int = 0) -> Sample:
    """A prompt and its target."""
    segments = layout.generation(tokenizer(), [], text, "target")
    return _seeded(Sample(key, "t2i", segments, _images(key, ["target"], [grid], seed)), seed)


def it2i_sample(
    key: str = "edit", reference: tuple[int, int] = (2, 2), grid: tuple[int, int] = (2, 2), seed: int = 0
) -> Sample:
    """An instruction for a reference image and its target."""
    segments = layout.generation(tokenizer(), ["img0"], "remove the fish", "target")
    return _seeded(Sample(key, "it2i", segments, _images(key, ["img0", "target"], [reference, grid], seed)), seed)


def mixed_samples(seed: int = 0) -> list[Sample]:
    """Every task and several image sizes."""
    return [
        i2t_sample("q0", [(2, 2)], seed=seed, stem=0),
        it2i_sample("e0", (2, 3), (3, 2), seed=seed),
        t2i_sample("p0", (2, 2), seed=seed),
        i2t_sample("q1", [(1, 3), (2, 2)], answer="two red apples", seed=seed, stem=1),
    ]


def random_sample(rng: np.random.Generator, key: str) -> Sample:
    """Text, understanding, reference and target images in any order and number; small."""
    segments: list[Segment] = []
    images: dict[str, ImageTokens] = {}
    # Text comes first, as in every layout, so that a supervised token always has a predictor.
    for index, kind in enumerate([0, *rng.integers(0, 4, rng.integers(1, 5))]):
        if kind == 0:
            ids = tuple(int(i) for i in rng.integers(0, VOCAB, rng.integers(1, 6)))
            segments.append(TextSegment(ids, supervised=index > 0 and isinstance(segments[-1], TextSegment)))
        else:
            name = f"img{index}"
            images[name] = pixels(int(rng.integers(1, 3)), int(rng.integers(1, 4)), seed=int(rng.integers(1 << 30)))
            segments.append(ImageSegment(name, ImageRole(int(kind))))
    return Sample(key, "it2i", segments, images, int(rng.integers(1 << 40)), int(rng.integers(1 << 40)))


def scaled_latents(batch: PackedBatch, scale: float = 0.5) -> Tensor:
    """The pack's cached latents as the model takes them."""
    return torch.zeros(0, CHANNELS) if batch.latents is None else batch.latents * scale


def clone_sample(sample: Sample) -> Sample:
    """A copy that may be changed."""
    return copy.deepcopy(sample)


def kept_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for backward while `run` calls the model, each storage once, without weights."""
    # A storage is known by its object, because those of the meta device have no address.
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


class FakeAutoencoder:
    """The interface of model/autoencoder.py without weights: a latent is a fixed linear map of its 32 x 32 block."""

    scale = 0.5

    def __init__(self, channels: int = CHANNELS) -> None:
        self.config = AutoencoderConfig(path="none", channels=channels)
        self.device = torch.device("cpu")
        self._matrix = torch.randn(SIDE * SIDE * 3, channels, generator=torch.Generator().manual_seed(0)) / SIDE

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        latents = []
        for image in images:
            blocks = torch.from_numpy(to_patches(image.numpy(), SIDE, 1)).float() / 127.5 - 1.0
            latents.append(blocks @ self._matrix)
        return latents

    def decode(self, latent: Tensor, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows * SIDE, columns * SIDE, 3, dtype=torch.uint8)


def _images(
    key: str, names: Sequence[str], grids: Sequence[tuple[int, int]], seed: int, stem: int = -1
) -> dict[str, ImageTokens]:
    return {
        name: pixels(*grid, seed=seed_of(seed, 0, key, name) % (1 << 31), stem=stem)
        for name, grid in zip(names, grids, strict=True)
    }


def _seeded(sample: Sample, seed: int) -> Sample:
    sample.noise_seed = seed_of(seed, 0, sample.key, "noise")
    sample.time_seed = seed_of(seed, 0, sample.key, "time")
    return sample


def assert_same_pack(one: PackedBatch, other: PackedBatch) -> None:
    """Assert that every table and tensor of two packs agrees in type and in every bit."""
    a, b = (dict(_leaves(dataclasses.asdict(batch))) for batch in (one, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[name].dtype
            assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested dictionaries and lists, by their path."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}/{key}")
    else:
        yield name, value
