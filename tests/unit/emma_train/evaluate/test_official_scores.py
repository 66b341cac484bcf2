"""Official statistics against sums done by hand. On files of full size and random answers they equal the official
scripts (docs/evaluation.md)."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from emma_train.errors import UserError
from emma_train.evaluate.layouts import read_benchmark
from emma_train.evaluate.official_scores import OfficialScores
from emma_train.evaluate.score_edits import imgedit_mark
from tests.benchmarks import dpg_data, gedit_data, geneval2_data, geneval_data, imgedit_data, wise_data


def score(name: str, data: Path, *files: Path) -> tuple[dict[str, float], OfficialScores]:
    benchmark, items = read_benchmark(name, data)
    scores = benchmark.score(items, files, data)
    return {row["name"]: row["value"] for row in scores.rows}, scores


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def geneval_lines(tags: list[str], correct: list[list[bool]]) -> list[dict[str, Any]]:
    return [
        {"filename": f"out/images/{n:05d}/samples/{sample:05d}.png", "tag": tag, "correct": right}
        for n, (tag, samples) in enumerate(zip(tags, correct, strict=True))
        for sample, right in enumerate(samples)
    ]


GENEVAL_TAGS = ["counting", "counting", "colors"]
GENEVAL_CORRECT = [[True, True, False, False], [False] * 4, [True, True, True, False]]


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    geneval_data(tmp_path, 3)
    lines = [json.loads(line) for line in (tmp_path / "evaluation_metadata.jsonl").read_text().splitlines()]
    write_lines(
        tmp_path / "evaluation_metadata.jsonl", [{**a, "tag": t} for a, t in zip(lines, GENEVAL_TAGS, strict=True)]
    )
    return tmp_path


def test_geneval_is_the_mean_of_the_means_of_tags(geneval: Path) -> None:
    results = write_lines(geneval / "results.jsonl", geneval_lines(GENEVAL_TAGS, GENEVAL_CORRECT))
    values, scores = score("geneval", geneval, results)
    assert values == {
        "counting: accuracy": 2 / 8,
        "colors: accuracy": 3 / 4,
        "overall: accuracy": 1 / 2,
        "images: accuracy": 5 / 12,
        "prompts: any right": 2 / 3,
    }
    assert not scores.failures and scores.by_item == {"00000": 0.5, "00001": 0.0, "00002": 0.75}


def test_geneval_counts_a_missing_verdict_as_wrong_and_refuses_foreign_images(geneval: Path) -> None:
    lines = geneval_lines(GENEVAL_TAGS, GENEVAL_CORRECT)
    path = geneval / "results.jsonl"
    values, scores = score(
        "geneval", geneval, write_lines(path, lines[1:8] + [{**lines[8], "correct": None}] + lines[9:])
    )
    assert scores.failures == ["00000/0: no verdict", "00002/0: no verdict"]
    assert values["overall: accuracy"] == (1 / 8 + 2 / 4) / 2
    with pytest.raises(UserError, match="line 13 is of .* again"):
        score("geneval", geneval, write_lines(path, [*lines, lines[0]]))
    with pytest.raises(UserError, match="which is no image of --data"):
        score("geneval", geneval, write_lines(path, [{**lines[0], "filename": "x/00003/samples/00000.png"}]))


DPG_ROWS = [
    ("whoops0", 1, "0", "entity - whole (frog)", "Is there a frog, a red one?"),
    ("whoops0", 2, "0", "entity - whole (sky)", "Is there a sky?"),
    ("whoops1", 1, "0", "entity - whole (frog)", "Is there a frog?"),
    ("whoops1", 2, "1", "attribute - color (frog, red)", "Is the frog red?"),
    ("whoops1", 3, "2", "attribute - shade (red, dark)", "Is the red dark?"),
]


def write_dpg(folder: Path, answers: dict[str, list[str]]) -> Path:
    """`answers`: prompt -> for each cell, y or n for each question but the first of the table."""
    dpg_data(folder, 2)
    with open(folder / "dpg_bench.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "proposition_id", "dependency", "tuple", "question_natural_language"])
        writer.writerows(DPG_ROWS)
    lines = []
    for name, cells in answers.items():
        questions = [row[4] for row in DPG_ROWS[1:] if row[0] == name]
        for number, cell in enumerate(cells):
            box = (number % 2 * 8, number // 2 * 8, number % 2 * 8 + 8, number // 2 * 8 + 8)
            for question, letter in zip(questions, cell, strict=False):
                lines.append(f"out, 1/{name}.png, {box}, {question}, {'yes' if letter == 'y' else 'no, it is not'}")
    (folder / "results_detail.txt").write_text("\n".join(lines) + "\n")
    (folder / "results.txt").touch()
    return folder / "results.txt"


def test_dpg_zeroes_questions_whose_parent_is_not_so(tmp_path: Path) -> None:
    results = write_dpg(tmp_path, {"whoops0": list("yyyn"), "whoops1": ["yyy", "nyy", "yny", "yyn"]})
    values, scores = score("dpg", tmp_path, results)
    assert scores.by_item["whoops0"] == 3 / 4 and not scores.failures and not scores.notes
    assert scores.by_item["whoops1"] == pytest.approx((3 + 0 + 1 + 2) / 12)
    assert values["overall: DPG"] == pytest.approx(100 * (3 / 4 + 6 / 12) / 2)
    assert values["L2 attribute - color: accuracy"] == 100 and values["L2 attribute - shade: accuracy"] == 0
    assert values["L1 attribute: accuracy"] == 50 and values["L1 entity: accuracy"] == 50, "of the last cell alone"


def test_dpg_counts_what_was_not_answered_as_no(tmp_path: Path) -> None:
    _, scores = score("dpg", tmp_path, write_dpg(tmp_path, {"whoops0": list("yy"), "whoops1": ["yyy"] * 3 + ["yy"]}))
    assert scores.failures == [f"whoops0 cell {n}: answers are missing" for n in (2, 3)] + [
        "whoops1 cell 3: answers are missing"
    ]
    assert scores.by_item == {"whoops0": 2 / 4, "whoops1": pytest.approx((3 + 3 + 3 + 2) / 12)}


def test_dpg_leaves_out_the_prompt_of_which_it_skips_a_question(tmp_path: Path) -> None:
    results = write_dpg(tmp_path, {"whoops0": list("yyyy"), "whoops1": ["yyy"] * 4})
    table = (tmp_path / "dpg_bench.csv").read_text()
    (tmp_path / "dpg_bench.csv").write_text(table.replace("whoops0,2,0", "whoops0,2,1"))
    values, scores = score("dpg", tmp_path, results)
    assert values["overall: DPG"] == 100 and list(scores.by_item) == ["whoops1"] and len(scores.notes) == 1


def write_gedit(folder: Path, marks: dict[str, tuple[Any, Any]]) -> Path:
    """`marks`: item -> semantics, quality. The folder of the scorer's files."""
    results = folder / "eval_results_new"
    results.mkdir()
    for task in {name.split("/")[0] for name in marks}:
        with open(results / f"emma_{task}_gpt_score.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["edited_image", "instruction", "sementics_score", "quality_score", "instruction_language"])
            for name, pair in marks.items():
                if name.startswith(f"{task}/"):
                    writer.writerow(
                        [f"out/images/emma/fullset/{name}.png", 'say "hi", twice', *pair, name.split("/")[1]]
                    )
    return results


def test_gedit_is_the_mean_over_tasks_of_roots_in_both_languages(tmp_path: Path) -> None:
    gedit_data(tmp_path, 4)
    marks = {
        "background_change/en/enkey0": (4, 9),
        "background_change/en/enkey3": (0, 9),
        "subject-add/en/enkey1": (8, 2),
        "tone_transfer/en/enkey2": (10, 10),
        **{
            f"{task}/cn/cnkey{n}": (1, 4)
            for n, task in enumerate(["background_change", "subject-add", "tone_transfer"])
        },
        "background_change/cn/cnkey3": (1, 4),
    }
    values, scores = score("gedit", tmp_path, write_gedit(tmp_path, marks))
    assert not scores.failures
    assert values["en background_change: overall"] == 3 and values["en background_change: semantics"] == 2
    assert values["en average: overall"] == pytest.approx((3 + 4 + 10) / 3)
    assert values["en average: semantics"] == pytest.approx((2 + 8 + 10) / 3)
    assert values["cn average: overall"] == 2
    assert values["en intersection average: overall"] == pytest.approx((6 + 10) / 2), "rows 0 and 2 are in it"


@pytest.mark.parametrize("pair", [("", 5), ("nan", 5), (11, 5), (5, "-1"), ("five", 5)])
def test_marks_of_gedit_that_cannot_be_read_are_failures(pair: tuple[Any, Any], tmp_path: Path) -> None:
    gedit_data(tmp_path, 1)
    results = write_gedit(tmp_path, {"background_change/en/enkey0": pair})
    values, scores = score("gedit", tmp_path, results)
    assert scores.failures == [
        "background_change/en/enkey0: the marks cannot be read",
        "background_change/cn/cnkey0: no marks",
    ]
    assert values["en average: overall"] == 0 and values["cn average: overall"] == 0


def test_imgedit_rounds_twice(tmp_path: Path) -> None:
    imgedit_data(tmp_path, 4)
    lines = (
        "Brief reasoning: it is: fine\nPrompt Compliance: {}\nVisual Seamlessness: {}\nPhysical & Detail Fidelity: {}"
    )
    marks = {"1000": (1, 1, 2), "999": (5, 5, 5), "998": (4, 4, 5), "997": (1, 2, 2)}
    answers = {key: lines.format(*three) for key, three in marks.items()}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(answers))
    values, scores = score("imgedit", tmp_path, path)
    assert scores.by_item == {"1000": 1.33, "999": 5.0, "998": 4.33, "997": 1.67}
    assert values == {
        "adjust: mark": 1.5,
        "style: mark": 5.0,
        "action: mark": 4.33,
        "mean of types: mark": pytest.approx(3.61),
    }
    path.write_text(json.dumps({**answers, "999": {"error": "429"}, "998": "I cannot do that"}))
    values, scores = score("imgedit", tmp_path, path)
    assert scores.failures == ["999: the answer cannot be read", "998: the answer cannot be read"]
    assert values["style: mark"] == 0


