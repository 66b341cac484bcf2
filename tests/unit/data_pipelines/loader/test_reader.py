"""Reading planned samples: the bytes are verified, unusable samples raise SampleError, dropout follows its rates."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from data_pipelines.cli import main
from data_pipelines.loader.reader import SampleReader
from data_pipelines.loader.sample_builder import SampleError
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.planner.planner import Planner
from data_pipelines.shards.encode_latents import cache_latents
from data_pipelines.shards.images import load_image
from data_pipelines.shards.latents import latents_metadata, latents_path, transform_name
from emma_train.config.schema import ImageConfig, Recipe
from emma_train.model.autoencoder import Autoencoder
from emma_train.sequence.layout import ImageRole, TextSegment
from emma_train.sequence.pack import PackedBatch, Sample, image_segments, pack
from emma_train.sequence.tokens import TextTokenizer
from emma_train.training.forward import clean_latents
from tests.helpers import PATCH, SHUFFLE, tiny_model, tiny_recipe, tokenizer
from tests.shards import damage, edit, every_task, png, prompt, question, write_shards

ALL = {"i2t": 1, "t2i": 1, "it2i": 1}


def recipe_of(folder: Path, **dotted: Any) -> Recipe:
    dotted = {"data__text_dropout": 0.0, "data__reference_dropout": 0.0, **dotted}
    return tiny_recipe(data__sources=[{"path": str(folder)}], data__pack_tokens=10**6, **dotted)


def reader_of(recipe: Recipe, autoencoder_fingerprint: str | None = None) -> SampleReader:
    return SampleReader(recipe.data, tokenizer_of(recipe), PATCH, SHUFFLE, autoencoder_fingerprint)


def tokenizer_of(recipe: Recipe) -> TextTokenizer:
    return TextTokenizer(recipe.data.tokenizer, recipe.data.template)


def planned_of(recipe: Recipe, num: int) -> Iterator[SampleRef]:
    """Samples of the first steps, until there are `num` of each task of the mix."""
    plans = Planner(recipe, tokenizer_of(recipe))
    step = 0
    while num > 0:
        step += 1
        plan = plans.plan(step)
        yield from (sample for slot in plan.slots for sample in slot)
        num -= sum(len(slot) for slot in plan.slots) // 3


def only(task: str, num: int) -> dict[str, Any]:
    """Overrides for one task, `num` samples in one slot."""
    return {"mix": {**dict.fromkeys(ALL, 0), task: 1}, "data__slots": 1, "data__samples_per_step": num}


def plan_one(folder: Path, task: str) -> tuple[Recipe, SampleRef]:
    recipe = recipe_of(folder, **only(task, 1))
    return recipe, Planner(recipe, tokenizer()).plan(1).slots[0][0]


def text_of(sample: Sample) -> str:
    ids = [i for segment in sample.segments if isinstance(segment, TextSegment) for i in segment.ids]
    return str(tokenizer()._tokenizer.decode(ids, skip_special_tokens=False))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("reader") / "set", every_task(20, side=64), per_shard=25)


@pytest.mark.parametrize("template", ["plain", "no_think"])
def test_a_sample_has_the_tokens_that_its_plan_counted(template: str) -> None:
    recipe = tiny_recipe(data__text_dropout=0.0, data__reference_dropout=0.0, data__template=template)
    reader = reader_of(recipe)
    for planned in list(planned_of(recipe, 24)):
        sample = reader.read(planned)
        assert (sample.key, sample.task, sample.num_tokens) == (planned.key, planned.task, planned.num_tokens)
        seen = [p for p in image_segments(sample.segments) if p.role is not ImageRole.TARGET]
        grids = [sample.images[p.name].grid for p in seen]
        assert sum(rows * columns for rows, columns in grids) == planned.num_visual


def test_layouts_of_the_tasks_read_as_documented(small: Path) -> None:
    recipe = recipe_of(small)
    samples = {p.task: (p, reader_of(recipe).read(p)) for p in planned_of(recipe, 4)}
    user, assistant, image = (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|vision_start|><|vision_end|>",
    )
    words = ("add a fish", "remove the fish")[samples["it2i"][0].alternative]
    assert text_of(samples["i2t"][1]) == f"{user}{image}What is this?{assistant}a cat<|im_end|>"
    assert text_of(samples["t2i"][1]) == f"{user}a red fish{assistant}<|vision_start|>"
    assert text_of(samples["it2i"][1]) == f"{user}{image}{words}{assistant}<|vision_start|>"


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [prompt("p000", side=64)])
    recipe, planned = plan_one(folder, "t2i")
    patches = reader_of(recipe).read(planned).images["img0"].patches
    tar = (folder / "shard-000000.tar").read_bytes()
    start = tar.index(b"\x89PNG")
    (tmp_path / "copy.png").write_bytes(tar[start:])
    expected = np.asarray(Image.open(tmp_path / "copy.png").convert("RGB"))
    assert patches is not None
    # Blocks of 32 x 32 in raster order, their four 16 x 16 patches in raster order.
    blocks = [expected[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    quarters = [b[y : y + 16, x : x + 16].reshape(-1) for b in blocks for y in (0, 16) for x in (0, 16)]
    np.testing.assert_array_equal(patches, np.stack(quarters))


def test_seeds_are_a_function_of_seed_epoch_and_key_alone(small: Path) -> None:
    recipe = recipe_of(small)
    planned = next(p for p in planned_of(recipe, 4) if p.task == "t2i")
    one, again = reader_of(recipe).read(planned), reader_of(recipe).read(planned)
    later = reader_of(recipe).read(dataclasses.replace(planned, epoch=planned.epoch + 1))
    reseeded = recipe_of(small, data__seed=1)
    other = reader_of(reseeded).read(planned)
    assert (one.noise_seed, one.time_seed) == (again.noise_seed, again.time_seed)
    assert len({one.noise_seed, later.noise_seed, other.noise_seed, one.time_seed, later.time_seed}) == 5


def test_condition_dropout_follows_its_rates_and_is_reproducible(tmp_path: Path) -> None:
    """4,000 edits: empty instructions at 0.1, dropped references at 0.3, both at 0.03, each within four sigma."""
    folder = write_shards(tmp_path, [edit(f"e{i:03d}") for i in range(40)])
    rates = {"data__text_dropout": 0.1, "data__reference_dropout": 0.3}
    recipe = recipe_of(folder, **only("it2i", 40), data__gen={"side": 32}, **rates)
    reader = reader_of(recipe)
    plans = Planner(recipe, tokenizer())
    drops = []
    for planned in (p for step in range(1, 101) for p in plans.plan(step).slots[0]):
        sample = reader.read(planned)
        has_text, has_reference = "fish" in text_of(sample), len(sample.images) == 2
        assert has_reference == ("<|vision_end|>" in text_of(sample))
        drops.append((not has_text, not has_reference))
    num = len(drops)
    assert num == 4000
    for loaded, rate in (
        (sum(text for text, _ in drops), 0.1),
        (sum(reference for _, reference in drops), 0.3),
        (sum(text and reference for text, reference in drops), 0.03),
    ):
        assert abs(loaded - num * rate) < 4 * (num * rate * (1 - rate)) ** 0.5
    assert text_of(reader_of(recipe).read(plans.plan(3).slots[0][7])) == text_of(reader.read(plans.plan(3).slots[0][7]))


def test_understanding_never_loses_its_question_or_image(small: Path) -> None:
    recipe = recipe_of(small, **only("i2t", 20), data__text_dropout=1.0, data__reference_dropout=1.0)
    for planned in Planner(recipe, tokenizer()).plan(1).slots[0]:
        sample = reader_of(recipe).read(planned)
        assert "What is this?" in text_of(sample)
        assert len(sample.images) == 1


def test_stem_labels_come_from_tags_and_only_for_images_to_understand(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [question("q0", tags=["stem"]), question("q1"), prompt("p0"), edit("e0")])
    recipe = recipe_of(folder, data__slots=1, data__samples_per_step=6)
    samples = [reader_of(recipe).read(p) for p in Planner(recipe, tokenizer()).plan(1).slots[0]]
    labels = {s.key: [p.stem for p in s.images.values()] for s in samples}
    assert labels["q0"] == [1]
    assert labels["q1"] == [0]
    assert labels["p0"] == [-1]
    batch = pack([s for s in samples if s.task == "i2t"])
    assert sorted(batch.stem.tolist()) == [0, 1]


def test_bytes_that_changed_since_the_index_are_a_bad_sample(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [question("q000")])
    recipe, planned = plan_one(folder, "i2t")
    damage(folder / "shard-000000.tar", "q000.img0.png", 1)
    with pytest.raises(SampleError, match=r"shard-000000\.tar: bytes differ from the index's crc32"):
        reader_of(recipe).read(planned)


def test_a_shard_that_ends_too_early_is_a_bad_sample(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [question("q000")])
    recipe, planned = plan_one(folder, "i2t")
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1024])
    with pytest.raises(SampleError, match=rf"ends within the record: 1024 of {planned.size} bytes"):
        reader_of(recipe).read(planned)


def test_an_image_that_cannot_be_decoded_is_a_bad_sample(tmp_path: Path) -> None:
    """An image with a complete header, so that it can be indexed, but without its end."""
    key, record, _ = question("q000")
    folder = write_shards(tmp_path, [(key, record, {"img0.png": png(0, 64)[:3000]})])
    recipe, planned = plan_one(folder, "i2t")
    with pytest.raises(SampleError, match=r"OSError: .*truncated"):
        reader_of(recipe).read(planned)


def test_transparent_images_lie_on_white() -> None:
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    np.testing.assert_array_equal(load_image(transparent, 4, 4), np.full((4, 4, 3), 255))
    assert load_image(Image.new("L", (10, 6), 7), 32, 64).shape == (32, 64, 3)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder(tiny_model().autoencoder, torch.device("cpu"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cached latents at 64 pixels."""
    folder = write_shards(tmp_path_factory.mktemp("cached") / "set", every_task(6, side=80), per_shard=7)
    tiny = tiny_model().autoencoder
    num = cache_latents(folder, tiny, [ImageConfig(side=64)], torch.device("cpu"), dtype="float32")
    assert num == 6 + 6 + 12
    return folder


