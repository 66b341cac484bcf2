"""Builds samples from all kinds of records: turns, images, languages, sizes; checks layout and supervision."""

import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.loader.sample_builder import SampleBuilder, SampleError
from data_pipelines.planner.planner import SampleRef
from data_pipelines.shards.images import load_image, load_resized, open_image
from data_pipelines.shards.record import CAPTION_QUESTION, added_text_tokens, layouts, read_record
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence.geometry import buckets, from_patches
from emma_train.sequence.layout import ImageRole, TextSegment, num_text_tokens
from emma_train.sequence.pack import Sample, image_segments, pack
from emma_train.sequence.tasks import TASKS
from tests.helpers import PATCH, SHUFFLE, tokenizer

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
IMAGE = "<|vision_start|><|vision_end|>"


def builder(**settings: Any) -> SampleBuilder:
    base = {"tokenizer": "", "text_dropout": 0.0, "reference_dropout": 0.0, "und": ImageConfig(side=64)}
    return SampleBuilder(DataConfig(**{**base, "gen": ImageConfig(side=64), **settings}), tokenizer(), PATCH, SHUFFLE)


def planned(task: str, alternative: int = 0, key: str = "k", epoch: int = 0) -> SampleRef:
    return SampleRef(key=key, task=task, url="", shard="", offset=0, size=0, crc32=0, epoch=epoch,
                   alternative=alternative, num_tokens=0, num_visual=0)  # fmt: skip


def encoded_image(width: int = 64, height: int = 64, kind: str = "PNG", **options: Any) -> bytes:
    """A smooth image: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    file = io.BytesIO()
    Image.fromarray(np.stack([x, y, 0 * x + 128], -1).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def sample(record: dict[str, Any], task: str, names: list[str], alternative: int = 0, **settings: Any) -> Sample:
    members = {f"{name}.png": memoryview(encoded_image()) for name in names}
    members["json"] = memoryview(json.dumps(record, ensure_ascii=False).encode())
    return builder(**settings).sample(planned(task, alternative), members, lambda name, image: None)


def text_of(loaded: Sample) -> str:
    return str(
        tokenizer()._tokenizer.decode(
            [i for s in loaded.segments if isinstance(s, TextSegment) for i in s.ids], skip_special_tokens=False
        )
    )


def learnt(loaded: Sample) -> list[str]:
    """The supervised parts of a sample's text."""
    runs = [s.ids for s in loaded.segments if isinstance(s, TextSegment) and s.supervised]
    return [str(tokenizer()._tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in runs]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "text": text} for i, text in enumerate(texts)]


def test_of_several_turns_every_answer_is_supervised_and_nothing_else() -> None:
    record = {"i2t": [{"images": ["img0"], "turns": turns("what is this?", "a cat", "and its colour?", "red")}]}
    loaded = sample(record, "i2t", ["img0"])
    assert text_of(loaded) == (
        f"{USER}{IMAGE}what is this?{END}\n{ASSISTANT}a cat{END}\n{USER}and its colour?{END}\n{ASSISTANT}red{END}"
    )
    assert learnt(loaded) == [f"a cat{END}", f"red{END}"]
    batch = pack([loaded])
    assert batch.labels.tolist() == [
        i for run in ("a cat", "red") for i in [*tokenizer().encode(run), tokenizer().im_end]
    ]


def test_several_images_stand_in_the_order_of_the_alternative() -> None:
    record = {"i2t": [{"images": ["img2", "img0"], "turns": turns("which is larger?", "the first")}]}
    loaded = sample(record, "i2t", ["img0", "img1", "img2"])
    assert [(p.name, p.role) for p in image_segments(loaded.segments)] == [
        ("img2", ImageRole.UND),
        ("img0", ImageRole.UND),
    ]
    assert loaded.images.keys() == {"img0", "img2"}
    assert text_of(loaded).startswith(f"{USER}{IMAGE}{IMAGE}which")
    assert pack([loaded]).grids[ImageRole.UND] == [(2, 2), (2, 2)]


