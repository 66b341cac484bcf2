"""Reads a record: the alternatives of each task, and the layout of an alternative as text and images."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.shards.images import image_name, image_parts
from data_pipelines.shards.record_map import RecordMap
from emma_train.sequence.layout import ImageRole, Segment, num_text_tokens
from emma_train.sequence.tasks import RECORD_KEYS, TASKS, Task, fixed_text_tokens
from emma_train.sequence.tokens import TextTokenizer

CAPTION_QUESTION = "Describe this picture."
"""The question that a caption answers in an index, whose token counts a recipe with other questions adjusts."""
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Roles of turns that records may have, and what each one is in the chat template."""


def read_record(
    members: Mapping[str, bytes | memoryview],
    caption_question: str = CAPTION_QUESTION,
    record_map: RecordMap | None = None,
) -> dict[str, Any]:
    """The record of a group: what the map makes of it, or its JSON if that lists alternatives of a task, otherwise a
    caption pair.

    A caption pair is one image and one or more .txt: each caption is an alternative of i2t, as the answer to
    CAPTION_QUESTION, and of t2i. Any other group is a record without tasks. Turns have the keys `role` (system, user or
    assistant) and `text`, whichever of the accepted names the JSON has. Raises ValueError.
    """
    try:
        record = json.loads(bytes(members["json"])) if "json" in members else {}
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("its JSON is no object")
    tags = record.get("tags")
    if record_map is not None:
        record = {"tags": tags if isinstance(tags, list) else [], **record_map.record(members)}
    named = [task for task in RECORD_KEYS if task in record]
    for task in named:
        if not isinstance(record[task], list) or not all(isinstance(item, dict) for item in record[task]):
            raise ValueError(f"its {task} is no list of objects")
        if not TASKS[task].makes_image:
            record[task] = [{**item, "turns": _turns(item, task)} for item in record[task]]
    if named:
        return record
    images = image_parts(members)
    texts = [bytes(members[part]).decode() for part in sorted(members) if part.split(".")[-1] == "txt"]
    captions = [text.strip() for text in (record["captions"] if record_map is not None else texts)]
    captions = [caption for caption in captions if caption]
    pair: dict[str, Any] = {"tags": tags if isinstance(tags, list) else []}
    if len(images) == 1 and captions:
        name = image_name(images[0])
        question = {"role": "user", "text": caption_question}
        answers = [{"role": "assistant", "text": caption} for caption in captions]
        pair["i2t"] = [{"images": [name], "turns": [question, answer]} for answer in answers]
        pair["t2i"] = [{"target": name, "text": caption} for caption in captions]
    return pair


def caption_alternative(task: Task, image: str, caption: str, question: str) -> dict[str, Any]:
    """A caption of an image as an alternative: what a task makes the image of, or the answer to a question."""
    if task.makes_image:
        return {"target": image, "text": caption}
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": caption}]
    return {"images": [image], "turns": turns}


def added_text_tokens(task: Task, tokenizer: TextTokenizer, caption_questions: Sequence[str]) -> int:
    """Most text tokens that a recipe adds to those of an index: of its chat template, and of caption questions that are
    longer than CAPTION_QUESTION."""
    if task.makes_image:
        return 0
    longest = max(len(tokenizer.encode_user(question)) for question in caption_questions)
    return len(tokenizer.answer_prefix) + max(0, longest - len(tokenizer.encode_user(CAPTION_QUESTION)))


def text_tokens_in_recipe(
    task: Task, tokenizer: TextTokenizer, caption_questions: Sequence[str]
) -> Callable[[Mapping[str, Any]], list[float]]:
    """A function that gives the text tokens of each alternative of an index row as training lays them out, with the
    recipe's chat template and as a mean over its caption questions; before condition dropout.

    An index does not say which alternatives are plain captions: taken for one is what shows one image and has as many
    tokens beside its answer as CAPTION_QUESTION. The last turn is taken for an answer.
    """
    if num_fixed := fixed_text_tokens(task, tokenizer):
        return lambda row: [float(num_fixed)] * len(row["text_tokens"])
    if task.makes_image:
        return lambda row: list(row["text_tokens"])
    prefix, usual = len(tokenizer.answer_prefix), len(tokenizer.encode_user(CAPTION_QUESTION))
    added = sum(len(tokenizer.encode_user(question)) for question in caption_questions) / len(caption_questions) - usual
    turns = [{"role": "user", "text": CAPTION_QUESTION}, {"role": "assistant", "text": ""}]
    text, supervised = num_text_tokens(task.layout(tokenizer, ["image"], {"turns": turns}))
    asked = text - supervised - prefix

    def text_tokens(row: Mapping[str, Any]) -> list[float]:
        columns = (row[name] for name in ("text_tokens", "supervised_tokens", "context"))
        return [
            text + prefix + (added if text - supervised == asked and len(images) == 1 else 0)
            for text, supervised, images in zip(*columns, strict=True)
        ]

    return text_tokens


def layouts(record: dict[str, Any], task: str, tokenizer: TextTokenizer) -> list[list[Segment]]:
    """The layout of each alternative of a record's task."""
    return [alternative_layout(alternative, task, tokenizer) for alternative in record.get(task, [])]


def alternative_layout(alternative: dict[str, Any], task: str, tokenizer: TextTokenizer) -> list[Segment]:
    """The layout of one alternative, without condition dropout."""
    return TASKS[task].layout(tokenizer, TASKS[task].shown_images(alternative), alternative)


def missing_part(alternative: dict[str, Any], task: str) -> str | None:
    """What an alternative lacks to teach its task: an answer, an instruction or a reference image; None if nothing."""
    if not TASKS[task].makes_image:
        answers = [turn["text"] for turn in alternative["turns"] if turn["role"] == "assistant"]
        return None if any(answer.strip() for answer in answers) else "no answer to learn from"
    if TASKS[task].condition is ImageRole.REFERENCE and not TASKS[task].shown_images(alternative):
        return "no reference image to edit"
    return None if alternative["text"].strip() else "no text to make an image of"


def _turns(alternative: dict[str, Any], task: str) -> list[dict[str, str]]:
    """The turns of an alternative with the keys role and text. Accepts LLaVA's from and value,
    and content. Raises ValueError."""
    turns = alternative.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"an alternative of its {task} has no list of turns")
    result = []
    for turn in turns:
        role, text = turn.get("role", turn.get("from")), turn.get("text", turn.get("value", turn.get("content")))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"a turn of its {task} has the role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise ValueError(f"a turn of its {task} has no text")
        result.append({"role": ROLES[role], "text": text})
    return result


def tags_of(record: dict[str, Any]) -> list[str]:
    """The record's tags, each once, in order. Raises ValueError on what is no tag."""
    tags = record.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag and "|" not in tag for tag in tags):
        raise ValueError("its tags are no list of words without |")
    return sorted(set(tags))
