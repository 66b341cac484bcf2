"""Work of a pack against its dense mask, and FLOPs against the model's own weights."""

import pytest
import torch

from emma_train.flops.work import module_flops, pack_work, step_mfu
from emma_train.model.attention import hybrid_mask
from emma_train.sequence.pack import PackedBatch, pack
from emma_train.stages.stage import ALL_BUT_AUTOENCODER
from tests.helpers import mixed_samples, tiny_emma, tiny_model


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    return pack(mixed_samples())


def num_weights(*words: str) -> int:
    """Elements of the tiny model's matrices whose names contain all of the words."""
    parameters = tiny_emma().named_parameters()
    return sum(p.numel() for name, p in parameters if p.ndim > 1 and all(word in name for word in words))


def test_pairs_are_those_of_the_dense_mask(batch: PackedBatch) -> None:
    work, mask = pack_work(batch, shuffle=2), hybrid_mask(batch)
    assert work.und_pairs == mask[: batch.num_und].sum()
    assert work.gen_pairs == mask[batch.num_und :].sum()
    assert work.und_rows + work.gen_visual == batch.num_tokens
    assert work.logits == len(batch.labels)


def test_the_encoder_sees_images_to_understand_and_references(batch: PackedBatch) -> None:
    work = pack_work(batch, shuffle=2)
    tokens = [4, 6, 3, 4]  # q0 (2, 2); e0's reference (2, 3); q1 (1, 3) and (2, 2); targets are not seen
    assert work.patches == 4 * sum(tokens)
    assert work.patch_pairs == sum((4 * n) ** 2 for n in tokens)
    assert work.und_visual == 4 + 3 + 4 and work.gen_visual == 6 + 6 + 4


def test_forward_flops_are_two_for_each_weight_that_a_token_passes(batch: PackedBatch) -> None:
    config = tiny_model()
    work, d, v = pack_work(batch, shuffle=config.vision.shuffle), config.decoder, config.vision
    flops = module_flops(config, (), work)
    shared, head = num_weights("decoder.layers.", ".shared."), num_weights("embed_tokens") * work.logits
    for name, rows, pairs, logits in (
        ("und", work.und_rows, work.und_pairs, head),
        ("gen", work.gen_visual, work.gen_pairs, 0),
    ):
        weights = shared + num_weights("decoder.layers.", f".{name}.")
        attention = 2 * d.num_layers * d.heads * d.head_dim * pairs
        assert flops[f"{name.title()} branch"] == 2 * (weights * rows + attention + logits), name
    encoder = num_weights("vision.layers.") + num_weights("patch_embedding")
    assert flops["vision encoder"] == 2 * (encoder * work.patches + 2 * v.num_layers * v.hidden * work.patch_pairs)
    adapter = num_weights("und_adapter.fc")
    assert flops["adapters"] == 2 * adapter * (work.und_visual + work.gen_visual)


def test_training_costs_three_forwards_and_router_tuning_one_of_the_shared_layers(batch: PackedBatch) -> None:
    config = tiny_model()
    work = pack_work(batch, shuffle=config.vision.shuffle)
    forward, trained = (module_flops(config, groups, work) for groups in ((), ALL_BUT_AUTOENCODER))
    for name in ("adapters", "Und branch", "Gen branch"):
        assert trained[name] == 3 * forward[name]
    pixel_gradient = 2 * num_weights("patch_embedding") * work.patches  # is never computed
    assert trained["vision encoder"] == 3 * forward["vision encoder"] - pixel_gradient
    expert = tiny_model({"stem_expert": True, "router": True})
    router = module_flops(expert, ("router",), work, encoder_only=True)
    assert list(router) == ["vision encoder"] and router["vision encoder"] < forward["vision encoder"]


def test_a_cpu_has_no_mfu(batch: PackedBatch) -> None:
    assert step_mfu(tiny_model(), ALL_BUT_AUTOENCODER, [batch], 1.0, torch.device("cpu")) is None


def test_mfu_is_the_packs_flops_over_the_peak(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config, device = tiny_model(), torch.device("cuda")
    flops = sum(module_flops(config, ALL_BUT_AUTOENCODER, pack_work(batch, config.vision.shuffle)).values())
    share = step_mfu(config, ALL_BUT_AUTOENCODER, [batch, batch], 1e-6, device, num_cards=2)
    assert share == pytest.approx(flops / (1e-6 * 989.4e12))
