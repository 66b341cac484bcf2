"""What Muon costs: a step of the tiny model beside AdamW's, and counted FLOPs and bytes of EMMA-4B.

    python tests/bench/muon.py [--json] [--packs 4] [--repeats 5]

The tiny step is Stage 1's on one process: forward and backward of `packs` packs, which both optimizers share, and the
optimizer's part, measured in turn in CPU seconds, so that a busy machine does not count; the best of `repeats`. Counts
are those of Stage 1 of recipes/emma-4b under FSDP.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from emma_train.config.load import load_recipe
from emma_train.config.schema import Recipe
from emma_train.engine.muon import assign_owners
from emma_train.engine.world import World, join
from emma_train.flops.formulas import newton_schulz_flops
from emma_train.model.autoencoder import Autoencoder
from emma_train.objectives.loss import LossAccumulator, count
from emma_train.plan import Plan
from emma_train.stages.stage import stage_of
from emma_train.training.build import TrainingParts, build, set_initial
from emma_train.training.forward import micro_loss

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.distributed.ranks import make_pack  # noqa: E402

DTYPES = ("bf16", "fp32")


def started(recipe: Recipe, world: World) -> TrainingParts:
    parts = build(recipe, stage_of(recipe), world, resuming=True)
    set_initial(parts.engine.weights, recipe.model, list(parts.engine.weights))
    parts.engine.sync_compute_weights()
    return parts


def tiny_steps(num_packs: int, repeats: int) -> dict[str, float]:
    """CPU seconds of a tiny step: forward and backward, and the optimizer's part by kind; and ratios of the sums."""
    path = ROOT / "recipes" / "tiny" / "stage1.yaml"
    ways = {"AdamW": ["optimizer.kind=adamw"]}
    ways |= {f"Muon {dtype}": ["optimizer.kind=muon", f"optimizer.muon.dtype={dtype}"] for dtype in DTYPES}
    seconds: dict[str, list[float]] = {"forward and backward": [], **{name: [] for name in ways}}
    with join("cpu", 600) as world:
        recipes = {name: load_recipe(path, ["init.from=null", *overrides]) for name, overrides in ways.items()}
        built = {name: started(recipe, world) for name, recipe in recipes.items()}
        recipe = recipes["AdamW"]
        packs, stage = [make_pack(recipe, "mixed")] * num_packs, stage_of(recipe)
        autoencoder = Autoencoder(recipe.model.autoencoder, world.device)
        for _ in range(repeats):
            for name, parts in built.items():
                start = time.process_time()
                losses = LossAccumulator(recipe.loss, count(packs, stage.loss), world.device)
                for index, pack in enumerate(packs):
                    loss = micro_loss(parts.engine.model, autoencoder, pack, recipe.flow, stage, losses)
                    parts.engine.accumulate(loss, last=index == num_packs - 1)
                middle = time.process_time()
                parts.engine.step(1e-4)
                seconds["forward and backward"].append(middle - start)
                seconds[name].append(time.process_time() - middle)
    best = {name: min(values) for name, values in seconds.items()}
    shared = best["forward and backward"]
    ratios = {f"step with {name} over AdamW": (shared + best[name]) / (shared + best["AdamW"]) for name in ways}
    return {**{f"{name}, s": value for name, value in best.items()}, **ratios}


def counted(num_gpus: int) -> dict[str, float]:
    """FLOPs and bytes of one rank's Muon in a step of EMMA-4B's Stage 1, beside those of the model."""
    path = ROOT / "recipes" / "emma-4b" / "stage1.yaml"
    recipe = load_recipe(path, ["optimizer.kind=muon"])
    plan = Plan(recipe, str(path), num_gpus, "h100-80g")
    loads, model = plan.newton_schulz_loads(), sum(plan.flops(plan.loads[0]).values())
    iterations = recipe.optimizer.muon.iterations
    costs = [newton_schulz_flops(rows, columns, iterations) for rows, columns in plan.muon_shapes]
    owners = assign_owners(costs, num_gpus)
    sent, received = [0] * num_gpus, [0] * num_gpus
    for (rows, columns), owner in zip(plan.muon_shapes, owners, strict=True):
        rows_of_rank = -(-rows // num_gpus)
        for rank in range(num_gpus):
            part = max(0, min(rows_of_rank, rows - rank * rows_of_rank)) * columns
            if rank != owner:
                sent[rank] += 2 * part
                received[owner] += 2 * part
    return {
        "matrices": len(costs),
        "parameters": plan.sizes.muon,
        "FLOPs, mean rank": sum(loads) / num_gpus,
        "FLOPs, busiest over mean": max(loads) * num_gpus / sum(loads),
        "FLOPs over the model's": num_gpus * max(loads) / model,
        "bytes sent to owners, most": max(sent),
        "bytes received by an owner, most": max(received),
        "bytes over one gather of the weights": max(sent) / (2 * plan.sizes.stored * (1 - 1 / num_gpus)),
        "memory saved, bytes": 4 * plan.sizes.muon / num_gpus,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--counts-only", action="store_true", help="no tiny step")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # paths in recipes count from here
    values = {f"EMMA-4B, {n} ranks: {name}": v for n in (8, 256) for name, v in counted(n).items()}
    if not arguments.counts_only:
        values |= tiny_steps(arguments.packs, arguments.repeats)
    for name, value in values.items():
        print(f"{name}: {value:.4g}")
    if arguments.json:
        print(json.dumps(values))


if __name__ == "__main__":
    main()
