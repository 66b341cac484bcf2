"""One micro-batch: latents cached or encoded, and the loss of every stage."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from emma_train.config.schema import FlowConfig, LossConfig
from emma_train.metrics import recording
from emma_train.model.emma import training_experts
from emma_train.model.parameter_groups import group_of
from emma_train.objectives.flow import add_noise
from emma_train.objectives.loss import LossAccumulator, count, losses
from emma_train.sequence.geometry import to_patches
from emma_train.sequence.pack import Sample, pack
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import STAGES
from emma_train.training.forward import clean_latents, micro_loss
from emma_train.training.metric_reduction import to_host
from emma_train.training.source_losses import NUM_TOKENS, pop_source_losses
from tests.helpers import PATCH, SHUFFLE, FakeAutoencoder, i2t_sample, make_image, mixed_samples, tiny_emma, tiny_model

FAKE = FakeAutoencoder()


def with_latents(cached: bool) -> list[Sample]:
    samples = mixed_samples()
    for number, sample in enumerate(samples):
        for name, pixels in sample.images.items():
            image = make_image(*pixels.grid, seed=number + len(name))
            pixels.patches = to_patches(image, PATCH, SHUFFLE)
            pixels.latent = FAKE.encode([torch.from_numpy(image)])[0].numpy() if cached else None
    return samples


def test_encoded_latents_are_the_cached_ones_in_the_same_order() -> None:
    cached, online = pack(with_latents(True)), pack(with_latents(False))
    assert cached.latents is not None and online.latents is None
    got, want = clean_latents(online, FAKE), clean_latents(cached, FAKE)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(want.numpy(), cached.latents.numpy() * FAKE.scale)


def test_a_pack_without_images_has_no_latents() -> None:
    assert clean_latents(pack([i2t_sample(grids=[])]), FAKE).shape == (0, 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_gives_gradients_to_its_groups_and_to_no_other(name: str) -> None:
    stage = STAGES[name]
    model = tiny_emma(tiny_model(vision={"stem_expert": stage.stem_expert, "router": stage.router}))
    freeze(model, stage.trainable)
    understanding = [i2t_sample("a", stem=1), i2t_sample("b", [(1, 2)], stem=0)]
    batch = pack(understanding if stage.tasks == ("i2t",) else with_latents(True))
    accumulator = LossAccumulator(LossConfig(), count([batch], stage.loss), torch.device("cpu"))
    loss = micro_loss(model, FAKE, batch, FlowConfig(), stage, accumulator)  # type: ignore[arg-type]
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    moved = {group_of(n) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(stage.trainable)


def test_the_loss_of_a_pack_is_its_two_weighted_means() -> None:
    model, batch = tiny_emma(), pack(with_latents(True))
    accumulator = LossAccumulator(LossConfig(), count([batch], "tokens"), torch.device("cpu"))
    loss = micro_loss(model, FAKE, batch, FlowConfig(), STAGES["stage2"], accumulator)  # type: ignore[arg-type]
    step = add_noise(batch, clean_latents(batch, FAKE), FlowConfig())  # type: ignore[arg-type]
    out = model(batch, step.latents, step.time)
    want = 0.25 * torch.nn.functional.cross_entropy(out.logits, batch.labels)
    want = want + torch.nn.functional.mse_loss(out.velocity, step.velocity)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_losses_by_source_add_up_to_those_of_their_tasks() -> None:
    """Over two micro-batches; weighted by their tokens, the means are the loss of the task."""
    samples = [replace(s, source=f"source{number % 2}") for number, s in enumerate(with_latents(True) * 2)]
    model, batches = tiny_emma(), [pack(samples[:5]), pack(samples[5:])]
    counts = count(batches, "tokens")
    accumulator = LossAccumulator(LossConfig(), counts, torch.device("cpu"))
    with recording() as recorded:
        for batch in batches:
            micro_loss(model, FAKE, batch, FlowConfig(), STAGES["stage2"], accumulator)  # type: ignore[arg-type]
    values = {name: metric.value for name, metric in to_host(recorded).items()}
    tokens = {name.removeprefix(NUM_TOKENS): v for name, v in values.items() if name.startswith(NUM_TOKENS)}
    means = pop_source_losses(values)
    by_task = losses(accumulator.sums.tolist(), counts, LossConfig())
    assert {name.split("/")[0] for name in tokens} == {"i2t", "t2i", "it2i"}
    for task in ("i2t", "t2i", "it2i"):
        shares = {name: number for name, number in tokens.items() if name.startswith(f"{task}/")}
        assert sum(shares.values()) == counts.by_task[task]
        mean = sum(means[f"loss/{name}"] * number for name, number in shares.items()) / counts.by_task[task]
        assert mean == pytest.approx(by_task[f"loss/{task}"], rel=1e-5)
    assert any(len([name for name in tokens if name.startswith(task)]) == 2 for task in ("i2t", "t2i", "it2i"))


@torch.no_grad()
def test_images_of_the_stem_expert_are_counted_by_label_and_then_as_the_router_would_choose() -> None:
    labels = [[1, 0, -1], [0, 0], [1, 1, 1]]
    batches = [pack([i2t_sample(f"{b}{n}", stem=s) for n, s in enumerate(stems)]) for b, stems in enumerate(labels)]
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "router": True}))
    logits = torch.cat([model.route(batch) for batch in batches])
    model.vision.router.fc2.bias[1] -= (logits[:, 1] - logits[:, 0]).sort().values[-4:-2].mean()
    counted = {}
    for name in ("stage3", "stage4_expert", "stage4_router"):
        accumulator = LossAccumulator(LossConfig(), count(batches, STAGES[name].loss), torch.device("cpu"))
        with recording() as recorded:
            for batch in batches:
                micro_loss(model, FAKE, batch, FlowConfig(), STAGES[name], accumulator)  # type: ignore[arg-type]
        if share := to_host(recorded).get("vision/stem_share"):
            counted[name] = (share.value, share.num_values)
    chosen = [e for batch in batches for e in model.vision.choose_experts(model.route(batch), len(batch.stem))]
    assert counted == {"stage4_expert": (4, 8), "stage4_router": (3, 8)}
    assert sum(chosen) == 3 and sum(e for batch in batches for e in training_experts(batch)) == 4
