"""Records of single requests, as JSON objects: vLLM, SGLang, TensorRT-LLM, AIPerf, llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dspark_lab.records.record import Tally

Object = Mapping[str, Any]
# Where a request's own facts stand, by their name in a record.
_ABOUT = {
    "line": ("id", "request_id", "rid", "x_request_id", "conversation_id", "index"),
    "temperature": ("temperature",),
    "label": ("label", "dataset", "subset", "domain", "category"),
    "seconds": ("created", "request_start_ns", "timestamp"),
    "prompt_tokens": ("prompt_tokens",),
    "output_tokens": ("completion_tokens", "predicted_n"),
}
# What may be a text.
_NAMES = ("line", "label")
# Within a request, where else they may stand.
_PLACES = """metadata meta_info usage sampling_params request timings
    spec_decode_acceptance""".split()


class RequestForm(NamedTuple):
    """One form of a request's record: where it stands in an object, and what is read of it.

    An answer of several choices has several. Fields with the ``prefix`` that are not ``known`` are
    kept as they are.
    """

    kind: str
    definition: str
    find: Callable[[Object], list[Object]]
    read: Callable[[Tally, Object, dict[str, Any]], None]
    known: frozenset[str]
    prefix: str = ""


def held(value: Any, *path: str) -> Any:
    """What stands at the end of a path of keys; None where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def whole_number(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be below 0, got {value!r}")
    return int(value)


def _counts(value: Any, name: str) -> list[int]:
    """A histogram as a list; as an object its keys are the numbers."""
    if isinstance(value, Mapping):
        found = {
            whole_number(float(key), name): whole_number(count, name)
            for key, count in value.items()
        }
        return [found.get(number, 0) for number in range(max(found, default=-1) + 1)]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a list or an object of counts, got {value!r}")
    return [whole_number(count, name) for count in value]


def about(row: Object) -> dict[str, Any]:
    """What is known of a request beside its acceptance; never its text."""
    found: dict[str, Any] = {}
    places = [row, *(row[name] for name in _PLACES if isinstance(row.get(name), Mapping))]
    for name, keys in _ABOUT.items():
        for place in places:
            for key in keys:
                value = place.get(key)
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if name not in found and (number or (isinstance(value, str) and name in _NAMES)):
                    found[name] = value / 1e9 if key.endswith("_ns") else value
    return found


def text(row: Object) -> dict[str, Any]:
    """A request's prompt and answer, where they stand beside its record."""
    choice = (row.get("choices") or [{}])[0]
    said = (row.get("text"), row.get("content"), choice.get("text"))
    answer = next(filter(None, said), held(choice, "message", "content"))
    prompt = row.get("prompt") or row.get("messages")
    found = {"prompt": prompt, "answer": answer}
    return {name: value for name, value in found.items() if value is not None}


def _steps_of(found: Object) -> tuple[list[int], list[int]] | None:
    """Accepted and drafted tokens of each round, where they are known, in any order."""
    if found.get("per_step_accepted") and found.get("per_step_drafted"):
        names = ("per_step_accepted", "per_step_drafted")
        taken, offered = (_counts(found[name], name) for name in names)
        if len(taken) != len(offered):
            sizes = f"{len(taken)} and {len(offered)}"
            raise ValueError(f"{' and '.join(names)} must be as many, got {sizes}")
        if any(a > d for a, d in zip(taken, offered, strict=True)):
            raise ValueError(f"{names[0]} must not be above {names[1]}")
        return taken, offered
    by_length = found.get("acceptance_histogram_by_draft_length")
    if not by_length:
        return None
    taken, offered = [], []
    for length, counts in by_length.items():
        for number, rounds in enumerate(_counts(counts, f"histogram of length {length}")):
            taken += [number] * rounds
            offered += [whole_number(float(length), "draft length")] * rounds
    return taken, offered


def _steps_or_histogram(tally: Tally, found: Object, told: dict[str, Any], names: Object) -> None:
    """A line of vLLM's form, by whichever of its parts says most; all of them must agree."""
    steps, said = _steps_of(found), found.get(names["histogram"])
    histogram = None if said is None else _counts(said, names["histogram"])
    if steps is None and histogram is None:
        raise KeyError(names["histogram"])
    if steps is not None:
        counted = np.bincount(steps[0]).tolist() if steps[0] else []
        if histogram and _trimmed(histogram) != _trimmed(counted):
            raise ValueError(f"{names['histogram']} must be that of the rounds, got another one")
        histogram = counted
    assert histogram is not None
    accepted = sum(number * count for number, count in enumerate(histogram))
    for name, value in (("steps", sum(histogram)), ("accepted", accepted)):
        if found.get(names[name]) not in (None, value):
            wanted = f"{names[name]} must be that of the histogram, {value}"
            raise ValueError(f"{wanted}, got {found[names[name]]}")
    most, given = found.get("num_spec_tokens"), found.get(names["drafted"])
    if given is not None and given < accepted:
        raise ValueError(f"{names['drafted']} must be at least {accepted}, got {given}")
    if steps is not None:
        tally.add_steps(*steps, told)
        return
    slots = whole_number(most, "num_spec_tokens") if most is not None else len(histogram) - 1
    if sum(histogram):
        tally.add_histogram(histogram, slots, math.nan if given is None else given, told)


def _trimmed(counts: list[int]) -> list[int]:
    """Without the zeros at its end."""
    return counts[: max((place + 1 for place, count in enumerate(counts) if count), default=0)]


_VLLM = {
    "histogram": "acceptance_histogram",
    "steps": "num_spec_steps",
    "accepted": "num_accepted_draft_tokens",
    "drafted": "num_draft_tokens",
}
_TENSORRT = _VLLM | {"accepted": "total_accepted_draft_tokens", "drafted": "total_draft_tokens"}


def _vllm(tally: Tally, found: Object, told: dict[str, Any]) -> None:
    _steps_or_histogram(tally, found, told, _VLLM)


def _tensorrt(tally: Tally, found: Object, told: dict[str, Any]) -> None:
    _steps_or_histogram(tally, found, told, _TENSORRT)


def _aiperf(tally: Tally, found: Object, told: dict[str, Any]) -> None:
    if found.get("engine") in ("llamacpp", "llama.cpp"):
        steps, accepted = found["num_spec_steps"], found["num_accepted_draft_tokens"]
        tally.exact = False
        tally.notes["AIPerf makes up the histogram of llama.cpp: its slots are left out"] = None
        tally.add(steps, accepted, found.get("num_draft_tokens", math.nan), about=told)
        return
    _vllm(tally, found, told)


def _sglang(tally: Tally, found: Object, told: dict[str, Any]) -> None:
    def first(*names: str) -> Any:
        return next((found[name] for name in names if found.get(name) is not None), None)

    rounds = whole_number(found["spec_verify_ct"], "spec_verify_ct")
    histogram = first("spec_correct_drafts_histogram", "spec_accept_histogram")
    accepted = first("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
    drafted = first("spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")
    if not rounds:
        return
    if not histogram:
        if accepted is None:
            output = told.get("output_tokens")
            if output is None:
                raise ValueError("spec_verify_ct alone says nothing: completion_tokens are missing")
            tally.exact = False
            tally.notes["accepted tokens are worked out of the answers' lengths"] = None
            accepted = max(output - 1 - rounds, 0)
        tally.add(rounds, accepted, math.nan if drafted is None else drafted, about=told)
        return
    counts = _counts(histogram, "histogram")
    if sum(counts) != rounds:
        raise ValueError(
            f"spec_verify_ct must be that of the histogram, {sum(counts)}, got {rounds}"
        )
    total = sum(number * count for number, count in enumerate(counts))
    if accepted not in (None, total):
        raise ValueError(f"accepted drafts must be those of the histogram, {total}, got {accepted}")
    slots = round(drafted / rounds) if drafted else len(counts) - 1
    if drafted is not None and drafted < total:
        raise ValueError(f"accepted drafts must be at most those proposed, {drafted}, got {total}")
    windows = found.get("spec_cap_lens_histogram")
    if windows:
        drafted = sum(max(size - 1, 0) * n for size, n in enumerate(_counts(windows, "windows")))
    tally.add_histogram(counts, slots, math.nan if drafted is None else drafted, told)


def _llama(tally: Tally, found: Object, told: dict[str, Any]) -> None:
    accepted, drafted = (
        whole_number(found[name], name) for name in ("draft_n_accepted", "draft_n")
    )
    tally.exact = False
    rounds = max(whole_number(found["predicted_n"], "predicted_n") - accepted - 1, 1)
    tally.add(rounds, accepted, drafted, about=told)


def _choices(name: str) -> Callable[[Object], list[Object]]:
    def find(row: Object) -> list[Object]:
        choices = row.get("choices")
        found = [held(one, name) for one in choices] if isinstance(choices, list) else []
        return [one for one in found if isinstance(one, Mapping)]

    return find


def _tokens_details(row: Object) -> list[Object]:
    found = held(row, "sglext", "spec_tokens_details")
    return [one for one in (found if isinstance(found, list) else [found]) if one]


def _itself(*names: str) -> Callable[[Object], list[Object]]:
    return lambda row: [row] if all(name in row for name in names) else []


def _at(*path: str, needs: str | None = None) -> Callable[[Object], list[Object]]:
    def find(row: Object) -> list[Object]:
        found = held(row, *path)
        right = isinstance(found, Mapping) and (needs is None or needs in found)
        return [found] if right else []

    return find


_OF_VLLM = frozenset(
    """mean_acceptance_length draft_acceptance_rate acceptance_histogram num_spec_steps
    num_accepted_draft_tokens num_draft_tokens num_spec_tokens per_step_accepted per_step_drafted
    acceptance_histogram_by_draft_length""".split()
)
_OF_SGLANG = frozenset(
    """spec_verify_ct spec_num_correct_drafts spec_accepted_drafts spec_accept_token_num
    spec_num_proposed_drafts spec_proposed_drafts spec_draft_token_num spec_accept_rate
    spec_correct_drafts_histogram spec_accept_histogram spec_accept_length spec_cap_length
    spec_cap_lens_histogram spec_block_accept_length""".split()
)
_COUNTED = "tokens behind an end of turn count as accepted"
VLLM = f"Histograms of accepted tokens, the target's own left out; {_COUNTED}"
SGLANG = f"Histograms of accepted drafts, the target's own token left out; {_COUNTED}"
_VLLM_REQUESTS = ("vLLM requests", VLLM), (_vllm, _OF_VLLM)
_META_INFO = ("SGLang meta_info", SGLANG), (_sglang, _OF_SGLANG, "spec_")


def _forms(
    told: tuple[str, str], read: tuple[Any, ...], *found: Callable[[Object], list[Object]]
) -> list[RequestForm]:
    """The same form in several places."""
    return [RequestForm(*told, find, *read) for find in found]


FORMS = [
    RequestForm(
        "AIPerf records",
        VLLM,
        _at("spec_decode_acceptance"),
        _aiperf,
        _OF_VLLM | {"engine", "completion_tokens"},
    ),
    *_forms(
        *_VLLM_REQUESTS,
        _at("metrics", "speculative_decoding"),
        _itself("acceptance_histogram", "num_spec_steps"),
        _itself("per_step_accepted", "per_step_drafted"),
        _choices("speculative_decoding_stats"),
    ),
    RequestForm(
        "TensorRT-LLM requests",
        f"Histograms of accepted tokens over verified drafts; {_COUNTED}",
        _choices("speculative_decoding"),
        _tensorrt,
        _OF_VLLM | {"acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens"},
    ),
    *_forms(
        *_META_INFO,
        _at("meta_info", needs="spec_verify_ct"),
        _tokens_details,
        _itself("spec_verify_ct"),
    ),
    RequestForm(
        "llama.cpp timings",
        "Accepted and drafted tokens; rounds are worked out of the answer's length",
        _at("timings", needs="draft_n"),
        _llama,
        frozenset({"draft_n", "draft_n_accepted"}),
        "draft_",
    ),
]


def request_form(row: Object) -> RequestForm | None:
    """The form of a request's object, None where it is none."""
    return next((one for one in FORMS if one.find(row)), None)


def read_requests(rows: Iterator[Object], form: RequestForm, *, texts: bool) -> Tally:
    """All requests of one form; what has no record of acceptance is counted and left out."""
    tally, without, left_out = Tally(form.kind, "request", form.definition), 0, 0
    for number, row in enumerate(rows, start=1):
        own = request_form(row)
        if own is None:
            without += 1
            continue
        if own.kind != form.kind:
            raise ValueError(f"all rows must be {form.kind}, got {own.kind}, too")
        cancelled = held(row, "metadata", "was_cancelled") or row.get("error")
        if cancelled or held(row, "metadata", "benchmark_phase") == "warmup":
            left_out += 1
            continue
        told = about(row) | (text(row) if texts else {})
        for found in own.find(row):
            more = {name: value for name, value in found.items() if name.startswith(own.prefix)}
            more = {name: value for name, value in more.items() if name not in own.known}
            tally.unknown.update(dict.fromkeys(more))
            try:
                own.read(tally, found, told | more)
            except ValueError as error:
                raise ValueError(f"record {number}: {error}") from None
    if without:
        tally.notes[f"{without} rows have no record of acceptance"] = None
    if left_out:
        tally.notes[f"{left_out} warm-up, cancelled or failed requests are left out"] = None
    return tally
