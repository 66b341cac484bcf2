"""Names and sizes of the public checkpoints, and an import of small ones that equals the originals."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionModel

from emma_train.config.schema import DecoderConfig, ModelConfig, Recipe, VisionConfig
from emma_train.errors import UserError
from emma_train.export import export
from emma_train.export import hf_names as hf
from emma_train.export.import_hf import import_pretrained
from emma_train.generate.load import load_model
from emma_train.model.attention import MaskPlan
from emma_train.model.autoencoder import Autoencoder, fingerprint
from emma_train.model.emma import Emma
from emma_train.model.initial import start_value
from emma_train.sequence.geometry import to_patches
from tests import public
from tests.helpers import ASSETS, PATCH, SHUFFLE, VOCAB, block_order, make_image

CPU = torch.device("cpu")
EVERYTHING = "[q_proj, k_proj, v_proj, o_proj, mlp, input_norm, mlp_norm, norm]"
QWEN3_4B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SIGLIP2 = {
    "model_type": "siglip",
    "text_config": {"hidden_size": 1152, "model_type": "siglip_text_model", "vocab_size": 256000},
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 512,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    },
}


class Sources(NamedTuple):
    folder: Path
    llm: Qwen3ForCausalLM
    vision: SiglipVisionModel
    autoencoder: AutoencoderDC


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """One folder per model; in folder/sharded the same models in many files, the vision tower in a SiglipModel."""
    folder = tmp_path_factory.mktemp("public")
    made = Sources(
        folder,
        public.llm(folder / "llm"),
        public.vision(folder / "vision"),
        public.autoencoder(folder / "autoencoder"),
    )
    public.llm(folder / "sharded" / "llm", shard="50KB")
    public.siglip(folder / "sharded" / "vision", made.vision, shard="30KB")
    public.autoencoder(folder / "sharded" / "autoencoder", shard="50KB")
    return made


def imported(out: Path, folder: Path, *overrides: str, **parts: Path) -> tuple[Emma, Recipe]:
    """Import the three models below `folder` and load the result."""
    paths = {name: parts.get(name, folder / name) for name in ("llm", "vision", "autoencoder")}
    import_pretrained(out, **paths, tokenizer=paths["llm"], overrides=list(overrides))
    model, recipe, meta = load_model(out, CPU, use_ema=True)
    assert (meta["stage"], meta["step"]) == ("", 0)
    return model, recipe


@torch.no_grad()
def text_difference(model: Emma, llm: Qwen3ForCausalLM) -> float:
    """Largest difference of logits: a text in one branch, in the other, and divided between both."""
    ids, decoder = torch.randint(0, VOCAB, (40,)), model.decoder
    want = llm(ids[None]).logits[0]
    assert want.std() > 0.1
    plan, positions = MaskPlan(torch.ones(40, 40).tril().bool()), torch.arange(40)
    outputs = [decoder.logits(decoder(decoder.embed_tokens(ids), split, positions, plan)) for split in (40, 0, 17)]
    return max(float((got - want).abs().max()) for got in outputs)


@torch.no_grad()
def vision_difference(model: Emma, tower: SiglipVisionModel) -> float:
    differences = []
    for grid in [(2, 2), (3, 2)]:
        image = make_image(*grid)
        patches = torch.from_numpy(to_patches(image, PATCH, SHUFFLE)).float() / 127.5 - 1.0
        got = model.vision(patches, [grid]).features
        values = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        want = tower(values, interpolate_pos_encoding=grid != (2, 2)).last_hidden_state[0]
        assert want.std() > 0.3
        differences.append(float((got - want[block_order(*grid)].reshape(got.shape)).abs().max()))
    return max(differences)


@torch.no_grad()
def latent_difference(recipe: Recipe, reference: AutoencoderDC) -> float:
    """Largest difference of latents. `recipe` is loaded from the export, so its autoencoder is the export's."""
    image = torch.from_numpy(make_image(2, 3))
    (got,) = Autoencoder(recipe.model.autoencoder, CPU).encode([image])
    want = reference.encode(image.permute(2, 0, 1)[None].float() / 127.5 - 1.0).latent[0]
    assert want.std() > 0.01
    return float((got - want.flatten(1).T).abs().max())


