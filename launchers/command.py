"""The exact command of a run, `torchrun … -m emma_train train RECIPE key=value …`, and the options of `launch`."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from emma_train.errors import UserError

RANGES = {
    "nproc": (1, 1024),
    "nnodes": (1, 100_000),
    "max-restarts": (0, 1_000_000),
    "gpus-per-node": (0, 1024),
    "cpus-per-process": (1, 4096),
    "grace-s": (1, 1_000_000),
}
"""Lowest and highest value of each option that is a number."""


@dataclass(frozen=True)
class LaunchOptions:
    """How and where a run starts. What it trains is in the recipe."""

    on: str = "torchrun"  # torchrun: this machine (or this node of several); slurm: submit a job
    nproc: int | None = None  # processes on a node; default: its GPUs, or 1
    nnodes: int = 1
    max_restarts: int = 0  # restarts by torchrun itself, after a process died
    node_rank: int | None = None  # torchrun on several nodes: number of this one; node 0 hosts the rendezvous
    rdzv_endpoint: str | None = None  # torchrun on several nodes: HOST:PORT of node 0
    gpus_per_node: int = 8  # slurm; 0: a cluster of CPUs
    cpus_per_process: int = 4  # slurm: CPUs of a process and its loader workers
    time: str = "24:00:00"  # slurm: the job's limit
    grace_s: int = 300  # slurm: seconds to save a checkpoint before the time limit
    job_name: str = "emma"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: Sequence[str] = ()  # slurm: further directives, such as --exclusive or --constraint=h100
    script: str | None = None  # slurm: where to write the script; default: the run folder's logs/slurm.sbatch
    dry_run: bool = False  # print, start nothing

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "LaunchOptions":
        """The options that `add_launch_arguments` parsed; other attributes of the namespace are ignored."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE and the options of `LaunchOptions`. `parse_known_args` returns key=value overrides unparsed."""
    default = LaunchOptions()
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe, as for `train`; key=value overrides may follow")
    parser.add_argument("--on", choices=("torchrun", "slurm"), default=default.on, help="default: %(default)s")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes on a node; default: its GPUs, or 1")
    parser.add_argument("--nnodes", type=int, default=default.nnodes, metavar="N", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the command or script and start nothing")

    torchrun = parser.add_argument_group("--on torchrun")
    torchrun.add_argument("--node-rank", type=int, metavar="I", help="several nodes: which one this is")
    torchrun.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="several nodes: an address of node 0")
    torchrun.add_argument("--max-restarts", type=int, default=default.max_restarts, metavar="N")

    slurm = parser.add_argument_group("--on slurm")
    slurm.add_argument("--gpus-per-node", type=int, default=default.gpus_per_node, metavar="N")
    slurm.add_argument("--cpus-per-process", type=int, default=default.cpus_per_process, metavar="N")
    slurm.add_argument("--time", default=default.time, metavar="H:M:S", help="the job's limit; default: %(default)s")
    slurm.add_argument(
        "--grace-s", type=int, default=default.grace_s, metavar="S", help="time to save before the limit"
    )
    slurm.add_argument("--job-name", default=default.job_name, metavar="NAME")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--account", metavar="NAME")
    slurm.add_argument("--qos", metavar="NAME")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="--KEY=VALUE", help="any further directive")
    slurm.add_argument("--script", metavar="PATH", help="where to write the script; default: the run folder's logs/")


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise UserError on the first value, by option, that is out of its range."""
    for name, count in counts.items():
        low, high = RANGES[name]
        if not low <= count <= high:
            raise UserError(f"launch: --{name} is {count}; it must be at least {low} and at most {high}")


def train_arguments(recipe: str, overrides: Sequence[str] = ()) -> list[str]:
    """Arguments of Python in every process: `-m emma_train train RECIPE key=value …`."""
    return ["-m", "emma_train", "train", recipe, *overrides]


def torchrun_command(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    nproc: int = 1,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
) -> list[str]:
    """The command of one node. Several nodes agree on their ranks at `rdzv_endpoint`, HOST:PORT of node 0."""
    check_counts({"nproc": nproc, "nnodes": nnodes, "max-restarts": max_restarts})
    command = ["torchrun"]
    if nnodes == 1:
        if node_rank not in (None, 0):
            raise UserError(f"launch: --node-rank is {node_rank} but there is 1 node; give --nnodes as well")
        command += ["--standalone", "--nproc-per-node", str(nproc)]
    else:
        if rdzv_endpoint is None or node_rank is None:
            raise UserError(f"launch: {nnodes} nodes need --rdzv-endpoint HOST:PORT (of node 0) and --node-rank")
        if not 0 <= node_rank < nnodes:
            raise UserError(f"launch: --node-rank is {node_rank}; {nnodes} nodes have 0 to {nnodes - 1}")
        command += ["--nnodes", str(nnodes), "--nproc-per-node", str(nproc)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", rdzv_endpoint]
        # torchrun guesses is_host from host names, which fails on a machine with several names.
        command += ["--rdzv-conf", f"is_host={int(node_rank == 0)}"]
    if max_restarts:
        command += ["--max-restarts", str(max_restarts)]
    return command + train_arguments(recipe, overrides)


def torchrun_environment(max_restarts: int = 0) -> dict[str, str]:
    """Further environment variables: with a shared store, most restarts after a killed process hang."""
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if max_restarts else {}


def shell_line(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """`NAME=value … command …` as typed in a shell."""
    return " ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()), shlex.join(command)]
    )


def default_nproc() -> int:
    """Number of CUDA devices of this machine, at least 1."""
    import torch  # here, because `launch --help` and the SLURM script do not need it

    return max(1, torch.cuda.device_count())


def bin_directory() -> Path:
    """Folder of this environment's commands, activated or not."""
    return Path(sys.executable).parent


def run_torchrun(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by the command; does not return. Raises UserError if torchrun is not installed."""
    program = bin_directory() / command[0]
    argv = [str(program) if program.exists() else command[0], *command[1:]]
    sys.stdout.flush()
    try:
        os.execvpe(argv[0], argv, {**os.environ, **environment})
    except FileNotFoundError:
        raise UserError("launch: torchrun is not on this machine; `make setup` installs it with torch") from None
