"""Programs' output, SGLang's steps and server_info, its dump as a trace, and long arrays."""

import gzip
import json
import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data.make.server_files import (
    Round,
    dump_of,
    dump_request,
    llama_line,
    passed,
    sglang_line,
    sums,
    trt_rows,
    vllm_line,
    vllm_object,
    vllm_row,
)
from dspark_lab import load_acceptance, rates, serving
from dspark_lab.decoding import TRACE_COLUMNS, load_trace, save_trace
from dspark_lab.pairs import load_traces
from dspark_lab.records import counted_since, record_of_trace, trace_of_dump
from tests.test_records import SIX, SIX_CONDITIONAL, SIX_SURVIVAL, read, same

# A hundred rounds of four slots: survival 0.62, 0.40, 0.25, 0.13, of 140 accepted tokens.
RATES = [0.62, 0.40, 0.25, 0.13]
HUNDRED: list[Round] = [(sum(place < 100 * rate for rate in RATES), 4) for place in range(100)]


def console(rounds: Sequence[Round], slots: int, *more: str) -> str:
    """The last section of what ``vllm bench serve`` prints."""
    steps, accepted, drafted = sums(rounds)
    floats = {
        "Acceptance rate (%)": 100 * accepted / drafted,
        "Acceptance length": 1 + accepted / steps,
    }
    counts = {"Drafts": steps, "Draft tokens": drafted, "Accepted tokens": accepted}
    lines = ["P99 ITL (ms):                            651.45    "]
    lines += ["---------------Speculative Decoding---------------"]
    lines += [f"{name + ':':<40} {value:<10.2f}" for name, value in floats.items()]
    lines += [f"{name + ':':<40} {value:<10}" for name, value in counts.items()]
    lines += [*more, "Per-position acceptance (%):"]
    lines += [
        f"{f'  Position {slot}:':<40} {100 * count / steps:<10.2f}"
        for slot, count in enumerate(passed(rounds, slots))
    ]
    return "\n".join([*lines, "=" * 50]) + "\n"


def example(rounds: Sequence[Round], slots: int, old: bool = False) -> str:
    """The end of vLLM's offline example; an older one has neither counts nor a blank."""
    steps, accepted, drafted = sums(rounds)
    counts = [f"total_num_output_tokens: {steps + accepted}", f"num_drafts: {steps}"]
    counts += [f"num_draft_tokens: {drafted}", f"num_accepted_tokens: {accepted}"]
    lines = ["-" * 50, *([] if old else counts)]
    lines += [f"mean acceptance length: {1 + accepted / steps:.2f}", "-" * 50]
    lines += [
        f"acceptance at token {slot}:{'' if old else ' '}{count / steps:.2f}"
        for slot, count in enumerate(passed(rounds, slots))
    ]
    return "\n".join(lines) + "\n"


PRINTED = {"console": console(HUNDRED, 4), "example": example(HUNDRED, 4)}
PREFIXES = ["bench-1  | ", "2026-08-01T12:00:00Z ", "INFO 03-14 09:26:53 [run.py:7] "]


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("name", PRINTED)
def test_what_vllm_prints_has_the_counts_of_a_run(name, prefix):
    text = "".join(prefix + line + "\n" for line in PRINTED[name].splitlines())
    for content in (
        text,
        text.rstrip("\n"),
        text.replace("\n", "\r\n"),
        gzip.compress(text.encode()),
    ):
        record = read(content)
        assert (record.kind, record.unit, record.exact) == ("vLLM console", "server", True)
        assert (record.rounds, record.accepted, record.tau) == (100, 140, 2.4)
        same(record.survival, RATES)
        assert record.unknown == () and record.truncated is None and not record.notes


def test_an_older_example_has_no_rounds():
    record = read(example(HUNDRED, 4, old=True))
    assert record.tau == pytest.approx(2.4) and not record.exact and record.notes
    same(record.survival, RATES)


