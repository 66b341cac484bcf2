"""The shared-and-decoupled Qwen3 decoder (paper §2.2).

The residual stream of a pack is [Und tokens | Gen tokens]. A module that the branches share sees all rows; one that
each branch owns sees its slice. Self-attention joins the two. `und`, `gen` and `shared` hold the modules of a layer by
owner, so that freezing, sharding and import go by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emma_train.config.schema import DecoderConfig
from emma_train.model.attention import AttentionPlan, attention, rotary, rotary_tables
from emma_train.model.cache import KVCache, LayerCache
from emma_train.model.cross_entropy import linear_cross_entropy

MODULES = ("input_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj", "mlp_norm", "mlp")
SHARED_WITH = {"q_norm": "q_proj", "k_norm": "k_proj"}


class Decoder(nn.Module):
    """Embedding, layers and final norms; the LM head is the embedding where `tied`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(
            DecoderLayer(config, config.shared if index < config.num_shared_layers else [])
            for index in range(config.num_layers)
        )
        owners = ("shared",) if "norm" in config.shared else ("und", "gen")
        self.norm = nn.ModuleDict({owner: RMSNorm(config.hidden, config.eps) for owner in owners})
        self.lm_head = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(
        self, x: Tensor, num_und: int, position: Tensor, plan: AttentionPlan, cache: KVCache | None = None
    ) -> Tensor:
        """x: [T, hidden], the first num_und rows belong to the Und branch; position: [T] -> [T, hidden]."""
        tables = rotary_tables(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, num_und, tables, plan, None if cache is None else cache.layer(index))
        if "shared" in self.norm:
            return self.norm["shared"](x)
        return apply_by_branch(self.norm["und"], self.norm["gen"], x, num_und)

    @property
    def head(self) -> Tensor:
        """Weight of the LM head: [vocab, hidden]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, hidden] -> [L, vocab]."""
        return F.linear(hidden, self.head)

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of hidden [L, hidden] against labels [L], without ever holding all logits: float32 [L]."""
        return linear_cross_entropy(hidden, self.head, labels)


class DecoderLayer(nn.Module):
    """One layer; `shared` names the modules that both branches share; the others exist once per branch."""

    skip_gen_branch = False
    """Whether no pack of the stage has a Gen token: then the Gen branch's modules do not run at all."""
    attend = staticmethod(attention)
    """Where ranks share the tokens of a pack, attention across them (engine/ulysses.py)."""

    def __init__(self, config: DecoderConfig, shared: list[str]) -> None:
        super().__init__()
        self.config = config
        common = [name for name in MODULES if SHARED_WITH.get(name, name) in shared]
        separate = [name for name in MODULES if name not in common]
        self.shared = nn.ModuleDict({name: _module(name, config) for name in common})
        self.und = nn.ModuleDict({name: _module(name, config) for name in separate})
        self.gen = nn.ModuleDict({name: _module(name, config) for name in separate})

    def forward(
        self,
        x: Tensor,
        num_und: int,
        tables: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        head_dim = self.config.head_dim
        y = self._run("input_norm", x, num_und)
        q = self._run("q_proj", y, num_und).view(len(x), -1, head_dim)
        k = self._run("k_proj", y, num_und).view(len(x), -1, head_dim)
        v = self._run("v_proj", y, num_und).view(len(x), -1, head_dim)
        q = rotary(self._run("q_norm", q, num_und), *tables)
        k = rotary(self._run("k_norm", k, num_und), *tables)
        y = self.attend(q, k, v, plan, cache).reshape(len(x), -1)
        x = x + self._run("o_proj", y, num_und)
        return x + self._run("mlp", self._run("mlp_norm", x, num_und), num_und)

    def _run(self, name: str, x: Tensor, num_und: int) -> Tensor:
        if name in self.shared:
            return self.shared[name](x)
        return apply_by_branch(self.und[name], self.gen[name], x, num_und, self.skip_gen_branch)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, mlp, bias=False)
        self.up_proj = nn.Linear(hidden, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 and rounded once, which Qwen3 does twice."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # one kernel on a GPU
        # torch.compile rounds once too, and fuses this better: a layer moves 3.2 GB instead of 3.4 (test_kernels.py).
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def apply_by_branch(und: nn.Module, gen: nn.Module, x: Tensor, num_und: int, skip_gen: bool = False) -> Tensor:
    """Apply `und` to the first num_und rows of x and `gen` to the others; where `skip_gen`, there must be no others."""
    if skip_gen:
        assert num_und == len(x), "a token of the Gen branch in a stage without image generation"
        return und(x)
    # Not two slices: their gradients would be two tensors of all rows, mostly zeros, and their sum.
    of_und, of_gen = x.split([num_und, len(x) - num_und])
    return torch.cat([und(of_und), gen(of_gen)])


def _module(name: str, config: DecoderConfig) -> nn.Module:
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if name in ("input_norm", "mlp_norm"):
        return RMSNorm(config.hidden, config.eps)
    if name in ("q_norm", "k_norm"):
        return RMSNorm(config.head_dim, config.eps)
    if name == "mlp":
        return MLP(config.hidden, config.intermediate_size)
    sizes = {
        "q_proj": (config.hidden, query),
        "k_proj": (config.hidden, key),
        "v_proj": (config.hidden, key),
        "o_proj": (query, config.hidden),
    }
    return nn.Linear(*sizes[name], bias=False)
