"""The adapter of lmms-eval with small stand-ins for its classes: what it asks the model, and what it returns."""

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from emma_train.errors import UserError
from emma_train.evaluate.harness_model import HarnessModel, Message
from emma_train.evaluate.lmms_eval_plugin import manifests
from emma_train.generate.settings import TextSettings
from tests.helpers import make_image, tiny_recipe, write_export

pytestmark = pytest.mark.seconds  # they load a model


class FakeLmms:
    """The part of lmms_eval.api.model.lmms that the adapter uses."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank


@dataclass
class FakeResult:
    """As lmms_eval.api.instance.GenerationResult."""

    text: Any


@dataclass
class FakeInstance:
    """A request; `args` as lmms_eval.api.instance.Instance has them."""

    args: tuple[Any, ...]


@dataclass
class FakeManifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")}
    modules["lmms_eval.api.model"] = ModuleType("lmms_eval.api.model")
    modules["lmms_eval.api.model"].lmms = FakeLmms  # type: ignore[attr-defined]
    modules["lmms_eval.api.instance"] = ModuleType("lmms_eval.api.instance")
    modules["lmms_eval.api.instance"].GenerationResult = FakeResult  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"] = ModuleType("lmms_eval.models.registry_v2")
    modules["lmms_eval.models.registry_v2"].ModelManifest = FakeManifest  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "emma_train.evaluate.lmms_eval_model", raising=False)
        yield importlib.import_module("emma_train.evaluate.lmms_eval_model")
        sys.modules.pop("emma_train.evaluate.lmms_eval_model")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "export"
    write_export(folder, tiny_recipe("stage3"))
    return str(folder)


ROWS = [
    {"image": Image.fromarray(make_image(2, 2, 1)), "question": "What is this?"},
    {"image": Image.fromarray(make_image(3, 2, 2)), "question": "Which colour has it?"},
    {"image": None, "question": "Say something."},
]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    image = [{"type": "image", "url": row["image"]}] if row["image"] else []
    text = [{"type": "text", "text": "Look: "}, *image, {"type": "text", "text": row["question"]}]
    return [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": text}]


@pytest.fixture(scope="module")
def chat(adapter: Any, export: str) -> Any:
    """The adapter's model for messages, in batches of two."""
    model = adapter.EmmaChat(export, device="cpu", batch_size="2")
    model.task_dict = {"task": {"test": ROWS}}
    return model


def direct(model: HarnessModel, number: int, settings: TextSettings) -> str:
    """The answer without the adapter."""
    row = ROWS[number]
    image = [row["image"]] if row["image"] else []
    asked = [Message("system", ["Be brief."]), Message("user", ["Look: ", *image, row["question"]])]
    return model.answers([model.request("x", asked)], settings)[0]


def test_the_entry_point_of_setup_cfg_is_ours(adapter: Any) -> None:
    (manifest,) = manifests()
    assert manifest.model_id == "emma"
    for path, is_simple in ((manifest.chat_class_path, False), (manifest.simple_class_path, True)):
        module, _, name = path.rpartition(".")
        assert module == adapter.__name__ and getattr(adapter, name).is_simple is is_simple
    config = (Path(__file__).parents[4] / "setup.cfg").read_text()
    assert "lmms_eval.models =\n    emma = emma_train.evaluate.lmms_eval_plugin:manifests" in config


def test_answers_come_in_order_whatever_their_lengths_and_settings(chat: Any) -> None:
    longer = {**GREEDY, "max_new_tokens": 9, "until": None}
    kwargs = [GREEDY, longer, GREEDY]
    requests = [FakeInstance(("", messages, kwargs[i], i, "task", "test")) for i in range(3)]
    answers = chat.generate_until(requests)
    assert answers == [direct(chat.model, i, TextSettings(kwargs[i]["max_new_tokens"])) for i in range(3)]
    assert len(set(answers)) == 3 and chat.model.max_samples == 2


def test_settings_of_tasks(adapter: Any) -> None:
    T = TextSettings
    cases: list[tuple[dict[str, Any], TextSettings]] = [
        ({}, T(1024)),
        ({"max_new_tokens": 16, "temperature": 0, "do_sample": False}, T(16)),
        ({"temperature": 0.7, "do_sample": True}, T(1024, 0.7)),
        ({"temperature": 0.7, "do_sample": False}, T(1024, 0.0)),
        ({"do_sample": True}, T(1024, 1.0)),
        ({"temperature": 0.5}, T(1024, 0.5)),
        ({"until": ["\n\n"]}, T(1024)),
        ({"until": ["ASSISTANT:", "\n\n"]}, T(1024, stop=("ASSISTANT:", "\n\n"))),
        ({"until": "."}, T(1024, stop=(".",))),
    ]
    for kwargs, settings in cases:
        assert adapter.text_settings(kwargs) == settings, kwargs


