"""The stream's memory does not grow from the first to the fifth epoch."""

import pytest

from tests.distributed.ranks import stream_memory
from tests.distributed.spawn import run_ranks
from tests.helpers import tiny_recipe


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resident_memory_is_flat_over_five_epochs(workers: int) -> None:
    """The emoji set: an epoch of its 1,740 records is 28 steps of 64 samples of each task."""
    mix = {"i2t": 1, "t2i": 1, "it2i": 1}
    recipe = tiny_recipe(
        mix=mix, data__slots=12, data__samples_per_step=192, data__pack_tokens=2048, data__workers=workers,
        data__und={"side": 128}, data__gen={"side": 128},
    )  # fmt: skip
    (outcome,) = run_ranks(1, stream_memory, recipe, [28, 140], timeout_s=250)
    first, last = outcome.value
    assert len(first) == 1 + workers
    assert first.keys() == last.keys()
    for name in first:
        assert last[name] < 1.05 * first[name], f"{name}: {first[name] / 2**20:.0f} -> {last[name] / 2**20:.0f} MiB"
