"""What a checkpoint holds of a model in training, by name: the one view that saving and loading need of an engine.

Every engine gives the same names: model.NAME, ema.NAME and optimizer.NAME.KEY, as whole tensors, or as DTensors or
fragments that know which part of the whole this rank has.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from emma_train.engine.flat_shard import FlatShard, local
from emma_train.engine.protocol import Engine


@dataclass(frozen=True)
class State:
    """Live tensors: what is loaded into them is in the model. Hyperparameters are the recipe's and are not here."""

    weights: dict[str, Tensor]
    """model.NAME of what learns, ema.NAME of its averages."""
    optimizer: dict[str, Tensor]
    """optimizer.NAME.KEY: moments and step counters."""
    frozen: dict[str, Tensor]
    """model.NAME of what cannot have changed since the stage began."""

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What every checkpoint writes anew, by its folder (folder.PARTS)."""
        return {"weights": self.weights, "optimizer": self.optimizer}

    @property
    def all(self) -> dict[str, Tensor]:
        return {**self.weights, **self.optimizer, **self.frozen}


def state_of(engine: Engine, averages: Mapping[str, Tensor]) -> State:
    """The view of an engine and the averages of its weights. What has moments learns; all else is frozen."""
    held = engine.state()
    learns = {name.rpartition(".")[0] for name in held["optimizer"]}
    weights = {f"model.{name}": tensor for name, tensor in held["model"].items() if name in learns}
    weights |= {f"ema.{name}": average for name, average in averages.items()}
    optimizer = {f"optimizer.{name}": tensor for name, tensor in held["optimizer"].items()}
    frozen = {f"model.{name}": tensor for name, tensor in held["model"].items() if name not in learns}
    return State(weights, optimizer, frozen)


def part(tensor: Tensor) -> Tensor:
    """What this rank writes of a tensor: the plain values of a shard, or a fragment, which knows its places."""
    return tensor if isinstance(tensor, FlatShard) else local(tensor)
