"""Costs as arrays against a calculation row by row; samples that are too long shrink or are marked."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.planner.costs import CostModel, SampleCosts, sample_costs
from data_pipelines.shards.index import INDEX_SCHEMA, read_columns
from emma_train.config.schema import DecoderConfig, ImageConfig, ModelConfig
from emma_train.sequence.geometry import image_size
from emma_train.sequence.seeds import choice_of
from tests.shards import every_task, write_shards

SHARD = ("folder/shard-000000.tar", "0" * 64)


def cost_model(task: str, image: ImageConfig, **caps: int) -> CostModel:
    return CostModel(task, image, ModelConfig(), {"tokens": 8192, **caps}, seed=3)


def random_rows(task: str, seed: int, num: int = 40) -> pa.Table:
    """Rows with several alternatives and several images of random sizes."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        alternatives, images = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        shown = [rng.integers(0, images, rng.integers(0, 3)).tolist() for _ in range(alternatives)]
        num_target = rng.integers(0, images, alternatives).tolist() if task != "i2t" else [-1] * alternatives
        rows.append(
            {
                "key": f"k{i}",
                "task": task,
                "offset": i,
                "size": 1,
                "crc32": 0,
                "text_tokens": rng.integers(5, 900, alternatives).tolist(),
                "supervised_tokens": [1] * alternatives,
                "context": shown if task != "t2i" else [[]] * alternatives,
                "target": num_target,
                "widths": rng.integers(20, 3000, images).tolist(),
                "heights": rng.integers(20, 3000, images).tolist(),
                "tags": [],
            }
        )
    columns = [name for name in INDEX_SCHEMA.names if name in rows[0]]
    return pa.Table.from_pylist(rows, pa.schema([INDEX_SCHEMA.field(name) for name in columns]))


@pytest.mark.parametrize("task", ["i2t", "t2i", "it2i"])
@pytest.mark.parametrize("mode", ["square", "native", "buckets"])
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_row_is_measured_as_one_by_one(task: str, mode: str, epoch: int) -> None:
    image = ImageConfig(mode=mode, side=512, max_tokens=1500)
    tables = [random_rows(task, seed) for seed in (0, 1)]
    costs = sample_costs(tables, [SHARD, SHARD], epoch, cost_model(task, image, pixels=10**12))
    assert costs.shard.tolist() == [0] * 40 + [1] * 40
    for index, row in enumerate(pa.concat_tables(tables).to_pylist()):

        def tokens(number: int, row: dict = row) -> int:
            height, width = image_size(row["widths"][number], row["heights"][number], image, 32)
            return height * width // 32**2

        chosen = choice_of(len(row["text_tokens"]), 3, epoch, row["key"], f"{task} alternative")
        num_visual = sum(tokens(number) for number in row["context"][chosen])
        num_target = tokens(row["target"][chosen]) if row["target"][chosen] >= 0 else 0
        assert costs.alternative[index] == chosen
        assert costs.num_visual[index] == num_visual
        assert costs.num_tokens[index] == row["text_tokens"][chosen] + num_visual + num_target
        assert costs.sizes[:, index].tolist() == [costs.num_tokens[index], (num_visual + num_target) * 1024]


def test_switches_of_the_model_change_what_a_sample_costs() -> None:
    table, image = random_rows("i2t", 0), ImageConfig(mode="native", max_tokens=300)
    costs = {
        name: sample_costs(
            [table],
            [SHARD],
            0,
            CostModel("i2t", image, ModelConfig(**{key: value}), {"tokens": 8192, "pairs": 10**9, "patches": 10**9}, 3),
        )
        for name, key, value in (
            ("emma", "fusion", "channel"),
            ("token", "fusion", "token"),
            ("latent", "fusion", "latent"),
            ("full", "und_attention", "full"),
        )
    }
    emma = costs["emma"]
    text, images = emma.num_tokens - emma.num_visual, emma.num_visual
    assert (costs["token"].num_tokens == text + 2 * images).all() and images.any()
    assert (costs["token"].sizes[1] == (text + 2 * images) ** 2 // 2).all()
    assert (costs["token"].sizes[2] == emma.sizes[2]).all() and not costs["latent"].sizes[2].any()
    assert (costs["full"].sizes[1] == text**2 // 2 + (text + images) * images).all()
    assert (costs["latent"].cost[images > 0] < emma.cost[images > 0]).all()


def test_real_shards_measure_the_same(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, every_task(5))
    table = read_columns(str(folder), "shard-000000.tar", "it2i")
    costs = sample_costs([table], [SHARD], 0, cost_model("it2i", ImageConfig(side=64)))
    assert len(costs) == 5
    assert costs.num_visual.tolist() == [4] * 5
    assert (costs.num_tokens > 8).all() and (costs.cost > costs.num_tokens).all()


def test_images_of_an_understanding_sample_shrink_to_what_its_text_leaves_them() -> None:
    table = pa.Table.from_pylist(
        [
            {"key": "fits", "text_tokens": [100], "context": [[0]], "widths": [640], "heights": [640]},
            {
                "key": "long",
                "text_tokens": [1000],
                "context": [[0, 1]],
                "widths": [3200, 3200],
                "heights": [3200, 3200],
            },
            {"key": "text", "text_tokens": [3000], "context": [[]], "widths": [], "heights": []},
            {"key": "full", "text_tokens": [1990], "context": [[0]], "widths": [640], "heights": [640]},
        ]
    )
    for name, value in (("task", "i2t"), ("offset", 0), ("size", 1), ("crc32", 0), ("target", [-1])):
        table = table.append_column(name, pa.array([value] * 4))
    table = table.cast(pa.schema([INDEX_SCHEMA.field(name) for name in table.column_names]))
    native = ImageConfig(mode="native", max_tokens=4096)
    costs = sample_costs([table], [SHARD], 0, cost_model("i2t", native, tokens=2000))
    assert costs.max_tokens.tolist() == [0, 500, 0, 0]
    assert costs.num_tokens.tolist() == [500, 2000, 3000, 2390]
    assert costs.too_long.tolist() == [False, False, True, True]
    square = sample_costs([table], [SHARD], 0, cost_model("i2t", ImageConfig(side=1024), tokens=2000))
    assert square.too_long.tolist() == [False, True, True, True]


def test_cost_is_work_in_tokens_of_the_decoder() -> None:
    """Text costs its tokens and their attention; an image also costs its patches in the vision encoder."""

    def costs(task: str, text: int, shown: int) -> SampleCosts:
        row = {"text_tokens": [text], "context": [[0] * shown], "widths": [512], "heights": [512], "target": [-1]}
        table = pa.Table.from_pylist([{**row, "key": "a", "task": task, "offset": 0, "size": 1, "crc32": 0}])
        table = table.cast(pa.schema([INDEX_SCHEMA.field(name) for name in table.column_names]))
        return sample_costs([table], [SHARD], 0, cost_model(task, ImageConfig(side=512)))

    decoder = DecoderConfig()
    per_token = decoder.num_layers * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728)
    assert costs("i2t", 1000, 0).cost[0] == pytest.approx(1000 + 500_000 * 36 * 8192 / per_token)
    image = costs("i2t", 1000, 1).cost[0] - 1256 - (1256**2 // 2) * 36 * 8192 / per_token
    assert image == pytest.approx((1024 * 27 * 1152 * (4 * 1152 + 2 * 4304) + 1024**2 * 27 * 2304) / per_token)
    assert 0.4 * 256 < image < 0.6 * 256