def pack_of(recipe: Recipe, num: int, mark: str) -> PackedBatch:
    return pack([reader_of(recipe, mark).read(planned) for planned in planned_of(recipe, num)])


def test_cached_latents_are_those_of_online_encoding(cached: Path, autoencoder: Autoencoder) -> None:
    recipe = recipe_of(cached)
    planned = list(planned_of(recipe, 6))
    with_cache = pack([reader_of(recipe, autoencoder.fingerprint).read(p) for p in planned])
    without = pack([reader_of(recipe).read(p) for p in planned])
    assert with_cache.latents is not None
    assert without.latents is None
    # Targets are not even decoded where their latent is known.
    assert len(with_cache.patches) == len(without.patches) - 4 * with_cache.counts[3]
    lazy = Autoencoder(tiny_model().autoencoder, torch.device("cpu"), load=False)
    latents = clean_latents(with_cache, lazy)
    assert "_model" not in vars(lazy)
    assert torch.equal(latents, clean_latents(without, autoencoder))
    assert torch.equal(latents, clean_latents(without, lazy))


def test_latents_in_float16_take_half_of_the_space_and_are_rounded(
    cached: Path, tmp_path: Path, autoencoder: Autoencoder
) -> None:
    """To 11 bits, which is nearer than TF32, in which a GPU encodes."""
    folder = write_shards(tmp_path / "set", every_task(6, side=80), per_shard=7)
    assert main(["cache-latents", str(folder), "--autoencoder", tiny_model().autoencoder.path, "--side", "64"]) == 0
    exact, half = (pack_of(recipe_of(f), 6, autoencoder.fingerprint).latents for f in (cached, folder))
    assert exact is not None and half is not None and half.dtype == torch.float32
    assert not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, rtol=2**-11, atol=1e-6)
    for path in cached.glob("*.latents.safetensors"):
        values, halves = load_file(path), load_file(folder / path.name)
        assert all(halves[name].nbytes * 2 == value.nbytes for name, value in values.items())
        # Whoever may read the shards may read the latents.
        assert (folder / path.name).stat().st_mode == (folder / "manifest.json").stat().st_mode


