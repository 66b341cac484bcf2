"""Runs a job: many independent tasks, one for each input shard, on Ray or in this process; can be killed and run again.

A task writes its files under temporary names, renames them, and then writes its marker. The marker has the counts, the
sizes of the files and the fingerprint of what they were made from (shard, operator, version, settings). A task whose
marker has the same fingerprint is finished and is never run again. Files depend on nothing but the fingerprint, so
they are the same after any interruption and with any number of workers. Two processes that run one task at once, such
as a worker that outlives its killed driver for a moment, write the same bytes under different temporary names.
"""

import json
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.prepare.job_progress import JobProgress
from emma_train.errors import RunError, UserError

log = logging.getLogger(__name__)
QUEUED_PER_WORKER = 2
"""Tasks given to the engine at once, for each worker: memory does not grow with the number of shards."""
TASK_RETRIES = 3
"""How often Ray starts a task again whose process died."""
RAY_STARTS = 3
"""How often a local Ray is tried to be started; it gives up after 30 s, which a busy machine may need."""
CONNECT_S = 30.0
"""How long a Ray cluster may take to accept a connection; Ray itself would wait without end."""
LOCAL_RAY = {"address": "local", "include_dashboard": False, "object_store_memory": 128 << 20}
"""Of `ray.init`. Little shared memory: tasks exchange names and counts only."""


@dataclass(frozen=True)
class RecordCounts:
    """Records of a task or a job: read = kept + rejected."""

    read: int = 0
    kept: int = 0
    rejected: int = 0

    def __add__(self, other: "RecordCounts") -> "RecordCounts":
        return RecordCounts(self.read + other.read, self.kept + other.kept, self.rejected + other.rejected)


@dataclass(frozen=True)
class ShardTask:
    """One input shard and what is made of it."""

    name: str
    """Shown to people."""
    marker: Path
    outputs: tuple[Path, ...]
    """Files that it may write, all beside the marker."""
    fingerprint: dict[str, Any]
    """All that its files depend on, as plain values."""
    arguments: tuple[Any, ...] = ()
    """Of the job's function; small, they are sent to workers."""
    num_rows: int = 0
    """Index rows of the shard, for estimates."""


@dataclass(frozen=True)
class JobOptions:
    """How a job is run."""

    workers: int = 1
    """Tasks at once. 1, without an address, runs them in this process."""
    address: str = ""
    """Of a Ray cluster, as `ray.init` takes it; empty starts a local Ray."""
    cpus: float = 1
    """Per task."""
    gpus: float = 0


@dataclass
class JobResult:
    """What a job did, in this run and before."""

    counts: RecordCounts = field(default_factory=RecordCounts)
    """Of all finished tasks."""
    finished_before: int = 0
    finished_now: int = 0
    failures: list[str] = field(default_factory=list)
    """A line for each task that failed."""


ShardWork = Callable[..., RecordCounts]
"""A module-level function that makes a task's files from `ShardTask.arguments`, with `writing` for each of them. It is
called with the task and its arguments. A UserError ends the job; a RunError fails the task alone."""


def unfinished(tasks: Sequence[ShardTask]) -> tuple[list[ShardTask], RecordCounts]:
    """The tasks that are still to do, and the counts of the others."""
    rest, counts = [], RecordCounts()
    for task in tasks:
        known = finished_counts(task)
        if known is None:
            rest.append(task)
        else:
            counts += known
    return rest, counts


