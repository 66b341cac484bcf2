"""How GEdit-Bench, ImgEdit and WISE are judged: what a chat model is asked about an image, and the file of its marks.

The form is VIEScore's (arXiv 2312.14867): the judge sees the images and answers with a JSON object of a list of marks
and its reasoning. Scales, numbers of marks and files are the official ones; the words of the questions are ours, so the
scores compare models with each other under one judge, not with scores that the official prompts gave.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from emma_train.chat.request import ChatRequest
from emma_train.evaluate.benchmark import BenchmarkItem
from emma_train.storage.files import make_folder, write_atomic

JudgeMarks = Sequence[float]
GEDIT_TABLE = (
    "source_image", "edited_image", "instruction", "sementics_score", "quality_score", "intersection_exist",
    "instruction_language",
)  # fmt: skip
"""Of the official *_gpt_score.csv; the misspelling is its own."""
GEDIT_SEMANTICS = """You judge the edit of an image. The first image is the source, the second the result.
Instruction: {instruction}
Give two marks from 0 to 10.
First, success: 0, nothing of the instruction is done; 10, all of it is done.
Second, restraint: 0, the result is another image; 10, nothing is changed but what the instruction asks for.
"""
GEDIT_QUALITY = """You judge how an image looks, not what it shows.
Give two marks from 0 to 10.
First, naturalness: 0, light, shadows, distances or proportions cannot be; 10, it looks natural.
Second, artefacts: 0, much is distorted, blurred, cut off or blended wrongly; 10, nothing is.
"""
IMGEDIT_QUESTION = """You judge the edit of an image. The first image is the source, the second the result.
Instruction ({kind}): {instruction}
Give three marks from 1 to 5.
First, compliance: 1, the instruction is ignored or something else is done; 5, exactly it is done.
Second, naturalness: 1, the edit is obvious at once; 5, nobody would notice it. Not above the first mark.
Third, integrity of physics and details: 1, light, geometry or all else that should stay is broken; 5, all is
consistent and kept. Not above the first mark.
"""
WISE_QUESTION = """You judge an image that was generated for a prompt which needs knowledge.
Prompt: {prompt}
What it must show: {explanation}
Give three marks of 0, 1 or 2.
First, consistency: does it show what the prompt means, by the explanation? 0 no, 1 in part, 2 fully.
Second, realism: 0 obviously artificial or impossible, 1 with flaws, 2 realistic for its style.
Third, aesthetic quality: 0 poor, 1 ordinary, 2 well composed.
"""
WISE_VERIFIED_QUESTION = """You judge an image that was generated for a prompt which needs knowledge.
Prompt: {prompt}
What it must show: {explanation}
Give one mark: 1 if the image clearly shows all of it, else 0.
"""
ANSWER_FORM = 'Answer with nothing but JSON: {{"score": [{marks}], "reasoning": "one or two sentences"}}.'


@dataclass(frozen=True)
class JudgeForm:
    """The questions about one image of a benchmark, and its scorer's file."""

    questions: Callable[[BenchmarkItem, bytes], list[ChatRequest]]
    """(item, its image as a file) -> questions. Raises OSError for a source that cannot be read."""
    write: Callable[[Path, Sequence[BenchmarkItem], Mapping[str, Sequence[JudgeMarks]]], list[Path]]
    """(folder, items, name of an item -> marks of each question) -> the files that --score takes."""


def judge_form(benchmark: str, data: Path) -> JudgeForm | None:
    """How a benchmark is judged; None where no chat model judges it."""
    if benchmark == "gedit":
        return JudgeForm(_gedit_questions, _write_gedit)
    if benchmark == "imgedit":
        return JudgeForm(_imgedit_questions, _write_imgedit)
    if benchmark == "wise":
        is_verified = any(data.rglob("*_verified.json"))
        return JudgeForm(
            partial(_wise_questions, is_verified=is_verified), partial(_write_wise, is_verified=is_verified)
        )
    return None


