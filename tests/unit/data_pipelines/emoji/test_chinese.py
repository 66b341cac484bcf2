"""The tiny worlds in Chinese: every word is known and has one meaning, and captions and instructions say the scene."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipelines.emoji import chinese
from data_pipelines.emoji.chinese import chinese_caption, chinese_instruction, chinese_question
from data_pipelines.emoji.concepts import TINY, TINY_CONCEPTS
from data_pipelines.emoji.drawing_sheet import read_sheet
from data_pipelines.emoji.drawings import STYLES, TONES, Drawing
from data_pipelines.emoji.edits import EDITS, DrawingPool, make_edit
from data_pipelines.emoji.exact import ImageJudge
from data_pipelines.emoji.prompts import COUNT_WORDS
from data_pipelines.emoji.questions import PHRASINGS, known_answers, make_question, question_alternative
from data_pipelines.emoji.records import RecordMaker
from data_pipelines.emoji.scenes import BACKGROUNDS, POSITIONS, Layer, Scene, without_hyphens
from data_pipelines.emoji.seeded_rng import pick, seeded_generator
from data_pipelines.emoji.stem import make_stem
from emma_train.errors import UserError
from emma_train.sequence.request import Request
from tests.scenes import EMOJI

HAND = Drawing("waving hand", "high-contrast", "dark", "People & Body", Path("waving-hand-dark.svg"))
GHOST = Drawing("ghost", "flat", None, "Smileys & Emotion", Path("ghost.svg"))


def texts(alternative: dict[str, object]) -> tuple[str, str]:
    question, answer = alternative["turns"]  # type: ignore[misc]
    return question["text"], answer["text"]  # type: ignore[index]


def test_every_word_is_known_and_has_one_meaning() -> None:
    assert set(chinese.CONCEPT_WORDS) == TINY.concepts
    assert set(chinese.GROUP_WORDS) == {group.lower() for group in TINY_CONCEPTS}
    assert set(chinese.STYLE_WORDS) == {without_hyphens(style) for style in STYLES}
    words = (chinese.TONE_WORDS, TONES), (chinese.BACKGROUND_WORDS, BACKGROUNDS), (chinese.POSITION_WORDS, POSITIONS)
    assert all(set(known) == set(needed) for known, needed in (*words, (chinese.NUMBER_WORDS, COUNT_WORDS.values())))
    for known in (chinese.CONCEPT_WORDS, chinese.GROUP_WORDS, chinese.STYLE_WORDS, *(known for known, _ in words)):
        assert len(set(known.values())) == len(known)
    with pytest.raises(UserError, match="only the worlds tiny and tiny-scenes have Chinese words"):
        chinese.check_words(frozenset({"ghost", "zebra"}))


def test_questions_and_answers() -> None:
    rng, scene = seeded_generator(0, "q"), Scene("blue", (Layer(HAND, "left", 0.55),), "OK")
    english = {kind: make_question(rng, "img0", kind, answer) for kind, answer in known_answers(scene).items()}
    answers = {kind: texts(chinese_question(alternative)) for kind, alternative in english.items()}
    assert set(answers) == set(PHRASINGS) and answers["concept"] == ("这是什么", "挥手")
    assert answers["background"][1] == "蓝色" and answers["place"][1] == "左边" and answers["word"][1] == "OK"
    at = question_alternative("img0", "What is at the bottom left?", "ghost", "at")
    assert texts(chinese_question(at)) == ("左下角是什么", "鬼") and chinese_question(at)["kind"] == "at zh"
    for number in range(40):
        stem = make_stem(seeded_generator(1, str(number)))
        for question, answer in stem.questions:
            asked, said = texts(chinese_question(question_alternative("img0", question, answer, "stem")))
            assert not asked.isascii() and (said == answer or answer in ("rising", "falling"))


def test_captions() -> None:
    assert chinese_caption(Scene("blue", (Layer(GHOST),))) == "蓝色背景上的一个扁平风格的鬼"
    small = Scene("pink", (Layer(HAND, "centre", 0.5),))
    assert chinese_caption(small) == "粉色背景上的一个小高对比风格的深肤色的挥手"
    pair = Scene("grey", (Layer(GHOST, "left", 0.46), Layer(HAND, "right", 0.46)))
    assert chinese_caption(pair) == "灰色背景,左边是扁平风格的鬼,右边是高对比风格的深肤色的挥手"


@pytest.mark.parametrize("kind", EDITS)
def test_instructions_name_what_changes(kind: str) -> None:
    drawings, rng = read_sheet(EMOJI).drawings, seeded_generator(2, kind)
    for _ in range(12):
        edit = make_edit(rng, kind, pick(rng, drawings), DrawingPool(drawings))
        forward = edit.kind, edit.before, edit.after, edit.forward
        backward = edit.back_kind, edit.after, edit.before, edit.backward
        for name, source, target, english in (forward, backward):
            text = chinese_instruction(name, source, target)
            shown = {d.concept for d in (*source.drawings, *target.drawings)}
            named = [c for c in shown if c in english.removeprefix("make the background")]
            assert all(chinese.CONCEPT_WORDS[concept] in text for concept in named)
            assert all((word in text) for word in ("HI", "OK", "YES", "NO", "GO", "WOW") if word in english.split())
    ghosts = Scene("blue", (Layer(GHOST),))
    assert chinese_instruction("background", ghosts, replace(ghosts, background="pink")) == "把背景改成粉色"


def test_records_have_both_languages_and_prompts_stay() -> None:
    makers = [RecordMaker(32, "1", 2, True, chinese=on) for on in (False, True)]
    plain, both = (maker.stem(make_stem(seeded_generator(1, "s")))[0] for maker in makers)
    assert both["i2t"][: len(plain["i2t"])] == plain["i2t"] and len(both["i2t"]) == 2 * len(plain["i2t"])
    scene = Scene("blue", (Layer(GHOST),))
    question = make_question(seeded_generator(0, "q"), "img0", "concept", "ghost")
    assert [a["kind"] for a in makers[1].i2t([question], {"img0": scene})] == ["concept", "concept zh", "caption zh"]
    assert makers[0].i2t([question], {"img0": scene}) == [question]
    labels = {"scenes": {"img0": {"background": "blue", "layers": [["flat/ghost", "centre"]]}}}
    known = Request("a/0", "t2i", "a ghost", target_name="img0", labels=labels)
    judge = ImageJudge(read_sheet(EMOJI))
    [asked] = judge.in_chinese([known, replace(known, labels={})])
    assert asked.text == "蓝色背景上的一个扁平风格的鬼" and asked.target_name == "img0"
