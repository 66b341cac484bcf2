"""Requests with known answers: their order depends on keys alone; `limit` takes the first ones."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.loader.requests import read_requests
from emma_train.errors import UserError
from emma_train.sequence.layout import TextSegment
from emma_train.sequence.pack import image_segments
from emma_train.sequence.request import as_sample
from tests.helpers import CHANNELS, PATCH, SHUFFLE, tiny_recipe, tokenizer
from tests.shards import edit, every_task, png, question, write_shards


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("requests") / "set", every_task(8), per_shard=5)


def test_fewer_requests_are_the_first_of_more_and_shards_do_not_matter(small: Path, tmp_path: Path) -> None:
    data = tiny_recipe().data
    every = [r.key for r in read_requests(small, "t2i", data, 32)]
    assert len(every) == 8
    assert [r.key for r in read_requests(small, "t2i", data, 32, limit=3)] == every[:3]
    one_shard = write_shards(tmp_path, every_task(8))
    assert [r.key for r in read_requests(one_shard, "t2i", data, 32)] == every


def test_a_question_is_asked_once_per_alternative_with_its_truth(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [question("q000", ["a cat", "a dog"])])
    requests = read_requests(folder, "i2t", tiny_recipe().data, 32)
    assert {(r.key, r.truth) for r in requests} == {("q000/0", "a cat"), ("q000/1", "a dog")}
    assert {r.text for r in requests} == {"What is this?"}
    assert all(r.target is None and r.size == (0, 0) for r in requests)


def test_an_edit_has_its_reference_its_target_and_its_size(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [edit("e000", side=64)])
    (request,) = read_requests(folder, "it2i", tiny_recipe().data, 32)
    assert request.target is not None
    assert request.size == request.target.shape[:2] == (64, 64)
    assert len(request.images) == 1
    assert not np.array_equal(request.images[0], request.target)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest"):
        read_requests(tmp_path, "t2i", tiny_recipe().data, 32)


def test_a_conversation_is_asked_up_to_its_first_answer_with_the_images_of_that_part(tmp_path: Path) -> None:
    def conversation(*texts: tuple[str, str]) -> dict[str, object]:
        turns = [{"role": role, "text": text} for role, text in texts]
        return {"i2t": [{"images": ["img0", "img1"], "turns": turns}]}

    images = {"img0.png": png(0), "img1.png": png(1, 64)}
    opening = ("system", "Be kind.")
    marked = conversation(opening, ("user", "<image>What?"), ("gpt", "a cat"), ("user", "<image>?"), ("gpt", "a dog"))
    unmarked = conversation(opening, ("user", "Same?"), ("assistant", "no"), ("user", "Why?"), ("assistant", "so"))
    for record, text, truth, num_images in ((marked, "<image>What?", "a cat", 1), (unmarked, "Same?", "no", 2)):
        folder = write_shards(tmp_path / truth, [("q000", record, images)])
        (request,) = read_requests(folder, "i2t", tiny_recipe().data, 32)
        assert (request.text, request.truth, len(request.images)) == (text, truth, num_images)
        assert [turn["role"] for turn in request.turns] == ["system", "user"]
        sample = as_sample(request, tokenizer(), PATCH, SHUFFLE, [np.zeros((4, CHANNELS), np.float32)] * num_images)
        ids = [token for s in sample.segments if isinstance(s, TextSegment) for token in s.ids]
        assert "Be kind." in tokenizer().decode(ids)
        assert len(image_segments(sample.segments)) == num_images
