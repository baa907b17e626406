"""Servers' records of acceptance: each format says what a loop over the same rounds says."""

import gzip
import io
import json
import math
import pickle
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.make.server_files import (
    Round,
    aiperf,
    aiperf_row,
    automodel,
    automodel_object,
    csv_head,
    csv_row,
    deepspec,
    dump_of,
    dump_request,
    histogram,
    json_lines,
    llama_line,
    llama_log,
    llama_metrics,
    passed,
    pooled,
    sglang_dump,
    sglang_line,
    sglang_meta,
    sglang_object,
    speculators,
    sums,
    trt_metrics,
    trt_object,
    trt_requests,
    trt_rows,
    vllm_bench,
    vllm_line,
    vllm_log,
    vllm_metrics,
    vllm_object,
    vllm_requests,
    vllm_row,
)
from dspark_lab import load_acceptance
from dspark_lab.records import AcceptanceRecord
from dspark_lab.serving import AcceptanceProfile

Writer = Callable[[Sequence[Sequence[Round]], int], str]
SUMS_ONLY = "no intervals: sums only"
# Six rounds of three slots, nine tokens accepted: histogram 2, 1, 1, 2, and tau 2.5.
SIX: list[Round] = [(3, 3), (0, 3), (1, 3), (2, 3), (3, 3), (0, 3)]
SIX_SURVIVAL, SIX_CONDITIONAL = [4 / 6, 3 / 6, 2 / 6], [4 / 6, 3 / 4, 2 / 3]


