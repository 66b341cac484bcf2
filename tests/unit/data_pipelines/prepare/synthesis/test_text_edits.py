"""Which texts are edited, and when an edit of a text counts as right."""

from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from data_pipelines.prepare.operators.ocr import TextLine, TextReader, text_share
from data_pipelines.prepare.synthesis.image_pipeline import ImagePipeline
from data_pipelines.prepare.synthesis.rendered_text import break_lines, draw_text, find_fonts, load_font_at
from data_pipelines.prepare.synthesis.text_edits import (
    TEXT_EDITS_SYNTHESIS,
    TextEdits,
    check_text_edit,
    choose_line,
    edit_of_line,
)
from emma_train.errors import UserError
from tests.unit.data_pipelines.prepare.test_image_operators import ImageRecord


def line(text: str, score: float = 0.99) -> TextLine:
    return TextLine(text, score, (0, 0, 10, 10))


@pytest.mark.parametrize(
    ("after", "new", "problem"),
    [
        (["SALE", "today only"], "SALE", ""),
        (["sale", "TODAY ONLY"], "SALE", ""),
        (["today only"], "", ""),
        (["OPEN", "today only"], "SALE", "the text 'OPEN' is still in it"),
        (["SALE", "OPEN", "today only"], "SALE", "the text 'OPEN' is still in it"),
        (["SALF", "today only"], "SALE", "the text 'SALE' is not in it; OCR reads SALF, today only"),
        (["SALE", "today"], "SALE", "other texts have changed: OPEN, today only became SALE, today"),
        (["SALE"], "SALE", "other texts have changed: OPEN, today only became SALE"),
        (["SALE", "today only"], "", "other texts have changed: OPEN, today only became SALE, today only"),
        ([], "SALE", "the text 'SALE' is not in it; OCR reads nothing"),
    ],
)
def test_an_edit_is_right_where_one_text_changed_and_no_other(after: list[str], new: str, problem: str) -> None:
    assert check_text_edit(["OPEN", "today only"], after, "OPEN", new) == problem


def test_only_lines_that_were_read_surely_and_once_are_edited() -> None:
    lines = [line("A"), line("OPEN", 0.5), line("twice"), line("twice"), line("x" * 40), line("MENU")]
    assert {choose_line(lines, 0.9, 0, f"key{i}").text for i in range(20)} == {"MENU"}
    with pytest.raises(ValueError, match="no line of text in it"):
        choose_line(lines[:5], 0.9, 0, "key")


def test_words_keep_their_script_and_the_reverse_names_the_old_text() -> None:
    edits = [edit_of_line(line("咖啡"), ("OPEN", "音乐", "咖啡"), 0, f"key{i}", 0.5) for i in range(40)]
    assert set(edits) == {
        ("音乐", 'replace the text "咖啡" with "音乐"', 'replace the text "音乐" with "咖啡"'),
        ("", 'remove the text "咖啡"', 'write the text "咖啡"'),
    }
    assert 10 < sum(new == "" for new, _, _ in edits) < 30
    with pytest.raises(ValueError, match="no word"):
        edit_of_line(line("咖啡"), ("OPEN",), 0, "key", 0.0)


class Scripted:
    """A pipeline and a reader in one: images are known by their first pixel."""

    name = "scripted"

    def __init__(self, after: list[str]) -> None:
        self.texts = {0: [line("OPEN"), line("today only")], 255: [line(text) for text in after]}
        self.prompts: list[str] = []

    def run(self, prompt: str, seed: int, image: Image.Image) -> Image.Image:
        self.prompts.append(prompt)
        return Image.new("RGB", image.size, "white")

    def lines(self, image: np.ndarray) -> list[TextLine]:
        return self.texts[int(image[0, 0, 0])]


@pytest.mark.parametrize(("after", "made"), [(["SALE", "today only"], True), (["SALE", "OPEN"], False)])
def test_an_edit_that_ocr_does_not_confirm_is_rejected(after: list[str], made: bool) -> None:
    script: Any = Scripted(after)
    settings = MappingProxyType({**TEXT_EDITS_SYNTHESIS.settings, "words": ["SALE"], "remove_share": 0.0})
    edits = TextEdits(cast(TextReader, script), cast(ImagePipeline, script), settings)
    black = Image.new("RGB", (32, 32))
    script.texts[0] = [line("OPEN"), line("today only", 0.5)]
    (outcome,) = edits([ImageRecord(black)])
    assert script.prompts == ['replace the text "OPEN" with "SALE"']
    assert hasattr(outcome, "images") == made


def test_the_share_of_text_counts_overlaps_once() -> None:
    boxes = [TextLine("a", 1, (0, 0, 50, 10)), TextLine("b", 1, (40, 5, 60, 10)), TextLine("c", 1, (-5, 95, 10, 120))]
    assert text_share(boxes, 100, 100) == (500 + 50 + 50) / 10_000


def test_lines_break_at_spaces_and_chinese_between_characters() -> None:
    (font,) = find_fonts([])
    loaded = load_font_at(font, 20)
    lines = break_lines("the quick brown fox jumps", loaded, 150)
    assert " ".join(lines) == "the quick brown fox jumps"
    assert len(lines) > 1 and all(loaded.getlength(text) <= 150 for text in lines)
    assert "".join(break_lines("文字渲染测试", loaded, 50)) == "文字渲染测试"
    with pytest.raises(ValueError, match="too long"):
        draw_text("word " * 200, font, (0, 0, 0), 64, 64)
    with pytest.raises(UserError, match="is no font and holds none"):
        find_fonts(["/nowhere"])
