"""The judge against a real server on loopback that answers, stalls, fails, refuses and lies; the files that it writes
against the official statistics."""

import json
from pathlib import Path
from typing import Any

import pytest

from emma_train.chat.answer_cache import AnswerCache
from emma_train.chat.chat import Chat
from emma_train.chat.endpoint import Endpoint, EndpointSettings
from emma_train.errors import RunError
from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem
from emma_train.evaluate.image_folder import ImageFolder
from emma_train.evaluate.judge import JudgedItems, judge_images, write_judgement
from emma_train.evaluate.judge_forms import JudgeForm, judge_form
from emma_train.evaluate.layouts import read_benchmark
from tests.benchmarks import encoded, gedit_data, imgedit_data, wise_data
from tests.chat_server import ChatServer, Fault, Question, chat_server, completion

MAKE = {"gedit": gedit_data, "imgedit": imgedit_data, "wise": wise_data}


class Folder:
    """A benchmark's official files, and an image for each item."""

    def __init__(self, name: str, folder: Path, verified: bool = False) -> None:
        self.data, self.out = folder / "data", folder / "out"
        self.data.mkdir()
        MAKE[name](self.data, **({"suffix": "_verified"} if verified else {}))
        self.benchmark: Benchmark
        self.items: list[BenchmarkItem]
        self.benchmark, self.items = read_benchmark(name, self.data)
        self.images = ImageFolder(self.out)
        self.images.prepare()
        for item in self.items:
            for path in self.benchmark.image_files(item):
                self.images.write(path, encoded(40, 60, 100 + item.number))
        form = judge_form(name, self.data)
        assert form is not None
        self.form: JudgeForm = form

    def judge(self, server: ChatServer, cache: bool = False, **changes: Any) -> tuple[JudgedItems, Chat]:
        settings = {"wait_s": 0.01, "retries": 2, "timeout_s": 5, "parallel": 4, **changes}
        endpoint = Endpoint(EndpointSettings(url=server.url, model="judge", **settings))
        chat = Chat(endpoint, AnswerCache(self.out / "answers") if cache else None)
        return judge_images(self.benchmark, self.items, self.images, self.form, chat), chat

    def scores(self, judgement: JudgedItems, chat: Chat) -> tuple[dict[str, float], Any]:
        """Official statistics of the files that the judgement becomes."""
        files = write_judgement(self.out / "judge", self.items, self.form, judgement, chat)
        scores = self.benchmark.score(self.items, files, self.data)
        return {row["name"]: row["value"] for row in scores.rows}, scores


def marks(*values: float, reasoning: str = "because") -> str:
    return json.dumps({"score": list(values), "reasoning": reasoning})


def num_marks(question: Question) -> int:
    schema = question.body["response_format"]["json_schema"]["schema"]
    return int(schema["properties"]["score"]["minItems"])


def test_gedit_asks_twice_and_the_worst_mark_counts(tmp_path: Path) -> None:
    folder = Folder("gedit", tmp_path)

    def answer(question: Question) -> str:
        with_source = len(question.images) == 2
        assert all(image.startswith(b"\xff\xd8\xff") for image in question.images)
        return marks(9, 4) if with_source else marks(7, 8)

    with chat_server(answer) as server:
        scores, official = folder.scores(*folder.judge(server))
    assert len(server.questions) == 2 * len(folder.items) == 12
    semantics = [q.text for q in server.questions if len(q.images) == 2]
    assert sum("把背景换成" in text for text in semantics) == 3 and not official.failures
    for language in ("en", "cn"):
        averages = [scores[f"{language} average: {mark}"] for mark in ("semantics", "quality", "overall")]
        assert averages == pytest.approx([4, 7, 28**0.5])
        assert f"{language} intersection average: overall" in scores
    header = next((tmp_path / "out/judge/eval_results_new").glob("*.csv")).read_text().splitlines()[0]
    assert header == (
        "source_image,edited_image,instruction,sementics_score,quality_score,intersection_exist,instruction_language"
    )


def test_imgedit_is_judged_with_its_source_and_its_type(tmp_path: Path) -> None:
    folder = Folder("imgedit", tmp_path)
    with chat_server(lambda q: marks(5, 4.0, 3) if "(style)" in q.text else marks(2, 2, 2)) as server:
        scores, official = folder.scores(*folder.judge(server))
    assert all(len(question.images) == 2 for question in server.questions) and not official.failures
    assert (scores["style: mark"], scores["adjust: mark"], scores["action: mark"]) == (4.0, 2.0, 2.0)
    assert (
        json.loads((tmp_path / "out/judge/result.json").read_text())["1000"]
        == "Prompt Compliance: 2\nVisual Naturalness: 2\nPhysical & Detail Integrity: 2"
    )


@pytest.mark.parametrize("verified", [False, True])
def test_wise_has_three_marks_or_for_the_verified_set_one(verified: bool, tmp_path: Path) -> None:
    folder = Folder("wise", tmp_path, verified)

    def answer(question: Question) -> str:
        assert "What it must show: why" in question.text and num_marks(question) == (1 if verified else 3)
        return marks(1) if verified else marks(2, 1, 0)

    with chat_server(answer) as server:
        scores, official = folder.scores(*folder.judge(server))
    assert scores["culture: WiScore"] == pytest.approx(1 if verified else (0.7 * 2 + 0.2) / 2)
    assert len(server.questions) == 6 and not official.failures