def test_figures_that_are_not_known_are_named():
    text = console(HUNDRED, 4, "Verified tokens:                         390       ")
    record = read(text + "Elapsed: 5\nthe answer: 42\n")
    assert record.unknown == ("Verified tokens",) and record.tau == 2.4


def test_figures_stand_in_any_order_and_runs_are_lines():
    head, *figures = console(HUNDRED, 4).splitlines(keepends=True)[1:-1]
    assert read(head + "".join(reversed(figures))).survival[0] == 0.62
    record = read(console(HUNDRED, 4) + console(SIX, 3) + example(SIX, 3))
    assert record.lines["rounds"].tolist() == [100, 6, 6] and record.unit == "server"
    half = [(1, 2), (1, 2), (0, 2), (0, 2)]
    record = read(example(half, 2) + example(half, 2))
    assert len(record.lines) == 2 and record.tau == 1.5


def test_positions_behind_a_cut_are_no_rates():
    text = console(HUNDRED, 4)
    record = read(text[: text.index("  Position 2")])
    assert record.tau == 2.4 and len(record.survival) == 0 and "missing" in record.reason


@pytest.mark.parametrize("name", PRINTED)
def test_a_block_that_is_cut_anywhere_counts_no_half_figure(name):
    whole = read(SIX_BEFORE[name] + PRINTED[name])
    wrong = []
    for cut in range(1, len(PRINTED[name])):
        text = PRINTED[name][:cut]
        if text.endswith("  "):
            continue
        record = read(SIX_BEFORE[name] + text)
        lines = record.lines[["rounds", "accepted", "drafted"]].to_numpy().tolist()
        if lines not in ([[6, 9, 18]], [[6, 9, 18], [100, 140, 400]]):
            wrong.append((text[-20:], lines))
        slots = record.passed.shape[1]
        if slots not in (0, 3) and not np.array_equal(record.passed, whole.passed):
            wrong.append((text[-20:], record.passed))
    assert not wrong, wrong[:3]


SIX_BEFORE = {"console": console(SIX, 3), "example": example(SIX, 3)}


@pytest.mark.parametrize(
    "change",
    [
        (
            "Acceptance length:                       2.40",
            "Acceptance length:                       3.40",
        ),
        (
            "Accepted tokens:                         140",
            "Accepted tokens:                         560",
        ),
        (
            "Position 1:                            40.00",
            "Position 1:                            90.00",
        ),
        ("Position 3:", "Position 7:"),
    ],
    ids=["length", "accepted", "position", "gap"],
)
def test_contradictions_of_a_block_are_refused(change, tmp_path):
    text = console(HUNDRED, 4)
    assert change[0] in text
    path = tmp_path / "bench.txt"
    path.write_text("one line\n" + text.replace(*change))
    with pytest.raises(ValueError, match="bench.txt.*line"):
        load_acceptance(path)


def test_rates_of_two_digits_are_not_contradictions():
    rounds = [(4, 15)] * 4 + [(0, 15)] * 996
    record = read(example(rounds, 15))
    assert record.rounds == 1000 and record.survival[0] == 0.0


STATISTICS = (
    "0.16.519.216 I spec common_specu: statistics        draft-mtp: #calls(b,g,a) =    2    134"
    "    134, #gen drafts =    134, #acc drafts =   112, #gen tokens =    402, "
    "#acc tokens =   255, #mean acc len = 2.90, #acc rate/pos = (0.836, 0.612, 0.455), "
    "dur(b,g,a) = 0.005, 325.555, 0.114 ms\n"
)


