"""A small version of the shipped recipes, and what commit e0297de wrote, for every test of the command line."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import ASSETS, DECODER, ROOT, VISION

SMALL: dict[str, Any] = {
    "model": {"vision": VISION, "decoder": {**DECODER, "num_layers": 2, "num_shared_layers": 1}, "time_features": 16},
    "data": {"slots": 6, "samples_per_step": 24, "und": {"side": 64}, "gen": {"side": 64}},
    "train": {"log_every": 1, "save_every": 2, "keep": 3, "sample_from": "", "sample_every": 0},
    "optimizer": {"kind": "adamw", "lr": 1.5e-3},  # Muon enlarges rounding beyond what changing the ranks may here
    "schedule": {"kind": "constant", "warmup_steps": 3},
    "engine": {"precision": "fp32", "device": "cpu"},
    "validate": {"every": 0},
}
MakeRecipe = Callable[..., Path]
FIXTURE = ROOT / "tests" / "assets" / "e0297de"


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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder that e0297de wrote, stopped in step 4 of 8."""
    with tarfile.open(FIXTURE / "micro.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "micro"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The export of e0297de, with the two parts that are copies of files in recipes/tiny/assets."""
    folder = tmp_path / "export"
    shutil.copytree(FIXTURE / "export", folder)
    shutil.copytree(ASSETS / "autoencoder", folder / "autoencoder")
    shutil.copy(ASSETS / "tokenizer" / "tokenizer.json", folder)
    return folder
