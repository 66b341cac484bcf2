"""What a chaos run works on: a copy of the code, a copy of the shards with damaged records, and the recipe."""

import random
import shutil
import tarfile
from pathlib import Path

from emma_train.training.environment import commit
from tests.helpers import ASSETS, ROOT, recipe_values, write_recipe
from tests.shards import damage

COPIED = ("emma_train", "data_pipelines", "launchers", "tests")
NUM_DAMAGED = 12
STEP_TIMEOUT_S = 15
SLOTS, SAMPLES = 6, 18
"""6 packs a step, so that 1, 2, 3 and 6 ranks can train."""


def copy_code(folder: Path) -> Path:
    """The packages that nodes run, with their commit."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", "assets")
    for package in COPIED:
        shutil.copytree(ROOT / package, folder / package, ignore=skip)
    (folder / "COMMIT").write_text(f"{commit()}\n")
    return folder


def copy_shards(folder: Path, rng: random.Random) -> Path:
    """The tiny recipes' shards. Some records are damaged: their bytes do not have the checksum of the index."""
    shutil.copytree(ASSETS / "emoji" / "train", folder)
    tars = sorted(folder.glob("*.tar"))
    for tar in rng.choices(tars, k=NUM_DAMAGED):
        with tarfile.open(tar) as archive:
            member = rng.choice(archive.getnames())
        damage(tar, member)
    return folder


def write_scene_recipe(path: Path, shards_url: str) -> Path:
    """A recipe whose steps take a second or less."""
    values = recipe_values(
        run__root=str(path.parent / "runs"),
        data__sources=[{"path": shards_url}],
        data__slots=SLOTS,
        data__samples_per_step=SAMPLES,
        data__workers=1,
        data__prefetch=2,
        data__max_bad_samples=10**6,
        data__read_timeout_s=60.0,
        train__steps=10**6,
        train__save_every=4,
        train__keep=3,
        train__keep_every=20,
        train__stop_within_s=60,
        ema__decay=0.99,
        engine__step_timeout_s=STEP_TIMEOUT_S,
        engine__timeout_s=90,
    )
    return write_recipe(path, values)
