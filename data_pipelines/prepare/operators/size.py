"""`size`: width, height and aspect of a record's images, from the index, which read the headers."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, Rejected, for_each_record
from data_pipelines.prepare.stored_record import StoredRecord


def _size(record: StoredRecord) -> Mapping[str, Any] | Rejected:
    sizes = list(zip(record.row["widths"], record.row["heights"], strict=True))
    if not sizes:
        return Rejected("it has no image")
    width, height = sizes[record.main_image]
    return {
        "width": width,
        "height": height,
        "aspect": width / height,
        "min_side": min(min(pair) for pair in sizes),
        "pixels": width * height,
        "images": len(sizes),
    }


def _start(settings: Mapping[str, Any]) -> Annotate:
    return for_each_record(_size)


SIZE = Operator(
    "size",
    1,
    {
        "width": pa.int32(),
        "height": pa.int32(),
        "aspect": pa.float32(),
        "min_side": pa.int32(),
        "pixels": pa.int64(),
        "images": pa.int16(),
    },
    _start,
)
"""width, height, aspect (width / height) and pixels are those of the image that the record makes, or else of its first;
min_side is the shortest side of all its images."""
