"""The Und branch of a model as a plain Qwen3 folder, which transformers and libraries on top of it load."""

import json
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.export import hf_names as hf
from emma_train.export.export import TOKENIZER_EXTRAS, copy_tokenizer
from emma_train.export.stored_model import StoredModel
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.files import make_folder, write_atomic
from emma_train.storage.safetensors_io import write_sharded

FILE_BYTES = 5e9
"""Weights above this size are split into several files."""
TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Our template (sequence/layout.py); a public tokenizer brings its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen3(out: Path, model: StoredModel) -> None:
    """Write the folder, one tensor at a time. config.json is last, because an incomplete folder must not load. Raises
    UserError where `out` is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; name a new folder")
    make_folder(out)
    tokenizer = TextTokenizer(model.recipe.data.tokenizer)
    names = hf.und_names(model.specs)
    specs = {key: model.specs[name] for key, name in names.items()}
    write_sharded(out, specs, lambda key: model.read(names[key]), FILE_BYTES)
    copy_tokenizer(tokenizer.path, out)
    ids = {"bos_token_id": tokenizer.endoftext, "pad_token_id": tokenizer.endoftext}
    if not (out / TOKENIZER_EXTRAS[0]).exists():
        _write(out / TOKENIZER_EXTRAS[0], tokenizer_config())
    ends = [tokenizer.im_end, tokenizer.endoftext]
    _write(out / "generation_config.json", {**ids, "eos_token_id": ends, "do_sample": False})
    dtype = TORCH_DTYPES[model.specs["decoder.embed_tokens.weight"].dtype]
    config = {**hf.qwen3_config(model.recipe.model.decoder), **ids, "eos_token_id": tokenizer.im_end}
    _write(out / "config.json", {**config, "torch_dtype": dtype})


def tokenizer_config() -> dict[str, Any]:
    """What transformers needs to know beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
