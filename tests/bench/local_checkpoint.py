"""How long training waits for a local checkpoint, and how long one takes, beside one on shared storage.

    python tests/bench/local_checkpoint.py [--json] [--mb 400] [--shared DIR] [--local DIR]

Two ranks on this host, each a node, save --mb MB of weights and moments in all, SAVES times each: to a folder that
stands for shared storage, and locally with a copy to the other rank; beside training, and while training waits. Prints
seconds per save: `stall` is what training waits for, `save` what the save takes. Medians, for a first save makes its
buffers and a busy machine disturbs some. Beside training nothing is computed here, so nothing slows the save.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from emma_train.checkpoint.local_folder import check_local_folder, local_folder
from emma_train.checkpoint.local_restore import restore_local
from emma_train.checkpoint.nodes import NODE_VARIABLE
from emma_train.checkpoint.saver import Saver
from emma_train.checkpoint.state import CheckpointState
from emma_train.config.schema import TrainConfig
from emma_train.engine.world import World, join
from tests.distributed.spawn import run_ranks

SAVES, TENSORS = 5, 24


def make_state(world: World, num_mb: int) -> CheckpointState:
    """Weights and twice as many moments, sharded over the ranks."""
    mesh = init_device_mesh("cpu", (world.size,))
    rows = num_mb * 10**6 // 4 // TENSORS // 1024

    def tensors(prefix: str, number: int) -> dict[str, Tensor]:
        values = (torch.randn(rows, 1024) for _ in range(number))
        return {
            f"{prefix}.{i}": distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
            for i, value in enumerate(values)
        }

    return CheckpointState(tensors("model", TENSORS // 3), tensors("optimizer", TENSORS // 3 * 2), {})


def measure(shared: str, local: str, num_mb: int) -> dict[str, float]:
    """Seconds per save, of one rank."""
    os.environ[NODE_VARIABLE] = f"node-{os.environ['RANK']}"
    result: dict[str, float] = {}
    with join("cpu", 600) as world:
        state, step = make_state(world, num_mb), 0
        checkpoints = Path(shared) / "checkpoints"
        folder = local_folder(f"{local}/{{node}}", "bench", checkpoints)
        checkpoints.mkdir(exist_ok=True)
        check_local_folder(folder, world)
        for way, save_async in (("async", True), ("blocking", False)):
            config = TrainConfig(steps=99, save_every=9, local_every=1, keep=1, save_async=save_async)
            saver = Saver(checkpoints, config, world, 600, folder)
            seconds: dict[str, list[tuple[float, float]]] = {"shared": [], "local": []}
            for kind in ["shared", "local"] * SAVES:
                step += 1
                dist.barrier(group=world.host_group)
                started, before = time.perf_counter(), saver.stall_s
                saver.start(state, {"step": step}, is_local=kind == "local")
                saver.wait_for_staging()
                stall_s = saver.stall_s - before
                saver.finish()
                seconds[kind].append((stall_s, time.perf_counter() - started))
            for kind, pairs in seconds.items():
                result[f"{way}_{kind}_stall_s"] = round(median(stall for stall, _ in pairs), 3)
                result[f"{way}_{kind}_save_s"] = round(median(save for _, save in pairs), 3)
        started = time.perf_counter()
        restore_local(folder, checkpoints, world, lambda meta: True)
        result["restore_s"] = round(time.perf_counter() - started, 3)
        assert (checkpoints / f"step-{step:08d}").is_dir()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--shared", help="where a folder for shared storage is made (a temporary folder)")
    parser.add_argument("--local", help="where a folder for the nodes is made (a temporary folder)")
    arguments = parser.parse_args()
    shared = tempfile.mkdtemp(prefix="bench-shared-", dir=arguments.shared)
    local = tempfile.mkdtemp(prefix="bench-local-", dir=arguments.local)
    try:
        outcomes = run_ranks(2, measure, shared, local, arguments.mb, timeout_s=1800)
    finally:
        shutil.rmtree(shared)
        shutil.rmtree(local)
    result = {"mb": arguments.mb, "load": round(os.getloadavg()[0], 1), **outcomes[0].value}
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value:.4g}")


if __name__ == "__main__":
    main()
