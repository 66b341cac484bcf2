"""Answer a question about images, or make or edit an image."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from emma_train.commands.model_arguments import add_flow_arguments, add_model_arguments, given_settings, wanted_size
from emma_train.errors import UserError, check_range

if TYPE_CHECKING:
    import numpy as np

    from emma_train.config.schema import ImageConfig
    from emma_train.generate.generator import Generator
    from emma_train.generate.settings import FlowSettings
    from emma_train.sequence.request import Request


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
    add_flow_arguments(settings)
    settings.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    settings.add_argument("--max-tokens", type=int, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="of noise and of sampled text (%(default)s)")
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
    flow = with_overrides(flow, given_settings(arguments, flow), "--")
    text = with_overrides(text, given_settings(arguments, text), "--")
    image_config = task.image_config(recipe.data)
    multiple = recipe.model.autoencoder.pixels
    images = [_load_image(file, image_config, multiple) for file in arguments.image]
    size = wanted_size(arguments.size, images, recipe.data.gen.side, multiple)
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


def _load_image(file: str, image_config: "ImageConfig", multiple: int) -> "np.ndarray":
    """uint8 [H, W, 3], resized as in training; both sides are multiples of `multiple`. Raises UserError."""
    from data_pipelines.shards.images import load_resized

    try:
        return load_resized(Path(file).read_bytes(), image_config, multiple)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--image {file}: cannot be read ({error})") from None


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
