"""Inside a micro-step nothing is copied between host and device, and nothing waits for a value: every stage at the
width of EMMA-4B on the meta device, which takes the way of a card (issue 18)."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emma_train.config.schema import FlowConfig, LossConfig, ModelConfig
from emma_train.model import emma as emma_module
from emma_train.model.decoder import DecoderLayer
from emma_train.model.emma import Emma
from emma_train.objectives.loss import Counts, LossAccumulator
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import STAGES
from emma_train.training.forward import micro_loss
from tests.card import card_on_meta
from tests.host_copies import host_copies
from tests.unit.emma_train.plan.test_activations import sample

META = torch.device("meta")
UNDERSTAND = [("i2t", 160, 256, 0, 128)]
MAKE = [*UNDERSTAND, ("t2i", 96, 0, 256, 0)]
EDIT = [*MAKE, ("it2i", 64, 1024, 1024, 0)]
LOADS: dict[str, list[tuple[str, int, int, int, int]]] = {
    "stage0": UNDERSTAND, "stage1": MAKE, "stage2": EDIT, "stage3": EDIT, "stage4_expert": UNDERSTAND,
    "stage4_router": UNDERSTAND,
}  # fmt: skip
"""Stage -> samples of a pack: task, text tokens, tokens of the image seen, of the image made, supervised ones."""


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from card_on_meta(monkeypatch)


def labelled(samples: list[Sample]) -> list[Sample]:
    """Every other image is STEM, the last one unknown."""
    for index, each in enumerate(samples):
        label = -1 if index == len(samples) - 1 else index % 2
        each.images = {name: replace(image, stem=label) for name, image in each.images.items()}
    return samples


def micro_step(stage: str) -> Any:
    """A function that runs forward and backward of one micro-step; its pack is on the device already."""
    config = ModelConfig()
    config.decoder.num_layers, config.decoder.num_shared_layers, config.vision.num_layers = 4, 2, 4
    config.vision.stem_expert, config.vision.router = stage.startswith("stage4"), stage == "stage4_router"
    batch: PackedBatch = pack(labelled([sample(*load) for load in LOADS[stage] for _ in range(3)])).to(META)
    with META:
        model = Emma(config).to(torch.bfloat16)
    freeze(model, STAGES[stage].trainable)
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.skip_gen_branch = LOADS[stage] is UNDERSTAND
    autoencoder: Any = SimpleNamespace(scale=0.41407, config=config.autoencoder, device=META)

    def run() -> None:
        accumulator = LossAccumulator(LossConfig(), Counts({"i2t": 1000, "t2i": 2000}), META)
        micro_loss(model, autoencoder, batch, FlowConfig(), STAGES[stage], accumulator).backward()

    return run


@pytest.mark.seconds
@pytest.mark.parametrize("stage", LOADS)
def test_a_micro_step_copies_nothing_and_waits_for_nothing(stage: str) -> None:
    assert host_copies(micro_step(stage)) == []


@pytest.mark.seconds
def test_what_is_planted_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, a list that becomes a tensor, and a mask that indexes."""
    run, plain = micro_step("stage1"), emma_module.position_2d

    def planted(*arguments: Any) -> torch.Tensor:
        positions = plain(*arguments)
        torch.tensor([1, 2], device=META)
        torch.zeros(3).to(META)
        positions[torch.zeros(len(positions), dtype=torch.bool, device=META)].sum()
        return positions

    monkeypatch.setattr(emma_module, "position_2d", planted)
    monkeypatch.setattr("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True)
    kinds = [problem.partition(" at ")[0] for problem in host_copies(run)]
    assert kinds == ["torch.tensor to a device", "copy of (3,)", "index by mask"]