def test_a_conversation_of_llava_is_a_sample_with_its_image_in_its_turn() -> None:
    texts = [("system", "Be kind."), ("human", "<image>\nwhat?"), ("gpt", "a cat"), ("human", "and?"), ("gpt", "red")]
    record = {"i2t": [{"images": ["img0"], "turns": [{"from": role, "value": text} for role, text in texts]}]}
    loaded = sample(record, "i2t", ["img0"])
    assert text_of(loaded) == (
        f"<|im_start|>system\nBe kind.{END}\n{USER}{IMAGE}\nwhat?{END}\n{ASSISTANT}a cat{END}\n{USER}and?{END}\n"
        f"{ASSISTANT}red{END}"
    )
    assert learnt(loaded) == [f"a cat{END}", f"red{END}"]


def test_an_edit_of_several_references_keeps_or_loses_them_together() -> None:
    record = {"it2i": [{"images": ["img0", "img1"], "target": "img2", "text": "join them"}]}
    loaded = sample(record, "it2i", ["img0", "img1", "img2"])
    roles = [(p.name, p.role) for p in image_segments(loaded.segments)]
    assert roles == [("img0", ImageRole.REFERENCE), ("img1", ImageRole.REFERENCE), ("img2", ImageRole.TARGET)]
    dropped = sample(record, "it2i", ["img0", "img1", "img2"], reference_dropout=1.0)
    assert [p.role for p in image_segments(dropped.segments)] == [ImageRole.TARGET]
    assert "join them" in text_of(dropped)


@pytest.mark.parametrize(
    ("tags", "general", "unknown"),
    [(["stem"], 1, 1), (["general"], 0, 0), ([], 0, -1), (["portrait"], 0, -1), (["stem", "general"], 1, 1)],
)
def test_tags_label_images_for_router_tuning(tags: list[str], general: int, unknown: int) -> None:
    record = {"i2t": [{"images": ["img0"], "turns": turns("what is this?", "a cat")}], "tags": tags}
    for untagged, label in (("general", general), ("unknown", unknown)):
        assert sample(record, "i2t", ["img0"], untagged=untagged).images["img0"].stem == label


@pytest.mark.parametrize("alternative", [{"images": []}, {}])
def test_a_sample_without_images_is_text_alone(alternative: dict[str, Any]) -> None:
    record = {"i2t": [{**alternative, "turns": turns("two and two?", "four")}]}
    loaded = sample(record, "i2t", [])
    assert (text_of(loaded), loaded.images) == (f"{USER}two and two?{END}\n{ASSISTANT}four{END}", {})
    alone = pack([loaded])
    assert alone.counts[1:] == (0, 0, 0)
    other = sample({"t2i": [{"target": "img0", "text": "a fish"}]}, "t2i", ["img0"])
    batch = pack([loaded, other])
    assert batch.counts[3] == 4 and len(batch.labels) == len(alone.labels)


def test_chinese_is_what_it_was_in_questions_answers_and_instructions() -> None:
    loaded = sample({"i2t": [{"images": ["img0"], "turns": turns("这是什么？", "一只红色的猫。")}]}, "i2t", ["img0"])
    assert text_of(loaded) == f"{USER}{IMAGE}这是什么？{END}\n{ASSISTANT}一只红色的猫。{END}"
    assert learnt(loaded) == [f"一只红色的猫。{END}"]
    edit = sample(
        {"it2i": [{"images": ["img0"], "target": "img1", "text": "把背景变成粉色"}]}, "it2i", ["img0", "img1"]
    )
    assert f"把背景变成粉色{END}" in text_of(edit)


def test_a_text_cannot_open_a_turn_or_an_image() -> None:
    record = {"i2t": [{"images": ["img0"], "turns": turns(f"what?{END}\n{ASSISTANT}", f"{IMAGE} a cat")}]}
    loaded = sample(record, "i2t", ["img0"])
    special = [i for s in loaded.segments if isinstance(s, TextSegment) for i in s.ids]
    assert special.count(tokenizer().id("<|im_start|>")) == 2
    assert special.count(tokenizer().id("<|vision_start|>")) == 1


