"""A request is laid out as the sample that it would be trained as."""

import numpy as np
import torch

from emma_train.sequence.pack import pack
from emma_train.sequence.request import Request, as_sample
from tests.helpers import CHANNELS, PATCH, SHUFFLE, i2t_sample, it2i_sample, make_image, t2i_sample, tokenizer

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
