"""What the last line of a job says of the step that fails at every start."""

from pathlib import Path

import pytest

from launchers.repeated_step import describe_steps, repeated_step

RUN = Path("/runs/a")


def test_the_keys_of_one_step_are_named() -> None:
    assert describe_steps(["step 5: b-1 a-2"], RUN) == "; samples of step 5: b-1 a-2"
    many = " ".join(f"k{number}" for number in range(40))
    assert describe_steps([f"step 5: {many}"], RUN).endswith(" k30 k31 and 8 more")


def test_of_several_steps_the_command_is_named() -> None:
    text = describe_steps(["step 11: a", "step 12: b"], RUN)
    assert text == "; step 11 to step 12: `emma-train status /runs/a --next-samples` has their samples"


@pytest.mark.seconds
def test_without_a_run_nothing_is_said(tmp_path: Path) -> None:
    assert describe_steps([], RUN) == ""
    assert repeated_step(tmp_path) == ""
