"""Recall and precision of reading scenes back from images, as a table.

python tests/bench/checker.py [NUM_SCENES] [SEED]
"""

import sys
import time
from collections import Counter

import numpy as np

from data_pipelines.emoji.checker import Reading, SceneReader
from data_pipelines.emoji.drawing_sheet import DrawingSheet, read_sheet
from data_pipelines.emoji.facts import judge_prompt
from data_pipelines.emoji.scenes import Scene
from tests.scenes import EMOJI, altered_scene, damages, fresh_scenes, render

FACTS = ("background", "count", "object", "style", "position", "word", "all")


def measure(
    reader: SceneReader, sheet: DrawingSheet, scenes: list[Scene], readings: list[Reading], seed: int
) -> dict[str, float]:
    """Per cent of scenes with each fact right, and of accepted specifications that are true (`precision`): each scene
    is offered as it is and with one fact altered."""
    rng = np.random.default_rng(seed)
    right, asked, wrong = Counter[str](), Counter[str](), 0
    for scene, reading in zip(scenes, readings, strict=True):
        verdict = judge_prompt("", scene, reading)
        asked.update(list(verdict))
        right.update(fact for fact, value in verdict.items() if value)
        wrong += judge_prompt("", altered_scene(scene, sheet, rng), reading)["all"]
    shares = {fact: 100 * right[fact] / asked[fact] for fact in FACTS}
    return {**shares, "precision": 100 * right["all"] / max(right["all"] + wrong, 1)}


def main() -> None:
    count, seed = [*map(int, sys.argv[1:]), *(240, 1)[len(sys.argv) - 1 :]]
    sheet = read_sheet(EMOJI)
    reader = SceneReader(sheet)
    scenes = fresh_scenes(sheet, np.random.default_rng(seed), count)
    images = [render(scene, sheet) for scene in scenes]
    print(f"{count} scenes, seed {seed}; per cent of scenes with the fact right")
    print("| image |", " | ".join(FACTS), "| precision | unexplained, median / 95 % | ms an image |")
    print("|", "---|" * (len(FACTS) + 4))
    for name, damage in damages(seed).items():
        damaged = [damage(image) for image in images]
        start = time.perf_counter()
        readings = reader.read(damaged)
        took = 1000 * (time.perf_counter() - start) / count
        row = measure(reader, sheet, scenes, readings, seed)
        middle, high = np.percentile([reading.unexplained for reading in readings], [50, 95])
        values = " | ".join(f"{value:.1f}" for value in row.values())
        print(f"| {name} | {values} | {middle:.2f} / {high:.2f} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