def read(content: str | bytes, name: str = "record", **options: Any) -> AcceptanceRecord:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return load_acceptance(path, **options)


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def same(found: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def reached(rounds: Sequence[Round], slots: int) -> list[int]:
    """Rounds whose slot was verified with all before it accepted."""
    return [sum(a >= slot and d > slot for a, d in rounds) for slot in range(slots)]


def conditional(rounds: Sequence[Round], slots: int) -> list[float]:
    pairs = zip(passed(rounds, slots), reached(rounds, slots), strict=True)
    return [over / under if under else math.nan for over, under in pairs]


def vllm_summary(requests: Sequence[Sequence[Round]], slots: int) -> str:
    objects = (vllm_object(request, slots, detailed=False) for request in requests)
    return json.dumps([vllm_row(found, f"r{n}") for n, found in enumerate(objects)])


def vllm_by_length(requests: Sequence[Sequence[Round]], slots: int) -> str:
    rows = []
    for n, request in enumerate(requests):
        found = vllm_object(request, slots, detailed=False)
        found["acceptance_histogram_by_draft_length"] = {
            str(length): histogram([step for step in request if step[1] == length], length)
            for length in sorted({d for _, d in request})
        }
        rows.append(vllm_row(found, f"r{n}"))
    return json_lines(*rows)


def aiperf_summary(requests: Sequence[Sequence[Round]], slots: int) -> str:
    return aiperf(requests, slots, detailed=False)


def sglang_capped(requests: Sequence[Sequence[Round]], slots: int) -> str:
    rows = []
    for n, request in enumerate(requests):
        windows = [sum(d + 1 == width for _, d in request) for width in range(slots + 2)]
        length = 1 + sum(d for _, d in request) / len(request)
        cap = {"spec_cap_length": length, "spec_cap_lens_histogram": windows}
        rows.append(
            {"text": "", "meta_info": {"id": f"r{n}"} | sglang_object(request, slots) | cap}
        )
    return json_lines(*rows)


def trt_iterations(requests: Sequence[Sequence[Round]], slots: int) -> str:
    return repr(trt_rows(requests))


def vllm_scrape(requests: Sequence[Sequence[Round]], slots: int) -> str:
    """Its counters are shuffled among the engines' and others."""
    other = "# HELP some_gauge Nothing of ours\n# TYPE some_gauge gauge\nsome_gauge NaN\n"
    lines = vllm_metrics(requests, slots).splitlines(keepends=True)
    return other + "".join(lines[::-2] + lines[::2])


def automodel_sweep(requests: Sequence[Sequence[Round]], slots: int) -> str:
    results: list[Any] = [
        {"dataset": f"set{n}"} | automodel_object(r) for n, r in enumerate(requests)
    ]
    results.append({"dataset": "broken", "error": "no answer"})
    total = {"num_datasets": len(results), "accept_length": 9.0, "output_throughput_tok_s": 1.0}
    return json.dumps({"results": results, "aggregate": total})


# Name: writer, kind, unit, and what is known of slots. "exact" knows which slots were verified,
# "histogram" does not, "counters" has sums by slot, "sums" none by slot, "rounded" a few digits.
FORMATS: dict[str, tuple[Writer, str, str, str]] = {
    "vLLM detailed": (vllm_requests, "vLLM requests", "request", "exact"),
    "vLLM by draft length": (vllm_by_length, "vLLM requests", "request", "exact"),
    "vLLM summary": (vllm_summary, "vLLM requests", "request", "histogram"),
    "AIPerf detailed": (aiperf, "AIPerf records", "request", "exact"),
    "AIPerf summary": (aiperf_summary, "AIPerf records", "request", "histogram"),
    "SGLang dump": (sglang_dump, "SGLang dump", "request", "exact"),
    "SGLang meta_info": (sglang_meta, "SGLang meta_info", "request", "whole"),
    "SGLang capped": (sglang_capped, "SGLang meta_info", "request", "histogram"),
    "TensorRT-LLM requests": (trt_requests, "TensorRT-LLM requests", "request", "histogram"),
    "TensorRT-LLM iterations": (trt_iterations, "TensorRT-LLM iterations", "interval", "sums"),
    "vLLM metrics": (vllm_scrape, "vLLM metrics", "server", "counters"),
    "llama.cpp metrics": (llama_metrics, "llama.cpp metrics", "server", "counters"),
    "TensorRT-LLM metrics": (trt_metrics, "TensorRT-LLM metrics", "server", "counters"),
    "vLLM bench": (vllm_bench, "vLLM bench", "server", "counters"),
    "speculators": (speculators, "speculators acceptance.csv", "data set", "counters"),
    "DeepSpec": (deepspec, "DeepSpec metrics", "data set", "whole"),
    "AutoModel": (automodel, "NeMo AutoModel bench", "data set", "sums"),
    "AutoModel sweep": (automodel_sweep, "NeMo AutoModel bench", "data set", "sums"),
    "vLLM log": (vllm_log, "vLLM log", "interval", "rounded"),
    "llama.cpp log": (llama_log, "llama.cpp log", "request", "rounded"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_six_rounds_are_the_same_in_every_format(name):
    write, kind, unit, slots = FORMATS[name]
    record = read(write([SIX], 3))
    assert (record.kind, record.unit) == (kind, unit)
    assert record.rounds == 6 and record.accepted == pytest.approx(9)
    assert record.tau == pytest.approx(2.5)
    assert record.exact == (kind != "llama.cpp log")
    assert list(record.lines.columns[:4]) == ["line", "rounds", "accepted", "drafted"]
    assert record.lines["drafted"].sum() == 18
    assert record.unknown == () and record.truncated is None
    assert record.kind in record.reason and record.definition
    if slots == "sums":
        assert len(record.survival) == len(record.conditional) == 0
        with pytest.raises(ValueError):
            record.profile()
    else:
        assert record.reached.shape == record.passed.shape == (len(record.lines), 3)
        same(record.survival, SIX_SURVIVAL, atol=0.0006)
        same(record.conditional, SIX_CONDITIONAL, atol=0.002)
        profile = record.profile()
        assert isinstance(profile, AcceptanceProfile)
        same(profile.rates, record.conditional)
        assert profile.tau(3) == pytest.approx(2.5, abs=0.002)


@pytest.mark.parametrize("name", FORMATS)
def test_intervals_are_drawn_over_requests_or_said_to_be_missing(name):
    write, _, unit, slots = FORMATS[name]
    record = read(write([SIX, [(0, 3)] * 4, [(3, 3)] * 2], 3))
    table = record.tau_table()
    assert len(table) == 1 and table["tau"][0] == pytest.approx(record.tau)
    if unit == "request":
        requests = record.requests
        assert requests is not None and SUMS_ONLY not in record.reason
        assert requests["tau"].tolist() == pytest.approx([2.5, 1, 4], abs=0.005)
        assert 1 <= table["low"][0] < record.tau < table["high"][0] <= 4
    else:
        assert record.requests is None and SUMS_ONLY in record.reason
        assert table[["low", "high"]].isna().all(axis=None)
    if slots != "sums":
        by_slot = record.table()
        assert by_slot["slot"].tolist() == [0, 1, 2]
        same(by_slot["conditional"], record.conditional)
        same(by_slot["survival"], record.survival)


def rounds_of(slots: int, whole: bool) -> st.SearchStrategy[Round]:
    verified = st.just(slots) if whole else st.integers(1, slots)
    return verified.flatmap(lambda d: st.tuples(st.integers(0, d), st.just(d)))


@st.composite
def drawn(draw: st.DrawFn, whole: bool) -> tuple[list[list[Round]], int]:
    slots = draw(st.integers(1, 5))
    request = st.lists(rounds_of(slots, whole), min_size=1, max_size=9)
    return draw(st.lists(request, min_size=1, max_size=3)), slots


def assert_sums(record: AcceptanceRecord, requests: Sequence[Sequence[Round]]) -> None:
    rounds, accepted, _ = sums(pooled(requests))
    assert record.rounds == pytest.approx(rounds) and record.accepted == pytest.approx(accepted)
    assert record.tau == pytest.approx(1 + accepted / rounds)
    if record.requests is not None:
        taus = [1 + sum(a for a, _ in request) / len(request) for request in requests]
        assert record.requests["tau"].tolist() == pytest.approx(taus)


def assert_slots(record: AcceptanceRecord, rounds: Sequence[Round], atol: float = 1e-12) -> None:
    """As long as any slot was reached; every conditional rate true or NaN."""
    slots = len(record.survival)
    assert max(a for a, _ in rounds) <= slots
    same(record.survival, [count / len(rounds) for count in passed(rounds, slots)], atol=atol)
    for found, true in zip(record.conditional, conditional(rounds, slots), strict=True):
        assert math.isnan(found) or found == pytest.approx(true, abs=4 * len(rounds) * atol)


@settings(max_examples=6)
@given(drawn(whole=True))
def test_whole_blocks_are_what_a_loop_over_rounds_counts(case):
    requests, slots = case
    rounds = pooled(requests)
    for name, (write, kind, _, known) in FORMATS.items():
        if known == "rounded":
            continue
        record = read(write(requests, slots))
        assert record.kind == kind, name
        assert record.exact, name
        assert_sums(record, requests)
        if known != "sums":
            assert_slots(record, rounds)
            same(record.conditional, conditional(rounds, len(record.conditional)))
            assert len(record.conditional) == slots, name


@settings(max_examples=6)
@given(drawn(whole=False))
def test_short_drafts_are_censored_and_not_rejected(case):
    requests, slots = case
    rounds = pooled(requests)
    for name, (write, _, _, known) in FORMATS.items():
        if known in ("whole", "rounded"):
            continue
        record = read(write(requests, slots))
        assert_sums(record, requests)
        if known == "sums":
            continue
        assert_slots(record, rounds)
        assert record.conditional[0] == pytest.approx(conditional(rounds, 1)[0]), name
        width = len(record.conditional)
        if known == "exact":
            same(record.conditional, conditional(rounds, width))
            assert not any(reached(rounds, slots)[width:])
            for line, request in enumerate(requests):
                same(record.reached[line], reached(request, width))
                same(record.passed[line], passed(request, width))
        elif known == "histogram":
            for line, request in enumerate(requests):
                cut = any(d < slots for _, d in request)
                found = record.reached[line, 1:]
                assert (
                    np.isnan(found).all() if cut else found.tolist() == reached(request, width)[1:]
                )
            if all(any(d < slots for _, d in request) for request in requests):
                assert np.isnan(record.conditional[1:]).all()
            if width > 1 and np.isnan(record.reached).any():
                assert record.notes, name


@settings(max_examples=15)
@given(drawn(whole=True))
def test_logs_of_few_digits_give_whole_counts_back(case):
    requests, slots = case
    rounds = pooled(requests)
    record = read(vllm_log(requests, slots))
    assert record.exact
    assert_sums(record, requests)
    assert_slots(record, rounds, atol=0.0006)
    record = read(llama_log(requests, slots))
    assert not record.exact and record.accepted == sums(rounds)[1]
    assert record.requests is not None
    for tau, request in zip(record.requests["tau"], requests, strict=True):
        assert tau == pytest.approx(1 + sum(a for a, _ in request) / len(request), abs=0.005)
    if all(any(a for a, _ in request) for request in requests):
        assert record.rounds == len(rounds)
        assert_slots(record, rounds, atol=0.0006)


def test_survival_is_not_read_as_conditional():
    """Rates of 0.6, 0.5 and 0.4 of all rounds: 2.5 tokens a round, and not 1 + .6 + .3 + .12."""
    rounds = [(3, 3)] * 8 + [(2, 3)] * 2 + [(1, 3)] * 2 + [(0, 3)] * 8
    for name, (write, _, _, known) in FORMATS.items():
        record = read(write([rounds], 3))
        assert record.tau == pytest.approx(2.5), name
        if known != "sums":
            same(record.survival, [0.6, 0.5, 0.4], atol=0.0006)
            same(record.conditional, [0.6, 5 / 6, 0.8], atol=0.002)


PREFIX = "INFO 03-14 09:26:53 [metrics.py:101] SpecDecoding metrics: "
WORDINGS = {
    "2025 on": vllm_line(SIX, 3),
    "without a prefix": "SpecDecoding" + vllm_line(SIX, 3).split("SpecDecoding")[1],
    "April 2025": PREFIX + "Draft acceptance rate: 50.0%, "
    "Mean acceptance length: 2.50, Accepted: 9 tokens, Drafted: 18 tokens, "
    "Per-position acceptance rate: 0.667, 0.500, 0.333\n",
    "mean without the target's token": PREFIX + "Draft acceptance rate: 50.0%, "
    "Mean acceptance length: 1.50, Accepted: 9 tokens, Drafted: 18 tokens, "
    "Per-position acceptance rate: 0.667, 0.500, 0.333\n",
    "rates in the middle": PREFIX + "Per-position acceptance rate: 0.667, 0.500, 0.333, "
    "Drafted: 18 tokens, Mean acceptance length: 2.50, Accepted: 9 tokens\n",
    "names of a fork": vllm_line(SIX, 3)
    .replace("Avg", "Draft length histogram: 2:31, 4:385, Avg")
    .replace("\n", ", Rejected: 9 tokens, Reverify: 0\n"),
    "colours of a terminal": "\x1b[1;36m(EngineCore pid=7)\x1b[0;0m " + vllm_line(SIX, 3),
}


@pytest.mark.parametrize("name", WORDINGS)
def test_each_wording_of_vllm_has_the_same_rounds(name):
    record = read("INFO Starting\n" + WORDINGS[name] + "INFO Stopped\n")
    assert record.kind == "vLLM log" and record.exact
    assert (record.rounds, record.accepted, record.tau) == (6, 9, 2.5)
    same(record.survival, SIX_SURVIVAL, atol=0.0006)


def test_intervals_of_a_log_add_up_and_engines_are_not_duplicates():
    lines = [vllm_line(SIX, 3), vllm_line(SIX, 3), vllm_line([(0, 3)] * 12, 3, "03-14 09:27:03")]
    record = read("".join(lines))
    assert record.lines["rounds"].tolist() == [6, 6, 12]
    assert record.tau == 1 + 18 / 24
    seconds = record.lines["seconds"]
    assert (seconds - seconds[0]).tolist() == [0, 0, 10]


@pytest.mark.parametrize(
    "first, second", [("12-31 23:59:55", "01-01 00:00:05"), ("02-29 23:59:55", "03-01 00:00:05")]
)
def test_a_log_without_years_goes_on_at_midnight(first, second):
    record = read(vllm_line(SIX, 3, first) + vllm_line(SIX, 3, second))
    assert record.rounds == 12
    assert record.lines["seconds"].diff()[1] == pytest.approx(10)


def test_an_interval_in_which_nothing_was_drafted_spoils_no_log():
    empty = vllm_line([(0, 3)], 3).replace("Drafted: 3", "Drafted: 0").replace("0.0%", "nan%")
    record = read(vllm_line(SIX, 3) + empty + vllm_line(SIX, 3))
    assert record.accepted == 18 and record.rounds >= 12
    assert record.survival[0] > 0


def test_rounds_of_a_depth_that_changes_come_from_the_mean_length():
    """400 rounds of two drafts, printed as four rates: not 200 rounds of four."""
    rounds = [(2, 2)] * 100 + [(1, 2)] * 100 + [(0, 2)] * 200
    line = vllm_line(rounds, 4).replace("1.75, ", "1.75, Current speculative depth: 2, ")
    record = read(line)
    assert record.rounds == pytest.approx(400, abs=4) and not record.exact
    assert record.tau == pytest.approx(1.75, abs=0.005)
    same(record.survival, [0.5, 0.25, 0, 0])
    assert np.isnan(record.conditional[1:]).all() and record.notes


@pytest.mark.parametrize(
    "line",
    [
        "SpecDecoding metrics: Draft acceptance rate: 35.0%, Accepted: 560 tokens, "
        "Drafted: 1600 tokens\n",
        "INFO 03-14 09:26:53 metrics.py:367] Speculative metrics: Draft acceptance rate: 0.433, "
        "System efficiency: 0.460, Number of speculative tokens: 4, Number of accepted tokens: "
        "520, Number of draft tokens: 1200, Number of emitted tokens: 690.\n",
        "DiffusionDecoding metrics: Committed token throughput: 5.0 tokens/s\n",
        'vllm:spec_decode_num_accepted_tokens_total{model_name="m"} 520\n'
        'vllm:spec_decode_num_draft_tokens_total{model_name="m"} 1200\n'
        'vllm:spec_decode_num_emitted_tokens_total{model_name="m"} 690\n',
    ],
)
def test_old_counts_that_are_no_prefixes_or_have_no_rounds_are_refused(line):
    with pytest.raises(ValueError, match="must hold a record"):
        read(line)


@pytest.mark.parametrize(
    "line",
    [
        "[2025-06-11 09:12:44 TP0] Decode batch. #running-req: 6, #token: 9120, "
        "token usage: 0.09, accept len: 3.15, cuda graph: True, "
        "gen throughput (token/s): 402.77, #queue-req: 0\n",
        sglang_line(3.15, 0.53),
        sglang_line(3.15, 0.43),
        sglang_line(3.15, 0.43).replace("batch,", "batch [4711],"),
        "pod-1 | " + sglang_line(3.15, 0.43).replace(" DP0 TP0", ""),
        sglang_line(3.15, 0.43).replace("cuda graph", "npu graph"),
        sglang_line(3.15, 0.43, cap=4.1).replace("cap len", "block accept len: 3.40, cap len"),
    ],
)
def test_each_wording_of_sglang_has_the_target_s_token_in_its_length(line):
    other = "[2026-06-02 09:12:40 TP0] Prefill batch, #new-seq: 1, #new-token: 44\n"
    idle = sglang_line(1.0).replace("accept len: 1.00, ", "")
    record = read(other + idle + line)
    assert (record.kind, record.unit, len(record.lines)) == ("SGLang log", "interval", 1)
    assert record.tau == pytest.approx(3.15) and not record.exact
    assert len(record.survival) == 0


def test_a_log_of_sglang_is_a_mean_of_its_lines():
    record = read(sglang_line(3.0, 0.4) + sglang_line(2.0, 0.2, "09:12:54"))
    assert record.tau == pytest.approx(2.5)
    seconds = record.lines["seconds"]
    assert seconds[1] - seconds[0] == 10


LLAMA = llama_line(SIX, 3)
LLAMA_LINES = {
    "June 2026": LLAMA,
    "mean len": llama_line(SIX, 3, by_slot=False),
    "a router's port": "[8081] " + LLAMA,
    "no time": LLAMA.split(" I ")[1],
    "no task": "draft acceptance" + LLAMA.split("draft acceptance")[1],
}


@pytest.mark.parametrize("name", LLAMA_LINES)
def test_each_wording_of_llama_cpp_has_its_rounds_worked_out(name):
    record = read(LLAMA_LINES[name])
    assert (record.kind, record.unit, record.exact) == ("llama.cpp log", "request", False)
    assert (record.rounds, record.accepted, record.tau) == (6, 9, 2.5)
    same(record.survival, [] if name == "mean len" else SIX_SURVIVAL, atol=0.0006)


def test_rates_on_a_line_of_their_own_belong_to_their_task():
    rates = "0.16 I slot print_timing: id  1 | task {} |      acc per pos = ({})\n"
    lines = [
        llama_line(SIX, 3, 7, by_slot=False),
        rates.format(7, "0.667, 0.500, 0.333"),
        llama_line([(1, 3), (0, 3)], 3, 8, by_slot=False),
        rates.format(8, "0.500, 0.000, 0.000"),
    ]
    record = read("".join(lines))
    assert record.rounds == 8
    same(record.survival, [5 / 8, 3 / 8, 2 / 8], atol=0.0006)


def test_many_rounds_of_llama_cpp_are_a_range():
    """4,100 accepted at a mean of 2.37: from 2,982 to 3,003 rounds."""
    text = "draft acceptance = 0.50000 ( 4100 accepted /  8200 generated), mean len =  2.37\n"
    record = read(text)
    assert 2982 <= record.rounds <= 3003 and not record.exact
    # Two slots and 405 drafts: the mean allows 202 rounds, which would be 404 drafts at most.
    record = read(
        "draft acceptance = 0.76049 (  308 accepted /   405 generated), "
        "mean acceptance length =  2.52, acceptance rate per position = (0.897, 0.621)\n"
    )
    assert record.rounds == 203
    assert np.isnan(record.conditional[1]) and record.notes


@pytest.mark.parametrize("word", ["", " rate"])
def test_old_lines_of_llama_cpp_have_no_rounds(word):
    line = f"draft acceptance{word} = 0.59091 (  208 accepted /   352 generated)\n"
    with pytest.raises(ValueError):
        read(line)


def test_timings_of_llama_cpp_estimate_rounds_from_the_answer():
    timings = {"predicted_n": 297, "predicted_ms": 2650.0, "draft_n": 352, "draft_n_accepted": 208}
    plain = {"timings": {"predicted_n": 5, "predicted_ms": 50.0}}
    record = read(json_lines({"content": "", "timings": timings}, plain))
    assert (record.kind, record.unit, record.exact) == ("llama.cpp timings", "request", False)
    assert record.rounds == pytest.approx(88, abs=1) and record.accepted == 208
    assert len(record.lines) == 1 and record.notes


@pytest.mark.parametrize(
    "row",
    [
        vllm_object(SIX, 3),
        vllm_row(vllm_object(SIX, 3)),
        vllm_row(vllm_object(SIX, 3) | {"acceptance_histogram": {"0": 2, "1": 1, "2": 1, "3": 2}}),
        vllm_row(without(vllm_object(SIX, 3), "acceptance_histogram", "mean_acceptance_length")),
        vllm_row(dict(reversed(vllm_object(SIX, 3).items()))),
        vllm_row(vllm_object(SIX, 3), choices=[], usage={"prompt_tokens": 3}),
        {"id": "r", "choices": [{"index": 0, "speculative_decoding_stats": vllm_object(SIX, 3)}]},
    ],
    ids=["bare", "plain", "sparse", "no histogram", "reversed", "streamed", "first form"],
)
def test_each_place_of_a_request_of_vllm_is_read(row):
    record = read(json.dumps(row))
    assert (record.kind, record.rounds, record.tau) == ("vLLM requests", 6, 2.5)
    same(record.conditional, SIX_CONDITIONAL)


def test_a_slot_that_was_never_verified_is_unknown():
    """Slot 2 was verified in the first round alone, slot 3 behind a rejection."""
    rounds = [(3, 3), (2, 2), (1, 4), (0, 2)]
    record = read(vllm_requests([rounds], 4))
    same(record.survival, [3 / 4, 2 / 4, 1 / 4, 0])
    same(record.conditional, [3 / 4, 2 / 3, 1, math.nan])
    assert record.profile().longest == 3
    summary = read(vllm_summary([rounds], 4))
    same(summary.conditional, [3 / 4, math.nan, math.nan, math.nan])
    same(summary.survival, record.survival)
    assert any("whole" in note for note in summary.notes)


def test_requests_without_a_record_are_not_requests_without_acceptance():
    empty = vllm_object(SIX, 3) | {"num_spec_steps": 0, "num_accepted_draft_tokens": 0}
    empty |= {"num_draft_tokens": 0, "acceptance_histogram": [0] * 4}
    empty |= {"per_step_accepted": [], "per_step_drafted": [], "mean_acceptance_length": 1.0}
    missing = {"id": "none", "metrics": None}, {"id": "null", "metrics": {}}
    record = read(json_lines(vllm_row(vllm_object(SIX, 3)), vllm_row(empty, "empty"), *missing))
    assert (record.rounds, record.tau) == (6, 2.5)
    assert record.notes
    same(record.conditional, SIX_CONDITIONAL)


def test_unknown_fields_are_kept_and_named():
    found = vllm_object(SIX, 3) | {"drafter_ms": 4.5, "tree_width": 2}
    record = read(json_lines(vllm_row(found), vllm_row(vllm_object(SIX, 3), "b", seed=4)))
    assert sorted(record.unknown) == ["drafter_ms", "tree_width"]
    assert record.lines["drafter_ms"][0] == 4.5 and record.lines["tree_width"][0] == 2
    assert "drafter_ms" in record.reason
    meta = sglang_object(SIX, 3) | {"id": "r", "spec_new": 1}
    record = read(json.dumps({"text": "", "meta_info": meta}))
    assert record.unknown == ("spec_new",) and record.lines["spec_new"].tolist() == [1]


def test_lines_carry_what_is_known_of_a_request():
    usage = {"prompt_tokens": 12, "completion_tokens": 16}
    row = vllm_row(vllm_object(SIX, 3), usage=usage, temperature=0.7, label="code")
    (line,) = read(json.dumps(row)).lines.to_dict("records")
    assert line["line"] == "cmpl-1" and (line["temperature"], line["label"]) == (0.7, "code")
    assert (line["prompt_tokens"], line["output_tokens"]) == (12, 16)
    line = read(aiperf([SIX], 3)).lines.iloc[0]
    assert line["line"] == "r0" and line["output_tokens"] == 40
    line = read(sglang_meta([SIX], 3)).lines.iloc[0]
    assert (line["line"], line["prompt_tokens"], line["output_tokens"]) == ("r0", 12, 14)


def test_labels_may_be_numbers_and_texts():
    rows = [
        vllm_row(vllm_object(SIX, 3), f"r{n}", label=one) for n, one in enumerate(["b", 7, "a"])
    ]
    record = read(json_lines(*rows))
    assert record.values("label") == [7, "a", "b"]
    assert record.part(label=7).lines["line"].tolist() == ["r1"]


def test_tables_split_by_label_and_temperature():
    rows = [
        vllm_row(vllm_object([(accepted, 3)] * 4, 3), f"r{n}", label=label, temperature=heat)
        for n, (accepted, label, heat) in enumerate(
            [(3, "code", 0.0), (1, "code", 1.0), (0, "chat", 0.0), (2, "chat", 0.0)]
        )
    ]
    record = read(json_lines(*rows))
    by_label = record.tau_table(by=("label",)).set_index("label")
    assert by_label["tau"].to_dict() == {"code": 3, "chat": 2}
    both = record.tau_table(by=("label", "temperature")).set_index(["label", "temperature"])
    assert both["tau"].to_dict() == {("code", 0.0): 4, ("code", 1.0): 2, ("chat", 0.0): 2}
    slots = record.table(by=("label",)).set_index(["label", "slot"])["survival"]
    assert slots["code"].tolist() == [1, 0.5, 0.5] and slots["chat"].tolist() == [0.5, 0.5, 0]
    with pytest.raises(ValueError):
        record.tau_table(by=("colour",))
    assert record.values("label") == ["chat", "code"] and record.values("seconds") == []
    part = record.part(temperature=1.0, label="code")
    same(part.tau, both.loc[("code", 1.0), "tau"])
    assert (
        part.lines["line"].tolist()
        == record.lines.loc[
            (record.lines["label"] == "code") & (record.lines["temperature"] == 1.0), "line"
        ].tolist()
    )
    with pytest.raises(
        ValueError, match=r"temperature must be one of the record's, \[.*\], got 0.5"
    ):
        record.part(temperature=0.5)


def test_a_profile_has_the_temperature_that_all_of_its_lines_say():
    def profiled(*heats):
        rows = [
            vllm_row(
                vllm_object([(n % 3, 3)] * 4, 3),
                f"r{n}",
                label=str(n),
                **({} if heat is None else {"temperature": heat}),
            )
            for n, heat in enumerate(heats)
        ]
        return read(json_lines(*rows))

    assert profiled(0.7, 0.7).profile().temperature == 0.7
    for heats in ((None, None), (0.7, 1.0), (0.7, None)):
        assert profiled(*heats).profile().temperature is None
    assert profiled(0.7, None).part(label="1").profile().temperature is None


def test_the_interval_of_tau_is_that_of_requests_drawn_again():
    generator = np.random.default_rng(3)
    requests = [
        [(int(a), 4) for a in generator.binomial(4, share, size=generator.integers(3, 30))]
        for share in generator.uniform(0.1, 0.9, 60)
    ]
    table = read(vllm_requests(requests, 4)).tau_table()
    counts = np.array([sums(request)[:2] for request in requests])
    again = counts[generator.integers(0, 60, (4000, 60))].sum(axis=1)
    low, high = np.quantile(1 + again[:, 1] / again[:, 0], [0.025, 0.975])
    # A thousand draws leave an end of the interval uncertain by a few percent of its width.
    assert table["low"][0] == pytest.approx(low, abs=0.12 * (high - low))
    assert table["high"][0] == pytest.approx(high, abs=0.12 * (high - low))


def test_choices_of_one_answer_are_requests_of_their_own():
    choices = [{"index": n, "speculative_decoding": trt_object(SIX, 3)} for n in (0, 1)]
    record = read(json.dumps({"id": "t", "choices": choices}))
    assert record.kind == "TensorRT-LLM requests"
    assert record.rounds == 12 and len(record.lines) == 2


def test_details_of_several_answers_are_requests_of_their_own():
    details = [without(sglang_object(SIX, 3), "prompt_tokens", "completion_tokens")] * 2
    record = read(
        json.dumps({"id": "c", "choices": [], "sglext": {"spec_tokens_details": details}})
    )
    assert record.kind == "SGLang meta_info"
    assert record.rounds == 12 and len(record.lines) == 2


def test_a_null_number_of_slots_is_taken_from_the_histogram():
    found = trt_object(SIX, 3) | {"num_spec_tokens": None}
    record = read(json.dumps({"id": "t", "choices": [{"speculative_decoding": found}]}))
    same(record.survival, SIX_SURVIVAL)


def test_warm_up_cancelled_and_failed_requests_are_left_out():
    bad = [(0, 3)] * 50
    rows = [
        aiperf_row(SIX, 3),
        aiperf_row(bad, 3, benchmark_phase="warmup"),
        aiperf_row(bad, 3, was_cancelled=True),
        aiperf_row(bad, 3) | {"error": {"type": "Timeout", "message": "late"}},
        without(aiperf_row(bad, 3), "spec_decode_acceptance"),
        aiperf_row(bad, 3) | {"spec_decode_acceptance": None},
        without(aiperf_row(SIX, 3), "error"),
    ]
    record = read(json_lines(*rows))
    assert (len(record.lines), record.rounds, record.tau) == (2, 12, 2.5)
    assert any("left out" in note for note in record.notes)


def test_what_aiperf_makes_up_of_llama_cpp_has_no_slots():
    row = aiperf_row(SIX, 3, detailed=False)
    row["spec_decode_acceptance"]["engine"] = "llamacpp"
    record = read(json_lines(row))
    assert not record.exact and record.notes
    assert not np.isfinite(record.survival).any() and not np.isfinite(record.conditional).any()


def test_aiperf_may_write_a_list_and_leave_numbers_out():
    row = aiperf_row(SIX, 3, detailed=False)
    row["spec_decode_acceptance"]["acceptance_histogram"] = histogram(SIX, 3)
    row["spec_decode_acceptance"]["num_spec_tokens"] = None
    record = read(json_lines(row))
    assert record.kind == "AIPerf records"
    same(record.survival, SIX_SURVIVAL)


NAMES = {
    "2026": {},
    "April 2026": {
        "spec_num_correct_drafts": "spec_accepted_drafts",
        "spec_num_proposed_drafts": "spec_proposed_drafts",
    },
    "2025": {
        "spec_num_correct_drafts": "spec_accept_token_num",
        "spec_num_proposed_drafts": "spec_draft_token_num",
        "spec_correct_drafts_histogram": "spec_accept_histogram",
    },
}


@pytest.mark.parametrize("age", NAMES)
def test_names_of_sglang_old_and_new_mean_the_same(age):
    meta = {NAMES[age].get(name, name): value for name, value in sglang_object(SIX, 3).items()}
    for row in (
        {"text": "", "meta_info": meta},
        {"id": "c", "choices": [], "sglext": {"spec_tokens_details": meta}},
        {"text": "", "meta_info": sglang_object(SIX, 3) | meta},
    ):
        record = read(json.dumps(row))
        assert (record.kind, record.unknown) == ("SGLang meta_info", ())
        same(record.conditional, SIX_CONDITIONAL)


def test_the_accept_length_of_a_request_of_sglang_is_not_tau():
    """It has the first token in and what was cut at the stop out: 14 tokens of 6 rounds here."""
    meta = sglang_object(SIX, 3)
    assert meta["spec_accept_length"] == 14 / 6
    record = read(json.dumps({"text": "", "meta_info": meta}))
    assert record.tau == 2.5 and record.exact
    # Without counts it is all there is, the first token taken off.
    bare = {"id": "r", "completion_tokens": 74, "spec_verify_ct": 25}
    record = read(json.dumps({"text": "", "meta_info": bare}))
    assert record.tau == pytest.approx(73 / 25) and not record.exact


def test_a_short_histogram_of_sglang_has_the_slots_that_were_proposed():
    rounds = [(1, 4), (0, 4), (2, 4)]
    record = read(sglang_meta([rounds], 4))
    same(record.survival, [2 / 3, 1 / 3, 0, 0])
    same(record.conditional, [2 / 3, 1 / 2, 0, math.nan])


def test_a_cap_that_cut_nothing_leaves_rates_exact():
    same(read(sglang_capped([SIX], 3)).conditional, SIX_CONDITIONAL)
    cut = read(sglang_capped([[*SIX, (1, 1)]], 3))
    assert np.isnan(cut.conditional[1:]).all() and cut.notes


def test_a_dump_is_read_whole_or_in_part():
    steps = [[dump_request(*step, rid="r")] for step in SIX]
    dump = dump_of(steps, 3, "static", simulate_acc_len=None)
    part = {"dspark_info_record": dump}
    wrapped = {"sampling": {"temperature": 0.7}, "records": dump["records"]}
    for found in (dump, part, {"internal_states": [part]}, wrapped):
        record = read(json.dumps(found))
        assert (record.kind, record.unit, record.exact) == ("SGLang dump", "request", True)
        same(record.conditional, SIX_CONDITIONAL)


def test_drafts_that_a_cap_cut_were_right():
    """A cap of one token: the block's outcome is what was committed and what was trimmed."""
    steps = [[dump_request(min(a, 1), 1, cap_trim=a - min(a, 1), rid="r")] for a, _ in SIX]
    record = read(json.dumps(dump_of(steps, 3, "cap-accept")))
    same(record.conditional, SIX_CONDITIONAL)
    assert record.notes


def test_a_window_that_was_not_verified_is_censored():
    rounds = [(1, 1), (3, 3), (0, 2), (0, 0), (1, 2)]
    record = read(sglang_dump([rounds], 3))
    assert record.rounds == 5 and record.accepted == 5
    same(record.conditional, conditional(rounds, 3))
    same(record.survival, [3 / 5, 1 / 5, 1 / 5])


def test_requests_of_two_ranks_are_different_ones():
    ranks = [
        {"dspark_info_record": dump_of([[dump_request(accepted, 3)]], 3, "static")}
        for accepted in (3, 0)
    ]
    record = read(json.dumps({"internal_states": ranks}))
    assert record.rounds == 2 and len(record.lines) == 2
    assert sorted(record.requests["tau"]) == [1, 4]


def test_a_place_in_the_pool_is_used_again_by_a_later_request():
    steps = [[dump_request(3, 3, prefix_len=length)] for length in (100, 104, 20, 24)]
    record = read(json.dumps(dump_of(steps, 3, "static")))
    assert record.rounds == 4 and len(record.lines) == 2


def test_iterations_are_read_as_python_or_json_in_a_list_or_lines():
    rows = trt_rows([SIX, SIX[:2]])
    for text in (
        json.dumps(rows),
        json_lines(*rows),
        repr(rows),
        "".join(f"{row!r}\n" for row in rows),
    ):
        record = read(text)
        assert record.kind == "TensorRT-LLM iterations"
        assert (record.rounds, record.accepted) == (8, 12)


def test_iterations_count_once():
    rows = trt_rows([SIX])
    ranks = [row | {"attentionDpRank": rank} for row in rows for rank in (0, 1)]
    assert read(json.dumps(ranks)).rounds == 6
    assert read(json.dumps(rows + rows[2:4])).rounds == 6


def test_an_iteration_without_drafts_is_not_averaged():
    rows = trt_rows([SIX])
    idle = {"numDraftTokens": 0, "numAcceptedTokens": 0, "numRequestsWithDraftTokens": 0}
    rows.append(
        {"iter": 99, "iterLatencyMS": 1.0, "specDecodingStats": idle | {"acceptanceLength": 0}}
    )
    assert read(json.dumps(rows)).tau == 2.5


def test_a_prefix_with_a_colon_is_an_older_server():
    record = read(trt_metrics([SIX], 3).replace("trtllm_", "trtllm:"))
    assert record.kind == "TensorRT-LLM metrics"
    same(record.conditional, SIX_CONDITIONAL)


def test_counters_are_read_whatever_their_labels():
    def line(name: str, labels: str, value: str) -> str:
        return f"vllm:spec_decode_num_{name}_total{{{labels}}} {value}\n"

    odd = r'model_name="a \"b\" {c}, position=\"9\" d"'
    text = "\n# EOF\nprocess_open_fds NaN\n"
    text = (
        line("drafts", odd, "6e+00 1700000000000") + line("drafts", f'engine="1",{odd}', "6") + text
    )
    text += line("draft_tokens", odd, "18.0") + line("draft_tokens", f'{odd},engine="1"', "1.8e+01")
    text += line("accepted_tokens", odd, "9") + line("accepted_tokens", f'engine="1",{odd}', "9")
    for slot, count in enumerate((4, 3, 2)):
        text += line("accepted_tokens_per_pos", f'{odd},position="{slot}"', f"{count}.0")
        text += line("accepted_tokens_per_pos", f'position="{slot}",engine="1",{odd}', f"{count}")
        text += line("draft_tokens_per_pos", f'position="{slot}",{odd}', "6")
    record = read(text)
    assert (record.kind, record.rounds, record.tau) == ("vLLM metrics", 12, 2.5)
    same(record.conditional, SIX_CONDITIONAL)
    bare = read(llama_metrics([SIX], 3).replace('{engine="0"}', "").replace('",engine="0', ""))
    assert bare.kind == "llama.cpp metrics" and bare.tau == 2.5


def sglang_gauges(*lengths: str) -> str:
    return "".join(
        f'sglang:spec_accept_length{{model_name="m",dp_rank="{rank}"}} {length}\n'
        f'sglang:spec_accept_rate{{model_name="m",dp_rank="{rank}"}} 0.43\n'
        f'sglang:spec_num_steps{{dp_rank="{rank}",model_name="m"}} 1.0\n'
        for rank, length in enumerate(lengths)
    )


def test_gauges_of_sglang_are_one_interval_s_mean():
    record = read(sglang_gauges("3.15"))
    assert (record.kind, record.unit, record.exact) == ("SGLang metrics", "server", False)
    assert record.tau == pytest.approx(3.15)


@pytest.mark.parametrize("idle", ["0.0", "NaN"])
def test_a_rank_that_was_idle_has_no_acceptance(idle):
    assert read(sglang_gauges(idle, "3.15")).tau == pytest.approx(3.15)
    with pytest.raises(ValueError):
        read(sglang_gauges(idle))


def test_percent_and_shares_are_not_mixed():
    found = json.loads(vllm_bench([SIX], 3))
    assert found["spec_decode_acceptance_rate"] == 50
    record = read(json.dumps(found))
    assert record.tau == 2.5 and record.conditional.max() <= 1
    sums_only = read(json.dumps(without(found, "spec_decode_per_position_acceptance_rates")))
    assert sums_only.tau == 2.5 and len(sums_only.survival) == 0


@pytest.mark.parametrize("steps, rate", [(7, 0.30017), (1, 2.1012), (None, None)])
def test_automodel_on_sglang_has_a_length_alone(steps, rate):
    """SGLang tells one step for DSpark: the rate is the length less one, above 1."""
    found = without(automodel_object(SIX), "num_drafts", "num_draft_tokens", "num_accepted_tokens")
    found |= {"accept_length": 3.1012, "speculative_num_steps": steps, "acceptance_rate": rate}
    record = read(json.dumps(found))
    assert record.tau == pytest.approx(3.1012) and not record.exact
    assert len(record.survival) == 0 and SUMS_ONLY in record.reason


def test_automodel_during_training_is_read():
    record = read(json.dumps({"step": 100} | automodel_object(SIX)))
    assert (record.kind, record.tau) == ("NeMo AutoModel bench", 2.5)


def test_a_benchmark_without_counters_is_refused():
    found = automodel_object(SIX)
    found |= dict.fromkeys([name for name in found if "acc" in name or "draft" in name])
    with pytest.raises(ValueError):
        read(json.dumps(found))


def test_data_sets_are_labels_and_weigh_as_many_rounds_as_they_have():
    record = read(speculators([SIX, [(0, 3)] * 18], 3) + "none,0.0,0.0,0.0,0,0,0,0\n")
    assert record.rounds == 24 and record.tau == 1 + 9 / 24
    by_label = record.tau_table(by=("label",)).set_index("label")["tau"]
    assert by_label["set0"] == 2.5 and by_label["set1"] == 1
    same(record.survival, [4 / 24, 3 / 24, 2 / 24])
    assert read(automodel_sweep([SIX, [(0, 3)] * 18], 3)).lines["label"].tolist() == [
        "set0",
        "set1",
    ]


def test_columns_of_the_csv_may_stand_in_any_order():
    names, cells = (line.split(",") for line in speculators([SIX], 3).splitlines())
    names, cells = names[:2] + names[:1:-1] + ["note"], cells[:2] + cells[:1:-1] + ["x"]
    text = ",".join(names) + "\n" + ",".join(cells) + "\n"
    record = read(text)
    assert record.tau == 2.5 and record.unknown == ("note",)
    same(record.survival, SIX_SURVIVAL)


def test_blocks_that_an_end_of_turn_cut_have_no_exact_rate_behind_it():
    found = json.loads(deepspec([SIX], 3))
    found["confidence"]["per_position"][2]["total_weight"] = 5.0
    record = read(json.dumps(found))
    same(record.conditional, [4 / 6, 3 / 4, math.nan])
    assert record.notes


LAYOUTS: dict[str, Callable[[str], str | bytes]] = {
    "plain": lambda text: text,
    "gzip": lambda text: gzip.compress(text.encode()),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "Windows": lambda text: text.replace("\n", "\r\n"),
    "blank lines": lambda text: "\n" + text.replace("\n", "\n\n \n"),
    "no last newline": lambda text: text.rstrip("\n"),
    "all of it": lambda text: gzip.compress(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()),
}
LAID_OUT = ["vLLM detailed", "AIPerf summary", "SGLang meta_info", "TensorRT-LLM requests"]
LAID_OUT += ["vLLM metrics", "TensorRT-LLM metrics", "speculators", "vLLM log", "llama.cpp log"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAID_OUT)
def test_a_file_reads_the_same_however_it_was_saved(name, layout):
    write, kind, _, _ = FORMATS[name]
    record = read(LAYOUTS[layout](write([SIX, SIX[:3]], 3)))
    assert (record.kind, record.rounds, record.truncated) == (kind, 9, None)
    assert record.tau == pytest.approx(1 + 13 / 9)


def test_rows_are_read_from_an_array_lines_or_one_object():
    rows = [json.loads(line) for line in vllm_requests([SIX, SIX[:3]], 3).splitlines()]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), json_lines(*rows)):
        assert read(text).lines["line"].tolist() == ["r0", "r1"]
    assert read(json.dumps(rows[0], indent=2)).tau == 2.5


@pytest.mark.parametrize("name", ["acceptance.csv", "record.json", "log.gz", "metrics.pt"])
def test_names_of_files_say_nothing(name):
    for write, kind, _, _ in FORMATS.values():
        assert read(write([SIX], 3), name=name).kind == kind


@pytest.mark.parametrize(
    "noise",
    [
        '{"event": "start", "model": "m"}\n',
        "[boot] listening\n",
        "# comment\n",
        "subset of the log, num_drafts unknown\n",
        "{'a': None}\n",
        "an odd word: accepted, Decode batch, draft acceptance\n",
        b"\xff\xfe\x00\x80 no text\n",
    ],
)
@pytest.mark.parametrize("log", [vllm_line(SIX, 3), llama_line(SIX, 3), sglang_line(2.5)])
def test_logs_may_begin_with_and_hold_any_other_line(log, noise):
    raw = noise if isinstance(noise, bytes) else noise.encode()
    record = read(raw + log.encode() + raw + log.encode() + raw)
    assert len(record.lines) == 2 and record.tau == pytest.approx(2.5)
    assert record.truncated is None


def test_a_record_may_begin_far_down_a_log():
    record = read("INFO nothing of interest here\n" * 20_000 + vllm_line(SIX, 3))
    assert record.kind == "vLLM log" and record.rounds == 6


CUT_LOGS = {
    "vLLM log": vllm_line([(2, 4)] * 37 + [(4, 4)] * 25 + [(0, 4)] * 38, 4),
    "llama.cpp log": llama_line([(2, 4)] * 37 + [(4, 4)] * 25 + [(0, 4)] * 38, 4),
    "llama.cpp log without slots": llama_line([(2, 3)] * 37 + [(0, 3)] * 6, 3, by_slot=False),
    "SGLang log": sglang_line(3.47, 0.62),
    "vLLM requests": json_lines(vllm_row(vllm_object([(2, 4), (4, 4)], 4))),
    "AIPerf records": json_lines(aiperf_row([(2, 4), (4, 4)], 4)),
}


@pytest.mark.parametrize("name", CUT_LOGS)
def test_a_last_line_cut_anywhere_is_left_out_or_whole(name):
    last = CUT_LOGS[name]
    first = last.replace("cmpl-1", "cmpl-0")
    full = read(first + last)
    one = read(first)
    wrong = []
    # Every byte of what matters in a log; objects are long and cut alike everywhere.
    start, step = (1, 9) if last.startswith("{") else (len(last) // 3, 1)
    for cut in range(start, len(last), step):
        text = first + last[:cut]
        try:
            record = read(text)
        except ValueError as error:
            wrong.append(f"...{last[:cut][-30:]!r}: {error}")
            continue
        expected = one if len(record.lines) == 1 else full
        found = [record.rounds, record.accepted, *record.survival, *record.conditional]
        true = [expected.rounds, expected.accepted, *expected.survival, *expected.conditional]
        if len(found) != len(true) or not np.allclose(found, true, equal_nan=True):
            wrong.append(f"...{last[:cut][-30:]!r}: tau {record.tau}, survival {record.survival}")
        if record.truncated not in (None, "line 2"):
            wrong.append(f"...{last[:cut][-30:]!r}: truncated is {record.truncated}")
        if last.startswith("{") and len(record.lines) == 1 and record.truncated is None:
            wrong.append(f"...{last[:cut][-30:]!r}: cut in silence")
    assert not wrong, f"{len(wrong)} cuts, as {wrong[0]} and {wrong[-1]}"


def test_a_row_of_the_csv_that_was_cut_is_named_and_left_out():
    text = csv_head(3) + csv_row("a", SIX, 3)
    last = csv_row("b", [(2, 3), (1, 3), (0, 3), (3, 3)], 3)
    assert last.endswith(",0.75,0.5,0.25\n")
    for cut in range(1, last.rindex(",")):
        record = read(text + last[:cut])
        assert record.rounds == 6 and record.truncated == "line 3", last[:cut]
        same(record.survival, SIX_SURVIVAL)
    assert read((text + last).rstrip("\n")).rounds == 10


def test_a_rate_of_the_csv_that_lost_digits_is_not_believed():
    """The rates add up to the accepted length less one."""
    text = speculators([SIX, [(2, 3), (1, 3), (0, 3), (3, 3)]], 3)
    try:
        record = read(text.removesuffix("5\n"))
    except ValueError:
        return
    assert record.rounds == 6 and record.truncated == "line 3"


def test_a_broken_line_in_the_middle_is_named():
    row = json_lines(vllm_row(vllm_object(SIX, 3)))
    with pytest.raises(ValueError, match="line 2"):
        read(row + '{"id": "half\n' + row)


@pytest.mark.parametrize("half", [",eighteen,9.0,2.5,0.5,0.4,0.3\n", ",18.0,9.0,2.5,0.9,0.6\n"])
def test_a_broken_row_in_the_middle_of_the_csv_is_an_error(half):
    rows = [csv_head(3), csv_row("a", SIX, 3), "b,6.0" + half, csv_row("c", SIX, 3)]
    with pytest.raises(ValueError):
        read("".join(rows))


def test_a_cut_object_or_gzip_file_is_an_error_in_words():
    with pytest.raises(ValueError):
        read(json.dumps(vllm_row(vllm_object(SIX, 3)), indent=2)[:-9])
    with pytest.raises(ValueError):
        read(gzip.compress(vllm_log([SIX] * 50, 3).encode())[:-20])


@pytest.mark.parametrize("detailed", [True, False], ids=["detailed", "summary"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"num_spec_steps": 5},
        {"num_accepted_draft_tokens": 8},
        {"num_draft_tokens": 8},
        {"acceptance_histogram": [2, 1, 1, 3]},
        {"acceptance_histogram": [3, 2, 0, 1]},
        {"acceptance_histogram": [-2, 3, 3, 2]},
    ],
    ids=str,
)
def test_contradictions_are_refused(wrong, detailed):
    with pytest.raises(ValueError):
        read(json.dumps(vllm_row(vllm_object(SIX, 3, detailed) | wrong)))


AIPERF_WRONG = aiperf_row(SIX, 3, False)["spec_decode_acceptance"] | {"num_spec_steps": 5}


@pytest.mark.parametrize(
    "row",
    [
        vllm_row(vllm_object(SIX, 3) | {"per_step_accepted": [3, 0]}),
        vllm_row(vllm_object(SIX, 3) | {"per_step_drafted": [2, 3, 3, 3, 3, 3]}),
        vllm_row(
            vllm_object(SIX, 3, False)
            | {"acceptance_histogram_by_draft_length": {"3": [1, 1, 1, 2]}}
        ),
        {"text": "", "meta_info": sglang_object(SIX, 3) | {"spec_verify_ct": 5}},
        {"text": "", "meta_info": sglang_object(SIX, 3) | {"spec_num_correct_drafts": 8}},
        {"text": "", "meta_info": sglang_object(SIX, 3) | {"spec_num_proposed_drafts": 8}},
        {"choices": [{"speculative_decoding": trt_object(SIX, 3) | {"num_spec_steps": 5}}]},
        {"choices": [{"speculative_decoding": trt_object(SIX, 3) | {"total_draft_tokens": 8}}]},
        aiperf_row(SIX, 3) | {"spec_decode_acceptance": AIPERF_WRONG},
        dump_of([[dump_request(3, 2)]], 3),
        json.loads(automodel([SIX], 3)) | {"num_draft_tokens": 8},
        json.loads(vllm_bench([SIX], 3)) | {"spec_decode_draft_tokens": 8},
        [
            {
                "iter": 1,
                "iterLatencyMS": 1.0,
                "specDecodingStats": {
                    "numDraftTokens": 3,
                    "numAcceptedTokens": 5,
                    "numRequestsWithDraftTokens": 1,
                },
            }
        ],
    ],
    ids=[
        "steps of two lengths",
        "step above its draft",
        "by length",
        "SGLang's rounds",
        "SGLang's accepted",
        "SGLang's proposed",
        "TensorRT-LLM's rounds",
        "TensorRT-LLM's drafts",
        "AIPerf's rounds",
        "dump above its window",
        "AutoModel's drafts",
        "bench's drafts",
        "iteration's drafts",
    ],
)
def test_contradictions_of_every_program_are_refused(row):
    with pytest.raises(ValueError):
        read(json.dumps(row))


@pytest.mark.parametrize(
    "text",
    [
        vllm_metrics([SIX], 3).replace("} 9.0", "} 15.0"),
        llama_metrics([SIX], 3).replace("} 9.0", "} 15.0"),
        speculators([SIX], 3).replace(",9.0,2.5,", ",15.0,3.5,"),
        vllm_bench([SIX], 3).replace('accepted_tokens": 9', 'accepted_tokens": 15'),
    ],
    ids=["vLLM", "llama.cpp", "speculators", "bench"],
)
def test_counts_by_slot_that_do_not_add_up_are_refused(text):
    assert "15" in text
    with pytest.raises(ValueError):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(dump_of([[dump_request(3, 3)]], 3, simulate_acc_len=3.0)),
        json.dumps(
            {
                "internal_states": [
                    {"dspark_info_record": dump_of([[dump_request(3, 3)]], 3, simulate_acc_len=2)}
                ]
            }
        ),
        "0.1 W srv init: synthetic speculative acceptance is enabled (length 3)\n" + LLAMA,
        "0.1 I srv init: synthetic acceptance: n_max = 3, length = 3.0\n" + LLAMA,
        LLAMA + "0.1 W srv init: synthetic speculative acceptance is enabled (length 3)\n" + LLAMA,
    ],
)
def test_forced_acceptance_is_refused(text):
    with pytest.raises(ValueError, match="simulate|synthetic|made up"):
        read(text)


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_acceptance_that_was_not_forced_is_read(off):
    dump = dump_of([[dump_request(3, 3)]], 3, simulate_acc_len=off)
    assert read(json.dumps(dump)).tau == 4


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_are_refused(zipped):
    raw = io.BytesIO()
    torch.save({"logits": torch.zeros(2, 3)}, raw, _use_new_zipfile_serialization=zipped)
    for name in ("shard.0.pt", "vllm.log"):
        with pytest.raises(ValueError, match="safetensors"):
            read(raw.getvalue(), name=name)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n\n",
        "hello\n",
        b"\x00\x01\x02",
        "[]",
        "{}",
        "null",
        "3",
        '{"temperatures": [1.1, 0.9], "dataset": "x"}',
        '{"sts_temperatures": [1.1, 0.9]}',
        '{"sample_batch_tokens": [8], "sample_steps_per_sec": [5.0], "max_batch_tokens": 8}',
        '{"bias_seconds": 0.01, "bs_probes": [1], "alpha_seconds": [0.0]}',
        "position,num_drafts,acceptance_rate\n0,50,0.4\n",
        json.dumps({"metadata": {"benchmark_phase": "profiling"}, "metrics": {}}),
    ],
)
def test_a_file_that_holds_no_acceptance_is_refused(content):
    with pytest.raises(ValueError):
        read(content)


