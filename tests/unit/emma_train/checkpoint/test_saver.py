"""Rules of saving, tested without processes."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from emma_train.checkpoint import verify
from emma_train.checkpoint.save_group import one_line
from emma_train.checkpoint.saver import is_due, is_local_due
from emma_train.checkpoint.staging import Staging
from emma_train.checkpoint.state import checkpoint_state
from emma_train.engine.adam_state import adam_state


@pytest.mark.parametrize(
    ("every", "failed_at", "due"),
    [
        (4, None, [4, 8, 12]),
        (4, 8, [4, 8, 9, 10, 11, 12]),  # a quarter of the interval after the save that failed
        (100, 8, []),
        (20, 3, [8, 9, 10, 11, 12]),
        (1, None, list(range(1, 13))),
        (1, 5, list(range(1, 13))),
    ],
)
def test_a_checkpoint_is_due_every_so_often_and_sooner_after_a_failure(
    every: int, failed_at: int | None, due: list[int]
) -> None:
    def failed_by(step: int) -> int | None:
        return failed_at if failed_at is not None and step > failed_at else None

    assert [step for step in range(1, 13) if is_due(step, every, failed_by(step))] == due


@pytest.mark.parametrize(
    ("every", "last_step", "first_due"),
    [(0, 0, 99), (4, 0, 4), (4, 4, 8), (4, 5, 8), (4, 8, 12), (1, 8, 9), (20, 7, 99)],
)
def test_a_local_checkpoint_is_due_from_the_first_multiple_after_the_last_save(
    every: int, last_step: int, first_due: int
) -> None:
    """A save that runs at that step only delays it."""
    due = [step for step in range(last_step + 1, 13) if is_local_due(step, every, last_step)]
    assert due == list(range(first_due, 13))


def test_staging_copies_into_buffers_that_it_keeps() -> None:
    staging = Staging(torch.device("cpu"))
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.tensor(7.0)}
    first = staging.copy(tensors)
    addresses = {name: value.data_ptr() for name, value in first.items()}
    for tensor in tensors.values():
        tensor += 1
    assert [float(first[name].flatten()[0]) for name in "abc"] == [1, 0, 7]
    second = staging.copy(tensors)
    assert {name: value.data_ptr() for name, value in second.items()} == addresses
    assert all(torch.equal(second[name], tensors[name]) for name in tensors)
    assert staging.copy({"a": torch.ones(5)})["a"].shape == (5,)


def test_the_state_names_every_parameter_once_and_says_which_are_trainable() -> None:
    model = {"a.weight": torch.ones(2), "b.weight": torch.ones(3)}
    moments = {f"a.weight.{key}": torch.zeros(2) for key in ("step", "exp_avg", "exp_avg_sq")}
    engine = SimpleNamespace(state=lambda: {"model": model, "optimizer": moments})
    state = checkpoint_state(engine, {"a.weight": torch.zeros(2)})
    assert state.weights.keys() == {"model.a.weight", "ema.a.weight"}
    assert state.frozen.keys() == {"model.b.weight"}
    assert state.optimizer.keys() == {f"optimizer.{name}" for name in moments}
    assert state.weights["model.a.weight"].data_ptr() == model["a.weight"].data_ptr()


def test_moments_made_for_a_checkpoint_do_not_change_the_first_step() -> None:
    ends = []
    for look in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        if look:
            assert all(float(v.abs().sum()) == 0 for p in model.parameters() for v in adam_state(optimizer, p).values())
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        ends.append([*(p.detach() for p in model.parameters()), *optimizer.state[model.weight].values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_error_becomes_one_line() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/run")
    assert one_line(full) == "No space left on device: /data/run"
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    failed = CheckpointException("write", {3: (full, None), 7: (ValueError("x"), None)})  # type: ignore[dict-item]
    assert one_line(failed) == "rank 3: No space left on device: /data/run"


def test_a_file_that_cannot_be_read_is_a_fault_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    entry = verify.file_entry(tmp_path / "a")
    assert entry["bytes"] == 7
    assert verify._compare(tmp_path / "a", entry) is None
    assert "is damaged" in str(verify._compare(tmp_path / "a", {**entry, "sha256": "0" * 64}))
    assert "is missing on" in str(verify._compare(tmp_path / "b", entry))
