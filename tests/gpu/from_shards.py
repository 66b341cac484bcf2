"""Stage 1 as `emma-train train` runs it (step.py): packs that loader workers read from shards, latents cached.

Shards have random photos of 512² with captions; the autoencoder of the tiny recipes makes the latents. Needs all
packages of `make setup`.
"""

import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.write import tar_writer
from tests.gpu.step_setting import ROOT, Scale, Setting, changes_of, recipe_path

ASSETS = ROOT / "recipes" / "tiny" / "assets"
WARM_UP = 3
"""Steps that are left out: in them layers are compiled and workers start."""
STOP_S = 30
"""Seconds before its time is up in which a measurement ends what it has started."""


def measure_from_shards(setting: Setting, scale: Scale, out: Path, longest_s: float = 600) -> dict[str, Any]:
    """Train some steps, and return what their metrics say, under the names of `step_setting.measure`. Raises
    RuntimeError where training fails, or is not done `STOP_S` before `longest_s` are over."""
    deadline = time.monotonic() + longest_s - STOP_S
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_shards(Path(temporary) / "set", scale)
        rows = train(folder, Path(temporary), setting, scale, deadline)
        log = (Path(temporary) / "log.txt").read_text()
    timed = rows[WARM_UP:]
    return {
        **asdict(setting),
        "micro_steps": scale.micro_steps,
        "tokens_per_micro_step": statistics.mean(row["tokens/total"] for row in timed) / scale.micro_steps,
        "first_step_s": rows[0]["step_s"],
        "step_s": statistics.median(row["step_s"] for row in timed),
        "samples_per_s": statistics.median(16 * scale.micro_steps / row["step_s"] for row in timed),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in timed),
        "mfu": statistics.median(row["mfu"] for row in timed) if "mfu" in timed[0] else None,
        "peak_gib": max(row["memory_gib"] for row in timed),
        "graphs_after_first_step": rows[-1].get("compile/recompiles"),
        "data_wait": sum(row["data/wait_s"] for row in timed) / sum(row["step_s"] for row in timed),
        "autoencoder_loaded": "loading the autoencoder" in log,
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
    }


def make_shards(folder: Path, scale: Scale) -> Path:
    """Photos with captions, and their latents; small ones in a tiny run."""
    side, count = (128, 64) if scale.tiny else (512, 1024)
    folder.mkdir()
    photos = [photo(seed, side) for seed in range(32)]
    for shard in range(4):
        with open(folder / f"shard-{shard:06d}.tar", "wb") as stream, tar_writer(stream) as tar:
            for number in range(shard, count, 4):
                words = np.random.default_rng(number).integers(0, 1000, 12)
                caption = "photo of " + " and ".join(f"number {word}" for word in words)
                tar.write({"__key__": f"{number:06d}", "jpg": photos[number % 32], "txt": caption.encode()})
    index_folder(folder, ASSETS / "tokenizer")
    for mode in ("crop", "buckets"):  # as the recipe resizes images to understand, and images to make
        command = [sys.executable, "-m", "data_pipelines", "cache-latents", str(folder), "--mode", mode]
        command += ["--side", str(side), "--autoencoder", str(ASSETS / "autoencoder")]
        subprocess.run(command, cwd=ROOT, check=True)  # a process of its own, which leaves no memory of the card taken
    return folder


def photo(seed: int, side: int) -> bytes:
    """A JPEG with coarse and fine detail."""
    rng, image = np.random.default_rng(seed), np.full((side, side, 3), 128, np.float32)
    for cells in (4, 16, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128) / 3
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def train(folder: Path, root: Path, setting: Setting, scale: Scale, deadline: float) -> list[dict[str, Any]]:
    """The metrics of the first steps; the run is stopped after them, before it writes a checkpoint of many gigabytes.
    Raises RuntimeError with the end of the log where it ends by itself, or at `deadline` (time.monotonic)."""
    side = 128 if scale.tiny else 512
    num_steps = WARM_UP + 2 * scale.num_steps
    overrides = [
        *changes_of(setting, scale),
        f"run.root={root}",
        "run.name=run",
        f"data.sources=[{{path: {folder}}}]",
        f"data.tokenizer={ASSETS / 'tokenizer'}",
        f"model.autoencoder.path={ASSETS / 'autoencoder'}",
        f"data.slots={scale.micro_steps}",
        f"data.samples_per_step={16 * scale.micro_steps}",
        f"data.und.side={side}",
        f"data.gen.side={side}",
        f"data.workers={2 if scale.tiny else 8}",
        "train.log_every=1",
        "train.sample_every=0",
        "train.sample_from=",
        "validate.every=0",
    ]
    command = [sys.executable, "-m", "emma_train", "train", str(recipe_path(setting)), *overrides]
    log, metrics = root / "log.txt", root / "run" / "metrics.jsonl"
    with open(log, "w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        lines: list[str] = []
        try:
            while len(lines) < num_steps:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("emma-train train: " + log.read_text()[-1500:])
                time.sleep(0.2)
                lines = metrics.read_text().splitlines() if metrics.exists() else []
        finally:
            # With its loader workers: they have the card's files open, which keeps the memory of the run taken.
            with contextlib.suppress(ProcessLookupError):  # where it ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [json.loads(line) for line in lines[:num_steps]]
