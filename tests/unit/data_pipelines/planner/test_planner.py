"""The plan of a step depends on (seed, step, manifests) alone: exact ratio, exact epochs, even slots."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.planner import sources
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.planner.planner import Planner, StepPlan
from emma_train.config.schema import ModelConfig, Recipe
from emma_train.errors import UserError
from tests.helpers import tiny_recipe, tokenizer
from tests.shards import every_task, prompt, question, write_shards
from tests.synthetic import synthetic

EMOJI_RECIPE = {"data__slots": 12, "data__samples_per_step": 192, "data__pack_tokens": 2048, "data__und": {"side": 128}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty records of each task, one image size."""
    return write_shards(tmp_path_factory.mktemp("small") / "set", every_task(30), per_shard=20)


def planner(recipe: Recipe) -> Planner:
    return Planner(recipe, tokenizer())


def small_recipe(folder: Path, **dotted: Any) -> Recipe:
    return tiny_recipe(data__sources=[{"path": str(folder)}], **dotted)


def all_of(plan: StepPlan, task: str) -> list[SampleRef]:
    return [sample for slot in plan.slots for sample in slot if sample.task == task]


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ({"i2t": 1, "t2i": 1, "it2i": 1}, {"i2t": 64, "t2i": 64, "it2i": 64}),
        ({"i2t": 1, "t2i": 1, "it2i": 0}, {"i2t": 96, "t2i": 96}),
        ({"i2t": 1, "t2i": 6, "it2i": 1}, {"i2t": 24, "t2i": 144, "it2i": 24}),
    ],
)
def test_every_step_has_the_exact_count_of_each_task_and_every_slot_holds_every_task(
    mix: dict[str, int], expected: dict[str, int]
) -> None:
    plans = planner(tiny_recipe(**EMOJI_RECIPE, mix=mix))
    for step in (1, 2, 3, 17, 1000):
        plan = plans.plan(step)
        assert Counter(s.task for slot in plan.slots for s in slot) == expected
        for slot in plan.slots:
            counts = Counter(s.task for s in slot)
            assert counts.keys() == expected.keys()
            assert all(abs(counts[task] - expected[task] / 12) < 2 for task in expected)


@pytest.mark.parametrize("mix", [{"i2t": 1, "t2i": 1}, {"i2t": 1, "t2i": 1, "it2i": 1}, {"i2t": 1}])
def test_slots_of_the_emoji_set_cost_the_same_within_five_percent(mix: dict[str, int]) -> None:
    plans = planner(tiny_recipe(**EMOJI_RECIPE, data__gen={"side": 128}, mix={"i2t": 0, "t2i": 0, "it2i": 0, **mix}))
    worst = max(plans.plan(step).straggler for step in range(1, 61))
    assert 1.0 <= worst <= 1.05


