"""Answers in steps: what is seen in the image, then what is asked for. Questions that take one look stay direct.

`Which bar is highest?`: `A 3, B 7, C 5. Answer: B`. `What is the result?`: `3+2=5. Answer: 5`.
`How many drawings?`: `ghost, robot. Answer: two`. `Which group?`: `ghost. Answer: smileys & emotion`.
"""

from collections.abc import Mapping
from typing import Any

from data_pipelines.emoji.scenes import Scene
from data_pipelines.emoji.stem import BAR_NAMES
from emma_train.sequence.answers import ANSWER_MARK


def in_steps(alternative: dict[str, Any], observation: str) -> dict[str, Any]:
    """An i2t alternative with an observation before its answer; as it is where there is none."""
    if not observation:
        return alternative
    *turns, answer = alternative["turns"]
    return {**alternative, "turns": [*turns, {**answer, "text": f"{observation}. {ANSWER_MARK}{answer['text']}"}]}


def scene_observation(scene: Scene, kind: str) -> str:
    """What to name before a question of this kind is answered; empty where the answer takes one look."""
    if kind == "group":
        return scene.drawings[0].concept
    return ", ".join(drawing.concept for drawing in scene.drawings) if kind == "count" else ""


def stem_observation(labels: Mapping[str, Any], question: str) -> str:
    """What to read from a formula or chart before the question is answered; empty where the answer takes one look."""
    if labels["stem"] == "sum" and question == "What is the result?":
        return f"{labels['formula']}={labels['result']}"
    if labels["stem"] == "bars" and question.startswith("Which bar"):
        return ", ".join(f"{name} {value}" for name, value in zip(BAR_NAMES, labels["values"], strict=True))
    return ", ".join(map(str, labels["values"])) if labels["stem"] == "line" else ""