def finished_counts(task: ShardTask) -> RecordCounts | None:
    """The counts of a finished task, or None: its marker is missing or of another fingerprint, or a file of it has
    another size than the marker says."""
    try:
        marker = json.loads(task.marker.read_text(encoding="utf-8"))
        if marker["fingerprint"] != json.loads(json.dumps(task.fingerprint)):
            return None
        sizes = {path.name: path.stat().st_size for path in task.outputs if path.exists()}
        return RecordCounts(**marker["counts"]) if sizes == marker["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_job(title: str, tasks: Sequence[ShardTask], work: ShardWork, options: JobOptions) -> JobResult:
    """Run the unfinished tasks. Raises UserError where `work` does, and RunError where tasks failed."""
    rest, counts = unfinished(tasks)
    result = JobResult(counts, len(tasks) - len(rest))
    for task in rest:
        _remove_leftovers(task)
    in_process = options.workers == 1 and not options.address
    results = _in_process(rest, work) if in_process else _on_ray(rest, work, options)
    with JobProgress(title, len(rest)) as progress:
        for task, outcome in results if rest else ():
            _remove_leftovers(task)  # of a process that died; another one has finished the task
            if isinstance(outcome, RecordCounts):
                result.counts += outcome
                result.finished_now += 1
                progress.advance(outcome.read, outcome.rejected)
            else:
                result.failures.append(f"{task.name}: {outcome}")
                progress.advance(0, 0)
    if result.failures:
        more = f" (and {len(result.failures) - 1} more)" if result.failures[1:] else ""
        raise RunError(f"{title}: {len(result.failures)} of {len(tasks)} shards failed; {result.failures[0]}{more}")
    return result


def do_task(task: ShardTask, work: ShardWork) -> RecordCounts:
    """Run one task in this process and write its marker."""
    task.marker.unlink(missing_ok=True)
    counts = work(task, *task.arguments)
    if counts.read != counts.kept + counts.rejected:
        raise AssertionError(f"{task.name}: {counts} do not add up")
    files = {path.name: path.stat().st_size for path in task.outputs if path.exists()}
    marker = {"fingerprint": task.fingerprint, "counts": asdict(counts), "files": files}
    with writing(task.marker) as path:
        path.write_text(json.dumps(marker, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return counts


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path of this process alone, at which the block writes a file that then replaces the file `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(task: ShardTask) -> None:
    for path in (*task.outputs, task.marker):
        for leftover in path.parent.glob(f"{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def _in_process(tasks: Sequence[ShardTask], work: ShardWork) -> Iterator[tuple[ShardTask, RecordCounts | str]]:
    for task in tasks:
        yield task, _outcome(task, work)


def _outcome(task: ShardTask, work: ShardWork) -> RecordCounts | str:
    """The counts of a task, or why it failed. Raises UserError."""
    try:
        return do_task(task, work)
    except RunError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror or error} ({error.filename or task.marker.parent})"


def _outcome_or_user_error(task: ShardTask, work: ShardWork, folder: str) -> RecordCounts | str | tuple[str]:
    """As `_outcome`, in the folder in which the command runs; the message of a UserError comes as a tuple, because Ray
    would wrap the error in its own."""
    try:
        os.chdir(folder)
    except OSError as error:
        return (f"{folder}: not on {socket.gethostname()} ({error.strerror}); run in a folder that all machines see",)
    try:
        return _outcome(task, work)
    except UserError as error:
        return (str(error),)


def _on_ray(
    tasks: Sequence[ShardTask], work: ShardWork, options: JobOptions
) -> Iterator[tuple[ShardTask, RecordCounts | str]]:
    """Outcomes in the order in which tasks finish."""
    ray = start_ray(options)
    check_gpus_of(ray, options)
    remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=TASK_RETRIES)(_outcome_or_user_error)
    waiting, running = iter(tasks), dict[Any, ShardTask]()
    try:
        while True:
            while len(running) < options.workers * QUEUED_PER_WORKER and (task := next(waiting, None)) is not None:
                running[remote.remote(task, work, os.getcwd())] = task
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ready)
            try:
                outcome = ray.get(ready)
            except ray.exceptions.WorkerCrashedError:
                outcome = f"its process died {TASK_RETRIES + 1} times (out of memory?); run again with fewer --workers"
            except ray.exceptions.OutOfMemoryError:
                outcome = "out of memory; run again with fewer --workers"
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0]
                raise RunError(f"Ray stopped ({reason}); run again, finished shards are kept") from None
            if isinstance(outcome, tuple):
                raise UserError(outcome[0])
            yield task, outcome
    finally:
        with suppress(ray.exceptions.RayError):
            for reference in running:
                ray.cancel(reference, force=True)


def start_ray(options: JobOptions) -> Any:
    """The module ray, connected: to the cluster of the address, or to a local Ray of this process, which is started
    once and is as large as the first job asks for. Raises UserError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("more than one worker needs ray; pip install 'emma-train[data]', or --workers 1") from None
    if ray.is_initialized():
        return ray
    if options.address:
        _check_answers(options.address)
    cpus = max(1, round(options.workers * max(options.cpus, 0.001)))
    where: dict[str, Any] = {"address": options.address} if options.address else LOCAL_RAY | {"num_cpus": cpus}
    for attempt in range(RAY_STARTS):
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
            break
        except Exception as error:  # it raises Exception itself where a busy machine starts its processes too slowly
            ray.shutdown()
            reason = " ".join(str(error).split())[:300]
            if options.address:
                raise UserError(
                    f"--address {options.address}: no connection to its Ray ({reason}); a cluster that wants a token "
                    "needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its machines, and all need one version of ray"
                ) from None
            if attempt + 1 == RAY_STARTS:
                raise UserError(f"a local Ray: does not start ({reason})") from None
    return ray


def check_gpus_of(ray: Any, options: JobOptions) -> None:
    """Raise UserError where a local Ray has too few GPUs for a task, which would wait without end. A machine of a
    cluster may join later."""
    known = ray.cluster_resources().get("GPU", 0)
    if options.gpus <= known:
        return
    if not options.address:
        raise UserError(f"--gpus {options.gpus:g}: this machine has {known:g} for Ray; give fewer, or --address")
    log.warning("--gpus %g: the cluster has %g now; tasks wait until a machine with GPUs joins", options.gpus, known)


def _check_answers(address: str) -> None:
    """Raise UserError where nothing listens at the host:port of an address."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # a name such as `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--address {address}: nothing answers there ({reason}); give host:port of a cluster that "
            "`ray start --head` started"
        ) from None
