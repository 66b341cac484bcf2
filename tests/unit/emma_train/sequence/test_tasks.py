"""A task is data: config, stages and data agree on the tasks, and each entry is consistent."""

from dataclasses import fields

import pytest

from emma_train.config.mix import TASK_NAMES
from emma_train.config.schema import DataConfig, MixConfig
from emma_train.sequence.layout import ImageRole, ImageSegment, TextSegment
from emma_train.sequence.tasks import RECORD_KEYS, TASKS, Task, fixed_text_tokens, tasks_of_loss
from tests.helpers import tokenizer

ALTERNATIVE = {
    "images": ["img0"],
    "turns": [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A cat."}],
    "text": "a cat",
    "target": "img1",
}


def test_the_names_in_the_config_are_those_of_the_tasks() -> None:
    assert tuple(TASKS) == TASK_NAMES == tuple(field.name for field in fields(MixConfig))
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_layout_shows_and_makes_what_the_task_says(task: Task) -> None:
    images = task.shown_images(ALTERNATIVE) if task.condition else []
    segments = task.layout(tokenizer(), images, ALTERNATIVE)
    roles = [s.role for s in segments if isinstance(s, ImageSegment)]
    assert roles == [task.condition] * len(images) + [ImageRole.TARGET] * task.makes_image
    assert any(s.supervised for s in segments if isinstance(s, TextSegment)) == (task.loss == "text")
    assert (task.typical_text[1] > 0) == (task.loss == "text")


def test_every_task_has_one_loss_and_record_keys_have_rows_of_their_own() -> None:
    assert sorted(tasks_of_loss("text") + tasks_of_loss("flow")) == sorted(TASKS)
    assert all(TASKS[key].record_key == key for key in RECORD_KEYS)
    assert {task.record_key for task in TASKS.values()} == set(RECORD_KEYS)


def test_images_are_resized_as_the_data_section_says() -> None:
    data = DataConfig()
    assert TASKS["i2t"].image_config(data) is data.und
    assert TASKS["t2i"].image_config(data) is TASKS["it2i"].image_config(data) is data.gen


def test_only_a_fixed_text_has_a_fixed_number_of_tokens() -> None:
    for task in TASKS.values():
        assert bool(fixed_text_tokens(task, tokenizer())) == task.fixed_text