@pytest.mark.parametrize(
    "answer", ["A: 1\nB: 2", "A: 1\nB: 2\nC: 6", "A: 1\nB: 2\nC: 0", "A: 1\nB: 2\nC: 3\nD: 4", "", None, 5]
)
def test_an_answer_of_imgedit_without_three_marks_cannot_be_read(answer: Any) -> None:
    assert imgedit_mark(answer) is None


def wise_lines(num: int) -> list[dict[str, Any]]:
    return [{"prompt_id": n, "consistency": 2, "realism": 1.0, "aesthetic_quality": 0} for n in range(1, num + 1)]


def test_wise_weighs_marks_and_categories(tmp_path: Path) -> None:
    wise_data(tmp_path, 1)
    for part, name in enumerate(("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")):
        entries = [{"Prompt": str(n), "prompt_id": n} for n in ([1], [401, 568], [701, 801, 901])[part]]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    marks = {1: (2, 2, 2), 401: (0, 0, 0), 568: (2, 0, 0), 701: (0, 2, 0), 801: (0, 0, 2), 901: (1, 1, 1)}
    names = ("consistency", "realism", "aesthetic_quality")
    lines = [{"prompt_id": n, **dict(zip(names, three, strict=True))} for n, three in marks.items()]
    files = [write_lines(tmp_path / "a.jsonl", lines[:3]), write_lines(tmp_path / "b.jsonl", lines[3:])]
    values, scores = score("wise", tmp_path, *files)
    by_category = {"culture": 1, "time": 0, "space": 0.7, "biology": 0.2, "physics": 0.1, "chemistry": 0.5}
    assert {k.split(":")[0]: v for k, v in values.items() if "overall" not in k} == pytest.approx(by_category)
    assert values["overall: WiScore"] == pytest.approx(0.4 + 0.133 * 0.7 + 0.1 * (0.2 + 0.1 + 0.5))
    lines[0]["realism"] = "good"
    _, scores = score("wise", tmp_path, write_lines(tmp_path / "a.jsonl", lines[:5]))
    assert scores.failures == ["1: the marks cannot be read", "901: no marks"]
    verified = write_lines(tmp_path / "v.jsonl", [{"prompt_id": n, "score": n % 2} for n in marks])
    values, _ = score("wise", tmp_path, verified)
    assert values["overall: WiScore"] == pytest.approx(0.4 + 0.12 * 4) and values["space: WiScore"] == 0


