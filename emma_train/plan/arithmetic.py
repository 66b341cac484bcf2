"""Memory and FLOPs of a recipe on N GPUs of a kind.

The model is built on the meta device and never allocated. Memory is what the code uses today.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from emma_train.config.mix import phases
from emma_train.config.schema import Recipe
from emma_train.engine.activation_checkpointing import checkpointed_layers
from emma_train.engine.muon import assign_owners, optimizer_lines, owner_loads
from emma_train.errors import UserError
from emma_train.flops.formulas import autoencoder_flops, newton_schulz_flops
from emma_train.flops.work import Work, module_flops
from emma_train.model.cross_entropy import ROWS
from emma_train.model.emma import Emma
from emma_train.plan.activations import (
    decoder_layer_bytes,
    encoder_layer_bytes,
    keys_per_token,
    uses_spans,
    value_bytes,
)
from emma_train.plan.autoencoder import autoencoder_of
from emma_train.plan.cards import card_name, usable_bytes
from emma_train.plan.parts import muon_matrices, parts_of, sizes_of
from emma_train.plan.samples import ReadIndexRows, StepLoad, step_load
from emma_train.plan.state import exchange_memory, state_memory
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.tasks import TASKS
from emma_train.stages.stage import makes_images, stage_of

TRANSIENT = ("decoder's activations", "encoder's activations", "one layer's backward", "logits")
"""Memory that is not in use while the autoencoder runs."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    kept: dict[str, float]
    """In use at the same time during the backward pass, by name."""
    encoding: float
    """Working set of the autoencoder. It runs before the forward pass, so never at the same time as TRANSIENT."""
    exchange: float = 0.0
    """Matrices of Muon on their way between ranks, in the optimizer step: not at that time either."""

    @property
    def peak(self) -> float:
        resident = sum(size for name, size in self.kept.items() if name not in TRANSIENT)
        return max(sum(self.kept.values()), resident + max(self.encoding, self.exchange))


