"""The plan's numbers: parameters in closed form, memory against what autograd keeps, FLOPs against a packed batch."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emma_train.config.load import load_recipe
from emma_train.config.schema import ImageConfig, Recipe, SourceConfig
from emma_train.errors import UserError
from emma_train.flops.work import module_flops, pack_work
from emma_train.plan import Machine, Plan, print_plan, problems
from emma_train.plan.autoencoder import DC_AE_F32C32, DC_AE_PARAMETERS, autoencoder_of
from emma_train.plan.cards import GIB
from emma_train.plan.roofline import step_seconds
from emma_train.plan.samples import MeanSample, image_tokens, tokenwise
from emma_train.plan.tables import image_notes
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.layout import ImageRole, ImageSegment, TextSegment
from emma_train.sequence.pack import ImageTokens, Sample, pack
from tests.distributed.ranks import command_memory
from tests.distributed.spawn import run_ranks

RECIPES = Path(__file__).parents[4] / "recipes"
FULL, TINY = RECIPES / "emma-4b", RECIPES / "tiny"

# Qwen3-4B, from its published sizes.
H, MLP, QUERY, KEY, VOCAB, LAYERS = 2560, 9728, 4096, 1024, 151936, 36
SHARED = H * QUERY + H * KEY + 2 * 128
LAYER = 2 * H * QUERY + 2 * H * KEY + 3 * H * MLP + 2 * H + 2 * 128
QWEN3_4B = VOCAB * H + LAYERS * LAYER + H
ADAPTER = 2 * 4608 + (4640 * H + H) + (H * H + H)
GEN_ADAPTER = ADAPTER + 4608 + (256 * H + H) + (H * H + H)
VISION = 413_534_448


def plan(path: Path, *overrides: str, gpus: int = 64, gpu: str = "h100-80g") -> Plan:
    return Plan(load_recipe(path, list(overrides)), str(path), gpus, gpu)


def toy(stage: str, *overrides: str, gpus: int = 1) -> Plan:
    """A tiny stage whose data and autoencoder are not on disk, so that sizes of samples are the assumed ones."""
    absent = ["data.sources=[{path: nowhere}]", "model.autoencoder.path=nowhere"]
    return plan(TINY / f"{stage}.yaml", *absent, *overrides, gpus=gpus)


@pytest.mark.parametrize("num_shared_layers", [0, 18, 36])
def test_each_branch_is_qwen3_4b_and_totals_follow_from_n(num_shared_layers: int) -> None:
    planned = plan(FULL / "stage1.yaml", f"model.decoder.num_shared_layers={num_shared_layers}")
    stored = {part.name: part.stored for part in planned.parts}
    shared, embedding = stored.get("decoder, shared", 0), stored["embedding and LM head"]
    assert QWEN3_4B == 4_022_468_096
    assert embedding + shared + stored["decoder, Und branch"] == QWEN3_4B
    assert embedding + shared + stored["decoder, Gen branch"] == QWEN3_4B
    decoder = 2 * QWEN3_4B - VOCAB * H - num_shared_layers * SHARED
    assert embedding + shared + stored["decoder, Und branch"] + stored["decoder, Gen branch"] == decoder
    assert planned.stored == decoder + VISION + ADAPTER + GEN_ADAPTER + H * 32 + 32
    assert planned.trained == planned.stored


def test_encoder_expert_and_autoencoder_counts() -> None:
    from diffusers import AutoencoderDC

    parts = {part.name: part for part in plan(FULL / "stage4_expert.yaml").parts}
    layer = 4 * (1152 * 1152 + 1152) + (1152 * 4304 + 4304) + (4304 * 1152 + 1152) + 4 * 1152
    assert parts["vision encoder"].stored == 27 * layer + 768 * 1152 + 1152 + 1024 * 1152 + 2 * 1152 == VISION
    assert parts["STEM expert"].stored == parts["STEM expert"].trained == 3 * layer == 45_718_512
    assert sum(part.trained for part in parts.values()) == 3 * layer
    like_encoder = {k.replace("encoder_", "decoder_"): v for k, v in DC_AE_F32C32.items() if k.startswith("encoder_")}
    blocks = {**like_encoder, "decoder_layers_per_block": [3] * 6, "upsample_block_type": "interpolate"}
    with torch.device("meta"):
        model = AutoencoderDC(**DC_AE_F32C32, **blocks)
    assert sum(p.numel() for p in model.parameters()) == DC_AE_PARAMETERS == 312_250_275


def test_active_parameters_of_a_token() -> None:
    planned = plan(FULL / "stage1.yaml")
    columns = zip(*(part.active for part in planned.parts), strict=True)
    text, und, reference, target = (sum(column) for column in columns)
    assert text == QWEN3_4B
    assert und == QWEN3_4B - VOCAB * H + VISION + ADAPTER
    assert reference == QWEN3_4B - VOCAB * H + VISION + GEN_ADAPTER
    assert target == QWEN3_4B - VOCAB * H + GEN_ADAPTER + H * 32 + 32


def test_a_reference_of_1024_pixels_takes_a_fifth_of_the_tokens() -> None:
    vae, least, most = tokenwise(1024)
    assert (vae, least, most) == (4096, 1024, 1369)
    emma = image_tokens(ImageConfig(mode="buckets", side=1024), 32)
    assert emma == 1024
    assert emma / (vae + least) == 1 / 5
    assert 1 / 5.4 < emma / (vae + most) < 1 / 5.3
    sample = plan(FULL / "stage3.yaml").loads[0].means["it2i"]
    assert (sample.seen, sample.made) == (1024, 1024)


def test_memory_of_a_toy_in_closed_form() -> None:
    least = ("engine.reshard_after_forward=true", "engine.reduce_every_micro_step=true")
    planned = toy("stage1", "ema.decay=0.99", "optimizer.kind=adamw", *least)
    load, n = planned.loads[0], planned.stored
    kept = planned.memory(load, 4, 1000).kept
    decoder = planned.recipe.model.decoder
    branch = 3 * 192 * 512 + 2 * 192 * 192 + 2 * 192 * 64 + 2 * 192 + 2 * 32
    vision_unit = planned.units[-1] if planned.units[-1] != 2 * branch else planned.units[0]
    assert planned.units.count(2 * branch) == decoder.num_layers - decoder.num_shared_layers
    root = n - sum(planned.units)
    assert kept["weights, fp32 shard"] == kept["gradients, fp32 shard"] == kept["average (EMA), fp32 shard"] == n
    assert kept["Adam moments, fp32 shards"] == 2 * n
    assert kept["gathered weights"] == 2 * (root + sum(sorted([vision_unit, 2 * branch, 2 * branch])[1:]))
    assert kept["gradients on their way"] == 6 * max(root, vision_unit, 2 * branch)
    assert kept["autoencoder, fp32 copy"] == 4 * DC_AE_PARAMETERS
    supervised = 1000 / load.tokens * 144 * 128  # 144 of 288 samples are I2T with 128 supervised tokens
    assert supervised > 256 and kept["logits"] == 256 * 1024 * 8
    assert planned.memory(load, 8, 1000).kept["Adam moments, fp32 shards"] == n
    unsharded = toy("stage1", "engine.reduce_every_micro_step=false").memory(load, 4, 1000).kept
    assert unsharded["gradients, fp32 whole"] == 4 * n


def test_what_is_frozen_has_no_optimizer_state() -> None:
    planned = plan(FULL / "stage0.yaml")
    kept = planned.memory(planned.loads[0], 1, 1000).kept
    assert planned.trained == ADAPTER
    assert (kept["Adam moments, fp32 shards"], kept["encoder's activations"]) == (8 * ADAPTER, 0)


def make_image(role: ImageRole, side: int) -> tuple[ImageSegment, ImageTokens]:
    patches = np.zeros((side * side * 4, 768), np.uint8)
    return ImageSegment(role.name, role), ImageTokens((side, side), patches, np.zeros((side * side, 32), np.float32))


def sample_of(task: str, text: int, supervised: int, side: int) -> Sample:
    asked, answered = TextSegment((1,) * (text - supervised)), TextSegment((2,) * supervised, supervised=True)
    target = make_image(ImageRole.TARGET, side)
    if task == "i2t":
        shown, pixels = make_image(ImageRole.UND, side)
        return Sample("a", task, [shown, asked, answered], {shown.name: pixels})
    if task == "t2i":
        return Sample("b", task, [asked, target[0]], {target[0].name: target[1]})
    shown, pixels = make_image(ImageRole.REFERENCE, side)
    return Sample("c", task, [shown, asked, target[0]], {shown.name: pixels, target[0].name: target[1]})


@pytest.mark.parametrize(
    ("stage", "switches"),
    [
        ("stage0", []),
        ("stage3", []),
        ("stage3", ["model.und_attention=full"]),
        ("stage3", ["model.fusion=token"]),
        ("stage0", ["model.adapters=one", "model.fusion=latent"]),
    ],
)
def test_flops_of_a_step_are_those_of_its_packs(stage: str, switches: list[str]) -> None:
    planned = toy(stage, "data.samples_per_step=36", "data.und.mode=square", "data.gen.mode=square", *switches)
    load = planned.loads[0]
    samples = [
        sample_of(task, int(mean.text), int(mean.supervised), 4)
        for task, mean in load.means.items()
        for _ in range(load.samples[task] // planned.recipe.data.slots)
    ]
    model = planned.recipe.model
    work = pack_work(pack([replace(s, rules=image_rules(model)) for s in samples]), model.vision.shuffle)
    expected = planned.recipe.data.slots * sum(module_flops(model, planned.stage.trainable, work).values())
    assert sum(planned.flops(load).values()) == expected


def test_time_at_a_measured_mfu_and_days_over_phases() -> None:
    recipe = load_recipe(FULL / "stage2.yaml")
    planned, twice = (Plan(recipe, "stage2.yaml", gpus, "h100-80g", mfu=0.4) for gpus in (64, 128))
    load = planned.loads[0]
    work = sum(planned.flops(load).values()) + planned.repeated_flops(load) + 2 * planned.encoding_flops(load)
    assert step_seconds(planned, load) == pytest.approx(work / (64 * 989.4e12 * 0.4))
    assert step_seconds(twice, load) == pytest.approx(step_seconds(planned, load) / 2)
    assert planned.phase_steps == [146484, 65104, 23438]
    shorter = plan(FULL / "stage2.yaml", "train.steps=150000")
    assert shorter.phase_steps == [146484, 3516, 0]


def test_muon_saves_a_moment_and_costs_its_iterations() -> None:
    adamw, muon = toy("stage0", "optimizer.kind=adamw"), toy("stage0", gpus=2)
    fc1, fc2 = (192, 4 * 128 + 32), (192, 192)  # of the Und adapter
    size = 192 * (fc1[1] + fc2[1])
    assert (muon.muon_shapes, muon.sizes.muon) == ([fc1, fc2], size)
    assert muon.newton_schulz_loads() == [5 * (4 * 192**2 * long + 2 * 192**3) for _, long in (fc1, fc2)]
    assert (adamw.muon_shapes, adamw.newton_schulz_loads(), adamw.optimizer_lines) == ([], [0], [])
    assert [line.split(":")[0] for line in muon.optimizer_lines] == ["Muon", "AdamW"]
    before, after = (planned.memory(planned.loads[0], 1, 1000) for planned in (adamw, muon))
    assert sum(before.kept.values()) - sum(after.kept.values()) == 4 * size
    assert (before.exchange, after.exchange) == (0, 2 * 3 * size)


def test_router_tuning_runs_the_shared_encoder_layers_alone() -> None:
    planned = plan(FULL / "stage4_router.yaml")
    patches = 1024 * 4096  # samples a step times patches of a mean image
    layer = 4 * 1152 * 1152 + 2 * 1152 * 4304 + 2 * 1152 * 4096
    assert planned.flops(planned.loads[0]) == {"vision encoder": 2 * patches * (24 * layer + 768 * 1152)}
    assert planned.encoding_flops(planned.loads[0]) == 0


def test_samples_are_measured_where_index_rows_are_at_hand() -> None:
    row = {"size": 800, "text_tokens": [10, 20], "supervised_tokens": [0, 0], "context": [[], []], "target": [0, 0]}
    text_only = {"text_tokens": [30], "context": [[]], "target": [-1], "widths": [], "heights": []}
    rows = [{**row, "widths": [64], "heights": [64]}, {**row, **text_only}]
    recipe = load_recipe(TINY / "stage1.yaml", ["data.sources=[{path: a}, {path: b, tasks: [i2t]}]"])

    def read(source: SourceConfig, task: str) -> list[dict[str, Any]] | None:
        return rows if source.path == "a" else None

    means = Plan(recipe, "stage1.yaml", 2, "h100-80g", read_index_rows=read).loads[0].means
    expected = MeanSample(
        text=22.5, supervised=0, seen=0, images_seen=0, made=8, measured=True, enlarged=0.5, read_bytes=800
    )
    assert means["t2i"] == expected
    assert not means["i2t"].measured, "one of its sources has no index"


def test_the_plan_says_which_samples_are_not_used_and_which_images_are_enlarged() -> None:
    """Of four targets for buckets of 1024² one is tiny, one is 8:1, one is enlarged 4-fold, and one is large enough."""
    row = {"size": 1, "text_tokens": [10], "supervised_tokens": [0], "context": [[]], "target": [0]}
    sizes = [(64, 64), (4096, 512), (512, 512), (1024, 1024)]
    rows = [{**row, "widths": [width], "heights": [height]} for width, height in sizes]
    words = ["data.sources=[{path: a}]", "data.gen={mode: buckets, side: 1024, min_side: 128}"]
    planned = Plan(
        load_recipe(TINY / "stage1.yaml", words), "stage1.yaml", 2, "h100-80g", read_index_rows=lambda *_: rows
    )
    notes = [note for note in image_notes(planned) if note.startswith("t2i")]
    assert notes == [
        "t2i: 50.0% of the samples are not used (data.gen.min_side=128, max_aspect=5)",
        "t2i: 50.0% of the samples have an image that is enlarged to more than twice its pixels; data.gen.min_side "
        "leaves small ones out",
    ]


def test_sources_count_by_their_weights() -> None:
    """Three rows of 10 tokens at weight 1 and one row of 50 at weight 3: a mean of 40, where the rows' mean is 20."""
    row = {"size": 1, "supervised_tokens": [0], "context": [[]], "target": [0], "widths": [64], "heights": [64]}
    rows = {"a": [{**row, "text_tokens": [10]}] * 3, "b": [{**row, "text_tokens": [50]}]}

    def text(sources: str) -> float:
        recipe = load_recipe(TINY / "stage1.yaml", [f"data.sources=[{sources}]"])
        means = (
            Plan(recipe, "stage1.yaml", 2, "h100-80g", read_index_rows=lambda source, task: rows[source.path])
            .loads[0]
            .means
        )
        return means["t2i"].text

    assert text("{path: a, weight: 1}, {path: b, weight: 3}") == 40
    assert text("{path: a}, {path: b}") == 20


