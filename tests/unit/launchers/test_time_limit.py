"""SLURM's forms of a time limit, as sbatch's manual lists them."""

import pytest

from emma_train.errors import UserError
from launchers.time_limit import check_grace, limit_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("4:00", 4 * 60),
        ("4:05", 245),
        ("24:00:00", 86_400),
        ("1-0", 86_400),
        ("1-2", 26 * 3600),
        ("1-2:30", 26.5 * 3600),
        ("1-2:30:15", 26.5 * 3600 + 15),
        ("UNLIMITED", float("inf")),
        ("infinite", float("inf")),
        ("0", float("inf")),
    ],
)
def test_every_form_of_slurm(text: str, seconds: float) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["word", "", "1:2:3:4", "-1", "1h", "1-", "4:00 "])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="launch: --time is"):
        limit_seconds(text)


def test_a_job_must_have_time_to_train() -> None:
    check_grace("5:01", 300)
    check_grace("UNLIMITED", 300)
    with pytest.raises(UserError, match=r"--time 4:00 is 240 s, and the run is to stop 300 s before"):
        check_grace("4:00", 300)
    with pytest.raises(UserError, match="would never train"):
        check_grace("5:00", 300)
