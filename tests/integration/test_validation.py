"""Validation measures the training loss on other samples and leaves no trace in training; the guard warns of
forgetting, and only of that."""

from pathlib import Path
from typing import Any

import pytest

from emma_train.checkpoint import folder as folders
from tests.distributed.engines import LOSSES, WAYS, Way
from tests.distributed.forgetting import forgetting_command
from tests.distributed.spawn import run_ranks
from tests.helpers import ASSETS
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, metrics, stored, train, train_until
from tests.shards import every_task, write_shards

STEPS = 4
_, _, HSDP, ZERO_1, ZERO_2, ZERO_3, TWO_A_PACK = WAYS
HELD_OUT = str(ASSETS / "emoji" / "heldout_drawings")
VALIDATE: dict[str, Any] = {
    "every": 1,
    "sources": [{"path": HELD_OUT}],
    "num_samples": 6,
    "questions": [{"path": HELD_OUT}],
    "num_questions": 16,
}


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, mix = tmp_path_factory.mktemp("validation"), {"i2t": 1, "t2i": 1, "it2i": 1}
    return make_recipe(
        folder, mix=mix, train={"steps": STEPS}, ema={"decay": 0.9}, data={"slots": 4}, validate=VALIDATE
    )


def validated(run: Path) -> list[dict[str, float]]:
    """What each validation of a run measured, without its time."""
    lines = [{key: value for key, value in line.items() if key.startswith("val/")} for line in metrics(run)]
    return [{key: value for key, value in line.items() if key != "val/time_s"} for line in lines if line]


@pytest.mark.parametrize(
    "way",
    [
        Way("FSDP", 1),
        Way("FSDP, 2", 2),
        *(pytest.param(way, marks=pytest.mark.slow) for way in (HSDP, ZERO_1, ZERO_2, ZERO_3, TWO_A_PACK)),
    ],
    ids=lambda way: way.name,
)
def test_validation_changes_no_bit_of_training(recipe: Path, way: Way) -> None:
    """Weights, moments, averages, losses and digests are those of the same run without validation."""
    runs = {name: recipe.parent / f"{way.name} {name}" for name in ("with", "without")}
    for name, every in (("with", 1), ("without", 0)):
        settings = (f"run.name={runs[name].name}", f"validate.every={every}")
        train(recipe, *settings, *way.overrides, processes=way.processes)
    assert learnt(runs["with"]) == learnt(runs["without"])
    one, other = (stored(checkpoint(run, STEPS)) for run in runs.values())
    assert differences(one, other) == []
    assert (len(validated(runs["with"])), len(validated(runs["without"]))) == (STEPS, 0)
    first, *_, last = validated(runs["with"])
    assert set(first) == {
        *(f"val/{which}{name}" for which in ("", "ema/") for name in LOSSES),
        *("val/answers", "val/ema/answers", "val/copy/it2i", "val/forgotten"),
    }
    assert last["val/loss"] < first["val/loss"] and last["val/ema/loss"] < first["val/ema/loss"]
    assert last["val/loss"] != last["val/ema/loss"]


@pytest.mark.parametrize(
    "way",
    [Way("1", 1), *(pytest.param(way, marks=pytest.mark.slow) for way in (*WAYS[:2], HSDP, ZERO_3, TWO_A_PACK))],
    ids=lambda way: way.name,
)
def test_the_held_out_loss_is_the_training_loss_of_the_same_samples(
    make_recipe: MakeRecipe, tmp_path: Path, way: Way
) -> None:
    """One step trains on all 24 samples of a folder at a rate that changes nothing, and validates on that folder. The
    losses agree, though the samples are packed in another way and six packs are divided among four ranks."""
    folder = write_shards(tmp_path / "set", every_task(8))
    sources = [{"path": str(folder)}]
    recipe = make_recipe(
        tmp_path,
        mix={"i2t": 1, "t2i": 1, "it2i": 1},
        data={"sources": sources, "seed": 0, "text_dropout": 0, "reference_dropout": 0, "slots": 4, "pack_tokens": 256},
        optimizer={"lr": 1e-30},
        train={"steps": 1},
        validate={**VALIDATE, "sources": sources, "num_samples": 100, "questions": []},
    )
    train(recipe, *way.overrides, processes=way.processes)
    (line,) = metrics(tmp_path / "stage1")
    assert (line["samples/i2t"], line["samples/t2i"], line["samples/it2i"]) == (8, 8, 8)
    for name in LOSSES:
        assert line[f"val/{name}"] == pytest.approx(line[name], rel=2e-6), name
        assert line[f"val/ema/{name}"] == pytest.approx(line[name], rel=2e-6)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_planted_fall_ends_the_run_after_a_checkpoint(recipe: Path, processes: int) -> None:
    name = f"fall-{processes}"
    argv = ["train", str(recipe), f"run.name={name}", "train.save_every=100", "validate.guard.stop=true"]
    outcomes = run_ranks(processes, forgetting_command, argv, 3)
    assert [outcome.value for outcome in outcomes] == [1] * processes
    assert "step 3: understanding is being forgotten: right answers fell from 90.0% at step 1" in outcomes[0].err
    (line,) = [line for outcome in outcomes for line in outcome.error_lines if "emma-train train:" in line]
    assert "right answers fell from 90.0% at step 1 to 40.0%" in line and "init.from" in line
    assert [values["val/forgotten"] for values in validated(recipe.parent / name)] == [0, 0, 1]
    meta = folders.read_valid_meta(checkpoint(recipe.parent / name, 3))
    assert meta is not None and meta["done"]["best_validation"]["val/answers"] == 0.9


