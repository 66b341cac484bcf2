"""Scores of images by a classifier in Hugging Face's form: aesthetic, not safe for work, watermark."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emma_train.errors import UserError


class ImageClassifier:
    """A folder that transformers' AutoModelForImageClassification reads. The score of an image is the number that it
    gives where the model has one output (a regression), else the probability of one label."""

    def __init__(self, folder: str, label: str = "") -> None:
        """Raises UserError if the folder has no such model, or the model no such label."""
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{Path(folder)}: no image classifier that transformers reads ({reason})") from None
        self._model = model.to(self._device).eval()
        labels = {name.lower(): number for number, name in model.config.id2label.items()}
        if len(labels) == 1:
            self._output = None
        elif label.lower() in labels:
            self._output = int(labels[label.lower()])
        else:
            raise UserError(f"{Path(folder)}: has no label {label!r}; its labels are {', '.join(sorted(labels))}")

    def scores(self, images: Sequence[np.ndarray]) -> list[float]:
        """A score for each image, uint8 [height, width, 3] of any sizes."""
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        values = logits[:, 0] if self._output is None else logits.softmax(dim=1)[:, self._output]
        return [float(value) for value in values.cpu()]
