"""The model section of a recipe: sizes of the vision encoder, the decoder and the autoencoder.

Defaults are Qwen3-4B, SigLIP2-so400m-patch16-512 and DC-AE f32c32, as in the paper (arXiv 2512.04810, §3).
"""

from dataclasses import dataclass

from omegaconf import MISSING

from emma_train.config.setting import section, setting


@dataclass
class VisionConfig:
    hidden: int = setting(1152, more_than=0, at_most=65536, handoff="equal")
    """Width of the SigLIP2 encoder."""
    num_layers: int = setting(27, more_than=1, at_most=1024, handoff="equal")
    """Encoder layers that every image passes: the shared ones and those of one expert."""
    heads: int = setting(16, more_than=0, at_most=4096, handoff="equal")
    """Attention heads."""
    intermediate_size: int = setting(4304, more_than=0, at_most=2**20, handoff="equal")
    """Width of the MLP."""
    patch: int = setting(16, more_than=0, at_most=1024, handoff="equal")
    """Side of a patch in pixels."""
    position_grid: int = setting(32, more_than=0, at_most=4096, handoff="equal")
    """Side of the learned position table in patches (32 for patch16-512)."""
    shuffle: int = setting(2, more_than=0, at_most=64, handoff="equal")
    """Side of the pixel-shuffle block: patch * shuffle pixels make one visual token."""
    eps: float = setting(1e-6, more_than=0, at_most=1, handoff="equal")
    """LayerNorm epsilon."""
    expert_layers: int = setting(3, more_than=0, at_most=1024)
    """Number of last layers of which each expert has its own."""
    router_hidden: int = setting(1152, more_than=0, at_most=65536)
    """Hidden width of the router MLP."""
    feature_layer: int = setting(-1, at_least=-1024, at_most=-1, handoff="equal")
    """Layer whose output, after the final norm, is the feature: -1 is the last (as InternVL), -2 the one before (as
    BAGEL). Layers above it do not exist in the model."""
    stem_expert: bool = setting(False)
    """Whether the STEM expert exists; it is created by the hand-off to stage4_expert."""
    router: bool = setting(False)
    """Whether the router exists; it is created by the hand-off to stage4_router."""
    stem_threshold: float = setting(0.5, at_least=0, at_most=1)
    """An image goes to the STEM expert when the router's probability exceeds this."""

    @property
    def num_used_layers(self) -> int:
        """Layers up to the feature layer."""
        return self.num_layers + 1 + self.feature_layer


@dataclass
class DecoderConfig:
    hidden: int = setting(2560, more_than=0, at_most=65536, handoff="equal")
    """Width of the residual stream."""
    num_layers: int = setting(36, more_than=0, at_most=1024, handoff="equal")
    """Shallow and deep layers together."""
    num_shared_layers: int = setting(18, at_least=0, at_most=1024, handoff="equal")
    """N: the first layers, in which both branches share the modules named in `shared`."""
    shared: list[str] = setting(["q_proj", "k_proj"], handoff="equal")
    """What shallow layers share: of q_proj, k_proj, v_proj, o_proj, mlp, input_norm, mlp_norm; `norm` shares the
    final norm."""
    heads: int = setting(32, more_than=0, at_most=4096, handoff="equal")
    """Query heads."""
    kv_heads: int = setting(8, more_than=0, at_most=4096, handoff="equal")
    """Key and value heads."""
    head_dim: int = setting(128, more_than=0, at_most=4096, handoff="equal")
    """Channels of one head; heads * head_dim need not equal hidden."""
    intermediate_size: int = setting(9728, more_than=0, at_most=2**20, handoff="equal")
    """Width of the SwiGLU MLP."""
    vocab: int = setting(151936, more_than=0, at_most=2**24, handoff="equal")
    """Rows of the token embedding."""
    rope_theta: float = setting(1e6, more_than=0, at_most=1e12, handoff="equal")
    """Base of the rotary embedding."""
    eps: float = setting(1e-6, more_than=0, at_most=1, handoff="equal")
    """RMSNorm epsilon."""
    tied: bool = setting(True, handoff="equal")
    """Whether the LM head is the token embedding."""


@dataclass
class AutoencoderConfig:
    path: str = setting(MISSING, form="path", resume="free")
    """Folder of a diffusers AutoencoderDC (config.json and safetensors)."""
    channels: int = setting(32, more_than=0, at_most=4096, handoff="equal")
    """Latent channels."""
    pixels: int = setting(32, more_than=0, at_most=1024, handoff="equal")
    """Pixels per latent on a side; equals vision.patch * vision.shuffle."""
    chunk: int = setting(32, more_than=0, at_most=65536)
    """Images encoded or decoded at once."""


@dataclass
class ModelConfig:
    vision: VisionConfig = section(VisionConfig)
    """Understanding encoder."""
    decoder: DecoderConfig = section(DecoderConfig)
    """Shared-and-decoupled language model."""
    autoencoder: AutoencoderConfig = section(AutoencoderConfig)
    """Generation encoder, frozen in every stage."""
    position_scale: float = setting(0.3, handoff="equal", at_least=0, at_most=1000)
    """Factor of the fixed 2D position that is added to visual tokens. At 1 it would dominate the adapter's output."""
    time_features: int = setting(256, more_than=0, at_most=65536, handoff="equal")
    """Number of sinusoidal features of the flow time."""
    latent_fan_in: str = setting("joint", choices=("joint", "separate"), handoff="equal")
    """Fan-in that scales the latent columns of the adapters' first matrix at a random start: joint with the semantic
    columns, or separate, their own (ours). With joint, 32 latent channels make 1/145 of the variance
    of what the matrix gives."""
    fusion: str = setting("channel", choices=("channel", "token", "latent", "semantic"), handoff="equal")
    """What the token of an image that is given is made of: semantic features and latent, joined channel by channel, or
    one of them, with zeros for the other; token: it has a token of each, so twice as many (BAGEL's way). An image that
    is still to be made has its latent alone. This and the next four are EMMA's, or what it is compared with."""
    adapters: str = setting("two", choices=("two", "one"), handoff="equal")
    """two: the Und adapter for images to be understood and the Gen adapter for reference and target images; one: the
    Und adapter's matrices for all of them."""
    placeholder: str = setting("learned", choices=("learned", "zeros"), handoff="equal")
    """What stands for the semantic channels of a target image, which has none: a learned vector or zeros."""
    und_attention: str = setting("causal", choices=("causal", "full"), handoff="equal")
    """What a token of an understanding image sees of its image: what is before it, or (as in BAGEL) all of it."""
    image_positions: str = setting("each", choices=("each", "one"), handoff="equal")
    """Rotary positions of an image: one for each of its tokens, or (as in BAGEL) one for all of them."""
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)
    """Seed of the initial weights that no checkpoint provides."""
