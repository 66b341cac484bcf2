"""Ratios of speed within one run on a CPU, and counts of what a card would have to do.

    OMP_NUM_THREADS=1 python tests/bench/cpu.py [--json] [--compile]

packed_vs_padded            seconds of a pack of Stage 1 (8 I2T, 8 T2I) whose samples are padded to the longest, over
                            those of the same samples packed
packed_vs_padded_by_task    the same with samples padded to the longest one of their task
padded_tokens, padded_tokens_by_task    tokens of these two over those of the samples
packed_vs_tokenwise         of images as separate semantic and latent tokens (latents of 16 pixels, as behind an 8x
                            autoencoder with patches of 2), over EMMA's one token of 32 pixels for both
stage1_vs_stage0, stage1_vs_router    seconds of a Stage 1 micro-step over one of alignment, and of router tuning, with
                            the same understanding samples
compile_vs_eager            seconds of eager layers over compiled ones (--compile; takes a minute)
data_wait_share             of the time of the steps of recipes/tiny/stage1.yaml, the trainer's wait for packs
host_copies_*               of a micro-step of each stage at the width of EMMA-4B on the meta device
kernels_*                   of an eager layer of EMMA-4B, forward and backward: shallow and deep ones of the decoder
                            with 6,176 tokens, and one of the encoder with 8,192 patches
compiled_kernels_*, compiled_gb_*    the same after torch.compile's fusion, and gigabytes moved by all kernels but
                            products and attention
graph_breaks                graphs beyond one of compiled layers of the three kinds, with flash-attn 3, flash-attn 2 and
                            torch's kernel
all_reduces                 of an optimizer step of Stage 1 on rank 0 of 256, in 32 replicas

Times are medians of three after one to warm up, of a small model with random weights in float32, forward and backward,
in seconds of CPU time, which other processes change less; all take about eight minutes. The model has the proportions
of EMMA-4B, with two ninths of the widths and of the layers. Images and texts have a quarter of the tokens of Stage 1.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from emma_train.config.load import load_recipe  # noqa: E402
from emma_train.config.schema import Recipe  # noqa: E402
from emma_train.engine.world import World, join  # noqa: E402
from emma_train.objectives.loss import LossAccumulator, count  # noqa: E402
from emma_train.plan.simulation import simulate  # noqa: E402
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment  # noqa: E402
from emma_train.sequence.pack import ImageTokens, PackedBatch, Sample, pack  # noqa: E402
from emma_train.sequence.tasks import TASKS  # noqa: E402
from emma_train.stages.stage import stage_of  # noqa: E402
from emma_train.training.build import build  # noqa: E402
from emma_train.training.environment import commit  # noqa: E402
from emma_train.training.forward import micro_loss  # noqa: E402
from emma_train.training.optimizer import make_optimizer  # noqa: E402
from tests.card import TORCH, card_on_cpu, card_on_meta  # noqa: E402
from tests.gpu.step_setting import CACHED_LATENTS, set_random_weights  # noqa: E402
from tests.host_copies import host_copies  # noqa: E402
from tests.kernels import eager_kernels, fused, graph_breaks  # noqa: E402
from tests.unit.emma_train.training.test_host_copies import LOADS, micro_step  # noqa: E402

RECIPES = ROOT / "recipes" / "emma-4b"
SIZES: dict[str, dict[str, float]] = {
    "model.decoder": {
        "hidden": 576, "num_layers": 8, "num_shared_layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 120,
        "intermediate_size": 2184, "vocab": 1024,
    },
    "model.vision": {"hidden": 264, "heads": 4, "num_layers": 6, "intermediate_size": 984, "position_grid": 8},
    "model": {"time_features": 16},
}  # fmt: skip
SIDE = 8
"""Visual tokens on the side of an image: half of those of 512 pixels."""
MIX = ("i2t", "t2i", "it2i")
SPREAD = 0.8
"""Standard deviation of the logarithm of texts' lengths."""
LAYERS = ("shallow", "deep", "vision")


def recipe_of(stage: str, *changes: str) -> Recipe:
    sizes = [f"{section}.{key}={value}" for section, values in SIZES.items() for key, value in values.items()]
    plain = ["engine.device=cpu", "engine.precision=fp32", "engine.compile=false", "init.from=null"]
    return load_recipe(RECIPES / f"{stage}.yaml", [*sizes, *plain, *changes])