def test_missing_files_and_other_kinds_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_acceptance(tmp_path / "none.log")
    with pytest.raises(FileNotFoundError):
        load_acceptance(str(tmp_path / "none.log"))
    with pytest.raises(TypeError):
        load_acceptance(5)
    (tmp_path / "a.log").write_text(vllm_line(SIX, 3))
    with pytest.raises(ValueError):
        load_acceptance(tmp_path / "a.log", timeout=0)
    assert load_acceptance(str(tmp_path / "a.log")).rounds == 6


ASKED, SAID = "why is grass green", "since it grows"
TALKS = {
    "vLLM": vllm_row(
        vllm_object(SIX, 3),
        prompt=ASKED,
        choices=[{"index": 0, "text": SAID}],
    ),
    "vLLM chat": vllm_row(
        vllm_object(SIX, 3),
        messages=[{"role": "user", "content": ASKED}],
        choices=[{"index": 0, "message": {"role": "assistant", "content": SAID}}],
    ),
    "SGLang": {
        "prompt": ASKED,
        "text": SAID,
        "meta_info": sglang_object(SIX, 3)
        | {
            "id": "r",
            "output_token_logprobs": [[-0.1, 5, SAID]],
            "finish_reason": {"matched": SAID},
        },
    },
    "TensorRT-LLM": {
        "prompt": ASKED,
        "choices": [{"index": 0, "text": SAID, "speculative_decoding": trt_object(SIX, 3)}],
    },
    "llama.cpp": {
        "prompt": ASKED,
        "content": SAID,
        "timings": {"predicted_n": 20, "draft_n": 18, "draft_n_accepted": 9},
    },
}


