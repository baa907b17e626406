"""Many conversations with one call of the tokenizer.

A plan is a generator that yields the texts it needs as tokens, is sent their encodings, perhaps
yields more, and returns the rows of one conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase as Tokenizer

Made = TypeVar("Made")
Plan = Generator[list[str], list[Any], list[Made]]


def run_plans(
    plans: Sequence[Plan[Made]], encode: Callable[[list[str]], Sequence[Any]]
) -> list[list[Made] | ValueError]:
    """The rows of each plan, or its refusal; each round of questions is one call of ``encode``."""
    results: list[list[Made] | ValueError] = [[] for _ in plans]
    answers: dict[int, list[Any] | None] = dict.fromkeys(range(len(plans)))
    while answers:
        asked: dict[int, list[str]] = {}
        for index, given in answers.items():
            try:
                asked[index] = plans[index].send(given)  # type: ignore[arg-type]
            except StopIteration as finished:
                results[index] = finished.value
            except ValueError as error:
                results[index] = error
        encodings = iter(encode([text for texts in asked.values() for text in texts]))
        answers = {index: [next(encodings) for _ in texts] for index, texts in asked.items()}
    return results


def tokenize(texts: list[str], tokenizer: Tokenizer) -> list[Encoding]:
    """Tokens of rendered texts, which have their special tokens already."""
    if not texts:
        return []
    wanted = {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, add_special_tokens=False, verbose=False, **wanted).encodings
