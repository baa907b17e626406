"""Why a server accepts less than the checkpoint does here: likely causes, and what settles each.

The same figures are taken of the server's record and of the checkpoint's own: accept rates by slot,
how much requests differ, how long answers are, and how many tokens were counted that are in no
answer. Their differences are held against *signatures*: those of faults that were planted in the
pocket pair's decoding. The likelihood of a cause is the mean over its planted cases of a normal
density around each (a kernel density), whose covariance is the chance of both records, by drawing
requests again, and a share of how the cases of one cause differ. A healthy server has one density,
of healthy servers whose questions and seeds differ.

Faults of the drafter leave answers as they are, since verification is lossless; another prompt,
template, temperature or target does not. So an answer's length says which side to look at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import load_trace
from dspark_lab.files import read_csv, shipped
from dspark_lab.model import DrafterConfig
from dspark_lab.rates import resampled
from dspark_lab.records.reading import load_acceptance, record_of_trace
from dspark_lab.records.record import AcceptanceRecord
from dspark_lab.serving import rows_of

HEALTHY = "nothing wrong"
SLOTS = 4
_SLOTS = tuple(f"slot {slot}" for slot in range(SLOTS))
FIGURES = (*_SLOTS, "later slots", "spread", "length", "longer answers", "surplus")
# What depends on how many slots there are.
_OF_WHOLE_BLOCKS = ("later slots", "spread", "longer answers")
# How far the cases of a cause are smoothed, as a share of how they differ.
_SMOOTHING = 0.35
# Of servers that somebody asks about.
_HEALTHY_PRIOR = 0.3
_SIGNATURES = "pocket/signatures.csv"


class Cause(NamedTuple):
    """``says``: what a server does then; ``test``: what settles it."""

    says: str
    test: str


CAUSES = {
    "block layout": Cause(
        "the engine reads a block as one whose first slot is the anchor, or the other way round",
        "compare sample_from_anchor in config.json with what the engine logs, and the number of "
        "speculative tokens with block_size",
    ),
    "context layers": Cause(
        "the drafter is fed the states of other layers of the target, such as the next ones",
        "compare target_layer_ids with the engine's auxiliary layers, which may count the "
        "embedding as layer 0",
    ),
    "window": Cause(
        "the drafter sees a window of the context where it was trained on all, or the reverse",
        "compare sliding_window and layer_types with the engine's; ask questions shorter than the "
        "window",
    ),
    "stale cache": Cause(
        "the drafter's cache keeps tokens that were rejected",
        "serve with a draft length of 1 and at temperature 0: rates of slot 0 must not fall from "
        "round to round",
    ),
    "greedy drafts": Cause(
        "the drafter takes its likeliest token while the target samples",
        "set the engine's draft sampling to probabilistic, or ask at temperature 0",
    ),
    "temperature": Cause(
        "answers are drawn at another temperature or top-p than the record says",
        "look for defaults of the server in generation_config.json, and send temperature and "
        "top_p with each request",
    ),
    "template": Cause(
        "prompts are written by another chat template, or in another thinking mode, than in "
        "training",
        "compare the token ids of a served prompt with those of `lab.encode`",
    ),
    "end of turn": Cause(
        "tokens behind the end of a turn are drafted and counted",
        "compare the tokens counted with those of the answers; stop at the end of turn, "
        "ignore_eos off",
    ),
    "quantised": Cause(
        "target or drafter have weights of few bits",
        "serve both once as they were trained, in bfloat16",
    ),
    "positions": Cause(
        "the positions of a block's slots are shifted against those of the context",
        "compare the position ids of a drafted block with `lab.decode`'s: slot k stands at "
        "anchor + k",
    ),
    "no Markov head": Cause(
        "the drafter's Markov head is left out",
        "look among the engine's loaded tensors for markov_head",
    ),
    "tokenizer": Cause(
        "some ids mean other tokens to the drafter than to the target",
        "compare the two tokenizer.json, and d2t where the draft's vocabulary is reduced",
    ),
    "harder prompts": Cause(
        "nothing is wrong, but the served prompts are harder to draft for",
        "serve the prompts that the checkpoint was evaluated on",
    ),
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        table: a line for each ``cause``, the likeliest first: its ``share`` of the likelihood, what
            it ``says``, and the ``test`` that settles it.
        figures: a line for each figure: what the ``server`` shows, what was ``trained``, and their
            ``difference``, as log-odds for rates and as logarithms for spread and length, with its
            ``standard_error``.
        unknown: what cannot be told from what was given.
    """

    table: pd.DataFrame
    figures: pd.DataFrame
    unknown: tuple[str, ...]

    @property
    def cause(self) -> str:
        """The likeliest cause, or that nothing is wrong."""
        return str(self.table["cause"].iloc[0])

    @property
    def reason(self) -> str:
        """The likeliest causes with their tests, and what speaks for them."""
        first, second = self.table.iloc[0], self.table.iloc[1]
        text = f"{first['cause']} ({first['share']:.0%})"
        if first["cause"] != HEALTHY:
            text += f": {first['says']}. {_seen(self.figures)}. To settle it: {first['test']}"
        text += f". Next: {second['cause']} ({second['share']:.0%})"
        return ". ".join([text, *self.unknown]) + "."

    def __repr__(self) -> str:
        return self.reason


