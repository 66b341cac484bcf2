"""Runs functions on ranks, and commands, in separate processes.

    run_ranks(2, function, *args)      the function once per rank, forked from a server that has imported torch already
    run_command("train", ..., processes=2)      `python -m emma_train ...` or torchrun, as a user starts them

Both end under a time limit, leave no process behind, and show what every process wrote when one of them fails.
"""

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PRELOAD = ["tests.distributed.preload"]


STARTING = re.compile(r" \[\d+\] (\d+ ranks of type |reading the shard indexes|building the model|loading )")


@dataclass(frozen=True)
class Outcome:
    """The result of a rank or a command."""

    value: Any
    """The function's value, or the command's exit code."""
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """Lines of stderr but for those that every start logs."""
        return [line for line in self.err.splitlines() if line.strip() and not STARTING.search(line)]


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120, grace_s: float = 5
) -> list[Outcome]:
    """Call function(*args) on `size` ranks, with RANK etc. set if there are several.

    Raises AssertionError if one fails, after `grace_s` in which the others may end by themselves.

    The function must be defined at the top of a module (a rank imports it by name), and its value must be picklable.
    """
    with tempfile.TemporaryDirectory() as temporary:
        processes = start_ranks(size, function, *args, folder=Path(temporary))
        late = _wait(processes, time.monotonic() + timeout_s, grace_s)
        outcomes = read_outcomes(size, Path(temporary))
        if late or any(process.exitcode for process in processes):
            codes = [process.exitcode for process in processes]
            problem = f"no end after {timeout_s} s" if late else f"exit codes {codes}"
            raise AssertionError(f"{function.__name__} on {size} ranks: {problem}\n" + _transcript(outcomes))
        return outcomes


def fork_server() -> ForkServerContext:
    """Where processes are forked from, one for this process. It imports what training imports only if it is asked to
    before its first process starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def start_ranks(size: int, function: Callable[..., Any], *args: Any, folder: Path) -> list[BaseProcess]:
    """Start function(*args) on `size` ranks as run_ranks does, and return their processes; use read_outcomes later."""
    context = fork_server()
    port = free_port()
    processes = []
    for rank in range(size):
        (folder / str(rank)).mkdir()
        process = context.Process(target=_rank, args=(function, args, rank, size, port, folder / str(rank)))
        process.start()
        processes.append(process)
    return processes


def read_outcomes(size: int, folder: Path) -> list[Outcome]:
    """What the ranks that start_ranks started have returned and written until now."""
    return [_outcome(folder / str(rank)) for rank in range(size)]


def run_command(
    *argv: str, processes: int = 1, module: str = "emma_train", timeout_s: float = 180, code: int | None = 0
) -> Outcome:
    """Run `python -m MODULE argv` or the same under torchrun; raises if the exit code is not `code` (None: any)."""
    command = start_command(*argv, processes=processes, module=module)
    try:
        out, err = command.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_all(command.pid)
        out, err = command.communicate()
        raise AssertionError(f"{' '.join(argv)}: no end after {timeout_s} s\n{out}\n{err}") from None
    outcome = Outcome(command.returncode, out, err)
    if code is not None and outcome.value != code:
        raise AssertionError(f"{' '.join(argv)}: exit code {outcome.value}, not {code}\n" + _transcript([outcome]))
    return outcome


def start_command(
    *argv: str, processes: int = 1, module: str = "emma_train", restarts: int = 0
) -> subprocess.Popen[str]:
    """Start the command as the leader of a new process group; use kill_all to end it early.

    With `restarts` torchrun starts the processes anew where one of them dies.
    """
    meet = ["--standalone", "--max-restarts", str(restarts)] if restarts else ["--master-port", str(free_port())]
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), *meet, "-m"]
    words = [sys.executable, "-m", *(torchrun if processes > 1 else []), module, *argv]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_all(pid: int) -> None:
    """Send SIGKILL to a process and all its descendants, as if the machine went down."""
    # Parents first, so that no parent sees a child end; torchrun starts its processes in new sessions.
    for member in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def family(pid: int) -> list[int]:
    """The process and all its living descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _rank(function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, port: int, folder: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    os.chdir(ROOT)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        value = function(*args)
        (folder / "value").write_bytes(pickle.dumps(value))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(processes: list[Any], deadline: float, grace_s: float) -> bool:
    """Wait for all; when one fails, kill the others after `grace_s`. True if the deadline passed."""
    failed = False
    while any(process.is_alive() for process in processes):
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
                process.join()
            return not failed
        time.sleep(0.02)
    return False


def _outcome(folder: Path) -> Outcome:
    value = folder / "value"
    texts = [path.read_text(errors="replace") if (path := folder / name).exists() else "" for name in ("out", "err")]
    return Outcome(pickle.loads(value.read_bytes()) if value.exists() else None, *texts)


def _transcript(outcomes: list[Outcome]) -> str:
    return "\n".join(
        f"--- {rank}, stdout\n{o.out[-16_000:]}\n--- {rank}, stderr\n{o.err[-16_000:]}"
        for rank, o in enumerate(outcomes)
    )
