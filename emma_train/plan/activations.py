"""Bytes that autograd keeps of each layer for backward, per token or patch, in closed form.

b is the bytes of a value, H hidden, Q and K the widths of queries and keys, M the MLP (h, m: encoder), c the keys per
token that variable-length attention copies (sequence/spans.py), s = 4 (2 + 2 heads + kv_heads) of norms and softmax.

    decoder            trained                                        frozen, a gradient passes
      eager            4bH + b(Q+K) + A + 4bM + s                     2bH + b(Q+K) + A + 3bM + s
      engine.compile   4bH + 4bQ + (1+2c)bK + 3bM + s                 2bH + 3bQ + (1+2c)bK + 2bM + s
    encoder            trained
      eager            Bbh + 2bm + 4 heads + 16
      engine.compile   8bh + 2bm + 4 heads + 16

Eager norms keep their input, as torch's kernel on CUDA does. With variable-length kernels A is 3bQ + 2cbK (frozen: 2bQ
+ 2cbK) and B is 8; with other kernels K and V are repeated to all query heads, so A is 4bQ, and B is 9. What compiled
layers keep is the choice of torch's min-cut partitioner at these widths. Tests compare every line with saved-tensor
hooks.
"""

from emma_train.config.schema import DecoderConfig, EngineConfig, Recipe, VisionConfig
from emma_train.plan.samples import StepLoad
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.tasks import TASKS


def uses_spans(recipe: Recipe) -> bool:
    """Whether a GPU computes attention by variable-length kernels (model/attention.py)."""
    backend = recipe.attention.backend
    return backend == "flash" or (backend == "auto" and recipe.engine.precision == "bf16")


def keys_per_token(load: StepLoad) -> float:
    """Keys that variable-length attention reads, over tokens: an image of generation sees all before it once more.

    The few tokens before the reference of an edit are left out.
    """
    tasks = [task for task in load.means if TASKS[task].makes_image]
    again = load.total(lambda s: s.text + s.shown, *tasks) if tasks else 0.0
    edits = [task for task in tasks if TASKS[task].condition is ImageRole.REFERENCE]
    again += load.total(lambda s: s.shown, *edits) if edits else 0.0
    return 1 + again / load.tokens


def decoder_layer_bytes(
    decoder: DecoderConfig, engine: EngineConfig, trains: bool, spans: bool, keys: float = 1.0
) -> float:
    """Per token. spans: variable-length kernels; keys: keys per token that they copy."""
    b = value_bytes(engine)
    h, m = decoder.hidden, decoder.intermediate_size
    q, k = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    scalars = 4 * (2 + 2 * decoder.heads + decoder.kv_heads)
    if engine.compile:
        attended = b * (1 + 2 * keys) * k
        return (b * (4 * h + 4 * q + 3 * m) if trains else b * (2 * h + 3 * q + 2 * m)) + attended + scalars
    attended = b * ((2 + trains) * q + 2 * keys * k) if spans else 4 * b * q
    of_weights = b * (2 * h + m) if trains else 0
    return b * (2 * h + q + k + 3 * m) + attended + scalars + of_weights


def encoder_layer_bytes(vision: VisionConfig, engine: EngineConfig, spans: bool) -> float:
    """Per patch, of a layer that trains."""
    copies = 8 if engine.compile or spans else 9
    b = value_bytes(engine)
    return b * (copies * vision.hidden + 2 * vision.intermediate_size) + 4 * vision.heads + 16


def value_bytes(engine: EngineConfig) -> int:
    """Bytes of a value in engine.precision."""
    return 2 if engine.precision == "bf16" else 4