class Plan:
    """A recipe on `num_gpus` GPUs of a kind. `mfu`: a share of their peak that was measured; None estimates their time
    (plan/roofline.py)."""

    def __init__(
        self,
        recipe: Recipe,
        recipe_path: str,
        num_gpus: int,
        gpu_name: str,
        mfu: float | None = None,
        read_index_rows: ReadIndexRows | None = None,
    ) -> None:
        """Without `read_index_rows`, sizes of samples are assumed. Raises UserError on an unknown kind of GPU, a recipe
        that is no stage or an index that cannot be read."""
        if num_gpus < 1:
            raise UserError(f"--gpus {num_gpus}: at least one GPU is needed")
        gpu_name = card_name(gpu_name)
        self.recipe, self.num_gpus, self.gpu_name, self.mfu = recipe, num_gpus, gpu_name, mfu
        self.stage = stage_of(recipe, recipe_path)
        with torch.device("meta"):
            model = Emma(recipe.model)
        self.parts = parts_of(model, self.stage)
        self.stored, self.trained = sum(p.stored for p in self.parts), sum(p.trained for p in self.parts)
        self.sizes = sizes_of(model, self.stage, makes_images(recipe), recipe.optimizer.kind)
        self.units = self.sizes.units
        learns = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer_lines = optimizer_lines(recipe.optimizer, learns)
        self.muon_shapes = [tuple(p.shape) for p in muon_matrices(model).values()] * (recipe.optimizer.kind == "muon")
        self.autoencoder, self.encoder_config, self.has_autoencoder = autoencoder_of(recipe)
        self.loads = [step_load(recipe, phase, read_index_rows) for phase in phases(recipe)]

    @property
    def phase_steps(self) -> list[int]:
        """Steps of each phase; the last lasts until train.steps."""
        remaining, lengths = self.recipe.train.steps, []
        for load in self.loads[:-1]:
            lengths.append(min(load.phase.steps, remaining))
            remaining -= lengths[-1]
        return [*lengths, remaining]

    @property
    def encoder_layers(self) -> int:
        """Layers of the vision encoder that a gradient passes through."""
        v, trains = self.recipe.model.vision, self.stage.trainable
        return v.num_used_layers if "vision" in trains else v.expert_layers if "stem_expert" in trains else 0

    def memory(self, load: StepLoad, world: int, tokens: float) -> Memory:
        """Bytes on one of `world` GPUs for a pack of `tokens` tokens with the mean composition of the phase.

        plan/state.py has what the engine keeps, plan/activations.py what autograd keeps of each layer; layers of the
        encoder below all that trains keep nothing. Backward of one layer at a time needs as much again as that layer
        keeps. A layer that engine.activation_checkpointing recomputes keeps its input, and the rest only during its
        backward. Logits are computed for a few rows at a time, in two fp32 copies. The fp32 gradient of the LM head is
        left out: it exists before the "gradients on their way" of the root, and is no larger.
        """
        recipe, v, d = self.recipe, self.recipe.model.vision, self.recipe.model.decoder
        b, spans = value_bytes(recipe.engine), uses_spans(recipe)
        share, rank_tokens = tokens / load.tokens, tokens / recipe.engine.sequence_parallel
        patches = share * self._patches(load)
        supervised = share * load.total(lambda s: s.supervised)
        decodes, mode = self.stage.loss == "tokens", recipe.engine.activation_checkpointing
        recomputes = decodes and mode != "none"
        trains = "decoder" in self.stage.trainable
        decoder_layer = decoder_layer_bytes(d, recipe.engine, trains, spans, keys_per_token(load))
        encoder_layer = encoder_layer_bytes(v, recipe.engine, spans)

        def stack(num_layers: int, layer_bytes: float, hidden: int) -> float:
            num_inputs = len(checkpointed_layers(num_layers, mode))
            return (num_layers - num_inputs) * layer_bytes + num_inputs * b * hidden

        one_layer = max(decodes * rank_tokens * decoder_layer, patches * encoder_layer)
        kept = {
            **state_memory(recipe, self.sizes, world),
            "autoencoder, fp32 copy": 4 * self.autoencoder,
            "decoder's activations": decodes * rank_tokens * stack(d.num_layers, decoder_layer, d.hidden),
            "encoder's activations": patches * stack(self.encoder_layers, encoder_layer, v.hidden),
            "one layer's backward": (1 + recomputes) * one_layer,
            "logits": 8 * decodes * min(ROWS, supervised) * d.vocab,
        }
        encoding = self._encoding(load, share) if decodes else 0.0
        return Memory(kept, encoding, exchange_memory(recipe, self.sizes, world))

    def _encoding(self, load: StepLoad, share: float) -> float:
        """Bytes of three of the autoencoder's largest feature maps, in fp32, for the images that it encodes at once."""
        channels = self.encoder_config["encoder_block_out_channels"]
        full_size = self.encoder_config["encoder_layers_per_block"][0] > 0
        most = 0.0
        for task, mean in load.means.items():
            images = mean.images_seen + (mean.made > 0)
            at_once = min(self.recipe.model.autoencoder.chunk, share * load.samples[task] * images)
            most = max(most, at_once * (mean.seen + mean.made) / max(images, 1.0))
        per_pixel = channels[0] if full_size else channels[1] / 4
        return 3 * 4 * per_pixel * most * self.recipe.model.autoencoder.pixels**2

    def flops(self, load: StepLoad) -> dict[str, int]:
        """Useful FLOPs of one optimizer step over all GPUs, by module."""
        return module_flops(self.recipe.model, self.stage.trainable, self.work(load), self.stage.loss == "router")

    def repeated_flops(self, load: StepLoad) -> float:
        """FLOPs of one step that backward recomputes, over all GPUs: checkpointed layers and logits."""
        if self.stage.loss == "router":
            return 0
        v, d, mode = self.recipe.model.vision, self.recipe.model.decoder, self.recipe.engine.activation_checkpointing
        work = self.work(load)
        forward = module_flops(self.recipe.model, (), replace(work, logits=0))
        decoder, encoder = forward["Und branch"] + forward["Gen branch"], forward["vision encoder"]
        layers = decoder * len(checkpointed_layers(d.num_layers, mode)) / d.num_layers
        layers += encoder * len(checkpointed_layers(self.encoder_layers, mode)) / v.num_used_layers
        return layers + 2 * work.logits * d.vocab * d.hidden

    def work(self, load: StepLoad) -> Work:
        """Work of one step from its mean samples: what `pack_work` counts in the packs of such samples.

        Means stand for the samples: pairs, which are quadratic in a sample's length, come out too low where lengths
        differ.
        """
        shuffle, encoded = self.recipe.model.vision.shuffle, self.recipe.model.fusion != "latent"
        understood = [name for name, task in TASKS.items() if task.condition is ImageRole.UND]
        others = [name for name in TASKS if name not in understood]
        gen = load.total(lambda s: s.made, *understood) + load.total(lambda s: s.shown + s.made, *others)
        # Causal rows see half their sample; an instruction sees its reference, a target all that is before it.
        und_pairs = load.total(lambda s: (s.text + s.shown) * (s.text + s.shown + 1) / 2, *understood)
        und_pairs += load.total(lambda s: s.text * (s.text + 1) / 2 + s.text * s.shown, *others)
        if image_rules(self.recipe.model).full_und:  # each token of an image sees also those after it
            und_pairs += load.total(lambda s: s.shown * (s.shown / max(1.0, s.images_seen) - 1) / 2, *understood)
        gen_pairs = load.total(lambda s: s.shown**2 / max(1.0, s.images_seen), *others)
        gen_pairs += load.total(lambda s: s.made * s.tokens)
        return Work(
            patches=self._patches(load),
            patch_pairs=encoded * load.total(lambda s: (s.seen * shuffle**2) ** 2 / max(1.0, s.images_seen)),
            und_visual=load.total(lambda s: s.shown, *understood),
            gen_visual=gen,
            und_rows=load.tokens - gen,
            und_pairs=und_pairs,
            gen_pairs=gen_pairs,
            logits=load.total(lambda s: s.supervised),
        )

    def _patches(self, load: StepLoad) -> float:
        """Patches of a step that the vision encoder sees."""
        model = self.recipe.model
        return (model.fusion != "latent") * load.total(lambda s: s.seen) * model.vision.shuffle**2

    def encoding_flops(self, load: StepLoad) -> int:
        """FLOPs of one step's DC-AE encodings, over all GPUs; router tuning needs none."""
        if self.stage.loss == "router":
            return 0
        config, blocks = self.encoder_config, self.encoder_config["encoder_block_out_channels"]
        types = config["encoder_block_types"]
        return autoencoder_flops(
            blocks,
            config["encoder_layers_per_block"],
            [types] * len(blocks) if isinstance(types, str) else types,
            config["encoder_qkv_multiscales"],
            self.recipe.model.autoencoder.channels,
            round(load.total(lambda s: s.seen + s.made) * self.recipe.model.autoencoder.pixels**2),
            head_dim=config["attention_head_dim"],
            pixel_unshuffle=config["downsample_block_type"] == "pixel_unshuffle",
        )

    def newton_schulz_loads(self) -> list[int]:
        """FLOPs of each GPU's Newton-Schulz iterations in one step; zeros without Muon."""
        iterations = self.recipe.optimizer.muon.iterations
        costs = [newton_schulz_flops(rows, columns, iterations) for rows, columns in self.muon_shapes]
        return owner_loads(costs, assign_owners(costs, self.num_gpus), self.num_gpus)

    def peak(self, world: int, tokens: float) -> float:
        """Bytes on one of `world` GPUs for a pack of `tokens` tokens, in the phase that needs most."""
        return max(self.memory(load, world, tokens).peak for load in self.loads)

    def fits(self) -> bool:
        """Whether the recipe can run on these GPUs."""
        full = self.peak(self.num_gpus, self.recipe.data.pack_tokens)
        return not self.sharing_problems() and full <= usable_bytes(self.gpu_name)

    def with_changes(self, engine: dict[str, Any] | None = None, **changes: Any) -> "Plan":
        """The same plan with other values of engine.*, data.pack_tokens, num_gpus or gpu_name, and of data.slots where
        data.samples_per_step is set."""
        other = copy(self)
        other.num_gpus = changes.get("num_gpus", self.num_gpus)
        other.gpu_name = changes.get("gpu_name", self.gpu_name)
        data = replace(self.recipe.data, **{key: changes[key] for key in ("pack_tokens", "slots") if key in changes})
        other.recipe = replace(self.recipe, data=data, engine=replace(self.recipe.engine, **(engine or {})))
        return other

    def gpu_counts(self) -> list[int]:
        """Numbers of GPUs that can share the packs of a step evenly, in ascending order."""
        slots, engine = self.recipe.data.slots, self.recipe.engine
        counts = [n * engine.sequence_parallel for n in range(1, slots + 1) if slots % n == 0]
        return [n for n in counts if n % engine.replicate == 0]

    def sharing_problems(self) -> list[str]:
        """Why these GPUs cannot share the packs of a step, or the packs not hold its samples."""
        return [*self._count_problems(), *self._packing_problems()]

    def _count_problems(self) -> list[str]:
        counts, engine = self.gpu_counts(), self.recipe.engine
        if self.num_gpus in counts:
            return []
        below, above = [n for n in counts if n < self.num_gpus], [n for n in counts if n > self.num_gpus]
        fits = " or ".join(str(n) for n in (*below[-1:], *above[:1]))
        how = f", {engine.sequence_parallel} to a pack" if engine.sequence_parallel > 1 else ""
        how += f", in {engine.replicate} replicas" if engine.replicate > 1 else ""
        return [f"{self.num_gpus} GPUs cannot share data.slots={self.recipe.data.slots} evenly{how}; {fits} can"]

    def _packing_problems(self) -> list[str]:
        slots, cap = self.recipe.data.slots, self.recipe.data.pack_tokens
        return [
            f"phase {load.phase.name} packs {load.tokens / slots:,.0f} tokens on average, more than "
            f"data.pack_tokens={cap}; raise it or data.slots, or lower data.samples_per_step"
            for load in self.loads
            if load.tokens / slots > cap
        ]
