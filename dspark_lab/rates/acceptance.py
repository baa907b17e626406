"""How often drafted tokens survive: three actual rates, and the predicted one beside them.

    teacher-forced:   c* of every supervised slot, on the text as it was written;
    on policy:        c* of every slot that verification reached, along the path really taken;
    empirical:        whether such a slot was accepted, 1 or 0;
    predicted:        the confidence head's probability, on the slots of *on policy*;
    predicted, teacher-forced: the same, on the slots of *teacher-forced*.

c* = sum_v min(p_draft, p_target) is the probability that a token drawn from the drafter is
accepted (Leviathan et al. 2022, arXiv 2211.17192; DSpark, arXiv 2607.05147, section 3.3). A slot
is *reached* where the target was asked about it and every slot of its round before it was accepted.
From one table of sums, a row for each kind, conversation and slot, everything follows as a ratio:

    conditional_k = passed_k / reached_k    the slot survives, given that all before it did;
    survival_k    = survived_k / rounds     the slot and all before it survive;
    tau           = 1 + sum_k survival_k    tokens of a round, the target's own token included.

A slot that was not verified (a threshold, the end of a turn, a limit on tokens) was not accepted:
it lowers survival and tau, and it does not enter a conditional rate. Tau counts the target's token
in every round, also where the turn ends before it. A round of which nothing is in the trace does
not count.

Intervals are bootstrapped over conversations, whose slots and rounds resemble each other. This file
knows traces, forward outputs and sums; it does not know how a trace came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from dspark_lab.checks import require_bool, require_int, require_shape
from dspark_lab.common import DSparkForwardOutput
from dspark_lab.decoding import integers, one_domain_each, probabilities, read_trace
from dspark_lab.model import accept_rates, survival
from dspark_lab.rates.intervals import ratio_interval, resampled

__all__ = [
    "rate_table",
    "reached",
    "tau_table",
    "teacher_forced_sums",
    "token_rate_table",
    "trace_sums",
]

_SUMS = ["rounds", "reached", "passed", "survived"]
_KEYS = ["kind", "conversation", "domain", "slot"]
# Conversations from which on a token gets an interval: most tokens occur in one or two.
_TOKEN_FEWEST = 10


def reached(trace: pd.DataFrame) -> Bool[np.ndarray, " row"]:
    """Which rows verification reached: verified, and all slots before them in the round accepted.

    Args:
        trace: as of :func:`dspark_lab.decoding.trace.read_trace`.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.trace.read_trace`.
    """
    rounds, row = read_trace(trace)
    result = np.zeros(len(trace), dtype=bool)
    result[row[rounds.reached]] = True
    return result


def trace_sums(trace: pd.DataFrame) -> pd.DataFrame:
    """The sums of a trace, of the kinds *on policy*, *empirical* and *predicted*.

    A prediction passes as the confidence of a reached slot, and survives as the product of its
    round's confidences up to it, which is what a scheduler goes by. These products run over slots
    past a rejection too, and treat a token's acceptance and the c* after it as independent, so that
    even a head that gives every c* exactly has another survival than the empirical one; its
    conditional rates are those on policy.

    Args:
        trace: as of :func:`dspark_lab.decoding.trace.read_trace`.

    Returns:
        a row for each ``kind``, ``conversation`` (the prompt) and ``slot``, with its ``domain`` and
        the sums ``rounds`` (the same for each slot of a conversation), ``reached``, ``passed`` and
        ``survived``. Tables of traces whose prompts have different labels can be concatenated.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.trace.read_trace`.
    """
    rounds, _ = read_trace(trace)
    conversation = rounds.conversation
    first = np.unique(conversation, return_index=True)[1]

    def total(
        values: Shaped[np.ndarray, "round slot"], where: Bool[np.ndarray, "round slot"]
    ) -> Float[np.ndarray, "conversation slot"]:
        counted = np.where(where, values, 0).T
        return np.stack([np.bincount(conversation, slot) for slot in counted], axis=1)

    reached, confidence = rounds.reached, rounds.confidence
    one = np.ones_like(confidence)
    chance, taken = total(rounds.accept_rate, reached), total(one, rounds.accepted)
    kinds = {
        "on policy": (chance, chance),
        "empirical": (taken, taken),
        "predicted": (
            total(confidence, reached),
            total(confidence.cumprod(axis=1), rounds.verified),
        ),
    }
    count = total(one, reached)
    each = np.bincount(conversation).astype(float)[:, None].repeat(count.shape[1], axis=1)
    return _sums(pd.Index(rounds.prompt[first]), pd.Index(rounds.domain[first]), each, count, kinds)


@torch.no_grad()
def teacher_forced_sums(
    output: DSparkForwardOutput,
    conversations: Sequence[Any] | None = None,
    domains: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The sums of a forward, of the kinds *teacher-forced* and *predicted, teacher-forced*.

    Nothing is drawn, so a slot is reached with the probability that its block survives up to it,
    the product of the c* before it: ``reached`` is an expected number. A round is a block with a
    supervised slot; a slot that is not supervised counts like one that was not verified.

    Args:
        output: with ``aligned_target_logits``; without ``confidence_pred`` the prediction is NaN.
        conversations: the label of each batch row, their numbers where None. Rows of one label are
            one conversation.
        domains: the domain of each batch row, ``"none"`` where None.

    Returns:
        as :func:`trace_sums`. Tables of several batches can be concatenated, if every conversation
        has a label of its own.

    Raises:
        TypeError: not a forward output, or a mask that is not bool.
        ValueError: no ``aligned_target_logits``, shapes that do not fit, a label missing, or a
            conversation of two domains.
    """
    if not isinstance(output, DSparkForwardOutput):
        raise TypeError(f"output must be a DSparkForwardOutput, got {type(output).__name__}")
    accept, mask = accept_rates(output).double(), output.eval_mask
    axes, shape = ("batch", "anchor", "slot"), tuple(accept.shape)
    require_shape("eval_mask", mask, axes, shape)
    require_bool("eval_mask", mask)
    confidence = torch.full_like(accept, torch.nan)
    if output.confidence_pred is not None:
        require_shape("confidence_pred", output.confidence_pred, axes, shape)
        confidence = output.confidence_pred.double().sigmoid()
    rows = range(shape[0])
    labels = _labels("conversations", rows if conversations is None else conversations, shape[0])
    topics = _labels("domains", ["none"] * shape[0] if domains is None else domains, shape[0])
    code, names = pd.factorize(labels)
    domain = one_domain_each(code, names, topics).take(code)

    def total(values: Float[Tensor, "batch anchor slot"]) -> Float[np.ndarray, "batch slot"]:
        return torch.where(mask, values, 0).sum(dim=1).cpu().numpy()

    lived = survival(accept, mask)
    before = torch.cat([torch.ones_like(lived[..., :1]), lived[..., :-1]], dim=-1)
    blocks = (
        mask.any(dim=-1).sum(dim=1, keepdim=True).double().cpu().numpy().repeat(shape[2], axis=1)
    )
    chance = total(lived)
    kinds = {
        "teacher-forced": (chance, chance),
        "predicted, teacher-forced": (
            total(before * confidence),
            total(survival(confidence, mask)),
        ),
    }
    return _total(_sums(pd.Index(labels), domain, blocks, total(before), kinds), _KEYS, _SUMS)