@checked
def diagnose(
    record: AcceptanceRecord | str | os.PathLike[str],
    trained: AcceptanceRecord | pd.DataFrame | str | os.PathLike[str],
    *,
    drafter: str | None = None,
    temperature: float | None = None,
    config: DrafterConfig | None = None,
    resamples: Count = 400,
    seed: Size = 0,
) -> Diagnosis:
    """Rank what may be wrong with a server, from its record and from what the checkpoint does here.

        lab.diagnose("vllm.jsonl", trained=lab.decode(target, drafter, prompts).trace)

    Args:
        record: of the server, or its path.
        trained: of the same drafter at the same temperature: a trace of ``lab.decode``, a record,
            or the path of either or of a trainer's metrics. Prompts should be like the server's.
            Of a trace with several temperatures, the record's counts.
        drafter: which one of a trace of several.
        temperature: at which the record was served, where it does not say it.
        config: the drafter's; causes that it cannot have are left out.

    Raises:
        ValueError: one of them has no acceptance by slot, or they are of different temperatures.
    """
    served = record if isinstance(record, AcceptanceRecord) else load_acceptance(record)
    held = served.values("temperature")
    if temperature is not None:
        if held not in ([], [temperature]):
            raise ValueError(f"temperature must be that of the record, {held}, got {temperature}")
        held = [temperature]
    own = trained_record(trained, drafter, held)
    temperature = _same_temperature(held, own.values("temperature"))
    lengths = [one.passed.shape[1] for one in (served, own)]
    for name, length in zip(("record", "trained"), lengths, strict=True):
        if not length:
            raise ValueError(f"{name} must have acceptance by slot, got totals alone")
    found = [
        _drawn_figures(_cut(one, min(lengths)), resamples, (seed, place))
        for place, one in enumerate((served, own))
    ]
    server, expected = (one[0] for one in found)
    noise = np.sum([_covariance(drawn) for _, drawn in found], axis=0)
    difference = server - expected
    if lengths[0] != lengths[1]:
        difference[[FIGURES.index(name) for name in _OF_WHOLE_BLOCKS]] = np.nan
    signatures = read_csv(shipped(_SIGNATURES), ["cause", *FIGURES])
    causes = _possible(signatures["cause"].unique(), temperature, config)
    shares = likelihoods(difference, noise, signatures[signatures["cause"].isin(causes)])
    table = pd.DataFrame({"cause": list(shares), "share": list(shares.values())})
    for name in Cause._fields:
        table[name] = [getattr(CAUSES[c], name) if c in CAUSES else "" for c in table["cause"]]
    figures = pd.DataFrame(
        {
            "figure": FIGURES,
            "server": _readable(server),
            "trained": _readable(expected),
            "difference": difference,
            "standard_error": np.sqrt(np.diag(noise)),
        }
    )
    return Diagnosis(
        table.sort_values("share", ascending=False, ignore_index=True),
        figures,
        tuple(_unknown(served, own, temperature)),
    )


@checked
def trained_record(
    trained: AcceptanceRecord | pd.DataFrame | str | os.PathLike[str],
    drafter: str | None = None,
    temperatures: Sequence[float] = (),
) -> AcceptanceRecord:
    """What the checkpoint does here as a record, at the only one of the ``temperatures``.

    ``drafter`` and temperature choose rows of a trace; see :func:`diagnose`.
    """
    if isinstance(trained, str | os.PathLike) and Path(trained).suffix == ".parquet":
        trained = load_trace(trained)
    if isinstance(trained, pd.DataFrame):
        [wanted] = temperatures if len(temperatures) == 1 else [None]
        trained = rows_of(trained, drafter, wanted if "temperature" in trained else None)[0]
        record = record_of_trace(trained)
        # Servers count what is drafted behind the end of an answer as rejected.
        outcome = trained["accepted"].astype(float)
        counted = record_of_trace(trained.assign(verified=True, accept_rate=outcome))
        return replace(record, reached=counted.reached, passed=counted.passed)
    return trained if isinstance(trained, AcceptanceRecord) else load_acceptance(trained)


