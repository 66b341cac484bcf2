"""Images as public sets have them: of every kind that can be read, and damaged in every way."""

import io
import zlib
from typing import Any

from PIL import Image

from tests.public_formats import jpeg
from tests.shards import jpeg_with_orientation, png, sixteen_bit_png


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 60,000 x 60,000 pixels."""
    data = bytearray(png(0))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


FRAMES = [Image.new("P", (40, 40), color) for color in (1, 2, 3)]
IMAGES: dict[str, tuple[bytes | None, str]] = {
    "good": (png(1), ""),
    "cmyk": (saved(Image.new("CMYK", (40, 40), (9, 8, 7, 6)), "JPEG"), ""),
    "16 bits": (sixteen_bit_png(), ""),
    "animated": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), ""),
    "turned": (jpeg_with_orientation(6), ""),
    "transparent": (saved(Image.new("RGBA", (40, 40)), "WEBP"), ""),
    "one pixel": (saved(Image.new("1", (1, 1)), "PNG"), ""),
    "null": (None, "no image (null)"),
    "0 bytes": (b"", "an image of 0 bytes"),
    "cut PNG": (png(2, 64)[:-900], "broken one"),
    "cut JPEG": (jpeg(2, 64)[:-400], "broken one"),
    "text": (b"<html>404</html>", "cannot identify image file"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot identify image file"),
    "bomb": (bomb(), "pixels"),
    "float": (saved(Image.new("F", (40, 40), 0.5), "TIFF"), "floating-point"),
    "icon": (saved(Image.new("RGB", (32, 32)), "ICO"), "in the format ICO"),
}
"""Name -> bytes, and a part of the reason why an importer rejects them; empty where it does not."""
