"""One micro-batch from images to a scalar: the only place where batch, autoencoder, model and objectives meet."""

import math

import torch
from torch import Tensor, nn

from emma_train.config.schema import FlowConfig
from emma_train.metrics import record_metric
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.emma import training_experts
from emma_train.model.vision import STEM
from emma_train.objectives.flow import add_noise, velocity_loss
from emma_train.objectives.loss import LossAccumulator
from emma_train.objectives.next_token import next_token_loss
from emma_train.sequence.geometry import from_patches
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.pack import IGNORE_STEM, PackedBatch
from emma_train.stages.stage import Stage
from emma_train.training.source_losses import record_source_losses


def micro_loss(
    model: nn.Module,
    autoencoder: Autoencoder,
    batch: PackedBatch,
    flow: FlowConfig,
    stage: Stage,
    accumulator: LossAccumulator,
    noise_checksums: list[Tensor] | None = None,
) -> Tensor:
    """The micro-batch's share of the step's loss: a scalar to differentiate. `batch` is on the device. The checksum of
    the noise that it drew is appended to `noise_checksums`."""
    if stage.loss == "router":
        logits = model.route(batch)[: len(batch.stem)]  # type: ignore[operator]
        record_metric("vision/stem_share", model.vision.takes_stem(logits), "mean")  # type: ignore[operator, union-attr]
        # Images without a label have no loss; to leave them out would have the host wait for their number.
        losses = next_token_loss(logits, batch.stem, IGNORE_STEM)
        nothing = losses.new_zeros(0)
        # Router tuning has one task; which sample an image is of does not matter.
        return accumulator.add(losses, torch.zeros_like(batch.stem), nothing, nothing.long())
    step = add_noise(batch, clean_latents(batch, autoencoder), flow)
    if noise_checksums is not None:
        noise_checksums.append(step.checksum)
    experts = None
    if stage.stem_expert:
        experts = training_experts(batch)
        record_metric("vision/stem_share", batch.stem == STEM, "mean")
    prediction = model(batch, step.latents, step.time, experts, losses=True)
    owner, flow_losses = batch.sample[batch.predictors], velocity_loss(prediction.velocity, step.velocity)
    record_source_losses(batch.tasks, batch.sources, owner, prediction.text_losses)
    record_source_losses(batch.target_tasks, batch.target_sources, batch.target_of_token, flow_losses)
    flow_task = batch.target_task_index[batch.target_of_token]
    return accumulator.add(prediction.text_losses, batch.task_index[owner], flow_losses, flow_task)


def clean_latents(batch: PackedBatch, autoencoder: Autoencoder) -> Tensor:
    """Scaled latents of every image of the pack, [visual tokens, C] in stream order; encodes those that are not
    cached."""
    latents = encoded_latents(batch, autoencoder) if batch.latents is None else batch.latents
    return latents * autoencoder.scale


def encoded_latents(batch: PackedBatch, autoencoder: Autoencoder) -> Tensor:
    """Unscaled latents of every image of a pack with all patches, [visual tokens, C] in stream order."""
    grids = [grid for role in ImageRole for grid in batch.grids[role]]
    if not grids:
        return torch.zeros(0, autoencoder.config.channels, device=autoencoder.device)
    patch = math.isqrt(batch.patches.shape[1] // 3)
    shuffle = autoencoder.config.pixels // patch
    images, start = [], 0
    for rows, columns in grids:
        stop = start + rows * columns * shuffle**2
        images.append(from_patches(batch.patches[start:stop], rows, columns, patch, shuffle))
        start = stop
    return torch.cat(autoencoder.encode(images))
