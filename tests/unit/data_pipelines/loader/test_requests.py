"""Requests with known answers: their order depends on keys alone; `limit` takes the first ones."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.loader.requests import read_requests
from emma_train.errors import UserError
from tests.helpers import tiny_recipe
from tests.shards import edit, every_task, question, write_shards


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
