"""Activation checkpointing: a layer keeps only its input, and backward runs the layer again."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from emma_train.metrics import not_recording
from emma_train.model.emma import Emma


def checkpoint_activations(model: Emma, mode: str) -> None:
    """Checkpoint layers of the decoder and the vision encoder; `mode` as in `checkpointed_layers`.

    Call it after compiling and before sharding. Only `forward` is wrapped, so parameters keep their names, and the
    second run happens between the hooks of the layer's FSDP unit, with weights that are gathered for its gradients
    anyway.
    """
    for stack in (model.decoder.layers, model.vision.layers, model.vision.stem_layers):
        checkpoint_layers(list(stack) if stack is not None else [], mode)


def checkpoint_layers(layers: Sequence[nn.Module], mode: str) -> None:
    """Checkpoint the layers of one stack."""
    for index in checkpointed_layers(len(layers), mode):
        layers[index].forward = partial(
            checkpoint,
            layers[index].forward,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a layer is random
            context_fn=lambda: (nullcontext(), not_recording()),
        )


def checkpointed_layers(num_layers: int, mode: str) -> range:
    """Indexes of the layers of a stack that are checkpointed: none, every second (selective), all (full)."""
    return {"none": range(0), "selective": range(0, num_layers, 2), "full": range(num_layers)}[mode]
