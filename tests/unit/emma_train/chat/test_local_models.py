"""A model in process, tiny and random: that its template, images and limits work, not what it says."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from emma_train.chat.local_models import TransformersModel, VllmModel, model_stamp
from emma_train.chat.request import ChatRequest
from emma_train.errors import UserError
from tests.helpers import ASSETS
from tests.shards import png

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / "tokenizer" / "tokenizer.json"),
        additional_special_tokens=["<image>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA with random weights."""
    folder, text = tmp_path_factory.mktemp("models") / "llava", tokenizer()
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        images,
        text,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=28, patch_size=14, projection_dim=32),
        text_config=transformers.LlamaConfig(**SMALL, vocab_size=len(text), bos_token_id=None, eos_token_id=2),
        image_token_id=text.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.seconds
def test_an_answer_depends_on_the_images_and_ends_at_the_limit(vision_model: Path) -> None:
    model = TransformersModel(vision_model, max_tokens=12, device="cpu")
    assert model.has_vision
    requests = [ChatRequest(("What?", png(0), png(1))), ChatRequest(("What?", png(2), png(1)), system="Be brief.")]
    (_, one), (_, other) = model.reply(requests)
    assert one.text and other.text and one.text != other.text
    assert {one.failure, other.failure} == {"truncated"}
    assert dict(model.reply(requests)) == {0: one, 1: other}
    corrected = ChatRequest(("What?", png(0)), correction=("A dog", "Answer as JSON."))
    assert dict(model.reply([corrected]))[0].text


@pytest.mark.seconds
def test_a_model_without_vision_answers_texts_and_refuses_images(tmp_path: Path) -> None:
    text = tokenizer()
    config = transformers.LlamaConfig(**SMALL, vocab_size=len(text), bos_token_id=None, eos_token_id=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    model = TransformersModel(tmp_path, max_tokens=4, device="cpu")
    assert dict(model.reply([ChatRequest(("What is red?",), system="Be brief.")]))[0].text
    with pytest.raises(UserError, match="reads no images"):
        dict(model.reply([ChatRequest(("What?", png(0)))]))


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    before = model_stamp(tmp_path)
    assert model_stamp(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"0" * 101)
    assert model_stamp(tmp_path) != before


def test_a_folder_without_a_model_and_a_missing_vllm_say_what_to_do(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    with pytest.raises(UserError, match="give a folder, or --endpoint"):
        TransformersModel(tmp_path)
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match="start `vllm serve MODEL` there"):
            VllmModel("model")
