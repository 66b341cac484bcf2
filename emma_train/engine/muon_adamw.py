"""The optimizer of optimizer.kind=muon: Muon for the groups of hidden matrices, AdamW for all others."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emma_train.config.schema import MuonConfig
from emma_train.engine.adam_state import adam_state
from emma_train.engine.flat_shard import Run
from emma_train.engine.matrix_exchange import MatrixExchange, MatrixLayout
from emma_train.engine.muon import assign_owners, newton_schulz, update_scale
from emma_train.engine.world import World
from emma_train.flops.formulas import newton_schulz_flops

MOMENTUM = "momentum_buffer"
"""Key of Muon's state of a parameter, as torch.optim.Muon has it."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for groups with `muon`: their tensors hold this rank's parts of matrices.

    Momentum is kept like the parameter, in parts: its update is elementwise. A matrix is gathered for Newton-Schulz
    only, by one rank. An engine calls `connect` before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]], names: Sequence[str], muon: MuonConfig, **adam: Any) -> None:
        """`names` of the parameters in the groups with `muon`; `adam` are AdamW's settings."""
        super().__init__(groups, **adam)
        self.names = tuple(names)
        self._config = muon
        self._runs: dict[str, Run] = {}

    def connect(
        self, runs: Mapping[str, Run], shapes: Mapping[str, Sequence[int]], world: World, replica_size: int
    ) -> None:
        """Say where the matrices lie. `runs` and `shapes` by parameter name; `replica_size` consecutive ranks have all
        values of a parameter. Every rank calls it."""
        self._runs = {name: runs[name] for name in self.names}
        self._shapes = {name: (shapes[name][0], shapes[name][1]) for name in self.names}
        parts = world.gather([(run.start, run.length) for run in self._runs.values()])
        self._parts = [dict(zip(self.names, rank_parts, strict=True)) for rank_parts in parts]
        self._world, self._replica_size = world, replica_size
        self._exchanges: dict[tuple[str, ...], MatrixExchange] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_muon(group)

    def momentum(self, parameter: Tensor) -> Tensor:
        """Momentum of a tensor of a group with `muon`; zeros before the first step, so that it can be loaded into."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state[MOMENTUM] = torch.zeros_like(parameter, requires_grad=False)
        return state[MOMENTUM]

    def _step_muon(self, group: dict[str, Any]) -> None:
        tensors = {id(tensor) for tensor in group["params"]}
        names = tuple(name for name, run in self._runs.items() if id(run.flat) in tensors)
        if not names:
            return
        config, lr = self._config, group["lr"]
        for tensor in group["params"]:
            if tensor.grad is not None:
                self.momentum(tensor).lerp_(tensor.grad, 1 - config.momentum)
        updates = self._exchange(names).apply(
            lambda number: self._direction(names[number]), partial(newton_schulz, config=config)
        )
        for tensor in group["params"]:
            if tensor.grad is not None:
                tensor.mul_(1 - lr * group["weight_decay"])
        for name, update in zip(names, updates, strict=True):
            if self._runs[name].flat.grad is not None:
                values = _values(self._runs[name].flat, self._runs[name])
                values.add_(update.to(values), alpha=-lr * update_scale(self._shapes[name], config))

    def _direction(self, name: str) -> Tensor:
        """This rank's values of what is orthogonalised; zeros for a parameter without a gradient."""
        run = self._runs[name]
        momentum = _values(self.momentum(run.flat), run)
        if run.flat.grad is None:
            return torch.zeros_like(momentum)
        gradient = _values(run.flat.grad, run)
        return gradient.lerp(momentum, self._config.momentum) if self._config.nesterov else momentum

    def _exchange(self, names: tuple[str, ...]) -> MatrixExchange:
        if names not in self._exchanges:
            shapes = [self._shapes[name] for name in names]
            costs = [newton_schulz_flops(*shape, self._config.iterations) for shape in shapes]
            parts = [[rank_parts[name] for name in names] for rank_parts in self._parts]
            layout = MatrixLayout(shapes, assign_owners(costs, self._world.size), parts, self._replica_size)
            dtype = torch.bfloat16 if self._config.dtype == "bf16" else torch.float32
            self._exchanges[names] = MatrixExchange(layout, self._world.rank, self._world.device, dtype)
        return self._exchanges[names]


def optimizer_state(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The state that a checkpoint keeps for the parameter `name`, whose values are in the tensor `parameter`. Before
    the first step it is created as zeros, so that a checkpoint can be loaded into it."""
    if isinstance(optimizer, MuonAdamW) and name in optimizer.names:
        return {MOMENTUM: optimizer.momentum(parameter)}
    return adam_state(optimizer, parameter)


def _values(tensor: Tensor, run: Run) -> Tensor:
    """The run's part of its flat tensor, or of one of the same layout."""
    return tensor.detach().view(-1)[run.first : run.first + run.length]
