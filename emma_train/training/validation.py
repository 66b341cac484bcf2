"""Losses and answers on held-out samples, the same samples with the same noise and flow times at every validation.

Nothing of it stays: weights, averages, optimizer state and random numbers are afterwards what they were.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emma_train.config.schema import FlowConfig, Recipe
from emma_train.engine.compiled import uncompiled
from emma_train.engine.protocol import Engine
from emma_train.engine.world import World
from emma_train.model.autoencoder import Autoencoder
from emma_train.objectives.flow import add_noise, velocity_loss
from emma_train.objectives.loss import Counts, LossAccumulator, count, losses
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.pack import PackedBatch
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.validation_batches import RankPacks, ValidationBatches
from emma_train.stages.stage import Stage
from emma_train.training.build import TrainingParts
from emma_train.training.ema import Ema
from emma_train.training.forward import clean_latents, encoded_latents, micro_loss


@contextmanager
def averaged_weights(engine: Engine, ema: Ema | None) -> Iterator[None]:
    """Inside this block the model computes with the averaged weights, if there are any."""
    with ema.swapped_in() if ema else nullcontext():
        engine.sync_compute_weights()
        yield
    engine.sync_compute_weights()  # frees what the last forward pass has gathered, too


class Validation:
    """The held-out packs of this rank. Every rank has one and measures at the same steps."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        world: World,
        parts: TrainingParts,
        autoencoder: Autoencoder,
        batches: ValidationBatches,
    ) -> None:
        """Encodes the images of all packs, once for all validations."""
        self.digest = batches.digest
        self._recipe, self._stage, self._world = recipe, stage, world
        self._engine, self._ema, self._autoencoder = parts.engine, parts.ema, autoencoder
        self._samples, self._questions = self._encoded(batches.samples), self._encoded(batches.questions)
        self._counts = Counts(self._over_ranks(count(_counted(self._samples), stage.loss).by_task))
        self._num_questions = self._over_ranks({"": sum(len(pack.keys) for pack in _counted(self._questions))})[""]
        self._copy_losses = self._measure_copies()

    def measure(self) -> dict[str, float]:
        """Values by metric name (docs/metrics.md): of the weights, and of the averaged ones where there are any."""
        started = time.perf_counter()
        with uncompiled(), torch.no_grad():
            with averaged_weights(self._engine, None):
                values = self._measure("val/")
            if self._ema is not None:
                with averaged_weights(self._engine, self._ema):
                    values |= self._measure("val/ema/")
        return {**values, **self._copy_losses, "val/time_s": time.perf_counter() - started}

    def _measure(self, prefix: str) -> dict[str, float]:
        """Losses and share of right answers of the weights as they are now."""
        values: dict[str, float] = {}
        sums = self._over_ranks(dict(zip(TASKS, self._loss_sums(), strict=True)))
        if any(self._counts.by_task.values()):
            values |= losses(list(sums.values()), self._counts, self._recipe.loss)
        if self._num_questions:
            values["answers"] = self._over_ranks({"": self._num_right()})[""] / self._num_questions
        return {f"{prefix}{name}": value for name, value in values.items()}

    def _loss_sums(self) -> list[float]:
        """Sum of the losses of each task over this rank's packs."""
        device = self._world.device
        counted, repeated = (LossAccumulator(self._recipe.loss, self._counts, device) for _ in range(2))
        for index, batch in enumerate(self._samples.packs):
            accumulator = counted if index < self._samples.num_counted else repeated
            micro_loss(
                self._engine.model, self._autoencoder, batch.to(device), self._recipe.flow, self._stage, accumulator
            )
        sums: list[float] = counted.sums.tolist()
        return sums

    def _num_right(self) -> float:
        """Number of this rank's questions that the model answers exactly."""
        number = 0
        for index, host_batch in enumerate(self._questions.packs):
            batch = host_batch.to(self._world.device)
            time = torch.zeros(0, device=self._world.device)
            logits = self._engine.model(batch, clean_latents(batch, self._autoencoder), time).logits
            if index < self._questions.num_counted:
                number += int(right_answers(logits, batch).sum())
        return number

    def _measure_copies(self) -> dict[str, float]:
        """`val/copy/TASK`: the loss of a model that gives the reference image back, for tasks that show one."""
        names = [name for name, task in TASKS.items() if task.condition is ImageRole.REFERENCE]
        totals = {f"{name} {what}": 0.0 for name in names for what in ("loss", "tokens")}
        for batch in _counted(self._samples):
            if batch.latents is None:
                continue
            for task, copy_loss in copy_losses(batch, batch.latents * self._autoencoder.scale, self._recipe.flow):
                totals[f"{task} loss"] += float(copy_loss.sum())
                totals[f"{task} tokens"] += len(copy_loss)
        totals = self._over_ranks(totals)
        return {f"val/copy/{name}": totals[f"{name} loss"] / n for name in names if (n := totals[f"{name} tokens"])}

    def _encoded(self, packs: RankPacks) -> RankPacks:
        """The packs with latents of all images, and patches of those only that the model sees; on the host."""
        if self._stage.loss == "router":
            return packs
        encoded = []
        for batch in packs.packs:
            if batch.latents is None:
                latents = encoded_latents(batch.to(self._world.device), self._autoencoder).cpu()
                num_seen = sum(batch.num_cells[:2]) * self._recipe.model.vision.shuffle**2
                batch = replace(batch, latents=latents, patches=batch.patches[:num_seen].clone())
            encoded.append(batch)
        return RankPacks(encoded, packs.num_counted)

    def _over_ranks(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Sums over ranks; those that share a pack count it once."""
        sums = self._world.sum(list(values.values()))
        return {name: total / self._world.sp_size for name, total in zip(values, sums, strict=True)}


def right_answers(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Whether the model answers each sample exactly: bool [samples]. logits: [L, vocab] at the pack's predictors.

    The likeliest token at every position of the true answer is the true one if and only if an answer that takes the
    likeliest token each time is the true one, so no text has to be generated.
    """
    wrong = (logits.argmax(-1) != batch.labels).long()
    owners = batch.sample[batch.predictors]
    num_wrong = torch.zeros(len(batch.keys), dtype=torch.int64, device=wrong.device).index_add(0, owners, wrong)
    return num_wrong == 0


def copy_losses(batch: PackedBatch, latents: Tensor, flow: FlowConfig) -> list[tuple[str, Tensor]]:
    """For each target whose sample shows a reference of the same grid: its task, and for each of its tokens the loss of
    a model that takes the first such reference for the target, at the same noise and flow time.

    latents: clean and scaled, [visual tokens, C] in stream order.
    """
    num_target = batch.counts[3]
    step = add_noise(batch, latents, flow)
    noised = step.latents[len(latents) - num_target :]
    start, result = 0, []
    references = list(_images(batch, latents, ImageRole.REFERENCE))
    for task, (sample, grid, target) in zip(batch.target_tasks, _images(batch, latents, ImageRole.TARGET), strict=True):
        rows, start = slice(start, start + len(target)), start + len(target)
        same = [image for owner, other, image in references if (owner, other) == (sample, grid)]
        if same:
            velocity = (noised[rows] - same[0]) / step.time[rows, None]
            result.append((task, velocity_loss(velocity, step.velocity[rows])))
    assert start == num_target
    return result


def _images(batch: PackedBatch, latents: Tensor, role: ImageRole) -> Iterator[tuple[int, tuple[int, int], Tensor]]:
    """(sample, grid, latents) of each image of a role."""
    start = sum(batch.num_cells[: role - 1])
    before = sum(batch.counts[:role]) - start
    for rows, columns in batch.grids[role]:
        stop = start + rows * columns
        yield int(batch.sample[before + start]), (rows, columns), latents[start:stop]
        start = stop


def _counted(packs: RankPacks) -> Sequence[PackedBatch]:
    return packs.packs[: packs.num_counted]
