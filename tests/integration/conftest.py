"""A small version of the shipped recipes, for every test of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import DECODER, ROOT, VISION

SMALL: dict[str, Any] = {
    "model": {"vision": VISION, "decoder": {**DECODER, "num_layers": 2, "num_shared_layers": 1}, "time_features": 16},
    "data": {"slots": 6, "samples_per_step": 24, "und": {"side": 64}, "gen": {"side": 64}},
    "train": {"log_every": 1, "save_every": 2, "keep": 3, "sample_from": "", "sample_every": 0},
    "schedule": {"kind": "constant", "warmup_steps": 3},
    "engine": {"precision": "fp32", "device": "cpu"},
}
MakeRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def make_recipe() -> MakeRecipe:
    """make_recipe(folder, stage, **sections) writes folder/stage.yaml, which extends the shipped one."""

    def make(folder: Path, stage: str = "stage1", **sections: dict[str, Any]) -> Path:
        values: dict[str, Any] = {"extends": str(ROOT / "recipes" / "tiny" / f"{stage}.yaml"), "init": {"from": None}}
        values |= {"run": {"root": str(folder), "name": stage}, **SMALL}
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make
