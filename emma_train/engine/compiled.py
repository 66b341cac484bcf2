"""torch.compile of every layer: one graph for layers of one kind, whatever the lengths of a pack."""

import logging
import os
import shutil
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch.utils._triton import has_triton

from emma_train.model.emma import Emma

log = logging.getLogger(__name__)
KINDS = 32
"""Graphs that one kind of layer may need: no row, one or many in either branch, and every form of attention."""


def compile_layers(model: Emma, device: torch.device) -> None:
    """Compile the layers of decoder and vision encoder; where there is nothing to compile with, a warning says so.

    It comes before activation checkpointing, whose one function for all layers would be compiled for each of them in
    turn until torch gives up, and before sharding, whose hooks stay outside.
    """
    if missing := missing_compiler(device):
        log.warning("engine.compile has no effect here: %s", missing)
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    for stack in (model.decoder.layers, model.vision.layers, model.vision.stem_layers):
        for layer in stack if stack is not None else []:
            layer.forward = torch.compile(layer.forward, dynamic=True)


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine; None where it can work."""
    if device.type == "cpu":
        names = (os.environ.get("CXX", ""), "g++", "clang++")
        return None if any(shutil.which(name) for name in names if name) else "it needs a C++ compiler on CPU (g++)"
    return None if has_triton() else "it needs triton, which comes with torch for CUDA"


def uncompiled() -> AbstractContextManager[None]:
    """Within, layers run as they are written: samples are of sizes that need no graphs of their own."""
    return cast(AbstractContextManager[None], torch.compiler.set_stance("force_eager"))


def num_graphs() -> int:
    """Graphs that this process has compiled; one that still grows after the first steps is compiled over and over."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