def statistics(rounds: Sequence[Round], slots: int, prompts: int = 1, name: str = "dspark") -> str:
    steps, accepted, drafted = sums(rounds)
    deep = sum(a > 0 for a, _ in rounds)
    by_slot = ", ".join(f"{count / steps:.3f}" for count in passed(rounds, slots))
    return (
        f"statistics draft-{name}: #calls(b,g,a) = {prompts:4d} {steps:6d} {steps:6d}, "
        f"#gen drafts = {steps:6d}, #acc drafts = {deep:5d}, #gen tokens = {drafted:6d}, "
        f"#acc tokens = {accepted:5d}, #mean acc len = {1 + accepted / steps:.2f}, "
        f"#acc rate/pos = ({by_slot})\n"
    )


def test_statistics_of_llama_cpp_are_counters_of_which_the_last_counts():
    record = read(statistics(SIX, 3) + "other\n" + statistics(SIX + SIX[:2], 3, 2))
    assert (record.kind, record.unit, record.exact) == ("llama.cpp statistics", "server", True)
    assert (record.rounds, record.accepted, record.tau) == (8, 12, 2.5)
    same(record.survival, [5 / 8, 4 / 8, 3 / 8], atol=0.001)
    found = read(STATISTICS)
    assert (found.rounds, found.accepted, found.lines["drafted"][0]) == (134, 255, 402)
    assert found.lines["label"].tolist() == ["draft-mtp"]
    same(found.survival, [112 / 134, 82 / 134, 61 / 134], atol=0.001)


def test_kinds_of_drafts_and_servers_behind_a_router_count_apart():
    lines = [statistics(SIX, 3), statistics(SIX[:2], 3, name="ngram"), statistics(SIX, 3, 2)]
    record = read("".join(lines))
    assert record.lines["label"].tolist() == ["draft-dspark", "draft-ngram"]
    ports = [f"[{8080 + place % 2}] " + line for place, line in enumerate([lines[0]] * 4)]
    assert read("".join(ports)).rounds == 12
    again = read(statistics(SIX, 3, 5) + statistics(SIX[:2], 3, 1))
    assert again.rounds == 8 and "fell" in again.reason


def test_old_statistics_have_the_drafts_for_rounds():
    old = "statistics ngram_simple: #calls = 15, #gen drafts = 6, #acc drafts = 5, "
    old += "#gen tokens = 180, #acc tokens = 70\n"
    before = "draft acceptance rate = 0.38889 (   70 accepted /   180 generated)\n"
    for text in (old, before + old):
        record = read(text)
        assert (record.rounds, record.accepted, record.exact) == (6, 70, False)
        assert record.lines["label"].tolist() == ["ngram-simple"] and len(record.survival) == 0
    # Calls of which nothing was accepted were not counted: 112 of 134.
    early = STATISTICS.replace("134, #gen", "112, #gen").replace("2.90", "3.28")
    record = read(early.replace("0.836, 0.612, 0.455", "1.000, 0.732, 0.545"))
    assert (record.rounds, record.exact) == (134, False)
    same(record.survival, [112 / 134, 82 / 134, 61 / 134], atol=0.001)


def test_requests_say_more_than_statistics():
    record = read(llama_line(SIX, 3) + statistics(SIX, 3))
    assert record.kind == "llama.cpp log" and "#gen drafts" in record.reason


def test_what_statistics_have_besides_is_named_and_contradictions_are_refused():
    line = statistics(SIX, 3)
    assert read(line.replace("#mean", "#skipped = 4, #mean")).unknown == ("skipped",)
    for wrong in ("3.50", "1.50"):
        with pytest.raises(ValueError, match="line"):
            read(line.replace("2.50", wrong))
    with pytest.raises(ValueError):
        read(line.replace("#acc tokens =     9", "#acc tokens =    19"))


@pytest.mark.parametrize("last", [statistics(SIX + SIX, 3, 2), STATISTICS.replace("mtp", "dspark")])
def test_a_cut_line_of_statistics_is_left_out_or_whole(last):
    first = statistics(SIX, 3)
    allowed = [read(first).rounds, read(first + last).rounds]
    for cut in range(1, len(last)):
        record = read(first + last[:cut])
        assert record.rounds in allowed, last[:cut][-20:]
        if record.rounds == allowed[0] and cut > last.index("#gen drafts") + 11:
            assert record.truncated == "line 2", last[:cut][-20:]


