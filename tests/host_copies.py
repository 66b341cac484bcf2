"""What makes the host wait for the device, or the device for the host, counted on the meta device."""

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "is_nonzero", "equal")
"""Operations whose result on the host, or whose size, depends on values on the device."""


class HostCopies(TorchDispatchMode):
    """A context that lists copies between devices and operations that depend on data, each with our lines above it.

    The meta device stands for a card. It cannot see `torch.tensor(list, device=...)` as a copy, so the context counts
    calls of that too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self._tensor = torch.tensor

    def __enter__(self) -> "HostCopies":
        torch.tensor = self._counted_tensor
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        torch.tensor = self._tensor
        super().__exit__(*details)

    def _counted_tensor(self, *arguments: Any, **options: Any) -> torch.Tensor:
        if options.get("device") is not None and torch.device(options["device"]).type != "cpu":
            self._add("torch.tensor to a device")
        return self._tensor(*arguments, **options)

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in (*inputs, *outputs)}
        if "meta" not in devices:
            return out
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self._add(f"copy of {tuple(inputs[-1].shape)}")
        by_mask = name in ("index", "index_put", "index_put_") and any(x.dtype == torch.bool for x in inputs[1:])
        if name in DATA_DEPENDENT or by_mask or (name == "repeat_interleave" and len(inputs) == 1):
            self._add(f"{name} by mask" if by_mask else name)
        return out

    def _add(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/emma_train/" in f.filename and "/tests/" not in f.filename]
        where = " < ".join(f"{f.filename.rpartition('/emma_train/')[2]}:{f.lineno}" for f in frames[::-1][:3])
        self.problems.append(f"{what} at {where}")


def host_copies(run: Callable[[], Any]) -> list[str]:
    """Problems of one call; an earlier one has filled what is kept on the device for good."""
    run()
    with HostCopies() as copies:
        run()
    return copies.problems
