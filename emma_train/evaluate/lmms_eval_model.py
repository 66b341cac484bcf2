"""The adapter of lmms-eval 0.7.3. Only lmms-eval imports this file (lmms_eval_plugin.py).

python -m lmms_eval --model emma --model_args pretrained=RUN,experts=false --tasks ai2d --batch_size 16
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from emma_train.errors import UserError
from emma_train.evaluate.harness_model import HarnessModel, Message, MessagePart
from emma_train.generate.settings import TextSettings
from emma_train.sequence.request import Request
from emma_train.sequence.seeds import seed_of

MAX_NEW_TOKENS = 1024
"""Of an answer whose task has no limit."""
IMPLIED_STOP = ["\n\n"]
"""lmms-eval writes this into every task that has no stop strings, and its own chat models ignore it: it would cut an
answer after its first paragraph."""


class _Emma(lmms):
    """What the two forms of requests have in common."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        precision: str = "auto",
        ema: bool = True,
        experts: bool = True,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        """--model_args of the command; `pretrained` is a run folder, checkpoint or export. Raises UserError."""
        super().__init__()
        if unknown:
            known = "pretrained, precision, ema, experts and seed"
            raise UserError(f"--model_args {next(iter(unknown))}: emma has {known}")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        wanted = (device or "auto").partition(":")[0]
        if wanted != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        samples = int(batch_size) if str(batch_size).isdigit() else 1
        self.model = HarnessModel(pretrained, wanted, precision, bool(ema), bool(experts), samples)
        self.seed = seed

    @property
    def device(self) -> torch.device:
        """lmms-eval counts the requests of all ranks on it."""
        return self.model.generator.autoencoder.device

    def _row(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _request(self, messages: Sequence[Message], doc_id: int, task: str, split: str, repeat: int) -> Request:
        key = f"{task}/{split}/{doc_id}"
        return self.model.request(key, messages, seed_of(self.seed, repeat, key, "generate"))

    def _answers(self, requests: Sequence[Request], settings: Sequence[TextSettings]) -> list[str]:
        """Answers in order; requests of equal settings go together."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="emma") as bar:
            for of_group in dict.fromkeys(settings):
                members = [i for i, s in enumerate(settings) if s == of_group]
                texts = self.model.answers([requests[i] for i in members], of_group, bar.update)
                answers |= dict(zip(members, texts, strict=True))
        return [answers[i] for i in range(len(requests))]


class EmmaChat(_Emma):
    """Requests as messages of a chat: (context, doc_to_messages, gen_kwargs, doc_id, task, split)."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request."""
        asked, settings, repeats = [], [], Counter[tuple[Any, ...]]()
        for _, to_messages, gen_kwargs, doc_id, task, split in (request.args for request in requests):
            messages = chat_conversation(to_messages(self._row(doc_id, task, split)), task)
            asked.append(self._request(messages, doc_id, task, split, repeats[doc_id, task, split]))
            settings.append(text_settings(gen_kwargs))
            repeats[doc_id, task, split] += 1
        return self._answers(asked, settings)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request. The task says what a round asks, from the answers before it; a
        round is a conversation of its own."""
        outputs: list[list[str]] = [[] for _ in requests]
        rounds = [_Rounds(request.args, self._row(*request.args[3:])) for request in requests]
        while is_open := [i for i, r in enumerate(rounds) if r.messages is not None]:
            asked = [
                self._request(chat_conversation(r.messages, r.task), r.doc_id, r.task, r.split, len(outputs[i]))
                for i in is_open
                if (r := rounds[i])
            ]
            settings = [text_settings(rounds[i].gen_kwargs) for i in is_open]
            for i, answer in zip(is_open, self._answers(asked, settings), strict=True):
                outputs[i].append(answer)
                rounds[i].advance(outputs[i])
        return outputs

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """lmms-eval has no chat messages for tasks of likelihoods."""
        raise NotImplementedError("tasks of likelihoods and multiple choice: add --force_simple to the command")


class EmmaSimple(_Emma):
    """Requests as a text and its images, which stand before it: (context, gen_kwargs, doc_to_visual, doc_id, task,
    split)."""

    is_simple = True

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request."""
        asked, settings, repeats = [], [], Counter[tuple[Any, ...]]()
        for context, gen_kwargs, to_visual, doc_id, task, split in (request.args for request in requests):
            messages = self._messages(context, to_visual, doc_id, task, split)
            asked.append(self._request(messages, doc_id, task, split, repeats[doc_id, task, split]))
            settings.append(text_settings(gen_kwargs))
            repeats[doc_id, task, split] += 1
        return self._answers(asked, settings)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Rounds are asked as chats."""
        raise NotImplementedError("tasks of several rounds: leave --force_simple out of the command")

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(how likely a continuation is, whether greedy sampling writes it) of each request, as the `text` of a result:
        lmms-eval 0.7.3 makes a string of a bare pair, and fails at it.

        For the choices of a question, whose continuations are texts, the first number is the loss, as lmms-eval takes
        the least; for other requests it is the log-likelihood, of which it computes perplexities.
        """
        asked, answers, signs = [], [], []
        for context, target, *rest in (request.args for request in requests):
            to_visual, doc_id, task, split = rest or (None, 0, "", "")
            messages = self._messages(context, to_visual, doc_id, task, split)
            asked.append(self._request(messages, doc_id, task, split, 0))
            is_choice = isinstance(target, str)
            # The space that joins a continuation to a text is no part of an answer.
            answers.append((target if is_choice else target(self._row(doc_id, task, split))).lstrip())
            signs.append(-1 if is_choice else 1)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="emma") as bar:
            likelihoods = self.model.likelihoods(asked, answers, bar.update)
        return [GenerationResult((sign * x.text, x.is_greedy)) for sign, x in zip(signs, likelihoods, strict=True)]

    def _messages(
        self, context: str, to_visual: Callable[[Any], Any] | None, doc_id: int, task: str, split: str
    ) -> list[Message]:
        visuals = to_visual(self._row(doc_id, task, split)) if to_visual else None
        return [Message("user", [*(_image(visual, task) for visual in visuals or []), context])]


