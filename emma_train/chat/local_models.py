"""Chat models in this process: by transformers, or by vLLM where that is installed."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emma_train.chat.request import EMPTY, TRUNCATED, ChatReply, ChatRequest, chat_messages
from emma_train.errors import UserError


class TransformersModel:
    """A folder in Hugging Face's form, with vision (image-text-to-text) or without. Answers one request after another:
    for a few thousand images, or where nothing else is installed."""

    def __init__(self, folder: Path, max_tokens: int = 1024, temperature: float = 0.0, device: str = "") -> None:
        """`device`: as torch names it; empty: a GPU where there is one. Raises UserError if the folder has no model."""
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

        self.folder, self.max_tokens, self.temperature = folder, max_tokens, temperature
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.has_vision = hasattr(self._processor, "image_processor")
            kind = AutoModelForImageTextToText if self.has_vision else AutoModelForCausalLM
            model = kind.from_pretrained(folder, local_files_only=True, dtype="auto")
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--model {folder}: no chat model that transformers reads ({reason}); give a folder, or --endpoint"
            ) from None
        self._model = model.to(self._device).eval()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": model_stamp(self.folder), "temperature": self.temperature, "max_tokens": self.max_tokens}

    def reply(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatReply]]:
        """One reply per request. Raises UserError if the model has no vision and a request shows an image."""
        for number, request in enumerate(requests):
            yield number, self._reply(request)

    def _reply(self, request: ChatRequest) -> ChatReply:
        import torch

        if not self.has_vision and any(isinstance(part, bytes) for part in request.content):
            raise UserError(f"--model {self.folder}: reads no images; give a model with vision")
        inputs = self._processor.apply_chat_template(
            _template_messages(request, self.has_vision),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=self.max_tokens, **sampling)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        text = self._processor.decode(tokens, skip_special_tokens=True)
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        if len(tokens) >= self.max_tokens and int(tokens[-1]) not in ends:
            return ChatReply(text=text, failure=TRUNCATED, detail="the answer reached the limit of tokens")
        return ChatReply(text=text) if text.strip() else ChatReply(failure=EMPTY, detail="no text")


class VllmModel:
    """A folder or name of a model that vLLM runs on this machine's GPUs. Not tried by our tests: they have no GPU with
    vLLM. `vllm serve` with --endpoint does the same from another process."""

    def __init__(self, model: str, max_tokens: int = 1024, temperature: float = 0.0) -> None:
        """Raises UserError where vLLM is not installed."""
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise UserError(
                f"--backend vllm needs {error.name}: pip install vllm into an environment with its own torch, or start "
                f"`vllm serve MODEL` there and give --endpoint http://HOST:8000/v1"
            ) from None
        self.model, self.max_tokens, self.temperature = model, max_tokens, temperature
        self._llm = LLM(model=model, trust_remote_code=False)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}

    def reply(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatReply]]:
        """One reply per request, all of them in vLLM's own batches."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)
        outputs = self._llm.chat([chat_messages(request) for request in requests], params, use_tqdm=False)
        yield from enumerate(_vllm_reply(output.outputs[0]) for output in outputs)


def _vllm_reply(output: Any) -> ChatReply:
    if output.finish_reason == "length":
        return ChatReply(text=output.text, failure=TRUNCATED, detail="the answer reached the limit of tokens")
    return ChatReply(text=output.text) if output.text.strip() else ChatReply(failure=EMPTY, detail="no text")


def model_stamp(folder: Path) -> str:
    """A hash of config and tokenizer, and of names, sizes and times of all files: other weights give another one."""
    stamp = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        status = path.stat()
        stamp.update(json.dumps([path.name, status.st_size, status.st_mtime_ns]).encode())
        if path.suffix == ".json" and status.st_size < 1 << 20:
            stamp.update(path.read_bytes())
    return f"{folder.name}-{stamp.hexdigest()[:16]}"


def _template_messages(request: ChatRequest, has_vision: bool) -> list[dict[str, Any]]:
    """The request as messages of transformers' chat templates; those of models without vision take plain texts."""
    from PIL import Image

    def content(parts: Sequence[str | bytes]) -> Any:
        if not has_vision:
            return "\n".join(part for part in parts if isinstance(part, str))
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": Image.open(io.BytesIO(part)).convert("RGB")}
            for part in parts
        ]

    messages = [{"role": "user", "content": content(request.content)}]
    if request.system:
        messages.insert(0, {"role": "system", "content": content([request.system])})
    if request.correction:
        answer, problem = request.correction
        messages += [{"role": "assistant", "content": content([answer])}]
        messages += [{"role": "user", "content": content([problem])}]
    return messages
