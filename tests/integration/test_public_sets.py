"""From sets as the hub delivers them to all six stages: import, annotate, select, cache-latents, train."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors import safe_open

from data_pipelines.cli import main
from data_pipelines.loader.loader import Stream
from data_pipelines.shards.index import read_manifest
from emma_train.model.autoencoder import fingerprint
from emma_train.stages.stage import STAGES
from tests import public_formats as formats
from tests.helpers import ASSETS, tiny_recipe
from tests.integration.conftest import MakeRecipe
from tests.runs import metrics, train

pytest.importorskip("duckdb")
TOKENIZER = ["--tokenizer", str(ASSETS / "tokenizer")]
SIDE = 64
STEPS = 3
NUM_ITEMS = {"llava-pretrain": 6, "img2dataset": 8, "finevision": 8, "omniedit": 6}


def command(*words: object) -> None:
    """One command of emma-data, which must succeed."""
    assert main(list(map(str, words))) == 0, words


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four sets in their formats, imported, annotated, and selected for what the stages need."""
    root = tmp_path_factory.mktemp("sets")
    formats.write_llava_pretrain(root / "hub/llava-pretrain", NUM_ITEMS["llava-pretrain"])
    formats.write_img2dataset(root / "hub/img2dataset", NUM_ITEMS["img2dataset"])
    for config in ("ai2d_merged", "vqav2"):
        formats.write_finevision(root / "hub/finevision", config, num=NUM_ITEMS["finevision"] // 2)
    formats.write_omniedit(root / "hub/omniedit", NUM_ITEMS["omniedit"])
    for name in NUM_ITEMS:
        limits = ["--shard-samples", 4, "--workers", 1]
        command("import", name, root / "hub" / name, root / "raw" / name, *TOKENIZER, *limits)
        for operator in ("size", "language", "phash", "stem"):
            command("annotate", operator, root / "raw" / name, "--workers", 1)
    chosen, raw = root / "chosen", root / "raw"
    command("select", chosen / "align", "--from", raw / "llava-pretrain", "--where", "size.min_side >= 32")
    command(
        *("select", chosen / "understand", "--from", raw / "finevision", raw / "img2dataset", "--task", "i2t"),
        *("--where", "len(widths) > 0", "--where", "coalesce(language.language, '') <> 'zh'", "--tag", "stem.label"),
    )
    command(
        *("select", chosen / "generate", "--from", raw / "img2dataset", "--task", "t2i"),
        *("--where", "phash.hash IS NOT NULL", "--best", "source.aesthetic", "--top", 5),
    )
    command("select", chosen / "edit", "--from", raw / "omniedit", "--where", "source.o_score >= 9.5")
    for name in ("generate", "edit"):
        command("cache-latents", chosen / name, "--autoencoder", ASSETS / "autoencoder", "--side", SIDE)
    return root


def recipe_sections(data: Path, stage: str, before: str) -> dict[str, Any]:
    """What a tiny stage has in addition to train on the selections."""
    names = {"stage0": ["align"], "stage4_expert": ["understand"], "stage4_router": ["understand"]}
    sources = [{"path": str(data / "chosen" / name)} for name in names.get(stage, ["understand", "generate", "edit"])]
    if stage == "stage4_expert":
        sources[0]["require_tags"] = ["stem"]  # type: ignore[assignment]
    sections: dict[str, Any] = {
        "train": {"steps": STEPS, "save_every": STEPS},
        "data": {"sources": sources, "slots": 2, "samples_per_step": 6},
        "init": {"from": before or None},
    }
    if stage == "stage2":
        mixes = {"a": {"i2t": 1, "t2i": 1}, "b": {"i2t": 1, "t2i": 1}, "c": {"i2t": 1, "t2i": 1, "it2i": 1}}
        sections["data"]["phases"] = [{"name": name, "steps": 1, "mix": mix} for name, mix in mixes.items()]
    return sections


@pytest.mark.slow
def test_sets_in_public_formats_go_through_every_command_to_all_six_stages(data: Path, make_recipe: MakeRecipe) -> None:
    counts = {name: json.loads((data / "raw" / name / "import.json").read_text()) for name in NUM_ITEMS}
    assert {name: of_set["items"] for name, of_set in counts.items()} == NUM_ITEMS
    assert {name: of_set["rejected"] for name, of_set in counts.items() if of_set["rejected"]} == {"img2dataset": 1}
    runs, before = data / "runs", ""
    for stage in STAGES:
        make_recipe(runs, stage, **recipe_sections(data, stage, before))
        before = str(runs / stage)
    pipeline = runs / "pipeline.yaml"
    steps = [f"{stage}.yaml" for stage in STAGES]
    pipeline.write_text(yaml.safe_dump({"pipeline": steps, "run": {"root": str(runs), "name": "all"}}))
    train(pipeline)
    losses = {"stage0": {"i2t"}, "stage1": {"i2t", "t2i"}, "stage2": {"i2t", "t2i", "it2i"}}
    for stage in STAGES:
        lines = metrics(runs / "all" / stage)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert all(math.isfinite(line["loss"]) and line["data/skipped"] == line["data/replaced"] == 0 for line in lines)
        for task in losses.get(stage, ()):
            assert math.isfinite(lines[-1][f"loss/{task}"])


@pytest.mark.slow
def test_what_is_selected_is_what_the_sources_say(data: Path) -> None:
    """The best five of LAION's column; edits by their score; stem from the names of configs; latents of all images."""
    manifests = {name: read_manifest(data / "chosen" / name) for name in ("align", "understand", "generate", "edit")}
    samples = {name: manifest["samples"] for name, manifest in manifests.items()}
    # FineVision's first item of each config is text only; img2dataset's second failed to download.
    assert samples["align"]["i2t"] == 6 and samples["understand"]["i2t"] == 2 * 3 + 7
    assert samples["generate"] == {"i2t": 0, "t2i": 5, "it2i": 0} and samples["edit"]["it2i"] == 5
    tables = [pq.read_table(path, columns=["key"]) for path in sorted((data / "chosen/generate").glob("*.idx.parquet"))]
    keys = [key for table in tables for key in table["key"].to_pylist()]
    scores = {row["key"]: row["aesthetic"] for path in (data / "raw/img2dataset").glob("*.source.parquet")
              for row in pq.read_table(path).to_pylist()}  # fmt: skip
    assert sorted(keys) == sorted(sorted(scores, key=lambda key: -scores[key])[:5])
    tags: dict[str, int] = {}
    for entry in manifests["understand"]["shards"]:
        for names, number in entry["tags"]["i2t"].items():
            tags[names] = tags.get(names, 0) + number
    assert tags == {"stem": 3, "general": 3, "unknown": 7}
    for path in (data / "raw/omniedit").glob("*.latents.safetensors"):
        with safe_open(path, framework="numpy") as file:
            shapes = {tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        assert shapes == {((SIDE // 32) ** 2, 32)}
    sources = [{"path": str(data / "chosen" / name)} for name in ("generate", "edit")]
    recipe = tiny_recipe(
        data__sources=sources, data__slots=2, data__samples_per_step=4,
        mix__i2t=0, mix__t2i=1, mix__it2i=1,
    )  # fmt: skip
    packs = [
        pack for step in Stream(recipe, 0, 1, fingerprint(ASSETS / "autoencoder")).steps(1, 4) for pack in step.packs
    ]
    assert len(packs) == 8 and all(pack.latents is not None for pack in packs)
