"""engine.fp8: which linears it takes, and what it leaves as it is."""

import logging

import pytest
import torch
from torch import nn

from emma_train.engine import fp8
from emma_train.engine.activation_checkpointing import checkpoint_activations
from emma_train.engine.fp8 import use_fp8
from emma_train.engine.fp8_linear import Fp8Linear
from emma_train.errors import UserError
from emma_train.model.emma import Emma, training_experts
from emma_train.sequence.pack import Sample, pack
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import STAGES
from tests.helpers import i2t_sample, mixed_samples, scaled_latents, t2i_sample, tiny_emma, tiny_model

CPU = torch.device("cpu")
KINDS = ("tensorwise", "rowwise")
EXPERT = {"stem_expert": True, "router": True, "num_layers": 5, "expert_layers": 2}


def of_kind(kind: str, stage: str = "stage1", checkpointing: str = "none") -> Emma:
    """A tiny model in bf16 as `build` makes it."""
    model = tiny_emma(tiny_model(vision=EXPERT)).bfloat16()
    freeze(model, STAGES[stage].trainable)
    use_fp8(model, kind, CPU)
    checkpoint_activations(model, checkpointing)
    return model


def loss_of(model: Emma, samples: list[Sample]) -> torch.Tensor:
    batch = pack(samples)
    latents, time = scaled_latents(batch), torch.linspace(0.1, 0.9, batch.counts[3])
    out = model(batch, latents.bfloat16(), time, training_experts(batch), losses=True)
    assert out.text_losses is not None
    return out.text_losses.sum() + out.velocity.float().square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_linears_of_inner_layers_and_no_others_are_in_fp8(kind: str) -> None:
    model = of_kind(kind)
    chosen = {name: x for name, x in model.named_modules() if isinstance(x, Fp8Linear)}
    layers = {name.partition(".layers.")[0] + "." + name.split(".")[2] for name in chosen if "stem" not in name}
    assert layers == {"decoder.1", "decoder.2", "vision.1", "vision.2", "vision.3"}
    assert {name.split(".")[2] for name in chosen if "stem" in name} == {"0"}  # of 0 and 1
    # Layer 1 of the decoder shares q and k between its branches: 2 + 2 * 5 linears; layer 2 has 2 * 7.
    assert len(chosen) == 12 + 14 + 3 * 6 + 6
    assert len([x for x in model.modules() if isinstance(x, nn.Linear)]) == 2 * (12 + 14) + 7 * 6 + 2 + 2 + 4 + 1
    assert all(linear.rowwise == (kind == "rowwise") for linear in chosen.values())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_keep_names_types_and_bits(kind: str) -> None:
    plain, model = of_kind("off"), of_kind(kind)
    assert not any(isinstance(module, Fp8Linear) for module in plain.modules())
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(after[n].dtype == before[n].dtype and torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage4_expert"])
@pytest.mark.parametrize(
    "samples", [mixed_samples(), [i2t_sample(grids=[])], [t2i_sample()]], ids=["mixed", "text", "generation"]
)
def test_the_same_parameters_get_gradients_near_those_of_bf16(kind: str, stage: str, samples: list[Sample]) -> None:
    """Also of a pack that leaves a branch, or the vision encoder, without rows; and the same bits from layers that
    backward computes again."""
    models = [of_kind("off", stage), of_kind(kind, stage), of_kind(kind, stage, "full")]
    losses = [loss_of(model, samples) for model in models]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert torch.equal(losses[1], losses[2])
    plain, rounded, again = ({n: p.grad for n, p in model.named_parameters()} for model in models)
    for name, gradient in plain.items():
        one, other = rounded[name], again[name]
        if gradient is None or one is None or other is None:
            assert gradient is one is other is None, name
            continue
        assert one.dtype == gradient.dtype and torch.equal(one, other), name
        assert bool(one.any()) == bool(gradient.any()), name
    together = [torch.cat([g.flatten().double() for g in each.values() if g is not None]) for each in (plain, rounded)]
    assert float((together[0] - together[1]).norm()) <= 0.25 * float(together[0].norm())


def test_a_model_without_inner_layers_says_that_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    shallow = tiny_model(vision={"num_layers": 2}, decoder={"num_layers": 2, "num_shared_layers": 1})
    with caplog.at_level(logging.INFO):
        use_fp8(tiny_emma(shallow), "rowwise", CPU)
        use_fp8(tiny_emma(), "rowwise", CPU)
    assert caplog.messages == [
        "engine.fp8=rowwise has no effect: it needs three layers, and sizes that 16 divides",
        "engine.fp8=rowwise: 32 linears, emulated, which is slow; mfu stays the share of the bf16 peak",
    ]


def test_sizes_that_16_does_not_divide_stay_in_bf16() -> None:
    model = tiny_emma(tiny_model(decoder={"intermediate_size": 40}))
    use_fp8(model, "tensorwise", CPU)
    assert not any(isinstance(x, Fp8Linear) for name, x in model.named_modules() if ".mlp." in name)
    assert isinstance(model.get_submodule("decoder.layers.2.und.q_proj"), Fp8Linear)


def test_a_card_without_8_bit_products_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UserError) as caught:
        use_fp8(tiny_emma(), "rowwise", torch.device("cuda"))
    message = str(caught.value)
    assert "8.9" in message and "A100" in message and "engine.fp8=off" in message and "\n" not in message
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_card(torch.device("cuda"))
