"""SGLang's debug record of DSpark: each round of each request, with what its drafter predicted.

Newer builds answer it at ``/server_info``, early ones logged a line for each step.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dspark_lab.decoding import TRACE_COLUMNS
from dspark_lab.records.record import Tally
from dspark_lab.records.requests import Object, held, whole_number

# Begins a step in an early build's log.
STEP_MARK = "DSPARK_DEBUG_MAIN_OUTPUT={"
_OF_STEP = frozenset(
    """forward_ct bs mode budget lag_steps num_running_reqs num_verify_tokens verify_tokens_local
    verify_tokens_dp_synced verify_tokens_graph_key predicted_step_ms predicted_theta step_cpu_ms
    step_gpu_ms draft_gpu_ms target_verify_gpu_ms reqs gamma avg_verify_len tp_rank""".split()
)
_OF_REQUEST = frozenset(
    """rid req_pool_index req prefix_len prefix verify_len acc_len correct_drafts cap_trim
    bonus_token draft_tokens confidence survival""".split()
)
Payload = tuple[int, Object]


def server_states(row: Object) -> list[Object]:
    """The states of a server's ranks in its /server_info; prefill and decode may be apart."""
    states, decoding = row.get("internal_states"), row.get("decode")
    found = [one for one in states if isinstance(one, Mapping)] if isinstance(states, list) else []
    for server in decoding if isinstance(decoding, list) else []:
        found += server_states(server) if isinstance(server, Mapping) else []
    return found


def dump_payloads(row: Object) -> list[Payload]:
    """The debug records in an object, each with the number of its rank; none where it is none."""
    if isinstance(row.get("records"), list) and ("gamma" in row or "sampling" in row):
        return [(0, row)]
    if is_step(row):
        return [(0, {"records": [row]})]
    found = [held(one, "dspark_info_record") for one in (row, *server_states(row))]
    return list(enumerate(one for one in found if isinstance(one, Mapping)))


def is_step(row: Object) -> bool:
    """Whether an object is one step, as a line of an early build's log holds it."""
    return isinstance(row.get("reqs"), list) and "gamma" in row


def step_of_line(line: str) -> Payload | None:
    """The step in a line of a log, with its rank's number; None where it is not whole."""
    before, _, said = line.partition(STEP_MARK)
    try:
        step, _ = json.JSONDecoder().raw_decode("{" + said)
    except ValueError:
        return None
    rank = re.search(r"\bDP(\d+)\b", before)
    return (int(rank[1]) if rank else 0), {"records": [step]}


class DumpRound(NamedTuple):
    """A request's round: ``accepted`` of its ``verified`` slots, ``trimmed`` of them by a cap."""

    request: str
    slots: int
    verified: int
    accepted: int
    trimmed: int
    entry: Object


class DumpRounds:
    """Reads debug records round by round; ``notes`` and ``unknown`` are as those of a record."""

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}
        self.unknown: dict[str, None] = {}
        # Places of requests without an id are used again, by one that begins with less behind it.
        self._users: dict[tuple[int, Any], tuple[int, int]] = {}

    def read(self, found: Payload) -> Iterator[DumpRound]:
        rank, payload = found
        if payload.get("simulate_acc_len") not in (None, 0, -1):
            raise ValueError("SGLang was told to simulate acceptance: its record is no measurement")
        for step in _listed(payload["records"], "records"):
            self.unknown.update(dict.fromkeys(name for name in step if name not in _OF_STEP))
            if step.get("tp_rank") not in (None, 0):
                self.notes["what ranks of one group wrote again is left out"] = None
                continue
            mode, slots = (step.get(name, payload.get(name)) for name in ("mode", "gamma"))
            for one in _listed(step.get("reqs") or [], "reqs"):
                self.unknown.update(dict.fromkeys(name for name in one if name not in _OF_REQUEST))
                try:
                    yield self._round(one, rank, slots, mode == "cap-accept")
                except ValueError as error:
                    raise ValueError(f"step {step.get('forward_ct')}: {error}") from None

    def _round(self, one: Object, rank: int, gamma: Any, whole: bool) -> DumpRound:
        name, place = one.get("rid"), (rank, one.get("req_pool_index", one.get("req")))
        if name is None:
            behind = one.get("prefix_len", one.get("prefix", 0))
            before, number = self._users.get(place, (0, 0))
            self._users[place] = (behind, number + (behind < before))
            name = f"rank {rank}, place {place[1]}, {self._users[place][1]}"
        accepted = whole_number(one.get("correct_drafts", 0), "correct_drafts")
        verified = whole_number(one["verify_len"], "verify_len") - 1
        if accepted > verified:
            raise ValueError(f"correct_drafts must be at most {verified}, got {accepted}")
        trimmed = max(one.get("cap_trim") or 0, 0)
        if trimmed:
            self.notes["tau is that of whole blocks: a cap cut what was served"] = None
        if one.get("acc_len", accepted + 1) != accepted + 1:
            self.notes["acc_len is not always correct_drafts and one: correct_drafts counts"] = None
        found = max(verified, accepted + trimmed)
        drafted = [len(one.get(name) or ()) for name in ("draft_tokens", "confidence")]
        slots = max(found, *drafted) if gamma is None else whole_number(gamma, "gamma")
        if found > slots:
            raise ValueError(f"a round must have at most {slots} slots, got {found}")
        right = accepted + trimmed
        return DumpRound(str(name), slots, slots if whole else found, right, trimmed, one)


