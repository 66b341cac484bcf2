"""torch.compile of every layer: one graph for layers of one kind, whatever the lengths of a pack."""

import logging
import os
import shutil
from contextlib import AbstractContextManager
from typing import cast

import torch

from emma_train.engine.torch_private import avoid_wrong_code, has_triton, num_compiled_graphs, raise_recompile_limit
from emma_train.model.emma import Emma

log = logging.getLogger(__name__)
KINDS = 32
"""Graphs that one kind of layer may need: zero, one or many rows in either branch, times the attention backends."""


def compile_layers(model: Emma, device: torch.device) -> None:
    """Compile the layers of decoder and vision encoder. Logs a warning and does nothing where there is no compiler.

    Call it before activation checkpointing, because torch would compile the checkpoint function of all layers anew for
    each of them until it gives up, and before sharding, so that the sharding hooks stay outside of the graphs.
    """
    if missing := missing_compiler(device):
        log.warning("engine.compile has no effect here: %s", missing)
        return
    raise_recompile_limit(KINDS)
    avoid_wrong_code()
    for stack in (model.decoder.layers, model.vision.layers, model.vision.stem_layers):
        for layer in stack if stack is not None else []:
            layer.forward = torch.compile(layer.forward, dynamic=True)


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine; None if it can work."""
    if device.type == "cpu":
        names = (os.environ.get("CXX", ""), "g++", "clang++")
        return None if any(shutil.which(name) for name in names if name) else "it needs a C++ compiler on CPU (g++)"
    return None if has_triton() else "it needs triton, which comes with torch for CUDA"


def uncompiled() -> AbstractContextManager[None]:
    """Inside this block compiled layers run eagerly: the sizes of sample images would need graphs of their own."""
    return cast(AbstractContextManager[None], torch.compiler.set_stance("force_eager"))


def num_graphs() -> int:
    """Graphs that this process has compiled. If the number still grows after the first steps, layers are recompiled."""
    return num_compiled_graphs()