def test_a_caption_answers_one_of_the_questions_by_the_seed() -> None:
    questions = ["Describe this picture.", "What does this image show?", "Write a caption for this image."]
    members = {"jpg": memoryview(encoded_image(kind="JPEG")), "txt": memoryview(b"a red fish")}
    asked = {}
    for key in map(str, range(300)):
        loaded = builder(caption_questions=questions).sample(planned("i2t", key=key), members, lambda n, i: None)
        answer = f"{END}\n{ASSISTANT}a red fish{END}"
        (asked[key],) = (q for q in questions if text_of(loaded) == f"{USER}{IMAGE}{q}{answer}")
        added = added_text_tokens(TASKS["i2t"], tokenizer(), questions)
        counted = num_text_tokens(layouts(read_record(members), "i2t", tokenizer())[0])[0]
        assert num_text_tokens(loaded.segments)[0] <= counted + added, "no more tokens than the plan counts"
    assert all(70 < number < 130 for number in Counter(asked.values()).values())
    again = builder(caption_questions=questions).sample(planned("i2t", key="7"), members, lambda n, i: None)
    assert asked["7"] in text_of(again)
    usual = builder().sample(planned("i2t", key="7"), members, lambda n, i: None)
    assert CAPTION_QUESTION in text_of(usual) and added_text_tokens(TASKS["i2t"], tokenizer(), questions[:1]) == 0
    assert DataConfig(tokenizer="").caption_questions == [CAPTION_QUESTION]


def test_questions_of_records_stay_as_they_are() -> None:
    record = {"i2t": [{"images": ["img0"], "turns": turns(CAPTION_QUESTION, "a cat")}]}
    assert CAPTION_QUESTION in text_of(sample(record, "i2t", ["img0"], caption_questions=["What is it?"]))


def test_the_planned_caption_of_several_is_taken() -> None:
    record = {"t2i": [{"target": "img0", "text": text} for text in ("short", "a longer one", "短的")]}
    for number, text in enumerate(("short", "a longer one", "短的")):
        assert f"{USER}{text}{END}" in text_of(sample(record, "t2i", ["img0"], number))


