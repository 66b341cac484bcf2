"""Functions that ranks run in the tests of saving; a rank imports them by name, so they are in no test module."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from emma_train.checkpoint import dcp, verify, writer
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import saver as saver_module
from emma_train.checkpoint.saver import Saver
from emma_train.checkpoint.staging import Staging
from emma_train.checkpoint.state import CheckpointState, checkpoint_state
from emma_train.config.schema import TrainConfig
from emma_train.engine.adam_state import adam_state
from emma_train.engine.world import World, join
from emma_train.errors import RunError, UserError
from emma_train.storage.paths import StoragePath
from tests.object_stores import FolderStore


class Job:
    """A small sharded model in training: 7 and 5 rows, which two or three ranks cannot share evenly."""

    def __init__(
        self, world: World, checkpoints: StoragePath, seed: int = 0, save_every: int = 4, **settings: Any
    ) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
        self.model[1].requires_grad_(settings.pop("thaw", False))
        fully_shard(self.model, mesh=dist.init_device_mesh("cpu", (world.size,)))
        learns = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, lr=0.1, fused=True)
        self.averages = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.world, self.checkpoints, self.step = world, checkpoints, 0
        self.saving = 0
        """Step of the last save that was begun."""
        checkpoints.mkdir(parents=True, exist_ok=True)
        timeout_s = settings.pop("timeout_s", 20)
        self.saver = Saver(checkpoints, TrainConfig(steps=99, save_every=save_every, **settings), world, timeout_s)

    @property
    def state(self) -> CheckpointState:
        parameters = dict(self.model.named_parameters())
        moments = {
            f"{name}.{key}": value
            for name, p in parameters.items()
            if p.requires_grad
            for key, value in adam_state(self.optimizer, p).items()
        }
        tensors = {"model": {name: p.detach() for name, p in parameters.items()}, "optimizer": moments}
        return checkpoint_state(SimpleNamespace(state=lambda: tensors), self.averages)

    def go(self, steps: int = 1) -> None:
        """Steps with gradients that are a function of the step and of the position in the full tensor."""
        for _ in range(steps):
            self.step += 1
            self.saver.apply_status(self.world.sum(self.saver.local_status()))
            self.saver.wait_for_staging()
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    gradient = torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(self.step * 100 + len(name))
                    )
                    p.grad = dist.tensor.distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            self.optimizer.step()
            for name, average in self.averages.items():
                average.lerp_(dict(self.model.named_parameters())[name].detach(), 0.5)

    def save(self) -> None:
        self.saver.start(self.state, {"step": self.step, "stage": "stage1"})

    def content(self) -> dict[str, Tensor]:
        """Every full tensor, by name."""
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in self.state.all.items()}


def saved(root: StoragePath, steps: int, **settings: Any) -> dict[str, Tensor]:
    """Train, save while the weights change, and return what was to be saved."""
    with join("cpu", 60) as world:
        job = Job(world, root, **settings)
        job.go(steps)
        content = job.content()
        job.save()
        job.go(1)
        job.saver.finish()
        return content


def resumed(root: StoragePath, steps: int, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a new job (other seed) after it loaded the newest checkpoint, and after more steps and a save."""
    with join("cpu", 60) as world:
        job = Job(world, root, seed=1, **settings)
        checkpoint = verify.find_resumable(root, world)
        assert checkpoint is not None
        state = job.state
        dcp.load_training(checkpoint, state)
        job.step = (folders.read_meta(checkpoint) or {})["step"]
        job.saver.resume_from(checkpoint, job.step, state)
        loaded = job.content()
        job.go(steps)
        job.save()
        job.saver.finish()
        return loaded, job.content()


def slow_staging(root: Path) -> tuple[bool, bool]:
    """Whether staging had ended before, and after, `wait_for_staging`."""
    with join("cpu", 60) as world:
        job, go_on, copied = Job(world, root), threading.Event(), threading.Event()
        copy = Staging.copy

        def wait_and_copy(self: Staging, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            go_on.wait(20)
            staged = copy(self, tensors)
            copied.set()
            return staged

        Staging.copy = wait_and_copy  # type: ignore[method-assign]
        job.go()
        job.save()
        before = copied.is_set()
        threading.Timer(0.2, go_on.set).start()
        job.saver.wait_for_staging()
        after = copied.is_set()
        job.saver.finish()
        return before, after


def one_at_a_time(root: Path) -> tuple[int, list[str]]:
    """The largest number of saves that ran at once, and the checkpoints in the end."""
    with join("cpu", 60) as world:
        job, running, most = Job(world, root, keep=9), 0, 0
        write = writer.CheckpointWriter.write

        def slow(self: Any, *arguments: Any) -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.2)
            size = write(self, *arguments)
            running -= 1
            return size

        writer.CheckpointWriter.write = slow  # type: ignore[method-assign]
        for _ in range(3):
            job.go()
            job.save()
        job.saver.finish()
        return most, sorted(p.name for p in root.glob("step-*"))


def failing(root: Path, where: str, rank: int, fails: list[int], steps: int, save_async: bool) -> dict[str, Any]:
    """Train `steps` steps while the saves of the steps `fails` fail on one rank.

    Returns the steps whose save was begun, the checkpoints in the end, and why the run stopped.
    """
    with join("cpu", 60) as world:
        job = Job(world, root, keep=99, save_async=save_async, timeout_s=1 if where == "time" else 20)
        owner, name = {
            "begin": (folders, "start_folder"),
            "write": (dcp.DcpWriter, "write_data"),
            "time": (dcp, "write_dcp"),
            "checksum": (verify, "file_entry"),
            "commit": (folders, "commit_checkpoint"),
        }[where]
        _break(owner, name, lambda: job.saving in fails and world.rank == rank)
        begun, stopped = _train(job, steps)
        newest = folders.newest_checkpoint(root)
        return {
            "begun": begun,
            "there": sorted(p.name for p in root.rglob("step-*")),
            "newest": newest and newest.name,
            "stopped": stopped,
        }