SPECULATIVE = """
encoded   12 tokens in    0.514 seconds, speed:   23.325 t/s
decoded  297 tokens in    2.650 seconds, speed:  112.075 t/s

n_draft   = 4
n_predict = 297
n_drafted = 352
n_accept  = 208
accept    = 59.091%
"""


def test_llama_speculative_has_rounds_of_what_was_not_accepted():
    for prefix in ("", "0.31.337.771 I "):
        text = SPECULATIVE.replace("\nn_", f"\n{prefix}n_")
        for content in (text, text.rstrip("\n"), text.replace("\n", "\r\n")):
            record = read(content)
            assert (record.kind, record.exact) == ("llama.cpp speculative", False)
            assert (record.rounds, record.accepted) == (89, 208) and len(record.survival) == 0
    assert read(SPECULATIVE + "\n" + STATISTICS).kind == "llama.cpp statistics"
    assert "tree" in read(SPECULATIVE.replace("n_draft   = 4", "n_draft   = 3")).reason


@pytest.mark.parametrize(
    "change",
    [
        ("59.091", "39.091"),
        ("n_predict = 297", "n_predict = 200"),
        ("n_accept  = 208", "n_accept = 400"),
    ],
    ids=str,
)
def test_contradictions_of_llama_speculative_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        read(SPECULATIVE.replace(*change))


@pytest.mark.parametrize("cut", range(SPECULATIVE.index("n_draft"), len(SPECULATIVE)))
def test_a_cut_end_of_llama_speculative_is_whole_or_refused(cut):
    """All but the share, which the counts say too, must be there."""
    needed = SPECULATIVE.index("accept    =")
    if cut < needed:
        with pytest.raises(ValueError):
            read(SPECULATIVE[:cut])
    else:
        record = read(SPECULATIVE[:cut])
        assert (record.rounds, record.accepted) == (89, 208)


def debug_line(
    reqs: Sequence[dict[str, Any]], slots: int, mode: str = "compact", rank: str = "", **step: Any
) -> str:
    """A step as an early SGLang logs it."""
    names = {"req_pool_index": "req", "prefix_len": "prefix"}
    renamed = [{names.get(name, name): value for name, value in one.items()} for one in reqs]
    windows = [one["verify_len"] for one in reqs]
    found = {"forward_ct": 42, "bs": len(reqs), "gamma": slots, "mode": mode, "budget": None}
    found |= {"lag_steps": None, "num_verify_tokens": sum(windows)}
    found |= {"avg_verify_len": round(sum(windows) / len(windows), 4), "reqs": renamed} | step
    text = json.dumps(found, separators=(",", ":"))
    return f"[2026-05-02 09:12:44{rank} TP0] DSPARK_DEBUG_MAIN_OUTPUT={text}\n"


DEBUG = "".join(debug_line([dump_request(*step, rid="r")], 3) for step in SIX)


def test_debug_lines_of_an_early_sglang_are_rounds():
    noise = "SGLANG_DSPARK_DEBUG_MAIN_OUTPUT=1\n" + sglang_line(2.5, 0.5)
    bare = "".join(line.split("OUTPUT=")[1] for line in DEBUG.splitlines(keepends=True))
    contents = [DEBUG, noise + DEBUG, DEBUG + noise, DEBUG.rstrip("\n"), bare]
    contents += ["".join("pod-1 | " + line for line in DEBUG.splitlines(keepends=True))]
    for content in [*contents, gzip.compress(DEBUG.encode())]:
        record = read(content)
        assert (record.kind, record.unit, record.exact) == ("SGLang dump", "request", True)
        assert record.unknown == () and record.lines["line"].tolist() == ["r"]
        same(record.survival, SIX_SURVIVAL)
        same(record.conditional, SIX_CONDITIONAL)
    assert "accept len:" in read(noise + DEBUG).reason


