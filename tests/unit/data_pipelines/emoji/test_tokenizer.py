import json
from pathlib import Path

import pytest

from data_pipelines.emoji.tokenizer import SPECIAL_TOKENS, main, train_tokenizer
from emma_train.errors import UserError

WORDS = [a + b + c for a in "bcdfghjklmnprstvwz" for b in "aeiou" for c in ("st", "rk", "nd", "lp", "xt", "mm")]


def test_exactly_1024_tokens_with_the_chat_in_single_ones() -> None:
    tokenizer = train_tokenizer([f"a {word} on the {word}" for word in WORDS], WORDS)
    assert tokenizer.get_vocab_size() == 1024
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4, 5]
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    assert tokenizer.encode(text).tokens == [
        "<|im_start|>",
        "user",
        "Ċ",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|vision_end|>",
    ]
    assert len(tokenizer.encode("assistant").ids) == 1
    strange = "naïve 表 \t x"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange


def test_too_few_texts_are_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="of 1024 tokens"):
        train_tokenizer(["one", "two"])
    table = tmp_path / "table.json"
    table.write_text(json.dumps({}))
    assert main([str(tmp_path), str(table), str(tmp_path)]) == 2
    assert "no SPLIT/*.tar" in capsys.readouterr().err
    assert main([]) == 2
