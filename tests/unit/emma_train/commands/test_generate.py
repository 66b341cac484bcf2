"""Requests that `emma-train generate` makes of its options."""

from argparse import Namespace

import pytest

from emma_train.commands.generate import _check_marks, _requests
from emma_train.errors import UserError


def seeds(prompts: list[str], num: int = 2, seed: int = 0) -> list[int]:
    arguments = Namespace(prompt=prompts, num=num, seed=seed, task="t2i")
    return [request.seed for request in _requests(arguments, [], (512, 512))]


def test_every_prompt_and_number_has_its_own_seed() -> None:
    assert len(set(seeds(["a red fish", "a blue fish"], num=3))) == 6
    assert seeds(["a red fish"]) == seeds(["a blue fish", "a red fish"])[2:], "other prompts do not matter"
    assert not set(seeds(["a red fish"])) & set(seeds(["a red fish"], seed=1))


def test_the_marks_of_a_question_must_be_its_images() -> None:
    _check_marks(["What is this?", "Is <image> a cat?"], 1)
    _check_marks(["Two and two?"], 0)
    with pytest.raises(UserError, match=r"--prompt 'Is <image> a cat\?': 1 <image> in the user turns for 0 images"):
        _check_marks(["Is <image> a cat?"], 0)