@pytest.mark.parametrize("name", TALKS)
def test_prompts_and_answers_are_kept_only_if_asked(name):
    text = json_lines(TALKS[name])
    record = read(text)
    kept = pickle.dumps(record) + (record.reason + str(record.notes) + repr(record)).encode()
    assert ASKED.encode() not in kept and SAID.encode() not in kept
    assert not {"prompt", "answer"} & set(record.lines)
    (line,) = read(text, texts=True).lines.to_dict("records")
    assert ASKED in str(line["prompt"]) and line["answer"] == SAID


def test_errors_and_cut_lines_do_not_quote_texts():
    row = json_lines(TALKS["vLLM"])
    half = row[: row.index(SAID) + 8]
    with pytest.raises(ValueError) as error:
        read(row + half + "\n" + row)
    assert ASKED not in str(error.value)
    record = read(row + half)
    assert record.truncated == "line 2" and ASKED not in record.reason + str(record.notes)
    wrong = TALKS["vLLM"] | {"metrics": {"speculative_decoding": vllm_object(SIX, 3, False)}}
    wrong["metrics"]["speculative_decoding"]["num_spec_steps"] = 5
    with pytest.raises(ValueError) as error:
        read(json_lines(wrong))
    assert ASKED not in str(error.value) and SAID not in str(error.value)


