"""Prompts, their token ids and the label mask (protocol §1).

One index space: `<image>` becomes P slots of `IMAGE_TOKEN_INDEX` when a prompt is tokenised, so ids, labels, attention and hidden
states line up. A conversation is a list of turns (question, answer); the answer of the last turn may be None, which makes a
prompt for generation. Layout: `S USER: q ASSISTANT: a</s>USER: …`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from utils.files import shown

IMAGE_TOKEN, IMAGE_TOKEN_INDEX = "<image>", -200
IGNORE_INDEX = -100
SEG_TOKEN, IM_START, IM_END = "[SEG]", "<im_start>", "<im_end>"
END_OF_TURN = "</s>"
ANSWER_MARK = " ASSISTANT: "

_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the {who}'s questions."
)
SYSTEM = {"llava_v1": _SYSTEM.format(who="human"), "vicuna_v1": _SYSTEM.format(who="user")}
"""Wordings of the system prompt: training and forced evaluation say human, the original's generation said user (§8-1)."""

RESERVED = (SEG_TOKEN, IMAGE_TOKEN, IM_START, IM_END, END_OF_TURN, "<s>", "<unk>", ANSWER_MARK.strip())
"""What no text of a user or of a data set may contain: it would be read as a mask, an image, or the end of a turn."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters besides blanks, and halves of surrogate pairs, which no tokenizer takes."""

Turns = list[tuple[str, str | None]]


def text_faults(text: Any, allowed: Sequence[str] = ()) -> list[str]:
    """What is wrong with a question, an expression or an answer, for messages that begin with its file and field.

    Args:
        text: any value; a usable one is a str with at least one character that is not blank.
        allowed: members of `RESERVED` that it may contain, for example "[SEG]" in an answer.
    """
    if not isinstance(text, str):
        return [f"must be text, found {shown(text)}"]
    if not any(sign.isprintable() and not sign.isspace() for sign in text) and not CONTROL.search(text):
        return ["is empty"]  # nothing, blanks, or signs without a width
    faults = [f"must not contain {ascii(found[0])}, which is no character of a text"] if (found := CONTROL.search(text)) else []
    # Tokens are found in any case, since expressions are lower-cased and other code bases spell [seg].
    seen = {mark: mark in text if mark.endswith(":") else mark.lower() in text.lower() for mark in RESERVED}
    return faults + [
        f"must not contain {mark}, which has a meaning of its own in prompts: {shown(text)}"
        for mark in RESERVED
        if seen[mark] and mark not in allowed
    ]


class Tokenizer(Protocol):
    """What this module needs of a tokenizer."""

    bos_token_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, beginning with the BOS token."""
        ...


def with_image(question: str) -> str:
    """The first question of a conversation, with its picture in front."""
    return f"{IMAGE_TOKEN}\n{question}"


def build_prompt(turns: Turns, system: str) -> str:
    """The whole conversation as one string; without a last answer it ends `ASSISTANT:`, no blank behind.

    Raises:
        ValueError: an answer is missing before the last turn, or a text contains the end-of-turn mark.
    """
    prompt = system
    for i, (question, answer) in enumerate(turns):
        if answer is None and i < len(turns) - 1:
            raise ValueError(f"turn {i + 1} of {len(turns)} has no answer; only the last may be without")
        for text in (question, answer or ""):
            if END_OF_TURN in text or ANSWER_MARK in text:
                raise ValueError(f"{text!r} contains a mark of the conversation format ({END_OF_TURN!r} or {ANSWER_MARK!r})")
        prompt += f"{' ' if i == 0 else ''}USER: {question} ASSISTANT:"
        if answer is not None:
            prompt += f" {answer}{END_OF_TURN}"
    return prompt


def mark_image(prompt: str) -> str:
    """`<image>` between its two marking tokens, as every prompt is tokenised."""
    return prompt.replace(IMAGE_TOKEN, f"{IM_START}{IMAGE_TOKEN}{IM_END}")


def tokenize_prompt(prompt: str, tokenizer: Tokenizer, num_patches: int, mark: bool = True) -> list[int]:
    """Ids of a prompt with each `<image>` expanded into `num_patches` slots; one BOS, no truncation.

    The text on each side of an image is tokenised on its own, as in the original. `mark` sets the picture between
    `<im_start>` and `<im_end>`, as all READ weights expect.
    """
    ids: list[int] = []
    for i, chunk in enumerate((mark_image(prompt) if mark else prompt).split(IMAGE_TOKEN)):
        ids += [IMAGE_TOKEN_INDEX] * num_patches if i else []
        encoded = tokenizer.encode(chunk)
        ids += encoded if i == 0 else encoded[1:]
    return ids


def mask_labels(
    prompt: str, input_ids: list[int], tokenizer: Tokenizer, num_patches: int, mark: bool = True
) -> list[int]:
    """Labels of a prompt: the ids where an answer or its end token stands, -100 elsewhere (§1, label mask).

    Rounds are measured by tokenising them alone, as the original does: the BOS counted with each stands for the end token
    that the split removed, and two tokens are taken off an instruction, its BOS and the lone blank its last space becomes.

    Raises:
        ValueError: the rounds do not add up to the prompt.
    """
    labels = list(input_ids)
    labels[0] = IGNORE_INDEX
    position = 1
    for turn in prompt.split(END_OF_TURN):
        if not turn:
            break
        parts = turn.split(ANSWER_MARK)
        if len(parts) != 2:
            break
        length = len(tokenize_prompt(turn, tokenizer, num_patches, mark))
        instruction = len(tokenize_prompt(parts[0] + ANSWER_MARK, tokenizer, num_patches, mark)) - 2
        labels[position : position + instruction] = [IGNORE_INDEX] * instruction
        position += length
    labels[position:] = [IGNORE_INDEX] * (len(labels) - position)
    if position != len(input_ids):
        raise ValueError(f"the rounds of a conversation have {position} tokens, the whole has {len(input_ids)}: {prompt!r}")
    return labels
