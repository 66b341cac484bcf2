"""Layers computed again in backward: the same gradients, bit for bit, from less memory."""

import pytest
import torch

from emma_train.engine.activation_checkpointing import checkpoint_activations, checkpoint_layers, checkpointed_layers
from emma_train.metrics import record_metric, recording
from emma_train.model.emma import Emma, training_experts
from emma_train.sequence.pack import Sample, pack
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import STAGES
from tests.helpers import i2t_sample, kept_bytes, mixed_samples, scaled_latents, t2i_sample, tiny_emma, tiny_model

MODES = ["none", "selective", "full"]


def emma(mode: str, stage: str = "stage4_expert") -> Emma:
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "num_layers": 4, "expert_layers": 2}))
    freeze(model, STAGES[stage].trainable)
    checkpoint_activations(model, mode)
    return model


def loss_of(model: Emma, samples: list[Sample]) -> torch.Tensor:
    batch = pack(samples)
    time = torch.linspace(0.1, 0.9, batch.counts[3])
    out = model(batch, scaled_latents(batch), time, training_experts(batch), losses=True)
    assert out.text_losses is not None
    return out.text_losses.sum() + out.velocity.square().sum()


@pytest.mark.parametrize("stage", ["stage0", "stage2", "stage4_expert"])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    "samples", [mixed_samples(), [i2t_sample(grids=[])], [t2i_sample()]], ids=["mixed", "text", "generation"]
)
def test_loss_and_gradients_are_the_same_bit_for_bit(mode: str, stage: str, samples: list[Sample]) -> None:
    models = [emma(m, stage) for m in ("none", mode)]
    losses = [loss_of(model, samples) for model in models]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    want, got = ({name: p.grad for name, p in model.named_parameters()} for model in models)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            assert got[name] is not None and torch.equal(got[name], gradient), name  # type: ignore[arg-type]


def test_modes_choose_none_every_second_and_all_layers() -> None:
    assert [list(checkpointed_layers(5, mode)) for mode in MODES] == [[], [0, 2, 4], [0, 1, 2, 3, 4]]
    assert all(list(checkpointed_layers(0, mode)) == [] for mode in MODES)


def test_parameters_and_checkpoints_keep_their_names() -> None:
    plain, wrapped = emma("none"), emma("full")
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in wrapped.named_parameters()]
    wrapped.load_state_dict(plain.state_dict())


def test_less_is_kept_for_backward() -> None:
    """Of a layer chosen, its input alone: here a sixtieth of what it keeps otherwise."""
    kept = {}
    for mode in MODES:
        model = emma(mode, "stage2")
        kept[mode] = kept_bytes(model, lambda m=model: loss_of(m, mixed_samples()))
    print(f"\nkept for backward: {kept}")
    assert kept["full"] < 0.35 * kept["none"]
    assert kept["full"] < kept["selective"] < 0.7 * kept["none"]


def test_each_layer_that_is_computed_again_runs_twice_and_no_other() -> None:
    model = tiny_emma()
    runs = dict.fromkeys(range(4), 0)
    for index, layer in enumerate(model.decoder.layers):
        # Hooks of the layer's inside, as the layer itself is called once.
        layer.und["mlp"].register_forward_pre_hook(lambda *_, i=index: runs.update({i: runs[i] + 1}))
    checkpoint_activations(model, "selective")
    loss_of(model, mixed_samples()).backward()
    assert runs == {0: 2, 1: 1, 2: 2, 3: 1}
    with torch.no_grad():
        loss_of(model, mixed_samples())
    assert runs == {0: 3, 1: 2, 2: 3, 3: 2}


def test_a_metric_of_a_layer_is_recorded_once_though_backward_runs_the_layer_again() -> None:
    class Layer(torch.nn.Module):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Layer.runs += 1
            record_metric("activation/sum", x, "sum")
            return x * x

    layer = Layer()
    checkpoint_layers([layer], "full")
    with recording() as recorded:
        layer(torch.full((3,), 2.0, requires_grad=True)).sum().backward()
    assert Layer.runs == 2
    assert (recorded["activation/sum"].value, recorded["activation/sum"].num_values) == (6.0, 3)
