"""Steps that are not trained (health.skip_steps), and rewinds after a planted spike of the loss."""

import json
from pathlib import Path

import pytest

from emma_train.cli import main
from tests.distributed.failing import spiking_command
from tests.distributed.spawn import Outcome, run_ranks
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, metrics, stored, train, train_until

STEPS, SPIKE = 10, 8
NEVER_SEEN = f"health.skip_steps=[{{first: {SPIKE - 1}, last: {SPIKE}}}]"
"""What a rewind after the spike skips, said from the start."""


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = {"steps": STEPS, "save_every": 4, "log_every": 1}
    return make_recipe(tmp_path_factory.mktemp("windows"), mix={"i2t": 1, "t2i": 1, "it2i": 1}, train=steps)


@pytest.fixture(scope="module")
def unseen(recipe: Path) -> Path:
    """The run that never saw the window."""
    train(recipe, "run.name=unseen", NEVER_SEEN)
    return recipe.parent / "unseen"


def digests(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "digests.jsonl").read_text().splitlines() if line]


def spiking(
    recipe: Path, name: str, *overrides: str, steps: tuple[int, ...] = (SPIKE,), size: int = 1
) -> list[Outcome]:
    words = ["train", str(recipe), f"run.name={name}", "health.spike=rewind", *overrides]
    outcomes = run_ranks(size, spiking_command, words, list(steps), timeout_s=180)
    assert {outcome.value for outcome in outcomes} == {0}, outcomes[0].err
    return outcomes


def assert_same_run(run: Path, other: Path) -> None:
    assert differences(stored(checkpoint(run, STEPS)), stored(checkpoint(other, STEPS))) == []
    assert learnt(run) == learnt(other)
    assert main(["audit", str(run), str(other)]) == 0


def test_skipped_steps_are_neither_read_nor_trained(recipe: Path, unseen: Path) -> None:
    lines = digests(unseen)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["noise/digest"] == "skipped"] == [SPIKE - 1, SPIKE]
    assert [line["step"] for line in metrics(unseen)] == [1, 2, 3, 4, 5, 6, 9, 10]
    before, after = (json.loads((checkpoint(unseen, step) / "meta.json").read_text()) for step in (4, 8))
    assert after["done"]["untrained_steps"] == 2
    assert after["done"]["skip_windows"] == [[SPIKE - 1, SPIKE]] == before["done"]["skip_windows"]
    steps = {float(value) for name, value in stored(checkpoint(unseen, STEPS)).items() if name.endswith(".step")}
    assert steps == {STEPS - 2}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_inside_of_a_window_changes_nothing_and_the_recipe_need_not_say_it_again(
    recipe: Path, unseen: Path, workers: int
) -> None:
    name = f"run.name=stopped-{workers}"
    train_until(recipe, SPIKE - 1, name, NEVER_SEEN, f"data.workers={workers}")
    train(recipe, name)
    assert_same_run(recipe.parent / f"stopped-{workers}", unseen)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_after_a_rewind_the_run_equals_one_that_never_saw_the_spike(recipe: Path, unseen: Path, size: int) -> None:
    run, reference = recipe.parent / f"rewound-{size}", unseen
    if size > 1:
        reference = recipe.parent / f"unseen-{size}"
        train(recipe, f"run.name={reference.name}", NEVER_SEEN, processes=size)
    main_rank, *_ = spiking(recipe, run.name, size=size)
    assert f"step {SPIKE}: rewind 1; steps {SPIKE - 1} to {SPIKE} are skipped" in main_rank.err
    assert "is after a spike: set aside as step-00000008.damaged" in main_rank.err
    assert_same_run(run, reference)
    (line,) = [json.loads(line) for line in (run / "rewinds.jsonl").read_text().splitlines() if line]
    assert (line["first"], line["last"]) == (SPIKE - 1, SPIKE)
    assert {step: len(keys) for step, keys in line["keys"].items()} == {str(SPIKE - 1): 24, str(SPIKE): 24}
    # Steps 5 and 6 were computed again, from the checkpoint of step 4.
    assert [line["step"] for line in digests(run)] == [*range(1, SPIKE + 1), *range(5, STEPS + 1)]


@pytest.mark.slow
def test_a_kill_right_after_the_decision_changes_nothing(recipe: Path, unseen: Path) -> None:
    """A start finds the decision in rewinds.jsonl, beside checkpoints that have trained the window."""
    run = recipe.parent / "decided"
    train(recipe, "run.name=decided", f"train.steps={SPIKE}")
    (run / "rewinds.jsonl").write_text(json.dumps({"first": SPIKE - 1, "last": SPIKE}) + "\n")
    train(recipe, "run.name=decided")
    assert_same_run(run, unseen)


@pytest.mark.slow
def test_a_spike_before_the_first_checkpoint_starts_from_the_beginning(recipe: Path) -> None:
    spiking(recipe, "early", "train.save_every=100")
    train(recipe, "run.name=late", NEVER_SEEN)
    assert_same_run(recipe.parent / "early", recipe.parent / "late")


@pytest.mark.slow
def test_without_rewinds_left_a_spike_is_a_warning(recipe: Path) -> None:
    (outcome,) = spiking(recipe, "warned", "health.max_rewinds=0", f"train.steps={SPIKE}")
    assert f"step {SPIKE}: no rewind, for there were 0 (health.max_rewinds)" in outcome.err
    assert metrics(recipe.parent / "warned")[-1]["health/spike"] == 1


def test_what_was_trained_cannot_be_skipped_any_more(recipe: Path) -> None:
    train(recipe, "run.name=trained", "train.steps=3")
    (outcome,) = train(recipe, "run.name=trained", "train.steps=5", "health.skip_steps=[{first: 2, last: 4}]")
    assert "steps 2 to 3 cannot be skipped: the checkpoint has trained them" in outcome.err
    skipped = [line["step"] for line in digests(recipe.parent / "trained") if line["noise/digest"] == "skipped"]
    assert skipped == [4]
