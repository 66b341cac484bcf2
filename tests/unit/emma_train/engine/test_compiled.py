"""engine.compile: what it compiles, the graphs that a card gets, and what it says where there is no compiler."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from emma_train.config.schema import Recipe
from emma_train.engine import compiled, fp8_linear
from emma_train.engine.compiled import compile_layers, missing_compiler
from emma_train.engine.world import join
from emma_train.objectives.loss import LossAccumulator, count
from emma_train.sequence.pack import pack
from emma_train.stages.stage import stage_of
from emma_train.training.build import build
from emma_train.training.forward import micro_loss
from tests.card import TORCH, card_on_cpu
from tests.helpers import FakeAutoencoder, mixed_samples, tiny_emma, tiny_recipe


def test_without_a_compiler_a_warning_says_so_and_layers_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = tiny_emma()
    with caplog.at_level(logging.WARNING):
        compile_layers(model, torch.device("cpu"))
    assert caplog.messages == ["engine.compile has no effect here: it needs a C++ compiler on CPU (g++)"]
    assert all("forward" not in vars(layer) for layer in model.decoder.layers)


def test_a_compiler_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/sh")
    assert missing_compiler(torch.device("cpu")) is None


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_every_layer_is_compiled_and_nothing_else() -> None:
    model = tiny_emma()
    compile_layers(model, torch.device("cpu"))
    compiled = {name for name, module in model.named_modules() if "forward" in vars(module)}
    layers = {f"{stack}.{i}" for stack, n in (("decoder.layers", 4), ("vision.layers", 3)) for i in range(n)}
    assert compiled == layers


@pytest.fixture(params=["flash_attn_interface", "flash_attn", TORCH])
def graphs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that torch.compile makes on a card with flash-attn 3, flash-attn 2 or torch's kernel; a graph break is
    an error."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    real = torch.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, dynamic: real(f, dynamic=dynamic, backend=keep, fullgraph=True))
        patch.setattr(compiled, "missing_compiler", lambda device: None)
        card = card_on_cpu(patch, request.param)
        next(card)
        yield made
        next(card, None)
        torch._dynamo.reset()


def train_on_packs_of_three_lengths(recipe: Recipe) -> None:
    stage = stage_of(recipe)
    with join("cpu", 60) as world:
        parts = build(recipe, stage, world, resuming=True)
        for seeds in ([0], [1, 2], [3, 4, 5]):
            batch = pack([sample for seed in seeds for sample in mixed_samples(seed)])
            accumulator = LossAccumulator(recipe.loss, count([batch], stage.loss), world.device)
            loss = micro_loss(parts.engine.model, FakeAutoencoder(), batch, recipe.flow, stage, accumulator)
            parts.engine.accumulate(loss, last=True)


@pytest.mark.seconds
def test_under_fsdp_each_kind_of_layer_is_one_graph_that_knows_its_heads(
    graphs: list[torch.fx.GraphModule],
) -> None:
    """FSDP's modules hide their integers from torch.compile, which then took the size of a head for a variable: on an
    H100 the first step failed."""
    recipe = tiny_recipe(engine__compile=True, engine__precision="bf16", engine__activation_checkpointing="selective")
    train_on_packs_of_three_lengths(recipe)
    heads = [
        tuple(node.meta["example_value"].shape[1:])
        for graph in graphs
        for node in graph.graph.nodes
        if node.target is torch.ops.emma_tests.standin.default
    ]
    vision, decoder = recipe.model.vision, recipe.model.decoder
    of_vision = (vision.heads, vision.hidden // vision.heads)
    # A layer of the decoder attends twice: in causal runs, and within images. The input of the first layer of a unit is
    # a view, for which torch.compile makes a graph of its own; every layer of the decoder is the first of its unit.
    assert sorted(heads) == sorted([*[of_vision] * 2, *[(decoder.heads, decoder.head_dim)] * 4])
    assert len(graphs) == 4
    assert all(type(size) is int for shape in heads for size in shape)


@pytest.mark.seconds
@pytest.mark.parametrize("graphs", [TORCH], indirect=True)
def test_layers_in_fp8_are_graphs_of_their_own_kind(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without breaks and for all lengths: the same graphs as above, and those of an inner layer of each kind."""
    monkeypatch.setattr(fp8_linear, "has_kernel", lambda device: True)
    train_on_packs_of_three_lengths(tiny_recipe(engine__compile=True, engine__precision="bf16", engine__fp8="rowwise"))
    assert len(graphs) == 7
