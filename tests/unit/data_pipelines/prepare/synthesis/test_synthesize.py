"""Synthesis over real shards: a chat model on loopback, a tiny pipeline, and what becomes of each record."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.cli import main
from data_pipelines.prepare.synthesis.edit_kinds import PAPER_EDIT_KINDS
from data_pipelines.prepare.synthesis.image_pipeline import ImagePipeline
from data_pipelines.prepare.synthesis.rendered_text import NO_FONT
from data_pipelines.shards.check import check_folder
from data_pipelines.shards.index import index_path, read_manifest
from emma_train.sequence.seeds import seed_of
from tests.chat_server import ChatServer, Question, chat_server
from tests.diffusion_models import write_tiny_editor
from tests.helpers import ASSETS
from tests.shards import Content, prompt, write_shards

EDITOR = "StableDiffusionInstructPix2PixPipeline"


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_editor(tmp_path_factory.mktemp("models") / "editor")


def synthesize(name: str, source: Path, out: Path, *settings: str) -> int:
    words = [word for value in settings for word in ("--set", value)]
    tokenizer = str(ASSETS / "tokenizer")
    return main(["synthesize", name, str(source), str(out), "--tokenizer", tokenizer, "--workers", "1", *words])


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members of each record by key."""
    records: dict[str, dict[str, bytes]] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for info in archive.getmembers():
                key, _, part = info.name.partition(".")
                file = archive.extractfile(info)
                assert file is not None
                records.setdefault(key, {})[part] = file.read()
    return records


def rejects(folder: Path) -> dict[str, str]:
    lines = [line for file in sorted(folder.glob("*.rejected.jsonl")) for line in file.read_text().splitlines()]
    return {row["key"]: row["reason"] for row in map(json.loads, lines)}


def edit_settings(server: ChatServer, editor: Path, *settings: str) -> tuple[str, ...]:
    endpoint = (f"endpoint={server.url}", "model=judge", "retries=0", "parallel=2")
    return (*endpoint, f"pipeline={EDITOR}", f"weights={editor}", "steps=2", "faces=false", *settings)


def assert_pairs(out: Path, contents: list[Content], editor: Path) -> None:
    """The set has an edit and its reverse of each of these records, with the pixels of both."""
    records = members(out)
    assert sorted(records) == [f"{key}-edits" for key, _, _ in contents]
    pipeline = ImagePipeline(EDITOR, editor, 2, "cpu")
    for key, _, images in contents:
        made = records[f"{key}-edits"]
        forward, backward = json.loads(made["json"])["it2i"]
        assert (forward["text"], backward["text"]) == (f"change {key}", f"restore {key}")
        assert (forward["images"], forward["target"]) == (["img0"], "img1")
        assert (backward["images"], backward["target"]) == (["img1"], "img0")
        assert (forward["kind"], backward["kind"]) in {("add", "remove"), ("background", "background")}
        source = Image.open(io.BytesIO(images["img0.png"])).convert("RGB")
        assert np.array_equal(Image.open(io.BytesIO(made["img0.webp"])), source)
        expected = pipeline.run(f"change {key}", seed_of(7, 0, key, "edit"), source)
        assert np.array_equal(Image.open(io.BytesIO(made["img1.webp"])), expected)
        assert json.loads(made["json"])["scores"] == {"judge": 8, "face_distance": None}
    assert check_folder(out, 1) == []
    manifest = read_manifest(out)
    assert manifest["samples"]["it2i"] == 3
    assert manifest["provenance"]["synthesis"]["name"] == "edits"
    assert "parallel" not in manifest["provenance"]["synthesis"]["settings"]
    targets = [row for tar in sorted(out.glob("*.tar")) for row in pq.read_table(index_path(tar))["target"].to_pylist()]
    assert targets == [[1, 0]] * 3