@checked
def figures_of(record: AcceptanceRecord) -> Float[np.ndarray, " figure"]:
    """The :data:`FIGURES` of a record, as differences are taken of them; NaN where not known."""
    return _figures(record, np.ones((1, len(record.lines))))[0]


@checked
def likelihoods(
    difference: Float[np.ndarray, " figure"],
    noise: Float[np.ndarray, "figure figure"],
    signatures: pd.DataFrame,
) -> dict[str, float]:
    """The share of each cause, and of none, of the likelihood of a difference of figures.

    ``noise`` is its covariance by chance; ``signatures`` are lines with ``cause`` and the
    :data:`FIGURES` of planted cases, those of none marked as :data:`HEALTHY`. Figures that are NaN
    are left out.
    """
    known = np.isfinite(difference) & signatures[list(FIGURES)].notna().all().to_numpy()
    x, own = difference[known], noise[np.ix_(known, known)]
    cases = {
        cause: part[list(FIGURES)].to_numpy(dtype=float)[:, known]
        for cause, part in signatures.groupby("cause", sort=False)
    }
    apart = [part - part.mean(axis=0) for cause, part in cases.items() if cause != HEALTHY]
    within = np.concatenate(apart)
    spread = _SMOOTHING**2 * within.T @ within / max(1, len(within) - len(apart))
    healthy = cases.pop(HEALTHY, np.zeros((1, len(x))))
    logs = {HEALTHY: _log_density(x - healthy.mean(axis=0), own + np.cov(healthy.T))}
    for cause, part in cases.items():
        logs[cause] = float(np.logaddexp.reduce(_log_density(x - part, own + spread)))
        logs[cause] -= np.log(len(part))
    priors = {cause: (1 - _HEALTHY_PRIOR) / len(cases) for cause in cases}
    weights = {
        cause: log + np.log(priors.get(cause, _HEALTHY_PRIOR)) for cause, log in logs.items()
    }
    whole = np.logaddexp.reduce(list(weights.values()))
    return {cause: float(np.exp(weight - whole)) for cause, weight in weights.items()}


def _log_density(x: np.ndarray, covariance: np.ndarray) -> Any:
    """Of a normal distribution around 0, for each line of ``x``."""
    covariance = np.atleast_2d(covariance) + 1e-9 * np.eye(x.shape[-1])
    _, size = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * ((x @ np.linalg.inv(covariance)) * x).sum(axis=-1) - 0.5 * size


