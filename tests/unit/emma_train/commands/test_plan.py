"""Index rows that the plan is measured on."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.images import image_members, open_image
from data_pipelines.shards.record import CAPTION_QUESTION, layouts, read_record
from data_pipelines.shards.tar import groups, read_group
from emma_train.commands.plan import index_reader, read_index_rows
from emma_train.config.schema import Recipe, SourceConfig
from emma_train.errors import UserError
from emma_train.plan.samples import mean_sample
from emma_train.sequence.geometry import image_size
from emma_train.sequence.layout import ImageRole, ImageSegment, num_text_tokens
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.tokens import TextTokenizer
from tests.helpers import ASSETS, tiny_recipe
from tests.shards import png, question, write_shards


def test_rows_have_the_required_tags_and_none_of_the_excluded(tmp_path: Path) -> None:
    tags = [["stem"], ["photo"], [], ["stem", "photo"]]
    contents = [question(f"q{i:02d}", answers=["a"] * (1 + i % 4), tags=tags[i % 4]) for i in range(20)]
    folder = str(write_shards(tmp_path, contents, per_shard=7))

    def num_alternatives(**wanted: list[str]) -> list[int]:
        rows = read_index_rows(SourceConfig(path=folder, **wanted), "i2t")
        assert rows is not None
        return [len(row["text_tokens"]) for row in rows]

    assert num_alternatives() == [1, 2, 3, 4] * 5
    assert num_alternatives(require_tags=["stem"]) == [1, 4] * 5
    assert num_alternatives(exclude_tags=["photo"]) == [1, 3] * 5
    assert num_alternatives(require_tags=["stem"], exclude_tags=["photo"]) == [1] * 5
    assert read_index_rows(SourceConfig(path=folder), "t2i") == []


def test_a_source_elsewhere_has_no_rows_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    assert read_index_rows(SourceConfig(path="s3://bucket/set"), "i2t") is None
    folder = write_shards(tmp_path / "set", [question("q")])
    next(folder.glob("*.idx.parquet")).unlink()
    with pytest.raises(UserError, match="missing"):
        read_index_rows(SourceConfig(path=str(folder)), "i2t")


def laid_out(recipe: Recipe, folder: Path, task: str) -> tuple[float, ...]:
    """(text, supervised, seen, made) tokens of a mean sample, by the layout of every alternative of every record with
    every caption question. A record counts once, whatever the number of its alternatives."""
    tokenizer = TextTokenizer(recipe.data.tokenizer, recipe.data.template)
    config, means = TASKS[task].image_config(recipe.data), []
    for tar in sorted(folder.glob("*.tar")):
        data = tar.read_bytes()
        with open(tar, "rb") as file:
            spans = [(group.offset, group.size) for group in groups(file)]
        for offset, size in spans:
            members = read_group(data[offset : offset + size])
            counts = []
            for question_ in recipe.data.caption_questions:
                record = read_record(members, question_)
                record[task] = record.get(TASKS[task].record_key, [])
                for segments in layouts(record, task, tokenizer):
                    counts.append((*num_text_tokens(segments), *visual(segments, members, config)))
            if counts:
                means.append(np.mean(counts, axis=0))
    return tuple(np.mean(means, axis=0))


def visual(segments: list[Any], members: dict[str, memoryview], config: Any) -> tuple[int, int]:
    """Visual tokens of the images that a layout shows, and of its target."""
    files, seen, made = image_members(members), 0, 0
    for segment in segments:
        if isinstance(segment, ImageSegment):
            with open_image(files[segment.name]) as image:
                height, width = image_size(*image.size, config, 32)
            is_target = segment.role is ImageRole.TARGET
            made += is_target * (height * width // 32**2)
            seen += (not is_target) * (height * width // 32**2)
    return seen, made


def assert_planned_as_laid_out(recipe: Recipe, folder: Path, tasks: tuple[str, ...]) -> None:
    for task in tasks:
        mean = mean_sample(recipe, recipe.data.sources, TASKS[task], index_reader(recipe))
        planned = (mean.text, mean.supervised, mean.seen, mean.made)
        assert mean.measured and planned == pytest.approx(laid_out(recipe, folder, task), rel=1e-9), task


@pytest.mark.seconds
@pytest.mark.parametrize("template", ["plain", "no_think"])
def test_the_plan_counts_the_tokens_that_the_tiny_world_is_laid_out_in(template: str) -> None:
    folder = ASSETS / "emoji" / "heldout_concepts"
    sources = [{"path": str(folder)}]
    recipe = tiny_recipe(data__template=template, data__sources=sources, data__caption_questions=["a", "long one"])
    assert_planned_as_laid_out(recipe, folder, ("i2t", "t2i", "it2i", "recon"))


@pytest.mark.parametrize("template", ["plain", "no_think"])
def test_the_plan_counts_caption_questions_as_a_mean(template: str, tmp_path: Path) -> None:
    """Captions take the recipe's questions; a question of a record stays, even if an image and a caption would fit."""
    write_shards(tmp_path, [question("q", answers=["a cat", "a cat on a mat"])], index=False)
    with tarfile.open(tmp_path / "shard-000001.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, caption in enumerate(["a red fish", "two cats and a dog"]):
            (tmp_path / "member").write_bytes(png(number))
            tar.add(tmp_path / "member", f"c{number}.png")
            (tmp_path / "member").write_text(caption)
            tar.add(tmp_path / "member", f"c{number}.txt")
    index_folder(tmp_path, ASSETS / "tokenizer")
    questions = [CAPTION_QUESTION, "What is it?", "Write a long and exact caption for this image of something."]
    recipe = tiny_recipe(
        data__template=template, data__sources=[{"path": str(tmp_path)}], data__caption_questions=questions
    )
    assert_planned_as_laid_out(recipe, tmp_path, ("i2t", "t2i"))


def test_without_the_tokenizer_the_plan_counts_as_the_index_does(tmp_path: Path) -> None:
    folder = str(write_shards(tmp_path, [question("q")]))
    recipe = tiny_recipe(data__template="no_think", data__sources=[{"path": folder}], data__tokenizer="not/there")
    rows = read_index_rows(recipe.data.sources[0], "i2t")
    assert rows and index_reader(recipe)(recipe.data.sources[0], "i2t") == rows