LIES = {
    "prose": "I would give it 8 and 9.",
    "JSON in prose": f"Here you are: {marks(8, 9, 9)}",
    "one mark less": json.dumps({"score": [8], "reasoning": ""}),
    "above the scale": marks(8, 11, 12),
    "a text as a mark": json.dumps({"score": ["8", "9", "9"], "reasoning": ""}),
    "no mark": json.dumps({"reasoning": "none"}),
    "half a mark": marks(8.5, 9, 9),
    "not a number": '{"score": [NaN, 9, 9], "reasoning": ""}',
    "two answers": '{"score": [9, 9, 9], "score": [1, 1, 1], "reasoning": ""}',
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_of_another_form_is_asked_for_once_more_and_then_a_failure(lie: str, tmp_path: Path) -> None:
    folder = Folder("imgedit", tmp_path)
    liar = folder.items[0].prompt

    def answer(question: Question) -> str:
        return LIES[lie] if liar in question.text else marks(5, 5, 5)

    with chat_server(answer) as server:
        judgement, chat = folder.judge(server)
        scores, official = folder.scores(judgement, chat)
    assert len(server.questions) == len(folder.items) + 1 and chat.counts["corrected"] == 1
    assert list(judgement.failures) == [folder.items[0].name] and len(judgement.marks) == 5
    assert official.failures == [f"{folder.items[0].name}: no answer"]
    assert scores["adjust: mark"] == 2.5, "the failure counts as 0 beside a 5"
    report = json.loads((tmp_path / "out/judge/judge.json").read_text())
    assert report["items"] == {"judged": 5, "without_marks": 1} and list(report["failures"]) == [folder.items[0].name]
    assert report["judge"]["model"] == "judge" and report["judge"]["temperature"] == 0


def test_an_answer_that_is_right_when_corrected_counts(tmp_path: Path) -> None:
    folder = Folder("wise", tmp_path)

    def answer(question: Question) -> str:
        return marks(2, 2, 2) if len(question.body["messages"]) > 1 else "sure!"

    with chat_server(answer) as server:
        judgement, chat = folder.judge(server)
    assert len(judgement.marks) == 6 and not judgement.failures and chat.counts["corrected"] == 6


FAULTS = {
    "refuses": Fault(body=completion(None, refusal="I cannot judge persons")),
    "filters": Fault(body=completion("", finish_reason="content_filter")),
    "is cut off": Fault(body=completion('{"score": [5, 5', finish_reason="length")),
    "says nothing": Fault(body=completion("")),
    "rejects": Fault(status=400, body=b'{"error": {"message": "image too large"}}'),
    "is no completion": Fault(body=b"<html>hello</html>"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_does_not_judge_one_image_costs_that_image_alone(fault: str, tmp_path: Path) -> None:
    folder = Folder("imgedit", tmp_path)
    odd = folder.items[2].prompt
    with chat_server(lambda q: FAULTS[fault] if odd in q.text else marks(4, 4, 4)) as server:
        judgement, _ = folder.judge(server)
    assert list(judgement.failures) == [folder.items[2].name] and len(judgement.marks) == 5


def test_a_server_that_stalls_or_fails_at_first_is_asked_again(tmp_path: Path) -> None:
    folder = Folder("imgedit", tmp_path)
    faults = {1: Fault(status=503), 2: Fault(status=429, headers={"Retry-After": "0.1"}), 3: Fault(stall_s=2)}
    with chat_server(lambda q: faults.get(q.number, marks(3, 3, 3))) as server:
        judgement, _ = folder.judge(server, timeout_s=0.5)
    assert len(judgement.marks) == 6 and not judgement.failures and len(server.questions) == 9


def test_a_run_that_ended_goes_on_from_its_cache(tmp_path: Path) -> None:
    folder = Folder("imgedit", tmp_path)
    with (
        chat_server(lambda q: marks(3, 3, 3) if q.number <= 3 else Fault(status=500)) as server,
        pytest.raises(RunError),
    ):
        folder.judge(server, cache=True, parallel=1)
    with chat_server(lambda q: marks(3, 3, 3)) as server:
        judgement, chat = folder.judge(server, cache=True)
    assert len(judgement.marks) == 6 and len(server.questions) == 3 and chat.counts["cached"] == 3


def test_a_judge_that_never_judges_ends_the_job(tmp_path: Path) -> None:
    folder = Folder("imgedit", tmp_path)
    folder.items = [
        BenchmarkItem(n, str(n), f"edit {n}", folder.items[0].metadata, reference=folder.items[0].reference)
        for n in range(60)
    ]
    for item in folder.items:
        folder.images.write(f"{item.name}.png", encoded(40, 60, item.number))
    with chat_server(lambda q: "a fine image") as server, pytest.raises(RunError, match="50 answers in a row"):
        folder.judge(server)


def test_missing_images_and_sources_are_failures_and_nobody_is_asked(tmp_path: Path) -> None:
    folder = Folder("imgedit", tmp_path)
    (folder.images.images / f"{folder.items[0].name}.png").unlink()
    (folder.data / "original_images/animal/001.jpg").write_bytes(b"no image")
    with chat_server(lambda q: marks(3, 3, 3)) as server:
        judgement, _ = folder.judge(server)
    assert [judgement.failures[folder.items[i].name].split(":")[0] for i in (0, 1)] == ["no_image", "no_source"]
    assert len(server.questions) == 4 == len(judgement.marks)


def test_benchmarks_that_no_chat_model_judges(tmp_path: Path) -> None:
    assert [judge_form(name, tmp_path) for name in ("geneval", "dpg", "geneval2")] == [None] * 3
