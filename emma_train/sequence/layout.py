"""How a sample is laid out as segments of text and images (paper §2.2, "Sequence layouts").

Qwen's chat template, with an image as <|vision_start|> its visual tokens <|vision_end|>:
  I2T   user: image(s) and question; assistant: answer. Only answers (and their <|im_end|>) are supervised. An
        image stands where `<image>` is written in a user turn; without, all images open the first user turn. The
        template no_think puts Qwen3's empty think block before the last answer.
  T2I   user: prompt; assistant: <|vision_start|> and the noised target.
  IT2I  user: reference image(s) and instruction; assistant: <|vision_start|> and the noised target.
  recon user: understanding image without its latent, and a fixed text; assistant: <|vision_start|> and the same image,
        noised (RecA, arXiv 2509.07295).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

from emma_train.sequence.tokens import TextTokenizer


class ImageRole(IntEnum):
    """What an image is for. The order is that of the residual stream (branch order)."""

    UND = 1
    """To be understood: Und adapter, Und branch, causal."""
    REFERENCE = 2
    """To be edited: Gen adapter, Gen branch, full within itself, flow time 0."""
    TARGET = 3
    """To be made: Gen adapter, Gen branch, full within itself, noised."""


@dataclass(frozen=True)
class TextSegment:
    """A run of token ids; `supervised` ids are predicted by the token before them."""

    ids: tuple[int, ...]
    supervised: bool = False


@dataclass(frozen=True)
class ImageSegment:
    """Visual tokens of one image of the sample, named as in its record."""

    name: str
    role: ImageRole
    semantic_only: bool = False
    """Whether the model sees the semantic half of an understanding image only, with zeros for the latent half."""


Segment = TextSegment | ImageSegment
IMAGE_MARK = "<image>"
"""Stands for the next image in the text of a user turn (ours: as LLaVA's data; the paper does not say)."""


def understanding(tokenizer: TextTokenizer, images: Sequence[str], turns: Sequence[tuple[str, str]]) -> list[Segment]:
    """I2T. `turns` are (speaker, text); a speaker is system, user or assistant.

    Each IMAGE_MARK of the user turns is the next image; without marks, all images open the first user turn. Raises
    ValueError as `check_marks` does.
    """
    check_marks(turns, len(images))
    segments: list[Segment] = []
    names = iter(images)
    to_open = 0 if num_marks(turns) else len(images)
    for index, (speaker, text) in enumerate(turns):
        _text(segments, tokenizer.encode(f"<|im_start|>{speaker}\n"))
        if speaker == "user":
            for name in islice(names, to_open):
                _image(segments, tokenizer, name, ImageRole.UND)
            to_open = 0
            *before_images, text = text.split(IMAGE_MARK)
            for before_image in before_images:
                _text(segments, tokenizer.encode_user(before_image))
                _image(segments, tokenizer, next(names), ImageRole.UND)
        if speaker == "assistant":
            if index + 1 == len(turns):
                _text(segments, tokenizer.answer_prefix)
            _text(segments, [*tokenizer.encode_user(text), tokenizer.im_end], supervised=True)
            if index + 1 < len(turns):
                _text(segments, tokenizer.encode("\n"))
        else:
            _text(segments, [*tokenizer.encode_user(text), tokenizer.im_end, *tokenizer.encode("\n")])
    return segments


def num_marks(turns: Sequence[tuple[str, str]]) -> int:
    """Number of IMAGE_MARKs in the user turns."""
    return sum(text.count(IMAGE_MARK) for speaker, text in turns if speaker == "user")


def check_marks(turns: Sequence[tuple[str, str]], num_images: int) -> None:
    """Raise ValueError where images of a conversation have no position: IMAGE_MARKs, but not one for each image, or no
    user turn."""
    if num_marks(turns) not in (0, num_images):
        raise ValueError(f"{num_marks(turns)} {IMAGE_MARK} in the user turns for {num_images} images")
    if num_images and all(speaker != "user" for speaker, _ in turns):
        raise ValueError("no user turn for its images to stand in")


def answer_opening(tokenizer: TextTokenizer) -> list[Segment]:
    """What follows the question where the answer is still to be written."""
    return [TextSegment((*tokenizer.encode("<|im_start|>assistant\n"), *tokenizer.answer_prefix))]


def generation(
    tokenizer: TextTokenizer,
    images: Sequence[str],
    text: str,
    target: str,
    role: ImageRole = ImageRole.REFERENCE,
    semantic_only: bool = False,
) -> list[Segment]:
    """T2I without images, IT2I with references, recon with the semantic half of understanding images.

    An empty text is the unconditional prompt.
    """
    segments: list[Segment] = []
    _text(segments, tokenizer.encode("<|im_start|>user\n"))
    for name in images:
        _image(segments, tokenizer, name, role, semantic_only)
    _text(segments, [*tokenizer.encode_user(text), tokenizer.im_end])
    _text(segments, tokenizer.encode("\n<|im_start|>assistant\n<|vision_start|>"))
    segments.append(ImageSegment(target, ImageRole.TARGET))
    return segments


def num_text_tokens(segments: Sequence[Segment]) -> tuple[int, int]:
    """(text tokens, supervised tokens) of a layout."""
    texts = [s for s in segments if isinstance(s, TextSegment)]
    return sum(len(s.ids) for s in texts), sum(len(s.ids) for s in texts if s.supervised)


def _image(
    segments: list[Segment], tokenizer: TextTokenizer, name: str, role: ImageRole, semantic_only: bool = False
) -> None:
    _text(segments, [tokenizer.id("<|vision_start|>")])
    segments.append(ImageSegment(name, role, semantic_only))
    _text(segments, [tokenizer.id("<|vision_end|>")])


def _text(segments: list[Segment], ids: Sequence[int], supervised: bool = False) -> None:
    if ids:
        segments.append(TextSegment(tuple(ids), supervised))
