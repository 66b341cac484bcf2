"""Spikes stand out from noise and from a falling loss; garbage is collected when it is due and at no other time."""

import gc
import random
import weakref

import pytest

from emma_train.training.health import GarbageCollection, SpikeWatch, is_spike


def losses(seed: int, count: int = 200) -> list[float]:
    """A loss that falls from 4 to 2 with noise of 5 %."""
    rng = random.Random(seed)
    return [(2 + 2 * 0.98**i) * rng.gauss(1, 0.05) for i in range(count)]


def test_a_noisy_falling_loss_has_no_spike() -> None:
    for seed in range(20):
        watch = SpikeWatch()
        assert [i for i, loss in enumerate(losses(seed)) if watch.note(loss)] == []


def test_a_spike_is_named_with_what_is_usual_and_does_not_hide_the_next() -> None:
    watch = SpikeWatch()
    values = losses(0)
    values[100] = values[101] = values[150] = 9.0
    said = {i: text for i, loss in enumerate(values) if (text := watch.note(loss))}
    assert list(said) == [100, 101, 150]
    assert said[100].startswith("loss 9 is a spike: the median of the last 100 logged is 2.")


def test_a_loss_that_never_moves_may_rise_by_a_hundredth_times_eight() -> None:
    before = [1.0] * 50
    assert not is_spike(1.08, before)
    assert is_spike(1.081, before)
    assert not is_spike(100.0, before[:19])


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_when_it_is_due_and_no_sooner() -> None:
    garbage = GarbageCollection(10)
    try:
        assert not gc.isenabled()
        lost = weakref.ref(Cycle())
        for step in range(1, 10):
            garbage.after(step)
            [Cycle() for _ in range(1000)]  # would have Python collect by itself
        assert lost() is not None
        garbage.after(10)
        assert lost() is None
    finally:
        garbage.restore()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_zero_leaves_it_to_python(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    garbage = GarbageCollection(0)
    assert gc.isenabled() == enabled
    garbage.restore()
    gc.enable()
