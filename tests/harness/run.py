"""Both evaluation harnesses end to end on local rows with a trained tiny model, against the generator without them.

python tests/harness/run.py MODEL [--out build/harness]

Prints a table. Exit code 1 where an answer or a score differs. Downloads the harnesses (about 1.4 GB), no data.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from tests.harness.environments import LMMS_EVAL, ROOT, VLMEVALKIT, make_environment, site_packages
from tests.harness.reference import Reference
from tests.harness.rows import write_rows

TASKS = Path(__file__).parent / "lmms_tasks"
KIT_DATA = {"EmojiChartQA": "ImageVQADataset", "EmojiMCQ": "ImageMCQDataset"}


@dataclass(frozen=True)
class Outcome:
    """What a harness made of one task."""

    harness: str
    task: str
    score: float
    reference: float | None
    """The score of the reference's answers; None where the metric is the harness's own."""
    answers: list[str]
    reference_answers: list[str]

    @property
    def num_equal(self) -> int:
        return sum(a == b for a, b in zip(self.answers, self.reference_answers, strict=True))

    @property
    def is_right(self) -> bool:
        same_score = self.reference is None or abs(self.score - self.reference) < 1e-9
        return same_score and self.num_equal == len(self.reference_answers)

    def row(self) -> str:
        reference = "" if self.reference is None else f"{100 * self.reference:.1f}"
        equal = f"{self.num_equal} of {len(self.reference_answers)}"
        return f"| {self.harness} | {self.task} | {100 * self.score:.1f} | {reference} | {equal} |"


class Harnesses:
    """The two environments, the rows and the folder for what they write."""

    def __init__(self, model: str, out: Path) -> None:
        self.model, self.out, self.rows = model, out.resolve(), out.resolve() / "rows"
        self.lmms_python = make_environment(LMMS_EVAL, self.out / LMMS_EVAL.name)
        self.kit_python = make_environment(VLMEVALKIT, self.out / VLMEVALKIT.name)
        for folder in ("rows", "tasks", "results"):
            shutil.rmtree(self.out / folder, ignore_errors=True)
        write_rows(self.rows)
        (self.out / "tasks").mkdir()
        library = str(site_packages(self.out / LMMS_EVAL.name))
        for file in TASKS.iterdir():
            if file.is_file():
                text = file.read_text().replace("ROWS", str(self.rows)).replace("SITE_PACKAGES", library)
                (self.out / "tasks" / file.name).write_text(text)

    def lmms_eval(
        self, tasks: Sequence[str], options: Sequence[str] = (), ranks: int = 1
    ) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Task -> (results, samples in order)."""
        folder = self.out / "results" / f"{'-'.join(tasks)}-{ranks}"
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [str(self.lmms_python), *start, "-m", "lmms_eval", "--model", "emma", *options]
        command += ["--model_args", f"pretrained={self.model}", "--tasks", ",".join(tasks), "--device", "cpu"]
        command += ["--include_path", str(self.out / "tasks"), "--batch_size", "32", "--log_samples"]
        _run([*command, "--output_path", str(folder)], folder.with_suffix(".log"))
        results = json.loads(next(folder.glob("*/*_results.json")).read_text())["results"]
        samples = {}
        for task in tasks:
            lines = next(folder.glob(f"*/*_samples_{task}.jsonl")).read_text().splitlines()
            samples[task] = sorted(map(json.loads, lines), key=lambda line: line["doc_id"])
        return {task: (results[task], samples[task]) for task in tasks}

    def vlmevalkit(self) -> dict[str, tuple[float, list[str]]]:
        """Data set -> (score, answers in order)."""
        folder = self.out / "results" / "vlmevalkit"
        folder.parent.mkdir(exist_ok=True)
        config = {
            "model": {"emma": {}},
            "data": {name: {"class": kind, "dataset": name} for name, kind in KIT_DATA.items()},
        }
        (self.out / "vlmevalkit.json").write_text(json.dumps(config))
        command = [str(self.kit_python), str(Path(__file__).parent / "cpu_vlmevalkit.py"), self.model]
        command += ["--device", "cpu", "--config", str(self.out / "vlmevalkit.json"), "--work-dir", str(folder)]
        _run([*command, "--judge", "exact_matching"], folder.with_suffix(".log"), LMUData=str(self.rows))
        status = json.loads((folder / "emma" / "status.json").read_text())["datasets"]
        outcomes = {}
        for name in KIT_DATA:
            with open(next(folder.glob(f"emma/**/emma_{name}.tsv")), newline="") as file:
                answers = [line["prediction"] for line in csv.DictReader(file, delimiter="\t")]
            outcomes[name] = (status[name]["metrics"][status[name]["primary_metric"]], answers)
        return outcomes


