"""The exact command of a run on one node, `python -m launchers.torchrun … -m emma_train train RECIPE key=value …`."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from emma_train.errors import UserError
from launchers.options import LaunchOptions

ELASTIC_CONF = "last_call_timeout=3"
"""Short, because launchers/elastic.py lets the nodes wait for each other before they meet."""


SAVE_S = 300
"""Seconds that an agent which is asked to stop gives its processes to save."""


@dataclass(frozen=True)
class Elastic:
    """What an elastic job is beside its options."""

    node_counts: Sequence[int]
    """Numbers of nodes that can share the packs of a step, in ascending order."""
    most: int
    run: Path

    @property
    def range(self) -> str:
        """As torchrun takes it."""
        return f"{self.node_counts[0]}:{self.most}"


def train_arguments(recipe: str, overrides: Sequence[str] = ()) -> list[str]:
    """Arguments of Python in every process: `-m emma_train train RECIPE key=value …`."""
    return ["-m", "emma_train", "train", recipe, *overrides]


def torchrun_command(
    recipe: str, overrides: Sequence[str], options: LaunchOptions, log: Path | None, elastic: Elastic | None = None
) -> list[str]:
    """The command of one node. Several nodes agree on their ranks at options.rdzv_endpoint, HOST:PORT of node 0.

    log: a file for a copy of the output. elastic: of a job with --nnodes MIN:MAX. Raises UserError.
    """
    nproc = options.nproc if options.nproc is not None else default_nproc()
    nnodes, node_rank, endpoint = options.nnodes, options.node_rank, options.rdzv_endpoint
    command = ["python", "-m", "launchers.torchrun", *(["--log", str(log)] if log else [])]
    if elastic is not None:
        command += elastic_words(elastic, nproc if has_devices() else 0)
        command += ["--shutdown-timeout", str(SAVE_S)]
    if nnodes == 1 and elastic is None:
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
        nodes = str(nnodes) if elastic is None else elastic.range
        command += ["--nnodes", nodes, "--nproc-per-node", str(nproc)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        # torchrun guesses is_host from host names, which fails on a machine with several names.
        conf = f"is_host={int(node_rank == 0)}"
        command += ["--rdzv-conf", conf if elastic is None else f"{conf},{ELASTIC_CONF}"]
    if options.max_restarts:
        command += ["--max-restarts", str(options.max_restarts)]
    return command + train_arguments(recipe, overrides)


def elastic_words(elastic: Elastic, num_devices: int) -> list[str]:
    """What launchers/torchrun.py must know of an elastic job. num_devices: GPUs of a node."""
    counts = ",".join(str(count) for count in elastic.node_counts)
    return ["--node-counts", counts, "--run", str(elastic.run), "--num-devices", str(num_devices)]


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


def has_devices() -> bool:
    """Whether this machine has NVIDIA GPUs, all of which may have failed."""
    return shutil.which("nvidia-smi") is not None


def bin_directory() -> Path:
    """Folder of this environment's commands, activated or not."""
    return Path(sys.executable).parent


def run_torchrun(command: Sequence[str], environment: Mapping[str, str], workdir: Path) -> NoReturn:
    """Replace this process by the command in `workdir`; does not return."""
    sys.stdout.flush()
    os.chdir(workdir)
    os.execve(sys.executable, [sys.executable, *command[1:]], {**os.environ, **environment})
