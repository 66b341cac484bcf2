"""Checks that bytes of a source are an image that training can read."""

import warnings

from data_pipelines.shards.images import open_image

IMAGE_SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}
"""Format as Pillow names it -> extension of the member."""


def image_extension(data: bytes, decode: bool = True) -> str:
    """The extension of an image's format. With `decode` its pixels are decoded too, a JPEG at an eighth of its size, so
    that a truncated file is noticed. Raises ValueError with what is wrong."""
    if not data:
        raise ValueError("an image of 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_image(data) as image:
                if image.format not in IMAGE_SUFFIXES:
                    raise ValueError(f"an image in the format {image.format}; shards have {', '.join(IMAGE_SUFFIXES)}")
                extension = IMAGE_SUFFIXES[image.format]
                if decode:
                    image.draft("RGB", (1, 1))
                    image.load()
                return extension
        except ValueError:
            raise
        except Exception as error:  # decoders of broken files can raise anything
            raise ValueError(f"no image, or a broken one ({type(error).__name__}: {_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    # Pillow's message has the address of the buffer, which is another one in every run.
    text = " ".join(str(error).split())
    return "cannot identify image file" if text.startswith("cannot identify image file") else text[:200]
