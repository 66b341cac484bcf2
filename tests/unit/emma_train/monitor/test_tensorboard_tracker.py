"""TensorBoard: event files read back, across a resume."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from emma_train.config.load import load_recipe
from emma_train.config.schema import TrackerConfig
from emma_train.errors import UserError
from emma_train.monitor.make_trackers import make_trackers
from emma_train.monitor.tensorboard_tracker import FOLDER
from tests.helpers import ROOT
from tests.unit.emma_train.monitor.test_wandb_tracker import write_samples

pytest.importorskip("tensorboard")


@pytest.mark.seconds
def test_scalars_and_samples_are_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackerConfig(kind=["tensorboard"])
    first = make_trackers(config, tmp_path, {}, resume_step=0)
    for step in (1, 2, 3):
        first.log(step, {"loss": 4.0 - step, "data/digest": "ab"})
    first.samples(2, write_samples(tmp_path / "samples"))
    first.finish(0)
    again = make_trackers(config, tmp_path, {}, resume_step=2)
    again.log(3, {"loss": 0.5})
    again.finish(0)
    events = EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 2.0), (3, 0.5)]
    assert events.Tags()["images"] == ["samples/0 t2i", "samples/1 it2i"]
    assert events.Images("samples/1 it2i")[0].width == 3 * 8  # reference, edit, target
    (answer,) = events.Tensors("samples/2 i2t/text_summary")
    assert b"answer: red" in answer.tensor_proto.string_val[0]


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load: Any = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"which is not installed: pip install -e \.\[tensorboard\]"):
        make_trackers(TrackerConfig(kind=["tensorboard"]), tmp_path, {})


def test_kinds_are_one_or_a_list() -> None:
    recipe = ROOT / "recipes" / "tiny" / "stage1.yaml"
    assert load_recipe(recipe).tracker.kind == ["jsonl"]
    assert load_recipe(recipe, ["tracker.kind=wandb"]).tracker.kind == ["wandb"]
    assert load_recipe(recipe, ["tracker.kind=[wandb, tensorboard]"]).tracker.kind == ["wandb", "tensorboard"]
    with pytest.raises(UserError, match=r"tracker\.kind\[0\] is 'mlflow'; it is one of jsonl, wandb, tensorboard"):
        load_recipe(recipe, ["tracker.kind=mlflow"])
