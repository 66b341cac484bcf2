"""Flow matching with velocity prediction (paper §2.2): x_t = (1 - t) x + t noise, the target is noise - x."""

from dataclasses import dataclass

import torch
from torch import Tensor

from emma_train.config.schema import FlowConfig
from emma_train.objectives.counter_rng import normal
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.pack import PackedBatch


@dataclass
class NoisedBatch:
    latents: Tensor
    """[visual tokens, C] in stream order, target rows noised."""
    time: Tensor
    """[target tokens]."""
    noise: Tensor
    """[target tokens, C]."""
    velocity: Tensor
    """[target tokens, C]: what the model must predict."""

    @property
    def checksum(self) -> Tensor:
        """Checksum of the bits of noise and time in their order: int64, 0-dim. Equal on all devices of one kind."""
        drawn = torch.cat([self.time[:, None], self.noise], dim=1).float()
        bits = drawn.view(torch.int32).flatten().long()
        return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()


def add_noise(batch: PackedBatch, latents: Tensor, config: FlowConfig) -> NoisedBatch:
    """Noise the target rows of `latents` (clean and scaled, [visual tokens, C] in stream order). Time and noise are
    computed from the batch's seeds."""
    num_target = batch.counts[3]
    clean = latents[len(latents) - num_target :]
    time = draw_time(batch.time_seeds, config)[batch.target_of_token]
    noise = draw_noise(batch, clean.shape[-1])
    mixed = (1 - time[:, None]) * clean + time[:, None] * noise
    return NoisedBatch(torch.cat([latents[: len(latents) - num_target], mixed]), time, noise, noise - clean)


def draw_time(seeds: Tensor, config: FlowConfig) -> Tensor:
    """Flow time of each target, logit-normal or uniform (flow.time), shifted: [targets]."""
    drawn = normal(seeds, torch.zeros_like(seeds))
    if config.time == "uniform":
        time = torch.special.ndtr(drawn)  # the cumulative distribution of a normal value is uniform
    else:
        time = torch.sigmoid(config.logit_mean + config.logit_std * drawn)
    return shift(time, config.shift)


def draw_noise(batch: PackedBatch, channels: int) -> Tensor:
    """Noise of every target token: [target tokens, C]. Value i of a target depends on its seed and on i alone."""
    device = batch.noise_seeds.device
    sizes = [rows * columns for rows, columns in batch.grids[ImageRole.TARGET]]
    indices = torch.cat([torch.arange(n, device=device) for n in [*sizes, 0]])
    counters = indices[:, None] * channels + torch.arange(channels, device=device)
    return normal(batch.noise_seeds[batch.target_of_token][:, None], counters)


def shift(time: Tensor, s: float) -> Tensor:
    """s t / (1 + (s - 1) t): s above 1 moves times towards 1 (noise), which larger images need."""
    return s * time / (1 + (s - 1) * time)


def velocity_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Squared error of each target token, mean over channels: float32 [target tokens]."""
    return (prediction.float() - velocity.float()).square().mean(-1)
