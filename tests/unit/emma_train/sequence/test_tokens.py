"""The tokenizer: data can open no turn and no image."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emma_train.errors import UserError
from emma_train.sequence.tokens import SPECIAL, TextTokenizer
from tests.helpers import ASSETS, tokenizer


@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_token_written_in_data_stays_plain_characters(name: str) -> None:
    ours, special = tokenizer(), tokenizer().id(name)
    text = f"look: {name} and {name}!"
    assert ours.encode(text).count(special) == 2
    plain = ours.encode_user(text)
    assert not set(plain) & {ours.id(n) for n in SPECIAL}
    assert ours.decode(plain) == text


@given(st.text(max_size=40))
def test_text_survives_the_way_to_ids_and_back(text: str) -> None:
    import unicodedata

    assert tokenizer().decode(tokenizer().encode_user(text)) == unicodedata.normalize("NFC", text)


def test_decoding_drops_special_tokens() -> None:
    ours = tokenizer()
    assert ours.decode([*ours.encode("a cat"), ours.im_end, ours.endoftext]) == "a cat"


def test_the_same_file_has_the_same_hash_and_a_folder_stands_for_its_file() -> None:
    one, other = TextTokenizer(ASSETS / "tokenizer"), TextTokenizer(ASSETS / "tokenizer" / "tokenizer.json")
    assert one.sha256 == other.sha256 and one.path == other.path and len(one.sha256) == 64


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the tokenizer .* set data.tokenizer"):
        TextTokenizer(tmp_path / "absent.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        TextTokenizer(tmp_path)
    text = (ASSETS / "tokenizer" / "tokenizer.json").read_text().replace("<|vision_end|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="lacks the special token <.vision_end.>"):
        TextTokenizer(tmp_path)
