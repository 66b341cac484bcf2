"""The meta device takes the way of a card: spans, and torch's variable-length kernel."""

from collections.abc import Iterator

import pytest
import torch

from emma_train.model import emma, varlen, vision


def card_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The body of a fixture."""
    monkeypatch.setattr(varlen, "_card", lambda device: 9)
    monkeypatch.setattr(varlen, "_import", lambda kernel: _varlen() if kernel.function == "varlen_attn" else None)
    monkeypatch.setattr(varlen, "_ready", list(varlen._ready))
    for module in (emma, vision):
        monkeypatch.setattr(module, "select_backend", lambda *_: "flash")
    varlen._load_kernel.cache_clear()
    torch._dynamo.reset()
    yield
    varlen._load_kernel.cache_clear()


def _varlen() -> object:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
