"""Flow matching in closed form."""

import math

import torch

from emma_train.config.schema import FlowConfig
from emma_train.objectives.flow import add_noise, draw_noise, draw_time, shift, velocity_loss
from emma_train.sequence.pack import pack
from tests.helpers import CHANNELS, i2t_sample, it2i_sample, mixed_samples, scaled_latents, t2i_sample


def test_x_t_is_the_line_from_image_to_noise_and_velocity_its_slope() -> None:
    batch = pack(mixed_samples())
    latents = scaled_latents(batch)
    out, num = add_noise(batch, latents, FlowConfig()), batch.counts[3]
    clean, x_t, time = latents[-num:], out.latents[-num:], out.time[:, None]
    noise = draw_noise(batch, CHANNELS)
    torch.testing.assert_close(x_t, (1 - time) * clean + time * noise)
    torch.testing.assert_close(out.velocity, noise - clean)
    torch.testing.assert_close(x_t - time * out.velocity, clean, rtol=0, atol=2e-6)
    torch.testing.assert_close(x_t + (1 - time) * out.velocity, noise, rtol=0, atol=2e-6)
    assert torch.equal(out.latents[:-num], latents[:-num])


def test_an_image_has_one_time_and_each_its_own() -> None:
    batch = pack([t2i_sample("a"), t2i_sample("b", (2, 3)), it2i_sample("c")])
    time = add_noise(batch, scaled_latents(batch), FlowConfig()).time
    parts = time.split([4, 6, 4])
    assert all(len(part.unique()) == 1 for part in parts) and len(time.unique()) == 3


def test_time_and_noise_belong_to_the_sample_not_to_its_pack() -> None:
    samples = [t2i_sample("a"), it2i_sample("b", (2, 2), (2, 3)), t2i_sample("c")]
    together = pack([i2t_sample(), *samples])
    noise, time = draw_noise(together, CHANNELS), draw_time(together.time_seeds, FlowConfig())
    start = 0
    for index, sample in enumerate(samples):
        alone = pack([sample])
        num = alone.counts[3]
        assert torch.equal(draw_noise(alone, CHANNELS), noise[start : start + num])
        assert torch.equal(draw_time(alone.time_seeds, FlowConfig()), time[index : index + 1])
        start += num


def test_noise_of_a_target_is_one_stream_over_its_tokens_and_channels() -> None:
    small, large = pack([t2i_sample("a", (1, 2))]), pack([t2i_sample("a", (2, 2))])
    assert torch.equal(draw_noise(large, CHANNELS)[:2], draw_noise(small, CHANNELS))
    assert len(draw_noise(large, CHANNELS).unique()) == 4 * CHANNELS
    assert draw_noise(pack([i2t_sample()]), CHANNELS).shape == (0, CHANNELS)


def test_time_is_shifted_logit_normal() -> None:
    seeds = torch.arange(50_000)
    for mean, std, s in ((0.0, 1.0, 1.0), (0.0, 1.0, 4.0), (-0.5, 0.7, 2.0)):
        time = draw_time(seeds, FlowConfig(mean, std, s)).double()
        assert time.min() > 0 and time.max() < 1
        logit = torch.logit(time / (s - (s - 1) * time))  # the inverse of the shift
        assert abs(float(logit.mean()) - mean) < 4 * std / math.sqrt(50_000)
        assert abs(float(logit.std()) - std) < 4 * std / math.sqrt(100_000)


def test_time_may_be_uniform_before_the_shift() -> None:
    seeds = torch.arange(50_000)
    for s in (1.0, 3.0):
        time = draw_time(seeds, FlowConfig(shift=s, time="uniform")).double().sort().values
        assert time[0] > 0 and time[-1] < 1
        even = time / (s - (s - 1) * time)  # the inverse of the shift
        gap = (even - (torch.arange(50_000) + 0.5) / 50_000).abs().max()
        assert gap < 1.95 / math.sqrt(50_000)  # Kolmogorov and Smirnov, at 0.1 %


def test_shift_keeps_its_ends_and_is_the_identity_at_1() -> None:
    time = torch.linspace(0, 1, 11)
    assert torch.equal(shift(time, 1.0), time)
    assert shift(time, 4.0)[0] == 0 and shift(time, 4.0)[-1] == 1
    torch.testing.assert_close(shift(torch.tensor([0.5, 0.2]), 4.0), torch.tensor([0.8, 0.5]))
    torch.testing.assert_close(shift(shift(time, 4.0), 0.25), time)


def test_velocity_loss_is_the_mean_over_channels() -> None:
    prediction, velocity = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert velocity_loss(prediction, velocity).tolist() == [2.5, 5.0]
    assert velocity_loss(prediction.bfloat16(), velocity).dtype == torch.float32
