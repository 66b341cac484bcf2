"""Functions that ranks run in the tests of local checkpoints; a rank imports them by name.

A node is a name and a folder: `names` gives that of every rank, as in "aab".
"""

import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from emma_train.checkpoint import dcp, peer_copy, verify
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.local_folder import check_local_folder, local_folder
from emma_train.checkpoint.local_restore import restore_local
from emma_train.checkpoint.nodes import NODE_VARIABLE
from emma_train.checkpoint.saver import Saver
from emma_train.cli import main
from emma_train.config.schema import TrainConfig
from emma_train.engine.world import World, join
from emma_train.errors import RunError, UserError
from emma_train.sequence.step_batches import StepBatches
from emma_train.storage.paths import StoragePath
from emma_train.training.loop import Trainer
from tests.distributed.saving import Job


def on_node(names: str) -> None:
    os.environ[NODE_VARIABLE] = names[int(os.environ.get("RANK", "0"))]


class LocalJob(Job):
    """A job whose saver makes local checkpoints too."""

    def __init__(
        self, world: World, root: Path, seed: int = 0, timeout_s: float = 20, shared: StoragePath | None = None
    ) -> None:
        """`shared`: shared storage; None takes a folder of `root`."""
        super().__init__(world, shared or root / "shared", seed)
        self.folder = local_folder(str(root / "nodes" / "{node}"), "run", self.checkpoints)
        check_local_folder(self.folder, world)
        config = TrainConfig(steps=99, save_every=8, local_every=1)
        self.saver = Saver(self.checkpoints, config, world, timeout_s, self.folder)

    def save_local(self) -> None:
        self.saver.start(self.state, {"step": self.step, "stage": "stage1"}, is_local=True)

    def resume(self, before: int = 99) -> str | None:
        """Resume from the newest checkpoint, a local one only if its step is below `before`; returns its name."""
        restore_local(self.folder, self.checkpoints, self.world, lambda meta: meta["step"] < before)
        checkpoint = verify.find_resumable(self.checkpoints, self.world)
        if checkpoint is None:
            return None
        state = self.state
        dcp.load_training(checkpoint, state)
        self.step = (folders.read_meta(checkpoint) or {})["step"]
        self.saver.resume_from(checkpoint, self.step, state)
        return checkpoint.name


def saved(root: Path, names: str, shared_step: int, local_steps: list[int], **settings: Any) -> dict[str, Tensor]:
    """Save `shared_step` (0: none) to shared storage and the others to the nodes, while the weights change. Returns the
    tensors of the last one."""
    on_node(names)
    with join("cpu", 60) as world:
        job, content = LocalJob(world, root, **settings), {}
        while job.step < max(local_steps):
            job.go()
            if job.step == shared_step:
                job.save()
            elif job.step in local_steps:
                job.saver.finish()
                content = job.content()
                job.save_local()
        job.go()
        job.saver.finish()
        return content


def resumed(root: Path, names: str, before: int = 99, **settings: Any) -> tuple[str | None, dict[str, Tensor]]:
    """The name of the checkpoint that a new job (other seed) resumed from, and its tensors; `before` as above."""
    on_node(names)
    with join("cpu", 60) as world:
        job = LocalJob(world, root, seed=1, **settings)
        return job.resume(before), job.content()


def late(root: Path, rank: int) -> tuple[list[int], str | None]:
    """Local saves while one rank does not answer in that of step 2, for longer than the timeout. Returns the steps with
    a local checkpoint at the end, and what training was stopped by."""
    on_node("ab")
    with join("cpu", 60) as world:
        job = LocalJob(world, root, timeout_s=1)
        exchange = peer_copy.exchange_files

        def slow(*arguments: Any) -> Any:
            if job.step == 2 and world.rank == rank:
                time.sleep(1.5)
            return exchange(*arguments)

        peer_copy.exchange_files = slow
        steps, stopped = [], None
        try:
            for _ in range(4):
                job.go()
                if not job.saver.local_due(job.step):
                    continue
                job.save_local()
                running = job.saver._running
                assert running is not None and running.thread is not None
                running.thread.join(20)
                dist.barrier(group=world.host_group)
                steps += [job.step for folder in folders.list_steps(job.folder) if folders.read_meta(folder)][:1]
            job.saver.finish()
        except RunError as error:
            stopped = str(error)
        return [int(folder.name.removeprefix("step-")) for folder in folders.list_steps(job.folder)], stopped


def killed(root: Path, rank: int) -> tuple[str | None, float]:
    """One rank ends without a word while the copies of step 2 are sent. Returns the error of that local save on the
    other one, and its seconds."""
    on_node("ab")
    with join("cpu", 60) as world:
        job = LocalJob(world, root)
        job.go()
        job.save_local()
        job.saver.finish()
        exchange = peer_copy.exchange_files

        def end(*arguments: Any) -> Any:
            if world.rank == rank:
                os._exit(0)
            return exchange(*arguments)

        peer_copy.exchange_files = end
        job.go()
        started = time.perf_counter()
        job.save_local()
        running = job.saver._running
        assert running is not None and running.thread is not None
        running.thread.join(30)
        return running.error, time.perf_counter() - started


def exchanged(root: Path, to: list[int], sizes: list[list[int]], part_bytes: int, full_rank: int | None) -> str | None:
    """Each rank writes files of given sizes and sends them to the rank `to[rank]`; `full_rank` cannot write. Returns an
    OSError as text."""
    with join("cpu", 20) as world:
        peer_copy.PART_BYTES = part_bytes
        folder = root / str(world.rank)
        (folder / "weights").mkdir(parents=True)
        files = [[(f"weights/{rank}-{i}", size) for i, size in enumerate(of)] for rank, of in enumerate(sizes)]
        for name, size in files[world.rank]:
            (folder / name).write_bytes(os.urandom(size))
        received = {rank: files[rank] for rank in range(world.size) if to[rank] == world.rank}
        if world.rank == full_rank:
            for name, _ in (file for of in received.values() for file in of):
                (folder / name).mkdir()
        try:
            peer_copy.exchange_files(folder, to[world.rank], files[world.rank], received, world.host_group)
        except OSError as error:
            return str(error)
        finally:
            dist.barrier(group=world.host_group)
        return None


def same_folder(root: Path) -> str | None:
    """The error message where two nodes see the same folder."""
    on_node("ab")
    with join("cpu", 60) as world:
        try:
            check_local_folder(root / "both", world)
        except UserError as error:
            return str(error)
        return None


def crashing_command(argv: list[str], names: str, step: int) -> int:
    """A command on nodes that fails on all ranks before an optimizer step; 0 never fails."""
    on_node(names)
    take = Trainer._step

    def fail(self: Trainer, data: StepBatches, *arguments: Any) -> Any:
        if data.step == step:
            raise RunError("the test ends the run here")
        return take(self, data, *arguments)

    Trainer._step = fail  # type: ignore[method-assign]
    return main(argv)
