"""Every recipe of the repository loads and plans; the full-size ones say what the paper's Table 2 says."""

from pathlib import Path

import pytest

from emma_train.commands.plan import index_reader
from emma_train.config.load import is_pipeline, load_pipeline, load_recipe, load_yaml
from emma_train.config.mix import phases, samples_per_task
from emma_train.config.schema import InitConfig, Recipe
from emma_train.generate.settings import FlowSettings
from emma_train.plan import Plan
from emma_train.plan.roofline import step_seconds
from emma_train.stages.stage import STAGES, check_order, stage_of

ROOT = Path(__file__).parents[2] / "recipes"
FILES = sorted(f for f in ROOT.rglob("*.yaml") if f.parent != ROOT / "tiny-long" / "model")  # but for the export
STAGE_FILES = [f for f in FILES if "stage" in load_yaml(f)]
PIPELINES = [f for f in FILES if is_pipeline(f)]
FULL = ROOT / "emma-4b"
MILLION = 1_000_000


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT.parent)  # paths in recipes count from the repository's root


@pytest.mark.parametrize("path", STAGE_FILES, ids=name_of)
def test_stage_recipe_loads_and_plans(path: Path) -> None:
    # `make long-data` makes the set of the longer training; the small one has the same kinds of records.
    is_long = path.parent.name == "tiny-long"
    recipe = load_recipe(path, ["data.sources[0].path=recipes/tiny/assets/emoji/train"] if is_long else [])
    plan = Plan(recipe, str(path), 1, "h200-141g", read_index_rows=index_reader(recipe))
    assert plan.trained > 0
    assert all(load.tokens / plan.recipe.data.slots <= plan.recipe.data.pack_tokens for load in plan.loads)
    assert all(step_seconds(plan, load) > 0 for load in plan.loads)
    assert sum(plan.phase_steps) == plan.recipe.train.steps


@pytest.mark.parametrize("path", PIPELINES, ids=name_of)
def test_pipeline_lists_stages_in_order(path: Path) -> None:
    pipeline, _ = load_pipeline(path)
    previous = None
    for name in pipeline.pipeline:
        stage = stage_of(load_recipe(path.parent / name), name)
        check_order(stage, previous, InitConfig())
        previous = stage.name


def test_both_sizes_have_every_stage_and_a_pipeline() -> None:
    for size in ("tiny", "emma-4b"):
        assert [f for f in STAGES if not (ROOT / size / f"{f}.yaml").is_file()] == []
        assert load_pipeline(ROOT / size / "pipeline.yaml")[0].pipeline == [f"{name}.yaml" for name in STAGES]


@pytest.mark.parametrize("path", STAGE_FILES, ids=name_of)
def test_every_stage_states_what_it_averages_and_how_it_shifts_time(path: Path) -> None:
    recipe = load_recipe(path)
    assert {"ema.decay", "flow.shift"} <= recipe.set_keys
    assert (recipe.ema.decay == 0) == (recipe.stage.name in ("stage0", "stage4_expert", "stage4_router"))


def full(stage: str) -> Recipe:
    return load_recipe(FULL / f"{stage}.yaml")


def samples(recipe: Recipe) -> dict[str, float]:
    """Samples of each task over the whole stage."""
    plan = Plan(recipe, "recipe", 1, "h200-141g", read_index_rows=index_reader(recipe))
    totals = {"i2t": 0.0, "t2i": 0.0, "it2i": 0.0}
    for phase, steps in zip(phases(recipe), plan.phase_steps, strict=True):
        for task, count in samples_per_task(phase.mix, recipe.data.samples_per_step).items():
            totals[task] += count * steps
    return totals


@pytest.mark.parametrize(
    ("stage", "lr", "schedule", "decay"),
    [
        ("stage0", 1e-3, "cosine", 0.0),
        ("stage1", 1e-4, "constant", 0.9999),
        ("stage2", 4e-5, "constant", 0.9999),
        ("stage3", 1e-5, "cosine", 0.995),
        ("stage4_expert", 4e-6, "cosine", 0.0),
        ("stage4_router", 1e-4, "constant", 0.0),
    ],
)
def test_full_size_stages_take_the_papers_numbers(stage: str, lr: float, schedule: str, decay: float) -> None:
    recipe = full(stage)
    assert (recipe.optimizer.lr, recipe.schedule.kind) == (lr, schedule)
    assert (recipe.ema.decay, recipe.flow.shift) == (decay, 3.0)
    assert (recipe.optimizer.betas, recipe.optimizer.eps, recipe.optimizer.weight_decay) == ([0.9, 0.999], 1e-8, 0.0)
    assert recipe.data.slots % 256 == 0


