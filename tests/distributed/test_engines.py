"""Changing the engine, the number of ranks or the accumulation changes the speed, not the training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emma_train.stages.stage import STAGES
from tests.distributed.engines import LOSSES, REFERENCE, WAYS, Distance, Way, distance, run, stage_recipe
from tests.helpers import ASSETS
from tests.runs import learnt, metrics

STEPS, FEW = 20, 3
ZERO = "engine.kind=deepspeed"
WAYS_OF_EVERY_STAGE = [
    way for way in WAYS if way.name in ("2 x 2", "ZeRO-2, 2 x 2", "ZeRO-3, 2 x 2", "2 ranks a pack, 1 x 4")
]
"""One of each engine; stage 1, which trains all that can train, is tried in all ways."""
CLOSE = 1e-5


def assert_close(difference: Distance) -> None:
    assert difference.loss <= CLOSE
    # A norm sums the squares of all gradients in float32, so it differs more.
    assert difference.norm <= 1e-4
    assert difference.weights <= CLOSE
    assert difference.averages <= CLOSE
    assert difference.moments <= CLOSE


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe of three steps of all tasks, and its run on one rank."""
    recipe = stage_recipe(tmp_path_factory.mktemp("few"), "stage1", None, FEW)
    return recipe, run(recipe, REFERENCE, "reference")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_engine_trains_the_same(few: tuple[Path, Path], way: Way) -> None:
    recipe, reference = few
    trained = run(recipe, way, way.name)
    assert_close(distance(trained, reference, FEW))
    for one, other in zip(metrics(trained), metrics(reference), strict=True):
        assert 0 <= one["ranks/slowest"] < way.processes and "ranks/slowest" not in other
        assert 0 < one["ranks/step_s_mean"] <= one["ranks/step_s_max"]
        assert one["ranks/slowest_memory_gib"] > 0
        norms, expected = group_norms(one), group_norms(other)
        assert norms.keys() == expected.keys() == set(STAGES["stage1"].trainable)
        assert norms == pytest.approx(expected, rel=1e-4)
        for line, by_group in ((one, norms), (other, expected)):
            assert sum(norm**2 for norm in by_group.values()) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-5)


def group_norms(line: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("grad_norm/"): line[key] for key in line if key.startswith("grad_norm/")}


@pytest.mark.parametrize(
    "way",
    [
        Way("replicas that keep frozen units whole", 2, ("engine.replicate=2", "engine.frozen=replicated")),
        Way("host memory, no prefetch", 2, ("engine.offload_optimizer=true", "engine.prefetch=0")),
        Way("2 ranks a pack, 2 x 2", 4, ("engine.sequence_parallel=2", "engine.activation_checkpointing=full")),
        Way("4 ranks a pack with 2 key heads", 4, ("engine.sequence_parallel=4",)),
        Way(
            "2 ranks a pack, ZeRO-3", 2, ("engine.sequence_parallel=2", "engine.kind=deepspeed", "engine.zero_stage=3")
        ),
        Way("two layers ahead", 2, ("engine.prefetch=2", "engine.reshard_after_forward=false")),
        *(
            Way(
                f"ZeRO-{n}, host memory",
                2,
                ("engine.kind=deepspeed", f"engine.zero_stage={n}", "engine.offload_optimizer=true"),
            )
            for n in (1, 2, 3)
        ),
    ],
    ids=lambda way: way.name,
)
@pytest.mark.slow
def test_policies_of_memory_change_nothing(few: tuple[Path, Path], way: Way) -> None:
    recipe, reference = few
    assert_close(distance(run(recipe, way, way.name), reference, FEW))


def test_a_checkpoint_of_one_engine_goes_on_under_another(few: tuple[Path, Path]) -> None:
    """Another engine and another number of ranks at every step."""
    recipe, reference = few
    for step, (processes, *overrides) in enumerate(
        [(2, ZERO, "engine.zero_stage=3"), (1, "engine.kind=fsdp"), (2, ZERO, "engine.zero_stage=1")], start=1
    ):
        run(recipe, Way("", processes, tuple(overrides)), "chain", f"train.steps={step}")
    assert_close(distance(recipe.parent / "chain", reference, FEW))


@pytest.mark.slow
def test_every_engine_draws_the_same_samples(tmp_path: Path) -> None:
    """Images agree within one level of 255 and answers exactly; both come from averaged weights, swapped in."""
    shown = {"train__sample_from": str(ASSETS / "emoji" / "heldout_drawings"), "train__num_samples": 2}
    recipe = stage_recipe(tmp_path, "stage1", None, FEW, **shown)
    reference = run(recipe, REFERENCE, "reference") / "samples" / f"step-{FEW:08d}"
    names = sorted(path.name for path in reference.iterdir())
    assert len([name for name in names if name.endswith(".png")]) >= 6
    for way in WAYS[2:]:
        samples = run(recipe, way, way.name) / "samples" / reference.name
        assert sorted(path.name for path in samples.iterdir()) == names
        assert (samples / "samples.json").read_text() == (reference / "samples.json").read_text()
        for name in names:
            if name.endswith(".png"):
                one, other = (np.asarray(Image.open(folder / name)).astype(int) for folder in (reference, samples))
                assert np.abs(one - other).max() <= 1, (way.name, name)


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """A recipe of fifty steps, and its losses on one rank in float32."""
    recipe = stage_recipe(tmp_path_factory.mktemp("fifty"), "stage1", None, 50)
    return recipe, learnt(run(recipe, REFERENCE, "fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way("FSDP", 2), *WAYS[3:6]], ids=lambda way: way.name)
def test_fifty_steps_in_bf16_lose_what_float32_loses(fifty: tuple[Path, list[dict[str, float]]], way: Way) -> None:
    """Each task's loss agrees within 1 % in every step."""
    recipe, exact = fifty
    rounded = learnt(run(recipe, way, way.name, "engine.precision=bf16"))
    for one, other in zip(exact, rounded, strict=True):
        for key in LOSSES:
            assert other[key] == pytest.approx(one[key], rel=0.01)
    assert exact[-1]["loss"] < 0.8 * exact[0]["loss"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Every stage for twenty steps on one rank, started from the previous one: its recipe and run."""
    root = tmp_path_factory.mktemp("chain")
    made: dict[str, tuple[Path, Path]] = {}
    previous = None
    for stage in STAGES:
        recipe = stage_recipe(root, stage, previous, STEPS)
        made[stage] = recipe, run(recipe, REFERENCE, stage)
        previous = str(made[stage][1])
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "way"),
    [(stage, way) for stage in STAGES for way in (WAYS if stage == "stage1" else WAYS_OF_EVERY_STAGE)],
    ids=lambda value: value.name if isinstance(value, Way) else value,
)
def test_twenty_steps_of_every_stage(chain: dict[str, tuple[Path, Path]], stage: str, way: Way) -> None:
    recipe, reference = chain[stage]
    assert_close(distance(run(recipe, way, f"{stage}-{way.name}"), reference, STEPS))
