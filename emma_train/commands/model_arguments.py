"""Options of the commands that run a model (generate, evaluate)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.errors import UserError

if TYPE_CHECKING:
    import numpy as np

LONGEST_SIDE = 16_384
"""Of an image to make, in pixels."""


SHIPPED = {"tiny": "recipes/tiny-long/model"}
"""Trained models of the repository, by the names that commands take for them."""


def shipped_or_given(model: str) -> str:
    """The folder of a shipped model where `model` is its name and no folder here has that name; else `model`."""
    return SHIPPED[model] if model in SHIPPED and not Path(model).exists() else model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    help_text = "run folder, checkpoint (or a URL of one) or export; tiny: the model in " + SHIPPED["tiny"]
    parser.add_argument("model", metavar="MODEL", type=shipped_or_given, help=help_text)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the weights; auto: bf16 on a GPU, fp32 on CPUs",
    )
    parser.add_argument("--no-ema", action="store_true", help="use the weights, not their average")
    parser.add_argument(
        "--no-experts", action="store_true", help="send every image to the versatile encoder, none to the STEM expert"
    )


def add_flow_arguments(group: argparse._ArgumentGroup) -> None:
    """How images are generated; each option has the name of a field of FlowSettings."""
    group.add_argument("--steps", type=int, help="flow steps")
    group.add_argument("--solver", choices=("euler", "heun"), help="of the flow")
    group.add_argument("--shift", type=float, help="of the flow's time; larger images need more")
    group.add_argument("--text-guidance", type=float, help="strength of the prompt")
    group.add_argument("--image-guidance", type=float, help="strength of the reference")
    group.add_argument("--guidance-from", type=float, help="guidance at flow times above this (1 is noise) alone")
    group.add_argument("--guidance-to", type=float, help="guidance at flow times up to this alone")
    group.add_argument(
        "--guidance-renorm", action=argparse.BooleanOptionalAction, help="keep the norm that there is without guidance"
    )


def given_settings(arguments: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """Values of the options that are named as fields of `settings` and were given."""
    return {k: v for k in vars(settings) if (v := getattr(arguments, k, None)) is not None}


def wanted_size(
    wanted: list[int] | None, images: "list[np.ndarray]", default_side: int, multiple: int
) -> tuple[int, int]:
    """(height, width) in pixels: those of --size, else of the first image, else a square. Raises UserError."""
    if wanted:
        width, height = wanted
        if width % multiple or height % multiple or min(width, height) <= 0 or max(width, height) > LONGEST_SIDE:
            raise UserError(f"--size {width} {height}: both must be multiples of {multiple} up to {LONGEST_SIDE}")
        return height, width
    if images:
        return images[0].shape[0], images[0].shape[1]
    return default_side, default_side
