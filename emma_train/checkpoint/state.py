"""The tensors that a checkpoint holds, by name. Saving and loading see an engine through this class alone.

Every engine gives the same names: model.NAME, ema.NAME and optimizer.NAME.KEY. A tensor is plain, or a DTensor or
FlatShard, which know which part of the full tensor this rank has.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from emma_train.engine.flat_shard import FlatShard, local
from emma_train.engine.protocol import Engine


@dataclass(frozen=True)
class CheckpointState:
    """Live tensors: loading into them changes the model. Hyperparameters are not included: the recipe has them."""

    weights: dict[str, Tensor]
    """model.NAME of trainable parameters, ema.NAME of their averages."""
    optimizer: dict[str, Tensor]
    """optimizer.NAME.KEY: moments and step counters."""
    frozen: dict[str, Tensor]
    """model.NAME of parameters that cannot have changed since the stage began."""

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that every checkpoint writes, by DCP folder (folder.CHECKPOINT_PARTS)."""
        return {"weights": self.weights, "optimizer": self.optimizer}

    @property
    def all(self) -> dict[str, Tensor]:
        return {**self.weights, **self.optimizer, **self.frozen}


def checkpoint_state(engine: Engine, averages: Mapping[str, Tensor]) -> CheckpointState:
    """The tensors of an engine and the averages of its weights. Parameters with optimizer state are trainable; the
    others are frozen."""
    tensors = engine.state()
    trainable = {name.rpartition(".")[0] for name in tensors["optimizer"]}
    weights = {f"model.{name}": tensor for name, tensor in tensors["model"].items() if name in trainable}
    weights |= {f"ema.{name}": average for name, average in averages.items()}
    optimizer = {f"optimizer.{name}": tensor for name, tensor in tensors["optimizer"].items()}
    frozen = {f"model.{name}": tensor for name, tensor in tensors["model"].items() if name not in trainable}
    return CheckpointState(weights, optimizer, frozen)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank writes of a tensor: its local values, or a FlatShard, which knows its position."""
    return tensor if isinstance(tensor, FlatShard) else local(tensor)
