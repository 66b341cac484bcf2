"""Which chat model to ask, and how: the options that commands and operators have in common."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from emma_train.chat.answer_cache import AnswerCache
from emma_train.chat.chat import Chat
from emma_train.chat.request import ChatModel
from emma_train.errors import UserError

BACKENDS = ("endpoint", "transformers", "vllm")


@dataclass(frozen=True)
class ChatOptions:
    """A chat model: behind an endpoint, or a folder that this process loads."""

    endpoint: str = ""
    """URL up to and including /v1."""
    model: str = ""
    """Its name at the endpoint, or its folder."""
    backend: str = ""
    """endpoint, transformers or vllm; empty: endpoint where there is one, else transformers."""
    temperature: float = 0.0
    max_tokens: int = 1024
    structured: bool = True
    """Send the schema of the answer to the endpoint."""
    parallel: int = 8
    """Requests at once, of each process."""
    per_minute: float = 0.0
    """Requests that start in a minute at most, of each process; 0: no limit."""
    timeout_s: float = 300.0
    retries: int = 6
    cache: str = ""
    """Folder of answers, which any number of processes may share."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable of the key."""


CHAT_SETTINGS: Mapping[str, Any] = asdict(ChatOptions())
"""The options with their defaults, as settings of an operator."""
CHAT_ACCESS = frozenset(
    ("endpoint", "backend", "structured", "parallel", "per_minute", "timeout_s", "retries", "cache", "key_variable")
)
"""Those that say how a model is reached, and not which one answers."""


def chat_options(settings: Mapping[str, Any]) -> ChatOptions:
    """The options among other settings."""
    return ChatOptions(**{f.name: settings[f.name] for f in fields(ChatOptions) if f.name in settings})


def open_chat(options: ChatOptions) -> Chat:
    """The model with its cache. Raises UserError where no model is named or one is missing."""
    return Chat(_open_model(options), AnswerCache(Path(options.cache)) if options.cache else None)


def _open_model(options: ChatOptions) -> ChatModel:
    backend = options.backend or ("endpoint" if options.endpoint else "transformers")
    if backend not in BACKENDS:
        raise UserError(f"backend={backend}: there is {', '.join(BACKENDS)}")
    if not options.model:
        raise UserError("no chat model is named: give model=FOLDER, or endpoint=http://HOST:8000/v1 and model=NAME")
    if backend == "vllm":
        from emma_train.chat.local_models import VllmModel

        return VllmModel(options.model, options.max_tokens, options.temperature)
    if backend == "transformers":
        from emma_train.chat.local_models import TransformersModel

        return TransformersModel(Path(options.model), options.max_tokens, options.temperature)
    try:
        from emma_train.chat.endpoint import Endpoint, EndpointSettings
    except ModuleNotFoundError as error:
        raise UserError(f"an endpoint is asked with {error.name}; pip install 'emma-train[client]'") from None
    names = {f.name for f in fields(EndpointSettings)} & set(CHAT_SETTINGS)
    values = {name: getattr(options, name) for name in names}
    return Endpoint(EndpointSettings(url=options.endpoint, **values))