def _drawn_figures(
    record: AcceptanceRecord, resamples: int, seed: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A record's figures, and those of its requests drawn again.

    Of sums the rounds are drawn, half as many, since those of one request are alike.
    """
    count = len(record.lines)
    if record.unit == "request" and count > 1:
        return figures_of(record), _figures(record, resampled(count, resamples, seed).astype(float))
    rng = np.random.default_rng(seed)
    reached = np.nan_to_num(record.reached.sum(axis=0) / 2).astype(int)
    rates = np.clip(np.nan_to_num(record.conditional), 0, 1)
    passed = rng.binomial(reached, rates, (resamples, len(rates)))
    rest = np.full((resamples, len(FIGURES) - SLOTS - 1), np.nan)
    slots = _slot_figures(passed.astype(float), np.broadcast_to(reached, passed.shape))
    return figures_of(record), np.concatenate([slots, rest], axis=1)


def _figures(
    record: AcceptanceRecord, times: Float[np.ndarray, "resample line"]
) -> Float[np.ndarray, "resample figure"]:
    """The figures of the lines, each taken so many ``times``."""
    passed, reached = times @ record.passed, times @ record.reached
    lines, unknown = record.lines, np.full(len(times), np.nan)
    spread = length = longer = surplus = unknown
    if record.unit == "request" and len(lines) > 1:
        rounds, accepted = (lines[name].to_numpy(dtype=float) for name in ("rounds", "accepted"))
        tau = 1 + accepted / np.maximum(rounds, 1)
        spread = np.log(np.sqrt(_moment(times, tau, tau)) + 1e-6)
        if "output_tokens" in lines:
            tokens = lines["output_tokens"].to_numpy(dtype=float)
            logs = np.log(np.maximum(tokens, 1))
            length = times @ logs / times.sum(axis=1)
            sizes = np.sqrt(_moment(times, tau, tau) * _moment(times, logs, logs)) + 1e-6
            longer = _moment(times, tau, logs) / sizes
            # The first token of an answer belongs to no round.
            surplus = 1 - times @ (tokens - 1) / (times @ (rounds + accepted))
    rest = np.stack([spread, length, longer, surplus], axis=1)
    return np.concatenate([_slot_figures(passed, reached), rest], axis=1)


def _slot_figures(
    passed: Float[np.ndarray, "resample slot"], reached: Float[np.ndarray, "resample slot"]
) -> Float[np.ndarray, "resample figure"]:
    """Log-odds of acceptance in each of the first slots, and in all later ones together."""
    sums = []
    for counts in (passed, reached):
        wide = np.full((len(counts), SLOTS), np.nan)
        wide[:, : counts.shape[1]] = counts[:, :SLOTS]
        later = counts[:, SLOTS:].sum(axis=1) if counts.shape[1] > SLOTS else wide[:, -1] * np.nan
        sums.append(np.column_stack([wide, later]))
    return np.log((sums[0] + 0.5) / (sums[1] - sums[0] + 0.5))


def _moment(times: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The covariance of two figures of the lines, each taken so many ``times``."""
    count = times.sum(axis=1)
    return times @ (x * y) / count - (times @ x / count) * (times @ y / count)


def _covariance(drawn: Float[np.ndarray, "resample figure"]) -> np.ndarray:
    return np.cov(drawn.T)


def _readable(figures: Float[np.ndarray, " figure"]) -> Float[np.ndarray, " figure"]:
    """Rates of log-odds, and what else is a logarithm."""
    made = figures.copy()
    slots, logs = slice(0, SLOTS + 1), slice(SLOTS + 1, SLOTS + 3)
    made[slots], made[logs] = 1 / (1 + np.exp(-figures[slots])), np.exp(figures[logs])
    return made


def _cut(record: AcceptanceRecord, slots: int) -> AcceptanceRecord:
    return replace(record, reached=record.reached[:, :slots], passed=record.passed[:, :slots])


def _same_temperature(served: list[float], own: list[float]) -> float | None:
    """The temperature of both records, where one of them says it."""
    told = {*served, *own}
    if len(told) > 1:
        raise ValueError(
            f"record and trained must be of one temperature, got {sorted(told)}: compare parts of "
            "them that are"
        )
    return told.pop() if told else None


def _possible(
    causes: Iterable[str], temperature: float | None, config: DrafterConfig | None
) -> list[str]:
    out = {"greedy drafts"} if temperature == 0 else set()
    if config is not None and not config.has_markov_head:
        out.add("no Markov head")
    return [cause for cause in causes if cause not in out]


def _seen(figures: pd.DataFrame) -> str:
    """The three figures that differ most from what chance allows."""
    sure = (figures["difference"] / figures["standard_error"]).abs()
    lines = []
    for row in figures.loc[sure.nlargest(3).index].to_dict("records"):
        form = "{:.0%}" if row["figure"] in FIGURES[: SLOTS + 1] else "{:.2f}"
        values = f"{form.format(row['server'])} where {form.format(row['trained'])} was expected"
        lines.append(f"{row['figure']}: {values}")
    return "; ".join(lines)


def _unknown(
    served: AcceptanceRecord, own: AcceptanceRecord, temperature: float | None
) -> list[str]:
    """What the records do not hold, and what cannot be told without it."""
    found = []
    if any(record.unit != "request" for record in (served, own)):
        found.append("Sums only: how requests differ is not known, and a log tells fewer causes")
    slots = [record.passed.shape[1] for record in (served, own)]
    if slots[0] != slots[1]:
        found.append(
            f"Blocks of {slots[0]} and {slots[1]} slots: only those of both were looked at"
        )
    if any("output_tokens" not in record.lines for record in (served, own)):
        found.append(
            "Without the tokens of each answer, tokens behind the end of a turn and another prompt "
            "are hard to tell from faults of the drafter"
        )
    if temperature is None:
        found.append("Neither says its temperature, which should be the same")
    if temperature != 0:
        found.append("Greedy drafts under a sampling target are hard to tell from nothing wrong")
    return found
