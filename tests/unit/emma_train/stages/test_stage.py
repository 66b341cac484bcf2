"""The stages are those of the paper's Table 2."""

import logging

import pytest

from emma_train.config.schema import InitConfig
from emma_train.errors import UserError
from emma_train.model.parameter_groups import GROUPS
from emma_train.stages.stage import STAGES, check_order, departures, stage_of
from tests.helpers import tiny_recipe

# "All but DC-AE": the autoencoder is outside the model, the STEM expert and router do not exist before Stage 4.
ALL = {"vision", "und_adapter", "gen_adapter", "decoder", "velocity_head"}
TABLE = {
    "stage0": ({"und_adapter"}, {"i2t"}),
    "stage1": (ALL, {"i2t", "t2i"}),
    "stage2": (ALL, {"i2t", "t2i", "it2i"}),
    "stage3": (ALL, {"i2t", "t2i", "it2i"}),
    "stage4_expert": ({"stem_expert"}, {"i2t"}),
    "stage4_router": ({"router"}, {"i2t"}),
}


def test_stages_train_what_table_2_says() -> None:
    assert list(STAGES) == list(TABLE)
    for name, (trainable, tasks) in TABLE.items():
        stage = STAGES[name]
        assert set(stage.trainable) == trainable and set(stage.trainable) <= set(GROUPS)
        # Not the paper's, but allowed: editing in pre-training, and reconstruction where images are made.
        extra = {"stage1": {"it2i", "recon"}, "stage2": {"recon"}, "stage3": {"recon"}}
        assert set(stage.tasks) == tasks | extra.get(name, set())
        assert stage.stem_expert == name.startswith("stage4") and stage.router == (name == "stage4_router")
        assert stage.loss == ("router" if name == "stage4_router" else "tokens")


@pytest.mark.parametrize("name", STAGES)
def test_the_stage_of_a_recipe_is_found(name: str) -> None:
    assert stage_of(tiny_recipe(name)).name == name


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("stage_1", "stage1"), ("stag2", "stage2"), ("stage4expert", "stage4_expert"), ("stage4_routr", "stage4_router")],
)
def test_a_misspelt_stage_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=f"stage.name is '{wrong}'; did you mean {near}?"):
        stage_of(tiny_recipe(stage__name=wrong), "recipe.yaml")


def test_a_stage_unlike_any_other_lists_all() -> None:
    with pytest.raises(UserError, match="it is one of stage0, .*stage4_router"):
        stage_of(tiny_recipe(stage__name="xyz"))


@pytest.mark.parametrize("name", ["stage0", "stage4_expert", "stage4_router"])
def test_a_stage_that_only_understands_takes_no_other_task(name: str) -> None:
    with pytest.raises(UserError, match=f"mix.t2i is 1, but {name} trains i2t only"):
        stage_of(tiny_recipe(name, mix={"i2t": 1, "t2i": 1}))


@pytest.mark.parametrize(
    ("name", "expert", "router"),
    [("stage1", True, False), ("stage3", False, True), ("stage4_expert", False, False), ("stage4_router", True, False)],
)
def test_the_experts_exist_in_their_stages_alone(name: str, expert: bool, router: bool) -> None:
    needs = f"{name} needs model.vision.stem_expert={str(name.startswith('stage4')).lower()}"
    with pytest.raises(UserError, match=needs):
        stage_of(tiny_recipe(name, model__vision__stem_expert=expert, model__vision__router=router))


ALLOWED = {
    ("stage0", None),
    ("stage1", "stage0"),
    ("stage1", None),
    ("stage2", "stage1"),
    ("stage3", "stage2"),
    ("stage4_expert", "stage3"),
    ("stage4_router", "stage4_expert"),
}


