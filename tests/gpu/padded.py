"""The baseline of the step benchmark (step.py): the same samples as a padded batch through modules of Hugging Face.

One Qwen3 for all tokens, so half of the decoder's weights, which favours the baseline; a SigLIP encoder over a batch of
images; torch's attention with a mask over the padded batch; logits of every token; autocast to bf16, fused AdamW,
clipping, averages. Not compiled. Useful FLOPs are those of the samples as EMMA counts them, so MFU compares.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emma_train.config.schema import Recipe
from emma_train.engine.torch_private import lerp_in_place
from emma_train.sequence.layout import ImageRole, TextSegment
from emma_train.sequence.pack import Sample, pack
from emma_train.stages.stage import stage_of
from tests.gpu.kernel_time import profile
from tests.gpu.step_setting import (
    Scale,
    Setting,
    make_recipe,
    make_samples,
    memory,
    reset_memory,
    utilisation,
    wait,
)

IGNORED = -100


@dataclass
class PaddedBatch:
    """Samples as rows of the same length, [B, S]."""

    ids: Tensor
    labels: Tensor
    """Of the next token; IGNORED where it is not supervised."""
    mask: Tensor
    """bool [B, 1, S, S]: what a query sees."""
    pixels: Tensor
    """float32 [images to be seen, 3, side, side] in [-1, 1]."""
    seen: Tensor
    """int64: index among B * S of each visual token of these images, in order."""
    latents: Tensor
    """[visual tokens of images to be made, C]"""
    made: Tensor
    """int64: the same for images to be made."""

    def to(self, device: torch.device) -> "PaddedBatch":
        """A copy on a device."""
        return PaddedBatch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


class PaddedModel(nn.Module):
    """A unified model in the plainest way: features of images take the places of tokens in a language model."""

    def __init__(self, recipe: Recipe, image_side: int) -> None:
        """`image_side`: of images to be seen, in pixels."""
        from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        decoder, vision, channels = recipe.model.decoder, recipe.model.vision, recipe.model.autoencoder.channels
        self.vision = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=vision.hidden,
                intermediate_size=vision.intermediate_size,
                num_hidden_layers=vision.num_used_layers,
                num_attention_heads=vision.heads,
                image_size=image_side,
                patch_size=vision.patch,
                vision_use_head=False,
            )
        )
        self.decoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=decoder.vocab,
                hidden_size=decoder.hidden,
                intermediate_size=decoder.intermediate_size,
                num_hidden_layers=decoder.num_layers,
                num_attention_heads=decoder.heads,
                num_key_value_heads=decoder.kv_heads,
                head_dim=decoder.head_dim,
                tie_word_embeddings=True,
                use_cache=False,
            )
        )
        self.patches_per_token = vision.shuffle**2
        self.adapter = nn.Sequential(
            nn.Linear(self.patches_per_token * vision.hidden, decoder.hidden),
            nn.GELU(),
            nn.Linear(decoder.hidden, decoder.hidden),
        )
        self.latent_adapter = nn.Sequential(
            nn.Linear(channels + 1, decoder.hidden), nn.GELU(), nn.Linear(decoder.hidden, decoder.hidden)
        )
        self.velocity_head = nn.Linear(decoder.hidden, channels)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """The loss: cross-entropy of supervised tokens and flow matching of the images to be made."""
        features = self.vision(pixel_values=batch.pixels).last_hidden_state
        # Which patches make one token does not matter for time.
        semantic = self.adapter(features.reshape(-1, self.patches_per_token * features.shape[-1]))
        noise = torch.randn_like(batch.latents)
        moment = torch.rand(len(noise), 1, device=noise.device)
        noised = torch.cat([torch.lerp(noise, batch.latents, moment), moment], dim=-1)
        embedded = self.decoder.get_input_embeddings()(batch.ids)
        rows = embedded.flatten(0, 1).index_copy(0, batch.seen, semantic.to(embedded.dtype))
        rows = rows.index_copy(0, batch.made, self.latent_adapter(noised).to(embedded.dtype))
        hidden = self.decoder.model(
            inputs_embeds=rows.view_as(embedded), attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        logits = self.decoder.lm_head(hidden).float()
        text = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        velocity = self.velocity_head(hidden.flatten(0, 1)[batch.made])
        return text + F.mse_loss(velocity.float(), batch.latents - noise)


def measure_padded(setting: Setting, scale: Scale, out: Path) -> dict[str, Any]:
    """Build the baseline, run the steps, and return what they took, under the names of `step_setting.measure`."""
    torch.manual_seed(0)
    recipe, device = make_recipe(setting, scale), torch.device(scale.device)
    samples = make_samples(recipe, setting, scale)
    side = next(image.grid[0] for image in samples[0][0].images.values())
    batches = [padded(recipe, rows, side) for rows in samples]
    started = time.perf_counter()
    with device:
        model = PaddedModel(recipe, side * recipe.model.vision.shuffle * recipe.model.vision.patch)
    step = _Step(model, batches, recipe)
    build_s = time.perf_counter() - started
    first_s, first_loss = step.timed()
    for _ in range(2):
        step.timed()
    reset_memory(device)
    timed = [step.timed() for _ in range(scale.num_steps)]
    seconds = statistics.median(s for s, _ in timed)
    packs = [pack(rows) for rows in samples]
    if setting.profile:
        profiled = profile(step.run)
        (out / f"profile-{setting.name}.txt").write_text(profiled.table)
    return {
        **asdict(setting),
        "num_layers": recipe.model.decoder.num_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_micro_step": sum(batch.num_tokens for batch in packs) / len(packs),
        "padded_tokens_per_micro_step": sum(batch.ids.numel() for batch in batches) / len(batches),
        "micro_steps": len(packs),
        "build_s": build_s,
        "first_step_s": first_s,
        "step_s": seconds,
        "samples_per_s": sum(map(len, samples)) / seconds,
        "tokens_per_s": sum(batch.num_tokens for batch in packs) / seconds,
        "first_loss": first_loss,
        "last_loss": timed[-1][1],
        **memory(device),
        **utilisation(recipe, stage_of(recipe), packs, seconds, device),
    }


def padded(recipe: Recipe, samples: Sequence[Sample], side: int) -> PaddedBatch:
    """Samples filled up to the longest one; images to be seen are square with `side` visual tokens."""
    longest = max(sample.num_tokens for sample in samples)
    ids, labels = torch.zeros(len(samples), longest, dtype=torch.int64), None
    labels = torch.full_like(ids, IGNORED)
    mask = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(samples), 1, 1)
    seen, made, latents = [], [], []
    for row, sample in enumerate(samples):
        start = 0
        for segment in sample.segments:
            if isinstance(segment, TextSegment):
                stop = start + len(segment.ids)
                ids[row, start:stop] = torch.tensor(segment.ids)
                if segment.supervised:
                    labels[row, start - 1 : stop - 1] = torch.tensor(segment.ids)
            else:
                image = sample.images[segment.name]
                stop = start + image.grid[0] * image.grid[1]
                rows = torch.arange(start, stop) + row * longest
                if segment.role is ImageRole.TARGET:
                    mask[row, start:stop, start:stop] = True
                    made.append(rows)
                    latents.append(torch.from_numpy(image.latent))
                else:
                    seen.append(rows)
            start = stop
        mask[row, :, start:] = False
        mask[row, start:, 0] = True  # a filled-up query sees something
    pixels = side * recipe.model.vision.shuffle * recipe.model.vision.patch
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.uniform(-1, 1, (len(seen), 3, pixels, pixels)).astype(np.float32))
    return PaddedBatch(ids, labels, mask[:, None], images, torch.cat(seen), torch.cat(latents), torch.cat(made))


class _Step:
    """An optimizer step over the same batches."""

    def __init__(self, model: PaddedModel, batches: Sequence[PaddedBatch], recipe: Recipe) -> None:
        self._model, self._batches, self._recipe = model, batches, recipe
        self._device = next(model.parameters()).device
        self._weights = list(model.parameters())
        self._averages = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(self._weights, lr=recipe.optimizer.lr, fused=True)

    def run(self) -> float:
        """One step; returns its loss."""
        total = torch.zeros((), device=self._device)
        for batch in self._batches:
            with torch.autocast(self._device.type, torch.bfloat16):
                loss = self._model(batch.to(self._device)) / len(self._batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._weights, self._recipe.optimizer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            lerp_in_place(self._averages, self._weights, 1 - self._recipe.ema.decay)
        return float(total)

    def timed(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        wait(self._device)
        started = time.perf_counter()
        loss = self.run()
        wait(self._device)
        return time.perf_counter() - started, loss
