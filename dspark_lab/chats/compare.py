"""Other trainers' masks beside what the model itself generates, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark_lab.chats.chat import Chat
from dspark_lab.chats.plans import run_plans, tokenize
from dspark_lab.chats.template import Template
from dspark_lab.chats.tokens import check_tokenizer, encode_rows
from dspark_lab.chats.trainers import LIKE, Like, trainer_plan
from dspark_lab.checks import checked

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedTokenizerBase as Tokenizer

_COUNTS = ["conversations", "refused", "rows", "tokens", "supervised", "generated"]
_COUNTS += ["only_supervised", "only_generated"]


@checked
def compare_masks(
    chats: Sequence[Chat] | Mapping[str, Sequence[Chat]],
    tokenizer: Tokenizer,
    like: Like | Sequence[Like] = LIKE,
    *,
    template_options: Mapping[str, Any] | None = None,
) -> pandas.DataFrame:
    """Count what trainers supervise that a model never says, and what it says that they leave out.

    Both masks are of the trainer's own rows, so a system message that it puts in front is in both.
    What a model says follows from :func:`encode` alone: switches of the file for the loss count for
    neither.

    Args:
        chats: conversations, or data sets of them by name.
        like: trainers, by default all.

    Returns:
        a line for each ``data_set`` and trainer (``like``): of its ``conversations`` those
        ``refused`` by the trainer or by the rule; of the others the ``rows`` and their ``tokens``,
        those ``supervised`` by the trainer and those ``generated`` by the model; and the supervised
        that the model never says, ``only_supervised``, with their share of the supervised, and the
        other way round.
    """
    import pandas as pd

    check_tokenizer(tokenizer)
    Template(tokenizer, None, template_options or {}).check_options()
    data_sets = chats if isinstance(chats, Mapping) else {"chats": chats}
    lines = []
    for name, data_set in data_sets.items():
        for trainer in [like] if isinstance(like, str) else like:
            counts = np.zeros(len(_COUNTS), dtype=np.int64)
            for chat in data_set:
                counts += _counts(chat, tokenizer, trainer, template_options)
            lines.append((name, trainer, *counts.tolist()))
    table = pd.DataFrame(lines, columns=["data_set", "like", *_COUNTS])
    for part, whole in (("only_supervised", "supervised"), ("only_generated", "generated")):
        table[f"share_{part}"] = table[part] / table[whole].where(table[whole] > 0)
    return table


def _counts(
    chat: Chat, tokenizer: Tokenizer, like: Like, template_options: Mapping[str, Any] | None
) -> np.ndarray:
    counts = np.zeros(len(_COUNTS), dtype=np.int64)
    counts[0] = 1
    plan = trainer_plan(chat, tokenizer, like, template_options=template_options)
    (rows,) = run_plans([plan], partial(tokenize, tokenizer=tokenizer))
    try:
        if isinstance(rows, ValueError):
            raise rows
        for ids, mask, messages, tools in rows:
            if not any(message["role"] == "assistant" for message in messages):
                raise ValueError("the trainer keeps no answer")
            shown = replace(chat, messages=messages, tools=tools, supervised=None)
            # That the last answer was cut off says nothing of an earlier one.
            words = chat.messages[chat.answers[-1]]["content"]
            cut = not chat.finished and messages[shown.answers[-1]]["content"].endswith(words)
            options: dict[str, Any] = {"template_options": template_options}
            # A row of speculators supervises its last answer alone.
            options["last_answer_only"] = like == "speculators"
            (own,) = encode_rows(replace(shown, finished=not cut), tokenizer, **options)
            if own.input_ids.tolist() != ids:
                raise ValueError("the two are not of the same text")
            theirs, ours = np.array(mask, dtype=bool), own.loss_mask.numpy()
            found = (theirs, ours, theirs & ~ours, ours & ~theirs)
            counts[2:] += [1, len(ids), *(int(each.sum()) for each in found)]
    except ValueError:
        return np.array([1, 1, *[0] * (len(_COUNTS) - 2)])
    return counts