def _train(job: Job, steps: int) -> tuple[list[int], str | None]:
    """Train, and save when a save is due: the steps whose save was begun, and why the run stopped early."""
    begun = []
    try:
        for _ in range(steps):
            job.go()
            if job.saver.due(job.step):
                job.saving = job.step
                begun.append(job.step)
                job.save()
                _ended(job)
        job.saver.finish()
    except RunError as error:
        return begun, str(error)
    return begun, None


def refused(
    root: StoragePath, kind: str, rank: int, fails: list[int], steps: int
) -> tuple[list[int], list[str], str | None]:
    """Train `steps` steps while the store refuses requests of a kind from one rank in the saves of the steps `fails`.

    Returns the steps whose save was begun, the checkpoints in the end, and why the run stopped.
    """
    with join("cpu", 60) as world:
        job = Job(world, root, keep=99)

        def request(asked: str, path: str) -> None:
            if asked == kind and world.rank == rank and job.saving in fails:
                raise ConnectionError("https://user:secret@endpoint is gone")

        FolderStore.request = staticmethod(request)
        begun, stopped = _train(job, steps)
        job.saving = 0
        return begun, [folder.name for folder in reversed(folders.list_steps(root))], stopped


def refused_loading(root: StoragePath, kind: str, rank: int) -> str:
    """The error message if the store refuses a kind of request from one rank after the checkpoint was verified."""
    with join("cpu", 60) as world:
        job = Job(world, root)
        checkpoint = verify.find_resumable(root, world)
        assert checkpoint is not None

        def request(asked: str, path: str) -> None:
            if asked == kind and world.rank == rank and path.endswith(".distcp"):
                raise ConnectionError("https://user:secret@endpoint is gone")

        FolderStore.request = staticmethod(request)
        try:
            dcp.load_training(checkpoint, job.state)
        except RunError as error:
            return str(error)
        return ""


def killed(root: StoragePath, number: int) -> int:
    """Save steps 3 and 6, and be killed at change `number` of the second save.

    Returns the number of changes of that save if there are fewer.
    """
    with join("cpu", 60) as world:
        job, changes = Job(world, root, keep=1), 0
        job.go(3)
        job.save()
        job.saver.finish()

        def request(asked: str, path: str) -> None:
            nonlocal changes
            if asked in ("put", "copy", "delete"):
                changes += 1
                if changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        FolderStore.request = staticmethod(request)
        job.go(3)
        job.save()
        job.saver.finish()
        return changes


def vanishing(root: Path, what: str, steps: int) -> tuple[list[int], list[str]]:
    """Train while storage disappears before the save of step 8 and returns before that of step 10 (what="storage"), or
    while the frozen weights are removed before the save of step 8 (what="frozen").

    Returns the steps whose save was begun, and the checkpoints in the end.
    """
    with join("cpu", 60) as world:
        job, begun = Job(world, root / "checkpoints", keep=99), []
        for _ in range(steps):
            job.go()
            if world.is_main and what == "storage" and job.step in (8, 10):
                here, away = root / "checkpoints", root / "away"
                here.rename(away) if job.step == 8 else away.rename(here)
            if world.is_main and what == "frozen" and job.step == 8:
                shutil.rmtree(root / "checkpoints" / "frozen")
            dist.barrier(group=world.host_group)
            if job.saver.due(job.step):
                begun.append(job.step)
                job.save()
                _ended(job)
        job.saver.finish()
        return begun, sorted(p.name for p in (root / "checkpoints").glob("step-*"))


def storage_that_hangs(root: Path) -> str:
    """The error message if a save does not end."""
    with join("cpu", 60) as world:
        job = Job(world, root, timeout_s=0.5)
        job.go()
        job.save()
        job.saver.finish()
        write = dcp.write_dcp
        gate = threading.Event()
        dcp.write_dcp = lambda *arguments, **more: (gate.wait(5), write(*arguments, **more))  # type: ignore[assignment]
        job.go()
        job.save()
        try:
            job.go()
            job.saver.start(job.state, {"step": 3, "stage": "stage1"})
        except RunError as error:
            return str(error)
        finally:
            gate.set()
            job.saver.close(20)
        return ""


def chosen(root: StoragePath) -> tuple[str | None, str | None]:
    """The checkpoint that a resume selects, and the error if it selects none."""
    with join("cpu", 60) as world:
        try:
            checkpoint = verify.find_resumable(root, world)
            return checkpoint and checkpoint.name, None
        except UserError as error:
            return None, str(error)


def wrong_storage(root: Path) -> str | None:
    """Each rank writes to a separate folder, as on nodes that share no storage."""
    with join("cpu", 60) as world:
        writer.VISIBLE_S = 0.3
        job = Job(world, root / str(world.rank))
        job.go()
        job.save()
        running = job.saver._running
        job.saver.finish()
        assert running is not None
        return running.error


def _ended(job: Job) -> None:
    """Wait until the save has ended on every rank, without a call of the saver."""
    running = job.saver._running
    if running is not None and running.thread is not None:
        running.thread.join(20)
    dist.barrier(group=job.world.host_group)


def _break(owner: Any, name: str, when: Callable[[], bool]) -> None:
    original = getattr(owner, name)

    def broken(*arguments: Any, **more: Any) -> Any:
        if when():
            raise OSError(28, "No space left on device", "somewhere")
        return original(*arguments, **more)

    setattr(owner, name, broken)


assert saver_module.TRIES_PER_INTERVAL == 4, "the tests of failing saves count on it"