def test_repeats_of_a_sampled_request_differ_and_a_second_run_is_the_same(
    chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = {**GREEDY, "temperature": 1.0, "do_sample": True}
    requests = [FakeInstance(("", messages, sampled, 0, "task", "test"))] * 3
    answers = chat.generate_until(requests)
    assert len(set(answers)) == 3
    assert chat.generate_until(requests) == answers
    monkeypatch.setattr(chat, "seed", 1)
    assert chat.generate_until(requests) != answers


def test_rounds_go_on_until_the_task_ends_them(chat: Any) -> None:
    seen: list[tuple[int, int, Any]] = []

    def rounds(row: dict[str, Any], round_idx: int | None = None, **state: Any) -> Any:
        if round_idx is None:
            return messages(row)
        seen.append((round_idx, len(state["previous_output"]), state["previous_round_info"]))
        last = 3 if row is ROWS[0] else 1
        return (messages(ROWS[round_idx % 3]), round_idx >= last, state["previous_output"], f"after {round_idx}")

    requests = [FakeInstance(("", rounds, GREEDY, i, "task", "test")) for i in (0, 1)]
    first, second = chat.generate_until_multi_round(requests)
    want = [direct(chat.model, i, TextSettings(6)) for i in (0, 1, 2)]
    assert (first, second) == (want, [want[1]])
    assert seen == [(1, 1, None), (1, 1, None), (2, 2, "after 1"), (3, 3, "after 2")]
    once = [FakeInstance(("", messages_once, GREEDY, 0, "task", "test"))]
    assert chat.generate_until_multi_round(once) == [want[:1]]


def messages_once(row: dict[str, Any], **state: Any) -> Any:
    """A task without rounds."""
    return messages(row)


def test_likelihoods_choose_as_lmms_eval_does_and_give_perplexities(
    adapter: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "HarnessModel", lambda *arguments: chat.model)
    model = adapter.EmmaSimple("loaded already")
    model.task_dict = {"task": {"test": ROWS}}

    def visual(row: dict[str, Any]) -> list[Any]:
        return [row["image"]] if row["image"] else []

    choices = ["red", "a green one", "blue"]
    asked = [FakeInstance((ROWS[1]["question"], f" {text}", visual, 1, "task", "test")) for text in choices]
    losses = [result.text for result in model.loglikelihood(asked)]
    (request,) = [model.model.request("x", [Message("user", [ROWS[1]["image"], ROWS[1]["question"]])])]
    want = [model.model.likelihoods([request], [text])[0] for text in choices]
    assert [loss for loss, _ in losses] == pytest.approx([-x.text for x in want], abs=1e-4)
    assert min(loss for loss, _ in losses) > 0, "lmms-eval takes the least"
    to_target = FakeInstance((ROWS[1]["question"], lambda row: choices[0], visual, 1, "task", "test"))
    likelihood, is_greedy = model.loglikelihood([to_target])[0].text
    assert likelihood == pytest.approx(-losses[0][0], abs=1e-4) and math.exp(-likelihood) > 1 and is_greedy is False
    text_only = model.loglikelihood([FakeInstance(("", "a cat"))])
    assert text_only[0].text[0] > 0
    simple = [FakeInstance((ROWS[i]["question"], GREEDY, visual, i, "task", "test")) for i in range(3)]
    assert len(model.generate_until(simple)) == 3


def test_what_the_model_cannot_read_or_do_is_said(
    adapter: Any, chat: Any, export: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(ValueError, match="task egoschema shows video; EMMA reads texts and images"):
        adapter.chat_conversation(film, "egoschema")
    with pytest.raises(UserError, match="--model_args attn: emma has pretrained, precision"):
        adapter.EmmaChat(export, device="cpu", attn="flash")
    with pytest.raises(NotImplementedError, match="--force_simple"):
        chat.loglikelihood([])
    monkeypatch.setattr(adapter, "HarnessModel", lambda *arguments: chat.model)
    with pytest.raises(NotImplementedError, match="leave --force_simple out"):
        adapter.EmmaSimple("loaded already").generate_until_multi_round([])
