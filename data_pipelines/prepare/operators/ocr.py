"""`ocr`: the texts in an image, by rapidocr, whose models (PP-OCRv6) are in its package."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, for_each_record
from data_pipelines.prepare.record_images import main_image, rgb_image
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.errors import UserError


@dataclass(frozen=True)
class TextLine:
    """A line of text in an image."""

    text: str
    score: float
    """Of the recogniser, 0 to 1."""
    box: tuple[int, int, int, int]
    """left, top, right, bottom in pixels of the image that was read."""


class TextReader:
    """Reads the lines of text in images, from top to bottom. One CPU thread."""

    def __init__(self, min_score: float = 0.5) -> None:
        """Lines with a lower score are left out. Raises UserError where rapidocr is missing."""
        try:
            from rapidocr import RapidOCR
        except ModuleNotFoundError as error:
            raise UserError(f"ocr needs {error.name}; pip install 'emma-train[ocr]'") from None
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1}
        self._engine = RapidOCR(params={"Global.text_score": min_score, "Global.log_level": "error", **threads})
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of each image without text

    def lines(self, image: np.ndarray) -> list[TextLine]:
        """Lines of an image, uint8 RGB [height, width, 3]."""
        result: Any = self._engine(np.ascontiguousarray(image[:, :, ::-1]))  # it reads BGR, as OpenCV does
        if result.txts is None:
            return []
        lines = []
        for text, score, corners in zip(result.txts, result.scores, result.boxes, strict=True):
            (left, top), (right, bottom) = np.min(corners, axis=0), np.max(corners, axis=0)
            lines.append(TextLine(text, float(score), (int(left), int(top), int(right), int(bottom))))
        return lines


def text_share(lines: list[TextLine], width: int, height: int) -> float:
    """Share of an image's area that the boxes of its lines cover, overlaps counted once."""
    covered = np.zeros((height, width), bool)
    for line in lines:
        left, top, right, bottom = line.box
        covered[max(0, top) : bottom, max(0, left) : right] = True
    return float(covered.mean())


def _start(settings: Mapping[str, Any]) -> Annotate:
    reader = TextReader(settings["min_score"])

    def annotate_one(record: StoredRecord) -> Mapping[str, Any]:
        image = rgb_image(record.images[main_image(record)], settings["side"])
        lines = reader.lines(image)
        return {
            "texts": [line.text for line in lines],
            "scores": [line.score for line in lines],
            "boxes": [list(line.box) for line in lines],
            "lines": len(lines),
            "share": text_share(lines, image.shape[1], image.shape[0]),
        }

    return for_each_record(annotate_one)


OCR = Operator(
    "ocr",
    1,
    {
        "texts": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "boxes": pa.list_(pa.list_(pa.int32())),
        "lines": pa.int32(),
        "share": pa.float32(),
    },
    _start,
    {"side": 1280, "min_score": 0.5},
)
"""Of the image that the record makes, or else of its first, reduced to `side` pixels. boxes: left, top, right, bottom
in these pixels. share: of the image's area that text covers."""
