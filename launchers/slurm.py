"""A run as a SLURM job: the filled-in template slurm.sbatch, written to a file and submitted."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from emma_train.errors import UserError
from launchers.command import (
    LaunchOptions,
    bin_directory,
    check_counts,
    default_nproc,
    run_torchrun,
    shell_line,
    torchrun_command,
    torchrun_environment,
    train_arguments,
)

TIME_LIMIT = re.compile(r"\d+(-\d+)?(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
"""As sbatch takes it."""


def launch(recipe: str, overrides: Sequence[str], options: LaunchOptions, logs: Path) -> int:
    """Print the exact command or script, then replace this process by torchrun, or submit the job.

    logs: the run folder's logs/, for the script and output of a job. Returns the exit code of sbatch. Raises UserError.
    """
    if options.on == "slurm":
        script = slurm_script(recipe, overrides, options, logs=logs, workdir=Path.cwd(), bin_path=bin_directory())
        if options.dry_run:
            print(script, end="")
            return 0
        return submit(script, Path(options.script) if options.script else logs / "slurm.sbatch", logs)
    if options.on != "torchrun":
        raise UserError(f"launch: --on is {options.on!r}; it can be torchrun or slurm")
    command = torchrun_command(
        recipe,
        overrides,
        nproc=options.nproc if options.nproc is not None else default_nproc(),
        nnodes=options.nnodes,
        node_rank=options.node_rank,
        rdzv_endpoint=options.rdzv_endpoint,
        max_restarts=options.max_restarts,
    )
    environment = torchrun_environment(options.max_restarts)
    print(shell_line(command, environment))
    if options.dry_run:
        return 0
    run_torchrun(command, environment)


def slurm_script(
    recipe: str, overrides: Sequence[str], options: LaunchOptions, *, logs: Path, workdir: Path, bin_path: Path
) -> str:
    """The complete batch script: it runs in `workdir` with `bin_path` first in PATH, and writes to `logs`."""
    nproc = options.nproc if options.nproc is not None else options.gpus_per_node or 1
    cpus = options.cpus_per_process
    counts = {"gpus-per-node": options.gpus_per_node, "nnodes": options.nnodes, "nproc": nproc}
    check_counts({**counts, "cpus-per-process": cpus, "grace-s": options.grace_s})
    if not TIME_LIMIT.fullmatch(options.time):
        raise UserError(f"launch: --time is {options.time!r}; write minutes, H:M:S or D-H:M:S")
    directives = {
        "job-name": options.job_name,
        "chdir": str(workdir),
        "output": str(logs / "slurm-%j.out"),
        "nodes": str(options.nnodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(nproc * cpus),
        "gpus-per-node": str(options.gpus_per_node) if options.gpus_per_node else None,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
    }
    lines = [f"--{name}={shlex.quote(value)}" for name, value in directives.items() if value is not None]
    return _fill(
        files("launchers").joinpath("slurm.sbatch").read_text(),
        directives="\n".join(f"#SBATCH {_one_line(line)}" for line in [*lines, *options.sbatch]),
        grace_s=str(options.grace_s),
        bin=shlex.quote(str(bin_path)),
        torchrun=_node_torchrun(options.nnodes, nproc, options.grace_s),
        train=shlex.join(train_arguments(recipe, overrides)),
    )


def submit(script: str, path: Path, logs: Path) -> int:
    """Write the script and submit it with sbatch. Returns the exit code of sbatch."""
    # SLURM does not create the folder of --output: without it, a job fails without a message.
    try:
        for folder in (logs, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    except OSError as error:
        raise UserError(f"launch: --script {path}: cannot be written ({error.strerror}); name another file") from None
    print(shell_line(["sbatch", str(path)]), flush=True)
    if shutil.which("sbatch") is None:
        raise UserError(f"launch: sbatch is not on this machine; submit {path} where SLURM is, or use --on torchrun")
    return subprocess.run(["sbatch", str(path)], check=False).returncode


def _node_torchrun(nnodes: int, nproc: int, grace_s: int) -> str:
    """The torchrun command for a shell on each node, where SLURM_* and EMMA_RENDEZVOUS are set."""
    command = f"torchrun --nproc-per-node {nproc} --shutdown-timeout {grace_s}"
    if nnodes == 1:
        return f"{command} --standalone"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint $EMMA_RENDEZVOUS --rdzv-id $SLURM_JOB_ID"
    return f"{command} --nnodes {nnodes} {rendezvous} --rdzv-conf is_host=$((SLURM_NODEID == 0))"


def _fill(template: str, **values: str) -> str:
    """Replace each {{name}} by its value. Raises KeyError for a name without a value."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _one_line(directive: str) -> str:
    if "\n" in directive or not directive.startswith("--"):
        raise UserError(f"launch: {directive!r} is no sbatch directive; write --KEY=VALUE on one line")
    return directive
