"""Seconds that the tiny model takes for answers and images, with prompts computed once (cached) and at every step.

    python tests/bench/generate.py [--json] [--batch 4] [--steps 30] [--max-tokens 32]

Weights are random and the images noise: only the time matters, and that both ways agree.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emma_train.config.load import load_recipe
from emma_train.generate.generator import Generator
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.emma import Emma
from emma_train.model.initial import initial_value
from emma_train.sequence.request import Request
from emma_train.sequence.tokens import TextTokenizer

ROOT = Path(__file__).parents[2]
SIDE = 128
INSTRUCTION = "make the background pink and put a small red apple beside the dog, on the left"


def generators() -> dict[str, Generator]:
    """The same random model twice: cached and uncached."""
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "stage3.yaml")
    vision, device = recipe.model.vision, torch.device("cpu")
    model = Emma(recipe.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, 0, recipe.model.decoder.num_layers))
        model.velocity_head.weight.normal_(std=0.05)
    autoencoder = Autoencoder(recipe.model.autoencoder, device)
    tokenizer = TextTokenizer(recipe.data.tokenizer, recipe.data.template)
    return {
        name: Generator(model, autoencoder, tokenizer, vision.patch, vision.shuffle, cached=name == "cached")
        for name in ("cached", "uncached")
    }


def requests(task: str, batch: int) -> list[Request]:
    rng = np.random.default_rng(0)
    shown = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(batch)] if task != "t2i" else []
    return [
        Request(str(i), task, INSTRUCTION, shown[i : i + 1], (SIDE, SIDE) if task != "i2t" else (0, 0), seed=i)
        for i in range(batch)
    ]


def best(run: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Seconds of the fastest of a few runs after one to warm up, and its value."""
    value, seconds = run(), []
    for _ in range(repeats):
        started = time.perf_counter()
        value = run()
        seconds.append(time.perf_counter() - started)
    return min(seconds), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    os.chdir(ROOT)  # paths in recipes count from here
    both = generators()
    text = TextSettings(arguments.max_tokens, fixed_length=True)
    flow = FlowSettings(arguments.steps)
    results: dict[str, dict[str, float]] = {}
    for task in ("i2t", "t2i", "it2i"):
        asked = requests(task, arguments.batch)
        made: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for name, generator in both.items():
            answer, draw = (
                partial(generator.generate_text, asked, text),
                partial(generator.generate_latents, asked, flow),
            )
            seconds[name], made[name] = best(answer if task == "i2t" else draw)
        if task == "i2t":
            assert made["cached"] == made["uncached"]
            difference = 0.0
        else:
            pairs = zip(made["cached"], made["uncached"], strict=True)
            difference = max(float((a - b).abs().max()) for a, b in pairs)
        results[task] = {
            **{f"{name}_s": round(s, 4) for name, s in seconds.items()},
            "cached_vs_uncached": round(seconds["cached"] / seconds["uncached"], 3),
            "largest_difference": difference,
        }
    if arguments.json:
        flat = {f"{task}_{name}": value for task, result in results.items() for name, value in result.items()}
        settings = {"batch": arguments.batch, "steps": arguments.steps, "max_tokens": arguments.max_tokens}
        print(json.dumps({"threads": torch.get_num_threads(), **settings, **flat}))
        return
    for task, result in results.items():
        print(f"{task:5}", *(f"{name}={value:.4g}" for name, value in result.items()))


if __name__ == "__main__":
    main()