@pytest.mark.seconds
def test_pairs_are_made_judged_and_reversed(tmp_path: Path, editor: Path, capsys: pytest.CaptureFixture) -> None:
    contents = [prompt(f"p{i:03d}", side=64) for i in range(5)]
    folder, out = write_shards(tmp_path / "set", contents, per_shard=3), tmp_path / "out"
    keys = {images["img0.png"]: key for key, _, images in contents}

    def answer(question: Question) -> str:
        key = keys[question.images[0]]
        if len(question.images) == 1:
            reply = {"possible": key != "p001", "instruction": f"change {key}", "reverse": f"restore {key}"}
            return json.dumps(reply)
        assert f"Instruction: change {key}" in question.text
        follows = 3 if key == "p003" else 9
        return json.dumps({"follows": follows, "keeps": 8, "quality": 8, "reason": "a bird is missing"})

    with chat_server(answer) as server:
        settings = edit_settings(server, editor, "kinds=[add, background]", "seed=7")
        assert synthesize("edits", folder, out, *settings) == 0
        assert "5 read, 3 made, 2 rejected" in capsys.readouterr().out
        asked = len(server.questions)
        assert asked == 5 + 4
        first = {tar.name: tar.read_bytes() for tar in out.glob("*.tar")}
        assert synthesize("edits", folder, out, *settings) == 0
        assert len(server.questions) == asked, "finished shards ask nothing"
        (out / "shard-000000.done.json").unlink()
        assert synthesize("edits", folder, out, *settings) == 0
        assert {tar.name: tar.read_bytes() for tar in out.glob("*.tar")} == first
    assert rejects(out) == {
        "p001-edits": "the chat model sees no sense in this edit",
        "p003-edits": "the judge gives 3, less than 7: a bird is missing",
    }
    assert_pairs(out, contents[::2], editor)


@pytest.mark.seconds
def test_what_is_missing_is_named(tmp_path: Path, editor: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_shards(tmp_path / "set", [prompt("p000", side=64)])
    out = tmp_path / "out"
    model = ("model=m", "endpoint=http://127.0.0.1:9/v1", "faces=false", f"weights={editor}")
    for settings, message in (
        (("kinds=[add]",), "give --set pipeline=CLASS"),
        ((*model, "pipeline=NoPipeline"), "has no pipeline of this name"),
        ((*model, "pipeline=QwenImageEditPipeline", f"weights={tmp_path}"), "no model of QwenImageEditPipeline"),
        ((*model, f"pipeline={EDITOR}", "kinds=[paint]"), "paint is none; there are add, remove, replace"),
        (("colour=red",), "has no such setting"),
    ):
        assert synthesize("edits", folder, out, *settings) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert synthesize("portraits", folder, out) == 2
    assert "there is edits, text-edits, rendered-text" in capsys.readouterr().err


def test_reverse_of_each_kind_is_a_kind_and_of_the_reverse_the_kind() -> None:
    assert list(PAPER_EDIT_KINDS) == ["add", "remove", "replace", "background", "tone", "try-on", "text"]
    assert all(PAPER_EDIT_KINDS[kind.reverse].reverse == name for name, kind in PAPER_EDIT_KINDS.items())


def test_texts_are_rendered_with_a_prompt_that_quotes_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'emma-train[data]': a font")
    texts = ["HELLO WORLD", "Fresh coffee, every day from seven to eleven", '{"text": "5 < 7"}', "x" * 300, "文字渲染"]
    file, out = tmp_path / "texts.txt", tmp_path / "out"
    file.write_text("\n".join(texts), encoding="utf-8")
    assert synthesize("rendered-text", file, out, "side=128") == 0
    written = capsys.readouterr().out
    assert "5 read, 3 made, 2 rejected" in written
    assert f"1 rejected: {NO_FONT} (all are in *.rejected.jsonl)" in written and "--set 'fonts=[PATH]'" in NO_FONT
    records = members(out)
    assert [json.loads(made["json"])["synthesis"]["text"] for made in records.values()] == [*texts[:2], "5 < 7"]
    for made in records.values():
        record = json.loads(made["json"])
        assert f'"{record["synthesis"]["text"]}"' in record["t2i"][0]["text"]
        image = np.asarray(Image.open(io.BytesIO(made["img0.webp"])))
        assert image.shape in {(128, 128, 3), (128, 192, 3)}
        ink = np.any(image != image[0, 0], axis=2)
        assert 0.01 < ink.mean() < 0.5
        assert not ink[:3].any() and not ink[-3:].any() and not ink[:, :3].any() and not ink[:, -3:].any()
    assert list(rejects(out).values()) == [
        "no text of 1 to 200 characters",
        NO_FONT,
    ]
    first = (out / "shard-000000.tar").read_bytes()
    (out / "shard-000000.done.json").unlink()
    assert synthesize("rendered-text", file, out, "side=128") == 0
    assert (out / "shard-000000.tar").read_bytes() == first
