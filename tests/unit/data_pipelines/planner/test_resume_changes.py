"""Whatever an accepted change at a resume is, no sample of an epoch is repeated and none is lost."""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.planner.planner import Planner
from data_pipelines.shards.build_index import index_folder
from emma_train.config.schema import Recipe
from tests.helpers import ASSETS, tiny_recipe, tokenizer
from tests.shards import Content, edit, prompt, question, write_shards

SIZES = {"a": 31, "b": 20, "c": 17}
"""Records of each task in each folder."""
Seen = Counter[tuple[str, str, int]]
"""How often each (task, key, epoch) was planned."""
Values = dict[str, Any]


def contents(name: str, num: int) -> list[Content]:
    """Records whose keys begin with the name of their folder."""
    kinds = (("q", question), ("p", prompt), ("e", edit))
    return [make(f"{name}-{letter}{i:03d}") for i in range(num) for letter, make in kinds]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    return {name: str(write_shards(root / name, contents(name, num), per_shard=11)) for name, num in SIZES.items()}


def recipe_of(**values: Any) -> Recipe:
    usual = {"slots": 2, "pack_tokens": 800, "samples_per_step": 12, "shuffle_window": 12}
    mix = values.pop("mix", {"i2t": 1, "t2i": 1, "it2i": 1})
    return tiny_recipe(mix=mix, **{f"data__{key}": value for key, value in (usual | values).items()})


def planned(planner: Planner, first: int, last: int) -> Seen:
    slots = [slot for step in range(first, last + 1) for slot in planner.plan(step).slots]
    return Counter((sample.task, sample.key, sample.epoch) for slot in slots for sample in slot)


def run(recipes: list[Recipe], stops: list[int]) -> tuple[Seen, Values, list[Seen]]:
    """Train with one recipe after another, each from the state of the one before; the samples, the last state, and the
    samples by recipe."""
    seen: Seen = Counter()
    parts, state, first = [], None, 1
    for recipe, last in zip(recipes, stops, strict=True):
        planner = Planner(recipe, tokenizer())
        if state is not None:
            assert planner.load(first - 1, json.loads(json.dumps(state))) == []
        parts.append(planned(planner, first, last))
        seen += parts[-1]
        state, first = planner.state(last), last + 1
    assert state is not None
    return seen, state, parts


def assert_none_repeated_none_lost(seen: Seen, state: Values, dropped: str = "") -> None:
    """Every sample was planned once in each of its epochs, and all samples of a pool have been planned equally often,
    but for the epoch that is not over. `dropped` has the first letters of folders that a recipe no longer names."""
    assert set(seen.values()) == {1}, [key for key, num in seen.items() if num > 1]
    epochs: dict[tuple[str, str], set[int]] = defaultdict(set)
    for task, key, epoch in seen:
        epochs[task, key].add(epoch)
    tasks = {pool["task"] for pool in state["pools"]}
    waiting = sum(len(pool["left"]) for pool in state["pools"])
    for task, letter in (("i2t", "q"), ("t2i", "p"), ("it2i", "e")):
        for name in {key[0] for of_task, key in epochs if of_task == task} - set(dropped):
            counts = []
            num = 1 + max(int(key[3:]) for _, key in epochs if key[0] == name)
            for index in range(num):
                of_key = epochs[task, f"{name}-{letter}{index:03d}"]
                assert of_key == set(range(len(of_key))), "an epoch was passed over"
                counts.append(len(of_key))
            assert task in tasks
            assert sum(max(0, max(counts) - 1 - count) for count in counts) <= waiting, (task, name, counts)


def weighted(folders: dict[str, str], **weights: float) -> list[Values]:
    return [{"path": folders[name], "weight": weight} for name, weight in weights.items()]


def unweighted(folders: dict[str, str], names: str) -> list[Values]:
    return [{"path": folders[name]} for name in names]


def phase(name: str, steps: int, sources: list[Values], **mix: int) -> Values:
    return {"name": name, "steps": steps, "mix": mix or {"i2t": 1, "t2i": 1}, "sources": sources}