def _run(command: list[str], log: Path, **environment: str) -> None:
    """Run a command from the repository; what it says goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PRED_FORMAT": "tsv", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **settings, **environment}
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}; see {log}")


def _share_right(answers: Sequence[str], truths: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(answers, truths, strict=True)) / len(truths)


def compare(harnesses: Harnesses, reference: Reference) -> list[Outcome]:
    """Every task, by its harness and without one."""
    truths, colours = [row.answer for row in reference.rows], [row.answer for row in reference.chosen]
    direct, letters, likeliest = reference.answers(), reference.ai2d(), reference.most_likely_choices()
    right = _share_right(direct, truths)
    outcomes = []
    one = harnesses.lmms_eval(["emoji_answers", "emoji_rounds", "emoji_ai2d"])
    for ranks, (results, samples) in {
        1: one["emoji_answers"],
        2: harnesses.lmms_eval(["emoji_answers"], ranks=2)["emoji_answers"],
    }.items():
        answers = [line["filtered_resps"].strip() for line in samples]
        task = f"questions, exact match, {ranks} rank{'s' * (ranks > 1)}"
        outcomes.append(Outcome("lmms-eval", task, results["exact,none"], right, answers, direct))
    results, samples = one["emoji_rounds"]
    rounds = [text.strip() for line in samples for text in line["filtered_resps"]]
    twice = [text for text in direct for _ in range(2)]
    outcomes.append(Outcome("lmms-eval", "the same in two rounds", results["exact,none"], right, rounds, twice))
    results, samples = one["emoji_ai2d"]
    answers = [line["filtered_resps"].strip() for line in samples]
    score = results["exact_match,flexible-extract"]
    outcomes.append(Outcome("lmms-eval", "official ai2d", score, None, answers, letters))
    results, samples = harnesses.lmms_eval(["emoji_choices"], ["--force_simple"])["emoji_choices"]
    losses = [[float(loss) for loss, _ in line["filtered_resps"]] for line in samples]
    answers = [reference.choices[values.index(min(values))] for values in losses]
    right = _share_right(likeliest, colours)
    outcomes.append(Outcome("lmms-eval", "choices by likelihood", results["acc,none"], right, answers, likeliest))
    for name, (score, answers) in harnesses.vlmevalkit().items():
        is_choice = name == "EmojiMCQ"
        wanted = reference.multiple_choice() if is_choice else reference.chart_qa()
        task = "multiple choice, exact matching" if is_choice else "ChartQA class, relaxed accuracy"
        answers = [text.strip() for text in answers]
        outcomes.append(Outcome("VLMEvalKit", task, score if is_choice else score / 100, None, answers, wanted))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run folder, checkpoint or export of a tiny model")
    parser.add_argument(
        "--out", type=Path, default=Path("build/harness"), help="environments and results (%(default)s)"
    )
    arguments = parser.parse_args()
    try:
        reference = Reference(arguments.model)
    except UserError as error:
        raise SystemExit(str(error)) from None
    outcomes = compare(Harnesses(arguments.model, arguments.out), reference)
    print("| harness | task | score, % | without a harness, % | equal answers |\n|---|---|---|---|---|")
    print("\n".join(outcome.row() for outcome in outcomes))
    return 0 if all(outcome.is_right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