def test_ranks_of_a_log_use_places_of_their_own():
    lines = [debug_line([dump_request(1, 3)], 3, rank=f" DP{rank}") for rank in (0, 1, 0, 1)]
    assert len(read("".join(lines)).lines) == 2
    # A fork logs every rank of a group: the same rounds again.
    group = [debug_line([dump_request(1, 3)], 3, tp_rank=rank) for rank in (0, 1)]
    record = read("".join(group))
    assert record.rounds == 1 and "left out" in record.reason


def test_fields_of_a_step_that_are_not_known_are_named():
    text = debug_line([dump_request(1, 3, anchor_token=5)], 3, extra=1)
    assert read(text).unknown == ("extra", "anchor_token")


def test_a_cut_step_is_left_out_and_a_broken_one_is_named():
    last = DEBUG.splitlines(keepends=True)[-1]
    for cut in range(last.index("{") + 1, len(last) - 1, 3):
        record = read(DEBUG + last[:cut])
        assert (record.rounds, record.truncated) == (6, "line 7")
    with pytest.raises(ValueError, match="line 7"):
        read(DEBUG + last[:-9] + "\n" + DEBUG)


@pytest.mark.parametrize(
    "one",
    [
        dump_request(3, 2),
        dump_request(1, 4),
        dump_request(2, 3, cap_trim=2),
        dump_request(1, 3) | {"correct_drafts": "1"},
        dump_request(1, 3) | {"correct_drafts": 0.5},
    ],
    ids=["above its window", "above the block", "trimmed above", "text", "half"],
)
def test_contradictions_of_a_step_are_refused_by_its_number(one):
    with pytest.raises(ValueError, match="step 42"):
        read(debug_line([one], 3))
    with pytest.raises(ValueError, match="step 900"):
        read(json.dumps(dump_of([[one]], 3)))
    with pytest.raises(ValueError, match="list of objects"):
        read(json.dumps({"gamma": 3, "records": [5]}))


def server_info(*lengths: float | None, **more: Any) -> dict[str, Any]:
    states = [{"last_gen_throughput": 40.0, "avg_spec_accept_length": one} for one in lengths]
    return {"internal_states": states, "speculative_num_draft_tokens": 4} | more


def test_the_mean_length_of_sglang_s_server_info_is_tau():
    alone = server_info(3.5, prefill=[], decode=[])
    apart = {"prefill": [server_info(None)], "decode": [server_info(3.5)]}
    for found in (alone, apart, server_info(3.0, 0.0, None, 4.0), alone["internal_states"][0]):
        record = read(json.dumps(found, indent=1))
        assert (record.kind, record.unit, record.exact) == ("SGLang server_info", "server", False)
        assert record.tau == 3.5 and len(record.survival) == 0
    with pytest.raises(ValueError, match="no round"):
        read(json.dumps(server_info(None)))
    later = read(json.dumps(server_info(3.7)))
    assert counted_since(record, later).tau == 3.7


def test_a_debug_record_says_more_than_the_mean_length():
    found = server_info(9.0)
    found["internal_states"][0]["dspark_info_record"] = dump_of([[dump_request(2, 3)]], 3)
    assert read(json.dumps(found)).kind == "SGLang dump"
    record = read(json.dumps({"decode": [found], "prefill": []}))
    assert (record.kind, record.tau) == ("SGLang dump", 3)


