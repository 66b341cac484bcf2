"""How long training waits for a checkpoint, asynchronous or not, and how small a router's checkpoint is.

    python tests/bench/checkpoint.py [--json] [--folder DIR] [--processes 1]

Three short runs of `emma-train train` on the same steps of a model with more than half a gigabyte of state (weights,
moments and averages): saves that training waits for, saves beside training, and no saves but the last. The stall is
what metrics.jsonl says, per save, without the last one, which every run waits for.

What the writing thread takes from the steps beside it is not in the stall, so a loop in this process tells it apart by
the kernel's account of the training thread: seconds per save in which it waited for a core (there is none free), and in
which it neither ran nor waited for one (Python's lock).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.saver import Saver
from emma_train.checkpoint.state import CheckpointState
from emma_train.config.schema import TrainConfig
from emma_train.engine.adam_state import adam_state
from emma_train.engine.world import join

ROOT = Path(__file__).parents[2]
SAVE_EVERY, SAVES = 5, 4
STEPS = SAVE_EVERY * SAVES + SAVE_EVERY // 2
RECIPE: dict[str, Any] = {
    "model": {"decoder": {"hidden": 768, "heads": 12, "kv_heads": 4, "head_dim": 64, "intermediate_size": 2304}},
    "data": {"slots": 2, "samples_per_step": 24},
    "engine": {"device": "cpu", "precision": "fp32"},
    "train": {"steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "sample_from": "", "sample_every": 0},
    "ema": {"decay": 0.99},
}


def run(folder: Path, stage: str, name: str, processes: int, *overrides: str, init: Path | None = None) -> Path:
    """Train a stage; returns its run folder."""
    values = {"extends": str(ROOT / "recipes" / "tiny" / f"{stage}.yaml"), **RECIPE}
    values |= {"run": {"root": str(folder), "name": name}, "init": {"from": str(init) if init else None}}
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(values))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "emma_train", "train", str(recipe)]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    return folder / name


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stall_s(run: Path) -> float:
    """Seconds per save that training waited, without the last save."""
    return sum(line["checkpoint/stall_s"] for line in lines(run)[:-1]) / SAVES


def num_bytes(run: Path) -> int:
    """Bytes that a checkpoint of the run writes."""
    meta = folders.read_valid_meta(folders.find_checkpoint(run))
    assert meta is not None
    return sum(int(entry["bytes"]) for entry in meta["files"].values())


def lost_beside(folder: Path) -> dict[str, float]:
    """Seconds per save that the training thread lost to a concurrent save of 0.9 GB."""
    model = nn.Sequential(*(nn.Linear(760, 760) for _ in range(100)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, lost = torch.randn(256, 760), []
    with join("cpu", 600) as world:
        saver = Saver(folder, TrainConfig(steps=99, save_every=2, keep=1), world, 600)
        for step in range(1, 2 * SAVES + 4):
            before, started = _account(), time.perf_counter()
            for _ in range(4):
                model(inputs).square().mean().backward()
            saver.wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            ran, queued = (after - was for after, was in zip(_account(), before, strict=True))
            lost.append((queued, time.perf_counter() - started - ran - queued))
            saver.finish()
            if step % 2 == 0:
                saver.start(_state(model, optimizer, averages), {"step": step})
        saver.finish()
    with_save, without = lost[4::2], lost[5::2]  # the first save makes its buffers, too
    core, lock = (
        mean(a) - mean(b) for a, b in zip(zip(*with_save, strict=True), zip(*without, strict=True), strict=True)
    )
    return {"no_core_s_per_save": round(core, 4), "lock_s_per_save": round(lock, 4)}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]) -> CheckpointState:
    weights = {f"model.{name}": weight for name, weight in model.named_parameters()}
    moments = {
        f"optimizer.{name}.{key}": value
        for name, weight in model.named_parameters()
        for key, value in adam_state(optimizer, weight).items()
    }
    return CheckpointState({**weights, **{f"ema.{name}": average for name, average in averages.items()}}, moments, {})


def _account() -> tuple[float, float]:
    """Seconds that this thread has run, and that it waited for a core."""
    ran, queued, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return int(ran) / 1e9, int(queued) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", help="where to write, so that its storage is measured (a temporary folder)")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.folder))
    try:
        result = measure(folder, arguments.processes)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value:.4g}")


def measure(folder: Path, processes: int) -> dict[str, float]:
    one_copy = "train.keep=1"
    blocking = run(folder, "stage1", "blocking", processes, "train.save_async=false", one_copy)
    beside = run(folder, "stage1", "beside", processes, "train.save_async=true", one_copy)
    none = run(folder, "stage1", "none", processes, f"train.save_every={10 * STEPS}", one_copy)
    # The router's stage follows three others; one step of each is enough for the size of its checkpoint.
    previous = none
    stem = ("model.vision.stem_expert=true",)
    for stage, more in (("stage2", ()), ("stage3", ()), ("stage4_expert", stem), ("stage4_router", stem)):
        previous = run(folder, stage, stage, processes, "train.steps=2", "data.phases=[]", *more, init=previous)
    stalls = {"blocking": stall_s(blocking), "beside": stall_s(beside)}
    # The first steps warm up, the last one waits for its save.
    steps = {path.name: mean(line["step_s"] for line in lines(path)[2:-1]) for path in (beside, none)}
    full, router = num_bytes(blocking), num_bytes(previous)
    return {
        "processes": processes,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "state_mb": round(full / 1e6, 1),
        "blocking_stall_s": round(stalls["blocking"], 4),
        "async_stall_s": round(stalls["beside"], 4),
        "stall_vs_blocking": round(stalls["beside"] / stalls["blocking"], 4),
        "step_s": round(steps["none"], 3),
        "step_s_with_async_saves": round(steps["beside"], 3),
        "full_bytes": full,
        "router_bytes": router,
        "router_vs_full_bytes": round(router / full, 5),
        **lost_beside(folder),
    }


if __name__ == "__main__":
    main()