@pytest.mark.parametrize("previous", [None, *STAGES])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_follows_the_one_before_it_or_itself(
    name: str, previous: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = f"runs/{previous}" if previous else None
    if (name, previous) in ALLOWED or name == previous:
        check_order(STAGES[name], previous, InitConfig(source))
        warm = [f"{name} starts from a checkpoint of {name} itself: its weights only, at step 0"]
        assert caplog.messages == (warm if name == previous else [])
        return
    with pytest.raises(UserError) as caught:
        check_order(STAGES[name], previous, InitConfig(source))
    message = str(caught.value)
    assert name in message and "\n" not in message
    assert ("set init.from" in message) if previous is None else (f"runs/{previous}" in message and previous in message)


@pytest.mark.parametrize("name", STAGES)
def test_imported_weights_are_a_start_of_the_first_two_stages(name: str) -> None:
    if (name, None) in ALLOWED:
        check_order(STAGES[name], "", InitConfig("models/initial"))
        return
    with pytest.raises(UserError, match="models/initial: holds imported weights, but"):
        check_order(STAGES[name], "", InitConfig("models/initial"))


@pytest.mark.parametrize(
    ("previous", "content"),
    [(None, "random weights"), ("", "imported weights"), ("stage0", "a checkpoint of stage0")],
)
def test_any_stage_may_come_before_if_the_recipe_says_so(
    caplog: pytest.LogCaptureFixture, previous: str | None, content: str
) -> None:
    init = InitConfig("runs/before")
    with pytest.raises(UserError):
        check_order(STAGES["stage2"], previous, init)
    init.any_stage = True
    with caplog.at_level(logging.INFO):
        check_order(STAGES["stage2"], previous, init)
        check_order(STAGES["stage2"], "stage1", init)
    assert caplog.messages == [f"stage2 starts from {content}, not from stage1: init.any_stage allows it"]


def test_a_recipe_may_choose_the_groups_that_train() -> None:
    recipe = tiny_recipe(stage__trainable=["decoder", "und_adapter"])
    stage = stage_of(recipe)
    assert stage.trainable == ("und_adapter", "decoder") and STAGES["stage1"].trainable != stage.trainable
    assert departures(recipe, stage) == [
        "stage.trainable: stage1 trains und_adapter, decoder; in the paper it trains vision, und_adapter, gen_adapter, "
        "decoder, velocity_head"
    ]
    assert stage_of(tiny_recipe()) is STAGES["stage1"] and departures(tiny_recipe(), STAGES["stage1"]) == []
    same = tiny_recipe("stage0", stage__trainable=["und_adapter"])
    assert departures(same, stage_of(same)) == []


@pytest.mark.parametrize(
    ("stage", "group", "words"),
    [
        ("stage1", "decodr", "stage.trainable names 'decodr', which is no parameter group; did you mean decoder?"),
        ("stage1", "x", "they are und_adapter, "),
        ("stage0", "gen_adapter", "gen_adapter, which stage0 cannot train: its mix makes no images"),
        ("stage4_expert", "velocity_head", "velocity_head, which stage4_expert cannot train: its mix makes no images"),
        ("stage1", "router", "router, which stage1 cannot train: model.vision.router is false"),
        ("stage1", "stem_expert", "model.vision.stem_expert is false"),
        ("stage4_router", "vision", "vision, which stage4_router cannot train: it computes the router's loss alone"),
    ],
)
def test_a_group_that_cannot_train_is_an_error(stage: str, group: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        stage_of(tiny_recipe(stage, stage__trainable=[group]), "recipe.yaml")
    assert words in str(caught.value) and str(caught.value).startswith("recipe.yaml: ")


def test_a_mix_without_images_leaves_the_gen_branch_out_of_what_may_be_chosen() -> None:
    with pytest.raises(UserError, match="gen_adapter, which stage1 cannot train"):
        stage_of(tiny_recipe(mix={"i2t": 1}, stage__trainable=["gen_adapter"]))
    assert "gen_adapter" in stage_of(tiny_recipe(mix={"i2t": 1})).trainable


def test_learning_rates_are_scaled_by_group() -> None:
    with pytest.raises(UserError, match="optimizer.lr_scale names 'visoin', .* did you mean vision?"):
        stage_of(tiny_recipe(optimizer__lr_scale={"visoin": 0.1}))
    recipe = tiny_recipe("stage0", optimizer__lr_scale={"vision": 0.1, "und_adapter": 2})
    assert departures(recipe, stage_of(recipe)) == [
        "optimizer.lr_scale.vision=0.1 has no effect: vision does not train in stage0"
    ]


def test_a_trained_gen_adapter_is_not_replaced() -> None:
    check_order(STAGES["stage1"], "stage0", InitConfig("runs/stage0", gen_adapter="und"))
    check_order(STAGES["stage1"], "", InitConfig("models/initial", gen_adapter="und"))
    with pytest.raises(UserError, match="runs/stage1: a checkpoint of stage1 has a trained Gen adapter"):
        check_order(STAGES["stage2"], "stage1", InitConfig("runs/stage1", gen_adapter="und"))
    with pytest.raises(UserError, match="set init.gen_adapter=random"):
        check_order(STAGES["stage1"], "stage1", InitConfig("runs/stage1", gen_adapter="und", any_stage=True))
