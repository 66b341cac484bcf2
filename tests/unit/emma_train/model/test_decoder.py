"""The decoder against transformers' Qwen3, at both ends of sharing and in both branches."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from emma_train.config.schema import DecoderConfig
from emma_train.model.attention import MaskPlan
from emma_train.model.decoder import Decoder
from tests.helpers import DECODER, randomise

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp", "input_norm", "mlp_norm", "norm"]
QWEN_NAMES = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
    **{role: f"self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
}


def decoder(shared: list[str], num_shared_layers: int = 2, tied: bool = True, seed: int = 0) -> Decoder:
    model = Decoder(
        DecoderConfig(**{**DECODER, "shared": shared, "num_shared_layers": num_shared_layers, "tied": tied})
    )
    randomise(model, seed)
    return model


def qwen(model: Decoder, branch: str) -> Qwen3ForCausalLM:
    """transformers' Qwen3 with the weights of one branch (where they are shared, of both)."""
    config = model.config
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied,
            attention_bias=False,
        )
    ).eval()
    state = {"model.embed_tokens.weight": model.embed_tokens.weight}
    norm = model.norm["shared" if "shared" in model.norm else branch]
    state["model.norm.weight"] = norm.weight
    state["lm_head.weight"] = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    for index, layer in enumerate(model.layers):
        for owner in ("shared", branch):
            for role, module in getattr(layer, owner).items():
                for name, value in module.named_parameters():
                    state[f"model.layers.{index}.{QWEN_NAMES[role]}.{name}"] = value
    missing, unexpected = reference.load_state_dict({k: v.detach().clone() for k, v in state.items()}, strict=False)
    assert not missing and not unexpected
    return reference


@torch.no_grad()
def logits(model: Decoder, ids: torch.Tensor, num_und: int) -> torch.Tensor:
    plan = MaskPlan(torch.ones(len(ids), len(ids)).tril().bool())
    return model.logits(model(model.embed_tokens(ids), num_und, torch.arange(len(ids)), plan))


@pytest.mark.parametrize("branch", ["und", "gen"])
@pytest.mark.parametrize(
    ("shared", "num_shared_layers", "tied"),
    [(EVERYTHING, 4, True), ([], 2, True), (["q_proj", "k_proj"], 2, True), (["mlp"], 3, False)],
    ids=["dense", "decoupled", "default", "untied"],
)
def test_text_in_either_branch_gives_qwen3s_logits(
    branch: str, shared: list[str], num_shared_layers: int, tied: bool
) -> None:
    model = decoder(shared, num_shared_layers, tied)
    ids = torch.randint(0, 1024, (40,), generator=torch.Generator().manual_seed(1))
    got = logits(model, ids, len(ids) if branch == "und" else 0)
    with torch.no_grad():
        want = qwen(model, branch)(ids[None]).logits[0]
    assert want.std() > 0.1
    assert float((got - want).abs().max()) <= 1e-5


def test_branches_that_start_from_one_checkpoint_are_qwen3_for_any_split() -> None:
    model = decoder([])
    with torch.no_grad():
        for layer in model.layers:
            layer.gen.load_state_dict(layer.und.state_dict())
        model.norm["gen"].load_state_dict(model.norm["und"].state_dict())
    ids = torch.randint(0, 1024, (40,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = qwen(model, "und")(ids[None]).logits[0]
    for split in (0, 13, 40):
        assert float((logits(model, ids, split) - want).abs().max()) <= 1e-5


def test_branches_with_their_own_weights_differ() -> None:
    model = decoder([])
    ids = torch.arange(20)
    assert float((logits(model, ids, 20) - logits(model, ids, 0)).abs().max()) > 0.1


def test_the_default_shares_exactly_queries_and_keys_of_the_first_layers() -> None:
    config = DecoderConfig(**DECODER)
    assert (DecoderConfig().shared, DecoderConfig().num_shared_layers, DecoderConfig().num_layers) == (
        ["q_proj", "k_proj"],
        18,
        36,
    )
    model = Decoder(config)
    for index, layer in enumerate(model.layers):
        shared = {"q_proj", "k_proj", "q_norm", "k_norm"} if index < config.num_shared_layers else set()
        assert set(layer.shared) == shared
        assert set(layer.und) == set(layer.gen)
        assert set(layer.und) | shared == set(QWEN_NAMES) and not set(layer.und) & shared
    assert set(model.norm) == {"und", "gen"} and set(Decoder(DecoderConfig(**DECODER, shared=["norm"])).norm) == {
        "shared"
    }


def test_the_full_list_is_one_dense_network() -> None:
    model = decoder(EVERYTHING, num_shared_layers=4)
    assert not [name for name, _ in model.named_parameters() if ".und." in name or ".gen." in name]
    ids = torch.arange(20)
    assert torch.equal(logits(model, ids, 20), logits(model, ids, 0))


@pytest.mark.parametrize("num_und", [0, 12, 5])
def test_every_weight_is_in_the_graph_of_a_pack_without_its_branch(num_und: int) -> None:
    model = decoder(["q_proj", "k_proj"])
    plan = MaskPlan(torch.ones(12, 12).tril().bool())
    out = model(model.embed_tokens(torch.arange(12)), num_und, torch.arange(12), plan)
    model.logits(out).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    idle = "gen" if num_und == 12 else "und" if num_und == 0 else None
    for name, parameter in model.named_parameters():
        if idle and f".{idle}" in name:
            assert not parameter.grad.any(), name