def _listed(values: Any, name: str) -> list[Object]:
    if not isinstance(values, list) or not all(isinstance(one, Mapping) for one in values):
        raise ValueError(f"{name} must be a list of objects")
    return values


class DumpSums:
    """The rounds of debug records, by request."""

    def __init__(self) -> None:
        self._rounds = DumpRounds()
        self._requests: dict[str, tuple[list[int], list[int]]] = {}

    def add(self, found: Payload) -> None:
        for one in self._rounds.read(found):
            accepted, verified = self._requests.setdefault(one.request, ([], []))
            accepted.append(one.accepted)
            verified.append(one.verified)

    def __len__(self) -> int:
        return len(self._requests)

    def tally(self) -> Tally:
        tally = Tally(
            "SGLang dump", "request", "Accepted drafts of each round, the target's own left out"
        )
        tally.notes, tally.unknown = self._rounds.notes, self._rounds.unknown
        for name, steps in self._requests.items():
            tally.add_steps(*steps, {"line": name})
        return tally


def dump_trace(payloads: Iterable[Payload]) -> pd.DataFrame:
    """The rounds of debug records as a trace, with the id of each row's ``request``."""
    rounds, requests = DumpRounds(), dict[str, int]()
    # Rounds and tokens of each request so far; its first token came before any round.
    so_far: list[tuple[int, int]] = []
    names = "prompt round slot position token verified accepted resampled".split()
    columns: dict[str, array[Any]] = {name: array("q") for name in names}
    columns["confidence"] = array("d")
    for found in payloads:
        for one in rounds.read(found):
            prompt = requests.setdefault(one.request, len(requests))
            if prompt == len(so_far):
                so_far.append((0, 1))
            number, length = so_far[prompt]
            so_far[prompt] = number + 1, length + one.accepted - one.trimmed + 1
            # Where a cap cut the block, its own token is that of a draft that was right.
            own = -1 if one.trimmed else one.entry.get("bonus_token", -1)
            tokens = _by_slot(one, "draft_tokens", -1)
            for slot, token in enumerate(tokens):
                verified, accepted = slot < one.verified, slot < one.accepted
                row = (prompt, number, slot, length + slot, token, verified, accepted)
                mine = own if verified and slot == one.accepted else -1
                for name, value in zip(names, (*row, mine), strict=True):
                    columns[name].append(value)
            columns["confidence"].extend(_by_slot(one, "confidence", np.nan))
    if not requests:
        raise ValueError("its steps must have reqs, a component of the debug record, got none")
    table = pd.DataFrame({name: np.array(values) for name, values in columns.items()})
    table["request"] = np.array(list(requests), dtype=object)[table["prompt"]]
    table["resampled"] = table["resampled"].astype("Int64").mask(table["resampled"] < 0)
    others = [name for name in TRACE_COLUMNS if name not in table]
    table = table.assign(**dict.fromkeys(others, np.nan)).assign(domain="none")
    table = table.astype(TRACE_COLUMNS)[[*TRACE_COLUMNS, "request"]]
    return table.sort_values(["prompt", "round", "slot"], ignore_index=True)


def _by_slot(one: DumpRound, name: str, missing: float) -> list[Any]:
    values = one.entry.get(name) or [missing] * one.slots
    if len(values) != one.slots:
        raise ValueError(f"{name} must be one for each of {one.slots} slots, got {len(values)}")
    return values
