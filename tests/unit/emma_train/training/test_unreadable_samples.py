"""Two limits of unreadable samples: a count for small runs and a share for long ones."""

import pytest

from emma_train.config.schema import DataConfig
from emma_train.training.unreadable_samples import unreadable_limit


@pytest.mark.parametrize(
    ("num_seen", "share", "limit"),
    [(1_000, 1e-3, 100), (100_000, 1e-3, 100), (1_000_000_000, 1e-3, 1_000_000), (1_000_000_000, 0.0, 100)],
)
def test_the_larger_limit_counts(num_seen: int, share: float, limit: float) -> None:
    assert unreadable_limit(DataConfig(tokenizer="", max_bad_share=share), num_seen) == pytest.approx(limit)