CHANGES: dict[str, tuple[Callable[[dict[str, str]], list[Values]], str]] = {
    "mix": (lambda f: [{"mix": {"i2t": 1, "t2i": 1}}, {"mix": {"i2t": 1, "t2i": 3}}], ""),
    "a task joins": (lambda f: [{"mix": {"i2t": 1, "t2i": 1}}, {}], ""),
    "a task leaves and comes back": (lambda f: [{}, {"mix": {"i2t": 1, "t2i": 1}}, {}], ""),
    "samples_per_step halved": (lambda f: [{}, {"samples_per_step": 6}], ""),
    "samples_per_step doubled": (lambda f: [{}, {"samples_per_step": 24}], ""),
    "fixed to filled": (lambda f: [{}, {"samples_per_step": 0, "pack_tokens": 150}], ""),
    "filled to fixed": (lambda f: [{"samples_per_step": 0, "pack_tokens": 150}, {}], ""),
    "weights": (lambda f: [{"sources": weighted(f, a=1, b=1)}, {"sources": weighted(f, a=3, b=1)}], ""),
    "weights in filled packs": (
        lambda f: [
            {"sources": weighted(f, a=1, b=1), "samples_per_step": 0, "pack_tokens": 150},
            {"sources": weighted(f, a=0.3, b=0.5), "samples_per_step": 0, "pack_tokens": 150},
        ],
        "",
    ),
    "weights given": (lambda f: [{"sources": unweighted(f, "ab")}, {"sources": weighted(f, a=3, b=1)}], ""),
    "weights taken away": (lambda f: [{"sources": weighted(f, a=3, b=1)}, {"sources": unweighted(f, "ab")}], ""),
    "a source added": (lambda f: [{"sources": unweighted(f, "a")}, {"sources": unweighted(f, "ab")}], ""),
    "a weighted source added in front": (
        lambda f: [{"sources": weighted(f, a=1)}, {"sources": weighted(f, b=2, a=1)}],
        "",
    ),
    "a source added twice over": (
        lambda f: [{"sources": unweighted(f, names)} for names in ("a", "ab", "abc")],
        "",
    ),
    "a source removed": (lambda f: [{"sources": unweighted(f, "ab")}, {"sources": unweighted(f, "a")}], "b"),
    "a source removed from filled packs": (
        lambda f: [
            {"sources": unweighted(f, names), "samples_per_step": 0, "pack_tokens": 150} for names in ("abc", "ac")
        ],
        "b",
    ),
    "a source removed and back": (lambda f: [{"sources": unweighted(f, names)} for names in ("abc", "ac", "abc")], ""),
    "sources exchanged": (lambda f: [{"sources": unweighted(f, "ab")}, {"sources": unweighted(f, "bc")}], "a"),
    "sources reordered": (lambda f: [{"sources": unweighted(f, "ab")}, {"sources": unweighted(f, "ba")}], ""),
    "seed": (lambda f: [{}, {"seed": 5}], ""),
    "shuffle_window": (lambda f: [{}, {"shuffle_window": 40}], ""),
    "phase shortened": (
        lambda f: [
            {"phases": [phase("a", steps, unweighted(f, "ab")), phase("c", 9, unweighted(f, "ab"), i2t=1, t2i=2)]}
            for steps in (30, 5)
        ],
        "",
    ),
    "phases added": (
        lambda f: [
            {"sources": unweighted(f, "ab"), "mix": {"i2t": 1, "t2i": 1}},
            {"phases": [phase("a", 9, unweighted(f, "ab")), phase("b", 9, unweighted(f, "c"))]},
        ],
        "",
    ),
    "phases over the same sources with other weights": (
        lambda f: [{"phases": [phase("a", 9, weighted(f, a=1, b=1)), phase("b", 9, weighted(f, a=3, b=1))]}],
        "",
    ),
}
"""What changes: the settings of one start of a run after another, and the folders that are not read to their end."""


@pytest.mark.seconds
@pytest.mark.parametrize("change", CHANGES)
def test_no_sample_of_an_epoch_is_repeated_and_none_is_lost(folders: dict[str, str], change: str) -> None:
    make, dropped = CHANGES[change]
    recipes = [recipe_of(**({"sources": unweighted(folders, "ab")} | values)) for values in make(folders)]
    stops = [7 * (number + 1) for number in range(len(recipes))]
    for last in (stops[-1] + 1, stops[-1] + 19):
        seen, state, _ = run(recipes, [*stops[:-1], last])
        assert_none_repeated_none_lost(seen, state, dropped)
        assert len(json.dumps(state)) < 6000


@pytest.mark.seconds
@pytest.mark.parametrize("filled", [False, True])
def test_a_moved_folder_is_the_same_and_new_shards_begin_at_0(tmp_path: Path, filled: bool) -> None:
    settings = {"samples_per_step": 0, "pack_tokens": 150} if filled else {}
    first = write_shards(tmp_path / "first", contents("a", 31), per_shard=11)
    shutil.copytree(first, moved := tmp_path / "moved")
    recipes = [recipe_of(sources=[{"path": str(folder)}], **settings) for folder in (first, moved)]
    straight = Planner(recipes[0], tokenizer())
    digests = [straight.plan(step).digest for step in range(1, 20)]
    resumed = Planner(recipes[1], tokenizer())
    resumed.load(7, Planner(recipes[0], tokenizer()).state(7))
    assert [resumed.plan(step).digest for step in range(8, 20)] == digests[7:]

    extra = write_shards(tmp_path / "extra", contents("b", 20), per_shard=11, index=False)
    for number, tar in enumerate(sorted(extra.glob("*.tar"))):
        shutil.copy(tar, moved / f"shard-{100 + number:06d}.tar")
    index_folder(moved, ASSETS / "tokenizer")
    seen, state, parts = run(recipes, [7, 30])
    assert_none_repeated_none_lost(seen, state)
    assert {(task, key) for task, key, epoch in parts[1] if key[0] == "b"} == {
        (task, f"b-{letter}{i:03d}") for task, letter in (("i2t", "q"), ("t2i", "p"), ("it2i", "e")) for i in range(20)
    }


