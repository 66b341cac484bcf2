"""What a recipe asks of a machine, without one: parameters, tokens, memory, FLOPs and time on N GPUs of a kind.

The model is built on the meta device and never allocated. Sizes of samples come from the sources' indexes where they are on
disk, else from the constants below. Memory is what the code does today: no activation is recomputed.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from emma_train.config.check import phases, samples_per_task
from emma_train.config.errors import UserError
from emma_train.config.schema import ImageConfig, PhaseConfig, Recipe, SourceConfig
from emma_train.model.emma import Emma
from emma_train.monitor.flops import PEAK_DENSE_BF16, adapter_flops, autoencoder_flops, decoder_flops, vision_flops
from emma_train.sequence.geometry import picture_size
from emma_train.stages.freeze import group_of
from emma_train.stages.stage import Stage, stage_of

GIB = 2**30
CARDS: dict[str, tuple[float, float]] = {
    "a100-40g": (39.6, PEAK_DENSE_BF16["A100"]),
    "a100-80g": (79.3, PEAK_DENSE_BF16["A100"]),
    "b200-192g": (178.4, PEAK_DENSE_BF16["B200"]),
    "h100-80g": (79.2, PEAK_DENSE_BF16["H100 SXM"]),
    "h100-nvl-94g": (93.1, PEAK_DENSE_BF16["H100 NVL"]),
    "h100-pcie-80g": (79.2, PEAK_DENSE_BF16["H100 PCIe"]),
    "h200-141g": (139.8, PEAK_DENSE_BF16["H200"]),
    "l40s-48g": (44.5, PEAK_DENSE_BF16["L40S"]),
    "mi300x-192g": (191.5, PEAK_DENSE_BF16["MI300X"]),
    "rtx4090-24g": (23.6, PEAK_DENSE_BF16["RTX 4090"]),
}
"""Kinds of GPU: GiB that a process can use, and dense bf16 FLOP/s."""
MFU = 0.40
"""Assumed share of the dense bf16 peak."""
RESERVE = 0.10
"""Share of the card left to the CUDA context, NCCL and fragmentation."""
TF32_COST = 2.0
"""The autoencoder's convolutions run in TF32, at half the bf16 peak."""

ASSUMED_TEXT = {"i2t": (160, 128), "t2i": (96, 0), "it2i": (64, 0)}
"""Mean text tokens of a sample, template included, and how many of them are supervised; for sources that are not on disk."""
ASSUMED_NATIVE_TOKENS = 1024
"""Mean visual tokens of a picture at native resolution (photographs some 300, scanned pages some 3,600)."""
INDEX_SHARDS = 8
"""Shards of a source whose index is read."""

DC_AE_F32C32: dict[str, Any] = {
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
}
DC_AE_PARAMETERS = 312_250_275
"""dc-ae-f32c32-sana-1.0, taken where the recipe's folder is not there."""


@dataclass(frozen=True)
class Part:
    """Parameters that live and learn together."""

    name: str
    stored: int
    trainable: int
    und: bool
    """On the way of a text token, or of a picture to be understood."""
    gen: bool
    """On the way of a reference or target token."""


@dataclass(frozen=True)
class MeanSample:
    """A mean sample of a task, in tokens."""

    text: float
    supervised: float
    seen: float
    """Visual tokens of pictures that are understood or edited."""
    pictures_seen: float
    made: float
    """Visual tokens of the target."""
    measured: bool
    """From indexes, not assumed."""

    @property
    def tokens(self) -> float:
        return self.text + self.seen + self.made


