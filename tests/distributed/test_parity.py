"""The same recipe on 1, 2 and 3 processes: the same data, the same losses, the same gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from emma_train.checkpoint import folder as folders
from tests.distributed.ranks import one_step, stream_steps
from tests.distributed.spawn import run_ranks
from tests.helpers import recipe_values, tiny_recipe, write_export, write_recipe
from tests.runs import checkpoint, learnt, metrics, stored, train

STEPS = 20
LOSSES = ("loss", "loss/i2t", "loss/t2i", "loss/it2i", "grad_norm")


def relative(one: float, other: float) -> float:
    return abs(one - other) / abs(one)


def whole_norm(step: dict[str, Any]) -> float:
    """Norm of a step's gradients in float64."""
    return float(sum(g.double().square().sum() for g in step["gradients"].values()).sqrt())


def values(tmp_path: Path, stage: str = "stage1", **dotted: Any) -> dict[str, Any]:
    settings = {"run__root": str(tmp_path), "data__slots": 6, "data__samples_per_step": 18, **dotted}
    return recipe_values(stage, **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run folders of twenty steps, by the number of processes."""
    root = tmp_path_factory.mktemp("parity")
    settings = {"train__steps": STEPS, "train__save_every": 1000, "ema__decay": 0.9, "optimizer__weight_decay": 0.01}
    recipe = write_recipe(root / "recipe.yaml", values(root, **settings))
    for size in (1, 2, 3):
        train(recipe, f"run.name=n{size}", processes=size)
    return {size: root / f"n{size}" for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
def test_twenty_steps_lose_the_same_on_the_same_data(runs: dict[int, Path], size: int, record_property: Any) -> None:
    alone, together = learnt(runs[1]), learnt(runs[size])
    assert [line["step"] for line in alone] == list(range(1, STEPS + 1))
    exact = (
        "step",
        "data/digest",
        "data/straggler",
        "lr",
        "samples/i2t",
        "samples/t2i",
        "samples/it2i",
        "tokens/total",
    )
    for one, other in zip(alone, together, strict=True):
        assert [one[key] for key in exact] == [other[key] for key in exact]
    assert len({line["data/digest"] for line in alone}) == STEPS
    worst = {
        key: max(relative(one[key], other[key]) for one, other in zip(alone, together, strict=True)) for key in LOSSES
    }
    record_property("largest relative difference", worst)
    print(f"\n{size} processes against 1, largest relative difference over {STEPS} steps: {worst}")
    assert max(worst[key] for key in LOSSES if key != "grad_norm") <= 1e-5
    # The norm is a sum over every gradient of the model, so its rounding is larger than that of a loss.
    assert worst["grad_norm"] <= 1e-4
    assert alone[-1]["loss"] < alone[0]["loss"]


@pytest.mark.parametrize("size", [2, 3])
def test_weights_optimizer_and_averages_agree_after_twenty_steps(runs: dict[int, Path], size: int) -> None:
    one, other = (stored(checkpoint(runs[n], STEPS)) for n in (1, size))
    assert one.keys() == other.keys()
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "ema"}
    for name in tensors:
        if name.startswith(("model.", "ema.")):
            # One AdamW step moves a weight by about the rate, 1e-3, whatever the size of its gradient.
            assert (one[name] - other[name]).abs().max() <= 2e-4, name
    assert [n for n in one if n not in tensors and one[n] != other[n]] == []


def test_the_first_step_starts_from_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    """A rate too small to move a float32 shows the initial weights of 1 and 2 processes."""
    tiny_rate = {"optimizer__lr": 1e-30, "train__steps": 1, "engine__precision": "fp32"}
    recipe = write_recipe(tmp_path / "recipe.yaml", values(tmp_path, **tiny_rate))
    for size in (1, 2):
        train(recipe, f"run.name=n{size}", processes=size)
    one, other = (stored(checkpoint(tmp_path / f"n{size}", 1)) for size in (1, 2))
    weights = [name for name in one if name.startswith("model.")]
    nonzero = [name for name in weights if one[name].abs().max() > 1e-20]
    assert len(nonzero) > 50
    for name in nonzero:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("reduce_every", [True, False])
@pytest.mark.parametrize("reshard", [True, False])
def test_gradients_do_not_depend_on_who_computes_which_pack(reshard: bool, reduce_every: bool) -> None:
    """1 rank x 4 packs = 2 x 2 = 4 x 1, to float32 rounding, for every way that FSDP may reduce."""
    recipe = tiny_recipe(engine__reshard_after_forward=reshard, engine__reduce_every_micro_step=reduce_every)
    kinds = ["mixed", "i2t", "t2i", "it2i"]
    sizes = (1, 2, 4) if reduce_every else (1, 2)
    reference, *others = (run_ranks(size, one_step, recipe, kinds)[0].value for size in sizes)
    for other in others:
        assert relative(reference["loss"], other["loss"]) < 1e-6
        assert relative(whole_norm(reference), whole_norm(other)) < 1e-6
        # The engine's own norm adds up squares in float32, shard by shard.
        assert relative(whole_norm(other), other["norm"]) < 1e-5
        assert reference["gradients"].keys() == other["gradients"].keys()
        for name, gradient in reference["gradients"].items():
            bound = 1e-5 * float(gradient.abs().max()) + 1e-9
            torch.testing.assert_close(other["gradients"][name], gradient, rtol=1e-4, atol=bound, msg=name)


def test_a_checkpoint_says_how_many_processes_wrote_it(runs: dict[int, Path]) -> None:
    for size, run in runs.items():
        meta = folders.read_valid_meta(checkpoint(run, STEPS))
        assert meta is not None
        assert (meta["world_size"], meta["step"], meta["done"]["seen"]) == (
            size,
            STEPS,
            {"i2t": 6 * STEPS, "t2i": 6 * STEPS, "it2i": 6 * STEPS, "recon": 0},
        )


def test_the_share_of_images_that_take_the_stem_expert_is_that_of_all_ranks(tmp_path: Path) -> None:
    """By label while the expert learns; as the router would choose while the router does."""
    steps, shares, start = 8, {}, tmp_path / "start"
    write_export(start, tiny_recipe("stage3"))
    for stage, rate, source in (("stage4_expert", 1e-3, start), ("stage4_router", 1e-2, tmp_path / "stage4_expert-1")):
        settings = {"train__steps": steps, "train__save_every": 100, "optimizer__lr": rate, "init__from": str(source)}
        recipe = write_recipe(tmp_path / f"{stage}.yaml", values(tmp_path, stage, **settings))
        for size in (1, 2):
            train(recipe, f"run.name={stage}-{size}", processes=size)
            shares[stage, size] = [line["vision/stem_share"] for line in metrics(tmp_path / f"{stage}-{size}")]
        assert shares[stage, 1] == shares[stage, 2]
    plain = tiny_recipe("stage4_expert", data__slots=6, data__samples_per_step=18)
    (seen,) = run_ranks(1, stream_steps, plain, 0, 1, steps)
    labels = [torch.cat([pack.stem for pack in step.packs]) for step in seen.value]
    assert shares["stage4_expert", 1] == [float((stem == 1).sum()) / len(stem) for stem in labels]
    print(f"\nshares of the STEM expert: {shares}")
    assert len(set(shares["stage4_expert", 1])) > 1 and len(set(shares["stage4_router", 1])) > 2
