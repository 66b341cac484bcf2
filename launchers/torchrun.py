"""torchrun for one node of a run: the same options and the same agent, with the exit code of the trainer, one line
where torchrun prints thirty, and a copy of the output in a file of the node.

`python -m launchers.torchrun [--log FILE] [--slurm] --nproc-per-node 8 … -m emma_train train RECIPE`
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launchers.exit_codes import EXIT_CODES_VARIABLE, FAILED, USAGE, node_exit_code, read_exit_codes


@contextmanager
def _copied_output(log: Path | None) -> Iterator[None]:
    """Output of this process and of those that it starts goes to `log` too."""
    if log is None:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    # A cluster sends TERM to every process of a job: the copy must outlive those that still have something to say.
    ignore = "trap '' TERM USR1 INT; exec tee -a -- \"$0\""
    with subprocess.Popen(["bash", "-c", ignore, str(log)], stdin=subprocess.PIPE) as copy:
        assert copy.stdin is not None
        before = os.dup(1), os.dup(2)
        for stream in (1, 2):
            os.dup2(copy.stdin.fileno(), stream)
        copy.stdin.close()
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for kept, stream in zip(before, (1, 2), strict=True):
                os.dup2(kept, stream)


def run(words: Sequence[str], elastic: argparse.Namespace | None = None) -> int:
    """Start the processes of this node and wait for them. Returns the node's exit code. elastic: the options of an
    elastic job."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_agent

    arguments = parse_args(list(words))
    if arguments.nproc_per_node != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own value, without its warning
    with tempfile.TemporaryDirectory(prefix="emma-exit-codes-") as folder:
        os.environ[EXIT_CODES_VARIABLE] = folder
        stopped = False
        if elastic is not None:
            _use_elastic(arguments, elastic, Path(folder))
        try:
            run_agent(arguments)
            return 0
        except ChildFailedError as error:
            killed = [f"local rank {rank}: {_cause(failure.exitcode)}" for rank, failure in error.failures.items()]
            codes = read_exit_codes(Path(folder))
            if lost := [line for rank, line in zip(error.failures, killed, strict=True) if rank not in codes]:
                sys.stderr.write(f"launch: {'; '.join(lost)}\n")
        except SignalException as error:
            stopped = True
            sys.stderr.write(f"launch: {signal.Signals(error.sigval).name}: all processes of this node have ended\n")
        except RendezvousError as error:
            gone = "" if elastic is None else ", or the node that keeps the rendezvous is gone"
            sys.stderr.write(f"launch: the nodes did not meet at {arguments.rdzv_endpoint}{gone} ({error})\n")
            return FAILED
        except Exception as error:
            if (code := _elastic_end(error)) is None:
                raise
            return code
        return node_exit_code(read_exit_codes(Path(folder)), int(arguments.nproc_per_node), stopped)


def _use_elastic(arguments: argparse.Namespace, elastic: argparse.Namespace, exit_codes: Path) -> None:
    """Let torchrun's agent meet the others by the rules of launchers/elastic.py."""
    from launchers.elastic import UNLIMITED, ElasticJob, use_elastic

    job = ElasticJob(
        tuple(sorted(elastic.node_counts)),
        elastic.run,
        int(arguments.nproc_per_node),
        elastic.num_devices,
        exit_codes,
        arguments.max_restarts or UNLIMITED,
    )
    arguments.rdzv_backend, arguments.max_restarts = use_elastic(job), UNLIMITED


def _elastic_end(error: Exception) -> int | None:
    """Exit code of an elastic job that ended at this node, after a line that says why; None for any other error."""
    from torch.distributed import DistError

    from launchers.elastic import JobEnd

    if isinstance(error, DistError):
        sys.stderr.write(f"launch: the node that keeps the rendezvous is gone ({str(error).splitlines()[0]})\n")
        return FAILED
    if not isinstance(error, JobEnd):
        return None
    sys.stderr.write(f"launch: {error}\n")
    return error.code


def _cause(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def slurm_rendezvous(environment: Mapping[str, str], first_address: str) -> list[str]:
    """torchrun's words for the nodes of an srun, from the variables of one of its tasks, one a node.

    first_address: of the first node. Raises KeyError outside of an srun.
    """
    job, num_nodes = environment["SLURM_JOB_ID"], environment["SLURM_STEP_NUM_NODES"]
    # A port for each job, as in slurm.sbatch: two jobs may share a node.
    endpoint = f"{first_address}:{20000 + int(job) % 12000}"
    words = ["--nnodes", num_nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    words += ["--rdzv-id", f"{job}.{environment['SLURM_STEP_ID']}"]
    return [*words, "--rdzv-conf", f"is_host={int(environment['SLURM_NODEID'] == '0')}"]


def _first_address(nodes: str) -> str:
    """The address by which SLURM reaches the first of some nodes: names of nodes need not be names of hosts."""

    def show(*words: str) -> str:
        return subprocess.run(["scontrol", "show", *words], capture_output=True, text=True, check=True).stdout

    first = show("hostnames", nodes).split()[0]
    match = re.search(r" NodeAddr=(\S+)", show("node", "-o", first))
    return match[1] if match else first


def main() -> int:
    """Take --log, --slurm and the options of an elastic job, and give all other words to torchrun."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--node-counts", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--num-devices", type=int, default=0)
    given, words = parser.parse_known_args()
    if given.slurm:
        if "SLURM_STEP_NODELIST" not in os.environ:
            sys.stderr.write("launch: --slurm is for the nodes of an srun: start it with srun --ntasks-per-node=1\n")
            return USAGE
        words = [*slurm_rendezvous(os.environ, _first_address(os.environ["SLURM_STEP_NODELIST"])), *words]
    with _copied_output(given.log):
        return run(words, given if given.node_counts else None)


if __name__ == "__main__":
    sys.exit(main())
