"""Records of whole runs: trainers' evaluations, benchmarks, TensorRT-LLM's iterations."""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dspark_lab.records.dump import server_states
from dspark_lab.records.record import Tally
from dspark_lab.records.requests import Object, held, whole_number

_ITERATION = frozenset(
    """numDraftTokens numAcceptedTokens numRequestsWithDraftTokens acceptanceLength iterLatencyMS
    draftOverhead""".split()
)


def is_iteration(row: Object) -> bool:
    return "iter" in row and "iterLatencyMS" in row


def read_iterations(rows: Iterable[Object]) -> Tally:
    """TensorRT-LLM's iteration statistics: sums alone, a line an iteration."""
    tally = Tally(
        "TensorRT-LLM iterations",
        "interval",
        "Accepted tokens, the target's own left out, over the requests that had a draft",
    )
    seen = set()
    for row in rows:
        found = row.get("specDecodingStats")
        rank = row.get("attentionDpRank")
        # A row that was polled twice is one.
        place = (row["iter"], row.get("timestamp"))
        if not isinstance(found, Mapping) or rank not in (None, 0) or place in seen:
            continue
        seen.add(place)
        rounds = whole_number(found["numRequestsWithDraftTokens"], "numRequestsWithDraftTokens")
        if rounds:
            accepted, drafted = (
                whole_number(found[f"num{n}Tokens"], n) for n in ("Accepted", "Draft")
            )
            tally.unknown.update(dict.fromkeys(name for name in found if name not in _ITERATION))
            tally.add(rounds, accepted, drafted, about={"line": row["iter"]})
    return tally