ROWS = [vllm_row(vllm_object(SIX, 3), f"r{n}", choices=[{"text": 'say, ] "}[{'}]) for n in range(9)]
ARRAYS = {
    "plain": json.dumps(ROWS),
    "indented": json.dumps(ROWS, indent=2),
    "narrow": json.dumps(ROWS, separators=(",", ":")),
    "nested": json.dumps([ROWS[:4], ROWS[4:]]),
    "a line each": json.dumps(ROWS[:4]) + "\n" + json.dumps(ROWS[4:]) + "\n",
    "numbers between": "[1, 23, null, " + json.dumps(ROWS)[1:],
    "blank lines before": "\n \n" + json.dumps(ROWS),
    "Python": repr(ROWS),
}


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_read_in_pieces_of_any_size(name, size, monkeypatch):
    monkeypatch.setattr("dspark_lab.records.reading._CHUNK", size)
    record = read(ARRAYS[name])
    assert record.lines["line"].tolist() == [f"r{n}" for n in range(9)]
    assert record.tau == 2.5 and record.truncated is None


@pytest.mark.parametrize("size", [5, 1 << 16])
def test_a_cut_array_counts_its_whole_values(size, monkeypatch):
    monkeypatch.setattr("dspark_lab.records.reading._CHUNK", size)
    text = json.dumps(ROWS[:2])
    first = len(json.dumps(ROWS[0])) + 1
    for cut in [*range(first, len(text), 7), len(text) - 1]:
        record = read(text[:cut])
        whole = 2 if cut == len(text) - 1 else 1
        assert (len(record.lines), record.truncated) == (whole, f"value {whole + 1}")
    with pytest.raises(ValueError, match="array"):
        read(text[: first - 1])


def test_long_lines_of_json_may_speak_of_logs():
    said = "SpecDecoding metrics: draft acceptance, n_predict " * 9000
    row = vllm_row(vllm_object(SIX, 3), choices=[{"text": said}])
    for text in (json.dumps([row, row]), json.dumps(row) + "\n" + json.dumps(row)):
        assert len(said) > 1 << 18 and read(text).rounds == 12


def test_memory_does_not_grow_with_an_array(tmp_path):
    path, row = (
        tmp_path / "requests.json",
        json.dumps(vllm_row(vllm_object(SIX, 3), text="x" * 9000)),
    )
    peaks = []
    for count in (200, 1600):
        path.write_text("[" + ",".join([row] * count) + "]")
        tracemalloc.start()
        assert load_acceptance(path).rounds == 6 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 1_000_000


def test_a_log_of_iterations_saved_by_python_is_an_array_too():
    assert read(repr(trt_rows([SIX]))).kind == "TensorRT-LLM iterations"


def test_the_profile_of_a_record_gives_advice():
    costs = serving.RoundCosts(
        plain_seconds=1.0,
        draft_seconds=[0.1, 0.2, 0.3, 0.4],
        verify_seconds=[1, 1.1, 1.2, 1.3, 1.4],
    )
    profile = read(vllm_line(HUNDRED, 4)).profile()
    same(profile.survival, RATES)
    assert profile.tau(2) == pytest.approx(1 + 0.62 + 0.40)
    table = serving.speedup_table(profile, costs).set_index("draft_length")
    for k in (1, 2, 3, 4):
        assert table["speedup"][k] == pytest.approx((1 + sum(RATES[:k])) / (1 + 0.2 * k))
    assert serving.best_length(profile, costs) == table["speedup"].idxmax() == 2
    assert serving.break_even(costs, 2) < profile.rates[0]


@pytest.fixture(scope="module")
def shipped() -> pd.DataFrame:
    """The whole rounds of one run: seven slots, some behind an end of turn not verified."""
    trace = load_traces().query("drafter == 'dspark-k7' and temperature == 0")
    trace = trace[trace.groupby(["prompt", "round"])["slot"].transform("size") == 7]
    return trace[trace["prompt"] < 60].reset_index(drop=True)


