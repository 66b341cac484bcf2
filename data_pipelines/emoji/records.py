"""Makes records of the data set from scenes, edits and STEM images: tasks with alternatives, labels and images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.emoji.chinese import chinese_description, chinese_question
from data_pipelines.emoji.drawings import Drawing
from data_pipelines.emoji.edits import Edit
from data_pipelines.emoji.prompts import Prompt
from data_pipelines.emoji.questions import known_answers, make_question, question_alternative, scene_questions
from data_pipelines.emoji.reasoning import in_steps, scene_observation, stem_observation
from data_pipelines.emoji.scenes import Scene, captions, render_scene
from data_pipelines.emoji.seeded_rng import pick, pick_some
from data_pipelines.emoji.stem import StemImage, render_stem
from data_pipelines.shards.write import Record


@dataclass(frozen=True)
class RecordMaker:
    """Makes (record, images by name) from scenes, edits and STEM images."""

    side: int
    """Pixels of an image's side."""
    version: str
    """Version of the npm package."""
    captions: int
    """Number of different captions of one image."""
    scene_captions: bool
    """Whether layered scenes are t2i targets too."""
    in_steps: bool = False
    """Whether answers reason before they answer."""
    chinese: bool = False
    """Whether there are questions, answers and descriptions in Chinese beside the English ones."""

    def single(self, rng: np.random.Generator, scene: Scene) -> tuple[Record, dict[str, Image.Image]]:
        """One drawing: four questions and a few captions."""
        known = known_answers(scene)
        extra = pick(rng, ("background", "place"))
        kinds = [kind for kind in ("concept", "group", "style", extra) if kind in known]
        drawing = scene.drawings[0]
        record: Record = {
            "i2t": self.i2t([make_question(rng, "img0", kind, known[kind]) for kind in kinds], {"img0": scene}),
            "t2i": self.t2i(rng, "img0", scene, self.captions),
            **self.common(("img0",), scene_labels(drawing, scene), scene.drawings),
        }
        return record, {"img0": render_scene(scene, self.side)}

    def pair(self, rng: np.random.Generator, edit: Edit, lead: Drawing) -> tuple[Record, dict[str, Image.Image]]:
        """Two scenes, an instruction for each direction, a question about each, and a caption of one that is simple."""
        scenes = {"img0": edit.before, "img1": edit.after}
        questions = [random_question(rng, name, scene) for name, scene in scenes.items()]
        targets = [name for name, scene in scenes.items() if scene.is_single or self.scene_captions]
        painted = pick(rng, targets) if targets else None
        shown = dict.fromkeys((*edit.before.drawings, *edit.after.drawings))
        labels = {
            "concepts": list(dict.fromkeys(d.concept for d in shown)),
            "group": lead.group and lead.group.lower(),
            "style": lead.style,
            "edit": edit.kind,
            "scenes": {name: scene_truth(scene) for name, scene in scenes.items()},
        }
        record = {
            "i2t": self.i2t(questions, scenes),
            **({"t2i": self.t2i(rng, painted, scenes[painted], 1)} if painted else {}),
            "it2i": [
                {"images": ["img0"], "target": "img1", "text": edit.forward, "kind": edit.kind},
                {"images": ["img1"], "target": "img0", "text": edit.backward, "kind": edit.back_kind},
            ],
            **self.common(tuple(scenes), labels, tuple(shown)),
        }
        return record, {name: render_scene(scene, self.side) for name, scene in scenes.items()}

    def prompt(self, rng: np.random.Generator, prompt: Prompt, lead: Drawing) -> tuple[Record, dict[str, Image.Image]]:
        """A scene of several drawings or a word: its prompt, and questions about count, position and word."""
        scene = prompt.scene
        labels = {
            "concepts": list(dict.fromkeys(d.concept for d in scene.drawings)),
            "style": lead.style,
            "background": scene.background,
            "scenes": {"img0": scene_truth(scene)},
        }
        record = {
            "i2t": self.i2t(scene_questions(rng, "img0", scene), {"img0": scene}),
            "t2i": [{"target": "img0", "text": prompt.text, "kind": prompt.kind}],
            **self.common(("img0",), labels, tuple(dict.fromkeys(scene.drawings))),
        }
        return record, {"img0": render_scene(scene, self.side)}

    def stem(self, stem: StemImage) -> tuple[Record, dict[str, Image.Image]]:
        """A formula or chart with its questions."""
        asked = [question_alternative("img0", question, answer, "stem") for question, answer in stem.questions]
        if self.chinese:
            asked += [chinese_question(a) for a in asked]
        if self.in_steps:
            asked = [in_steps(a, stem_observation(stem.labels, a["turns"][0]["text"])) for a in asked]
        record = {
            "i2t": asked,
            **self.common(("img0",), {"concepts": [], **stem.labels}, ()),
            "tags": ["stem"],
            "provenance": {"dataset": "emma-stem", "version": "1", "licence": "Apache-2.0", "drawings": []},
        }
        return record, {"img0": render_stem(stem, self.side)}

    def i2t(self, asked: list[Record], scenes: Mapping[str, Scene]) -> list[Record]:
        """Questions about scenes by the names of their images, with the answers that this set has."""
        if self.chinese:
            described = [chinese_description(image, scene) for image, scene in scenes.items()]
            asked = [*asked, *(chinese_question(a) for a in asked), *described]
        if not self.in_steps:
            return asked
        return [in_steps(a, scene_observation(scenes[a["images"][0]], a["kind"])) for a in asked]

    def t2i(self, rng: np.random.Generator, image: str, scene: Scene, count: int) -> list[Record]:
        return [{"target": image, "text": text} for text in pick_some(rng, captions(scene), count)]

    def common(self, images: tuple[str, ...], labels: dict[str, Any], shown: tuple[Drawing, ...]) -> Record:
        """The fields that every record has."""
        return {
            "pictures": {name: {"width": self.side, "height": self.side} for name in images},
            "tags": [],
            "labels": labels,
            "provenance": {
                "dataset": "fluentui-emoji",
                "version": self.version,
                "licence": "MIT",
                "drawings": [drawing.id for drawing in shown],
            },
        }


def random_question(rng: np.random.Generator, image: str, scene: Scene) -> Record:
    """A random question about an image; about concept, group or style if it shows one drawing."""
    known = known_answers(scene)
    kinds = [kind for kind in ("concept", "group", "style") if kind in known] if scene.is_single else list(known)
    kind = pick(rng, kinds)
    return make_question(rng, image, kind, known[kind])


def scene_labels(drawing: Drawing, scene: Scene) -> dict[str, Any]:
    """Ground truth about a scene of one drawing."""
    layer = scene.layers[0]
    return {
        "concepts": [drawing.concept],
        "group": drawing.group and drawing.group.lower(),
        "style": drawing.style,
        **({"tone": drawing.tone} if drawing.tone else {}),
        "background": scene.background,
        "place": layer.position,
        "size": "small" if layer.is_small else "big" if layer.position == "centre" else "medium",
    }


def scene_truth(scene: Scene) -> dict[str, Any]:
    """Ground truth about any scene: background, drawings with their positions, and the word if it has one."""
    layers = [[layer.drawing.id, layer.position] for layer in scene.layers]
    return {"background": scene.background, "layers": layers, **({"word": scene.word} if scene.word else {})}
