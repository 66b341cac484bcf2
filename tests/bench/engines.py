"""How far apart engines, process counts and accumulation end on one recipe: gloo, fp32, packs that differ by rank.

    python tests/bench/engines.py [--json] [--steps 20] [--stages stage0,stage1,...]

The reference computes four packs a step in one process. Every way ends at a distance from it: the largest relative
difference of any loss in any step, of the gradient norm, and of the weights, averages and moments after the last step.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.distributed.engines import REFERENCE, WAYS, distance, run, stage_recipe  # noqa: E402

STAGES = ("stage0", "stage1", "stage2", "stage3", "stage4_expert", "stage4_router")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", default=",".join(STAGES))
    arguments = parser.parse_args()
    os.chdir(ROOT)  # paths in recipes count from here
    flat: dict[str, float | int] = {"steps": arguments.steps}
    with tempfile.TemporaryDirectory() as temporary:
        root, previous = Path(temporary), None
        for stage in arguments.stages.split(","):
            if previous is None and stage != STAGES[0]:
                before = STAGES[STAGES.index(stage) - 1]
                raise SystemExit(f"--stages starts with {stage}, which goes on from {before}; begin with {STAGES[0]}")
            recipe = stage_recipe(root, stage, previous, arguments.steps)
            reference = run(recipe, REFERENCE, f"{stage}-reference")
            previous = str(reference)
            for way in WAYS:
                found = distance(run(recipe, way, f"{stage}-{way.name.replace(' ', '')}"), reference, arguments.steps)
                flat |= {f"{stage} {way.name} {key}": value for key, value in asdict(found).items()}
                if not arguments.json:
                    print(f"{stage:14} {way.name:14}", *(f"{k} {v:.1e}" for k, v in asdict(found).items()), flush=True)
    if arguments.json:
        print(json.dumps(flat))


if __name__ == "__main__":
    main()
