"""The adapter and the launcher of VLMEvalKit with small stand-ins for its modules."""

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from emma_train.evaluate import vlmevalkit
from emma_train.evaluate.harness_model import Message
from emma_train.generate.settings import TextSettings
from tests.helpers import make_image, tiny_recipe, write_export

pytestmark = pytest.mark.seconds  # they load a model


class FakeBaseModel:
    """The part of vlmeval.vlm.base.BaseModel that the adapter uses."""

    INTERLEAVE = False

    def __init__(self) -> None:
        self.dump_image_func = None

    def preproc_content(self, inputs: Any) -> list[dict[str, Any]]:
        return [{"type": "text", "value": inputs}] if isinstance(inputs, str) else inputs


@pytest.fixture(scope="module")
def kit() -> Iterator[dict[str, Any]]:
    names = ("vlmeval", "vlmeval.config", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.run")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["vlmeval"].config, modules["vlmeval"].vlm = modules["vlmeval.config"], modules["vlmeval.vlm"]
    modules["vlmeval"].run = modules["vlmeval.run"]
    modules["vlmeval.config"].supported_VLM = {}
    modules["vlmeval.vlm.base"].BaseModel = FakeBaseModel
    modules["vlmeval.run"].load_env = lambda: None
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "emma_train.evaluate.vlmevalkit_model", raising=False)
        yield modules
        sys.modules.pop("emma_train.evaluate.vlmevalkit_model", None)


@pytest.fixture(scope="module")
def model(kit: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model") / "export"
    write_export(folder, tiny_recipe("stage3"))
    adapter = importlib.import_module("emma_train.evaluate.vlmevalkit_model")
    return adapter.EmmaVLM(str(folder), device="cpu", max_tokens=6)


def image_file(folder: Path, seed: int) -> str:
    path = folder / f"{seed}.png"
    Image.fromarray(make_image(2, seed, seed)).save(path)
    return str(path)


def test_texts_and_images_keep_their_order(model: Any, tmp_path: Path) -> None:
    one, other = image_file(tmp_path, 1), image_file(tmp_path, 2)
    asked = [("text", "First "), ("image", one), ("text", ", then "), ("image", other), ("text", ": same?")]
    message = [{"type": kind, "value": value} for kind, value in asked]
    answer = model.generate_inner(message, dataset="MMMU_DEV_VAL")
    parts = ["First ", Path(one), ", then ", Path(other), ": same?"]
    request = model.model.request("x", [Message("user", parts)])
    assert request.turns == [{"role": "user", "text": "First <image>, then <image>: same?"}]
    assert [answer] == model.model.answers([request], TextSettings(6))
    assert model.INTERLEAVE and isinstance(model.generate_inner([{"type": "text", "value": "Hello"}]), str)


def test_a_conversation_is_answered_at_its_end(model: Any, tmp_path: Path) -> None:
    picture = {"type": "image", "value": image_file(tmp_path, 3)}
    conversation = [
        {"role": "user", "content": [picture, {"type": "text", "value": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "value": "Why?"}]},
    ]
    messages = [Message("user", [Path(picture["value"]), "What?"]), Message("assistant", ["a cat"])]
    request = model.model.request("x", [*messages, Message("user", ["Why?"])])
    as_text = [*conversation[:2], {"role": "user", "content": "Why?"}]
    assert model.chat(as_text) == model.chat_inner(conversation)
    with pytest.raises(OSError, match="gone"):
        model.chat([{"role": "user", "content": [{"type": "image", "value": "gone.png"}]}, *as_text[1:]])
    assert [model.chat_inner(conversation)] == model.model.answers([request], TextSettings(6))


STATUS = {"ChartQA_TEST": {"status": "done", "metrics": {"Overall": 42.5}}}
FAILED = {"MMVet": {"status": "failed", "eval_error": "no judge"}, "MMStar": {"status": "infer_done", "metrics": {}}}


def run_of(kit: dict[str, Any], work_dir: Path, status: dict[str, Any]) -> None:
    """VLMEvalKit as it would run: writes its files for the model of its command line."""

    def main() -> None:
        name = sys.argv[sys.argv.index("--model") + 1]
        assert kit["vlmeval.config"].supported_VLM[name].keywords["experts"] is (name == "emma")
        folder = work_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "status.json").write_text(json.dumps({"datasets": status}))

    kit["vlmeval.run"].main = main


def test_the_launcher_registers_the_model_in_both_ways_and_hands_over(
    kit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    run_of(kit, tmp_path, STATUS)
    rest = ["--data", "ChartQA_TEST", "--work-dir", str(tmp_path)]
    assert vlmevalkit.main(["runs/demo", "--no-experts", *rest]) == 0
    assert sys.argv == ["vlmevalkit", *rest, "--mode", "all", "--model", "emma-no-experts"]
    registered = kit["vlmeval.config"].supported_VLM["emma-no-experts"]
    assert registered.func is kit["vlmeval.vlm"].EmmaVLM
    assert registered.keywords["path"] == "runs/demo" and registered.keywords["ema"] is True


def test_a_data_set_without_a_score_is_a_failure(
    kit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    run_of(kit, tmp_path, {**STATUS, **FAILED})
    command = ["runs/demo", "--data", "MMVet", "MMStar", "ChartQA_TEST", "--work-dir", str(tmp_path)]
    with caplog.at_level(logging.ERROR):
        assert vlmevalkit.main(command) == 1
        assert vlmevalkit.main([*command, "--mode", "infer"]) == 0
    assert [record.message for record in caplog.records] == [
        "no score: MMVet: no judge",
        "no score: MMStar: infer_done",
    ]
    assert vlmevalkit.unscored(tmp_path / "nothing.json") != []


def test_without_the_kit_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    with caplog.at_level(logging.ERROR):
        assert vlmevalkit.main(["runs/demo", "--data", "MMStar"]) == 2
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "pip install ms-vlmeval" in caplog.text