class _Rounds:
    """A request of several rounds."""

    def __init__(self, arguments: tuple[Any, ...], row: Any) -> None:
        _, self._to_messages, self.gen_kwargs, self.doc_id, self.task, self.split = arguments
        self._row, self._info = row, None
        self.messages = self._to_messages(row)
        """Of the next round; None after the last one."""

    def advance(self, outputs: Sequence[str]) -> None:
        """Ask the task for its next round."""
        payload = self._to_messages(
            self._row, round_idx=len(outputs), previous_output=list(outputs), previous_round_info=self._info
        )
        if isinstance(payload, tuple) and len(payload) == 4:
            messages, is_last, _, self._info = payload
            self.messages = None if is_last else messages
        else:
            self.messages = None  # a task without rounds


def chat_conversation(messages: Sequence[Mapping[str, Any]], task: str) -> list[Message]:
    """lmms-eval's chat messages. Raises ValueError for videos and sounds."""
    return [Message(message["role"], [_part(part, task) for part in message["content"]]) for message in messages]


def text_settings(gen_kwargs: Mapping[str, Any]) -> TextSettings:
    """The settings of a task: `max_new_tokens`, `do_sample`, `temperature`, `until`."""
    stop = gen_kwargs.get("until") or []
    stop = [stop] if isinstance(stop, str) else list(stop)
    temperature = float(gen_kwargs.get("temperature") or 0)
    if "do_sample" in gen_kwargs:
        temperature = (temperature or 1.0) if gen_kwargs["do_sample"] else 0.0
    return TextSettings(
        max_tokens=int(gen_kwargs.get("max_new_tokens") or MAX_NEW_TOKENS),
        temperature=temperature,
        stop=() if stop == IMPLIED_STOP else tuple(filter(None, stop)),
    )


def _part(part: Mapping[str, Any], task: str) -> MessagePart:
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] == "image":
        return _image(part["url"], task)
    raise ValueError(f"task {task} shows {part['type']}; EMMA reads texts and images")


def _image(visual: Any, task: str) -> Path | Image.Image:
    if isinstance(visual, str | Path):
        return Path(visual)
    if isinstance(visual, Image.Image):
        return visual
    raise ValueError(f"task {task} shows {type(visual).__name__}; EMMA reads texts and images")
