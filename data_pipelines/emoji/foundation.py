"""What the trainings of the tiny Qwen3 and the tiny SigLIP share: options, records of a set, the loop, the measures."""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.shards.images import image_members
from data_pipelines.shards.record import read_record
from data_pipelines.shards.tar import groups
from emma_train.config.load import load_recipe
from emma_train.config.schema import Recipe
from emma_train.errors import UserError
from emma_train.storage.files import make_folder, write_atomic

log = logging.getLogger(__name__)

RECIPE = "recipes/tiny/stage0.yaml"
MEASURES_FILE = "measures.json"
PEAK_RATE = 2e-3
NUM_WARM_UP_STEPS = 50
WEIGHT_DECAY = 0.1

Measures = dict[str, float]
SplitRecord = tuple[dict[str, Any], dict[str, bytes]]
"""A record, and its image files by name."""


def read_split(folder: Path, split: str) -> Iterator[SplitRecord]:
    """The records of one split of a set that `emma-data import fluent-emoji` wrote, shard after shard.

    Raises UserError if it has none.
    """
    shards = sorted((folder / split).glob("*.tar"))
    if not shards:
        raise UserError(f"--data {folder}: no {split}/*.tar in it; give a folder of emma-data import fluent-emoji")
    for shard in shards:
        with shard.open("rb") as file:
            for group in groups(file):
                yield read_record(group.members), image_members(group.members)


def random_batches(num_items: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices of batches without end: every item once, in random order, then all again in another order."""
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(num_items).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def minimise(
    model: nn.Module, next_loss: Callable[[], Tensor], minutes: float, steps: int | None = None
) -> list[float]:
    """Train for `minutes` of CPU time, so that other work on the machine changes nothing, or for `steps` if given.

    Every call of `next_loss` returns the loss of another batch. AdamW; the rate rises linearly and falls to 0 as a
    cosine. Returns the loss of each step.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    settings = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(settings, PEAK_RATE, betas=(0.9, 0.95))
    losses: list[float] = []
    start, logged = time.process_time(), time.monotonic()
    while True:
        progress = len(losses) / steps if steps else (time.process_time() - start) / (60 * minutes)
        if progress >= 1:
            return losses
        rate = PEAK_RATE * min(1, (len(losses) + 1) / NUM_WARM_UP_STEPS) * math.cos(math.pi / 2 * progress) ** 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if time.monotonic() - logged > 30:
            logged = time.monotonic()
            log.info("%3.0f %%  step %d  loss %.4f", 100 * progress, len(losses), np.mean(losses[-50:]))


def run_training(
    description: str, train: Callable[[argparse.Namespace, Recipe], Measures], arguments: Sequence[str] | None
) -> int:
    """Read the options, train, and write what `train` measured beside the weights. Returns the exit code."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="set that `emma-data import fluent-emoji` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in the format of transformers")
    parser.add_argument("--recipe", type=Path, default=Path(RECIPE), help="says sizes and tokenizer (%(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="CPU time of the training (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(options.seed)
    try:
        recipe = load_recipe(options.recipe)
        make_folder(options.out)
        measures = train(options, recipe)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for name, value in measures.items():
        log.info("%s: %.4g", name, value)
    write_atomic(options.out / MEASURES_FILE, json.dumps(measures, indent=2) + "\n")
    return 0