def sample(key: str, task: str, text: int, pad_to: int = 0, tokenwise: bool = False) -> Sample:
    """A sample with `text` tokens, of which half are supervised in i2t, padded by text to `pad_to` tokens in all."""
    fine = 2 * SIDE if tokenwise else SIDE
    images = {"seen": image(SIDE), "made": image(fine), "latents": image(fine)}
    words: Segment = TextSegment(tuple(range(text - text // 2)))
    segments: dict[str, list[Segment]] = {
        "i2t": [ImageSegment("seen", ImageRole.UND), words, TextSegment(tuple(range(text // 2)), True)],
        "t2i": [words, ImageSegment("made", ImageRole.TARGET)],
        "it2i": [ImageSegment("latents", ImageRole.REFERENCE), words, ImageSegment("made", ImageRole.TARGET)],
    }
    used = segments[task]
    if tokenwise and task == "it2i":
        used.insert(0, ImageSegment("seen", ImageRole.UND))
    made = Sample(key, task, used, images, 1, 2)
    if pad_to > made.num_tokens:
        used.append(TextSegment((0,) * (pad_to - made.num_tokens)))
    return made


def image(side: int) -> ImageTokens:
    rng = np.random.default_rng(side)
    pixels = rng.integers(0, 256, (4 * side**2, 768), dtype=np.uint8)
    return ImageTokens((side, side), pixels, rng.standard_normal((side**2, 32), dtype=np.float32))


def text_lengths(task: str, count: int) -> list[int]:
    """Log-normal, at evenly spaced quantiles, with a quarter of the tokens of a mean text of the task."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    mean = TASKS[task].typical_text[0] / 4
    return [round(mean * math.exp(SPREAD * z - SPREAD**2 / 2)) for z in quantiles]


def pack_of(tasks: Sequence[str], each: int = 8, pad: str = "", tokenwise: bool = False) -> PackedBatch:
    """`each` samples of every task; `pad`: fill them up to the longest one of the "pack" or of their "task"."""
    drawn = {task: [(f"{task}{i}", task, n) for i, n in enumerate(text_lengths(task, each))] for task in tasks}
    longest = {task: max(sample(*one).num_tokens for one in drawn[task]) for task in tasks}
    if pad == "pack":
        longest = dict.fromkeys(tasks, max(longest.values()))
    return pack(
        [sample(*one, pad_to=longest[task] if pad else 0, tokenwise=tokenwise) for task in tasks for one in drawn[task]]
    )


def seconds(recipe: Recipe, batch: PackedBatch, world: World) -> float:
    """CPU time of forward and backward of a micro-step."""
    stage = stage_of(recipe)
    parts = build(recipe, stage, world, resuming=True)
    set_random_weights(parts)
    taken = []
    for _ in range(4):
        accumulator = LossAccumulator(recipe.loss, count([batch], stage.loss), world.device)
        started = time.process_time()
        loss = micro_loss(parts.engine.model, CACHED_LATENTS, batch, recipe.flow, stage, accumulator)
        parts.engine.accumulate(loss, last=True)
        taken.append(time.process_time() - started)
    return statistics.median(taken[1:])


def ratios(compiled: bool) -> dict[str, float]:
    stage1 = recipe_of("stage1")
    router = recipe_of("stage4_router", "model.vision.stem_expert=true", "model.vision.router=true")
    with join("cpu", 600) as world:
        pretraining, mixed = pack_of(MIX[:2]), seconds(stage1, pack_of(MIX), world)
        packed = seconds(stage1, pretraining, world)
        padded, by_task = pack_of(MIX[:2], pad="pack"), pack_of(MIX[:2], pad="task")
        understanding = pack_of(["i2t"], 16)
        alone = seconds(stage1, understanding, world)
        result = {
            "packed_vs_padded": seconds(stage1, padded, world) / packed,
            "packed_vs_padded_by_task": seconds(stage1, by_task, world) / packed,
            "padded_tokens": padded.num_tokens / pretraining.num_tokens,
            "padded_tokens_by_task": by_task.num_tokens / pretraining.num_tokens,
            "packed_vs_tokenwise": seconds(stage1, pack_of(MIX, tokenwise=True), world) / mixed,
            "stage1_vs_stage0": alone / seconds(recipe_of("stage0"), understanding, world),
            "stage1_vs_router": alone / seconds(router, understanding, world),
        }
        if compiled:
            result["compile_vs_eager"] = mixed / seconds(
                recipe_of("stage1", "engine.compile=true"), pack_of(MIX), world
            )
    return {name: round(value, 3) for name, value in result.items()}


def data_wait_share(steps: int = 15, warm_up: int = 3) -> float:
    """Seconds that the trainer waits for packs, over those of the steps, after `warm_up` steps."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.root={folder}", "run.name=run", f"train.steps={steps}", "train.log_every=1"]
        overrides += ["train.save_every=1000", "validate.every=0", "train.sample_every=0"]
        command = [sys.executable, "-m", "emma_train", "train", "recipes/tiny/stage1.yaml", *overrides]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line][warm_up:]
    return sum(row["data/wait_s"] for row in rows) / sum(row["step_s"] for row in rows)


def counts() -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        card = card_on_meta(patch)
        next(card)
        copies = {f"host_copies_{stage}": len(host_copies(micro_step(stage))) for stage in LOADS}
        kernels = {f"kernels_{kind}": eager_kernels(kind) for kind in LAYERS}
        next(card, None)
    breaks = 0
    for kernel in ("flash_attn_interface", "flash_attn", TORCH):
        with pytest.MonkeyPatch.context() as patch:
            card = card_on_cpu(patch, kernel)
            next(card)
            breaks += sum(graph_breaks(kind) for kind in LAYERS)
            if kernel == "flash_attn":
                compiled = {kind: fused(kind) for kind in LAYERS}
            next(card, None)
    recipe = load_recipe(RECIPES / "stage1.yaml", ["engine.replicate=32", "init.from=null"])
    counted = simulate(recipe, "stage1", 256, partial(make_optimizer, config=recipe.optimizer))
    return {
        **copies,
        **kernels,
        **{f"compiled_kernels_{kind}": layer.nodes for kind, layer in compiled.items()},
        **{f"compiled_gb_{kind}": round(layer.elementwise_bytes / 1e9, 2) for kind, layer in compiled.items()},
        "graph_breaks": breaks,
        "all_reduces": counted.collectives["all-reduce"][0],
        "units": counted.units,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object")
    parser.add_argument("--compile", action="store_true", help="measure compile_vs_eager too")
    arguments = parser.parse_args()
    facts = {"commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    waits = {"data_wait_share": float(f"{data_wait_share():.2g}")}
    results = {**facts, **ratios(arguments.compile), **waits, **counts()}
    if arguments.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
