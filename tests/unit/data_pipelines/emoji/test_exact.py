"""Images of the data set, judged by their own requests: all right; by others': wrong. STEM questions are unseen."""

import pytest

from data_pipelines.emoji.build import distinct_stems, unseen_stems
from data_pipelines.emoji.drawing_sheet import read_sheet
from data_pipelines.emoji.exact import ImageJudge
from data_pipelines.loader.requests import read_requests
from emma_train.config.schema import DataConfig, ImageConfig
from tests.scenes import EMOJI

pytestmark = pytest.mark.seconds
DATA = DataConfig(und=ImageConfig(side=128), gen=ImageConfig(side=128))


@pytest.fixture(scope="module")
def judge() -> ImageJudge:
    return ImageJudge(read_sheet(EMOJI))


@pytest.mark.parametrize("split", ["heldout_drawings", "heldout_concepts"])
def test_true_targets_are_right_and_baselines_low(split: str, judge: ImageJudge) -> None:
    prompts = read_requests(EMOJI / split, "t2i", DATA, 32, 40)
    edits = read_requests(EMOJI / split, "it2i", DATA, 32, 20)
    judged = judge.prompts(prompts, [r.target for r in prompts if r.target is not None])
    assert len(judged) == 40 and {j.kind for j in judged} == {"single"}
    assert sum(j.verdicts["all"] for j in judged) >= 39
    assert sum(j.baseline["all"] for j in judged) == 0
    changed = judge.edits(edits, [r.target for r in edits if r.target is not None])
    assert len(changed) == 20
    assert sum(j.verdicts["both"] for j in changed) >= 19
    assert sum(j.baseline["kept"] for j in changed) >= 19
    assert sum(j.baseline["done"] for j in changed) == 0


def test_unseen_stem_questions() -> None:
    stems = unseen_stems(400, 140, 0)
    contents = [stem.content for stem in stems]
    train = {stem.content for stem in distinct_stems("train", 140, 0)}
    assert len(set(contents)) == len(contents) and not train & set(contents)
    assert 400 <= sum(len(stem.questions) for stem in stems) < 405
    assert {stem.labels["stem"] for stem in stems} == {"bars", "line", "sum", "formula"}
