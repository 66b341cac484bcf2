"""What is asked of DeepSpeed, and what is said where it is not there."""

import sys

import pytest
import torch

from emma_train.config.schema import EngineConfig
from emma_train.engine.deepspeed import _ModelThroughDeepSpeed, _Root, deepspeed_config, import_deepspeed
from emma_train.errors import UserError
from emma_train.sequence.pack import pack
from tests.helpers import i2t_sample, tiny_emma, tiny_model


def test_without_the_package_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"engine.kind is deepspeed, which cannot be imported .*\[deepspeed\].*fsdp"):
        import_deepspeed(torch.device("cpu"))


def test_gradients_are_reduced_and_added_up_in_float32() -> None:
    settings = deepspeed_config(tiny_emma(), EngineConfig(precision="bf16", zero_stage=3), 0.5, torch.device("cpu"))
    assert settings["bf16"] == {"enabled": True}
    assert settings["communication_data_type"] == settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["gradient_clipping"] == 0.5
    assert "offload_optimizer" not in settings["zero_optimization"]


def test_vectors_are_kept_by_zero_3_and_matrices_are_not() -> None:
    model = tiny_emma()
    limit = deepspeed_config(model, EngineConfig(), 1.0, torch.device("cpu"))["zero_optimization"][
        "stage3_param_persistence_threshold"
    ]
    assert {p.numel() <= limit for p in model.parameters() if p.ndim == 1} == {True}
    assert model.decoder.embed_tokens.weight.numel() > limit


@pytest.mark.seconds
def test_importing_the_engine_does_not_import_the_package() -> None:
    """Everything else must work without it, and its import takes a second."""
    import subprocess

    code = "import sys, emma_train.training.build; print('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_the_trainer_uses_of_a_model_is_there_and_forward_passes_go_through_the_engine() -> None:
    model = tiny_emma(tiny_model({"router": True, "stem_expert": True}))
    calls, root = [], _Root(model)

    def engine(method: str, *args: object, **kwargs: object) -> object:
        calls.append(method)
        return root(method, *args, **kwargs)

    through, batch = _ModelThroughDeepSpeed(model, engine), pack([i2t_sample()])
    latents, time = torch.zeros(4, 32), torch.zeros(0)
    one, other = through(batch, latents, time), model(batch, latents, time)
    assert torch.equal(one.logits, other.logits) and one.text_losses is None
    assert torch.equal(through.route(batch), model.route(batch))
    assert calls == ["__call__", "route"]
    assert through.vision is model.vision and list(through.parameters()) == list(model.parameters())
    assert dict(through.named_parameters()) == dict(model.named_parameters())
    assert dict(through.named_modules()) == dict(model.named_modules())
    through.train(False)
    assert not model.training
