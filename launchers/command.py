"""The exact command of a run on one node, `python -m launchers.torchrun … -m emma_train train RECIPE key=value …`."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from emma_train.errors import UserError
from launchers.options import LaunchOptions


def train_arguments(recipe: str, overrides: Sequence[str] = ()) -> list[str]:
    """Arguments of Python in every process: `-m emma_train train RECIPE key=value …`."""
    return ["-m", "emma_train", "train", recipe, *overrides]


def torchrun_command(recipe: str, overrides: Sequence[str], options: LaunchOptions, log: Path | None) -> list[str]:
    """The command of one node. Several nodes agree on their ranks at options.rdzv_endpoint, HOST:PORT of node 0.

    log: a file for a copy of the output. Raises UserError.
    """
    nproc = options.nproc if options.nproc is not None else default_nproc()
    nnodes, node_rank, endpoint = options.nnodes, options.node_rank, options.rdzv_endpoint
    command = ["python", "-m", "launchers.torchrun", *(["--log", str(log)] if log else [])]
    if nnodes == 1:
        if node_rank not in (None, 0):
            raise UserError(f"launch: --node-rank is {node_rank} but there is 1 node; give --nnodes as well")
        command += ["--standalone", "--nproc-per-node", str(nproc)]
    else:
        if endpoint is None or node_rank is None:
            raise UserError(
                f"launch: {nnodes} nodes need --on slurm (or `on: slurm` in a site file); without SLURM, "
                "--rdzv-endpoint HOST:PORT (of node 0) and --node-rank on each node"
            )
        if not 0 <= node_rank < nnodes:
            raise UserError(f"launch: --node-rank is {node_rank}; {nnodes} nodes have 0 to {nnodes - 1}")
        command += ["--nnodes", str(nnodes), "--nproc-per-node", str(nproc)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        # torchrun guesses is_host from host names, which fails on a machine with several names.
        command += ["--rdzv-conf", f"is_host={int(node_rank == 0)}"]
    if options.max_restarts:
        command += ["--max-restarts", str(options.max_restarts)]
    return command + train_arguments(recipe, overrides)


def torchrun_environment(max_restarts: int | None) -> dict[str, str]:
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


def run_torchrun(command: Sequence[str], environment: Mapping[str, str], workdir: Path) -> NoReturn:
    """Replace this process by the command in `workdir`; does not return."""
    sys.stdout.flush()
    os.chdir(workdir)
    os.execve(sys.executable, [sys.executable, *command[1:]], {**os.environ, **environment})