@pytest.mark.seconds
@given(samples=st.sampled_from([6, 12, 24, 36, 60]), start=st.integers(0, 4))
def test_an_epoch_takes_each_sample_once_for_each_task(small: Path, samples: int, start: int) -> None:
    per_task = samples // 3
    plans = planner(small_recipe(small, data__samples_per_step=samples, data__slots=2, data__pack_tokens=4096))
    # The fewest steps that make whole epochs of 30 samples, from any epoch on.
    epochs = next(n for n in range(1, 31) if 30 * n % per_task == 0)
    steps = range(1 + start * 30 * epochs // per_task, 1 + (start + 1) * 30 * epochs // per_task)
    for task in ("i2t", "t2i", "it2i"):
        seen = Counter((s.key, s.epoch) for step in steps for s in all_of(plans.plan(step), task))
        assert len(seen) == 30 * epochs
        assert set(seen.values()) == {1}
        assert {epoch for _, epoch in seen} == set(range(start * epochs, (start + 1) * epochs))


def test_epochs_differ_in_order_and_seeds_differ_in_data(small: Path) -> None:
    def steps(recipe: Recipe, first: int) -> list[set[str]]:
        """The samples of each of the five steps of an epoch."""
        plans = planner(recipe)
        return [{s.key for s in all_of(plans.plan(step), "i2t")} for step in range(first, first + 5)]

    settings = {"data__samples_per_step": 18, "data__slots": 6}
    first, second = (steps(small_recipe(small, **settings), start) for start in (1, 6))
    assert set.union(*first) == set.union(*second)
    assert all(one != other for one, other in zip(first, second, strict=True))
    seeds = [steps(small_recipe(small, **settings, data__seed=seed), 1) for seed in range(5)]
    assert all(seeds[i] != seeds[j] for i in range(5) for j in range(i))


def test_the_plan_of_a_step_does_not_depend_on_the_steps_before(small: Path) -> None:
    recipe = small_recipe(small)
    sequential = planner(recipe)
    plans = [sequential.plan(step) for step in range(1, 41)]
    for step in (40, 1, 23, 22, 7):
        assert planner(recipe).plan(step) == plans[step - 1]


def test_digests_tell_steps_apart_and_agree_between_planners(small: Path) -> None:
    recipe = small_recipe(small)
    digests = [planner(recipe).plan(step).digest for step in range(1, 31)]
    again = planner(recipe)
    assert digests == [again.plan(step).digest for step in range(1, 31)]
    assert len(set(digests)) == 30


def test_alternatives_are_drawn_evenly_over_epochs(tmp_path: Path) -> None:
    answers = ("one", "two", "three", "four")
    folder = write_shards(tmp_path, [question(f"q{i:03d}", answers) for i in range(40)])
    mix = {"i2t": 1, "t2i": 0, "it2i": 0}
    plans = planner(small_recipe(folder, mix=mix, data__samples_per_step=40, data__slots=4))
    drawn = Counter(s.alternative for step in range(1, 51) for s in all_of(plans.plan(step), "i2t"))
    assert sum(drawn.values()) == 2000
    # 500 expected of each; four standard deviations are 77.
    assert all(abs(drawn[number] - 500) < 77 for number in range(4))


def test_planned_tokens_are_text_and_images(small: Path) -> None:
    plans = planner(small_recipe(small, data__und={"side": 64}, data__gen={"side": 96}))
    edit = all_of(plans.plan(1), "it2i")[0]
    answer = all_of(plans.plan(1), "i2t")[0]
    assert edit.num_visual == 9
    assert edit.num_tokens > 18
    assert answer.num_visual == 4
    prompts = all_of(plans.plan(1), "t2i")
    assert {s.num_visual for s in prompts} == {0}


PHASES = [
    {"name": "a", "steps": 3, "mix": {"i2t": 1, "t2i": 1}},
    {"name": "b", "steps": 2, "mix": {"i2t": 1, "t2i": 1}},
    {"name": "c", "steps": 4, "mix": {"i2t": 1, "t2i": 2, "it2i": 3}},
]


def test_phases_switch_the_mix_at_their_step_and_the_last_one_lasts(small: Path) -> None:
    plans = planner(small_recipe(small, data__phases=PHASES, data__slots=2))
    mixes = [Counter(s.task for slot in plans.plan(step).slots for s in slot) for step in range(1, 13)]
    assert mixes[:5] == [{"i2t": 6, "t2i": 6}] * 5
    assert mixes[5:] == [{"i2t": 2, "t2i": 4, "it2i": 6}] * 7


def test_a_phase_goes_on_where_the_one_before_stopped(small: Path) -> None:
    """5 steps x 6 samples are one epoch: phases a and b together show each sample once, with no noise drawn twice."""
    plans = planner(small_recipe(small, data__phases=PHASES, data__slots=2))
    for task in ("i2t", "t2i"):
        seen = Counter((s.key, s.epoch) for step in range(1, 6) for s in all_of(plans.plan(step), task))
        assert len(seen) == 30
        assert {epoch for _, epoch in seen} == {0}
    everything = Counter((s.key, s.task, s.epoch) for n in range(1, 13) for slot in plans.plan(n).slots for s in slot)
    assert set(everything.values()) == {1}
    assert plans.plan(5).epoch == 1.0
    assert plans.plan(9).epoch == 46 / 30  # t2i; i2t has passed 38 / 30, it2i 24 / 30


def test_phases_without_steps_yet_have_no_past(small: Path) -> None:
    """The first phase is the plan of a recipe without phases."""
    phased = planner(small_recipe(small, data__phases=PHASES, data__slots=2))
    plain = planner(small_recipe(small, mix={"i2t": 1, "t2i": 1, "it2i": 0}, data__slots=2))
    assert [phased.plan(n).digest for n in (1, 2, 3)] == [plain.plan(n).digest for n in (1, 2, 3)]


def test_too_many_tokens_for_a_slot_are_an_error_with_both_numbers(small: Path) -> None:
    recipe = small_recipe(small)
    tokens = max(sum(s.num_tokens for s in slot) for slot in planner(recipe).plan(1).slots)
    assert planner(small_recipe(small, data__pack_tokens=tokens)).plan(1)
    with pytest.raises(UserError, match=rf"step 1 packs {tokens} tokens into one slot.*pack_tokens={tokens - 1}"):
        planner(small_recipe(small, data__pack_tokens=tokens - 1)).plan(1)


def test_another_tokenizer_than_the_index_was_made_with_is_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, folder := tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"indexed with another tokenizer than data\.tokenizer .*emma-data index"):
        planner(small_recipe(folder))


