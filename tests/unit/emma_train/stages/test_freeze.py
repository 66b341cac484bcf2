"""Frozen means frozen, and the proof of it notices one bit."""

import pytest
import torch

from emma_train.model.emma import Emma
from emma_train.model.parameter_groups import GROUPS, group_of
from emma_train.stages.freeze import changed_parameters, fingerprints, freeze, is_trainable
from emma_train.stages.stage import STAGES
from tests.helpers import tiny_emma, tiny_model


@pytest.fixture
def model() -> Emma:
    return tiny_emma(tiny_model(vision={"stem_expert": True, "router": True}))


def test_every_parameter_belongs_to_a_group_and_every_group_has_some(model: Emma) -> None:
    groups = {name: group_of(name) for name, _ in model.named_parameters()}
    assert set(groups.values()) == set(GROUPS)
    assert groups["vision.stem_layers.0.fc1.weight"] == "stem_expert"
    assert groups["vision.router.fc1.weight"] == "router"
    assert groups["vision.layers.0.fc1.weight"] == groups["vision.post_layernorm.bias"] == "vision"
    assert groups["gen_adapter.placeholder"] == "gen_adapter"
    with pytest.raises(KeyError, match="autoencoder.encoder"):
        group_of("autoencoder.encoder.weight")


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda s: s.name)
def test_freezing_counts_what_learns_and_nothing_else_does(model: Emma, stage) -> None:  # type: ignore[no-untyped-def]
    counts = freeze(model, stage.trainable)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts == {g: sum(n for name, n in sizes.items() if group_of(name) == g) for g in stage.trainable}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (group_of(name) in stage.trainable) == is_trainable(name, stage.trainable)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_freezing_again_forgets_the_stage_before(model: Emma) -> None:
    freeze(model, STAGES["stage2"].trainable)
    assert set(freeze(model, ["router"])) == {"router"}
    assert {group_of(n) for n, p in model.named_parameters() if p.requires_grad} == {"router"}


def test_one_changed_bit_is_noticed_and_only_there(model: Emma) -> None:
    freeze(model, ["und_adapter"])
    before = fingerprints(model)
    assert (
        len(before) == sum(not p.requires_grad for p in model.parameters()) and changed_parameters(model, before) == []
    )
    with torch.no_grad():
        model.und_adapter.fc1.weight += 1.0
        assert changed_parameters(model, before) == []
        bits = model.decoder.layers[3].gen["mlp"].down_proj.weight.view(torch.int32)
        bits[5, 7] ^= 1
        assert changed_parameters(model, before) == ["decoder.layers.3.gen.mlp.down_proj.weight"]
        bits[5, 7] ^= 1
        assert changed_parameters(model, before) == []
        # Equal in value, not in bits.
        model.velocity_head.bias.zero_()
        before = fingerprints(model)
        model.velocity_head.bias[0] = -0.0
        assert changed_parameters(model, before) == ["velocity_head.bias"]


def test_an_optimizer_step_moves_no_frozen_bit(model: Emma) -> None:
    freeze(model, ["stem_expert"])
    before = fingerprints(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in learning]
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert changed_parameters(model, before) == []
    assert all((p != k).any() for p, k in zip(learning, kept, strict=True))
