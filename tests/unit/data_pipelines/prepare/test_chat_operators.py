"""Captions and judgements by a chat model on loopback, over real shards."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.cli import main
from data_pipelines.prepare.annotate import column_file, reject_file
from data_pipelines.prepare.face_distance import farthest_face
from data_pipelines.prepare.operators.judge_edit import edit_score
from data_pipelines.prepare.record_images import image_for_chat
from emma_train.sequence.tokens import TextTokenizer
from tests.chat_server import ChatServer, Fault, Question, chat_server, completion
from tests.helpers import ASSETS
from tests.shards import edit, jpeg_with_orientation, png, prompt, sixteen_bit_png, write_shards


def annotate(operator: str, folder: Path, server: ChatServer, *settings: str) -> int:
    values = (f"endpoint={server.url}", "model=judge", "retries=1", f"cache={folder.parent / 'answers'}", *settings)
    words = [word for value in values for word in ("--set", value)]
    return main(["annotate", operator, str(folder), "--workers", "1", *words])


def rows(folder: Path, operator: str) -> dict[str, dict]:
    return {
        row["key"]: row
        for tar in sorted(folder.glob("*.tar"))
        for row in pq.read_table(column_file(tar, operator)).to_pylist()
    }


def rejects(folder: Path, operator: str) -> dict[str, str]:
    files = [reject_file(tar, operator) for tar in sorted(folder.glob("*.tar"))]
    lines = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    return {line["key"]: line["reason"] for line in lines}


@pytest.mark.seconds
def test_captions_belong_to_their_images_and_failures_are_rejects(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    contents = [prompt(f"p{i:03d}") for i in range(6)]
    folder = write_shards(tmp_path / "set", contents, per_shard=4)
    captions = {images["img0.png"]: f"image {key}" for key, _, images in contents}
    refused, lied = (contents[n][2]["img0.png"] for n in (1, 4))

    def answer(question: Question) -> str | Fault:
        (image,) = question.images
        if image == refused:
            return Fault(body=completion(None, refusal="no people"))
        return "It is nice." if image == lied else json.dumps({"caption": f" {captions[image]} "})

    with chat_server(answer) as server:
        assert annotate("caption", folder, server, f"tokenizer={ASSETS / 'tokenizer'}") == 0
        assert "6 records read, 4 kept, 2 rejected" in capsys.readouterr().out
        by_key = rows(folder, "caption")
        assert {key: row["caption"] for key, row in by_key.items()} == {
            key: f"image {key}" for key in ("p000", "p002", "p003", "p005")
        }
        tokenizer = TextTokenizer(ASSETS / "tokenizer")
        assert all(row["tokens"] == len(tokenizer.encode_user(row["caption"])) for row in by_key.values())
        reasons = rejects(folder, "caption")
        assert reasons["p001"] == "refused: no people"
        assert reasons["p004"].startswith("not_json: ")
        asked = len(server.questions)
        assert annotate("caption", folder, server, f"tokenizer={ASSETS / 'tokenizer'}") == 0
        assert len(server.questions) == asked, "finished shards ask nothing"
        assert annotate("caption", folder, server, f"tokenizer={ASSETS / 'tokenizer'}", "prompt=Was ist das?") == 0
        assert len(server.questions) > asked, "another prompt is another caption"


def test_an_endpoint_that_goes_away_ends_the_job_and_the_answers_are_not_paid_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = write_shards(tmp_path / "set", [prompt(f"p{i:03d}") for i in range(6)], per_shard=3)

    def failing(question: Question) -> str | Fault:
        return '{"caption": "a fish"}' if question.number <= 4 else Fault(status=503)

    with chat_server(failing) as server:
        assert annotate("caption", folder, server, "parallel=1", "retries=0") == 1
    assert "no answer after one try (HTTP 503)" in capsys.readouterr().err
    with chat_server(lambda question: '{"caption": "a fish"}') as server:
        assert annotate("caption", folder, server, "retries=0") == 0
    assert len(server.questions) == 2
    assert len(rows(folder, "caption")) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "no chat model is named"),
        (("endpoint=localhost", "model=m"), "is no URL"),
        (("backend=llama", "model=m"), "there is endpoint, transformers, vllm"),
        (("backend=vllm", "model=m"), "start `vllm serve MODEL`"),
        (("model=nowhere",), "no chat model that transformers reads"),
    ],
)
def test_a_model_that_is_not_there_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, settings: tuple, message: str
) -> None:
    folder = write_shards(tmp_path / "set", [prompt("p000")])
    words = [word for value in settings for word in ("--set", value)]
    assert main(["annotate", "caption", str(folder), "--workers", "1", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_judge_sees_both_images_and_the_worst_rating_counts(tmp_path: Path) -> None:
    contents = [edit(f"e{i:03d}") for i in range(3)]
    folder = write_shards(tmp_path / "set", contents)
    order = {tuple(images.values()): key for key, _, images in contents}

    def answer(question: Question) -> str:
        forward = tuple(question.images) in order
        assert ("add a fish" if forward else "remove the fish") in question.text
        key = order[tuple(question.images if forward else question.images[::-1])]
        keeps = 3 if key == "e001" and not forward else 8
        return json.dumps({"follows": 9, "keeps": keeps, "quality": 7, "reason": "as asked"})

    with chat_server(answer) as server:
        assert annotate("judge-edit", folder, server) == 0
    by_key = rows(folder, "judge-edit")
    assert {key: row["score"] for key, row in by_key.items()} == {"e000": 7, "e001": 3, "e002": 7}
    assert by_key["e001"]["keeps"] == [8, 3]
    assert by_key["e000"]["face_distance"] is None
    assert edit_score({"follows": 2, "keeps": 9, "quality": 9}) == 2


def test_the_distance_of_faces_is_that_of_the_face_that_changed_most() -> None:
    a, b, near_a = np.zeros(128), np.full(128, 0.1), np.full(128, 0.01)
    assert farthest_face([a, b], [b, near_a]) == pytest.approx(math.sqrt(128) * 0.01)
    assert farthest_face([a, b], [b]) == pytest.approx(math.sqrt(128) * 0.1)
    assert farthest_face([a], []) == math.inf
    assert farthest_face([], [a]) is None


def test_images_are_sent_as_stored_where_models_read_them_and_upright_jpegs_otherwise() -> None:
    assert image_for_chat(png(0, 64), 64) == png(0, 64)
    for data, size in (
        (png(0, 64), (32, 32)),
        (jpeg_with_orientation(6), (32, 16)),
        (sixteen_bit_png(), (32, 16)),
    ):
        sent = Image.open(io.BytesIO(image_for_chat(data, 32)))
        assert (sent.format, sent.size, sent.mode) == ("JPEG", size, "RGB")
    with pytest.raises(OSError, match="truncated"):
        image_for_chat(png(0, 64)[:-2000], 64)


def test_only_records_of_unknown_sources_are_shown_to_the_model(tmp_path: Path) -> None:
    contents = [prompt(f"p{i:03d}") for i in range(4)]
    for number, tag in enumerate(("stem", "general")):
        contents[number][1]["tags"] = [tag]
    folder = write_shards(tmp_path / "set", contents)
    diagram = contents[2][2]["img0.png"]
    assert main(["annotate", "stem", str(folder), "--workers", "1"]) == 0
    with chat_server(lambda q: json.dumps({"stem": q.images == [diagram], "reason": "lines"})) as server:
        assert annotate("stem-vlm", folder, server) == 0
    assert len(server.questions) == 2
    labels = {key: (row["label"], row["reason"]) for key, row in rows(folder, "stem-vlm").items()}
    assert labels == {
        "p000": ("stem", None),
        "p001": ("general", None),
        "p002": ("stem", "lines"),
        "p003": ("general", "lines"),
    }
