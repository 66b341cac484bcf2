"""engine.compile where there is nothing to compile with."""

import logging

import pytest
import torch

from emma_train.engine.compiled import compile_layers, missing_compiler
from tests.helpers import tiny_emma


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