def test_a_task_that_no_source_has_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [question(f"q{i}") for i in range(8)])
    with pytest.raises(UserError, match=r"mix\.t2i is above 0, but no sample of"):
        planner(small_recipe(folder))


def test_sources_may_be_restricted_to_tasks_and_tags(tmp_path: Path) -> None:
    contents = [question(f"q{i:02d}", tags=["stem"] if i < 5 else []) for i in range(20)]
    folder = write_shards(tmp_path, contents)
    mix = {"i2t": 1, "t2i": 0, "it2i": 0}
    source = {"path": str(folder), "tasks": ["i2t"], "require_tags": ["stem"]}
    plans = planner(tiny_recipe(data__sources=[source], mix=mix, data__samples_per_step=5, data__slots=1))
    assert {s.key for s in all_of(plans.plan(1), "i2t")} == {f"q{i:02d}" for i in range(5)}
    with pytest.raises(UserError, match="has that task and the required tags"):
        planner(tiny_recipe(data__sources=[{**source, "require_tags": ["map"]}], mix=mix))


FILLED = {"data__samples_per_step": 0, "data__slots": 12, "data__pack_tokens": 8192}


def filled(**dotted: Any) -> Recipe:
    """A recipe with filled packs of the synthetic data set, at the paper's sizes."""
    recipe = tiny_recipe(**{**FILLED, "data__und": {"side": 512}, "data__gen": {"side": 512}, **dotted})
    recipe.model = ModelConfig()
    return recipe


MIX = {"i2t": 1, "t2i": 1, "it2i": 0}


def test_filled_packs_are_full_and_even_and_keep_the_ratio() -> None:
    with synthetic(20_000):
        plans = planner(filled(mix=MIX))
        steps = [plans.plan(step) for step in range(1, 61)]
    assert min(plan.filled for plan in steps[1:]) >= 0.985
    assert sum(plan.filled for plan in steps) / 60 >= 0.99
    assert max(plan.straggler for plan in steps) <= 1.05
    for plan in steps:
        counts = Counter(sample.task for slot in plan.slots for sample in slot)
        assert counts["i2t"] == counts["t2i"] > 100
        for slot in plan.slots:
            assert sum(sample.num_tokens for sample in slot) <= 8192


@pytest.mark.parametrize("mix_by", ["samples", "tokens"])
def test_a_filled_stream_goes_on_from_a_state_of_a_few_numbers(mix_by: str) -> None:
    with synthetic(3000):
        recipe = filled(mix={"i2t": 2, "t2i": 1, "it2i": 1}, data__mix_by=mix_by)
        straight = planner(recipe)
        plans = [straight.plan(step) for step in range(1, 31)]
        for step in (1, 13, 29):
            state = json.loads(json.dumps(straight.state(step)))
            assert len(json.dumps(state)) < 4096
            resumed = planner(recipe)
            resumed.load(step, state)
            assert [resumed.plan(n) for n in range(step + 1, 31)] == plans[step:]
            assert [resumed.plan(n).slots for n in (step + 1, 30)] == [plans[n - 1].slots for n in (step + 1, 30)]
            assert resumed.state(30) == straight.state(30)
            with pytest.raises(UserError, match=f"goes on after step {step}"):
                resumed.plan(step)