@dataclass(frozen=True)
class Load:
    """What one step of a phase holds."""

    phase: PhaseConfig
    samples: dict[str, int]
    """Samples a step by task."""
    means: dict[str, MeanSample]

    def total(self, value: Callable[[MeanSample], float], *tasks: str) -> float:
        """Sum of a value over the step's samples, of all tasks or some."""
        return sum(n * value(self.means[task]) for task, n in self.samples.items() if not tasks or task in tasks)

    @property
    def tokens(self) -> float:
        return self.total(lambda s: s.tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a pack of `tokens` tokens."""

    tokens: float
    kept: dict[str, float]
    """Held at the same time in the backward pass."""
    encoding: float
    """Working set of the autoencoder, before the forward pass and so not beside activations."""

    @property
    def peak(self) -> float:
        resident = sum(size for name, size in self.kept.items() if name not in TRANSIENT)
        return max(sum(self.kept.values()), resident + self.encoding)


TRANSIENT = ("activations of the decoder", "activations of the encoder", "activations of one layer in backward", "logits")


def parts_of(recipe: Recipe, stage: Stage) -> list[Part]:
    """Parameters by part of the network, from a model on the meta device; the autoencoder is not among them."""
    stored: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for name, parameter in _meta(recipe).named_parameters():
        part = _part_of(name)
        stored[part] = stored.get(part, 0) + parameter.numel()
        trainable[part] = trainable.get(part, 0) + parameter.numel() * (group_of(name) in stage.trainable)
    sides = {name: (und, gen) for name, und, gen in PARTS}
    return [Part(name, stored[name], trainable[name], *sides[name]) for name in sides if name in stored]


PARTS = (
    ("text embedding and LM head", True, False),
    ("layers, shared by both branches", True, True),
    ("layers, Und branch", True, False),
    ("layers, Gen branch", False, True),
    ("vision encoder", True, True),
    ("STEM expert (instead of versatile)", False, False),
    ("router", True, True),
    ("Und adapter", True, False),
    ("Gen adapter", False, True),
    ("velocity head", False, True),
)


def autoencoder_of(recipe: Recipe) -> tuple[int, dict[str, Any], bool]:
    """(parameters, diffusers config, whether its folder is there)."""
    path = Path(recipe.model.autoencoder.path) / "config.json"
    if not path.is_file():
        return DC_AE_PARAMETERS, DC_AE_F32C32, False
    from diffusers import AutoencoderDC

    config = json.loads(path.read_text())
    with torch.device("meta"):
        model = AutoencoderDC.from_config(config)
    return sum(p.numel() for p in model.parameters()), dict(model.config), True


def load_of(recipe: Recipe, phase: PhaseConfig) -> Load:
    """Samples and tokens of one step of a phase."""
    samples = samples_per_task(phase.mix, recipe.data.samples_per_step)
    return Load(phase, samples, {task: mean_sample(recipe, phase.sources, task) for task in samples})


def mean_sample(recipe: Recipe, sources: list[SourceConfig], task: str) -> MeanSample:
    """Mean sample of a task: measured on the sources' indexes if all of them are on disk, else assumed."""
    image = recipe.data.und if task == "i2t" else recipe.data.gen
    pixels = recipe.model.autoencoder.pixels
    sources = [s for s in sources if not s.tasks or task in s.tasks]
    if sources and all((Path(s.path) / "manifest.json").is_file() for s in sources):
        rows = [row for source in sources for row in _index_rows(source, task)]
        if rows:
            values = [_measure(row, image, pixels) for row in rows]
            mean = [sum(column) / len(values) for column in zip(*values, strict=True)]
            return MeanSample(*mean, measured=True)
    text, supervised = ASSUMED_TEXT[task]
    picture = picture_tokens(image, pixels)
    seen, made = (0.0 if task == "t2i" else picture), (0.0 if task == "i2t" else picture)
    return MeanSample(text, supervised, seen, float(task != "t2i"), made, measured=False)


def picture_tokens(image: ImageConfig, pixels: int) -> float:
    """Visual tokens of one picture; a mean at native resolution."""
    if image.mode == "native":
        return float(min(ASSUMED_NATIVE_TOKENS, image.max_tokens))
    return float((image.side // pixels) ** 2)


def tokenwise(side: float) -> tuple[int, int, int]:
    """(VAE tokens, least and most ViT tokens) of a picture where the encoders' tokens stand side by side, as in BAGEL.

    The VAE makes one token of 16 x 16 pixels. The ViT sees at most 512 pixels a side in patches of 16, or 518 in patches of 14.
    """
    return round((side / 16) ** 2), int(min(side, 512) // 16) ** 2, int(min(side, 518) // 14) ** 2


def memory_of(recipe: Recipe, stage: Stage, load: Load, world: int, tokens: float) -> Memory:
    """Bytes on one of `world` GPUs for a pack of `tokens` tokens with the mean composition of the phase.

    FSDP2 keeps fp32 weights, gradients, both Adam moments and the average in shards. Gathered at once: the root (embedding,
    adapters, head) and two units, a unit being a decoder layer or the vision encoder; all of them without
    engine.reshard_after_forward. Activations are those that autograd keeps with flash-like attention, per layer and token:

        decoder  trained 8H + 4bH + (4+b)(Q+K) + 4bQ + 4bM    frozen, with gradient 8H + 4(Q+K) + 4bQ + 3bM
        encoder  trained 8bh + 2bm                            below everything that trains 0

    where b is bytes per value, H hidden, Q and K the widths of queries and keys, M the MLP; norms keep an fp32 copy, and K and V
    are repeated to all query heads. Logits of supervised tokens are kept in b bytes and, for the loss, twice in fp32, and their
    gradient in b bytes. Backward works on one layer at a time, in as much again as that layer keeps.
    """
    model = _meta(recipe)
    v, d = recipe.model.vision, recipe.model.decoder
    b = 2 if recipe.engine.precision == "bf16" else 4
    share = tokens / load.tokens
    stored = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for name, p in model.named_parameters() if group_of(name) in stage.trainable)
    units = sorted(sum(p.numel() for p in unit.parameters()) for unit in (model.vision, *model.decoder.layers))
    root = stored - sum(units)
    gathered = root + sum(units[-2:]) if recipe.engine.reshard_after_forward else stored
    grads_of = max(units[-1], root) if set(stage.trainable) & {"decoder", "vision"} else min(trained, root)
    accumulates = recipe.data.slots > world and not recipe.engine.reduce_every_micro_step

    decoder_layer = encoder_layer = 0.0
    if stage.loss == "tokens":
        query, key = d.heads * d.head_dim, d.kv_heads * d.head_dim
        if "decoder" in stage.trainable:
            decoder_layer = 8 * d.hidden + 4 * b * d.hidden + (4 + b) * (query + key) + 4 * b * query + 4 * b * d.mlp
        else:
            decoder_layer = 8 * d.hidden + 4 * (query + key) + 4 * b * query + 3 * b * d.mlp
    encoder_layers = v.layers if "vision" in stage.trainable else v.expert_layers if "stem_expert" in stage.trainable else 0
    encoder_layer = 8 * b * v.hidden + 2 * b * v.mlp
    patches = share * load.total(lambda s: s.seen) * v.shuffle**2
    supervised = share * load.total(lambda s: s.supervised)
    ones = max(tokens * decoder_layer, patches * encoder_layer)
    if stage.loss != "tokens":
        tokens, supervised = 0.0, 0.0
    autoencoder, config, _ = autoencoder_of(recipe)
    kept = {
        "weights, fp32 shard": 4 * stored / world,
        "gradients, fp32 shard": 4 * trained / world + (4 * trained if accumulates else 0),
        "Adam moments, fp32 shards": 8 * trained / world,
        "average (EMA), fp32 shard": 4 * trained / world if recipe.ema.decay else 0.0,
        "gathered weights": b * gathered,
        "gradients on their way": (b + 4) * grads_of,
        "autoencoder, fp32 copy": 4 * autoencoder,
        "activations of the decoder": d.layers * tokens * decoder_layer,
        "activations of the encoder": encoder_layers * patches * encoder_layer,
        "activations of one layer in backward": ones,
        "logits": supervised * d.vocab * (2 * b + 8),
    }
    return Memory(tokens, kept, 0.0 if stage.loss != "tokens" else _encoding(recipe, load, share, config))


def _encoding(recipe: Recipe, load: Load, share: float, config: Mapping[str, Any]) -> float:
    """Three of the autoencoder's largest feature maps, fp32, for as many pictures as it encodes at once."""
    layers, channels = config["encoder_layers_per_block"], config["encoder_block_out_channels"]
    per_pixel = channels[0] if layers[0] else channels[1] / 4
    largest = 0.0
    for task, mean in load.means.items():
        num = share * load.samples[task] * (mean.pictures_seen + (mean.made > 0))
        each = (mean.seen + mean.made) / max(1.0, mean.pictures_seen + (mean.made > 0))
        largest = max(largest, min(recipe.model.autoencoder.chunk, num) * each)
    return 3 * 4 * per_pixel * largest * recipe.model.autoencoder.pixels**2


def flops_of(recipe: Recipe, stage: Stage, load: Load) -> dict[str, float]:
    """FLOPs of one optimizer step over all GPUs by module, forward and the backward that this stage needs."""
    v, d = recipe.model.vision, recipe.model.decoder
    trains = stage.trainable
    vision_trains = "vision" in trains or "stem_expert" in trains
    flows = vision_trains or "und_adapter" in trains or "gen_adapter" in trains
    patches = v.shuffle**2 * load.total(lambda s: s.seen)
    pairs = load.total(lambda s: (v.shuffle**2 * s.seen) ** 2 / max(1.0, s.pictures_seen))
    stack: dict[str, Any] = {"hidden": v.hidden, "mlp": v.mlp, "num_patches": round(patches), "attention_pairs": round(pairs)}
    shared = v.layers - v.expert_layers
    embedding = 3 * v.patch**2
    if stage.loss == "router":
        return {"vision encoder": vision_flops(**stack, layers=shared, patch_features=embedding, trainable=False)}
    if "stem_expert" in trains:
        encoder = vision_flops(**stack, layers=shared, patch_features=embedding, trainable=False)
        encoder += vision_flops(**stack, layers=v.expert_layers, patch_features=0, trainable=True)
    else:
        encoder = vision_flops(**stack, layers=v.layers, patch_features=embedding, trainable="vision" in trains)
    semantic = v.shuffle**2 * v.hidden + recipe.model.autoencoder.channels
    und_tokens = load.total(lambda s: s.seen, "i2t")
    gen_tokens = load.total(lambda s: s.seen + s.made, "t2i", "it2i")
    adapters = adapter_flops(semantic, d.hidden, d.hidden, round(und_tokens), "und_adapter" in trains, vision_trains)
    adapters += adapter_flops(semantic, d.hidden, d.hidden, round(gen_tokens), "gen_adapter" in trains, vision_trains)
    und_pairs = load.total(lambda s: s.tokens**2 / 2, "i2t") + load.total(
        lambda s: s.text**2 / 2 + s.text * s.seen, "t2i", "it2i"
    )
    gen_pairs = load.total(lambda s: s.seen**2 + s.made * s.tokens, "t2i", "it2i")
    branches: list[float] = []
    for tokens, seen_pairs, logits in (
        (load.tokens - gen_tokens, und_pairs, load.total(lambda s: s.supervised)),
        (gen_tokens, gen_pairs, 0.0),
    ):
        branches.append(
            decoder_flops(
                hidden=d.hidden,
                layers=d.layers,
                heads=d.heads,
                kv_heads=d.kv_heads,
                head_dim=d.head_dim,
                mlp=d.mlp,
                vocab=d.vocab,
                num_tokens=round(tokens),
                attention_pairs=round(seen_pairs),
                num_logit_tokens=round(logits),
                trainable="decoder" in trains,
                needs_input_grad=flows,
            )
        )
    return {"vision encoder": encoder, "adapters": adapters, "Und branch": branches[0], "Gen branch": branches[1]}


def encoding_flops(recipe: Recipe, load: Load) -> float:
    """FLOPs of one step's DC-AE encodings, over all GPUs."""
    _, config, _ = autoencoder_of(recipe)
    types = config["encoder_block_types"]
    blocks = config["encoder_block_out_channels"]
    return autoencoder_flops(
        blocks,
        config["encoder_layers_per_block"],
        [types] * len(blocks) if isinstance(types, str) else types,
        config["encoder_qkv_multiscales"],
        recipe.model.autoencoder.channels,
        round(load.total(lambda s: s.seen + s.made) * recipe.model.autoencoder.pixels**2),
        head_dim=config.get("attention_head_dim", 32),
        pixel_unshuffle=config["downsample_block_type"] == "pixel_unshuffle",
    )


def step_seconds(recipe: Recipe, stage: Stage, load: Load, num_gpus: int, gpu_name: str, mfu: float = MFU) -> float:
    """Estimated time of one optimizer step, at a share `mfu` of the card's peak."""
    work = sum(flops_of(recipe, stage, load).values())
    if stage.loss == "tokens":
        work += TF32_COST * encoding_flops(recipe, load)
    return work / (num_gpus * card(gpu_name)[1] * mfu)


def card(name: str) -> tuple[float, float]:
    """(usable GiB, dense bf16 FLOP/s) of a kind of GPU. Raises UserError."""
    if name not in CARDS:
        raise UserError(f"--gpu {name}: not a known kind of GPU; known are {', '.join(CARDS)}")
    return CARDS[name]


def usable(name: str) -> float:
    """Bytes of a card that a plan may spend."""
    return card(name)[0] * GIB * (1 - RESERVE)


def problems_of(recipe: Recipe, stage: Stage, loads: list[Load], num_gpus: int, gpu_name: str) -> list[str]:
    """Why the recipe cannot run on these GPUs, and what would; empty if it can."""
    slots, cap = recipe.data.slots, recipe.data.pack_tokens
    found = []
    if slots % num_gpus:
        fits = [n for n in range(1, slots + 1) if slots % n == 0]
        below, above = max((n for n in fits if n < num_gpus), default=1), min((n for n in fits if n > num_gpus), default=slots)
        found.append(f"{num_gpus} GPUs cannot share data.slots={slots} evenly; {' or '.join(map(str, sorted({below, above})))} can")
    for load in loads:
        if load.tokens / slots > cap:
            found.append(
                f"phase {load.phase.name} packs {load.tokens / slots:,.0f} tokens on average, more than data.pack_tokens={cap}; "
                "raise it or data.slots, or lower data.samples_per_step"
            )

    def peak(world: int, tokens: float) -> float:
        return max(memory_of(recipe, stage, load, world, tokens).peak for load in loads)

    room = usable(gpu_name)
    if (needed := peak(num_gpus, cap)) > room:
        ways = []
        if more := next((n for n in range(num_gpus + 1, slots + 1) if slots % n == 0 and peak(n, cap) <= room), None):
            ways.append(f"{more} GPUs")
        if tokens := next((t for t in range(cap - cap // 16, 0, -max(1, cap // 16)) if peak(num_gpus, t) <= room), None):
            ways.append(f"data.pack_tokens={tokens} (with fewer samples a step or more slots)")
        if larger := [name for name in CARDS if needed <= usable(name)]:
            ways.append(f"{num_gpus} x {min(larger, key=lambda name: CARDS[name][0])}")
        advice = ", or ".join(ways) or "more GPUs, larger ones and shorter packs together"
        found.append(f"{needed / GIB:.1f} GiB do not fit into {room / GIB:.1f} GiB of a {gpu_name}; {advice} would fit")
    return found


def print_plan(recipe: Recipe, recipe_path: str, num_gpus: int, gpu_name: str, mfu: float = MFU) -> int:
    """Print the plan. Returns 0, or 1 where the recipe cannot run on these GPUs. Raises UserError on an unknown kind."""
    if num_gpus < 1:
        raise UserError(f"--gpus {num_gpus}: at least one GPU is needed")
    card(gpu_name)
    stage = stage_of(recipe, recipe_path)
    loads = [load_of(recipe, phase) for phase in phases(recipe)]
    console = Console(width=100, highlight=False)
    console.print(f"[bold]{recipe_path}[/bold]: {stage.name}, {stage.title}, on {num_gpus} x {gpu_name}\n")
    console.print(_parameter_table(recipe, stage))
    for table in (_token_table(recipe, loads), _step_table(recipe, stage, loads, num_gpus, gpu_name, mfu)):
        console.print(table)
    vae, least, most = tokenwise(1024)
    emma = (1024 // recipe.model.autoencoder.pixels) ** 2
    console.print(
        f"A 1024² reference picture in editing: {emma:,} tokens, {vae + least:,} to {vae + most:,} token-wise: "
        f"1/{(vae + least) / emma:.1f} to 1/{(vae + most) / emma:.1f}\n"
    )
    console.print(_memory_table(recipe, stage, loads, num_gpus, gpu_name))
    problems = problems_of(recipe, stage, loads, num_gpus, gpu_name)
    for problem in problems:
        console.print(f"[red]cannot run:[/red] {problem}")
    if not problems:
        console.print(f"[green]fits[/green] on {num_gpus} x {gpu_name}")
    return int(bool(problems))


def _parameter_table(recipe: Recipe, stage: Stage) -> Table:
    table = _table("Parameters", "", "stored", "trained", "per text token", "per und. picture", "per reference", "per target")
    parts = parts_of(recipe, stage)
    totals = [0] * 6
    for p in parts:
        is_text = p.und and not p.gen and p.name != "Und adapter" or p.name.startswith("layers, shared")
        sees = p.name in ("vision encoder", "router")
        head = p.name in ("velocity head", "text embedding and LM head")
        active = (is_text, p.und and not head, p.gen and not head, p.gen and not sees)
        counts = [p.stored, p.trainable, *(p.stored * on for on in active)]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        table.add_row(p.name, *(_count(n) for n in counts))
    table.add_section()
    table.add_row("[bold]model[/bold]", *(f"[bold]{_count(n)}[/bold]" for n in totals))
    autoencoder, _, there = autoencoder_of(recipe)
    table.add_row("autoencoder, never trained", _count(autoencoder), *["-"] * 5)
    if not there:
        table.caption = f"{recipe.model.autoencoder.path} is not here: dc-ae-f32c32-sana-1.0 assumed"
    return table


def _token_table(recipe: Recipe, loads: list[Load]) -> Table:
    table = _table("Tokens of a mean sample", "task, pictures", "text", "seen", "target", "EMMA", "token-wise 16x", "ratio", "from")
    done = set()
    for load in loads:
        for task, mean in load.means.items():
            if (key := (task, mean)) in done:
                continue
            done.add(key)
            image = recipe.data.und if task == "i2t" else recipe.data.gen
            pixels = recipe.model.autoencoder.pixels
            least = most = mean.text
            if mean.seen:
                vae, low, high = tokenwise(pixels * math.sqrt(mean.seen / mean.pictures_seen))
                reference = vae if task == "it2i" else 0  # understanding looks through the ViT alone
                least, most = least + mean.pictures_seen * (reference + low), most + mean.pictures_seen * (reference + high)
            made = tokenwise(pixels * math.sqrt(mean.made))[0]
            least, most = least + made, most + made
            size = "native" if image.mode == "native" else f"{image.side}²" + " buckets" * (image.mode == "buckets")
            table.add_row(
                f"{task}, {size}",
                *(f"{n:,.0f}" if n else "-" for n in (mean.text, mean.seen, mean.made)),
                f"{mean.tokens:,.0f}",
                f"{least:,.0f}" if most == least else f"{least:,.0f}-{most:,.0f}",
                f"1/{least / mean.tokens:.1f}",
                "index" if mean.measured else "assumed",
            )
    return table


def _step_table(recipe: Recipe, stage: Stage, loads: list[Load], num_gpus: int, gpu_name: str, mfu: float) -> Table:
    slots = recipe.data.slots
    table = _table("Steps", "", *(load.phase.name for load in loads))
    lengths = _phase_steps(recipe, loads)
    seconds = [step_seconds(recipe, stage, load, num_gpus, gpu_name, mfu) for load in loads]
    work = [flops_of(recipe, stage, load) for load in loads]
    encoded = [encoding_flops(recipe, load) if stage.loss == "tokens" else 0.0 for load in loads]
    rows: dict[str, list[str]] = {
        "samples a step": [f"{sum(x.samples.values()):,}" for x in loads],
        "  of them": [" + ".join(f"{n:,} {task}" for task, n in x.samples.items()) for x in loads],
        "tokens a step": [_count(x.tokens) for x in loads],
        f"tokens a pack (at most {recipe.data.pack_tokens:,})": [f"{x.tokens / slots:,.0f}" for x in loads],
        "packs a step (slots)": [str(slots)] * len(loads),
        "packs per GPU": [f"{slots / num_gpus:g}" + " (must be whole)" * (slots % num_gpus > 0)] * len(loads),
        **{f"FLOPs a step, {name}": [_flops(w[name]) for w in work] for name in work[0]},
        "FLOPs a step, model": [_flops(sum(w.values())) for w in work],
        "FLOPs a step, autoencoder": [_flops(e) for e in encoded],
        f"time of a step, at {mfu:.0%} MFU": [_seconds(s) for s in seconds],
        "steps": [f"{n:,}" for n in lengths],
        "samples": [_count(n * sum(x.samples.values())) for n, x in zip(lengths, loads, strict=True)],
        "tokens": [_count(n * x.tokens) for n, x in zip(lengths, loads, strict=True)],
        "time": [_days(n * s) for n, s in zip(lengths, seconds, strict=True)],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    total = sum(n * s for n, s in zip(lengths, seconds, strict=True))
    table.caption = f"stage: {_days(total)}, {total * num_gpus / 3600:,.0f} GPU-hours, without checkpoints, samples and failures"
    return table


def _memory_table(recipe: Recipe, stage: Stage, loads: list[Load], num_gpus: int, gpu_name: str) -> Table:
    slots, cap = recipe.data.slots, recipe.data.pack_tokens
    worst = max(loads, key=lambda x: memory_of(recipe, stage, x, num_gpus, cap).peak)
    mean = memory_of(recipe, stage, worst, num_gpus, worst.tokens / slots)
    full = memory_of(recipe, stage, worst, num_gpus, cap)
    title = "Memory per GPU" + f", phase {worst.phase.name}" * (len(loads) > 1)
    table = _table(title, "", f"mean pack, {worst.tokens / slots:,.0f} tokens", f"full pack, {cap:,} tokens")
    for name in full.kept:
        if full.kept[name]:
            table.add_row(name, _gib(mean.kept[name]), _gib(full.kept[name]))
    table.add_row("autoencoder at work (before the activations)", _gib(mean.encoding), _gib(full.encoding))
    table.add_section()
    table.add_row("[bold]peak[/bold]", f"[bold]{_gib(mean.peak)}[/bold]", f"[bold]{_gib(full.peak)}[/bold]")
    room = _gib(usable(gpu_name))
    table.add_row(f"{gpu_name}, {card(gpu_name)[0]:.1f} GiB less {RESERVE:.0%} reserve", room, room)
    return table


def _meta(recipe: Recipe) -> Emma:
    with torch.device("meta"):
        return Emma(recipe.model)


def _part_of(name: str) -> str:
    words = name.split(".")
    if words[0] == "decoder":
        if words[1] in ("embed_tokens", "lm_head"):
            return PARTS[0][0]
        owner = words[3] if words[1] == "layers" else words[2]
        return PARTS[("shared", "und", "gen").index(owner) + 1][0]
    groups = ("vision", "stem_expert", "router", "und_adapter", "gen_adapter", "velocity_head")
    return PARTS[4 + groups.index(group_of(name))][0]


def _index_rows(source: SourceConfig, task: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    folder = Path(source.path)
    try:
        shards = json.loads((folder / "manifest.json").read_text())["shards"][:INDEX_SHARDS]
        tables = [pq.read_table((folder / s["name"]).with_suffix(".idx.parquet"), filters=[("task", "=", task)]) for s in shards]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot read its manifest and indexes ({error}); `emma-data index` makes them") from None
    return [row for table in tables for row in table.to_pylist() if set(source.require_tags) <= set(row["tags"])]


def _measure(row: dict[str, Any], image: ImageConfig, pixels: int) -> tuple[float, ...]:
    """(text, supervised, seen, pictures seen, made) of a record, as means over its alternatives."""

    def tokens(number: int) -> int:
        height, width = picture_size(row["widths"][number], row["heights"][number], image, pixels)
        return height * width // pixels**2

    num = len(row["text_tokens"])
    seen = sum(tokens(i) for context in row["context"] for i in context)
    made = sum(tokens(i) for i in row["target"] if i >= 0)
    pictures = sum(len(context) for context in row["context"])
    return tuple(x / num for x in (sum(row["text_tokens"]), sum(row["supervised_tokens"]), seen, pictures, made))


def _phase_steps(recipe: Recipe, loads: list[Load]) -> list[int]:
    """Steps of each phase; the last lasts until train.steps."""
    left, lengths = recipe.train.steps, []
    for load in loads[:-1]:
        lengths.append(min(load.phase.steps, left))
        left -= lengths[-1]
    return [*lengths, left]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _count(n: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:,.1f} {unit}" if unit != "B" else f"{n / size:,.3f} B"
    return f"{n:,.0f}" if n else "-"


def _flops(n: float) -> str:
    return next((f"{n / size:,.1f} {unit}" for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)) if n >= size), f"{n / 1e9:,.1f} GFLOP")


def _gib(n: float) -> str:
    return f"{n / GIB:,.2f} GiB"


def _seconds(s: float) -> str:
    return f"{s:,.1f} s" if s >= 1 else f"{s * 1e3:,.1f} ms"


def _days(s: float) -> str:
    return f"{s / 86400:,.1f} days" if s >= 86400 else f"{s / 3600:,.1f} h" if s >= 3600 else f"{s / 60:,.1f} min"
