"""Samples per second of our loader, webdataset and megatron-energon, on the same page-cached shards.

    python tests/bench/stream.py [--json] [--samples 1200] [--repeats 3]

Synthetic photos (JPEG 1024 x 768, about 320 kB) with captions, two worker processes each. `raw`: the bytes of a record
arrive in a worker, ours with their checksum verified and by the plan. `decode`: batches of 32 images at 512 x 512 in
uint8 arrive in the trainer, ours as packs of patches with tokenised captions, webdataset's decoded by PIL (draft mode,
bicubic) and through torch's default collate. `decode_same`: webdataset's with our decoder, so that what is left is the
way from worker to trainer. Readers take turns, and the best of `repeats` counts for each.
"""

import argparse
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as IterableSampler

from data_pipelines.loader.loader import PlannedSlot, Stream
from data_pipelines.planner import sources
from data_pipelines.planner.planner import Planner
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.images import load_image, open_image
from data_pipelines.shards.index import read_columns, read_manifest
from emma_train.config.load import load_recipe
from emma_train.config.schema import ImageConfig, MixConfig, PhaseConfig, Recipe, SourceConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers import tokenizer  # noqa: E402 - the folder above is not a package that is installed
from tests.synthetic import synthetic  # noqa: E402

ROWS = 10_000
"""Rows of a shard in the large index."""
SHARDS, BATCH, SIDE, WORKERS, SLOTS = 8, 32, 512, 2, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", type=int, default=1200, help="records in the shards")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-plan", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.chdir(ROOT)  # paths in recipes count from here
    torch.set_num_threads(1)
    if arguments.only_plan:
        print(json.dumps(only_plan()))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_shards(Path(temporary) / "set", arguments.samples)
        results = read(folder, arguments.samples, arguments.repeats) | resume(folder, arguments.repeats)
    results |= plan() | balance()
    if arguments.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value}")


# --- reading: raw_vs_webdataset, raw_vs_energon, decode_vs_webdataset


def read(folder: Path, num: int, repeats: int) -> dict[str, Any]:
    """Samples per second of each reader, and their ratios."""
    energon, reason = energon_raw(folder)
    raw: dict[str, Callable[[], Iterator[int]]] = {
        "ours": lambda: ours_raw(folder),
        "webdataset": lambda: wds_raw(folder),
    }
    if energon is not None:
        raw["energon"] = energon
    decode: dict[str, Callable[[], Iterator[int]]] = {
        "ours": lambda: ours_decoded(folder),
        "webdataset": lambda: wds_decoded(folder, _by_pil),
        "webdataset_same": lambda: wds_decoded(folder, _by_ours),
    }
    raw_s = best(raw, 6 * num, repeats)
    decode_s = best(decode, 600, repeats)
    return {
        "raw_vs_webdataset": round(raw_s["ours"] / raw_s["webdataset"], 3),
        "raw_vs_energon": round(raw_s["ours"] / raw_s["energon"], 3) if energon is not None else None,
        **({} if energon is not None else {"energon_reason": reason}),
        "decode_vs_webdataset": round(decode_s["ours"] / decode_s["webdataset"], 3),
        "decode_same": round(decode_s["ours"] / decode_s["webdataset_same"], 3),
        **{f"raw_{name}_per_s": round(value) for name, value in raw_s.items()},
        **{f"decode_{name}_per_s": round(value, 1) for name, value in decode_s.items()},
    }


def best(readers: dict[str, Callable[[], Iterator[int]]], num: int, repeats: int) -> dict[str, float]:
    """Samples per second of each reader over `num` samples, without the first tenth, in which processes start."""
    rates = dict.fromkeys(readers, 0.0)
    for _ in range(repeats):
        for name, reader in readers.items():
            batches, warm, done = reader(), 0, 0
            while warm < num // 10:
                warm += next(batches)
            started = time.perf_counter()
            while done < num:
                done += next(batches)
            rates[name] = max(rates[name], done / (time.perf_counter() - started))
            batches.close()  # type: ignore[attr-defined]
    return rates


