"""FLOPs against closed forms and against torch's own counter."""

import pytest
import torch
from diffusers import AutoencoderDC
from torch.utils.flop_counter import FlopCounterMode

from emma_train.flops import formulas as flops

DECODER = {"hidden": 64, "layers": 3, "heads": 8, "kv_heads": 2, "head_dim": 16, "mlp": 160, "vocab": 500}
DECODER_WEIGHTS = 3 * (64 * (128 + 2 * 32) + 128 * 64 + 3 * 64 * 160) + 64 * 500


def decoder(trainable: bool, needs_input_grad: bool, attention_pairs: int = 0, tokens: int = 10) -> int:
    return flops.decoder_flops(
        **DECODER,
        num_tokens=tokens,
        attention_pairs=attention_pairs,
        num_logit_tokens=tokens,
        trainable=trainable,
        needs_input_grad=needs_input_grad,
    )


@pytest.mark.parametrize(
    ("trainable", "needs_input_grad", "per_weight_and_token"),
    [(True, True, 6), (False, True, 4), (False, False, 2)],
)
def test_decoder_is_6nt_trained_4nt_frozen_with_gradient_2nt_forward(
    trainable: bool, needs_input_grad: bool, per_weight_and_token: int
) -> None:
    assert decoder(trainable, needs_input_grad) == per_weight_and_token * DECODER_WEIGHTS * 10


def test_decoder_that_trains_alone_spares_the_gradient_of_its_first_input() -> None:
    first_projections = 64 * (128 + 2 * 32)
    assert decoder(True, True) - decoder(True, False) == 2 * first_projections * 10


@pytest.mark.parametrize(
    ("trainable", "needs_input_grad", "times"), [(False, False, 1), (False, True, 3), (True, False, 3)]
)
def test_attention_pairs_cost_4_per_query_feature_forward_and_twice_that_backward(
    trainable: bool, needs_input_grad: bool, times: int
) -> None:
    extra = decoder(trainable, needs_input_grad, attention_pairs=7) - decoder(trainable, needs_input_grad)
    assert extra == times * 3 * 4 * 128 * 7


def test_logits_are_counted_where_they_are_computed() -> None:
    few = flops.decoder_flops(
        **DECODER, num_tokens=10, attention_pairs=0, num_logit_tokens=4, trainable=False, needs_input_grad=False
    )
    assert decoder(False, False) - few == 2 * 64 * 500 * 6


def test_stack_agrees_with_torchs_counter_for_a_frozen_and_a_trained_transformer() -> None:
    tokens, hidden, mlp = 12, 16, 40
    for trainable in (False, True):
        blocks = [torch.nn.Linear(hidden, 3 * hidden, bias=False), torch.nn.Linear(hidden, hidden, bias=False)]
        up, down = torch.nn.Linear(hidden, mlp, bias=False), torch.nn.Linear(mlp, hidden, bias=False)
        modules = torch.nn.ModuleList([*blocks, up, down]).requires_grad_(trainable)
        x = torch.randn(tokens, hidden, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            q, k, v = modules[0](x).chunk(3, -1)
            x1 = modules[1]((q @ k.T).softmax(-1) @ v)
            modules[3](modules[2](x1)).sum().backward()
        expected = flops.vision_flops(hidden, 1, mlp, 0, tokens, tokens**2, trainable, needs_input_grad=True)
        assert counter.get_total_flops() == expected


def test_vision_embedding_never_needs_the_gradient_of_pixels() -> None:
    frozen = flops.vision_flops(32, 0, 64, 768, 5, 25, trainable=False)
    trained = flops.vision_flops(32, 0, 64, 768, 5, 25, trainable=True)
    assert (frozen, trained) == (2 * 768 * 32 * 5, 4 * 768 * 32 * 5)


def test_adapter_first_layer_gets_its_input_gradient_only_if_asked() -> None:
    first, second = 40 * 24, 24 * 16
    assert flops.adapter_flops(40, 24, 16, 7, trainable=True, needs_input_grad=True) == 6 * (first + second) * 7
    assert flops.adapter_flops(40, 24, 16, 7, trainable=True, needs_input_grad=False) == (4 * first + 6 * second) * 7
    assert flops.adapter_flops(40, 24, 16, 7, trainable=False, needs_input_grad=False) == 2 * (first + second) * 7


@pytest.mark.parametrize("first_layers", [0, 1])
@pytest.mark.parametrize("downsample", ["pixel_unshuffle", "Conv"])
def test_autoencoder_agrees_with_torchs_counter(first_layers: int, downsample: str) -> None:
    channels, layers = (16, 32, 64), (first_layers, 2, 1)
    kinds, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    model = AutoencoderDC(
        latent_channels=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type=downsample,
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encoder(torch.zeros(2, 3, 64, 32))
    unshuffle = downsample == "pixel_unshuffle"
    expected = flops.autoencoder_flops(channels, layers, kinds, scales, 8, 2 * 64 * 32, pixel_unshuffle=unshuffle)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_cards_are_known_by_their_drivers_name(name: str, card: str) -> None:
    assert flops.peak_flops(name) == flops.PEAK_DENSE_BF16[card]


@pytest.mark.parametrize(
    "name", ["cpu", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GB200", "H100", ""]
)
def test_an_unknown_card_has_no_mfu(name: str) -> None:
    assert flops.mfu(1e12, 1.0, 1, name) is None


def test_mfu_is_the_share_of_the_dense_peak_of_all_cards() -> None:
    assert flops.mfu(2 * 312e12, 2.0, 4, "NVIDIA A100-SXM4-40GB") == pytest.approx(0.25)
    assert flops.mfu(1.0, 0.0, 1, "NVIDIA H200") is None