def python_literal(text: str) -> Any:
    """A value written by Python instead of as JSON, as some save TensorRT-LLM's answer."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


# Rounds, accepted and drafted tokens of a whole run.
_COUNTS = ["num_drafts", "num_accepted_tokens", "num_draft_tokens"]


def _bench(rows: Iterable[Object], kind: str = "NeMo AutoModel bench") -> Tally:
    tally = Tally(kind, "data set", "The accepted length counts the target's token")
    for one in (one for row in rows for one in row.get("results") or [row]):
        if one.get("error") is not None or one.get("accept_length") is None:
            continue
        about = {"label": one["dataset"]} if "dataset" in one else None
        if one.get("num_drafts"):
            tally.add(*(one[name] for name in _COUNTS), about=about)
        else:
            tally.exact = False
            tally.notes["rounds are not known, and counted as one"] = None
            tally.add(1, one["accept_length"] - 1, about=about)
    return tally


def _sglang_bench(rows: Iterable[Object]) -> Tally:
    return _bench(rows, "SGLang bench")


def _deepspec(rows: Iterable[Object]) -> Tally:
    tally = Tally(
        "DeepSpec metrics",
        "data set",
        "Labels by position are of the slot and all before it (survival); answers are cut at their "
        "end of turn",
    )
    for row in rows:
        _add_deepspec(tally, row)
    return tally


def _add_deepspec(tally: Tally, row: Object) -> None:
    spec, positions = row["spec"], held(row, "confidence", "per_position") or []
    rounds, rates = held(row, "confidence", "proposal_count"), spec["accept_rates_by_position"]
    weights = [one["total_weight"] for one in positions]
    if not rounds:
        tally.exact, rounds = False, 1
        tally.notes["rounds are not known, and counted as one"] = None
    if weights and min(weights) < rounds:
        tally.notes["blocks that an end of turn cut count up to the cut"] = None
    seen = weights or [rounds] * len(rates)
    passed = [rate * n for rate, n in zip(rates, seen, strict=True) if rate is not None]
    # How many of the rounds that passed a slot had another is known where all had.
    reached = [seen[0]] + [
        before if seen[i] == seen[i + 1] else math.nan for i, before in enumerate(passed[:-1])
    ]
    accepted, about = (spec["acceptance_length"] - 1) * rounds, {"label": spec.get("dataset", "")}
    tally.add(rounds, accepted, sum(seen), passed=passed, reached=reached, about=about)


def _vllm_bench(rows: Iterable[Object]) -> Tally:
    tally = Tally("vLLM bench", "server", "Counters of a run; rates by position are survival")
    for row in rows:
        rounds = whole_number(row["spec_decode_num_drafts"], "spec_decode_num_drafts")
        rates = row.get("spec_decode_per_position_acceptance_rates") or []
        drafted = row["spec_decode_draft_tokens"]
        passed = [rate * rounds for rate in rates]
        accepted = row["spec_decode_accepted_tokens"]
        tally.add(rounds, accepted, drafted, passed=passed)
    return tally


_LENGTH = "avg_spec_accept_length"


def _server_info(rows: Iterable[Object]) -> Tally:
    tally = Tally(
        "SGLang server_info",
        "server",
        "The mean length of each rank since the server's start, the target's own token included",
    )
    tally.exact = False
    tally.notes["rounds are not known, and counted as one"] = None
    for state in (state for row in rows for state in (row, *server_states(row))):
        # A rank that has served nothing yet has none, or 0.
        if (state.get(_LENGTH) or 0) >= 1:
            tally.add(1, state[_LENGTH] - 1)
    return tally


def summary_reader(row: Object) -> Callable[[Iterable[Object]], Tally] | None:
    """What reads objects that are each of a whole run, such as this one."""
    if "spec_decode_num_drafts" in row:
        return _vllm_bench
    if isinstance(held(row, "spec", "accept_rates_by_position"), list):
        return _deepspec
    if "accept_length" in row or ("results" in row and "aggregate" in row):
        return _sglang_bench if "request_throughput" in row else _bench
    if any(_LENGTH in state for state in (row, *server_states(row))):
        return _server_info
    return None


CSV_HEAD = "subset,num_drafts,"


def read_csv_lines(text: Iterable[str]) -> tuple[Tally, str | None]:
    """speculators' acceptance.csv: a line a set of prompts, in the order of the file.

    Returns where the file is cut off, too: its last line, if that does not end.
    """
    tally = Tally(
        "speculators acceptance.csv",
        "data set",
        "Rates by position are shares of all rounds (survival), the length counts the target's "
        "token",
    )
    lines = (line for line in enumerate(text, start=1) if line[1].strip())
    [names] = csv.reader([next(lines)[1]])
    by_slot = [name for name in names if name.startswith("acceptance_at_pos_")]
    by_slot.sort(key=lambda name: int(name.rsplit("_", 1)[1]))
    known = {"subset", "acceptance_length", *_COUNTS, *by_slot}
    tally.unknown.update(dict.fromkeys(name for name in names if name not in known))
    for number, line in lines:
        [values] = csv.reader([line])
        if values == names:
            continue
        row = dict(zip(names, values, strict=False))
        if not line.endswith("\n") and not _adds_up(row, by_slot, len(names) - len(values)):
            return tally, f"line {number}"
        if len(values) != len(names):
            raise ValueError(f"line {number} must have {len(names)} values, got {len(values)}")
        rounds, accepted, drafted = (float(row[name]) for name in _COUNTS)
        if not rounds:
            continue
        passed = [float(row[name]) * rounds for name in by_slot]
        about = {"label": row["subset"]} | {name: row[name] for name in tally.unknown}
        tally.add(rounds, accepted, drafted, passed=passed, about=about)
    return tally, None


def _adds_up(row: Mapping[str, str], by_slot: list[str], lacking: int) -> bool:
    """Whether a line's rates are those of its length, so that no digit of them is cut off."""
    try:
        whole = sum(float(row[name]) for name in by_slot) + 1
        return not lacking and abs(whole - float(row["acceptance_length"])) < 1e-3
    except (KeyError, ValueError):
        return False
