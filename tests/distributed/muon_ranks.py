"""What ranks do in the tests of Muon. Here, and not in a test module, because a rank finds its function by name."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from emma_train.config.schema import AutoencoderConfig, MuonConfig, OptimizerConfig, Recipe
from emma_train.engine.flat_shard import local
from emma_train.engine.muon import takes_muon
from emma_train.engine.world import World, join, share_packs
from emma_train.model.autoencoder import Autoencoder
from emma_train.objectives.loss import Counts, LossAccumulator, count
from emma_train.sequence.pack import PackedBatch
from emma_train.sequence.tasks import TASKS
from emma_train.stages.stage import stage_of
from emma_train.training.build import TrainingParts, build, set_initial
from emma_train.training.forward import micro_loss
from tests.distributed.ranks import full_tensor, make_pack, step_of
from tests.helpers import tiny_recipe

KINDS = ("mixed", "i2t", "t2i", "it2i")


def steps_of_ways(ways: list[dict[str, Any]], steps: int) -> list[dict[str, Tensor]]:
    """For each way (overrides of the recipe) the full weights and optimizer state after so many steps."""
    results = []
    with join("cpu", 60) as joined:
        for overrides in ways:
            recipe = tiny_recipe(**overrides)
            world = share_packs(joined, recipe.engine.sequence_parallel)
            built = _started(recipe, world)
            packs = [_pack(kind) for kind in KINDS[world.dp_rank :: world.dp_size]]
            for _ in range(steps):
                _step(recipe, world, built, packs)
            state = built.engine.state()
            named = {**state["model"], **state["optimizer"]}
            results.append({name: full_tensor(tensor).clone() for name, tensor in named.items()})
            built.engine.close()
    return results


def reference_steps(overrides: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """The same on one rank, where the engine gives gradients only and a plain optimizer updates full tensors."""
    recipe = tiny_recipe(**overrides)
    with join("cpu", 60) as world:
        plain = replace(recipe, optimizer=replace(recipe.optimizer, kind="adamw"))
        built = _started(plain, world)
        weights = {name: local(weight) for name, weight in built.engine.weights.items()}
        packs, state = [_pack(kind) for kind in KINDS], dict[str, Tensor]()
        for step in range(1, steps + 1):
            gradients = step_of(plain, world, built, packs)["gradients"]
            norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
            factor = min(1.0, recipe.optimizer.max_grad_norm / norm)
            for name, gradient in gradients.items():
                _plain_update(name, weights[name], gradient * factor, state, recipe.optimizer, step)
            built.engine.sync_compute_weights()
        return {**{name: weight.clone() for name, weight in weights.items()}, **state}


def _started(recipe: Recipe, world: World) -> TrainingParts:
    built = build(recipe, stage_of(recipe), world, resuming=True)
    set_initial(built.engine.weights, recipe.model, list(built.engine.weights))
    for name, weight in built.engine.weights.items():
        if name.startswith("velocity_head."):
            local(weight).fill_(0.02)  # at zero, the gradients before it would be zero
    built.engine.sync_compute_weights()
    return built


def _step(recipe: Recipe, world: World, built: TrainingParts, packs: list[PackedBatch]) -> None:
    """What `step_of` does, without gathering the gradients."""
    stage = stage_of(recipe)
    totals = world.sum(list(count(packs, stage.loss).by_task.values()))
    counts = Counts({task: int(n) for task, n in zip(TASKS, totals, strict=True)})
    accumulator = LossAccumulator(recipe.loss, counts, world.device)
    autoencoder = _autoencoder(recipe.model.autoencoder.path)
    for index, batch in enumerate(packs):
        loss = micro_loss(built.engine.model, autoencoder, batch, recipe.flow, stage, accumulator)
        built.engine.accumulate(loss, last=index == len(packs) - 1)
    built.engine.step(recipe.optimizer.lr)


@cache
def _autoencoder(path: str) -> Autoencoder:
    return Autoencoder(AutoencoderConfig(path), torch.device("cpu"))


@cache
def _pack(kind: str) -> PackedBatch:
    return make_pack(tiny_recipe(), kind)


def _plain_update(
    name: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], config: OptimizerConfig, step: int
) -> None:
    decay = config.weight_decay if weight.ndim > 1 else 0.0
    with torch.no_grad():
        if takes_muon(name, weight.shape):
            mean = state.setdefault(f"{name}.momentum_buffer", torch.zeros_like(weight))
            mean.mul_(config.muon.momentum).add_(gradient, alpha=1 - config.muon.momentum)
            update = (1 - config.muon.momentum) * gradient + config.muon.momentum * mean
            size = 0.2 * max(weight.shape) ** 0.5
            weight.mul_(1 - config.lr * decay).sub_(_plain_newton_schulz(update, config.muon), alpha=config.lr * size)
            return
        first = state.setdefault(f"{name}.exp_avg", torch.zeros_like(weight))
        second = state.setdefault(f"{name}.exp_avg_sq", torch.zeros_like(weight))
        first.mul_(config.betas[0]).add_(gradient, alpha=1 - config.betas[0])
        second.mul_(config.betas[1]).add_(gradient.square(), alpha=1 - config.betas[1])
        update = first / (1 - config.betas[0] ** step)
        update /= (second / (1 - config.betas[1] ** step)).sqrt() + config.eps
        weight.mul_(1 - config.lr * decay).sub_(update, alpha=config.lr)


def _plain_newton_schulz(matrix: Tensor, config: MuonConfig) -> Tensor:
    """By its definition, in the matrix's own orientation."""
    a, b, c = config.coefficients
    x = matrix / matrix.norm()
    for _ in range(config.iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
