"""python -m tests.chaos --minutes 60 --seed 0 --out DIR: train while faults are injected, then compare."""

import argparse
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emma_train.monitor.goodput import read_ledger
from tests.chaos.disk import small_disk
from tests.chaos.driver import Driver
from tests.chaos.faults import FAULTS, Target, possible_kinds
from tests.chaos.network import network_of_nodes
from tests.chaos.nodes import Nodes
from tests.chaos.run_view import RunView
from tests.chaos.scene import copy_code, copy_shards, write_scene_recipe
from tests.chaos.store import faulty_store
from tests.chaos.trainer import FLIPS_VARIABLE
from tests.chaos.verdict import audit_lines, fault_table, ledger_table, step_problems
from tests.distributed.ranks import command
from tests.distributed.spawn import fork_server, run_ranks

log = logging.getLogger(__name__)
LEDGER_SHARE = 0.01
FIRST_START_S = 10.0
"""Seconds before the first rank begins, which no ledger has: agents start, and import torch."""
STEPS_BETWEEN = (1, 4)
"""New steps between a recovery and the next fault."""
EXTRA_STEPS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="no fault is injected later than this")
    parser.add_argument("--faults", type=int, default=10**6, help="nor more faults than these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--only", action="append", help="a part of the name of a kind; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="start every process in a new interpreter, not by a fork")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and clean up
    given.out.mkdir(parents=True)
    console = logging.StreamHandler()
    handlers = [console, logging.FileHandler(given.out / "chaos.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    return chaos(given.out.resolve(), given.minutes, given.faults, given.seed, given.only or [""], given.fresh)


def chaos(out: Path, minutes: float, num_faults: int, seed: int, only: list[str], fresh: bool = False) -> int:
    """The run with faults, the undisturbed one and the comparison. Returns the exit code: 0 where all promises hold."""
    with scene(out, seed, fresh) as target:
        driver = Driver(target, out / "faults.jsonl")
        start_fork_server()
        begun = time.time()
        words = [*target.nodes.words]
        try:
            last = disturb(driver, words, begun + 60 * minutes, num_faults, only)
        finally:
            driver.nodes.kill()
        wall_s = time.time() - begun
        log.info("%d steps in %.0f s; now the undisturbed run", last, wall_s)
        reference = ["run.name=reference", f"train.steps={last}", f"train.checkpoints={out}/disk"]
        outcomes = run_ranks(2, command, [*words, *reference], timeout_s=3600)
        assert all(outcome.value == 0 for outcome in outcomes), outcomes
        skipped = [(kind, reason) for kind, reason in possible_kinds(target).items() if reason]
        return conclude(out, driver, wall_s, skipped)


def start_fork_server() -> None:
    """Its imports are no part of the run."""
    process = fork_server().Process(target=int)
    process.start()
    process.join()


@contextmanager
def scene(out: Path, seed: int, fresh: bool) -> Iterator[Target]:
    """Code, shards, recipe, store, network and disk while the block runs."""
    rng = random.Random(seed)
    code, shards = copy_code(out / "code"), copy_shards(out / "shards", rng)
    os.chdir(code)  # from there the process imports that agents and ranks are forked from
    os.environ["PYTHONPATH"] = str(code)
    flips, logs = out / "flips", out / "nodes"
    flips.mkdir()
    logs.mkdir()
    with network_of_nodes(2) as network, small_disk(out / "disk") as disk, faulty_store(shards, network.host) as store:
        recipe = write_scene_recipe(out / "recipe.yaml", store.url)
        words = ["train", str(recipe), "health.replay=5", "health.max_rewinds=1000"]
        chaotic = [*words, "run.name=chaos", f"train.checkpoints={out}/disk"]
        nodes = Nodes(network, code, logs, chaotic, {FLIPS_VARIABLE: str(flips)}, fresh)
        yield Target(rng, nodes, RunView(out / "runs" / "chaos", logs), store, disk, network, code, flips)


def disturb(driver: Driver, words: list[str], end: float, num_faults: int, only: list[str]) -> int:
    """Inject faults of all kinds in rounds, each round in another order, then finish the run. Returns its last step."""
    rng = driver.target.rng
    kinds = [kind for kind, reason in possible_kinds(driver.target).items() if not reason]
    kinds = [kind for kind in kinds if any(part in kind for part in only)]
    driver.start()
    coming: list[str] = []
    while len(driver.events) < num_faults and time.time() < end:
        coming = coming or rng.sample(kinds, len(kinds))
        step = driver.target.view.last_row()["step"] + rng.randint(*STEPS_BETWEEN)
        if not driver.wait_for_step(step):
            raise RuntimeError(f"no step {step} without a fault")
        time.sleep(rng.uniform(0, 1))
        driver.inject(coming.pop())
    return driver.finish(words, EXTRA_STEPS)


def conclude(out: Path, driver: Driver, wall_s: float, skipped: list[tuple[str, str]]) -> int:
    """Compare, and write result.json and table.txt. Returns 0 where all promises hold."""
    run, reference = out / "runs" / "chaos", out / "runs" / "reference"
    lines, is_equal = audit_lines(run, reference)
    problems = step_problems(run, reference)
    problems += [f"fault {event.number}: {problem}" for event in driver.events for problem in event.problems]
    if not is_equal:
        problems += lines
    ledger = read_ledger(run)
    assert ledger is not None
    if abs(ledger.wall_s - wall_s) > LEDGER_SHARE * wall_s + FIRST_START_S:
        problems.append(f"the ledger has {ledger.wall_s:.1f} s of {wall_s:.1f} s")
    kinds = {event.kind for event in driver.events}
    summary = f"{len(driver.events)} faults of {len(kinds)} of {len(FAULTS)} kinds, {driver.num_starts} starts"
    text = [
        *fault_table(driver.events, skipped), "", *ledger_table(ledger), "",
        f"{summary}; goodput {100 * ledger.goodput:.1f} %; {wall_s:.1f} s, ledger {ledger.wall_s:.1f} s", *lines,
        *(f"PROBLEM: {problem}" for problem in problems),
    ]  # fmt: skip
    (out / "table.txt").write_text("\n".join(text) + "\n")
    result = {"wall_s": wall_s, "ledger": ledger.seconds, "codes": driver.codes, "audit": lines, "problems": problems}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n".join(text) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
