"""The units of work of a benchmark: fixed batches of items. Packed matrix products of another size may round otherwise,
so a batch does not depend on the number of ranks, on `--limit` or on what a killed run left."""

from collections.abc import Sequence

from emma_train.evaluate.benchmark import BenchmarkItem, Size

WINDOW_BATCHES = 8
"""Items are grouped by shape within so many batches, so that `--limit` needs few batches beyond its items."""


def fixed_batches(
    items: Sequence[BenchmarkItem], sizes: Sequence[Size], items_per_batch: int
) -> list[tuple[BenchmarkItem, ...]]:
    """All items in batches of one image size, by number. `sizes`: (height, width) of each item's image."""
    batches = []
    window = WINDOW_BATCHES * items_per_batch
    for start in range(0, len(items), window):
        by_size: dict[Size, list[BenchmarkItem]] = {}
        for item, size in zip(items[start : start + window], sizes[start : start + window], strict=True):
            by_size.setdefault(size, []).append(item)
        for members in by_size.values():
            for first in range(0, len(members), items_per_batch):
                batches.append(tuple(members[first : first + items_per_batch]))
    return batches
