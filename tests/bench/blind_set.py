"""Writes a copy of a data set whose images are all grey: what is learnt from it is learnt without looking.

    python tests/bench/blind_set.py recipes/tiny/assets/emoji/train runs/blind/train

Records, keys, sizes and texts stay as they are, so that a run on the copy has the samples of a run on the original.
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image

from data_pipelines.commands.import_fluent_emoji import TINY_TOKENIZER
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.tar import groups
from data_pipelines.shards.write import ShardWriter, webp

GREY = (128, 128, 128)


def grey(data: bytes) -> bytes:
    """A grey image of the same size."""
    return webp(Image.new("RGB", Image.open(io.BytesIO(data)).size, GREY), quality=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name a new folder")
    with ShardWriter(arguments.out) as writer:
        for tar in sorted(arguments.folder.glob("*.tar")):
            with tar.open("rb") as file:
                for group in groups(file):
                    images = {part: data for part, data in group.members.items() if part.endswith(".webp")}
                    record = json.loads(group.members["json"])
                    writer.write(group.key, record, {part.removesuffix(".webp"): grey(images[part]) for part in images})
    index_folder(arguments.out, TINY_TOKENIZER)


if __name__ == "__main__":
    main()
