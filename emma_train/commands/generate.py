"""Answer a question about images, or make or edit an image."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.commands.model_arguments import add_model_arguments
from emma_train.errors import UserError, check_range

if TYPE_CHECKING:
    import numpy as np

    from emma_train.config.schema import ImageConfig
    from emma_train.generate.generator import Generator
    from emma_train.generate.settings import FlowSettings
    from emma_train.sequence.request import Request

LONGEST_SIDE = 16_384
"""Of an image to make, in pixels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from emma_train.config.mix import TASK_NAMES

    add_model_arguments(parser)
    parser.add_argument("--task", choices=TASK_NAMES, required=True)
    parser.add_argument("--prompt", nargs="+", required=True, help="questions, prompts or instructions")
    parser.add_argument("--image", nargs="+", default=[], help="to edit, or to ask about (at <image> in the question)")
    parser.add_argument("--out", default="generated", help="folder for images (%(default)s)")
    parser.add_argument("--num", type=int, default=1, help="answers or images per prompt (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="of the image in pixels")
    settings = parser.add_argument_group("how to generate", "not given: as the export says, else as the recipe does")
    settings.add_argument("--steps", type=int, help="flow steps")
    settings.add_argument("--solver", choices=("euler", "heun"), help="of the flow")
    settings.add_argument("--shift", type=float, help="of the flow's time; larger images need more")
    settings.add_argument("--text-guidance", type=float, help="strength of the prompt")
    settings.add_argument("--image-guidance", type=float, help="strength of the reference")
    settings.add_argument("--guidance-from", type=float, help="guidance at flow times above this (1 is noise) alone")
    settings.add_argument("--guidance-to", type=float, help="guidance at flow times up to this alone")
    settings.add_argument(
        "--guidance-renorm", action=argparse.BooleanOptionalAction, help="keep the norm that there is without guidance"
    )
    settings.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    settings.add_argument("--max-tokens", type=int, help="longest answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="images at once (%(default)s)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the answers, or write the images and print their paths."""
    from emma_train.generate.load import load_generator
    from emma_train.generate.settings import read_settings, with_overrides
    from emma_train.sequence.tasks import TASKS
    from emma_train.storage.files import make_folder
    from emma_train.storage.paths import parse_path

    check_range("--num", arguments.num, 1, 100_000)
    check_range("--batch", arguments.batch, 1, 65_536)
    model = parse_path(arguments.model)
    task = TASKS[arguments.task]
    if task.makes_image and task.condition is not None and not arguments.image:
        raise UserError(f"--task {task.name} needs an image: --image FILE")
    if task.condition is None and arguments.image:
        others = " or ".join(other.name for other in TASKS.values() if other.condition is not None)
        raise UserError(f"--task {task.name} takes no --image; use --task {others}, or leave out --image")
    if not task.makes_image:
        _check_marks(arguments.prompt, len(arguments.image))
    if task.makes_image:
        make_folder(Path(arguments.out))
    generator, recipe, _ = load_generator(
        arguments.model, arguments.device, not arguments.no_ema, arguments.precision, not arguments.no_experts
    )
    flow, text = read_settings(model, recipe)
    flow = with_overrides(flow, _given(arguments, flow), "--")
    text = with_overrides(text, _given(arguments, text), "--")
    image_config = task.image_config(recipe.data)
    multiple = recipe.model.autoencoder.pixels
    images = [_load_image(file, image_config, multiple) for file in arguments.image]
    size = _image_size(arguments.size, images, recipe.data.gen.side, multiple)
    requests = _requests(arguments, images, size)
    if not task.makes_image:
        for answer in generator.generate_text(requests, text):
            print(answer)
    else:
        _write_images(generator, requests, flow, Path(arguments.out), arguments.batch)
    return 0


def _check_marks(prompts: list[str], num_images: int) -> None:
    """Raise UserError where a question has <image> in its text, but not once for each image."""
    from emma_train.sequence.layout import check_marks

    for prompt in prompts:
        try:
            check_marks([("user", prompt)], num_images)
        except ValueError as error:
            raise UserError(f"--prompt {prompt!r}: {error}; give as many --image, or none of the marks") from None


def _given(arguments: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """Values of the options that are named as fields of `settings` and were given."""
    return {k: v for k in vars(settings) if (v := getattr(arguments, k, None)) is not None}


def _load_image(file: str, image_config: "ImageConfig", multiple: int) -> "np.ndarray":
    """uint8 [H, W, 3], resized as in training; both sides are multiples of `multiple`. Raises UserError."""
    from data_pipelines.shards.images import load_resized

    try:
        return load_resized(Path(file).read_bytes(), image_config, multiple)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--image {file}: cannot be read ({error})") from None


def _image_size(
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


def _requests(arguments: argparse.Namespace, images: "list[np.ndarray]", size: tuple[int, int]) -> "list[Request]":
    """--num requests a prompt. The seed depends on the prompt and on the number within it."""
    from emma_train.sequence.request import Request
    from emma_train.sequence.seeds import seed_of

    return [
        Request(str(n), arguments.task, prompt, images, size, seed_of(arguments.seed, 0, f"{n} {prompt}", "generate"))
        for prompt in arguments.prompt
        for n in range(arguments.num)
    ]


def _write_images(
    generator: "Generator", requests: "list[Request]", flow: "FlowSettings", out: Path, batch_size: int
) -> None:
    """Write TASK-NUMBER.png for each request and print its path, `batch_size` images at a time."""
    from PIL import Image

    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        for number, pixels in enumerate(generator.generate_images(batch, flow), start):
            path = out / f"{batch[0].task}-{number:04d}.png"
            Image.fromarray(pixels).save(path)
            print(path)
