"""`text-edits`: edits of words in images (paper, Fig. 4). OCR finds a line, it is replaced or removed by a diffusers
pipeline, and OCR checks that the new word is there, the old one is gone and all other lines are as before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.prepare.operator import READ_ERRORS, Rejected, reason_of
from data_pipelines.prepare.operators.ocr import TextLine, TextReader
from data_pipelines.prepare.record_images import main_image, rgb_image
from data_pipelines.prepare.stored_record import StoredRecord
from data_pipelines.prepare.synthesis.image_pipeline import ImagePipeline
from data_pipelines.prepare.synthesis.synthetic_record import (
    Synthesis,
    SynthesisOutcome,
    Synthesize,
    lossless,
    pair_record,
)
from emma_train.errors import UserError
from emma_train.sequence.seeds import choice_of, seed_of, uniform_of

REPLACEMENTS = (
    "OPEN", "SALE", "HELLO", "COFFEE", "MUSIC", "BEACH", "WELCOME", "HAPPY", "MARKET", "GARDEN", "PARIS", "SUMMER",
    "欢迎", "咖啡", "音乐", "花园", "快乐", "夏天",
)  # fmt: skip
"""What texts are replaced by, if the setting `words` is empty: Chinese words where the old text is Chinese."""


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def choose_line(lines: Sequence[TextLine], min_score: float, seed: int, key: str) -> TextLine:
    """A line that was read surely, occurs once and has 2 to 24 characters. Raises ValueError where there is none."""
    texts = [line.text for line in lines]
    sure = [
        line for line in lines if line.score >= min_score and 2 <= len(line.text) <= 24 and texts.count(line.text) == 1
    ]
    if not sure:
        raise ValueError("no line of text in it that can be edited")
    return sure[choice_of(len(sure), seed, 0, key, "line")]


def edit_of_line(
    line: TextLine, words: Sequence[str], seed: int, key: str, remove_share: float
) -> tuple[str, str, str]:
    """(new text, instruction, reverse instruction); an empty new text removes the line."""
    if uniform_of(seed, 0, key, "remove text") < remove_share:
        return "", f'remove the text "{line.text}"', f'write the text "{line.text}"'
    fitting = [word for word in words if is_chinese(word) == is_chinese(line.text) and word != line.text]
    if not fitting:
        raise ValueError(f"no word to put in the place of {line.text!r}")
    new = fitting[choice_of(len(fitting), seed, 0, key, "new text")]
    return new, f'replace the text "{line.text}" with "{new}"', f'replace the text "{new}" with "{line.text}"'


def check_text_edit(before: Sequence[str], after: Sequence[str], old: str, new: str) -> str:
    """What is wrong with the lines after an edit of the line `old`, or an empty text. Case and spaces do not count."""
    plain_before, plain_after = ([_plain(text) for text in lines] for lines in (before, after))
    expected = [text for text in plain_before if text != _plain(old)] + ([_plain(new)] if new else [])
    if _plain(old) in plain_after:
        return f"the text {old!r} is still in it"
    if new and _plain(new) not in plain_after:
        return f"the text {new!r} is not in it; OCR reads {', '.join(after) or 'nothing'}"
    if sorted(expected) != sorted(plain_after):
        return f"other texts have changed: {', '.join(before)} became {', '.join(after)}"
    return ""


def _plain(text: str) -> str:
    return "".join(text.lower().split())


class TextEdits:
    """Makes text edits."""

    def __init__(self, reader: TextReader, pipeline: ImagePipeline, settings: Mapping[str, Any]) -> None:
        self.reader, self.pipeline, self.settings = reader, pipeline, settings
        self.words = tuple(settings["words"]) or REPLACEMENTS

    def __call__(self, records: Sequence[StoredRecord]) -> list[SynthesisOutcome]:
        """A pair of each record, or why there is none."""
        outcomes: list[SynthesisOutcome] = []
        for record in records:
            try:
                outcomes.append(self._edit(record))
            except READ_ERRORS as error:
                outcomes.append(Rejected(str(error) if type(error) is ValueError else reason_of(error)))
        return outcomes

    def _edit(self, record: StoredRecord) -> SynthesisOutcome:
        s = self.settings
        before = rgb_image(record.image(main_image(record)), s["side"])
        lines = self.reader.lines(before)
        line = choose_line(lines, s["min_text_score"], s["seed"], record.key)
        new, instruction, reverse = edit_of_line(line, self.words, s["seed"], record.key, s["remove_share"])
        source = Image.fromarray(before)
        after = self.pipeline.run(instruction, seed_of(s["seed"], 0, record.key, "edit"), source)
        texts_after = [line.text for line in self.reader.lines(np.asarray(after))]
        if problem := check_text_edit([line.text for line in lines], texts_after, line.text, new):
            return Rejected(problem)
        origin = {"source_key": record.key, "pipeline": self.pipeline.name, "texts": [line.text, new]}
        before_file = ("webp", lossless(source))
        return pair_record(before_file, after, (instruction, reverse), ("text", "text"), synthesis=origin, tags=[])


def _start(settings: Mapping[str, Any]) -> Synthesize:
    if not settings["pipeline"] or not settings["weights"]:
        raise UserError("edits are made by a diffusers pipeline: give --set pipeline=CLASS and --set weights=FOLDER")
    pipeline = ImagePipeline(settings["pipeline"], Path(settings["weights"]), settings["steps"])
    return TextEdits(TextReader(), pipeline, settings)


TEXT_EDITS_SYNTHESIS = Synthesis(
    "text-edits",
    1,
    _start,
    {
        "pipeline": "",
        "weights": "",
        "steps": 50,
        "side": 1024,
        "seed": 0,
        "words": [],
        "remove_share": 0.3,
        "min_text_score": 0.9,
    },
    files=frozenset(("weights",)),
)
