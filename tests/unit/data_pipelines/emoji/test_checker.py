"""Scenes are read back from images: fresh scenes, damaged ones, the data set's own images; nothing from noise."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.emoji.checker import Reading, SceneReader
from data_pipelines.emoji.drawing_sheet import DrawingSheet, read_sheet, write_sheet
from data_pipelines.emoji.facts import SceneLabels, judge_edit, judge_prompt
from data_pipelines.emoji.scenes import Layer, Scene
from emma_train.errors import UserError
from tests.scenes import EMOJI, altered_scene, damages, fresh_scenes, render

pytestmark = pytest.mark.seconds
SEED, COUNT = 5, 40
RECALL = {
    "clean": 1.0, "noise 40": 1.0, "noise 80": 0.6, "blur 1.5 px": 1.0, "blur 3 px": 0.7, "shift 4 px": 1.0,
    "shift 8 px": 0.98, "DC-AE": 0.95, "DC-AE, noise 0.5": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def sheet() -> DrawingSheet:
    return read_sheet(EMOJI)


@pytest.fixture(scope="module")
def reader(sheet: DrawingSheet) -> SceneReader:
    return SceneReader(sheet)


@pytest.mark.parametrize("name", RECALL)
def test_recall_and_precision(name: str, sheet: DrawingSheet, reader: SceneReader) -> None:
    rng = np.random.default_rng(SEED)
    scenes = fresh_scenes(sheet, rng, COUNT)
    readings = reader.read([damages(SEED)[name](render(scene, sheet)) for scene in scenes])
    pairs = list(zip(scenes, readings, strict=True))
    right = sum(judge_prompt("", scene, reading)["all"] for scene, reading in pairs)
    wrong = sum(judge_prompt("", altered_scene(scene, sheet, rng), reading)["all"] for scene, reading in pairs)
    assert right / COUNT >= RECALL[name]
    assert right / (right + wrong) >= 0.95


def test_noise_cannot_be_read(reader: SceneReader) -> None:
    rng = np.random.default_rng(SEED)
    images = [rng.integers(0, 256, (128, 128, 3)).astype(np.uint8) for _ in range(32)]
    assert not any(reading.is_readable for reading in reader.read(images))


def test_a_blank_image_is_a_background_without_drawings(reader: SceneReader) -> None:
    [reading] = reader.read([np.full((128, 128, 3), (135, 188, 245), np.uint8)])
    assert reading.scene == Scene("blue", ())


@pytest.mark.parametrize("split", ["heldout_drawings", "heldout_concepts"])
def test_the_data_sets_own_images(split: str, sheet: DrawingSheet, reader: SceneReader) -> None:
    """Rasterised from SVG by another program than the sheet's, and compressed."""
    labels, wanted, images = SceneLabels(sheet.drawings), [], []
    with tarfile.open(EMOJI / split / "shard-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name, content in sorted(files.items()):
        key, _, part = name.partition(".")
        if part == "json" or "-stem-" in key:
            continue
        scene = labels.scene(json.loads(files[f"{key}.json"])["labels"], part.removesuffix(".webp"))
        assert scene is not None
        wanted.append(scene)
        images.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    readings = reader.read(images)
    right = [judge_prompt("", scene, reading)["all"] for scene, reading in zip(wanted, readings, strict=True)]
    assert len(right) == {"heldout_drawings": 320, "heldout_concepts": 120}[split]
    assert np.mean(right) >= 0.99


def test_edits(sheet: DrawingSheet) -> None:
    dog, cat = (next(d for d in sheet.drawings if d.id == f"flat/{name}") for name in ("dog-face", "cat-face"))
    source = Scene("blue", (Layer(dog, "left"), Layer(cat, "right")))
    wanted = Scene("blue", (Layer(dog, "left"),))
    recoloured = Scene("pink", (Layer(dog, "left"),))
    moved = Scene("blue", (Layer(cat, "top"), Layer(dog, "left")))

    def judge(scene: Scene, unexplained: float = 0.0) -> list[str]:
        return [name for name, right in judge_edit(source, wanted, Reading(scene, unexplained)).items() if right]

    assert judge(wanted) == ["done", "kept", "both"]
    assert judge(wanted, 0.9) == []
    assert judge(source) == ["kept"]
    assert judge(recoloured) == ["done"]
    assert judge(moved) == ["done"]


def test_relations_and_bindings(sheet: DrawingSheet) -> None:
    by_id = {d.id: d for d in sheet.drawings}
    dog, bold_dog = by_id["flat/dog-face"], by_id["high-contrast/dog-face"]
    cat, bold_cat = by_id["flat/cat-face"], by_id["high-contrast/cat-face"]
    wanted = Scene("blue", (Layer(dog, "left"), Layer(bold_cat, "right")))
    swapped = Scene("blue", (Layer(bold_dog, "left"), Layer(cat, "right")))
    turned = Scene("blue", (Layer(bold_cat, "left"), Layer(dog, "right")))
    lower = Scene("blue", (Layer(bold_cat, "top"), Layer(dog, "bottom")))
    assert judge_prompt("position", wanted, Reading(wanted, 0.0))["all"]
    assert judge_prompt("binding", wanted, Reading(turned, 0.0))["all"]
    binding = judge_prompt("binding", wanted, Reading(swapped, 0.0))
    assert (binding["object"], binding["style"], binding["binding"], binding["all"]) == (True, True, False, False)
    for scene in (turned, lower):
        assert not judge_prompt("position", wanted, Reading(scene, 0.0))["position"]


def test_a_sheet_survives_writing_and_a_damaged_one_is_refused(tmp_path: Path, sheet: DrawingSheet) -> None:
    write_sheet(tmp_path, sheet)
    again = read_sheet(tmp_path)
    assert [d.id for d in again.drawings] == [d.id for d in sheet.drawings]
    assert np.array_equal(again.pixels[..., 3], sheet.pixels[..., 3])
    (tmp_path / "drawings.webp").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"drawings\.webp: no readable sheet"):
        read_sheet(tmp_path)
