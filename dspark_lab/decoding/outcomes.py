"""Tables of a decoding run: answers token by token, distributions at a slot, kinds of tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dspark_lab.chats import token_texts
from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding.record import Decoded, Round
from dspark_lab.decoding.text import Prompt, encode_prompt
from dspark_lab.decoding.verification import residual
from dspark_lab.model import Target

# A drafted token is one of the first four, the target's own one of the last three.
OUTCOMES = ("accepted", "rejected", "not reached", "not verified", "corrected", "bonus", "first")
TOKEN_KINDS = ("word", "inside a word", "number", "punctuation", "white space", "special")
# The text of the row that sums up all tokens that have none of their own.
OTHERS = "(all others)"

_KEPT = ("accepted", "corrected", "bonus", "first")
_COLUMNS = dict.fromkeys(("round", "slot", "position", "token"), "int64")
_COLUMNS |= dict.fromkeys(("text", "outcome"), "object")
_COLUMNS |= dict.fromkeys(
    ("confidence", "accept_rate", "accept_prob", "draft_prob", "target_prob"), "float64"
)
_COLUMNS |= {"kept": "bool"}
_OF_TARGET = ("target", "overlap", "residual")
_SPECIAL = re.compile(r"<\|.*\|>|</?s>|<(?:unk|pad|mask|bos|eos)>|\[[A-Z]{3,}\d*\]", re.DOTALL)


@checked
def outcome_table(
    decoded: Decoded, to_text: Callable[[int], str], prompt: Size = 0
) -> pd.DataFrame:
    """Return an answer in reading order, with every token that was drafted for it.

    A drafted token is *accepted*; *rejected*, the first verified one that was not; *not reached*,
    verified behind a rejected one; or *not verified*, because of a threshold, a scheduler or the
    end of the turn before it. The target's own token, which ends a round unless the turn ended
    before, is *corrected*, drawn in place of a rejected one; a *bonus*; or the answer's *first*.

    The columns are those of the trace (NaN for the target's own tokens, ``slot`` -1, and ``round``
    -1 for the first) with ``text``, ``outcome`` and ``kept``: the kept rows are the answer.
    """
    if prompt >= len(decoded.tokens):
        raise ValueError(f"prompt must be below {len(decoded.tokens)}, got {prompt}")
    answer = decoded.tokens[prompt]
    first = pd.DataFrame({"round": [-1], "slot": -1, "position": 0, "outcome": "first"})
    drafted = decoded.trace[decoded.trace["prompt"] == prompt].sort_values(["round", "slot"])
    fates = [drafted["accepted"], ~drafted["verified"], drafted["resampled"].notna()]
    outcome = np.select(fates, ["accepted", "not verified", "rejected"], "not reached")
    rounds = decoded.rounds[decoded.rounds["prompt"] == prompt].sort_values("round")
    own = rounds.assign(slot=-1, position=rounds["tokens"].cumsum())
    own["outcome"] = np.where(own["accepted"] < own["verified"], "corrected", "bonus")
    own = pd.concat([first, own[own["tokens"] > own["accepted"]]])
    own = own.assign(token=[answer[place] for place in own["position"]])
    table = pd.concat([drafted.assign(outcome=outcome), own])
    table = table.sort_values("round", kind="stable", ignore_index=True)
    table["kept"] = table["outcome"].isin(_KEPT)
    # The answer reads on from one kept token to the next, a draft to its end within its round.
    for _, run in table.groupby(table["round"].where(~table["kept"], -2)):
        table.loc[run.index, "text"] = token_texts(to_text, run["token"].tolist())
    return table[list(_COLUMNS)].astype(_COLUMNS)


@checked
def distribution_table(
    round_: Round, slot: Size, to_text: Callable[[int], str], top: Count = 8
) -> pd.DataFrame:
    """Return the draft's and the target's distribution at one slot of a round, token by token.

    Behind the verified slots lies the *bonus slot*, where the target draws without regard to the
    drafter; behind the end of the block the draft is 0.

    Returns:
        a row for each of the ``top`` likeliest ``token`` of both, the ``drafted`` one and the
        target's own ``drawn`` here, by the larger probability; then one for all others (-1).
        ``overlap`` sums to the accept rate; ``residual`` is the distribution in place of a rejected
        token, the target itself at the bonus slot. NaN where the target was not asked.
    """
    if slot > round_.last_slot:
        raise ValueError(f"slot must be in [0, {round_.last_slot}], got {slot}")
    return pd.DataFrame(_distribution_rows(round_, slot, to_text, top))


@checked
def distribution_tables(
    round_: Round, to_text: Callable[[int], str], top: Count = 8
) -> pd.DataFrame:
    """Return the :func:`distribution_table` of every ``slot`` of a round, one below the other."""
    slots = []
    for slot in range(round_.last_slot + 1):
        rows = _distribution_rows(round_, slot, to_text, top)
        slots.append({"slot": [slot] * len(rows["token"])} | rows)
    return pd.DataFrame({name: sum((rows[name] for rows in slots), []) for name in slots[0]})


@checked
def greedy_differences(
    target: Target, decoded: Decoded, plain: Decoded, prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """Return where two greedy answers part, one row for each ``prompt`` whose answers do.

    ``margin``: by how much the target's best logit exceeds its second best there, in roundings of
    its dtype. A handful is a tie, which the shapes of a matrix product decide.
    """
    answers, count = (len(decoded.tokens), len(plain.tokens)), len(prompts)
    if set(answers) != {count}:
        raise ValueError(f"there must be two answers to each of {count} prompts, got {answers}")
    rows = []
    for index, (one, other) in enumerate(zip(decoded.tokens, plain.tokens, strict=True)):
        if one == other:
            continue
        same = min(len(one), len(other))
        place = next((i for i in range(same) if one[i] != other[i]), same)
        ids = encode_prompt(target, prompts[index]) + plain.tokens[index][:place]
        last = target.features(torch.tensor([ids]), [0]).last[0, -1]
        best, second = target.logits(last).topk(2).values.tolist()
        rounding = torch.finfo(target.dtype).eps * max(abs(best), abs(second))
        rows.append([index, place, (best - second) / rounding])
    return pd.DataFrame(rows, columns=["prompt", "position", "margin"])


@checked
def token_kind(text: str) -> str:
    """Return the kind of a token by its text alone: one of ``TOKEN_KINDS``.

    *Special* is no text at all, or a name in the brackets of control tokens, such as
    ``<|im_end|>``, ``</s>`` or ``[MASK]``. Otherwise the first character that is not white space
    decides: a digit makes it a *number*; a letter a *word* if white space stands before it or it is
    a capital, and else *inside a word*, as in scripts without spaces; all else is *punctuation*.
    """
    body = text.lstrip()
    if not text or _SPECIAL.fullmatch(text):
        return "special"
    if not body:
        return "white space"
    category = unicodedata.category(body[0])
    if category[0] == "N":
        return "number"
    # Marks are what vowels are written with in some scripts.
    if category[0] not in "LM":
        return "punctuation"
    return "word" if body != text or category in ("Lu", "Lt") else "inside a word"


@checked
def token_kinds(tokens: pd.Series, to_text: Callable[[int], str]) -> pd.Series:
    """The :func:`token_kind` of each token id, on the same index; a missing id has none."""
    if not pd.api.types.is_integer_dtype(tokens):
        raise TypeError(f"tokens must hold integers, got {tokens.dtype}")
    names = {token: token_kind(to_text(int(token))) for token in tokens.dropna().unique()}
    kinds = [None if pd.isna(token) else names[token] for token in tokens]
    return pd.Series(kinds, index=tokens.index, name="kind", dtype=object)


def _distribution_rows(
    round_: Round, slot: int, to_text: Callable[[int], str], top: int
) -> dict[str, list[Any]]:
    """The columns of :func:`distribution_table`."""
    # Only a turn that ended with an accepted token has none of the target's own.
    own = round_.tokens[-1] if len(round_.tokens) > round_.accepted == slot else None
    drafted = round_.drafted[slot] if slot < len(round_.drafted) else None
    values = _distributions(round_, slot)

    chosen = {token for token in (drafted, own) if token is not None}
    for name in ("draft", "target"):
        best, ids = values[name].topk(min(top, values[name].shape[0]))
        chosen.update(ids[best > 0].tolist())
    ids = torch.tensor(sorted(chosen))
    largest = torch.stack([values[name][ids].nan_to_num(-1) for name in ("draft", "target")])
    ids = ids[largest.amax(dim=0).argsort(descending=True, stable=True)]
    rest = torch.ones_like(values["draft"], dtype=torch.bool).index_fill(0, ids, False)
    tokens = ids.tolist()
    rows = {"token": [*tokens, -1], "text": [*map(to_text, tokens), OTHERS]}
    for name, column in values.items():
        # Of no other tokens the sum would be 0.
        asked = name == "draft" or slot <= round_.verified
        others = column[rest].sum().item() if asked else torch.nan
        rows[name] = [*column[ids].tolist(), others]
    rows["drafted"] = [token == drafted for token in rows["token"]]
    rows["drawn"] = [token == own for token in rows["token"]]
    return rows


def _distributions(round_: Round, slot: int) -> dict[str, Float[Tensor, " vocab"]]:
    """Draft, target, overlap and residual over the whole vocabulary, in float64 on the CPU."""
    vocab = round_.target_probs.shape[1]
    draft = torch.zeros(vocab, dtype=torch.float64)
    if slot < len(round_.drafted):
        draft = round_.draft_probs[slot].double().cpu()
    if slot > round_.verified:
        return {"draft": draft, **dict.fromkeys(_OF_TARGET, torch.full_like(draft, torch.nan))}
    target = round_.target_probs[slot].double().cpu()
    refused = draft if slot < round_.verified else torch.zeros_like(draft)
    rejectable = bool((target > refused).any())
    return {
        "draft": draft,
        "target": target,
        "overlap": torch.minimum(draft, target),
        "residual": residual(target, refused) if rejectable else torch.zeros_like(draft),
    }
