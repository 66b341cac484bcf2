"""Judges generated images of the emoji world by reading them back: what is right, and how the image was read."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipelines.emoji.checker import Reading, SceneReader
from data_pipelines.emoji.chinese import check_words, chinese_caption, chinese_instruction
from data_pipelines.emoji.drawing_sheet import DrawingSheet
from data_pipelines.emoji.edit_chains import EditChain
from data_pipelines.emoji.facts import SceneLabels, judge_edit, judge_prompt, prompt_kind
from data_pipelines.emoji.scenes import Scene, layered_caption
from emma_train.sequence.request import Request


@dataclass
class Judgement:
    """The verdict on an image. `baseline`: the same facts, judged on the image of another prompt, or on the source of
    the edit, as if nothing had been changed."""

    request: Request
    kind: str
    verdicts: dict[str, bool]
    reading: str
    image: np.ndarray
    baseline: dict[str, bool] = field(default_factory=dict)


class ImageJudge:
    """Judges images of a world whose drawings are known."""

    def __init__(self, sheet: DrawingSheet) -> None:
        self.reader, self.labels = SceneReader(sheet), SceneLabels(sheet.drawings)

    def prompts(self, requests: Sequence[Request], images: Sequence[np.ndarray]) -> list[Judgement]:
        """One for each prompt whose scene is known."""
        scenes = [self.labels.scene(r.labels, r.target_name) for r in requests]
        known = [(r, scene, n) for n, (r, scene) in enumerate(zip(requests, scenes, strict=True)) if scene is not None]
        readings = self.reader.read([images[n] for _, _, n in known])
        judged = []
        for number, ((request, scene, n), reading) in enumerate(zip(known, readings, strict=True)):
            kind, other = prompt_kind(request.kind, scene), readings[number - 1]
            right = judge_prompt(kind, scene, reading)
            judged.append(Judgement(request, kind, right, describe_reading(reading), images[n]))
            judged[-1].baseline = judge_prompt(kind, scene, other)
        return judged

    def edits(self, requests: Sequence[Request], images: Sequence[np.ndarray]) -> list[Judgement]:
        """One for each edit whose scenes are known."""
        known: list[tuple[Request, Scene, Scene, np.ndarray]] = []
        for request, image in zip(requests, images, strict=True):
            scenes = [self.labels.scene(request.labels, name) for name in (*request.image_names, request.target_name)]
            if len(scenes) == 2 and scenes[0] is not None and scenes[1] is not None:
                known.append((request, scenes[0], scenes[1], image))
        readings = self.reader.read([image for *_, image in known])
        sources = self.reader.read([request.images[0] for request, *_ in known])
        judged = []
        for (request, source, target, image), reading, unchanged in zip(known, readings, sources, strict=True):
            right = judge_edit(source, target, reading)
            judged.append(Judgement(request, request.kind, right, describe_reading(reading), image))
            judged[-1].baseline = judge_edit(source, target, unchanged)
        return judged

    def chains(self, chains: Sequence[EditChain], num_steps: int, images: Sequence[np.ndarray]) -> list[Judgement]:
        """One for each chain after its first `num_steps` edits: all that they change, and all else."""
        judged = []
        sources = self.reader.read([chain.request.images[0] for chain in chains])
        for chain, image, reading, unchanged in zip(chains, images, self.reader.read(images), sources, strict=True):
            source, target = chain.scenes[0], chain.scenes[num_steps]
            request = replace(chain.request, text="; ".join(chain.texts[:num_steps]))
            right = judge_edit(source, target, reading)
            judged.append(Judgement(request, f"chain {num_steps}", right, describe_reading(reading), image))
            judged[-1].baseline = judge_edit(source, target, unchanged)
        return judged

    def in_chinese(self, requests: Sequence[Request]) -> list[Request]:
        """Prompts and edits in Chinese, of those whose scenes are known. Raises UserError on another world's."""
        check_words(frozenset(drawing.concept for drawing in self.reader.drawings))
        asked = []
        for request in requests:
            scenes = [self.labels.scene(request.labels, name) for name in (*request.image_names, request.target_name)]
            known = [scene for scene in scenes if scene is not None]
            if len(known) == len(scenes) == 1:
                asked.append(replace(request, text=chinese_caption(known[0])))
            elif len(known) == len(scenes) == 2:
                asked.append(replace(request, text=chinese_instruction(request.kind, *known)))
        return asked


def describe_reading(reading: Reading) -> str:
    """The scene as a caption, with the share of the image's energy that it leaves unexplained."""
    scene = reading.scene
    text = layered_caption(scene) if scene.layers else f"nothing on a {scene.background} background"
    return f"{text} (unexplained {reading.unexplained:.2f}{'' if reading.is_readable else ', unreadable'})"
