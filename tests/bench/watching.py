"""What it costs to watch a run in which nothing fails, as a share of the CPU time of its steps.

    python tests/bench/watching.py [--json] [--steps 24]

Trains the tiny Stage 1 on two ranks with every step logged and `health.spike: rewind`. `trainer` is what the trainer's
thread spends in digests of data and noise, the ledger, the watch for spikes and the messages to the watch for stalls,
by a profiler, which makes small calls look longer; `threads` is what the threads of heartbeat, stall watch and run
lock spend. They wake by the clock, so that on a machine with other work their share of a step is too high.
"""

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WATCHING = ("step_digests.py", "time_ledger.py", "goodput.py", "rewind.py", "skip_windows.py", "stall_watch.py")
THREADS = ("heartbeat", "stall-watch", "lock")
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "stage1.yaml"


def train(out: Path, argv: list[str]) -> None:
    """Train on this rank, and write CPU seconds of the steps, and of what watches them, by file and thread."""
    from emma_train.cli import main
    from emma_train.training.loop import Trainer

    by_thread = dict.fromkeys(THREADS, 0.0)
    run_thread, run_trainer, profile = threading.Thread.run, Trainer.train, cProfile.Profile(time.thread_time)

    def timed(thread: threading.Thread) -> None:
        started = time.thread_time()
        run_thread(thread)
        if thread.name in by_thread:
            by_thread[thread.name] += time.thread_time() - started

    def profiled(*arguments: Any) -> Any:
        return profile.runcall(run_trainer, *arguments)

    threading.Thread.run, Trainer.train = timed, profiled  # type: ignore[assignment,method-assign]
    started = time.process_time()
    code = main(argv)
    if code:
        sys.exit(code)
    by_file = dict.fromkeys(WATCHING, 0.0)
    steps = time.process_time() - started
    for (path, _, function), (*_, seconds, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        name = Path(path).name
        if name in by_file:  # calls from another file, with all that they call
            by_file[name] += sum(call[3] for (caller, *_), call in callers.items() if Path(caller).name != name)
        elif (name, function) == ("loop.py", "train"):
            steps = seconds
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps({"steps": steps, **by_file, **by_thread}))


def measure(num_steps: int) -> dict[str, float]:
    """Shares of the steps, of the rank that spends most."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.root={folder}", "run.name=run", "init.from=null", "init.any_stage=true", "train.sample_from=",
            f"train.steps={num_steps}", "train.log_every=1", "train.save_every=1000", "validate.every=0",
            "health.spike=rewind",
        ]  # fmt: skip
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launcher, __file__, "--rank", folder, "train", str(RECIPE), *settings], check=True, stdout=2)
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
    shares = [{name: seconds / rank["steps"] for name, seconds in rank.items() if name != "steps"} for rank in ranks]
    worst = max(shares, key=lambda share: sum(share.values()))
    totals = {"trainer": sum(worst[name] for name in WATCHING), "threads": sum(worst[name] for name in THREADS)}
    return {**worst, **totals, "all": sum(totals.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    shares = measure(given.steps)
    lines = [json.dumps(shares)] if given.json else [f"{name:16} {share:.3%}" for name, share in shares.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        train(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
