"""Sizes and tensor names of the public models that EMMA starts from, and their names in EMMA.

The models are Qwen3ForCausalLM, and SiglipVisionModel or SiglipModel, as folders of transformers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from emma_train.config.schema import DecoderConfig, ModelConfig, VisionConfig
from emma_train.errors import UserError

LLM, VISION = "llm", "vision"
PREFIXES = {LLM: "model.", VISION: "vision_model."}
"""Usual prefixes of tensor names. A SiglipVisionModel of transformers 5 and a bare Qwen3Model have none."""

_Values = Mapping[str, Any]
_Shapes = Mapping[str, tuple[int, ...]]
_QWEN = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp": "mlp"}
# Defaults, which transformers omits from a SiglipModel's config.json.
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}


def decoder_config(values: _Values, source: str) -> DecoderConfig:
    """Sizes, rope_theta, eps and tied embeddings of a Qwen3's config.json; the first half of the layers is shared.
    Raises UserError for a setting that the decoder does not support. `source` names the file in errors."""
    _expect(values, "model_type", ("qwen3",), source)
    _expect(values, "hidden_act", ("silu", None), source)
    _expect(values, "attention_bias", (False, None), source)
    _expect(values, "use_sliding_window", (False, None), source)
    # transformers 4 has rope_theta beside rope_scaling, transformers 5 has it in rope_parameters.
    rope = {
        "rope_theta": values.get("rope_theta"),
        **_section(values, "rope_scaling", source),
        **_section(values, "rope_parameters", source),
    }
    for key in ("rope_type", "type"):
        _expect(rope, key, ("default", None), source)
    layers = _size(values, "num_hidden_layers", source)
    return DecoderConfig(
        hidden=_size(values, "hidden_size", source),
        num_layers=layers,
        num_shared_layers=layers // 2,
        heads=_size(values, "num_attention_heads", source),
        kv_heads=_size(values, "num_key_value_heads", source),
        head_dim=_size({"head_dim": values.get("head_dim") or 128}, "head_dim", source),
        intermediate_size=_size(values, "intermediate_size", source),
        vocab=_size(values, "vocab_size", source),
        rope_theta=_number(rope, "rope_theta", source),
        eps=_number({"rms_norm_eps": 1e-6, **values}, "rms_norm_eps", source),
        tied=bool(values.get("tie_word_embeddings", False)),
    )


def qwen3_config(decoder: DecoderConfig) -> dict[str, Any]:
    """The inverse of decoder_config: config.json of a Qwen3ForCausalLM, as transformers 4 and 5 read it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": decoder.hidden,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": decoder.intermediate_size,
        "vocab_size": decoder.vocab,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": decoder.eps,
        "tie_word_embeddings": decoder.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        # The value of the public Qwen3. Longer texts lose speed and quality, but are no error.
        "max_position_embeddings": 40960,
    }


def vision_config(values: _Values, source: str) -> VisionConfig:
    """Sizes of a SigLIP's config.json. Raises UserError for a NaFlex checkpoint or another model."""
    _expect(values, "model_type", ("siglip", "siglip_vision_model"), source)
    values = {**_SIGLIP, **(_section(values, "vision_config", source) or values)}
    _expect(values, "hidden_act", ("gelu_pytorch_tanh",), source)
    side, patch, layers = (_size(values, key, source) for key in ("image_size", "patch_size", "num_hidden_layers"))
    if side % patch:
        raise UserError(f"{source}: image_size {side} is not a multiple of patch_size {patch}")
    return VisionConfig(
        hidden=_size(values, "hidden_size", source),
        num_layers=layers,
        heads=_size(values, "num_attention_heads", source),
        intermediate_size=_size(values, "intermediate_size", source),
        patch=patch,
        position_grid=side // patch,
        eps=_number(values, "layer_norm_eps", source),
        expert_layers=min(VisionConfig.expert_layers, layers - 1),
    )


def _section(values: _Values, key: str, source: str) -> _Values:
    """An object in a config.json; empty where it has none. Raises UserError."""
    section = values.get(key) or {}
    if not isinstance(section, dict):
        raise UserError(f"{source}: {key} is {section!r}; it must be an object")
    return section


