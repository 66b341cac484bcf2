"""`evaluate --judge` from the folder of images to the files that --score takes."""

import argparse
import json
from pathlib import Path

import pytest

from emma_train.commands.judge import add_judge_arguments, judge_benchmark, judge_summary
from emma_train.errors import UserError
from emma_train.evaluate.layouts import read_benchmark
from tests.benchmarks import encoded, geneval_data, imgedit_data
from tests.chat_server import chat_server


def parsed(*options: str, data: Path, out: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser.add_argument_group())
    return argparse.Namespace(**vars(parser.parse_args(options)), data=str(data), out=str(out))


def test_a_judge_behind_an_endpoint_marks_every_image(tmp_path: Path) -> None:
    data, out = imgedit_data(tmp_path), tmp_path / "out"
    benchmark, items = read_benchmark("imgedit", data)
    (out / "images").mkdir(parents=True)
    for item in items:
        (out / "images" / f"{item.name}.png").write_bytes(encoded(40, 60, item.number))
    with chat_server(lambda q: json.dumps({"score": [4, 4, 4], "reasoning": "good"})) as server:
        options = ("--judge", "judge-7b", "--judge-endpoint", server.url)
        files = judge_benchmark(parsed(*options, data=data, out=out), benchmark, items)
    scores = benchmark.score(items, [Path(file) for file in files], data)
    assert scores.rows[-1]["value"] == 4.0 and not scores.failures
    summary = judge_summary(out)
    assert summary["model"] == "judge-7b" and summary["answers"] == {"asked": 6, "cached": 0, "corrected": 0}
    assert server.questions[0].body["model"] == "judge-7b" and server.questions[0].body["max_tokens"] == 1400


def test_a_benchmark_without_a_judge_is_refused(tmp_path: Path) -> None:
    data = geneval_data(tmp_path)
    benchmark, items = read_benchmark("geneval", data)
    with pytest.raises(UserError, match="--judge: no chat model judges geneval; run its official scorer"):
        judge_benchmark(parsed("--judge", "judge-7b", data=data, out=tmp_path / "out"), benchmark, items)
