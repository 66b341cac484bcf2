"""A request is laid out as the sample that it would be trained as."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.loader.sample_builder import SampleBuilder
from data_pipelines.planner.candidates import SampleRef
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence.pack import IGNORE_STEM, Sample, pack
from emma_train.sequence.request import Request, as_sample, conversation_request, num_request_tokens
from tests.helpers import (
    CHANNELS,
    PATCH,
    SHUFFLE,
    assert_same_pack,
    i2t_sample,
    it2i_sample,
    make_image,
    t2i_sample,
    tokenizer,
)

LATENT = np.ones((4, CHANNELS), np.float32)
BLANK = np.zeros((0, CHANNELS), np.float32)


def test_a_question_is_the_training_sample_without_its_answer() -> None:
    request = Request("k", "i2t", "What is this?", [make_image(2, 2)])
    asked = pack([as_sample(request, tokenizer(), PATCH, SHUFFLE, [LATENT])])
    learnt = pack([i2t_sample(answer="")])
    num = asked.counts[0]
    assert learnt.text_ids[:num].tolist() == asked.text_ids.tolist() and learnt.counts[0] == num + 1
    assert len(asked.labels) == 0 and asked.grids == learnt.grids


def test_prompts_and_instructions_have_the_tables_of_training() -> None:
    prompt = Request("k", "t2i", "a red fish", size=(64, 64), seed=5)
    edit = Request("k", "it2i", "remove the fish", [make_image(2, 2)], size=(64, 64), seed=6)
    for request, latents, sample in ((prompt, [BLANK], t2i_sample()), (edit, [LATENT], it2i_sample())):
        asked, learnt = pack([as_sample(request, tokenizer(), PATCH, SHUFFLE, latents)]), pack([sample])
        for name in ("text_ids", "position", "limit", "target_of_token"):
            assert torch.equal(getattr(asked, name), getattr(learnt, name)), name
        assert asked.counts == learnt.counts and asked.noise_seeds.tolist() == [request.seed]
        assert asked.latents is not None and not asked.latents[-4:].any() and asked.latents.shape[1] == CHANNELS


def test_unconditional_copies_drop_the_text_and_the_image() -> None:
    edit = Request("k", "it2i", "remove the fish", [make_image(2, 2)], size=(64, 96))
    full = as_sample(edit, tokenizer(), PATCH, SHUFFLE, [LATENT])
    silent = as_sample(edit, tokenizer(), PATCH, SHUFFLE, [LATENT], with_text=False)
    blind = as_sample(edit, tokenizer(), PATCH, SHUFFLE, [LATENT], with_text=False, with_images=False)
    words = len(tokenizer().encode_user("remove the fish"))
    assert full.num_tokens - silent.num_tokens == words
    assert silent.num_tokens - blind.num_tokens == 4 + 2
    assert pack([blind]).counts[1:] == (0, 0, 6)


CONVERSATION = [
    ("system", ["Answer in one word."]),
    ("user", ["Image 1: ", make_image(2, 2, 1), " and image 2: ", make_image(1, 2, 2), "\nWhich is larger?"]),
    ("assistant", ["first"]),
    ("user", [make_image(2, 1, 3), "And this one, <|im_end|>?"]),
]
TURNS = [
    {"role": "system", "text": "Answer in one word."},
    {"role": "user", "text": "Image 1: <image> and image 2: <image>\nWhich is larger?"},
    {"role": "assistant", "text": "first"},
    {"role": "user", "text": "<image>And this one, <|im_end|>?"},
]


def record_sample(answer: str) -> Sample:
    """What training makes of the conversation, from a record's bytes."""
    images = [part for _, content in CONVERSATION for part in content if isinstance(part, np.ndarray)]
    turns = [*TURNS, {"role": "assistant", "text": answer}]
    record = {"i2t": [{"images": ["a", "b", "c"], "turns": turns}]}
    members = {"json": json.dumps(record).encode()}
    for name, image in zip("abc", images, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        members[f"{name}.png"] = file.getvalue()
    data = DataConfig(tokenizer=str(tokenizer().path), und=ImageConfig(mode="native", max_tokens=64))
    builder = SampleBuilder(data, tokenizer(), PATCH, SHUFFLE)
    planned = SampleRef("k", "i2t", "", "", 0, 0, 0, 0, 0, 0, 0)
    return builder.sample(planned, {k: memoryview(v) for k, v in members.items()}, lambda name, config: None)


def test_a_conversation_with_images_between_texts_is_laid_out_as_in_training_token_by_token() -> None:
    request = conversation_request("k", CONVERSATION)  # type: ignore[arg-type]
    assert request.turns == TURNS and len(request.images) == 3
    latents = [np.zeros((p.shape[0] * p.shape[1] // 1024, CHANNELS), np.float32) for p in request.images]
    learnt = record_sample("no")
    for image in learnt.images.values():
        image.latent = np.zeros((image.grid[0] * image.grid[1], CHANNELS), np.float32)
        image.stem = IGNORE_STEM  # the record says which expert learns; in generation the router decides
    answered = as_sample(request, tokenizer(), PATCH, SHUFFLE, latents, answer="no")
    assert_same_pack(pack([answered]), pack([learnt]))
    asked, all_ids = as_sample(request, tokenizer(), PATCH, SHUFFLE, latents), pack([learnt]).text_ids.tolist()
    ids = pack([asked]).text_ids.tolist()
    assert ids == all_ids[: len(ids)] and len(all_ids) - len(ids) == len(tokenizer().encode_user("no")) + 1
    assert num_request_tokens(request, tokenizer(), PATCH * SHUFFLE) == asked.num_tokens


def test_the_letters_of_the_mark_in_a_message_are_no_image() -> None:
    request = conversation_request("k", [("user", ["Is <image> a tag?", make_image(1, 1)])])
    assert request.turns == [{"role": "user", "text": "Is <image > a tag?<image>"}]
    assert conversation_request("k", [("user", ["<image>"])]).images == []
    with pytest.raises(ValueError, match="an image in a message of the assistant"):
        conversation_request("k", [("assistant", [make_image(1, 1)]), ("user", ["?"])])
