"""Trains the tiny recipes' tokenizer: byte-level BPE with Qwen's special tokens on the texts of a data set.

`python -m data_pipelines.emoji.tokenizer SET UNICODE_TABLE OUT` reads `SET/*/*.tar` and writes `OUT/tokenizer.json`;
the names in the Unicode table add words if a small data set has too few for the vocabulary.
"""

import json
import logging
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.emoji.drawings import read_groups
from emma_train.errors import UserError

log = logging.getLogger(__name__)

VOCABULARY = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SCAFFOLDING = (
    "user\n", "assistant\n", "system\n", "user", "assistant", "system", "\n", "?", ".", ", ", "\\frac{", "}{", "}",
    "You are a helpful assistant.", "What is the formula?",
)  # fmt: skip
SCAFFOLDING_WEIGHT = 500


def train_tokenizer(texts: Sequence[str], extra: Sequence[str] = ()) -> Tokenizer:
    """Train a tokenizer of exactly 1,024 tokens. Repeated `texts` count as often as they occur, `extra` texts once.

    Raises UserError if the texts are too few to learn that many merges from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    characters = [chr(code) for code in range(32, 127)]
    corpus = [*texts, *extra, *characters, *SCAFFOLDING * SCAFFOLDING_WEIGHT]
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise UserError(f"only {tokenizer.get_vocab_size()} of {VOCABULARY} tokens could be learnt; give more texts")
    return tokenizer


def set_texts(folder: Path) -> Iterator[str]:
    """Every text of every task in `folder/*/*.tar`, shard after shard."""
    shards = sorted(folder.glob("*/*.tar"))
    if not shards:
        raise UserError(f"{folder}: no SPLIT/*.tar in it; give a folder that `emma-data import` has written")
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.name.endswith(".json") else None
                if stream is not None:
                    yield from record_texts(json.load(stream))


def record_texts(record: dict[str, Any]) -> Iterator[str]:
    """The texts of one record's alternatives."""
    for alternative in record.get("i2t", []):
        yield from (turn["text"] for turn in alternative["turns"])
    for task in ("t2i", "it2i"):
        yield from (alternative["text"] for alternative in record.get(task, []))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3:
        sys.stderr.write("usage: python -m data_pipelines.emoji.tokenizer SET UNICODE_TABLE OUT\n")
        return 2
    folder, table, out = map(Path, arguments)
    try:
        names = [slug.replace("_", " ") for slug in sorted(read_groups(table))]
        tokenizer = train_tokenizer(list(set_texts(folder)), names)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
