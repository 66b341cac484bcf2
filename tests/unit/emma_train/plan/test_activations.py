"""What the plan says that autograd keeps for backward, against saved-tensor hooks."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emma_train.config.schema import EngineConfig, ModelConfig
from emma_train.engine.activation_checkpointing import checkpoint_layers
from emma_train.model import attention, vision
from emma_train.model.attention import rotary_tables
from emma_train.model.decoder import Decoder, DecoderLayer
from emma_train.model.emma import Emma
from emma_train.model.vision import Images, VisionEncoder, VisionLayer
from emma_train.plan.activations import decoder_layer_bytes, encoder_layer_bytes, keys_per_token
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment
from emma_train.sequence.pack import ImageTokens, PackedBatch, Sample, pack
from emma_train.sequence.spans import full_call
from tests.card import card_on_meta, norms_as_on_a_card
from tests.helpers import kept_bytes
from tests.unit.emma_train.plan.test_plan import FULL, plan, toy

META, HALF = torch.device("meta"), torch.bfloat16
CONFIG = ModelConfig()


def sample(task: str, text: int, seen: int = 0, made: int = 0, supervised: int = 0) -> Sample:
    """A sample of so many tokens of text, of a square image before the text and of a square target."""
    role = ImageRole.REFERENCE if made else ImageRole.UND
    segments: list[Segment] = [ImageSegment("seen", role)] if seen else []
    segments += [TextSegment(tuple(range(1, 1 + text - supervised)))]
    segments += [TextSegment(tuple(range(supervised)), True)] if supervised else []
    segments += [ImageSegment("made", ImageRole.TARGET)] if made else []
    sides = {"seen": int(seen**0.5), "made": int(made**0.5)}
    images = {
        name: ImageTokens((side, side), np.zeros((4 * side**2, 768), np.uint8), np.zeros((side**2, 32), np.float32))
        for name, side in sides.items()
        if side
    }
    return Sample(task, task, segments, images)


def pack_of(stage: str) -> PackedBatch:
    """Some mean samples of a full-size stage, as the plan assumes them."""
    (load, *_) = plan(FULL / f"{stage}.yaml").loads[-1:]
    return pack(
        [
            sample(task, *(round(value) for value in (mean.text, mean.seen, mean.made, mean.supervised)))
            for task, mean in load.means.items()
            for _ in range(2)
        ]
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from card_on_meta(monkeypatch)


def kept_by_layer(layer: nn.Module, compiled: bool, *inputs: object) -> int:
    # The partitioner of Inductor, without the kernels that it would make.
    run = torch.compile(layer.forward, backend="aot_eager_decomp_partition", dynamic=True) if compiled else layer
    run(*inputs)  # compiling keeps nothing
    return kept_bytes(layer, lambda: run(*inputs))


COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize(("stage", "shares"), [("stage1", False), ("stage3", True), ("stage0", False)])
@pytest.mark.usefixtures("card")
def test_a_full_size_decoder_layer_keeps_what_is_planned(stage: str, shares: bool, compiled: bool) -> None:
    config, batch = CONFIG.decoder, pack_of(stage)
    with META:
        layer = DecoderLayer(config, config.shared if shares else []).to(HALF)
        x = torch.empty(batch.num_tokens, config.hidden, dtype=HALF, requires_grad=True)
    layer.requires_grad_(stage != "stage0")
    layer.skip_gen_branch = stage == "stage0"
    tables, spans = rotary_tables(batch.position.to(META), config.head_dim, config.rope_theta, HALF), batch.spans
    kept = kept_by_layer(layer, compiled, x, batch.num_und, tables, spans.to(META))
    load, engine = plan(FULL / f"{stage}.yaml").loads[-1], EngineConfig(compile=compiled)
    predicted = decoder_layer_bytes(config, engine, stage != "stage0", True, keys_per_token(load))
    assert kept / batch.num_tokens == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.usefixtures("card")
def test_a_full_size_encoder_layer_keeps_what_is_planned(compiled: bool) -> None:
    config, lengths = CONFIG.vision, [1024, 256, 1024]
    with META:
        layer = VisionLayer(config).to(HALF)
        x = torch.empty(sum(lengths), config.hidden, dtype=HALF, requires_grad=True)
    kept = kept_by_layer(layer, compiled, x, Images(lengths, full_call(lengths, META)))
    predicted = encoder_layer_bytes(config, EngineConfig(compile=compiled), spans=True)
    assert kept / sum(lengths) == pytest.approx(predicted, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage3"])
@pytest.mark.usefixtures("card")
def test_the_full_size_model_keeps_what_is_planned(stage: str) -> None:
    """A forward pass of EMMA-4B on the meta device. Adapters and heads, which the plan leaves out, are among it."""
    planned = plan(FULL / f"{stage}.yaml", "engine.compile=false", "engine.activation_checkpointing=none")
    batch, load = pack_of(stage).to(META), planned.loads[-1]
    with META:
        model = Emma(planned.recipe.model).to(HALF)
        latents, time = torch.zeros(sum(batch.counts[1:]), 32), torch.zeros(batch.counts[3])
    kept = kept_bytes(model, lambda: model(batch, latents, time, losses=True))
    names = ("decoder's activations", "encoder's activations")
    predicted = sum(planned.memory(load, 64, batch.num_tokens).kept[name] for name in names)
    assert kept == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2", "stage3"])
def test_keys_that_attention_copies(stage: str) -> None:
    batch, load = pack_of(stage), plan(FULL / f"{stage}.yaml").loads[-1]
    assert len(batch.spans.keys) / batch.num_tokens == pytest.approx(keys_per_token(load), rel=0.03)


@pytest.fixture
def flash_like(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    norms_as_on_a_card(monkeypatch)
    monkeypatch.setattr(attention, "scaled_dot_product", attend)
    monkeypatch.setattr(vision, "scaled_dot_product", attend)


@pytest.mark.parametrize("stage", ["stage0", "stage1"], ids=["frozen", "trained"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_decoder_activations_are_what_autograd_keeps(stage: str, precision: str, mode: str, flash_like: None) -> None:
    words = (f"engine.precision={precision}", f"engine.activation_checkpointing={mode}", "attention.backend=sdpa")
    planned, tokens = toy(stage, *words), 96
    config, dtype = planned.recipe.model.decoder, torch.bfloat16 if precision == "bf16" else torch.float32
    kept = []
    for layers in (2, 4):
        model = Decoder(replace(config, num_layers=layers, num_shared_layers=layers // 2)).to(dtype)
        model.requires_grad_(stage == "stage1")
        checkpoint_layers(list(model.layers), mode)
        x = torch.randn(tokens, config.hidden, dtype=dtype, requires_grad=True)
        mask = attention.MaskPlan(torch.ones(tokens, tokens, dtype=torch.bool))
        kept.append(kept_bytes(model, partial(model, x, 40, torch.arange(tokens), mask)))
    per_layer = (kept[1] - kept[0]) / 2
    assert planned.memory(planned.loads[0], 1, tokens).kept["decoder's activations"] == config.num_layers * per_layer


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_encoder_activations_are_what_autograd_keeps(mode: str, flash_like: None) -> None:
    planned = toy("stage1", "engine.precision=fp32", f"engine.activation_checkpointing={mode}")
    grids = [(4, 4), (2, 4)]
    config = planned.recipe.model.vision
    kept = []
    for layers in (2, 4):
        model = VisionEncoder(replace(config, num_layers=layers))
        checkpoint_layers(list(model.layers), mode)
        patches = torch.randn(96, 768)
        kept.append(kept_bytes(model, partial(model, patches, grids)))
    per_layer_and_patch = (kept[1] - kept[0]) / 2 / 96
    load = planned.loads[0]
    seen = load.total(lambda s: s.seen) / load.tokens * 1000 * config.shuffle**2
    predicted = planned.memory(load, 1, 1000).kept["encoder's activations"]
    assert predicted == pytest.approx(config.num_layers * seen * per_layer_and_patch, rel=1e-12)
