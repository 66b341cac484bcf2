"""Lets a chat model judge a benchmark's images, and writes its marks as the file that `--score` reads.

An answer that cannot be used is asked for once more, and is then a failure: the item has no marks in the file, the
failure is listed in judge.json, and the statistics count it as the lowest score. No mark is ever made up. Answers are
cached, so that a run that ended goes on where it was.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emma_train.chat.chat import Chat
from emma_train.chat.request import ChatRequest
from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem
from emma_train.evaluate.image_folder import ImageFolder
from emma_train.evaluate.judge_forms import JudgeForm, JudgeMarks
from emma_train.storage.files import make_folder, write_atomic

log = logging.getLogger(__name__)
ITEMS_AT_ONCE = 64
"""Whose images are in memory together."""
REPORT_FILE = "judge.json"
NO_IMAGE, NO_SOURCE = "no_image", "no_source"


@dataclass
class JudgedItems:
    """JudgeMarks of items, and why others have none."""

    marks: dict[str, list[JudgeMarks]] = field(default_factory=dict)
    """Name of an item -> marks of each of its questions."""
    failures: dict[str, str] = field(default_factory=dict)
    """Name of an item -> the first reason, and the detail."""


def judge_images(
    benchmark: Benchmark, items: Sequence[BenchmarkItem], images: ImageFolder, form: JudgeForm, chat: Chat
) -> JudgedItems:
    """The judge's marks of every item. Raises UserError and RunError where the judge cannot be asked."""
    judgement = JudgedItems()
    for start in range(0, len(items), ITEMS_AT_ONCE):
        part = items[start : start + ITEMS_AT_ONCE]
        questions = [(item, q) for item in part for q in _questions(benchmark, item, images, form, judgement)]
        answers = chat.ask([request for _, request in questions])
        for (item, _), answer in zip(questions, answers, strict=True):
            if answer.value is None:
                judgement.failures.setdefault(item.name, f"{answer.failure}: {answer.detail}")
            else:
                # JSON schema takes 5.0 for an integer; the official files have 5.
                judgement.marks.setdefault(item.name, []).append([int(mark) for mark in answer.value["score"]])
        log.info("judged %d of %d, %d without marks", start + len(part), len(items), len(judgement.failures))
    for name in judgement.failures:
        judgement.marks.pop(name, None)
    return judgement


def _questions(
    benchmark: Benchmark, item: BenchmarkItem, images: ImageFolder, form: JudgeForm, judgement: JudgedItems
) -> list[ChatRequest]:
    try:
        image = (images.images / next(iter(benchmark.image_files(item)))).read_bytes()
    except OSError as error:
        judgement.failures[item.name] = f"{NO_IMAGE}: {error.strerror}"
        return []
    try:
        return form.questions(item, image)
    except (OSError, ValueError, SyntaxError) as error:
        judgement.failures[item.name] = f"{NO_SOURCE}: {error}"
        return []


def write_judgement(
    out: Path, items: Sequence[BenchmarkItem], form: JudgeForm, judgement: JudgedItems, chat: Chat
) -> list[Path]:
    """Write the scorer's files and judge.json into a folder; returns the former."""
    make_folder(out)
    files = form.write(out, items, judgement.marks)
    report: dict[str, Any] = {
        "judge": dict(chat.model.identity),
        "answers": dict(sorted(chat.counts.items())),
        "items": {"judged": len(judgement.marks), "without_marks": len(judgement.failures)},
        "failures": judgement.failures,
    }
    write_atomic(out / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return files