def dump_of_trace(trace: pd.DataFrame, mode: str) -> str:
    """What a server would have recorded of the same rounds, a step for each."""
    steps = []
    for (prompt, number), part in trace.groupby(["prompt", "round"], sort=False):
        right, verified = int(part["accepted"].sum()), int(part["verified"].sum())
        cut = min(right, 2) if mode == "cap-accept" else right
        own = part["resampled"].dropna().tolist()
        one = dump_request(cut, max(cut, 2) if mode == "cap-accept" else verified, rid=f"q{prompt}")
        one |= {"confidence": part["confidence"].tolist(), "draft_tokens": part["token"].tolist()}
        one |= {"bonus_token": int(own[0]) if own else 9, "cap_trim": right - cut}
        steps.append([one | {"prefix_len": 100 + 8 * int(number)}])
    dump = dump_of(steps, 7, mode)
    if mode == "log":
        return "".join(debug_line(reqs, 7) for reqs in steps)
    return json.dumps({"internal_states": [{"dspark_info_record": dump}]})


def written(text: str, folder: Path) -> Path:
    path = folder / "dump"
    path.write_text(text)
    return path


@pytest.mark.parametrize("mode", ["compact", "log"])
def test_reports_on_a_server_s_record_are_those_of_the_same_trace(mode, shipped, tmp_path):
    path = written(dump_of_trace(shipped, mode), tmp_path)
    trace = trace_of_dump(path)
    known = ["slot", "token", "confidence", "verified", "accepted", "resampled"]
    pd.testing.assert_frame_equal(trace[known], shipped[known])
    assert (trace["request"] == "q" + shipped["prompt"].astype(str)).all()
    table, true = (
        rates.rate_table(rates.trace_sums(one).query("kind != 'on policy'")).drop(columns="kind")
        for one in (trace, shipped)
    )
    pd.testing.assert_frame_equal(table, true)
    pd.testing.assert_frame_equal(rates.threshold_sweep(trace), rates.threshold_sweep(shipped))
    parts = [(one[one["prompt"] < 30], one[one["prompt"] >= 30]) for one in (trace, shipped)]
    reports = [rates.calibration_report(*part, resamples=20) for part in parts]
    pd.testing.assert_frame_equal(*reports)
    both = load_acceptance(path), record_of_trace(shipped)
    assert both[0].rounds == both[1].rounds
    same(both[0].conditional, both[1].conditional)
    same(both[0].survival, both[1].survival)


def test_a_cap_shows_what_the_whole_block_would_have_been(shipped, tmp_path):
    whole = shipped.groupby(["prompt", "round"])["verified"].transform("all")
    trace = trace_of_dump(written(dump_of_trace(shipped[whole], "cap-accept"), tmp_path))
    assert trace["verified"].all()
    for name in ("accepted", "confidence"):
        assert trace[name].tolist() == shipped.loc[whole, name].tolist()
    # The server's own token behind a cap is that of a draft that was right.
    cut = shipped[whole].groupby(["prompt", "round"])["accepted"].transform("sum") > 2
    assert trace.loc[cut.to_numpy(), "resampled"].isna().all()
    sweep = rates.threshold_sweep(trace)
    pd.testing.assert_frame_equal(sweep, rates.threshold_sweep(shipped[whole]))


def test_positions_count_the_tokens_that_were_served(tmp_path):
    own = {"rid": "r", "draft_tokens": [5, 6, 7], "bonus_token": 9}
    steps = [[dump_request(a, 3, **own)] for a in (2, 0, 3)]
    trace = trace_of_dump(written(json.dumps(dump_of(steps, 3, "static")), tmp_path))
    assert trace["position"].tolist() == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert trace["resampled"].dropna().tolist() == [9, 9]
    assert trace["confidence"].isna().all()
    with pytest.raises(ValueError, match="confidence must be a number"):
        rates.threshold_sweep(trace)


def test_a_server_s_trace_is_saved_and_loaded_as_any_other(tmp_path):
    steps = [[dump_request(a, d, rid="r", confidence=[0.5, 0.25])] for a, d in [(1, 2), (0, 1)]]
    trace = trace_of_dump(written(json.dumps(dump_of(steps, 2)), tmp_path))
    assert list(trace.columns) == [*TRACE_COLUMNS, "request"]
    for name in ("trace.parquet", "trace.csv"):
        save_trace(trace, tmp_path / name)
        loaded = load_trace(tmp_path / name)
        pd.testing.assert_frame_equal(loaded, trace, check_dtype=False)
        assert load_acceptance(tmp_path / "trace.parquet").rounds == 2
    assert trace["verified"].tolist() == [True, True, True, False]
    assert trace["token"].eq(-1).all()