def marks_request(content: Sequence[str | bytes], question: str, num: int, low: int, high: int) -> ChatRequest:
    """A question whose answer has `num` whole marks from `low` to `high`."""
    schema = {
        "type": "object",
        "properties": {
            "score": {
                "type": "array",
                "items": {"type": "integer", "minimum": low, "maximum": high},
                "minItems": num,
                "maxItems": num,
            },
            "reasoning": {"type": "string"},
        },
        "required": ["score", "reasoning"],
        "additionalProperties": False,
    }
    form = ANSWER_FORM.format(marks=", ".join(["mark"] * num))
    return ChatRequest((*content, question + form), schema=schema)


def _gedit_questions(item: BenchmarkItem, image: bytes) -> list[ChatRequest]:
    """Semantics with the source, quality without. JPEG as the official client sends it."""
    assert item.reference is not None
    source, result = _jpeg(item.reference.read()), _jpeg(image)
    semantics = GEDIT_SEMANTICS.format(instruction=item.prompt)
    return [
        marks_request((source, result), semantics, 2, 0, 10),
        marks_request((result,), GEDIT_QUALITY, 2, 0, 10),
    ]


def _write_gedit(folder: Path, items: Sequence[BenchmarkItem], marks: Mapping[str, Sequence[JudgeMarks]]) -> list[Path]:
    """A *_gpt_score.csv for each task; the worst of its marks is the mark of semantics, and of quality."""
    target = folder / "eval_results_new"
    make_folder(target)
    for task in dict.fromkeys(item.name.split("/")[0] for item in items):
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(GEDIT_TABLE)
        for item in items:
            if item.name in marks and item.name.split("/")[0] == task:
                files = [f"fullset/{item.name}{end}.png" for end in ("_SRCIMG", "")]
                worst = [min(values) for values in marks[item.name]]
                facts = [item.metadata[key] for key in ("Intersection_exist", "instruction_language")]
                table.writerow([*files, item.prompt, *worst, *facts])
        write_atomic(target / f"emma_{task}_gpt_score.csv", text.getvalue())
    return [target]


def _imgedit_questions(item: BenchmarkItem, image: bytes) -> list[ChatRequest]:
    assert item.reference is not None
    question = IMGEDIT_QUESTION.format(kind=item.metadata["edit_type"], instruction=item.prompt)
    return [marks_request((_jpeg(item.reference.read()), _jpeg(image)), question, 3, 1, 5)]


def _write_imgedit(
    folder: Path, items: Sequence[BenchmarkItem], marks: Mapping[str, Sequence[JudgeMarks]]
) -> list[Path]:
    """result.json: key -> an answer in the official form, a line for each mark."""
    names = ("Prompt Compliance", "Visual Naturalness", "Physical & Detail Integrity")
    answers = {
        item.name: "\n".join(f"{name}: {mark}" for name, mark in zip(names, marks[item.name][0], strict=True))
        for item in items
        if item.name in marks
    }
    path = folder / "result.json"
    write_atomic(path, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    return [path]


def _wise_questions(item: BenchmarkItem, image: bytes, is_verified: bool) -> list[ChatRequest]:
    template, num, high = (WISE_VERIFIED_QUESTION, 1, 1) if is_verified else (WISE_QUESTION, 3, 2)
    question = template.format(prompt=item.prompt, explanation=item.metadata.get("Explanation", "what the prompt says"))
    return [marks_request((_jpeg(image),), question, num, 0, high)]


def _write_wise(
    folder: Path, items: Sequence[BenchmarkItem], marks: Mapping[str, Sequence[JudgeMarks]], is_verified: bool
) -> list[Path]:
    """*_scores.jsonl: a line for each prompt."""
    keys = ("score",) if is_verified else ("consistency", "realism", "aesthetic_quality")
    lines: list[dict[str, Any]] = [
        {"prompt_id": int(item.name), **dict(zip(keys, marks[item.name][0], strict=True))}
        for item in items
        if item.name in marks
    ]
    path = folder / "emma_scores.jsonl"
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
    return [path]


def _jpeg(image: bytes) -> bytes:
    content = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.convert("RGB").save(content, "JPEG")
    return content.getvalue()