def recipe_of(folder: Path) -> Recipe:
    """One task, T2I, in packs of BATCH images."""
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "stage1.yaml")
    data = recipe.data
    data.sources, data.phases = [SourceConfig(str(folder))], [PhaseConfig("t2i", 1, MixConfig(t2i=1))]
    data.slots, data.samples_per_step, data.pack_tokens = SLOTS, SLOTS * BATCH, 1 << 20
    data.gen, data.workers, data.prefetch = ImageConfig(side=SIDE), WORKERS, 4
    return recipe


class Bytes(Dataset[int]):
    """Planned samples of a slot -> number of samples that were read, verified and split into their parts."""

    def __init__(self, stream: Stream) -> None:
        self.reader = stream.dataset.reader

    def __getitem__(self, planned: PlannedSlot) -> int:
        return sum(len(self.reader.members(sample)["jpg"]) > 0 for sample in planned.samples)


class Items(IterableSampler):
    """The items that a stream gives to its workers."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[PlannedSlot]:
        return self.stream._planned_slots(1, 400, deque())


def ours_raw(folder: Path) -> Iterator[int]:
    stream = Stream(recipe_of(folder), 0, 1, None)
    yield from DataLoader(Bytes(stream), None, sampler=Items(stream), num_workers=WORKERS, prefetch_factor=4)


def ours_decoded(folder: Path) -> Iterator[int]:
    for step in Stream(recipe_of(folder), 0, 1, None).steps(1, 10_000):
        assert not step.unreadable
        for batch in step.packs:
            assert batch.patches.dtype == torch.uint8
            yield len(batch.keys)


def wds_samples(folder: Path) -> Any:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).repeat().shuffle(100)


def wds_raw(folder: Path) -> Iterator[int]:
    batches = wds_samples(folder).map(_size).batched(BATCH, collation_fn=list)
    for sizes in webdataset.WebLoader(batches, batch_size=None, num_workers=WORKERS, prefetch_factor=4):
        yield len(sizes)


def wds_decoded(folder: Path, decode: Callable[[dict[str, Any]], tuple[torch.Tensor, str]]) -> Iterator[int]:
    samples = wds_samples(folder).map(decode)
    loader = webdataset.WebLoader(samples, batch_size=BATCH, num_workers=WORKERS, prefetch_factor=4)
    for images, captions in loader:
        assert images.dtype == torch.uint8
        yield len(captions)


def _size(sample: dict[str, Any]) -> int:
    return len(sample["jpg"])


def _by_pil(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
    image = Image.open(io.BytesIO(sample["jpg"]))
    image.draft("RGB", (SIDE, SIDE))
    resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)), sample["txt"].decode()


def _by_ours(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
    with open_image(sample["jpg"]) as image:
        return torch.from_numpy(load_image(image, SIDE, SIDE)), sample["txt"].decode()


def energon_raw(folder: Path) -> tuple[Callable[[], Iterator[int]] | None, str]:
    """megatron-energon's reader of the same shards, or the reason why it is missing."""
    try:
        from megatron import energon
        from megatron.energon.flavors import BaseWebdatasetFactory
    except ImportError as error:
        return None, f"{error.name} is not installed"

    tars = [path.name for path in sorted(folder.glob("*.tar"))]
    BaseWebdatasetFactory.prepare_dataset(folder, tars, split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    class Sizes(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(energon.stateless(_energon_size))]

        def batch(self, samples: list[Any]) -> list[int]:
            return [sample["size"] for sample in samples]

    def read() -> Iterator[int]:
        config = energon.WorkerConfig(rank=0, world_size=1, num_workers=WORKERS)
        dataset = energon.get_train_dataset(
            folder, worker_config=config, batch_size=BATCH, shuffle_buffer_size=100, max_samples_per_sequence=100,
            task_encoder=Sizes(),
        )  # fmt: skip
        for batch in energon.get_loader(dataset, prefetch_factor=4):
            yield len(batch)

    return read, ""


def _energon_size(sample: Any) -> dict[str, Any]:
    return {"__key__": sample["__key__"], "__restore_key__": sample["__restore_key__"], "size": len(sample["jpg"])}


def make_shards(folder: Path, num: int) -> Path:
    """Shards of JPEG and caption, from sixteen different photos, which are made in seconds."""
    folder.mkdir(parents=True)
    photos = [_photo(seed) for seed in range(16)]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"shard-{shard:06d}.tar", "w") as tar:
            for number in range(shard, num, SHARDS):
                caption = f"photo {number}: a long caption of what is to be seen in it, at the left and at the right"
                for part, data in (("jpg", photos[number % 16]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index_folder(folder, ROOT / "recipes" / "tiny" / "assets" / "tokenizer")
    for path in folder.glob("*.tar"):
        path.read_bytes()
    return folder


def _photo(seed: int) -> bytes:
    """Detail at several scales, as a photo has."""
    rng, image = np.random.default_rng(seed), np.zeros((768, 1024, 3), np.float32)
    for scale, amount in ((8, 60), (32, 40), (128, 30), (512, 22)):
        noise = rng.integers(0, 256, (scale * 3 // 4, scale, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC)
        image += (np.asarray(layer, np.float32) - 128) * amount / 74
    file = io.BytesIO()
    Image.fromarray((image + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# --- resume_ratio, resume_s: the first packs after a resume, early and late in a large index


def resume(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds from nothing to the first pack after sample 10 and after sample 1,000,000 of two million.

    The rows are those of the real shards, over and over, so that packs can be read.
    """
    entries = read_manifest(folder)["shards"] * (2_000_000 // ROWS // SHARDS)
    manifest = {**read_manifest(folder), "shards": [{**entry, "tags": {"t2i": {"": ROWS}}} for entry in entries]}

    def rows(where: str, name: str, task: str, *_: Any) -> pa.Table:
        table = read_columns(where, name, task, sources.PLANNED)
        return table.take(np.arange(ROWS) % len(table))

    recipe = recipe_of(folder)
    recipe.data.workers = 0
    seconds: dict[int, float] = {10: math.inf, 1_000_000: math.inf}
    with (
        patch.object(sources, "read_manifest", lambda *_: manifest),
        patch.object(sources, "read_columns", rows),
    ):
        for position in [*seconds] * repeats:
            state = {"next": position, "left": [], "tokens": 0}
            recipe.data.samples_per_step, recipe.data.pack_tokens = 0, 8192
            started = time.perf_counter()
            stream = Stream(recipe, 0, 1, None)
            stream.planner.load_task_positions(1, {"t2i": state})
            packs = stream._load(stream._planned_slots(2, 3, deque()))
            next(packs)
            seconds[position] = min(seconds[position], time.perf_counter() - started)
            packs.close()
    return {"resume_ratio": round(seconds[1_000_000] / seconds[10], 3), "resume_s": round(seconds[1_000_000], 3)}


# --- plan_samples_per_s, plan_gib: planning over a manifest of a billion synthetic samples, in a process of its own


def plan() -> dict[str, Any]:
    command = [sys.executable, __file__, "--only-plan"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def only_plan(seconds: float = 10.0) -> dict[str, Any]:
    """Samples planned per second in steps of 64 packs, and the peak memory of the process."""
    with synthetic(10**9):
        planner, num, step = Planner(paper_recipe(), tokenizer()), 0, 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            step += 1
            num += sum(len(slot) for slot in planner.plan(step).slot_items)
            planner.forget(step)
        rate = num / (time.perf_counter() - started)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"plan_samples_per_s": round(rate), "plan_gib": round(gib, 2)}


# --- fill, straggler: how full slots are and how even, on a realistic mix of lengths


def balance() -> dict[str, Any]:
    """Means over 60 steps of 64 packs; `straggler` is of the costliest slot over the mean of its step."""
    with synthetic(10**6):
        planner = Planner(paper_recipe(), tokenizer())
        plans = [planner.plan(step) for step in range(1, 61)]
    return {
        "fill": round(statistics.mean(p.filled for p in plans), 4),
        "straggler": round(statistics.mean(p.straggler for p in plans), 4),
        "straggler_worst": round(max(p.straggler for p in plans), 4),
    }


def paper_recipe() -> Recipe:
    """I2T and T2I at 1:1 and 512 pixels at the paper's sizes, in 64 packs of 8,192 tokens that are filled."""
    recipe = load_recipe(ROOT / "recipes" / "emma-4b" / "stage1.yaml")
    recipe.data.slots, recipe.data.samples_per_step, recipe.data.pack_tokens = 64, 0, 8192
    return recipe


if __name__ == "__main__":
    main()