def test_over_an_epoch_filled_packs_take_each_sample_once() -> None:
    """All positions below `next` are taken, except the skipped ones."""
    with synthetic(2000):
        plans = planner(filled(mix=MIX))
        seen: dict[str, Counter] = {"i2t": Counter(), "t2i": Counter()}
        for step in range(1, 41):
            for slot in plans.plan(step).slots:
                for sample in slot:
                    seen[sample.task][sample.key, sample.epoch] += 1
        for task, counts in seen.items():
            assert set(counts.values()) == {1}
            (state,) = (pool for pool in plans.state(40)["pools"] if pool["task"] == task)
            assert len(counts) == state["next"] - len(state["left"])
            finished = min(state["left"], default=state["next"]) // 2000
            assert finished >= 2
            for epoch in range(finished):
                assert sum(e == epoch for _, e in counts) == 2000


def test_a_ratio_by_tokens_is_kept_over_the_steps() -> None:
    with synthetic(20_000):
        plans = planner(filled(mix={"i2t": 1, "t2i": 2, "it2i": 1}, data__mix_by="tokens"))
        tokens: Counter = Counter()
        for step in range(1, 41):
            for slot in plans.plan(step).slots:
                tokens.update(
                    {task: sum(s.num_tokens for s in slot if s.task == task) for task in ("i2t", "t2i", "it2i")}
                )
        assert plans.state(40)["tokens"] == tokens
    total = sum(tokens.values())
    for task, share in (("i2t", 0.25), ("t2i", 0.5), ("it2i", 0.25)):
        assert tokens[task] / total == pytest.approx(share, abs=0.002)


def test_caps_of_patches_hold_too() -> None:
    with synthetic(5000):
        plans = planner(filled(mix=MIX, data__pack_patches=7 * 1024))
        for step in range(1, 6):
            assert all(sum(sample.num_visual for sample in slot) <= 7 * 256 for slot in plans.plan(step).slots)


def test_weights_hold_in_every_step_and_tags_make_sub_ratios(tmp_path: Path) -> None:
    contents = [question(f"q{i:02d}", tags=["stem"] if i < 5 else []) for i in range(30)]
    folder = str(write_shards(tmp_path, contents))
    sources = [
        {"path": folder, "require_tags": ["stem"], "weight": 1},
        {"path": folder, "exclude_tags": ["stem"], "weight": 1},
    ]
    mix = {"i2t": 1, "t2i": 0, "it2i": 0}
    plans = planner(tiny_recipe(data__sources=sources, mix=mix, data__samples_per_step=10, data__slots=2))
    seen: Counter = Counter()
    for step in range(1, 6):
        keys = [s.key for s in all_of(plans.plan(step), "i2t")]
        assert sum(key < "q05" for key in keys) == 5
        seen.update(keys)
    assert seen == {**{f"q{i:02d}": 5 for i in range(5)}, **{f"q{i:02d}": 1 for i in range(5, 30)}}


def test_one_folder_may_be_two_sources_of_one_pool(tmp_path: Path) -> None:
    tags = [["stem"], ["photo"], [], ["stem", "photo"]]
    folder = str(write_shards(tmp_path, [question(f"q{i:02d}", tags=tags[i % 4]) for i in range(40)], per_shard=7))
    sources = [{"path": folder, "require_tags": ["stem"]}, {"path": folder, "exclude_tags": ["stem", "photo"]}]
    mix = {"i2t": 1, "t2i": 0, "it2i": 0}
    plans = planner(tiny_recipe(data__sources=sources, mix=mix, data__samples_per_step=10, data__slots=2))
    keys = Counter(s.key for step in (1, 2, 3) for s in all_of(plans.plan(step), "i2t"))
    assert keys == dict.fromkeys((f"q{i:02d}" for i in range(40) if i % 4 != 1), 1)


def test_a_manifest_is_read_once_whatever_the_tasks_and_phases(small: Path) -> None:
    with patch.object(sources, "read_manifest", wraps=sources.read_manifest) as read:
        planner(small_recipe(small, data__phases=PHASES))
    assert read.call_count == 1


def test_a_sample_that_is_too_long_is_replaced_and_counted(tmp_path: Path) -> None:
    words = " ".join(["fish"] * 300)
    contents = [*(question(f"q{i}") for i in range(9)), question("long", (words,))]
    folder = write_shards(tmp_path, contents)
    mix = {"i2t": 1, "t2i": 0, "it2i": 0}
    plans = planner(small_recipe(folder, mix=mix, data__samples_per_step=10, data__slots=2, data__pack_tokens=300))
    plan = plans.plan(1)
    keys = [s.key for s in all_of(plan, "i2t")]
    assert plan.too_long == 1
    assert "long" not in keys and len(keys) == 10
    with pytest.raises(UserError, match=r"shard-000000.tar: no i2t sample near it fits a pack; raise data.pack_tokens"):
        planner(small_recipe(folder, mix=mix, data__samples_per_step=10, data__slots=2, data__pack_tokens=10)).check()


