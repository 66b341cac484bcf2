"""The Image type of Hugging Face data sets: {bytes, path}, or bytes alone."""

from typing import Any


def image_bytes(value: Any, name: str) -> bytes:
    """The bytes of an image column's value. Raises ValueError where there are none."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise ValueError(f"{name}: only the path {value['path']}, no bytes")
        value = value.get("bytes")
    if value is None:
        raise ValueError(f"{name}: no image (null)")
    if not isinstance(value, bytes):
        raise ValueError(f"{name}: {type(value).__name__} where an image should stand")
    return value