def rate_table(
    sums: pd.DataFrame, by: str | Sequence[str] = (), *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Conditional rate and survival of each slot, for every kind in the sums.

    An interval is the 95 % percentile bootstrap of a ratio of sums, over the conversations that
    enter its denominator. It is NaN where these are fewer than two, as they always are by
    conversation. Groups of equally many conversations are resampled by the same draws.

    Args:
        sums: of :func:`trace_sums` and :func:`teacher_forced_sums`, concatenated.
        by: columns to keep apart, such as ``"domain"`` or ``"conversation"``, or one added to the
            sums, such as the drafter. What is not named here is pooled.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        a row for each ``kind``, ``by`` and ``slot``, in the order of the sums: ``conversations``
        (that reach the slot), ``rounds`` (of all conversations), ``reached`` (slots),
        ``conditional`` with its interval ``low`` to ``high``, and ``survival`` with its interval
        ``survival_low`` to ``survival_high``. What is undefined, such as the conditional rate of a
        slot that was never reached, is NaN.

    Raises:
        TypeError, ValueError: sums without rows or columns, ``by`` not among the columns, or
            ``resamples`` not an int of at least 1.
    """
    group = ["kind", *_columns_named(by, _grouping(sums))]
    keys = [*group, "slot"]
    # A conversation counts at every slot of its group, if its own rounds were shorter too.
    once = _total(sums[sums["slot"] == 0], [*group, "conversation"], ["rounds"])
    grid = once.merge(sums[keys].drop_duplicates(), on=group)
    grid[_SUMS[1:]] = 0.0
    each = pd.concat([grid, sums.assign(rounds=0)], ignore_index=True)
    each = _total(each, [*keys, "conversation"], _SUMS)
    [table] = _ratios(each, keys, ["passed"], "reached", resamples, seed)
    [lived] = _ratios(each, keys, ["survived"], "rounds", resamples, seed)
    table.insert(len(keys) + 1, "rounds", lived["rounds"].astype(np.int64))
    return table.rename(columns={"ratio": "conditional"}).assign(
        survival=lived["ratio"], survival_low=lived["low"], survival_high=lived["high"]
    )


def tau_table(
    sums: pd.DataFrame, by: str | Sequence[str] = (), *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Tau, in tokens per round, for every kind in the sums.

    Of the kind *empirical* it is the mean of accepted slots + 1 over rounds, exactly.

    Args:
        sums, by, resamples, seed: as of :func:`rate_table`.

    Returns:
        a row for each ``kind`` and ``by``, in the order of the sums: ``conversations``, ``rounds``,
        ``tau`` and its interval ``low`` to ``high``, as in :func:`rate_table`.

    Raises:
        TypeError, ValueError: as :func:`rate_table`.
    """
    keys = ["kind", *_columns_named(by, _grouping(sums))]
    # Every slot repeats the rounds of its conversation.
    once = sums.assign(rounds=sums["rounds"].where(sums["slot"] == 0, 0))
    each = _total(once, [*keys, "conversation"], ["rounds", "survived"])
    [table] = _ratios(each, keys, ["survived"], "rounds", resamples, seed)
    table["rounds"] = table["rounds"].astype(np.int64)
    table[["ratio", "low", "high"]] += 1
    return table.rename(columns={"ratio": "tau"})


def token_rate_table(
    trace: pd.DataFrame, by: str | Sequence[str] = (), *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Conditional rate of the slots at which a token was drafted, for every token of a trace.

    c* and the confidence hold before the token is drawn. The token's own chance of acceptance is
    min(1, p_target / p_draft), here of the kind *given token*: what the empirical rate of a token
    converges to. *Predicted* compares with *on policy*.

    Args:
        trace: as of :func:`dspark_lab.decoding.trace.read_trace`, with the columns ``token`` and
            ``accept_prob`` (a probability where verified).
        by: ``"slot"``, ``"domain"`` or both, to keep them apart.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        a row for each ``kind``, ``by`` and ``token`` (its id) with a reached slot, the most
        frequent first within a kind: ``conversations``, ``reached`` (slots), ``conditional`` and
        its interval ``low`` to ``high``, as in :func:`rate_table`.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.trace.read_trace` and :func:`rate_table`.
    """
    keys = [*_columns_named(by, ["slot", "domain"]), "token"]
    rounds, row = read_trace(trace)
    token, prob = integers(trace, "token"), probabilities(trace, "accept_prob", "where verified")
    reached = rounds.reached
    number, slot = np.nonzero(reached)
    passed = {
        "on policy": rounds.accept_rate[reached],
        "given token": prob[row[reached]],
        "empirical": rounds.accepted[reached].astype(np.float64),
        "predicted": rounds.confidence[reached],
    }
    frame = pd.DataFrame(
        {
            "conversation": rounds.conversation[number],
            "domain": rounds.domain[number],
            "slot": slot,
            "token": token[row[reached]],
            "reached": 1,
            **passed,
        }
    )
    each = _total(frame, [*keys, "conversation"], ["reached", *passed])
    tables = _ratios(each, keys, list(passed), "reached", resamples, seed, _TOKEN_FEWEST)
    for kind, table in zip(passed, tables, strict=True):
        table.insert(0, "kind", kind)
    order = np.argsort(-tables[0]["reached"], kind="stable")
    result = pd.concat([table.iloc[order] for table in tables], ignore_index=True)
    return result.rename(columns={"ratio": "conditional"})


def _labels(name: str, values: Sequence[Any], count: int) -> pd.Series:
    if isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of labels, got {values!r}")
    labels = pd.Series(list(values))
    if len(labels) != count or labels.isna().any():
        raise ValueError(
            f"{name} must have a label for each of {count} rows, got {labels.tolist()}"
        )
    return labels


def _sums(
    conversations: pd.Index,
    domains: pd.Index,
    rounds: Float[np.ndarray, "conversation slot"],
    reached: Float[np.ndarray, "conversation slot"],
    kinds: dict[str, tuple[np.ndarray, np.ndarray]],
) -> pd.DataFrame:
    """The table of sums; ``kinds`` holds passed and survived, ``[conversation, slot]``, of each."""
    count, slots = reached.shape
    common = pd.DataFrame(
        {
            "conversation": conversations.repeat(slots),
            "domain": domains.repeat(slots),
            "slot": np.tile(np.arange(slots), count),
            "rounds": rounds.ravel(),
            "reached": reached.ravel(),
        }
    )
    tables = []
    for kind, (passed, survived) in kinds.items():
        table = common.assign(passed=passed.ravel(), survived=survived.ravel())
        table.insert(0, "kind", kind)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _grouping(sums: pd.DataFrame) -> list[str]:
    """The columns by which sums can be kept apart."""
    if not isinstance(sums, pd.DataFrame):
        raise TypeError(f"sums must be a pandas DataFrame, got {type(sums).__name__}")
    missing = [name for name in (*_KEYS, *_SUMS) if name not in sums.columns]
    if missing or len(sums) == 0:
        raise ValueError(
            f"sums must have rows and the columns {[*_KEYS, *_SUMS]}, "
            f"got {len(sums)} rows of {list(sums.columns)}"
        )
    return [name for name in sums.columns if name not in ("kind", "slot", *_SUMS)]


def _columns_named(by: str | Sequence[str], allowed: Sequence[str]) -> list[str]:
    names = [by] if isinstance(by, str) else list(by)
    if any(name not in allowed for name in names) or len(set(names)) < len(names):
        raise ValueError(f"by must name columns, each once, among {list(allowed)}, got {names}")
    return names


def _total(frame: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    """The sums of values by keys, in the order in which these first appear. NaN stays NaN."""
    keys = list(dict.fromkeys(keys))
    code = _group_numbers(frame, keys)
    first = np.unique(code, return_index=True)[1]
    result = frame[keys].iloc[first].reset_index(drop=True)
    for name in values:
        result[name] = np.bincount(code, frame[name])
    return result


def _group_numbers(frame: pd.DataFrame, keys: list[str]) -> np.ndarray:
    """The number of each row's group, counted in the order in which groups first appear."""
    return frame.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()


def _ratios(
    each: pd.DataFrame,
    keys: list[str],
    numerators: Sequence[str],
    denominator: str,
    resamples: int,
    seed: int,
    fewest: int = 2,
) -> list[pd.DataFrame]:
    """Ratios of two sums for each group, and their intervals over the group's conversations.

    Args:
        each: a row for each group and conversation.
        keys: the columns that name the group.
        fewest: conversations that an interval needs.

    Returns:
        for each numerator: keys, ``conversations`` (those with a denominator), the summed
        denominator, ``ratio``, ``low``, ``high``.
    """
    require_int("resamples", resamples, 1)
    require_int("seed", seed, 0)
    code = _group_numbers(each, keys)
    groups = _total(each, keys, [denominator, *numerators])
    bottom = each[denominator].to_numpy(float)
    tops = each[list(numerators)].to_numpy(float).T
    entering = np.flatnonzero(bottom != 0)
    entering = entering[np.argsort(code[entering], kind="stable")]
    count = np.bincount(code[entering], minlength=len(groups))
    start = np.cumsum(count) - count
    bounds = np.full((2, len(numerators), len(groups)), np.nan)
    for n in np.unique(count[count >= fewest]):
        alike = np.flatnonzero(count == n)
        members = entering[start[alike, None] + np.arange(n)]
        drawn = resampled(n, resamples, (seed, n), one_by_one=True)
        bounds[:, :, alike] = ratio_interval(tops[:, members], bottom[members], drawn)
    total = groups[denominator].to_numpy(float)
    table = groups[keys].assign(conversations=count, **{denominator: total})
    defined = np.where(total == 0, np.nan, total)
    return [
        table.assign(ratio=groups[name] / defined, low=bounds[0, i], high=bounds[1, i])
        for i, name in enumerate(numerators)
    ]
