"""Names of sources in metrics: short, different, and of each sample that of its folder."""

from pathlib import Path

import pytest

from data_pipelines.planner.planner import Planner
from data_pipelines.planner.source_names import short_names
from tests.helpers import tiny_recipe, tokenizer
from tests.shards import every_task, write_shards


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ([], []),
        (["data/llava"], ["llava"]),
        (["data/llava/", "other/laion"], ["llava", "laion"]),
        (["data/a/train", "data/b/train"], ["a/train", "b/train"]),
        (["s3://bucket/a/train", "data/train"], ["a/train", "data/train"]),
        (["train", "data/train"], ["train", "data/train"]),
    ],
)
def test_short_names(folders: list[str], names: list[str]) -> None:
    assert short_names(folders) == dict(zip(folders, names, strict=True))


def test_secrets_of_a_url_are_in_no_name() -> None:
    (name, _) = short_names(["https://user:secret@host/x/train?token=hidden", "data/train"]).values()
    assert "secret" not in name and "hidden" not in name


def test_each_sample_has_the_name_of_its_source(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / name / "train", every_task(12), per_shard=6) for name in ("a", "b")]
    sources = [{"path": str(folders[0])}, {"path": str(folders[1]), "tasks": ["i2t", "t2i"]}]
    planner = Planner(tiny_recipe(data__sources=sources), tokenizer())
    seen = set()
    for step in (1, 2, 3):
        for ref in [ref for slot in planner.plan(step).slots for ref in slot]:
            name = planner.source_name(ref)
            seen.add((ref.task, name))
            assert name == ("" if ref.task == "it2i" else f"{Path(ref.folder).parent.name}/train")
            assert Path(ref.url).parent == Path(ref.folder)
    assert seen == {("i2t", "a/train"), ("i2t", "b/train"), ("t2i", "a/train"), ("t2i", "b/train"), ("it2i", "")}
