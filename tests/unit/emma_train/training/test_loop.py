"""How long an error waits for a save that runs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from emma_train.checkpoint.saver import SaveFailed
from emma_train.training.loop import LOST_CONTACT_S, Trainer
from tests.helpers import tiny_recipe

CUT_OFF = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation")


@pytest.mark.parametrize(
    ("error", "within_s", "patience_s"),
    [
        (SaveFailed("a disk is full"), 100, 0),
        (ValueError("a mistake on this rank"), 100, 100),
        (CUT_OFF, 100, LOST_CONTACT_S),
        (CUT_OFF, 5, 5),
    ],
)
def test_a_save_gets_less_time_where_other_ranks_are_gone(error: Exception, within_s: int, patience_s: float) -> None:
    trainer: Any = SimpleNamespace(recipe=tiny_recipe(train__stop_within_s=within_s))
    assert Trainer._patience_s(cast(Trainer, trainer), error) == patience_s