def test_accept_rates_that_a_server_does_not_record_are_asked_for_in_words(shipped):
    trace = shipped.assign(accept_rate=math.nan)
    table = rates.rate_table(rates.trace_sums(trace))
    assert table.query("kind == 'on policy'")["conditional"].isna().all()
    for ask in (
        lambda: rates.study(trace),
        lambda: rates.calibration_report(
            trace, trace.assign(prompt=trace["prompt"] + 900), outcome="analytic"
        ),
        lambda: serving.acceptance_profile(trace[trace["verified"]]),
    ):
        with pytest.raises(ValueError, match="accept rates"):
            ask()


@pytest.mark.parametrize(
    "content, match",
    [
        (
            json.dumps(dump_of([[dump_request(1, 2, confidence=[0.5])]], 3)),
            "confidence must be one",
        ),
        (json.dumps(dump_of([[dump_request(1, 2, draft_tokens=[1] * 4)]], 3)), "draft_tokens must"),
        (json.dumps(dump_of([[dump_request(1, 2, confidence=[2.0] * 3)]], 3)), r"lie in \[0, 1\]"),
        (json.dumps(dump_of([[dump_request(1, 2)]], 3, simulate_acc_len=2)), "simulate"),
        (json.dumps(dump_of([[]], 3)), "component"),
        (json.dumps(vllm_row(vllm_object(SIX, 3))), "component"),
        (DEBUG + DEBUG[:200] + "\n" + DEBUG, "line 7"),
        ("", "component"),
    ],
    ids=["few", "many", "above 1", "forced", "no requests", "other", "broken", "empty"],
)
def test_what_is_no_debug_record_makes_no_trace(content, match, tmp_path):
    with pytest.raises(ValueError, match=match) as error:
        trace_of_dump(written(content, tmp_path))
    assert "dump" in str(error.value)
    with pytest.raises(FileNotFoundError):
        trace_of_dump(tmp_path / "none")


def test_texts_are_neither_in_names_nor_in_errors():
    said = "why is grass green"
    text = f"the {said}:  7\n{said}: 3\ngenerated text: {said} = 42\n{said}_x: 3\n"
    for record in (read(PRINTED["example"] + text), read(text + PRINTED["console"] + text)):
        assert said not in record.reason and not any(said in one for one in record.unknown)


def test_several_runs_of_a_benchmark_are_lines_of_one_record(tmp_path: Path) -> None:
    run = {"spec_decode_num_drafts": 10, "spec_decode_draft_tokens": 20}
    runs = [{**run, "spec_decode_accepted_tokens": accepted} for accepted in (10, 15)]
    path = tmp_path / "bench.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in runs) + "\n")
    record = load_acceptance(path)
    assert record.lines["accepted"].tolist() == [10, 15] and record.tau == 2.25


def test_whose_benchmark_it_is_follows_from_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    for more, kind in (({}, "NeMo AutoModel"), ({"request_throughput": 3.0}, "SGLang")):
        path.write_text(json.dumps({"accept_length": 2.5, **more}))
        record = load_acceptance(path)
        assert record.kind == f"{kind} bench" and record.tau == 2.5


def test_a_request_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    good = {"metrics": {"speculative_decoding": {"acceptance_histogram": [1, 2, 3]}}}
    bad = {"metrics": {"speculative_decoding": {"acceptance_histogram": [1, -2, 3]}}}
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, (good, bad))) + "\n")
    with pytest.raises(ValueError, match="record 2: "):
        load_acceptance(path)
