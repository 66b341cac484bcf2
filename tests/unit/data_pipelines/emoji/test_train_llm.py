"""The tiny Qwen3: what it reads, a short training, and the weights in the repository."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from data_pipelines.emoji import train_llm
from data_pipelines.emoji.foundation import MEASURES_FILE
from data_pipelines.emoji.splits import HELDOUT_DRAWINGS, TRAIN, is_heldout_concept
from data_pipelines.emoji.train_llm import (
    caption_perplexity,
    padded,
    record_sequences,
    split_captions,
    text_loss,
    unigram_perplexity,
)
from emma_train.config.load import load_recipe
from emma_train.export.hf_names import decoder_config
from emma_train.export.import_hf import import_pretrained
from emma_train.sequence.tokens import TextTokenizer
from tests import public
from tests.helpers import ASSETS, ROOT

TINY = load_recipe(ROOT / "recipes" / "tiny" / "stage0.yaml")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(ASSETS / "tokenizer")


def written(sequence: Sequence[int], tokenizer: TextTokenizer) -> str:
    return str(tokenizer._tokenizer.decode(list(sequence), skip_special_tokens=False))


def test_texts_of_a_record_are_laid_out_as_the_stages_do(tokenizer: TextTokenizer) -> None:
    turns = [{"role": "user", "text": "What is this?"}, {"role": "assistant", "text": "cat"}]
    record = {
        "i2t": [{"images": ["img0"], "turns": turns}],
        "t2i": [{"target": "img0", "text": "a flat cat"}],
        "it2i": [{"images": ["img0"], "target": "img1", "text": "make it modern"}],
    }
    question = "<|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>"
    assert [written(sequence, tokenizer) for sequence in record_sequences(record, tokenizer)] == [
        f"<|im_start|>user\n<|vision_start|>{question}",
        f"<|im_start|>user\n<|vision_start|>a flat cat{question}",
        "<|im_start|>user\na flat cat<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
        "<|im_start|>user\n<|vision_start|><|vision_end|>make it modern<|im_end|>\n<|im_start|>assistant\n"
        "<|vision_start|>",
    ]


def test_perplexity_of_a_unigram() -> None:
    assert unigram_perplexity([[0, 1], [2, 3]], [[0, 3, 3]], 4) == pytest.approx(4)
    assert unigram_perplexity([[0, 0]], [[0], [1]], 2) == pytest.approx((4 / 3 * 4) ** 0.5)  # 3/4 and 1/4


def test_padding_and_given_tokens_have_no_loss(tmp_path: Path) -> None:
    model = public.llm(tmp_path)
    short, long = [5, 6, 7, 8], [9, 10, 11, 12, 13, 14]
    losses = [float(text_loss(model, padded([sequence]), 2)) for sequence in (short, long)]
    both = float(text_loss(model, padded([short, long]), 2))
    assert both == pytest.approx((2 * losses[0] + 4 * losses[1]) / 6, rel=1e-4)


@pytest.mark.seconds
def test_the_command_trains_on_train_alone_and_its_folder_is_a_qwen3_that_imports(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def short_training(sequences: list[list[int]], *rest: Any) -> Any:
        seen["texts"] = [written(sequence, tokenizer) for sequence in sequences]
        model, seen["losses"] = train_in_steps(sequences, *rest, steps=12)
        return model, seen["losses"]

    train_in_steps = train_llm.train_llm
    monkeypatch.setattr(train_llm, "train_llm", short_training)
    out = tmp_path / "qwen3"
    recipe = str(ROOT / "recipes" / "tiny" / "stage0.yaml")
    assert train_llm.main(["--data", str(ASSETS / "emoji"), "--out", str(out), "--recipe", recipe]) == 0

    heldout = [name for name in ("baby", "doughnut", "magnet", "pig face", "teddy bear") if is_heldout_concept(name)]
    assert len(heldout) == 5 and len(seen["texts"]) > 10_000
    assert not any(name in text for name in heldout for text in seen["texts"])
    assert seen["losses"][-1] < seen["losses"][0] - 0.5
    model = Qwen3ForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    assert decoder_config(json.loads((out / "config.json").read_text()), str(out)) == TINY.model.decoder
    measures = json.loads((out / MEASURES_FILE).read_text())
    captions = split_captions(ASSETS / "emoji", HELDOUT_DRAWINGS, tokenizer)
    assert measures["heldout_captions"] == len(captions)
    assert measures["perplexity"] == pytest.approx(caption_perplexity(model.float(), captions, tokenizer), rel=1e-3)
    public.vision(tmp_path / "vision")
    import_pretrained(tmp_path / "initial", out, tmp_path / "vision", ASSETS / "autoencoder", out)


def test_a_folder_without_a_set_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert train_llm.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --data {tmp_path}: no train/*.tar in it")


def test_shipped_weights_fit_the_recipes_and_know_held_out_captions(tokenizer: TextTokenizer) -> None:
    folder = ASSETS / "qwen3"
    assert decoder_config(json.loads((folder / "config.json").read_text()), str(folder)) == TINY.model.decoder
    assert TextTokenizer(folder).sha256 == tokenizer.sha256
    train, heldout = (split_captions(ASSETS / "emoji", split, tokenizer) for split in (TRAIN, HELDOUT_DRAWINGS))
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    perplexity = caption_perplexity(model, heldout, tokenizer)
    assert perplexity <= 0.5 * unigram_perplexity(train, heldout, tokenizer.vocab)
