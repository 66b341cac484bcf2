import numpy as np
import pytest

from data_pipelines.emoji.drawings import Catalogue
from data_pipelines.emoji.edits import EDITS, DrawingPool, Edit, make_edit
from data_pipelines.emoji.records import RecordMaker
from data_pipelines.emoji.scenes import Scene
from data_pipelines.emoji.seeded_rng import seeded_generator


def some_edits(catalogue: Catalogue, kind: str) -> list[Edit]:
    pool = DrawingPool(catalogue.drawings)
    leads = [d for d in catalogue.drawings if d.tone and d.style == "flat"]
    return [make_edit(seeded_generator(0, f"{kind}/{i}"), kind, leads[i % len(leads)], pool) for i in range(40)]


@pytest.mark.parametrize("kind", list(EDITS))
def test_one_thing_changes_and_the_lead_is_there(catalogue: Catalogue, kind: str) -> None:
    kinds = {"add": {"add", "remove"}}.get(kind, {kind})
    for edit in some_edits(catalogue, kind):
        assert {edit.kind, edit.back_kind} == kinds
        assert edit.before != edit.after
        assert any(d.concept == "waving hand" for d in (*edit.before.drawings, *edit.after.drawings))
        changed = {
            "background": edit.before.background != edit.after.background,
            "word": edit.before.word != edit.after.word,
            "layers": edit.before.layers != edit.after.layers,
        }
        assert sum(changed.values()) == 1


def apply(scene: Scene, instruction: str) -> dict[str, object]:
    """What an instruction says about the scene after it, from its words alone."""
    words = instruction.split()
    match words:
        case ["add", _, *rest]:
            return {"has": " ".join(rest)}
        case ["remove", "the", "word"]:
            return {"word": None}
        case ["remove", "the", *rest]:
            return {"lacks": " ".join(rest)}
        case ["replace", "the", *rest]:
            old, new = (
                " ".join(rest).split(" with a ") if " with a " in instruction else " ".join(rest).split(" with an ")
            )
            return {"has": new, "lacks": old}
        case ["give", "the", *rest]:
            return {"skin": rest[-2]}
        case ["make", "it", *rest]:
            return {"style": "-".join(rest)}
        case ["make", "the", "background", colour]:
            return {"background": colour}
        case ["write", word] | ["change", "the", "word", "to", word]:
            return {"word": word}
    raise AssertionError(f"unknown instruction {instruction!r} for {scene}")


@pytest.mark.parametrize("kind", list(EDITS))
def test_each_instruction_describes_the_image_it_leads_to(catalogue: Catalogue, kind: str) -> None:
    for edit in some_edits(catalogue, kind):
        for source, target, text in (
            (edit.before, edit.after, edit.forward),
            (edit.after, edit.before, edit.backward),
        ):
            promise = apply(source, text)
            shown = [f"{d.concept} {d.tone}" for d in target.drawings]
            if "has" in promise:
                assert any(str(promise["has"]).startswith(d.concept) for d in target.drawings)
            if "lacks" in promise:
                assert len(target.layers) <= len(source.layers)
                assert [d.id for d in target.drawings] != [d.id for d in source.drawings]
            if "skin" in promise:
                assert f"waving hand {'default' if promise['skin'] == 'yellow' else promise['skin']}" in shown
            if "style" in promise:
                assert {d.style for d in target.drawings} == {promise["style"]}
            if "background" in promise:
                assert target.background == promise["background"]
            if "word" in promise:
                assert target.word == promise["word"]


def test_the_reverse_instruction_leads_back_to_the_same_pixels(catalogue: Catalogue) -> None:
    maker = RecordMaker(side=48, version="0", captions=2, scene_captions=True)
    for kind in EDITS:
        edit = some_edits(catalogue, kind)[0]
        record, images = maker.pair(seeded_generator(1, kind), edit, edit.before.drawings[0])
        forward, backward = record["it2i"]
        assert (forward["images"], forward["target"]) == (["img0"], "img1")
        assert (backward["images"], backward["target"]) == (["img1"], "img0")
        assert set(images) == {"img0", "img1"} == set(record["pictures"])
        swapped = Edit(edit.after, edit.before, edit.backward, edit.forward, edit.back_kind, edit.kind)
        _, reversed_images = maker.pair(seeded_generator(1, kind), swapped, edit.before.drawings[0])
        assert np.array_equal(images["img0"], reversed_images["img1"])
        assert np.array_equal(images["img1"], reversed_images["img0"])


def test_a_kind_that_the_pool_cannot_furnish_becomes_another(catalogue: Catalogue) -> None:
    lone = [d for d in catalogue.drawings if d.id == "flat/red-circle"]
    assert make_edit(seeded_generator(0, "x"), "recolour", lone[0], DrawingPool(lone)).kind == "background"