@pytest.mark.parametrize(
    ("stage", "total", "ratio"),
    [
        ("stage0", 0.558 * MILLION, {"i2t": 1}),
        ("stage1", 1000 * MILLION, {"i2t": 1 / 2, "t2i": 1 / 2}),
        ("stage3", 1.5 * MILLION, {"i2t": 1 / 3, "t2i": 1 / 3, "it2i": 1 / 3}),
        ("stage4_expert", 15 * MILLION, {"i2t": 1}),
        ("stage4_router", 3 * MILLION, {"i2t": 1}),
    ],
)
def test_full_size_stages_see_the_papers_samples(stage: str, total: float, ratio: dict[str, float]) -> None:
    seen = samples(full(stage))
    assert sum(seen.values()) == pytest.approx(total, rel=1e-3)
    assert {task: n / sum(seen.values()) for task, n in seen.items() if n} == pytest.approx(ratio)


def test_full_size_stage2_has_its_three_phases() -> None:
    recipe = full("stage2")
    a, b, c = phases(recipe)
    assert [p.name for p in (a, b, c)] == ["a", "b", "c"]
    step = recipe.data.samples_per_step
    assert a.steps * step == pytest.approx((120 + 105) * MILLION, rel=1e-4)
    assert b.steps * step == pytest.approx((50 + 50) * MILLION, rel=1e-4)
    assert samples(recipe)["it2i"] == c.steps * step / 3 == pytest.approx(12 * MILLION, rel=1e-4)
    assert (a.mix.it2i, b.mix.it2i) == (0, 0) and c.mix.i2t == c.mix.t2i == c.mix.it2i == 1


def test_full_size_resolutions() -> None:
    for stage in ("stage0", "stage1"):
        assert (full(stage).data.und.mode, full(stage).data.und.side) == ("crop", 512)
    assert (full("stage1").data.gen.mode, full("stage1").data.gen.side) == ("buckets", 512)
    # Stage 4 makes no images, but its checkpoints are the finished model, which does.
    for stage in ("stage2", "stage3", "stage4_expert", "stage4_router"):
        assert (full(stage).data.gen.mode, full(stage).data.gen.side) == ("buckets", 1024)
    for stage in ("stage2", "stage3", "stage4_expert", "stage4_router"):
        assert (full(stage).data.und.mode, full(stage).data.und.min_pixels) == ("native", 256 * 256)


def test_the_frozen_llm_of_stage_0_sees_the_empty_think_block() -> None:
    assert [full(stage).data.template for stage in STAGES] == ["no_think", *["plain"] * 5]


def test_the_gen_adapter_starts_from_the_und_adapter_in_stage_1_alone() -> None:
    assert [full(stage).init.gen_adapter for stage in STAGES] == ["random", "und", *["random"] * 4]


def test_every_stage_of_the_full_size_has_the_same_start_values_and_questions() -> None:
    for stage in STAGES:
        assert full(stage).model.latent_fan_in == "separate"  # the hand-off compares it
        assert len(full(stage).data.caption_questions) == 6


def test_stage_2_draws_stem_to_general_and_portrait_to_general_one_to_one() -> None:
    _, *balanced = phases(full("stage2"))
    for task, tag in (("i2t", "stem"), ("t2i", "portrait")):
        for phase in balanced:
            sources = [source for source in phase.sources or [] if source.tasks == [task]]
            ((first, second),) = [sources]
            assert (first.require_tags, second.exclude_tags) == ([tag], [tag])
            assert first.path == second.path and first.weight == second.weight == 1


def test_images_of_the_full_size_are_generated_as_bagel_does() -> None:
    for stage in STAGES:
        flow = FlowSettings.of(full(stage))
        assert (flow.steps, flow.shift, flow.text_guidance, flow.image_guidance) == (50, 3.0, 4.0, 2.0)
        assert (flow.guidance_from, flow.guidance_to, flow.guidance_renorm) == (0.4, 1.0, True)
        assert FlowSettings.of(load_recipe(ROOT / "tiny" / f"{stage}.yaml")) == FlowSettings(shift=3.0)


@pytest.mark.parametrize("path", STAGE_FILES, ids=name_of)
def test_every_stage_is_validated_and_shows_samples(path: Path) -> None:
    recipe = load_recipe(path)
    validate, train = recipe.validate, recipe.train
    assert 0 < validate.every <= train.steps or path.parent.name in ("tiny", "tiny-long")
    assert validate.every and validate.sources and validate.questions and train.sample_from
    trained = {source.path for phase in phases(recipe) for source in phase.sources}
    assert not trained & {source.path for source in [*validate.sources, *validate.questions]}


def test_full_size_stages_start_from_the_run_folder_before_them() -> None:
    names = list(STAGES)
    for previous, stage in zip(names, names[1:], strict=False):
        run = full(previous).run
        assert full(stage).init.source == f"{run.root}/{run.name}"