@pytest.mark.parametrize("megabytes, zipped", [((5, 25), False), ((2, 8), True)])
def test_memory_does_not_grow_with_the_log(tmp_path, megabytes, zipped):
    access = 'INFO: 10.0.0.7:41822 - "POST /v1/chat/completions HTTP/1.1" 200 OK took 1.25 s\n'
    block = (access * 2500 + vllm_line(SIX, 3)).encode()
    path = tmp_path / "server.log"
    peaks = []
    for blocks in (size * 1_000_000 // len(block) for size in megabytes):
        with gzip.open(path, "wb", 1) if zipped else path.open("wb") as file:
            for _ in range(blocks):
                file.write(block)
        tracemalloc.start()
        assert load_acceptance(path).rounds == 6 * blocks
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 1_000_000


@pytest.fixture
def server() -> Iterator[str]:
    """A server's address; /slow answers only when the test is over."""
    over = threading.Event()
    pages = {"/metrics": vllm_metrics([SIX], 3), "/server_info": sglang_dump([SIX], 3)}
    pages["/prometheus/metrics"] = trt_metrics([SIX], 3)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/slow":
                over.wait()
                return
            page = pages.get(self.path)
            self.send_response(200 if page else 404)
            self.end_headers()
            self.wfile.write((page or "not here").encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        over.set()
        server.shutdown()


@pytest.mark.parametrize(
    "page, kind",
    [
        ("/metrics", "vLLM metrics"),
        ("/server_info", "SGLang dump"),
        ("/prometheus/metrics", "TensorRT-LLM metrics"),
    ],
)
def test_a_server_is_read_by_its_address(server, page, kind):
    record = load_acceptance(server + page)
    assert (record.kind, record.rounds, record.tau) == (kind, 6, 2.5)
    same(record.conditional, SIX_CONDITIONAL)


def test_a_server_that_does_not_answer_is_an_error(server):
    with pytest.raises(OSError):
        load_acceptance(server + "/none")
    with pytest.raises(OSError):
        load_acceptance(server + "/slow", timeout=0.2)
