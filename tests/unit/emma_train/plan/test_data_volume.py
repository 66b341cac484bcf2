"""What a stage reads, in closed form and against the shards of the tiny world."""

import pytest

from emma_train.commands.plan import index_reader
from emma_train.plan.arithmetic import Plan
from emma_train.plan.data_volume import data_volume
from emma_train.plan.tables import data_line
from emma_train.plan.traffic import Network
from tests.helpers import ASSETS, tiny_recipe
from tests.unit.emma_train.plan.test_plan import FULL, plan


def test_assumed_sizes_in_closed_form() -> None:
    planned = plan(FULL / "stage1.yaml")
    load, volume = planned.loads[0], data_volume(planned)
    text = sum(n * load.means[task].text for task, n in load.samples.items())
    pixels, steps = 4096 * 512 * 512, 244141
    assert volume.read == pytest.approx(steps * (4 * text + 0.25 * pixels))
    assert volume.latents == steps * 4096 * 256 * 32 * 2
    assert volume.per_hour(8) == pytest.approx(volume.read / 8 / volume.seconds * 3600)
    assert not volume.measured and "in part assumed, 0.25 bytes a pixel" in data_line(planned, Network())
    assert data_volume(plan(FULL / "stage4_router.yaml")).latents == 0


@pytest.mark.seconds
def test_sizes_of_an_index_are_those_of_the_records() -> None:
    """One task over all of a folder: a mean record, padded in the tar, is the tar over its records."""
    folder = ASSETS / "emoji" / "heldout_concepts"
    recipe = tiny_recipe(data__sources=[{"path": str(folder)}], mix={"t2i": 1}, train__steps=10)
    planned = Plan(recipe, "test", 2, "h100-80g", read_index_rows=index_reader(recipe))
    rows = index_reader(recipe)(recipe.data.sources[0], "t2i")
    assert rows
    volume = data_volume(planned)
    assert volume.measured
    assert volume.read == pytest.approx(10 * 12 * sum(row["size"] for row in rows) / len(rows))
    assert 0 < sum(row["size"] for row in rows) <= sum(tar.stat().st_size for tar in folder.glob("*.tar"))
