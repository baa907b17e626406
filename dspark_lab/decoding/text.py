"""Prompts as token ids, the tokens that end an answer, and answers as text that streams."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from dspark_lab.checks import checked
from dspark_lab.model import Target

# Prompts are of different lengths: an axis with an underscore need not agree with others.
Prompt = str | Sequence[int] | Int[Tensor, " _seq"]


@checked
def encode_prompt(target: Target, prompt: Prompt) -> list[int]:
    """Return a prompt's tokens; a user message goes through the chat template, if there is one."""
    if isinstance(prompt, str):
        if target.tokenizer is None:
            raise ValueError(f"{target.name} has no tokenizer: a prompt must be token ids")
        if target.tokenizer.chat_template is None:
            encoding: Any = target.tokenizer(prompt)
        else:
            encoding = target.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )
        ids = list(encoding["input_ids"])
    else:
        ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    if not ids:
        raise ValueError("a prompt must hold at least one token, got none")
    require_tokens("each token of a prompt", ids, target.vocab_size)
    return ids


def require_tokens(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Refuse ids outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size - 1}], got {token}")


def end_tokens(target: Target) -> set[int]:
    """The tokens that end an answer: the tokenizer's eos, and those of the model's settings."""
    found: list[Any] = [getattr(target.tokenizer, "eos_token_id", None)]
    for source in (target.model.config, getattr(target.model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    return {token for token in found if token is not None}


def up_to_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and with the first that ends an answer, or all of them."""
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: end + 1])


class StreamedText:
    """An answer as text while it grows; empty where the target has no tokenizer."""

    def __init__(self, target: Target, ends: Collection[int]) -> None:
        self._tokenizer, self._ends, self._shown = target.tokenizer, ends, ""

    def whole(self, answer: Sequence[int]) -> str:
        """The text of an answer, without the tokens that end it."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode([t for t in answer if t not in self._ends]))

    def new(self, answer: Sequence[int], over: bool) -> str:
        """The text since the last call; while the answer goes on, no part of a character."""
        text = self.whole(answer)
        if text.endswith("\ufffd") and not over:
            return ""
        shown, self._shown = self._shown, text
        return text[len(shown) :]
