"""Trains the demo's tiny LLM: a `transformers.Qwen3ForCausalLM` of the recipe's sizes, on the texts of a set's train.

    python -m data_pipelines.emoji.train_llm --data runs/emoji --out qwen3 --minutes 6

Its texts are captions, edit instructions and questions with answers, laid out as the stages lay them out. Images are
left out. Each question comes a second time with a caption in the place of its image, so that the model learns to read
the answer from there. The perplexity is measured on captions of drawings that train does not have, with the weights as
stored (bf16), in fp32 arithmetic.
"""

import argparse
import json
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_pipelines.emoji.foundation import Measures, minimise, random_batches, read_split, run_training
from data_pipelines.emoji.splits import HELDOUT_DRAWINGS, TRAIN
from data_pipelines.shards.record import layouts
from emma_train.config.schema import DecoderConfig, Recipe
from emma_train.export.export import copy_tokenizer
from emma_train.export.hf_names import qwen3_config
from emma_train.export.qwen3 import tokenizer_config
from emma_train.sequence.layout import Segment, TextSegment
from emma_train.sequence.tasks import RECORD_KEYS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.files import write_atomic

log = logging.getLogger(__name__)

BATCH_TEXTS = 64
INITIAL_STD = 0.06
"""About 1 / sqrt(hidden)."""
IGNORED = -100
"""Label of a token without a loss."""


def record_sequences(record: Mapping[str, Any], tokenizer: TextTokenizer) -> Iterator[list[int]]:
    """Token ids of the texts of a record: each alternative without its images, and each question once more with each
    caption of its image in the image's position."""
    captions = defaultdict(list)
    for alternative in record.get("t2i", []):
        captions[alternative["target"]].append(tokenizer.encode_user(alternative["text"]))
    for task in RECORD_KEYS:
        for segments in layouts(dict(record), task, tokenizer):
            yield token_ids(segments)
            shown = [segment.name for segment in segments if not isinstance(segment, TextSegment)]
            if task == "i2t":
                yield from (token_ids(segments, {name: caption}) for name in shown for caption in captions[name])


def token_ids(segments: Iterable[Segment], captions: Mapping[str, Sequence[int]] | None = None) -> list[int]:
    """Token ids of a layout; an image is its caption by its name, or nothing."""
    texts = (s.ids if isinstance(s, TextSegment) else (captions or {}).get(s.name, ()) for s in segments)
    return [token for text in texts for token in text]


def padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    """int64 [sequences, longest], with IGNORED behind shorter ones."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def text_loss(model: Qwen3ForCausalLM, labels: Tensor, num_given: int = 0) -> Tensor:
    """Mean loss of the tokens of `padded`, but for the first `num_given` of each sequence."""
    targets = labels.clone()
    targets[:, :num_given] = IGNORED
    loss: Tensor = model(input_ids=labels.clamp(min=0), labels=targets).loss
    return loss


def train_llm(
    sequences: Sequence[Sequence[int]], decoder: DecoderConfig, minutes: float, seed: int = 0, steps: int | None = None
) -> tuple[Qwen3ForCausalLM, list[float]]:
    """Returns the model and the loss of each step."""
    model = Qwen3ForCausalLM(Qwen3Config(**qwen3_config(decoder), initializer_range=INITIAL_STD))
    batches = random_batches(len(sequences), BATCH_TEXTS, seed)

    def next_loss() -> Tensor:
        return text_loss(model, padded([sequences[index] for index in next(batches)]))

    return model, minimise(model, next_loss, minutes, steps)


def save_llm(model: Qwen3ForCausalLM, out: Path, tokenizer: TextTokenizer) -> Qwen3ForCausalLM:
    """Write a folder of transformers in bf16, with the tokenizer. Returns the model, read back in fp32."""
    stored = deepcopy(model).bfloat16()
    stored.config.pad_token_id = tokenizer.endoftext
    stored.config.eos_token_id = stored.generation_config.eos_token_id = tokenizer.im_end
    stored.save_pretrained(out)
    copy_tokenizer(tokenizer.path, out)
    write_atomic(out / "tokenizer_config.json", json.dumps(tokenizer_config(), indent=2) + "\n")
    return Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def split_captions(folder: Path, split: str, tokenizer: TextTokenizer) -> list[list[int]]:
    """Token ids of every caption of a split, with the <|im_end|> that follows it."""
    alternatives = (item for record, _ in read_split(folder, split) for item in record.get("t2i", []))
    return [[*tokenizer.encode_user(item["text"]), tokenizer.im_end] for item in alternatives]


@torch.no_grad()
def caption_perplexity(model: Qwen3ForCausalLM, captions: Sequence[Sequence[int]], tokenizer: TextTokenizer) -> float:
    """Perplexity per token of captions as prompts of a user."""
    opening = tokenizer.encode("<|im_start|>user\n")
    labels = padded([[*opening, *caption] for caption in captions])
    return math.exp(text_loss(model, labels, len(opening)))


def unigram_perplexity(train: Iterable[Sequence[int]], captions: Iterable[Sequence[int]], num_tokens: int) -> float:
    """Perplexity of the frequencies of the tokens in `train`, each counted once more than it occurs."""
    seen, wanted = (torch.tensor([token for caption in part for token in caption]) for part in (train, captions))
    counts = torch.bincount(seen, minlength=num_tokens) + 1
    return math.exp(-(counts / counts.sum()).log()[wanted].mean())


def _train_and_measure(options: argparse.Namespace, recipe: Recipe) -> Measures:
    tokenizer = TextTokenizer(recipe.data.tokenizer, recipe.data.template)
    records = [record for record, _ in read_split(options.data, TRAIN)]
    sequences = [sequence for record in records for sequence in record_sequences(record, tokenizer)]
    train, heldout = (split_captions(options.data, split, tokenizer) for split in (TRAIN, HELDOUT_DRAWINGS))
    log.info("%d texts of %d records to train on", len(sequences), len(records))
    model, losses = train_llm(sequences, recipe.model.decoder, options.minutes, options.seed)
    stored = save_llm(model, options.out, tokenizer)
    return {
        "parameters": stored.num_parameters(),
        "steps": len(losses),
        "minutes": options.minutes,
        "heldout_captions": len(heldout),
        "perplexity": caption_perplexity(stored, heldout, tokenizer),
        "perplexity_of_a_unigram": unigram_perplexity(train, heldout, tokenizer.vocab),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return run_training(__doc__ or "", _train_and_measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
