"""The model of time: bytes of its layers against those of every operator, parts in closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emma_train.config.schema import ModelConfig
from emma_train.model.attention import rotary_tables
from emma_train.model.decoder import DecoderLayer
from emma_train.model.vision import Images, VisionLayer
from emma_train.plan.roofline import (
    DECODER_PASSES,
    ENCODER_PASSES,
    GEMM,
    estimated_mfu,
    parts_of_step,
    step_seconds,
)
from emma_train.sequence.spans import full_call
from tests.unit.emma_train.plan.test_activations import HALF, META, card, pack_of
from tests.unit.emma_train.plan.test_plan import FULL, plan

__all__ = ["card"]  # the fixture
CONFIG = ModelConfig()
PRODUCTS = {"mm", "addmm", "bmm"}
VIEWS = "view _unsafe_view transpose t slice expand unsqueeze squeeze permute detach split split_with_sizes select"
WITHOUT_MEMORY = {*VIEWS.split(), "as_strided", "alias", "unbind", "empty", "empty_like", "new_empty"}
FILLS = {"zeros", "zeros_like", "ones_like", "new_zeros", "fill_", "zero_"}


class Moved(TorchDispatchMode):
    """Adds up the bytes of inputs and outputs of every operator that is neither a product nor attention."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        sizes = [
            sum(t.numel() * t.element_size() for t in tree_leaves(part) if isinstance(t, Tensor))
            for part in ((args, kwargs), out)
        ]
        if name not in PRODUCTS | WITHOUT_MEMORY and "varlen" not in name:
            # The gradient of a slice is made of zeros and a copy into them.
            twice = name in ("slice_backward", "select_backward")
            self.num_bytes += (name not in FILLS) * sizes[0] * (1 + twice) + sizes[1]
        return out


def moved(layer: nn.Module, x: Tensor, *others: object) -> tuple[int, int]:
    """Bytes of forward and of backward."""
    with Moved() as forward:
        y = layer(x, *others)
    with Moved() as backward:
        torch.autograd.backward(y, torch.empty_like(y))
    return forward.num_bytes, backward.num_bytes


@pytest.mark.parametrize("shares", [False, True], ids=["deep", "shallow"])
@pytest.mark.usefixtures("card")
def test_a_decoder_layer_moves_the_bytes_of_the_model(shares: bool) -> None:
    config, batch = CONFIG.decoder, pack_of("stage1")
    with META:
        layer = DecoderLayer(config, config.shared if shares else []).to(HALF)
        x = torch.empty(batch.num_tokens, config.hidden, dtype=HALF, requires_grad=True)
    tables = rotary_tables(batch.position.to(META), config.head_dim, config.rope_theta, HALF)
    counted = moved(layer, x, batch.num_und, tables, batch.spans.to(META))
    widths = config.hidden + (config.heads + config.kv_heads) * config.head_dim + config.intermediate_size
    for num_bytes, passes in zip(counted, DECODER_PASSES[False], strict=True):
        assert num_bytes / (batch.num_tokens * 2 * widths) == pytest.approx(passes, rel=0.1)


@pytest.mark.usefixtures("card")
def test_an_encoder_layer_moves_the_bytes_of_the_model() -> None:
    config, lengths = CONFIG.vision, [1024] * 4
    with META:
        layer = VisionLayer(config).to(HALF)
        x = torch.empty(sum(lengths), config.hidden, dtype=HALF, requires_grad=True)
    counted = moved(layer, x, Images(lengths, full_call(lengths, META)))
    for num_bytes, passes in zip(counted, ENCODER_PASSES[False], strict=True):
        assert num_bytes / (sum(lengths) * 2 * (config.hidden + config.intermediate_size)) == pytest.approx(
            passes, rel=0.15
        )


def test_parts_of_a_step_in_closed_form() -> None:
    planned = plan(FULL / "stage1.yaml", gpus=8)
    load = planned.loads[0]
    parts = parts_of_step(planned, load)
    assert step_seconds(planned, load) == pytest.approx(sum(parts.values()))
    weights, micro_steps, memory = planned.stored, 32, 3.35e12 * 0.8
    # Gathered twice but for the root and the last layer, a deep one; read and written; gradients in bf16 and fp32.
    copied = 2 * 2 * (2 * weights - planned.sizes.root - planned.sizes.units[-1]) + 6 * weights
    assert parts["copies of FSDP"] == pytest.approx(micro_steps * copied / memory)
    assert parts["optimizer"] == pytest.approx(44 * weights / 8 / memory)
    assert parts["cross-entropy"] == pytest.approx(4096 * 64 * 183 * 151936 / 8 / (3.35e12 * 0.6))
    assert parts["autoencoder"] == pytest.approx(planned.encoding_flops(load) / (8 * 989.4e12 / 2 * 0.45))
    useful = sum(planned.flops(load).values())
    assert estimated_mfu(planned, load) == pytest.approx(useful / (8 * 989.4e12 * sum(parts.values())))
    assert parts["matrix products"] + parts["attention"] > useful / (8 * 989.4e12 * GEMM)


def test_what_makes_a_step_longer() -> None:
    def seconds(*words: str, gpu: str = "h100-80g") -> float:
        planned = plan(FULL / "stage1.yaml", *words, gpus=8, gpu=gpu)
        return step_seconds(planned, planned.loads[0])

    shipped = seconds()
    assert seconds("engine.compile=false") > 1.05 * shipped
    assert seconds("engine.activation_checkpointing=full") > 1.15 * shipped
    assert seconds("data.slots=128", "data.pack_tokens=14336") < 0.97 * shipped  # half of the copies of FSDP
    assert seconds(gpu="h200-141g") < shipped < seconds(gpu="a100-80g") / 2