def test_a_latent_that_is_not_finite_is_left_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = Autoencoder.encode

    def too_large(self: Autoencoder, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        first, *others = encode(self, images)
        return [first * 1e6, *others]

    monkeypatch.setattr(Autoencoder, "encode", too_large)
    folder = write_shards(tmp_path, [prompt("p000", side=64), prompt("p001", side=64)])
    cache_latents(folder, tiny_model().autoencoder, [ImageConfig(side=64)], torch.device("cpu"))
    assert list(load_file(folder / "shard-000000.square-64.latents.safetensors")) == ["p001/img0"]
    assert "the latent of p000/img0 has values that are not finite as float16" in caplog.text


def test_a_cache_of_another_autoencoder_or_of_other_images_is_ignored(cached: Path, autoencoder: Autoencoder) -> None:
    recipe = recipe_of(cached)
    planned = next(p for p in planned_of(recipe, 2) if p.task == "t2i")
    same_autoencoder = reader_of(recipe, autoencoder.fingerprint)
    assert same_autoencoder.read(planned).images["img0"].latent is not None
    assert reader_of(recipe, "0123456789abcdef").read(planned).images["img0"].latent is None
    rewritten = dataclasses.replace(planned, shard="0" * 64)
    assert same_autoencoder.read(rewritten).images["img0"].latent is None
    assert reader_of(recipe).read(planned).images["img0"].latent is None


def test_an_image_that_cannot_be_decoded_is_left_out_of_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, record, parts = prompt("p001", side=64)
    half = (key, record, {"img0.png": parts["img0.png"][:3000]})
    folder = write_shards(tmp_path, [prompt("p000", side=64), half, prompt("p002", side=64)])
    assert cache_latents(folder, tiny_model().autoencoder, [ImageConfig(side=64)], torch.device("cpu")) == 2
    assert "image img0 of p001 cannot be read" in caplog.text
    assert sorted(load_file(folder / "shard-000000.square-64.latents.safetensors")) == ["p000/img0", "p002/img0"]


def test_processes_share_the_shards_of_a_cache(cached: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", every_task(6, side=80), per_shard=7)
    images, tiny = [ImageConfig(side=64)], tiny_model().autoencoder
    numbers = [cache_latents(folder, tiny, images, torch.device("cpu"), rank, 2, "float32") for rank in range(2)]
    assert sum(numbers) == 6 + 6 + 12
    assert min(numbers) > 0
    for path in cached.glob("*.latents.safetensors"):
        alone, together = load_file(path), load_file(folder / path.name)
        assert alone.keys() == together.keys()
        assert all(np.array_equal(alone[name], together[name]) for name in alone)


def test_a_cache_of_another_size_is_another_file(cached: Path, autoencoder: Autoencoder) -> None:
    recipe = recipe_of(cached, data__gen={"side": 96}, data__und={"side": 64})
    for planned in planned_of(recipe, 2):
        pixels = list(reader_of(recipe, autoencoder.fingerprint).read(planned).images.values())
        assert all((p.latent is not None) == (planned.task == "i2t") for p in pixels)


def test_native_latents_are_used_where_the_command_had_the_limits_of_the_recipe(
    tmp_path: Path, autoencoder: Autoencoder
) -> None:
    folder = write_shards(tmp_path, [question("q000", side=64)])
    words = ["cache-latents", str(folder), "--autoencoder", tiny_model().autoencoder.path, "--mode", "native"]
    assert main([*words, "--max-tokens", "100", "--min-pixels", str(96 * 96)]) == 0
    for limits, is_cached in (
        ({"max_tokens": 100, "min_pixels": 96 * 96}, True),
        ({"max_tokens": 100}, False),
        ({"min_pixels": 96 * 96}, False),
    ):
        recipe = recipe_of(folder, data__und={"mode": "native", **limits}, **only("i2t", 1))
        planned = Planner(recipe, tokenizer()).plan(1).slots[0][0]
        (image,) = reader_of(recipe, autoencoder.fingerprint).read(planned).images.values()
        assert (image.latent is not None) == is_cached
        assert image.grid == ((3, 3) if "min_pixels" in limits else (2, 2))


def test_an_image_that_came_after_the_cache_is_encoded_online(tmp_path: Path, autoencoder: Autoencoder) -> None:
    folder = write_shards(tmp_path, [prompt("p000", side=64)])
    cache_latents(folder, tiny_model().autoencoder, [ImageConfig(side=64)], torch.device("cpu"))
    recipe, planned = plan_one(folder, "t2i")
    path = latents_path(folder / "shard-000000.tar", transform_name(recipe.data.gen))
    assert list(load_file(path)) == ["p000/img0"]
    other = tmp_path / "other"
    folder = write_shards(other, [prompt("p000", side=64)])
    _, planned = plan_one(folder, "t2i")
    others = {"p001/img0": np.zeros((4, 32), np.float32)}
    metadata = latents_metadata(autoencoder.fingerprint, planned.shard, others)
    save_file(others, latents_path(folder / "shard-000000.tar", "square-64"), metadata)
    pixels = reader_of(recipe, autoencoder.fingerprint).read(planned).images["img0"]
    assert pixels.latent is None
    assert pixels.patches is not None