@pytest.mark.parametrize("section", [{"side": 64, "min_side": 64}, {"mode": "buckets", "side": 64}])
def test_a_sample_with_an_unsuitable_image_is_replaced_and_counted(tmp_path: Path, section: dict[str, Any]) -> None:
    """A target of 320 x 32 pixels: too small for the one recipe, too elongated for the other."""
    key, record, _ = prompt("thin")
    file = io.BytesIO()
    Image.new("RGB", (320, 32)).save(file, "PNG")
    contents = [*(prompt(f"p{i}", side=64) for i in range(9)), (key, record, {"img0.png": file.getvalue()})]
    folder = write_shards(tmp_path, contents)
    settings = {"mix": {"i2t": 0, "t2i": 1, "it2i": 0}, "data__samples_per_step": 10, "data__slots": 2}
    plans = planner(small_recipe(folder, **settings, data__gen=section))
    keys = [s.key for s in all_of(plans.plan(1), "t2i")]
    assert (plans.plan(1).unsuitable, plans.plan(1).too_long) == (1, 0)
    assert "thin" not in keys and len(keys) == 10
    every = planner(small_recipe(folder, **settings, data__gen={**section, "min_side": 0, "max_aspect": 0}))
    assert every.plan(1).unsuitable == 0
    assert "thin" in [s.key for s in all_of(every.plan(1), "t2i")]
    with pytest.raises(UserError, match="or lower the size of images, or min_side"):
        planner(small_recipe(folder, **settings, data__gen={"side": 64, "min_side": 4000})).check()


def test_slots_that_cannot_be_even_are_packed_to_fit_before_giving_up(tmp_path: Path) -> None:
    """Three long answers and three short ones a step: two slots of as many each would exceed the cap."""
    long = " ".join(["fish"] * 80)
    contents = [question(f"q{i}", (long if i % 2 else "a cat",)) for i in range(6)]
    mix = {"i2t": 1, "t2i": 0, "it2i": 0}
    recipe = small_recipe(write_shards(tmp_path, contents), mix=mix, data__samples_per_step=6, data__slots=3)
    tokens = sorted(s.num_tokens for s in all_of(planner(recipe).plan(1), "i2t"))
    recipe.data.pack_tokens = tokens[-1] + tokens[0]
    plan = planner(recipe).plan(1)
    assert max(sum(s.num_tokens for s in slot) for slot in plan.slots) <= recipe.data.pack_tokens


def test_a_substitute_is_another_that_fits_and_the_same_for_everyone(small: Path) -> None:
    recipe = small_recipe(small)
    for sample in planner(recipe).plan(3).slots[0]:
        substitutes = [planner(recipe).substitute(sample, attempt) for attempt in range(8)]
        assert substitutes == [planner(recipe).substitute(sample, attempt) for attempt in range(8)]
        existing = [substitute for substitute in substitutes if substitute is not None]
        assert len({substitute.key for substitute in existing}) > 1
        for substitute in existing:
            assert substitute.key != sample.key and substitute.task == sample.task
            assert substitute.num_tokens <= sample.num_tokens and substitute.num_visual <= sample.num_visual


@pytest.mark.seconds
def test_the_plan_of_a_billion_samples_takes_little_memory() -> None:
    """10,000 shards of 100,000 rows: only a few windows of the index are in memory."""
    with synthetic(10**9, rows_per_shard=100_000):
        plans = planner(filled(mix=MIX, data__slots=4))
        plans.plan(1)
        plans.load_task_positions(10, {task: {"next": 987_654_321, "left": []} for task in ("i2t", "t2i")})
        assert {s.epoch for s in plans.plan(11).slots[0]} == {0}
    stream = plans._phases[0].streams["i2t"].interleave
    assert stream.num_rows == 10**9
    windows = stream.pools[0]._windows.values()
    assert sum(len(window.result()[0]) for window in windows) <= 3 * 400_000


def test_the_fingerprint_follows_the_shards(small: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path, every_task(29), per_shard=20)
    fingerprints = [planner(small_recipe(folder)).fingerprint for folder in (small, other, small)]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
