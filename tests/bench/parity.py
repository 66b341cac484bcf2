"""How far the results of engines and numbers of ranks differ in every stage: the table of docs/engines.md.

    python tests/bench/parity.py [--json] [--steps 20] [--stages stage0 stage1 ...]

Each stage starts from the reference's end of the stage before. fp32 on CPU; some three minutes for all stages.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from emma_train.stages.stage import STAGES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.distributed.engines import REFERENCE, WAYS, Distance, distance, run, stage_recipe  # noqa: E402


def measure(root: Path, steps: int, stages: list[str]) -> Iterator[tuple[str, str, Distance]]:
    """(stage, way, distance from the reference), one after another."""
    previous = None
    for stage in list(STAGES)[: max(list(STAGES).index(name) for name in stages) + 1]:
        recipe = stage_recipe(root, stage, previous, steps)
        reference = run(recipe, REFERENCE, stage)
        for number, way in enumerate(WAYS if stage in stages else ()):
            other = run(recipe, way, f"{stage}-{number}")
            yield stage, way.name, distance(other, reference, steps)
            shutil.rmtree(other)
        previous = str(reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    arguments = parser.parse_args()
    os.chdir(ROOT)  # paths in recipes count from here
    flat: dict[str, float] = {}
    print(f"| stage | against {REFERENCE.name} | losses | gradient norm | weights | averages | moments |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for stage, way, difference in measure(Path(folder), arguments.steps, arguments.stages):
            print(
                f"| {stage} | {way} | " + " | ".join(f"{value:.1e}" for value in vars(difference).values()) + " |",
                flush=True,
            )
            flat |= {f"{stage}/{way}/{name}": value for name, value in vars(difference).items()}
    if arguments.json:
        print(json.dumps({"steps": arguments.steps, **flat}))


if __name__ == "__main__":
    main()
