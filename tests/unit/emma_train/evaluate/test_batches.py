"""The units of work of a benchmark."""

from emma_train.evaluate.batches import WINDOW_BATCHES, fixed_batches
from emma_train.evaluate.benchmark import BenchmarkItem


def items_of(num: int) -> list[BenchmarkItem]:
    return [BenchmarkItem(number, str(number), "") for number in range(num)]


def test_every_item_is_in_one_batch_of_one_size() -> None:
    items, sizes = items_of(101), [(32, 32 * (1 + number % 3)) for number in range(101)]
    batches = fixed_batches(items, sizes, 4)
    assert sorted(item.number for batch in batches for item in batch) == list(range(101))
    for batch in batches:
        assert len(batch) <= 4
        assert len({sizes[item.number] for item in batch}) == 1
        assert max(item.number for item in batch) - batch[0].number < 4 * WINDOW_BATCHES


def test_items_that_follow_do_not_change_a_window_that_is_full() -> None:
    window = 4 * WINDOW_BATCHES
    sizes = [(32, 32 * (1 + number % 3)) for number in range(3 * window)]
    few = fixed_batches(items_of(window), sizes[:window], 4)
    assert fixed_batches(items_of(3 * window), sizes, 4)[: len(few)] == few
