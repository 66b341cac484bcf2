"""`edits`: edit pairs of images (paper, Fig. 3). A chat model writes an instruction of one of the seven kinds and its
reverse, a diffusers pipeline edits, the chat model judges, and faces must stay those of the same persons."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.prepare.chat_operator import CHAT_NOT_IDENTITY, CHAT_OPERATOR_SETTINGS, answer_values
from data_pipelines.prepare.face_distance import SAME_PERSON, farthest_face
from data_pipelines.prepare.operator import READ_ERRORS, Rejected, reason_of
from data_pipelines.prepare.operators.faces import FaceModel, face_model_folder
from data_pipelines.prepare.operators.judge_edit import edit_question, edit_score
from data_pipelines.prepare.record_images import image_for_chat, main_image, rgb_image
from data_pipelines.prepare.stored_record import StoredRecord
from data_pipelines.prepare.synthesis.edit_kinds import PAPER_EDIT_KINDS, instruction_question, read_instruction
from data_pipelines.prepare.synthesis.image_pipeline import ImagePipeline
from data_pipelines.prepare.synthesis.synthetic_record import (
    Synthesis,
    SynthesisOutcome,
    Synthesize,
    SyntheticRecord,
    lossless,
    pair_record,
)
from emma_train.chat.chat import Chat
from emma_train.chat.options import chat_options, open_chat
from emma_train.errors import UserError
from emma_train.sequence.seeds import choice_of, seed_of


class EditPairs:
    """Makes pairs, step by step for a batch, so that the chat model gets many questions at once."""

    def __init__(self, chat: Chat, pipeline: ImagePipeline, faces: FaceModel | None, settings: Mapping[str, Any]):
        self.chat, self.pipeline, self.faces, self.settings = chat, pipeline, faces, settings
        self.kinds = tuple(settings["kinds"]) or tuple(kind for kind in PAPER_EDIT_KINDS if kind != "text")
        if unknown := [kind for kind in self.kinds if kind not in PAPER_EDIT_KINDS]:
            raise UserError(f"--set kinds: {', '.join(unknown)} is none; there are {', '.join(PAPER_EDIT_KINDS)}")

    def __call__(self, records: Sequence[StoredRecord]) -> list[SynthesisOutcome]:
        """A pair of each record, or why there is none."""
        pairs = [self._begin(record) for record in records]
        self._ask(pairs, lambda pair: instruction_question(pair.shown, pair.kind), _Pair.take_instruction)
        for pair in pairs:
            if not pair.rejected:
                seed = seed_of(self.settings["seed"], 0, pair.key, "edit")
                pair.after = self.pipeline.run(pair.instruction, seed, Image.fromarray(pair.before))
                pair.rejected = self._changed_face(pair)
        self._ask(pairs, self._judgement, lambda pair, answer: self._take_judgement(pair, answer))
        return [Rejected(pair.rejected) if pair.rejected else self._record(pair) for pair in pairs]

    def _begin(self, record: StoredRecord) -> "_Pair":
        kind = self.kinds[choice_of(len(self.kinds), self.settings["seed"], 0, record.key, "edit kind")]
        try:
            data = record.image(main_image(record))
            before = rgb_image(data, self.settings["side"])
            return _Pair(record.key, kind, before, image_for_chat(data, self.settings["max_side"]))
        except READ_ERRORS as error:
            return _Pair(record.key, kind, rejected=reason_of(error))

    def _ask(self, pairs: list["_Pair"], question: Any, take: Any) -> None:
        asked = [pair for pair in pairs if not pair.rejected]
        answers = answer_values(self.chat, [question(pair) for pair in asked])
        for pair, answer in zip(asked, answers, strict=True):
            try:
                if isinstance(answer, Rejected):
                    pair.rejected = answer.reason
                else:
                    take(pair, answer)
            except ValueError as error:
                pair.rejected = str(error)

    def _judgement(self, pair: "_Pair") -> Any:
        return edit_question([pair.shown], png_for_chat(pair.edited, self.settings["max_side"]), pair.instruction)

    def _take_judgement(self, pair: "_Pair", answer: Mapping[str, Any]) -> None:
        pair.score, least = edit_score(answer), self.settings["min_score"]
        if pair.score < least:
            raise ValueError(f"the judge gives {pair.score}, less than {least}: {answer['reason'][:200]}")

    def _changed_face(self, pair: "_Pair") -> str:
        """Why the faces do not agree, or an empty text."""
        if self.faces is None:
            return ""
        before, after = (
            [face for _, face in self.faces.faces(image, 0)] for image in (pair.before, np.asarray(pair.edited))
        )
        pair.face_distance = farthest_face(before, after)
        if pair.face_distance is None or pair.face_distance < self.settings["max_face_distance"]:
            return ""
        return f"a face has changed: distance {pair.face_distance:.2f}"

    def _record(self, pair: "_Pair") -> SyntheticRecord:
        scores = {"judge": pair.score, "face_distance": pair.face_distance}
        origin = {"source_key": pair.key, "pipeline": self.pipeline.name, "chat_model": self.settings["model"]}
        before = ("webp", lossless(Image.fromarray(pair.before)))
        kinds = pair.kind, PAPER_EDIT_KINDS[pair.kind].reverse
        texts = pair.instruction, pair.reverse
        return pair_record(before, pair.edited, texts, kinds, scores=scores, synthesis=origin, tags=[])


class _Pair:
    """A pair while it is made."""

    def __init__(self, key: str, kind: str, before: Any = None, shown: bytes = b"", rejected: str = "") -> None:
        self.key, self.kind, self.before, self.shown, self.rejected = key, kind, before, shown, rejected
        self.instruction = self.reverse = ""
        self.after: Image.Image | None = None
        self.score = 0
        self.face_distance: float | None = None

    @property
    def edited(self) -> Image.Image:
        assert self.after is not None
        return self.after

    def take_instruction(self, answer: Mapping[str, Any]) -> None:
        self.instruction, self.reverse = read_instruction(answer)


def png_for_chat(image: Image.Image, max_side: int) -> bytes:
    """An image as PNG, its longer side at most `max_side`."""
    image = image.copy()
    image.thumbnail((max_side, max_side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _start(settings: Mapping[str, Any]) -> Synthesize:
    if not settings["pipeline"] or not settings["weights"]:
        raise UserError("edits are made by a diffusers pipeline: give --set pipeline=CLASS and --set weights=FOLDER")
    pipeline = ImagePipeline(settings["pipeline"], Path(settings["weights"]), settings["steps"])
    faces = FaceModel(face_model_folder(settings["face_models"])) if settings["faces"] else None
    return EditPairs(open_chat(chat_options(settings)), pipeline, faces, settings)


EDITS_SYNTHESIS = Synthesis(
    "edits",
    1,
    _start,
    {
        **CHAT_OPERATOR_SETTINGS,
        "kinds": [],
        "pipeline": "",
        "weights": "",
        "steps": 50,
        "side": 1024,
        "seed": 0,
        "min_score": 7,
        "faces": True,
        "face_models": "",
        "max_face_distance": SAME_PERSON,
    },
    CHAT_NOT_IDENTITY,
    frozenset(("weights", "face_models")),
)
"""kinds: of PAPER_EDIT_KINDS; empty: all but text, for which there is `text-edits`. side: images are reduced to it
first. min_score: least of the judge's worst rating."""
