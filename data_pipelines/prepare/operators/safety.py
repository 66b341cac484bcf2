"""`safety`: how likely an image is not safe for work, and how likely it has a watermark, 0 to 1.

From a column of the source (LAION's, under all its names), or the model that a setting names; null where neither has a
value, which is not safe: a selection says what it does with null.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.image_classifier import ImageClassifier
from data_pipelines.prepare.operator import Annotate, Operator, for_each_record
from data_pipelines.prepare.operators.aesthetic import source_number
from data_pipelines.prepare.record_images import main_image, rgb_image
from data_pipelines.prepare.stored_record import StoredRecord

NSFW_COLUMNS = ("punsafe", "p_unsafe", "nsfw_score")
NSFW_WORDS = {"UNLIKELY": 0.1, "UNSURE": 0.5, "NSFW": 0.9}
"""LAION-400M has these words in the column NSFW."""
WATERMARK_COLUMNS = ("pwatermark", "p_watermark", "watermark_score")


def given_nsfw(columns: Mapping[str, Any]) -> float | None:
    """What the source says, or None."""
    number = source_number(columns, NSFW_COLUMNS)
    return NSFW_WORDS.get(str(columns.get("NSFW", "")).upper()) if number is None else number


def _start(settings: Mapping[str, Any]) -> Annotate:
    models = {
        kind: ImageClassifier(settings[f"{kind}_model"], settings[f"{kind}_label"])
        for kind in ("nsfw", "watermark")
        if settings[f"{kind}_model"]
    }

    def annotate_one(record: StoredRecord) -> Mapping[str, Any]:
        source = record.columns.get("source", {})
        values = {"nsfw": given_nsfw(source), "watermark": source_number(source, WATERMARK_COLUMNS)}
        missing = [kind for kind in models if values[kind] is None]
        if missing:
            image = rgb_image(record.images[main_image(record)], settings["side"])
            values |= {kind: models[kind].scores([image])[0] for kind in missing}
        return values

    return for_each_record(annotate_one)


SAFETY = Operator(
    "safety",
    1,
    {"nsfw": pa.float32(), "watermark": pa.float32()},
    _start,
    {"nsfw_model": "", "nsfw_label": "nsfw", "watermark_model": "", "watermark_label": "watermark", "side": 512},
    optional_reads=("source",),
    files=frozenset(("nsfw_model", "watermark_model")),
)