def test_a_source_that_was_removed_with_its_manifest_ends_the_epoch(tmp_path: Path) -> None:
    """Its rows decided the order of the others: these begin their next epoch, and a line says so."""
    paths = {name: str(write_shards(tmp_path / name, contents(name, 20), per_shard=7)) for name in "ab"}
    before = Planner(recipe_of(sources=unweighted(paths, "ab")), tokenizer())
    seen, state = planned(before, 1, 7), before.state(7)
    recipe = recipe_of(sources=unweighted(paths, "a"))
    for tar in Path(paths["b"]).glob("*.tar"):
        tar.unlink()
    assert Planner(recipe, tokenizer()).load(7, state) == []
    shutil.rmtree(paths["b"])
    after = Planner(recipe, tokenizer())
    lines = after.load(7, state)
    assert len(lines) == 3 and all("cannot be finished without manifest.json" in line for line in lines)
    later = planned(after, 8, 12)
    assert set((seen + later).values()) == {1}
    assert {epoch for _, _, epoch in later} == {1}


@pytest.mark.seconds
def test_an_unchanged_recipe_goes_on_in_the_middle_of_any_phase(folders: dict[str, str]) -> None:
    """Phases that divide and join pools: a resume makes the same pools as the run that was not interrupted."""
    phases = [
        phase("a", 4, unweighted(folders, "ab")),
        phase("b", 4, unweighted(folders, "a")),
        phase("c", 4, unweighted(folders, "abc"), i2t=1, t2i=1, it2i=1),
        phase("d", 4, weighted(folders, a=1, b=1), t2i=1),
    ]
    for settings in ({}, {"samples_per_step": 0, "pack_tokens": 150}):
        recipe = recipe_of(phases=phases, **settings)
        straight = Planner(recipe, tokenizer())
        plans = [straight.plan(step) for step in range(1, 18)]
        for step in (2, 4, 6, 8, 11, 12, 14):
            resumed = Planner(recipe, tokenizer())
            resumed.load(step, json.loads(json.dumps(straight.state(step))))
            assert [resumed.plan(n) for n in range(step + 1, 18)] == plans[step:]
            assert resumed.state(17) == straight.state(17)


def test_the_own_data_of_a_phase_begin_at_their_beginning(folders: dict[str, str]) -> None:
    """Stage 2: phase b is one pass over its own data, whatever phase a has read; phase c goes on in them."""
    phases = [
        phase("a", 9, unweighted(folders, "a")),
        phase("b", 5, unweighted(folders, "b"), i2t=1, t2i=2),
        phase("c", 9, unweighted(folders, "b")),
    ]
    planner = Planner(recipe_of(phases=phases), tokenizer())
    assert {key[0] for _, key, _ in planned(planner, 1, 9)} == {"a"}
    of_b = planned(planner, 10, 14)
    assert set(of_b.values()) == {1} and {epoch for task, _, epoch in of_b if task == "i2t"} == {0}
    assert len({key for task, key, epoch in of_b if task == "i2t"}) == SIZES["b"]
    assert len({key for task, key, epoch in of_b if task == "t2i"}) == SIZES["b"]
    of_c = planned(planner, 15, 16)
    assert set((of_b + of_c).values()) == {1}
    assert {epoch for task, _, epoch in of_c if task == "i2t"} == {1}


def test_a_ratio_by_tokens_starts_again_with_another_mix(folders: dict[str, str]) -> None:
    """What was taken under the former mix is not made up for: a task that joins does not fill the steps alone."""
    settings = {"samples_per_step": 0, "pack_tokens": 150, "mix_by": "tokens", "sources": unweighted(folders, "ab")}
    recipes = [recipe_of(mix=mix, **settings) for mix in ({"i2t": 1, "t2i": 1}, {"i2t": 1, "t2i": 1, "it2i": 1})]
    seen, state, parts = run(recipes, [20, 21])
    assert_none_repeated_none_lost(seen, state)
    assert {task for task, _, _ in parts[1]} == {"i2t", "t2i", "it2i"}
