"""Text to token ids and back, with Qwen's special tokens. Reads a tokenizer.json and loads no model code."""

import hashlib
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from emma_train.errors import UserError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
"""What Qwen3's chat template puts before an answer without thinking."""


class TextTokenizer:
    """A Qwen-style tokenizer and chat template. Raises UserError where the file or a special token is missing."""

    def __init__(self, path: Path | str, template: str = "plain") -> None:
        """`template` is the recipe's data.template."""
        path, self.template = Path(path), template
        self.path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot read the tokenizer ({error.strerror}); set data.tokenizer") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: not a tokenizer.json (no text in UTF-8)") from None
        try:
            self._tokenizer = Tokenizer.from_str(text)
            self._plain = Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{self.path}: not a tokenizer.json ({error})") from None
        # A caption must not be able to open a turn or an image: in data, special tokens are plain characters.
        self._plain.encode_special_tokens = True
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        missing = [name for name in SPECIAL if self._tokenizer.token_to_id(name) is None]
        if missing:
            raise UserError(f"{self.path}: lacks the special token {missing[0]}; a Qwen tokenizer has it")

    @property
    def vocab(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def id(self, token: str) -> int:
        """Id of a special token."""
        token_id = self._tokenizer.token_to_id(token)
        assert token_id is not None, token
        return int(token_id)

    @cached_property
    def im_end(self) -> int:
        return self.id("<|im_end|>")

    @cached_property
    def endoftext(self) -> int:
        return self.id("<|endoftext|>")

    @cached_property
    def answer_prefix(self) -> list[int]:
        """Ids that the template puts before the last answer of a conversation; not supervised."""
        return self.encode(EMPTY_THOUGHT) if self.template == "no_think" else []

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it become their ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_user(self, text: str) -> list[int]:
        """Ids of a text that is data: special tokens written in it stay plain characters."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
