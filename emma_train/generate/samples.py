"""Sample images and answers of a run: samples/step-XXXXXXXX/*.png and samples.json, which the report reads."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emma_train.generate.generator import Generator
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.sequence.request import Request
from emma_train.sequence.tasks import TASKS

log = logging.getLogger(__name__)


def write_samples(
    generator: Generator,
    requests: Sequence[Request],
    folder: Path,
    flow: FlowSettings,
    text: TextSettings,
    write: bool = True,
) -> Path | None:
    """Generate text and images for the requests; returns the folder, if they are in it. Only the main rank writes.

    If the files cannot be written, logs a warning: every rank finishes generating, and training continues.
    """
    listed: list[dict[str, Any]] = []

    def attempt(store: Callable[[], Any]) -> None:
        nonlocal write
        try:
            if write:
                store()
        except OSError as error:
            write = False
            log.warning("%s: sample images cannot be written (%s)", folder, error.strerror)

    def keep(name: str, image: np.ndarray) -> str:
        attempt(lambda: Image.fromarray(image).save(folder / name))
        return name

    attempt(lambda: folder.mkdir(parents=True, exist_ok=True))

    for task in TASKS.values():
        asked = [r for r in requests if r.task == task.name]
        if not asked:
            continue
        answers: list[Any] = (
            generator.generate_images(asked, flow) if task.makes_image else generator.generate_text(asked, text)
        )
        for number, (request, answer) in enumerate(zip(asked, answers, strict=True)):
            name = f"{task.name}-{number}"
            entry: dict[str, Any] = {
                "task": task.name,
                "key": request.key,
                "prompt": request.text,
                "kind": request.kind,
            }
            if request.images:
                entry["reference"] = keep(f"{name}.reference.png", request.images[0])
            if not task.makes_image:
                entry |= {"answer": answer, "truth": request.truth}
            else:
                entry["file"] = keep(f"{name}.png", answer)
                if request.target is not None:
                    entry["target"] = keep(f"{name}.target.png", request.target)
            listed.append(entry)
    text_of_all = json.dumps(listed, indent=1, ensure_ascii=False) + "\n"
    attempt(lambda: (folder / "samples.json").write_text(text_of_all, encoding="utf-8"))
    return folder if write else None