def test_autoencoder_is_counted_from_its_folder() -> None:
    recipe: Recipe = load_recipe(TINY / "stage1.yaml")
    recipe.model.autoencoder.path = str(TINY / "assets" / "autoencoder")
    if not (TINY / "assets" / "autoencoder" / "config.json").is_file():
        pytest.skip("the tiny autoencoder is not here")
    count, _, exists = autoencoder_of(recipe)
    assert exists and 0 < count <= 4_000_000


def test_stage1_fits_64_h100_and_says_so_quickly(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.perf_counter()
    recipe = load_recipe(FULL / "stage1.yaml")
    assert print_plan(recipe, "stage1.yaml", Machine(64, "h100-80g"))[1] == 0
    assert time.perf_counter() - started < 10
    out = capsys.readouterr().out
    for number in ("4.022 B", "413.5 M", "312.3 M", "7.878 B", "5,120 to 5,465", "1/5.0", "244,141", "Fits on 64"):
        assert number in out
    assert max(len(line) for line in out.splitlines()) <= 100


@pytest.mark.seconds
def test_a_plan_does_not_take_the_models_memory() -> None:
    """The command, in a process that has planned another: 31.5 GB of weights stay numbers."""
    warm_up = ["plan", str(TINY / "stage1.yaml"), "--gpus", "6"]
    argv = ["plan", str(FULL / "stage1.yaml"), "--gpus", "64", "--gpu", "h100-80g"]
    (outcome,) = run_ranks(1, command_memory, warm_up, argv)
    assert 4 * plan(FULL / "stage1.yaml").stored > 31e9
    assert outcome.value < 20e6
    assert "4.022 B" in outcome.out and "1,024 tokens, token-wise 5,120 to 5,465 (1/5.0 to 1/5.3)" in outcome.out


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_stages_at_1k_fit_8_h100_because_layers_are_computed_again(stage: str) -> None:
    peaks = {}
    for mode in ("none", "selective", "full"):
        planned = plan(
            FULL / f"{stage}.yaml", f"engine.activation_checkpointing={mode}", "engine.compile=false", gpus=8
        )
        peaks[mode] = planned.peak(8, planned.recipe.data.pack_tokens) / GIB
        assert bool(problems(planned)) == (mode == "none")
    assert plan(FULL / f"{stage}.yaml").recipe.engine.activation_checkpointing == "selective"
    assert peaks["none"] > 71.28 > peaks["selective"] > 1.8 * peaks["full"]


def test_layers_computed_again_cost_another_forward() -> None:
    none, half, full = (
        plan(FULL / "stage1.yaml", f"engine.activation_checkpointing={mode}") for mode in ("none", "selective", "full")
    )
    load = none.loads[0]
    head = 2 * load.total(lambda s: s.supervised) * VOCAB * H
    assert none.repeated_flops(load) == head
    # Where everything trains, forward is a third of the useful work; adapters and patches are not computed again.
    useful = sum(none.flops(load).values())
    assert full.repeated_flops(load) == pytest.approx(useful / 3, rel=0.01)
    assert half.repeated_flops(load) - head == pytest.approx((full.repeated_flops(load) - head) / 2, rel=1e-2)
    assert full.flops(load) == none.flops(load)
    frozen = plan(FULL / "stage4_router.yaml", "engine.activation_checkpointing=full")
    assert frozen.repeated_flops(frozen.loads[0]) == 0


def test_stage1_does_not_fit_one_l40s_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(FULL / "stage1.yaml")
    assert print_plan(recipe, "stage1.yaml", Machine(1, "l40s-48g"))[1] == 1
    assert "Cannot run" in capsys.readouterr().out
    problem = problems(plan(FULL / "stage1.yaml", gpus=1, gpu="mi300x-192g"))[0]
    assert "2 GPUs" in problem
    two = plan(FULL / "stage1.yaml", gpus=2, gpu="mi300x-192g")
    assert not problems(two) and two.peak(2, 7168) < 191.5 * GIB


@pytest.mark.parametrize(("gpu", "runs"), [("h100-80g", True), ("l40s-48g", True), ("a100-80g", False)])
def test_fp8_is_planned_as_bf16_and_refused_where_cards_lack_it(
    capsys: pytest.CaptureFixture[str], gpu: str, runs: bool
) -> None:
    few = ["data.samples_per_step=48"]
    plain, planned = (toy("stage1", *few, *fp8).with_changes(gpu_name=gpu) for fp8 in ([], ["engine.fp8=tensorwise"]))
    assert step_seconds(planned, planned.loads[0]) == step_seconds(plain, plain.loads[0])
    assert [line for line in problems(planned) if "engine.fp8 is tensorwise" in line] == problems(planned)
    assert bool(problems(planned)) != runs
    assert print_plan(planned.recipe, "stage1.yaml", Machine(1, gpu))[1] == (not runs)
    out = " ".join(capsys.readouterr().out.split())
    assert "MFU, of the bf16 peak" in out and "as in bf16, for no card has measured engine.fp8 yet" in out


def test_gpus_that_do_not_divide_the_slots_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(FULL / "stage1.yaml")
    assert print_plan(recipe, "stage1.yaml", Machine(96, "h100-80g"))[1] == 1
    assert "64 or 128" in capsys.readouterr().out


def test_gpus_that_share_a_pack_hold_its_decoder_activations_together() -> None:
    one, two = (
        plan(FULL / "stage1.yaml", "engine.compile=false", f"engine.sequence_parallel={n}", gpus=64) for n in (1, 2)
    )
    load = one.loads[0]
    halved = two.memory(load, 64, 7000).kept
    for name, size in one.memory(load, 64, 7000).kept.items():
        assert halved[name] == size / (2 if name in ("decoder's activations", "one layer's backward") else 1), name
    assert not problems(plan(FULL / "stage1.yaml", "engine.compile=false", "engine.sequence_parallel=2", gpus=512))
    (problem,) = problems(plan(FULL / "stage1.yaml", "engine.compile=false", "engine.sequence_parallel=4", gpus=96))
    assert problem == "96 GPUs cannot share data.slots=256 evenly, 4 to a pack; 64 or 128 can"
    (problem,) = problems(plan(FULL / "stage1.yaml", "engine.replicate=3", gpus=64))
    assert "64 GPUs cannot share data.slots=256 evenly, in 3 replicas" in problem


def test_packs_longer_than_their_cap_cannot_run() -> None:
    lines = problems(plan(FULL / "stage1.yaml", "data.pack_tokens=6000"))
    assert len(lines) == 1 and "6,144 tokens on average" in lines[0]


def test_unknown_gpu_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="--gpu h1000: .*h100-80g"):
        plan(FULL / "stage1.yaml", gpu="h1000")
    with pytest.raises(UserError, match="--gpus 0"):
        plan(FULL / "stage1.yaml", gpus=0)