@pytest.mark.parametrize("where", ["", "sharded"])
@pytest.mark.parametrize(
    ("shared", "num_shared_layers"),
    [("[q_proj, k_proj]", 2), (EVERYTHING, 4), ("[]", 2)],
    ids=["default", "everything", "none"],
)
def test_an_import_computes_what_the_originals_do(
    sources: Sources, tmp_path: Path, where: str, shared: str, num_shared_layers: int
) -> None:
    model, recipe = imported(
        tmp_path / "out",
        sources.folder / where,
        f"model.decoder.shared={shared}",
        f"model.decoder.num_shared_layers={num_shared_layers}",
    )
    assert text_difference(model, sources.llm) <= 1e-5
    assert vision_difference(model, sources.vision) <= 1e-5
    assert latent_difference(recipe, sources.autoencoder) <= 1e-5
    assert any(".gen." in name for name, _ in model.named_parameters()) == (shared != EVERYTHING)
    assert Autoencoder(recipe.model.autoencoder, CPU).scale == pytest.approx(0.41407)


def test_sizes_theta_eps_and_tying_are_those_of_the_folders(sources: Sources, tmp_path: Path) -> None:
    _, recipe = imported(tmp_path / "out", sources.folder)
    decoder, vision = recipe.model.decoder, recipe.model.vision
    assert (decoder.rope_theta, decoder.eps, decoder.tied, decoder.num_layers, decoder.num_shared_layers) == (
        5e4,
        1e-5,
        True,
        4,
        2,
    )
    assert (vision.position_grid, vision.patch, vision.shuffle, vision.num_layers, vision.expert_layers) == (
        4,
        16,
        2,
        3,
        2,
    )
    assert (recipe.data.und.side, recipe.model.autoencoder.channels) == (64, 32)


