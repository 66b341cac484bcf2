"""Edits one after another: each changes something else, nothing is taken back, and the true last image is right."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipelines.emoji.drawing_sheet import DrawingSheet, read_sheet
from data_pipelines.emoji.edit_chains import EditChain, edit_chains
from data_pipelines.emoji.exact import ImageJudge
from data_pipelines.emoji.facts import scene_facts
from data_pipelines.emoji.scenes import BIG_SIZES, CORNER_SIZE, OFF_CENTRE_SIZE
from data_pipelines.loader.requests import read_requests
from emma_train.config.schema import DataConfig, ImageConfig
from tests.scenes import EMOJI, render

pytestmark = pytest.mark.seconds
DATA = DataConfig(und=ImageConfig(side=128), gen=ImageConfig(side=128))
SPLIT = "heldout_drawings"


def drawn(chain: EditChain, step: int, sheet: DrawingSheet) -> np.ndarray:
    """The scene after a step, in the sizes of the set, which labels do not have."""
    single = OFF_CENTRE_SIZE if max(len(scene.layers) for scene in chain.scenes) == 1 else CORNER_SIZE
    sizes = {layer: BIG_SIZES[1] if layer.position == "centre" else single for layer in chain.scenes[step].layers}
    layers = tuple(replace(layer, size=size) for layer, size in sizes.items())
    return render(replace(chain.scenes[step], layers=layers), sheet)


def test_chains_of_the_held_out_edits() -> None:
    sheet, requests = read_sheet(EMOJI), read_requests(EMOJI / SPLIT, "it2i", DATA, 32, 24)
    judge, chains = ImageJudge(sheet), edit_chains(sheet.drawings, SPLIT, requests, 3)
    assert len(chains) >= 18 and edit_chains(sheet.drawings, SPLIT, requests, 3) == chains
    words = set()
    for chain in chains:
        facts = [scene_facts(scene) for scene in chain.scenes]
        assert len(chain.texts) == 3 and chain.texts[0] == chain.request.text and len(facts) == 4
        for before, after in zip(facts, facts[1:], strict=False):
            gone, new = before - after, after - before
            assert not new & facts[0] or before == facts[0]  # nothing of the source comes back
            assert new & facts[-1] or gone - facts[-1]  # later edits leave something of each
        words |= {text.split()[0] for text in chain.texts[1:]}
    assert {"make", "replace", "remove", "give"} <= words

    images = [drawn(chain, 3, sheet) for chain in chains]
    judged = judge.chains(chains, 3, images)
    assert sum(one.verdicts["both"] for one in judged) >= len(chains) - 1
    assert all(one.kind == "chain 3" and not one.baseline["done"] for one in judged)
    early = judge.chains(chains, 3, [drawn(chain, 2, sheet) for chain in chains])
    assert sum(one.verdicts["done"] for one in early) == 0  # two of three are not enough
    assert judged[0].request.text == "; ".join(chains[0].texts)


def test_a_chain_of_one_is_the_edit() -> None:
    sheet, requests = read_sheet(EMOJI), read_requests(EMOJI / SPLIT, "it2i", DATA, 32, 6)
    chains = edit_chains(sheet.drawings, SPLIT, requests, 1)
    assert [chain.texts for chain in chains] == [(request.text,) for request in requests]
