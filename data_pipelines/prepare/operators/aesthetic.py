"""`aesthetic`: one score of how good an image looks, higher is better, and where it is from.

The first of these that there is: a column of the source (LAION's, under all its names), the model that the setting
`model` names, BRISQUE. Scores of different kinds are not comparable, so select by `kind` too.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.prepare.image_classifier import ImageClassifier
from data_pipelines.prepare.operator import Annotate, Operator, for_each_record
from data_pipelines.prepare.record_images import main_image, rgb_image
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.errors import UserError

AESTHETIC_COLUMNS = ("AESTHETIC_SCORE", "aesthetic_score", "aesthetic", "aesthetics", "AESTHETIC")
"""improved_aesthetics has the first, laion2B-en-aesthetic the third."""


def source_number(columns: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    """The first of some columns that has a finite number in this record; None where none has."""
    for name in names:
        value = columns.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def brisque_scorer() -> Callable[[np.ndarray], float]:
    """BRISQUE's distortion of an image, about 0 (natural) to 100, by the SVM in the package brisque. Of photographs: a
    drawing is not natural, however good it looks. Raises UserError."""
    try:
        from brisque import BRISQUE
    except ImportError as error:
        raise UserError(
            f"aesthetic without a source's column or a model needs brisque ({error}); pip install "
            "'emma-train[aesthetic]', or give --set model=FOLDER"
        ) from None

    class Brisque(BRISQUE):
        def scale_features(self, features: Any) -> Any:
            """Version 0.2.0 leaves arrays of one number among the features, which numpy 2.4 does not convert."""
            return super().scale_features([np.ravel(feature)[0] for feature in features])

    score = Brisque(url=False).score

    def finite_score(image: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            value = float(score(image))
        if not math.isfinite(value):
            raise ValueError("BRISQUE has no value for it: it is of one colour")
        return value

    return finite_score


def _start(settings: Mapping[str, Any]) -> Annotate:
    model = ImageClassifier(settings["model"], settings["label"]) if settings["model"] else None
    brisque = None if model or not settings["brisque"] else brisque_scorer()

    def annotate_one(record: StoredRecord) -> Mapping[str, Any]:
        names = (*settings["columns"], *AESTHETIC_COLUMNS)
        given = source_number(record.columns.get("source", {}), names)
        if given is not None:
            return {"score": given, "kind": "source"}
        if model is None and brisque is None:
            return {"score": None, "kind": None}
        image = rgb_image(record.images[main_image(record)], settings["side"])
        if model is not None:
            return {"score": model.scores([image])[0], "kind": "model"}
        assert brisque is not None
        return {"score": 100 - brisque(image), "kind": "brisque"}

    return for_each_record(annotate_one)


AESTHETIC = Operator(
    "aesthetic",
    1,
    {"score": pa.float32(), "kind": pa.string()},
    _start,
    {"columns": [], "model": "", "label": "aesthetic", "brisque": True, "side": 512},
    optional_reads=("source",),
    files=frozenset(("model",)),
)
"""kind: source, model or brisque (score: 100 - BRISQUE); both null where there is none. The setting columns names
further columns of the source; label that of a model with several."""