def test_an_untied_head_and_its_layout_of_transformers_4(sources: Sources, tmp_path: Path) -> None:
    llm = public.llm(tmp_path / "llm", tie_word_embeddings=False, seed=1)
    with public.config_of(tmp_path / "llm") as values:
        values |= {"rope_theta": values.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    public.vision(tmp_path / "vision")
    public.prefixed(tmp_path / "vision")
    model, recipe = imported(tmp_path / "out", sources.folder, llm=tmp_path / "llm", vision=tmp_path / "vision")
    assert model.decoder.lm_head is not None and not recipe.model.decoder.tied
    assert text_difference(model, llm) <= 1e-5 and vision_difference(model, sources.vision) <= 1e-5


def test_bf16_weights_stay_bf16_and_new_ones_start_from_the_seed(sources: Sources, tmp_path: Path) -> None:
    llm = public.llm(tmp_path / "llm").bfloat16()
    llm.save_pretrained(tmp_path / "llm")
    imported(tmp_path / "out", sources.folder, "model.seed=7", llm=tmp_path / "llm")
    weights = load_file(tmp_path / "out" / export.WEIGHTS_FILE)
    assert torch.equal(weights["decoder.embed_tokens.weight"], llm.model.embed_tokens.weight)
    mlp = llm.model.layers[3].mlp.up_proj.weight
    assert all(torch.equal(weights[f"decoder.layers.3.{b}.mlp.up_proj.weight"], mlp) for b in ("und", "gen"))
    config = ModelConfig(decoder=DecoderConfig(num_layers=4), seed=7)
    new = [name for name in weights if name.startswith(("und_adapter.", "gen_adapter.", "velocity_head."))]
    assert len(new) == 6 + 11 + 2
    for name in new:
        assert torch.equal(weights[name], start_value(name, weights[name].shape, config)), name
    assert fingerprint(tmp_path / "out" / "autoencoder") == fingerprint(sources.folder / "autoencoder")


def test_an_import_is_the_same_to_the_last_byte_and_may_be_repeated(sources: Sources, tmp_path: Path) -> None:
    files = []
    for out, folder in (("a", ""), ("b", "sharded"), ("a", "sharded")):
        imported(tmp_path / out, sources.folder / folder)
        files.append((tmp_path / out / export.WEIGHTS_FILE).read_bytes())
    assert files[0] == files[1] == files[2]
    imported(tmp_path / "c", sources.folder, autoencoder=tmp_path / "a" / "autoencoder")


def test_tensors_without_use_are_ignored(sources: Sources, tmp_path: Path) -> None:
    public.llm(tmp_path / "llm")
    extra = {"lm_head.weight": torch.zeros(VOCAB, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    public.change(tmp_path / "llm", lambda tensors: {**tensors, **extra})
    public.vision(tmp_path / "vision")
    public.change(tmp_path / "vision", lambda t: {**t, "embeddings.position_ids": torch.arange(16)})
    model, _ = imported(tmp_path / "out", sources.folder, llm=tmp_path / "llm", vision=tmp_path / "vision")
    assert text_difference(model, sources.llm) <= 1e-5


def test_layers_above_the_feature_layer_are_not_imported(sources: Sources, tmp_path: Path) -> None:
    model, recipe = imported(
        tmp_path / "out", sources.folder, "model.vision.feature_layer=-2", "model.vision.expert_layers=1"
    )
    assert len(model.vision.layers) == recipe.model.vision.num_layers - 1 == sources.vision.config.num_hidden_layers - 1


FC1 = "encoder.layers.1.mlp.fc1.weight"
UP = "model.layers.3.mlp.up_proj.weight"
LATENT = "encoder.conv_in.weight"
FILES = {"autoencoder": "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(
    ("part", "key", "shape"), [("llm", UP, [48, 32]), ("vision", FC1, [48, 32]), ("autoencoder", LATENT, [8, 3, 3, 3])]
)
@pytest.mark.parametrize("how", ["missing", "misshaped", "extra", "truncated"])
def test_a_wrong_tensor_is_named_with_both_shapes(
    sources: Sources, tmp_path: Path, part: str, key: str, shape: list[int], how: str
) -> None:
    folder, file = tmp_path / part, FILES.get(part, "model.safetensors")
    getattr(public, part)(folder)
    wrong = torch.zeros(5, *shape[1:])
    if how == "missing":
        public.change(folder, lambda tensors: {k: v for k, v in tensors.items() if k != key}, file)
        said = f"{folder}: lacks {key}, which its config.json makes {shape}"
    elif how == "misshaped":
        public.change(folder, lambda tensors: {**tensors, key: wrong}, file)
        said = f"{folder}: {key} has shape {list(wrong.shape)}, but its config.json makes it {shape}"
    elif how == "extra":
        public.change(folder, lambda tensors: {**tensors, key.replace("weight", "more"): wrong}, file)
        said = f"{folder}: holds {key.replace('weight', 'more')} of shape {list(wrong.shape)}, which a model of"
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-1])
        said = f"{folder / file}: not a complete safetensors file"
    with pytest.raises(UserError) as caught:
        imported(tmp_path / "out", sources.folder, **{part: folder})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_extra_layer_and_a_missing_file_are_named(sources: Sources, tmp_path: Path) -> None:
    public.llm(tmp_path / "deep", num_hidden_layers=5)
    with public.config_of(tmp_path / "deep") as values:
        values["num_hidden_layers"] = 4
    with pytest.raises(UserError, match=r"holds model\.layers\.4\..* of shape \[32\].*\(11 such in all\)"):
        imported(tmp_path / "out", sources.folder, llm=tmp_path / "deep")
    public.llm(tmp_path / "torn", shard="50KB")
    gone = sorted((tmp_path / "torn").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone}: "):
        imported(tmp_path / "out", sources.folder, llm=tmp_path / "torn")


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("llm", {"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ("llm", {"attention_bias": True}, "attention_bias is True"),
        ("llm", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ("llm", {"rope_parameters": None}, "has no rope_theta"),
        ("llm", {"hidden_size": None}, "has no hidden_size"),
        ("llm", {"vocab_size": 300}, "has 1024 tokens, more than the 300"),
        ("vision", {"model_type": "siglip2_vision_model"}, "model_type is 'siglip2_vision_model'"),
        ("vision", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("vision", {"patch_size": 15}, "image_size 64 is not a multiple of patch_size 15"),
        ("autoencoder", {"_class_name": "AutoencoderKL"}, "is a AutoencoderKL; EMMA needs an AutoencoderDC"),
    ],
)
def test_an_unsupported_model_is_refused(
    sources: Sources, tmp_path: Path, part: str, changes: dict[str, Any], said: str
) -> None:
    getattr(public, part)(tmp_path / part)
    with public.config_of(tmp_path / part) as values:
        values |= changes
    with pytest.raises(UserError) as caught:
        imported(tmp_path / "out", sources.folder, **{part: tmp_path / part})
    assert said in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_grids_that_cannot_be_fused_are_refused(sources: Sources, tmp_path: Path) -> None:
    public.vision(tmp_path / "vision", patch_size=12, image_size=48)
    with pytest.raises(UserError, match="32 pixels per latent are not a multiple of the encoder's patch of 12"):
        imported(tmp_path / "out", sources.folder, vision=tmp_path / "vision")


def test_the_public_configs_give_the_full_size_defaults() -> None:
    assert hf.decoder_config(QWEN3_4B, "config") == DecoderConfig()
    assert hf.vision_config(SIGLIP2, "config") == VisionConfig()
    later = {**QWEN3_4B, "rope_theta": None, "rope_parameters": {"rope_theta": 5000000, "rope_type": "default"}}
    assert hf.decoder_config(later, "config") == DecoderConfig(rope_theta=5e6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_und_part_at_full_size_has_the_names_and_shapes_of_transformers_qwen3(tied: bool) -> None:
    sizes = DecoderConfig(tied=tied)
    values = hf.qwen3_config(sizes)
    assert hf.decoder_config(values, "config") == sizes
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in Emma(ModelConfig(decoder=sizes)).named_parameters()}
        theirs = dict(Qwen3ForCausalLM(Qwen3Config(**values)).named_parameters())
    assert {key: ours[name] for key, name in hf.und_names(ours).items()} == {
        k: tuple(p.shape) for k, p in theirs.items()
    }
    assert sum(p.numel() for p in theirs.values()) == 4_022_468_096 + (not tied) * 151936 * 2560


def test_every_name_at_full_size_has_one_origin() -> None:
    with torch.device("meta"):
        names = [n for n, _ in Emma(ModelConfig(vision=VisionConfig(stem_expert=True, router=True))).named_parameters()]
    origins = {name: stored for name in names if (stored := hf.stored_name(name)) is not None}
    stored = [part for part, _ in set(origins.values())]
    assert (stored.count(hf.LLM), stored.count(hf.VISION)) == (36 * 11 + 2, 27 * 16 + 5)
    new = {name.split(".")[0] + "." + name.split(".")[1] for name in names if name not in origins}
    assert {n for n in new if n.startswith(("vision.", "decoder."))} == {"vision.stem_layers", "vision.router"}
    assert origins["decoder.layers.20.gen.q_norm.weight"] == ("llm", "model.layers.20.self_attn.q_norm.weight")
    assert origins["decoder.layers.3.shared.k_proj.weight"] == ("llm", "model.layers.3.self_attn.k_proj.weight")
    assert origins["decoder.layers.3.und.mlp_norm.weight"] == ("llm", "model.layers.3.post_attention_layernorm.weight")
    plain = hf.stored_name("vision.layers.26.out_proj.bias", {"llm": "", "vision": ""})
    assert plain == ("vision", "encoder.layers.26.self_attn.out_proj.bias")
    assert hf.stored_name("decoder.lm_head.weight") == ("llm", "lm_head.weight")
    assert hf.stored_name("velocity_head.weight") is None


def test_the_tokenizer_may_lie_elsewhere(sources: Sources, tmp_path: Path) -> None:
    (llm := tmp_path / "llm").mkdir()
    for file in ("config.json", "model.safetensors"):
        (llm / file).symlink_to(sources.folder / "llm" / file)
    with pytest.raises(UserError, match="tokenizer.json: cannot read the tokenizer"):
        imported(tmp_path / "out", sources.folder, llm=llm)
    paths = [sources.folder / "vision", sources.folder / "autoencoder", ASSETS / "tokenizer"]
    import_pretrained(tmp_path / "out", llm, *paths)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (ASSETS / "tokenizer/tokenizer.json").read_bytes()