def test_geneval2_has_both_means(tmp_path: Path) -> None:
    geneval2_data(tmp_path, 2)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps([[1.0, 0.5, 0.25, 1.0, 1.0], [0.0, 1, 1, 1, 1]]))
    values, scores = score("geneval2", tmp_path, path)
    assert values["overall: Soft-TIFA AM"] == pytest.approx(100 * (3.75 / 5 + 4 / 5) / 2)
    assert values["overall: Soft-TIFA GM"] == pytest.approx(100 * math.pow(0.125, 1 / 5) / 2)
    assert values["count: Soft-TIFA AM"] == pytest.approx(62.5)
    assert values["4 atoms: Soft-TIFA GM"] == 0 and not scores.failures
    path.write_text(json.dumps([[1.0, 0.5, float("nan"), 1.0, 1.0]]))
    _, scores = score("geneval2", tmp_path, path)
    assert [line.split(":")[0] for line in scores.failures] == ["00000", "00001"]


def test_a_missing_file_of_a_scorer_is_named(tmp_path: Path) -> None:
    geneval_data(tmp_path)
    with pytest.raises(UserError, match=r"results.jsonl: does not exist; give the file that the official scorer wrote"):
        score("geneval", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"has no \*_gpt_score.csv; give the scorer's folder eval_results_new"):
        score("gedit", gedit_data(tmp_path), tmp_path)
