"""Generates the images of a benchmark that are missing in a folder, on any number of ranks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from emma_train.engine.world import World
from emma_train.evaluate.batches import fixed_batches
from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem, Size, SourceImage, reading
from emma_train.evaluate.image_folder import ImageFolder, grid_of, png
from emma_train.generate.generator import Generator
from emma_train.generate.settings import FlowSettings
from emma_train.monitor.progress import Progress
from emma_train.sequence.request import Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkRun:
    """What to generate, and how."""

    benchmark: Benchmark
    items: Sequence[BenchmarkItem]
    prompts: Sequence[str]
    """What the model is shown for each item: its prompt, or a rewritten one."""
    flow: FlowSettings
    size: Size
    """(height, width) of an image without a source."""
    source_size: Callable[[int, int], Size]
    """(width, height) of a source -> (height, width) at which the model sees it."""
    load_source: Callable[[bytes], np.ndarray]
    """An encoded source as the model sees it: uint8 [H, W, 3]."""
    batch: int
    """Images at once, but at least those of one item."""

    @property
    def items_per_batch(self) -> int:
        return max(1, self.batch // self.benchmark.num_samples)


def write_images(run: BenchmarkRun, generator: Generator, folder: ImageFolder, limit: int, world: World) -> int:
    """Write what is missing of the first `limit` items (0: all); the number of images generated on all ranks."""
    num_wanted = min(limit or len(run.items), len(run.items))
    file_sizes, batches = world.on_main(lambda: _survey(run, folder, num_wanted))
    assigned = batches[world.rank :: world.size]
    if world.is_main:
        num_images = sum(len(batch) for batch in batches) * run.benchmark.num_samples
        log.info("%s: %d images in %d batches are to do", run.benchmark.name, num_images, len(batches))
    progress = Progress(run.benchmark.name, len(assigned), every_steps=10**9) if world.is_main and assigned else None
    for number, batch in enumerate(assigned, 1):
        images = _generate(run, generator, batch)
        for item in batch:
            if item.number < num_wanted:
                _write_item(run.benchmark, folder, item, images[item.number], file_sizes[item.number])
        if progress:
            progress.update(number)
    if progress:
        progress.close()
    return int(world.sum([sum(len(batch) for batch in assigned) * run.benchmark.num_samples])[0])


def _survey(
    run: BenchmarkRun, folder: ImageFolder, num_wanted: int
) -> tuple[list[Size], list[tuple[BenchmarkItem, ...]]]:
    """(height, width) of every item's image file, and the batches of which a file is missing or cannot be read."""
    folder.prepare()
    file_sizes = file_sizes_of(run.benchmark, run.items, run.size)
    shown = [_shown_size(run, item) for item in run.items]
    batches = fixed_batches(run.items, shown, run.items_per_batch)

    def is_incomplete(item: BenchmarkItem) -> bool:
        return item.number < num_wanted and not _is_complete(run.benchmark, folder, item, file_sizes[item.number])

    return file_sizes, [batch for batch in batches if any(is_incomplete(item) for item in batch)]


def file_sizes_of(benchmark: Benchmark, items: Sequence[BenchmarkItem], size: Size) -> list[Size]:
    """(height, width) of every item's image file: that of its reference, or of the model's image, or of the grid."""
    factor = 2 if benchmark.is_grid else 1
    return [
        source_size_of(item.reference) if item.reference else (factor * size[0], factor * size[1]) for item in items
    ]


def source_size_of(source: SourceImage) -> Size:
    """(height, width). Raises UserError."""
    with reading(source):
        return source.size()


def _shown_size(run: BenchmarkRun, item: BenchmarkItem) -> Size:
    """(height, width) of what the model makes."""
    if item.source is None:
        return run.size
    height, width = source_size_of(item.source)
    return run.source_size(width, height)


def _is_complete(benchmark: Benchmark, folder: ImageFolder, item: BenchmarkItem, size: Size) -> bool:
    return all(folder.has_file(path, content) for path, content in benchmark.companions(item).items()) and all(
        folder.has_image(path, size) for path in benchmark.image_files(item)
    )


def _generate(run: BenchmarkRun, generator: Generator, batch: Sequence[BenchmarkItem]) -> dict[int, list[np.ndarray]]:
    """The images of each item of a batch, by its number."""
    requests = []
    for item in batch:
        sources = []
        if item.source is not None:
            with reading(item.source):
                sources.append(run.load_source(item.source.read()))
        size = (sources[0].shape[0], sources[0].shape[1]) if sources else run.size
        task, prompt = ("it2i" if sources else "t2i"), run.prompts[item.number]
        for sample in range(run.benchmark.num_samples):
            seed = run.benchmark.seed(item, sample)
            requests.append(Request(f"{item.name}/{sample}", task, prompt, sources, size, seed))
    images = generator.generate_images(requests, run.flow)
    num = run.benchmark.num_samples
    return {item.number: images[index * num : (index + 1) * num] for index, item in enumerate(batch)}


def _write_item(
    benchmark: Benchmark, folder: ImageFolder, item: BenchmarkItem, images: list[np.ndarray], size: Size
) -> None:
    """Write the files of an item that are missing."""
    for path, content in benchmark.companions(item).items():
        if not folder.has_file(path, content):
            folder.write(path, content)
    for path, samples in benchmark.image_files(item).items():
        if not folder.has_image(path, size):
            shown = Image.fromarray(grid_of(images) if benchmark.is_grid else images[samples[0]])
            if item.reference and (shown.height, shown.width) != size:
                # The judge compares it with the reference, and would stretch it or see another shape.
                shown = shown.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            folder.write(path, png(shown))