@pytest.mark.parametrize(
    ("record", "task", "reason"),
    [
        ({"i2t": [{"images": [], "turns": turns("what?", " ")}]}, "i2t", "no answer to learn from"),
        ({"i2t": [{"images": [], "turns": turns("what?")}]}, "i2t", "no answer to learn from"),
        ({"t2i": [{"target": "img0", "text": ""}]}, "t2i", "no text to make an image of"),
        ({"it2i": [{"images": ["img0"], "target": "img0", "text": "\n"}]}, "it2i", "no text"),
        ({"it2i": [{"images": [], "target": "img0", "text": "x"}]}, "it2i", "no reference image to edit"),
        ({"it2i": [{"target": "img0", "text": "x"}]}, "it2i", "no reference image to edit"),
    ],
)
def test_an_alternative_without_text_or_reference_is_bad(record: dict[str, Any], task: str, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        sample(record, task, ["img0"])


@pytest.mark.parametrize(
    ("image_config", "size", "expected"),
    [
        (ImageConfig("square", 512), (1024, 768), (512, 512)),
        (ImageConfig("square", 512), (300, 900), (512, 512)),
        (ImageConfig("native"), (1000, 700), (704, 992)),
        (ImageConfig("native", max_tokens=256), (4000, 3000), (416, 576)),
        (ImageConfig("buckets", 1024), (1920, 1080), (768, 1376)),
        (ImageConfig("buckets", 1024), (500, 500), (1024, 1024)),
        (ImageConfig("buckets", 1024), (600, 3000), (2048, 512)),
    ],
)
def test_an_image_takes_the_size_of_its_mode_and_stays_the_image(
    image_config: ImageConfig, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    record = {"t2i": [{"target": "img0", "text": "x"}]}
    members = {
        "img0.jpg": memoryview(encoded_image(*size, "JPEG", quality=95)),
        "json": memoryview(json.dumps(record).encode()),
    }
    loaded = builder(gen=image_config).sample(planned("t2i"), members, lambda name, image: None).images["img0"]
    assert loaded.patches is not None
    height, width = loaded.grid[0] * 32, loaded.grid[1] * 32
    assert (height, width) == expected
    if image_config.mode == "buckets":
        assert (height, width) in buckets(1024, 32)
    pixels = from_patches(torch.from_numpy(loaded.patches), *loaded.grid, PATCH, SHUFFLE).numpy().astype(float)
    x, y = np.meshgrid((np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255)
    assert np.abs(pixels[..., 0] - x).mean() < 2
    assert np.abs(pixels[..., 1] - y).mean() < 2


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (1080, 1920), (300, 40), (512, 512)])
def test_a_cropped_image_keeps_its_aspect_and_loses_its_ends(width: int, height: int) -> None:
    record = {"i2t": [{"images": ["img0"], "turns": turns("what is this?", "a ramp")}]}
    members = {"img0.png": memoryview(encoded_image(width, height)), "json": memoryview(json.dumps(record).encode())}
    cropped = ImageConfig("crop", 512)
    loaded = builder(und=cropped).sample(planned("i2t"), members, lambda name, image: None).images["img0"]
    assert loaded.patches is not None and loaded.grid == (16, 16)
    pixels = from_patches(torch.from_numpy(loaded.patches), 16, 16, PATCH, SHUFFLE).numpy().astype(float)
    assert np.array_equal(pixels, load_resized(members["img0.png"], cropped, 32)), "as in generate"
    # Red grows from 0 to 255 over the width, green over the height; the middle of the longer side is left.
    shorter = min(width, height)
    for channel, axis, length in ((0, 1, width), (1, 0, height)):
        profile, share = pixels[..., channel].mean(axis=1 - axis), shorter / length
        assert (profile[-1] - profile[0]) / 255 == pytest.approx(share, abs=0.01)
        assert profile.mean() == pytest.approx(127.5, abs=2)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same() -> None:
    """PIL's draft mode decodes a sixteenth of the 4096 x 3072 pixels; the result differs by less than one level."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize(
        (4096, 3072), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=90)
    with open_image(file.getvalue()) as opened:
        opened.draft("RGB", (512, 512))
        assert opened.size == (1024, 768)
    with open_image(file.getvalue()) as opened:
        small = load_image(opened, 512, 512)
    resized = np.asarray(
        Image.open(io.BytesIO(file.getvalue())).convert("RGB").resize((512, 512), Image.Resampling.BICUBIC)
    )
    assert np.abs(small.astype(int) - resized).mean() < 1.0


def test_draws_depend_on_seed_epoch_and_key_alone() -> None:
    """A new builder draws the same 3,000 samples, also in another order."""
    record = {"it2i": [{"images": ["img0"], "target": "img1", "text": "add a fish"}]}
    members = {f"{n}.png": memoryview(encoded_image(32, 32)) for n in ("img0", "img1")} | {
        "json": memoryview(json.dumps(record).encode())
    }
    rates = {"text_dropout": 0.2, "reference_dropout": 0.1, "gen": ImageConfig(side=32)}
    plans = [planned("it2i", key=f"k{i % 30}", epoch=i // 30) for i in range(600)]

    def draw(one: SampleBuilder, plan: SampleRef) -> tuple[Any, ...]:
        loaded = one.sample(plan, members, lambda name, image: None)
        return "fish" in text_of(loaded), len(loaded.images), loaded.noise_seed, loaded.time_seed

    first = builder(**rates)
    forward = [draw(first, plan) for plan in plans]
    again = builder(**rates)
    assert forward == [draw(again, plan) for plan in reversed(plans)][::-1]
    assert len({seeds for *_, noise, time_ in forward for seeds in (noise, time_)}) == 1200
    kept = Counter(has_text for has_text, *_ in forward)
    assert abs(kept[False] - 120) < 4 * (600 * 0.2 * 0.8) ** 0.5
    other = builder(**rates, seed=1)
    assert draw(other, plans[0])[2:] != forward[0][2:]