@pytest.mark.slow
def test_a_fall_is_a_warning_where_the_run_shall_go_on(recipe: Path) -> None:
    (outcome,) = run_ranks(1, forgetting_command, ["train", str(recipe), "run.name=warned"], 3)
    assert outcome.value == 0
    assert outcome.err.count("understanding is being forgotten") == 2
    assert [values["val/forgotten"] for values in validated(recipe.parent / "warned")] == [0, 0, 1, 1]


@pytest.mark.slow
def test_the_best_values_outlive_an_interruption_but_not_other_samples(recipe: Path) -> None:
    def best(name: str, step: int) -> dict[str, Any]:
        meta = folders.read_valid_meta(checkpoint(recipe.parent / name, step))
        assert meta is not None
        values: dict[str, Any] = meta["done"]["best_validation"]
        return values

    (outcome,) = run_ranks(1, forgetting_command, ["train", str(recipe), "run.name=stopped", "train.steps=2"], 9)
    assert outcome.value == 0 and best("stopped", 2)["val/answers"] == 0.9
    resumed = ["train", str(recipe), "run.name=stopped"]
    (outcome,) = run_ranks(1, forgetting_command, resumed, 3)
    assert "right answers fell from 90.0% at step 1 to 40.0%" in outcome.err
    assert best("stopped", STEPS)["val/answers step"] == 1
    (outcome,) = run_ranks(1, forgetting_command, [*resumed, "train.steps=5", "validate.num_questions=8"], 3)
    assert "the forgetting guard starts anew" in outcome.err
    assert best("stopped", 5)["val/answers"] == 0.4


@pytest.mark.slow
def test_a_resumed_run_validates_as_the_uninterrupted_one(recipe: Path) -> None:
    train(recipe, "run.name=straight")
    train_until(recipe, 2, "run.name=resumed")
    train(recipe, "run.name=resumed")
    straight, resumed = (validated(recipe.parent / name) for name in ("straight", "resumed"))
    assert [line for line in resumed if line] == [straight[0], *straight[2:]]  # none while shutting down


@pytest.mark.slow
def test_the_checkpoint_with_the_best_validation_is_kept(recipe: Path) -> None:
    """The first step has a rate of zero and those after it ruin the model, so the first validation is the best."""
    settings = ("train.save_every=1", "train.keep=1", "train.keep_best=val/loss/i2t", "optimizer.lr=5")
    train(recipe, "run.name=kept", *settings, "schedule.warmup_steps=4", "optimizer.max_grad_norm=0")
    losses = {line["step"]: line["val/loss/i2t"] for line in metrics(recipe.parent / "kept")}
    best = min(losses, key=lambda step: losses[step])
    assert best < STEPS
    kept = {path.name for path in folders.list_steps(recipe.parent / "kept" / "checkpoints")}
    assert kept == {folders.step_name(best), folders.step_name(STEPS)}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["validate.sources=[{path: nowhere}]"], "validate.sources[0]: nowhere/manifest.json: cannot read"),
        (["validate.questions=[{path: nowhere}]"], "validate.questions[0]: nowhere/manifest.json: cannot read"),
        (["validate.guard.max_dorp=1"], "did you mean validate.guard.max_drop"),
    ],
)
def test_mistakes_are_one_line_before_training(recipe: Path, overrides: list[str], said: str) -> None:
    for outcome in train(recipe, "run.name=never", *overrides, code=2):
        (line,) = outcome.error_lines
        assert said in line, line
    assert not (recipe.parent / "never" / "metrics.jsonl").exists()


@pytest.mark.parametrize("stage", ["stage0", "stage4_router"])
def test_stages_that_only_understand_are_validated_too(make_recipe: MakeRecipe, tmp_path: Path, stage: str) -> None:
    recipe = make_recipe(tmp_path, stage, validate=VALIDATE, init={"from": None, "any_stage": True}, train={"steps": 2})
    train(recipe, processes=2)
    keys = {"val/loss", "val/loss/i2t"}
    keys |= {"val/answers", "val/forgotten"} if stage != "stage4_router" else set()
    assert [set(line) for line in validated(tmp_path / stage)] == [keys, keys]


@pytest.mark.slow
def test_the_guard_is_silent_over_200_clean_steps(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    validate = {**VALIDATE, "every": 20, "num_samples": 48, "num_questions": 64}
    recipe = make_recipe(tmp_path, mix={"i2t": 1, "t2i": 1}, train={"steps": 200, "save_every": 200}, validate=validate)
    train(recipe, timeout_s=280)
    clean = validated(tmp_path / "stage1")
    assert len(clean) == 11 and all(line["val/forgotten"] == 0 for line in clean)
    assert clean[-1]["val/loss/i2t"] < 0.8 * clean[0]["val/loss/i2t"]
