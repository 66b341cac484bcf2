"""LM head and cross-entropy in one against the plain form: values, gradients, precision and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emma_train.model import cross_entropy
from emma_train.model.cross_entropy import ROWS, linear_cross_entropy

MIB = 2**20
TOKENS, VOCAB, HIDDEN = 2048, 50_000, 64


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def inputs(num: int, vocab: int = 1000, hidden: int = 32, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num)
    h = torch.randn(num, hidden, generator=generator).to(dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=generator) / 4).to(dtype).requires_grad_()
    return h, w, torch.randint(0, vocab, (num,), generator=generator)


@pytest.mark.parametrize("num", [1, ROWS - 1, ROWS, 2 * ROWS + 88])
def test_losses_and_gradients_are_those_of_the_plain_form(num: int) -> None:
    hidden, weight, labels = inputs(num)
    share = torch.rand(num)
    got, want = linear_cross_entropy(hidden, weight, labels), plain(hidden, weight, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad((x * share).sum(), (hidden, weight)) for x in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_nothing_to_predict_gives_exact_zeros_that_stay_in_the_graph() -> None:
    hidden, weight, labels = inputs(0)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.shape == (0,) and loss.requires_grad
    loss.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 32)
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen: str) -> None:
    hidden, weight, labels = inputs(300)
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    want = {"hidden": hidden.grad, "weight": weight.grad}
    parts = {name: x.detach().requires_grad_(name != frozen) for name, x in (("hidden", hidden), ("weight", weight))}
    linear_cross_entropy(parts["hidden"], parts["weight"], labels).sum().backward()
    assert parts[frozen].grad is None
    other = "hidden" if frozen == "weight" else "weight"
    assert torch.equal(parts[other].grad, want[other])  # type: ignore[arg-type]


def test_many_chunks_of_bf16_are_as_exact_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over chunks is in float32; in bf16 it would stand still once it is 256 times a chunk's share."""
    hidden, weight, labels = inputs(TOKENS, 64, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum").backward()

    def error(rows: int) -> float:
        monkeypatch.setattr(cross_entropy, "ROWS", rows)
        (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).sum(), weight)
        assert grad.dtype == torch.bfloat16 and exact[1].grad is not None
        return float((grad.double() - exact[1].grad).norm() / exact[1].grad.norm())

    assert error(TOKENS) < 4e-3 and error(4) < 4e-3


def peak_of(form: str) -> int:
    """Bytes above the inputs that forward and backward of TOKENS tokens take at most, in a process of its own."""
    command = [sys.executable, __file__, form]
    root = Path(__file__).parents[4]
    return int(subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, check=True, capture_output=True).stdout)


@pytest.mark.seconds
def test_memory_stays_far_below_the_logits_of_all_tokens() -> None:
    logits = 4 * TOKENS * VOCAB
    fused, plain = peak_of("fused"), peak_of("plain")
    print(f"\npeak above the inputs: fused {fused / MIB:.0f} MiB, plain {plain / MIB:.0f}, logits {logits / MIB:.0f}")
    assert plain > 1.9 * logits
    assert fused < 0.5 * logits


def _peak(form: str) -> int:
    torch.set_num_threads(1)
    function = plain if form == "plain" else linear_cross_entropy
    function(*inputs(2, 10)).sum().backward()
    hidden, weight, labels = inputs(TOKENS, VOCAB, HIDDEN)
    before = _resident("VmRSS")
    function(hidden, weight, labels).sum().backward()
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    """Bytes now (VmRSS) or at most (VmHWM; getrusage's figure would start at that of the parent process)."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


if __name__ == "__main__":
    print(_peak(sys.argv[1]))
