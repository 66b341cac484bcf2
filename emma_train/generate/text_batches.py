"""Text for any number of requests, in batches of similar length: a batch is one pack, and its cache is as long as its
longest request."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from emma_train.generate.generator import AnswerLikelihood, Generator
from emma_train.generate.settings import TextSettings
from emma_train.sequence.request import Request, num_request_tokens

_Result = TypeVar("_Result")
MAX_SAMPLES = 64
MAX_TOKENS = 32_768
"""Of a batch, with what is written and with padding: 5 GB of keys and values for a model of 4B in bf16."""


def batches_by_length(lengths: Sequence[int], max_samples: int, max_tokens: int) -> list[list[int]]:
    """Indices of requests, longest first, in batches of at most `max_samples`, each of them padded to the longest of
    its batch at most `max_tokens` long together; a request that is longer has a batch to itself."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        batch = batches[-1] if batches else []
        room = min(max_samples, max_tokens // max(1, lengths[batch[0]])) if batch else 0
        if len(batch) < room:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def generate_texts(
    generator: Generator,
    requests: Sequence[Request],
    settings: TextSettings,
    max_samples: int = MAX_SAMPLES,
    max_tokens: int = MAX_TOKENS,
    done: Callable[[int], None] = lambda number: None,
) -> list[str]:
    """Answers in the order of the requests. `done` is called with the number of answers after each batch."""
    lengths = [length + settings.max_tokens for length in _lengths(generator, requests)]

    def ask(indices: list[int]) -> list[str]:
        return generator.generate_text([requests[i] for i in indices], settings)

    return _in_batches(batches_by_length(lengths, max_samples, max_tokens), ask, done)


def answer_likelihoods(
    generator: Generator,
    requests: Sequence[Request],
    answers: Sequence[str],
    max_samples: int = MAX_SAMPLES,
    max_tokens: int = MAX_TOKENS,
    done: Callable[[int], None] = lambda number: None,
) -> list[AnswerLikelihood]:
    """Likelihoods of an answer to each request, in their order. `done` as for generate_texts."""
    lengths = [
        length + len(generator.tokenizer.encode_user(answer)) + 1
        for length, answer in zip(_lengths(generator, requests), answers, strict=True)
    ]

    def ask(indices: list[int]) -> list[AnswerLikelihood]:
        return generator.answer_likelihoods([requests[i] for i in indices], [answers[i] for i in indices])

    return _in_batches(batches_by_length(lengths, max_samples, max_tokens), ask, done)


def _lengths(generator: Generator, requests: Sequence[Request]) -> list[int]:
    side = generator.patch * generator.shuffle
    return [num_request_tokens(request, generator.tokenizer, side, generator.rules) for request in requests]


def _in_batches(
    batches: Sequence[list[int]], ask: Callable[[list[int]], list[_Result]], done: Callable[[int], None]
) -> list[_Result]:
    results: dict[int, _Result] = {}
    for indices in batches:
        results |= dict(zip(indices, ask(indices), strict=True))
        done(len(indices))
    return [results[i] for i in range(len(results))]
