"""Start a run: replace this process by the command of a node, or submit a job of a SLURM cluster."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.command import run_torchrun, shell_line, torchrun_command, torchrun_environment
from launchers.options import LaunchOptions
from launchers.slurm import Job, slurm_script, submit
from launchers.snapshot import Snapshot, take_snapshot
from launchers.time_limit import check_grace


def launch(
    recipe: Path, recipe_files: Sequence[Path], overrides: Sequence[str], options: LaunchOptions, job: Job
) -> int:
    """Print the exact command or script, then start or submit it. Returns the exit code of sbatch. Raises UserError.

    recipe_files: all files that the recipe reads, itself included.
    """
    if options.on == "slurm":
        check_grace(options.time, options.grace_s)
        if options.dry_run:
            planned = Snapshot(job.logs.parent / "launches" / "DATE-TIME", recipe, "")
            print(slurm_script(overrides, options, job, planned), end="")
            return 0
        command = ["emma-train", "train", str(recipe), *overrides]
        snapshot = take_snapshot(job.logs.parent, recipe, recipe_files, {"command": command, "nodes": options.nnodes})
        return submit(slurm_script(overrides, options, job, snapshot), snapshot.script, job.logs)
    # On a terminal the progress bar needs the terminal itself.
    log = None if sys.stderr.isatty() else job.logs / f"{socket.gethostname()}.log"
    line = torchrun_command(str(recipe), overrides, options, log, job.elastic(options))
    environment = torchrun_environment(options.max_restarts)
    print(shell_line(line, environment))
    if options.dry_run:
        return 0
    run_torchrun(line, environment, job.workdir)
