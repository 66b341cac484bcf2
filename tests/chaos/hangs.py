"""python -m tests.chaos.hangs --times 10 --out DIR: is the right rank named, each kind of hang so many times?

The run is that of tests/chaos, with ranks 1 + 1, 2 + 1 and 1 + 2 on two nodes. What hangs is named within the time-out
and 30 s, by a line on the consoles, and no line names another rank. Where the store of the shards answers one node no
more, or a node is cut off, the ranks of that node are the right ones.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.__main__ import scene, start_fork_server
from tests.chaos.driver import Driver, Event
from tests.chaos.faults import LAYOUTS, possible_kinds
from tests.chaos.trainer import SHORT_WAITS_VARIABLE

KINDS = ("rank stopped (SIGSTOP)", "loader worker stopped (SIGSTOP)", "store hangs", "network cut")
TIMEOUT_S, LIMIT_S = 8, 38


def hang_table(events: Sequence[Event]) -> list[str]:
    """A table of kinds, in markdown."""
    lines = [
        "| kind | times | right rank named | another named | named after s, median (most) |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        some = [event for event in events if event.kind == kind]
        seconds = sorted(event.named_s for event in some if event.named_s is not None)
        right = sum(is_named(event) for event in some)
        others = sum(any("besides" in problem for problem in event.problems) for event in some)
        after = f"{seconds[len(seconds) // 2]:.0f} ({seconds[-1]:.0f})" if seconds else ""
        lines.append(f"| {kind} | {len(some)} | {right} | {others} | {after} |")
    return lines


def is_named(event: Event) -> bool:
    """Whether the ranks that hang were named in time."""
    missed = any("not named" in problem for problem in event.problems)
    return not missed and event.named_s is not None and event.named_s <= LIMIT_S


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(given.out / "hangs.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    os.environ[SHORT_WAITS_VARIABLE] = "1"
    with scene(given.out.resolve(), given.seed, fresh=False) as target:
        start_fork_server()
        if reasons := [reason for kind in KINDS if (reason := possible_kinds(target)[kind])]:
            raise SystemExit(f"{reasons[0]}: run it as root")
        target.nodes.words = [*target.nodes.words, f"engine.step_timeout_s={TIMEOUT_S}"]
        driver = Driver(target, given.out / "faults.jsonl")
        try:
            driver.start()
            for number in range(given.times):
                for kind in KINDS:
                    target.layout = LAYOUTS[number % len(LAYOUTS)]
                    step = target.view.last_row()["step"] + 2
                    if not driver.wait_for_step(step):
                        raise RuntimeError(f"no step {step} without a fault")
                    driver.inject(kind)
        finally:
            driver.nodes.kill()
    table = hang_table(driver.events)
    (given.out / "table.txt").write_text("\n".join(table) + "\n")
    sys.stdout.write("\n".join(table) + "\n")
    return 0 if all(is_named(event) and not event.problems for event in driver.events) else 1


if __name__ == "__main__":
    sys.exit(main())
