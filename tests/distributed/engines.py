"""One recipe under every engine and number of ranks, and how far apart the results are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emma_train.engine.adam_state import MOMENTS
from tests.helpers import ASSETS, recipe_values, write_recipe
from tests.runs import checkpoint, learnt, stored, train

LOSSES = ("loss", "loss/i2t", "loss/t2i", "loss/it2i")
SLOTS = 4


@dataclass(frozen=True)
class Way:
    """A way to run a recipe of four packs a step."""

    name: str
    processes: int
    overrides: tuple[str, ...] = ()


REFERENCE = Way("1 x 4", 1)
WAYS = (
    Way("2 x 2", 2),
    Way("4 x 1", 4),
    Way("HSDP 2 x 2", 4, ("engine.replicate=2",)),
    *(Way(f"ZeRO-{n}, 2 x 2", 2, ("engine.kind=deepspeed", f"engine.zero_stage={n}")) for n in (1, 2, 3)),
    Way("2 ranks a pack, 1 x 4", 2, ("engine.sequence_parallel=2",)),
)


@dataclass(frozen=True)
class Distance:
    """How far a run is from the reference."""

    loss: float
    """Largest relative difference of any loss in any step."""
    norm: float
    """The same of the gradient norm."""
    weights: float
    """Norm of the difference of the weights that trained, after the last step, over their own."""
    averages: float
    moments: float


def stage_recipe(root: Path, stage: str, previous: str | None, steps: int, **dotted: Any) -> Path:
    """A recipe of a stage whose packs differ on every rank; `previous` is the run folder that it starts from."""
    settings: dict[str, Any] = {"run__root": str(root), "train__steps": steps, "train__save_every": 1000}
    settings |= {"data__slots": SLOTS, "data__samples_per_step": 24, "data__pack_tokens": 1024}
    settings |= {"ema__decay": 0.9, "optimizer__weight_decay": 0.01, "init__from": previous}
    if stage == "stage4_expert":
        settings["data__sources"] = [{"path": str(ASSETS / "emoji" / "train"), "require_tags": ["stem"]}]
    return write_recipe(root / f"{stage}.yaml", recipe_values(stage, **{**settings, **dotted}))


def run(recipe: Path, way: Way, name: str, *overrides: str, timeout_s: float = 180) -> Path:
    """Train a recipe in a way; the run folder."""
    train(recipe, f"run.name={name}", *way.overrides, *overrides, processes=way.processes, timeout_s=timeout_s)
    return recipe.parent / name


def distance(run: Path, reference: Path, steps: int) -> Distance:
    """Both runs saw the same data, or this raises."""
    one, other = learnt(reference), learnt(run)
    assert [line["data/digest"] for line in one] == [line["data/digest"] for line in other]
    assert len(one) == steps

    def worst(keys: tuple[str, ...]) -> float:
        pairs = [(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in keys if key in a]
        return max(abs(a - b) / abs(a) for a, b in pairs)

    state, expected = (stored(checkpoint(folder, steps)) for folder in (run, reference))
    assert state.keys() == expected.keys()

    trained = [name.removeprefix("ema.") for name in expected if name.startswith("ema.")]

    def apart(prefix: str, suffix: str = "") -> float:
        names = [f"{prefix}{name}{suffix}" for name in trained]
        difference = sum(float((state[n].double() - expected[n].double()).square().sum()) for n in names)
        return (difference / sum(float(expected[n].double().square().sum()) for n in names)) ** 0.5

    assert all(torch.equal(state[n], expected[n]) for n in expected if n.endswith(".step"))
    moments = max(apart("optimizer.", f".{moment}") for moment in MOMENTS)
    return Distance(worst(LOSSES), worst(("grad_norm",)), apart("model."), apart("ema."), moments)