def _size(values: _Values, key: str, source: str) -> int:
    """A whole number above 0. Raises UserError."""
    value = _need(values, key, source)
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{source}: {key} is {value!r}; it must be a whole number above 0")
    return value


def _number(values: _Values, key: str, source: str) -> float:
    """A number above 0. Raises UserError."""
    value = _need(values, key, source)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{source}: {key} is {value!r}; it must be a number above 0")
    return float(value)


def prefix_of(part: str, keys: Iterable[str]) -> str:
    """The prefix of a folder's tensor names: the usual one, or none."""
    return PREFIXES[part] if any(key.startswith(PREFIXES[part]) for key in keys) else ""


def stored_name(name: str, prefixes: Mapping[str, str] = PREFIXES) -> tuple[str, str] | None:
    """(part, key) of the public tensor that a parameter starts from; None where there is none.

    Both branches of the decoder start from the same LLM, so a key of it is used for one or two parameters.
    """
    part, *words = name.split(".")
    match part, words:
        case "decoder", ["lm_head", _]:
            return LLM, "lm_head.weight"
        case "decoder", ["layers", index, _, role, *rest]:
            words = ["layers", index, _QWEN.get(role, f"self_attn.{role}"), *rest]
        case "decoder", ["norm", _, kind]:
            words = ["norm", kind]
        case "vision", ["patch_embedding" | "position_embedding", _]:
            words = ["embeddings", *words]
        case "vision", ["layers", _, role, _]:
            inner = ["self_attn"] if role.endswith("_proj") else ["mlp"] if role in ("fc1", "fc2") else []
            words = ["encoder", *words[:2], *inner, *words[2:]]
    if part == "decoder":
        return LLM, prefixes[LLM] + ".".join(words)
    if part == "vision" and words[0] in ("embeddings", "encoder", "post_layernorm"):
        return VISION, prefixes[VISION] + ".".join(words)
    return None


def und_names(names: Iterable[str]) -> dict[str, str]:
    """Names of the Und branch's parameters by their key in a Qwen3 folder."""
    und = (name for name in names if name.startswith("decoder.") and ".gen." not in name)
    return {stored[1]: name for name in und if (stored := stored_name(name)) is not None}


def is_ignored(part: str, key: str, prefix: str, model: ModelConfig) -> bool:
    """Whether EMMA deliberately does not use a public tensor: a tied LM head, rotary tables, SigLIP's text tower,
    pooling head and layers above the feature layer."""
    if part == LLM:
        return key.endswith("rotary_emb.inv_freq") or (model.decoder.tied and key == "lm_head.weight")
    unused = range(model.vision.num_used_layers, model.vision.num_layers)
    if key.startswith(tuple(f"{prefix}encoder.layers.{index}." for index in unused)):
        return True
    return key.startswith(("text_model.", "logit_", f"{prefix}head.")) or key.endswith("position_ids")


def check_shapes(wanted: _Shapes, stored: _Shapes, source: str) -> None:
    """Raise UserError if a tensor is missing, has another shape or is unexpected; it names the tensor and both shapes.
    `source` names the folder in errors."""
    for key, shape in wanted.items():
        if key not in stored:
            raise UserError(
                f"{source}: lacks {key}, which its config.json makes {list(shape)}; is a file of the folder missing?"
            )
        if stored[key] != shape:
            raise UserError(
                f"{source}: {key} has shape {list(stored[key])}, but its config.json makes it {list(shape)}"
            )
    if extra := sorted(stored.keys() - wanted.keys()):
        raise UserError(
            f"{source}: holds {extra[0]} of shape {list(stored[extra[0]])}, which a model of its config.json does not "
            f"have ({len(extra)} such in all)"
        )


def _need(values: _Values, key: str, source: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{source}: has no {key}")
    return values[key]


def _expect(values: _Values, key: str, allowed: tuple[Any, ...], source: str) -> None:
    if values.get(key) not in allowed:
        names = " or ".join(str(value) for value in allowed if value is not None)
        raise UserError(f"{source}: {key} is {values.get(key)!r}; EMMA starts from {names} only")
