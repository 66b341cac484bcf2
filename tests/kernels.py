"""Kernels that a card would launch for a layer, counted without one: operators of an eager layer on the meta device,
and what the scheduler of torch.compile makes of a layer. Nothing is computed, so sizes are those of EMMA-4B.

Operators that only look at memory in another way are no kernels. Bytes are those of all inputs and outputs. The
scheduler is that of a CPU; Triton's fusion on a card may differ a little.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emma_train.config.schema import ModelConfig
from emma_train.model.attention import rotary_tables
from emma_train.model.decoder import DecoderLayer
from emma_train.model.vision import Images, VisionLayer
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment
from emma_train.sequence.pack import ImageTokens, PackedBatch, Sample, pack
from emma_train.sequence.spans import full_call

META, HALF = torch.device("meta"), torch.bfloat16
VIEWS = "view _unsafe_view t transpose permute expand unsqueeze squeeze slice select split split_with_sizes unbind"
NO_KERNEL = {*VIEWS.split(), "detach", "alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided"}
SEVERAL = {"slice_backward": 2, "select_backward": 2, "rms_norm_backward": 3}
"""Operators of more than one kernel: zeros and a copy; the gradient of x, partial sums of the weight's, and their
sum."""
PATCHES = 8192


class Kernels(TorchDispatchMode):
    """Counts the kernels of what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.count += 0 if name in NO_KERNEL else SEVERAL.get(name, 1)
        return function(*args, **(kwargs or {}))


def eight_pairs() -> PackedBatch:
    """A pack of Stage 1's recipe: 8 understanding and 8 generation samples of 256 visual tokens, 6,176 tokens."""
    seen = ImageTokens((16, 16), np.zeros((1024, 768), np.uint8), np.zeros((256, 32), np.float32))
    made = ImageTokens((16, 16), None, np.zeros((256, 32), np.float32))

    def text(length: int, supervised: bool = False) -> TextSegment:
        return TextSegment(tuple(range(length)), supervised)

    understanding: list[Segment] = [text(4), ImageSegment("a", ImageRole.UND), text(32), text(128, supervised=True)]
    generation: list[Segment] = [text(96), ImageSegment("a", ImageRole.TARGET)]
    samples = [Sample(f"u{i}", "i2t", understanding, {"a": seen}) for i in range(8)]
    return pack([*samples, *(Sample(f"g{i}", "t2i", generation, {"a": made}) for i in range(8))])


def layer_of(kind: str, device: torch.device) -> tuple[nn.Module, Callable[[Callable[..., Tensor]], Tensor]]:
    """A layer of EMMA-4B in bf16, shallow, deep or of the vision encoder, and a function that gives its inputs to what
    computes it, and returns the output. On a CPU weights and inputs have no values, and take no memory."""
    config = ModelConfig()
    if kind == "vision":
        lengths = [1024] * (PATCHES // 1024)
        images = Images(lengths, full_call(lengths, device))
        layer, inputs = _empty(lambda: VisionLayer(config.vision), device), (images,)
        x = torch.empty(PATCHES, config.vision.hidden, dtype=HALF, device=device, requires_grad=True)
        return layer, lambda compute: compute(x, *inputs)
    batch, decoder = eight_pairs().to(device), config.decoder
    layer = _empty(lambda: DecoderLayer(decoder, decoder.shared if kind == "shallow" else []), device)
    x = torch.empty(batch.num_tokens, decoder.hidden, dtype=HALF, device=device, requires_grad=True)
    tables = rotary_tables(batch.position, decoder.head_dim, decoder.rope_theta, HALF)
    return layer, lambda compute: compute(x, batch.num_und, tables, batch.spans)


def eager_kernels(kind: str) -> int:
    """Kernels of forward and backward of an eager layer."""
    layer, run = layer_of(kind, META)
    with Kernels() as kernels:
        y = run(layer)
        y.backward(torch.empty_like(y))
    return kernels.count


@dataclass(frozen=True)
class Fused:
    """What the scheduler of torch.compile makes of forward and backward of a layer."""

    nodes: int
    """Kernels."""
    elementwise_bytes: int
    """Of all that is neither a product nor attention."""


def fused(kind: str) -> Fused:
    """Compile a layer up to the scheduler's fusion; no code is generated."""
    nodes: list[tuple[bool, int]] = []

    def schedule(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        nodes.extend(_scheduled(graph, inputs))
        return _without_values(graph)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=schedule)

    torch._dynamo.reset()
    layer, run = layer_of(kind, torch.device("cpu"))
    y = run(torch.compile(layer.forward, backend=backend, dynamic=False))
    y.backward(torch.empty_like(y))
    torch._dynamo.reset()
    return Fused(len(nodes), sum(num_bytes for is_extern, num_bytes in nodes if not is_extern))


def graph_breaks(kind: str) -> int:
    """Graphs beyond the first that torch.compile makes of the forward pass of a layer, on the meta device."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer, run = layer_of(kind, META)
    run(torch.compile(layer.forward, backend=keep, dynamic=False))
    torch._dynamo.reset()
    return len(graphs) - 1


def _scheduled(graph: torch.fx.GraphModule, inputs: list[Any]) -> list[tuple[bool, int]]:
    """The scheduler's kernels: whether the code is of others, as that of products, and bytes."""
    from torch._inductor import ir
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    fake = fake_tensor_prop(graph, inputs)
    record_original_output_strides(graph)
    with V.set_fake_mode(fake):
        _recursive_post_grad_passes(graph, False)
    lowered = GraphLowering(graph, shape_env=fake.shape_env)
    with V.set_graph_handler(lowered), V.set_real_inputs(inputs), V.set_fake_mode(fake), DebugContext():
        lowered.run(*inputs)
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        # An operator with several outputs is one kernel; its outputs are nodes of their own.
        return [
            (node.is_extern(), node.get_read_write_buffers_sizes())
            for node in lowered.scheduler.nodes
            if not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)
        ]


def _without_values(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function whose outputs have the right shapes and no values."""
    from functorch.compile import make_boxed_func

    (outputs,) = next(iter(reversed(graph.graph.nodes))).args
    shapes = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in outputs]

    def run(*inputs: Any) -> list[Any]:
        return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x for x in shapes]

    return make_boxed_func(run)


def _empty(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    with META:
        layer = make().to(HALF)
    return layer.to_empty(device=device)
