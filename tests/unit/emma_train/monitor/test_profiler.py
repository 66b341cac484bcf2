"""Traces of steps: which are traced, what is written, and that a full disk stops nothing."""

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from emma_train.config.load import load_recipe
from emma_train.errors import UserError
from emma_train.monitor.profiler import PROFILE_FOLDER, StepProfiler
from tests.helpers import ROOT

CPU = torch.device("cpu")


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profiler.before(step)
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(4) @ torch.ones(4)
        profiler.after(step)
    profiler.close(last)


def traced_steps(path: Path) -> list[int]:
    names = [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    return sorted({int(name.split()[-1]) for name in names if name.startswith("work of step")})


@pytest.mark.parametrize(
    ("first", "last", "file", "steps"),
    [
        (1, 9, "trace-3-5.json.gz", [3, 4, 5]),
        (4, 9, "trace-4-5.json.gz", [4, 5]),  # resumed in the middle
        (1, 4, "trace-3-4.json.gz", [3, 4]),  # stopped in the middle
    ],
)
def test_the_named_steps_are_traced(tmp_path: Path, first: int, last: int, file: str, steps: list[int]) -> None:
    run_steps(StepProfiler([3, 5], tmp_path, CPU), first, last)
    assert [path.name for path in (tmp_path / PROFILE_FOLDER).iterdir()] == [file]
    assert traced_steps(tmp_path / PROFILE_FOLDER / file) == steps


@pytest.mark.parametrize(("steps", "first"), [([], 1), ([3, 5], 6)])
def test_without_steps_nothing_is_written(tmp_path: Path, steps: list[int], first: int) -> None:
    run_steps(StepProfiler(steps, tmp_path, CPU), first, 8)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / PROFILE_FOLDER).write_text("a file")
    with caplog.at_level(logging.WARNING):
        run_steps(StepProfiler([1, 1], tmp_path, CPU), 1, 2)
    assert "the trace cannot be written" in caplog.text


@pytest.mark.parametrize("steps", ["[3]", "[5,3]", "[1,2,3]"])
def test_steps_are_a_first_and_a_last(steps: str) -> None:
    with pytest.raises(UserError, match=r"profile\.steps is .*; it must be the first and the last step"):
        load_recipe(ROOT / "recipes" / "tiny" / "stage1.yaml", [f"profile.steps={steps}"])
