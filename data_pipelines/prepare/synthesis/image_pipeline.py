"""Makes and edits images by a diffusers pipeline of any name, such as QwenImageEditPipeline."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from emma_train.errors import RunError, UserError

DEFAULTS: Mapping[str, Any] = {"true_cfg_scale": 4.0, "negative_prompt": " "}
"""What Qwen-Image's pipelines are called with; given to those that have these arguments."""


class ImagePipeline:
    """A pipeline with its weights. The same prompt, image and seed give the same image on one kind of device."""

    def __init__(self, pipeline: str, folder: Path, steps: int, device: str = "") -> None:
        """`pipeline`: a class of diffusers. Raises UserError if there is none, or the folder has no such model."""
        import diffusers
        import torch

        kind: Any = getattr(diffusers, pipeline, None)
        is_pipeline = inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)
        if not is_pipeline:
            raise UserError(f"--pipeline {pipeline}: diffusers {diffusers.__version__} has no pipeline of this name")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        try:
            loaded = kind.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--weights {folder}: no model of {pipeline} ({reason})") from None
        self._pipeline = loaded.to(self._device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._arguments = set(inspect.signature(kind.__call__).parameters)
        self.name, self.folder, self.steps = pipeline, folder, steps
        self.edits = "image" in self._arguments
        """Whether it takes an image to edit."""

    def run(self, prompt: str, seed: int, image: Image.Image | None = None) -> Image.Image:
        """An image of the prompt; with `image`, that image edited as the prompt says. RGB. Raises UserError where the
        pipeline does not take what it is given, and RunError where it fails."""
        import torch

        if (image is not None) != self.edits:
            raise UserError(f"--pipeline {self.name}: {'edits images' if self.edits else 'takes no image to edit'}")
        given = {name: value for name, value in DEFAULTS.items() if name in self._arguments}
        given |= {"prompt": prompt, "num_inference_steps": self.steps}
        given |= {} if image is None else {"image": image}
        given["generator"] = torch.Generator("cpu").manual_seed(seed % 2**63)
        try:
            result = self._pipeline(**given).images[0]
        except torch.OutOfMemoryError as error:
            raise RunError(f"{self.name}: {' '.join(str(error).split())[:200]}") from None
        return result.convert("RGB")
