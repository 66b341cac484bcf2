"""A run with the task recon in its mix trains, resumes from a run without it, and generates."""

import math
from pathlib import Path

from PIL import Image

from tests.distributed.spawn import run_command
from tests.helpers import ASSETS
from tests.integration.conftest import MakeRecipe
from tests.runs import metrics


def test_a_run_with_recon_trains_and_reconstructs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    sampling = {"sample_from": str(ASSETS / "emoji" / "heldout_drawings"), "num_samples": 1}
    mix = {"i2t": 1, "t2i": 1, "it2i": 0, "recon": 1}
    recipe = make_recipe(tmp_path, train={"steps": 3, "save_every": 3, "log_every": 1, **sampling}, mix=mix)
    run_command("train", str(recipe), "run.name=one")
    lines = metrics(tmp_path / "one")
    assert len(lines) == 3
    for line in lines:
        assert math.isfinite(line["loss/recon"]) and line["loss/recon"] > 0
        assert line["samples/recon"] == line["samples/t2i"] == 8
    image, out = tmp_path / "image.png", tmp_path / "out"
    Image.new("RGB", (64, 64), "red").save(image)
    arguments = ("--task", "recon", "--prompt", "", "--image", str(image), "--out", str(out), "--steps", "2")
    run_command("generate", str(tmp_path / "one"), *arguments, "--device", "cpu")
    with Image.open(next(out.glob("*.png"))) as made:
        assert made.size == (64, 64)
