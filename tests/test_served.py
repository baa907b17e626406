"""The shipped records of servers: all formats tell the same rounds, and none tells a text."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.make.planted import SLOTS, Case, set_up
from data.make.served import (
    DRAFTER,
    RECORDS,
    REQUESTS,
    SEED,
    faulty_files,
    healthy_files,
    serve,
    write_files,
)
from dspark_lab import diagnose, load_acceptance
from dspark_lab.pairs import load_pair, load_traces
from dspark_lab.rates import trace_sums
from dspark_lab.records import AcceptanceRecord, trace_of_dump

# Each file's kind, and how far off, as a share, its rounds and its tau may be.
HEALTHY_FILES = {
    "vllm_requests.jsonl": ("vLLM requests", 0.0),
    "vllm.log": ("vLLM log", 0.0),
    "vllm_metrics.txt": ("vLLM metrics", 0.0),
    "vllm_bench.json": ("vLLM bench", 0.0),
    "aiperf.jsonl": ("AIPerf records", 0.0),
    # Its last steps have no line.
    "sglang.log": ("SGLang log", 0.03),
    "sglang_requests.jsonl": ("SGLang meta_info", 0.0),
    "sglang_dump.json.gz": ("SGLang dump", 0.0),
    "trtllm_requests.jsonl": ("TensorRT-LLM requests", 0.0),
    "trtllm_iterations.jsonl": ("TensorRT-LLM iterations", 0.0),
    "trtllm_metrics.txt": ("TensorRT-LLM metrics", 0.0),
    # Rounds are worked out of a mean of two decimals.
    "llama_cpp.log": ("llama.cpp log", 0.002),
    # Rounds are worked out of the answer's tokens, of which a last one may be drafted.
    "llama_cpp.jsonl": ("llama.cpp timings", 0.03),
    "llama_cpp_metrics.txt": ("llama.cpp metrics", 0.0),
    "speculators.csv": ("speculators acceptance.csv", 0.0),
    "deepspec.json": ("DeepSpec metrics", 0.0),
    "automodel.json": ("NeMo AutoModel bench", 0.0),
}
KINDS = {name: kind for name, (kind, _) in HEALTHY_FILES.items()}
KINDS |= {"stale.jsonl": "vLLM requests", "stale_dump.json.gz": "SGLang dump"}
NO_SLOTS = ["sglang.log", "trtllm_iterations.jsonl", "llama_cpp.jsonl", "automodel.json"]
# Rates in logs have three decimals.
ROUNDED = {"vllm.log": 0.0005, "llama_cpp.log": 0.001}


def record_of(name: str) -> AcceptanceRecord:
    return load_acceptance(RECORDS / name)


@pytest.fixture(scope="module")
def healthy() -> AcceptanceRecord:
    return record_of("vllm_requests.jsonl")


def test_every_file_is_taken_for_what_it_is() -> None:
    files = {path.name for path in RECORDS.iterdir()} - {"README.md"}
    assert files == set(KINDS)
    for name, kind in KINDS.items():
        record = record_of(name)
        assert record.kind == kind
        assert record.unknown == () and record.truncated is None, name


@pytest.mark.parametrize("name", HEALTHY_FILES)
def test_all_formats_tell_the_same_rounds(name: str, healthy: AcceptanceRecord) -> None:
    record, share = record_of(name), HEALTHY_FILES[name][1]
    assert record.exact == (share == 0)
    assert record.rounds == pytest.approx(healthy.rounds, rel=share, abs=1e-6)
    if name != "sglang.log":
        assert record.accepted == pytest.approx(healthy.accepted)
    assert record.tau == pytest.approx(healthy.tau, rel=share or 1e-9)
    if name in NO_SLOTS:
        assert len(record.survival) == 0
        return
    atol = ROUNDED.get(name, 1e-9)
    np.testing.assert_allclose(record.survival, healthy.survival, atol=atol)
    np.testing.assert_allclose(record.conditional, healthy.conditional, atol=10 * atol)


@pytest.mark.parametrize("name", ["aiperf.jsonl", "sglang_requests.jsonl", "sglang_dump.json.gz"])
def test_requests_have_the_same_ids_and_rounds(name: str, healthy: AcceptanceRecord) -> None:
    columns = ["line", "rounds", "accepted", "drafted"]
    assert record_of(name).lines[columns].equals(healthy.lines[columns])


def test_both_servers_answered_the_same_requests(healthy: AcceptanceRecord) -> None:
    stale = record_of("stale.jsonl")
    columns = ["line", "temperature", "label", "seconds", "prompt_tokens", "output_tokens"]
    assert stale.lines[columns].equals(healthy.lines[columns])
    assert stale.lines["line"].nunique() == 200
    assert (stale.lines["temperature"] == 0).all()
    assert set(stale.lines["label"]) == {"math", "code", "chat"}
    assert (stale.lines["drafted"] == SLOTS * stale.lines["rounds"]).all()
    # The greedy answer depends on no drafter: all but its first token come from rounds.
    for record in (healthy, stale):
        rest = record.lines["rounds"] + record.lines["accepted"] + 1 - record.lines["output_tokens"]
        assert rest.isin([0, 1]).all()


@pytest.mark.parametrize(
    "dump, requests",
    [("sglang_dump.json.gz", "vllm_requests.jsonl"), ("stale_dump.json.gz", "stale.jsonl")],
)
def test_a_dump_is_a_trace_with_confidences(dump: str, requests: str) -> None:
    trace, record = trace_of_dump(RECORDS / dump), record_of(requests)
    assert trace["confidence"].between(0, 1, inclusive="neither").all()
    assert trace["verified"].all() and (trace["token"] == -1).all()
    accepted = trace.groupby("request", sort=False)["accepted"].sum()
    assert accepted.index.tolist() == record.lines["line"].tolist()
    assert accepted.tolist() == record.lines["accepted"].tolist()
    sums = trace_sums(trace).query("kind == 'empirical'").groupby("slot")["passed"].sum()
    assert sums.tolist() == record.passed.sum(axis=0).tolist()


def text_of(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()


def values(row: Any) -> Iterator[tuple[str, Any]]:
    """All keys of a JSON value with what they hold."""
    for key, value in row.items() if isinstance(row, dict) else ():
        yield key, value
        yield from values(value)
    for one in row if isinstance(row, list) else ():
        yield from values(one)


TEXTS = {"prompt", "text", "content", "messages", "message", "draft_tokens", "bonus_token"}


@pytest.fixture(scope="module")
def questions() -> list[str]:
    prompts = set_up(load_pair(), Case("", DRAFTER, 0.0, SEED), REQUESTS).prompts
    return [prompt.users[0] for prompt in prompts]


@pytest.mark.parametrize("name", KINDS)
def test_no_file_tells_a_prompt_or_an_answer(name: str, questions: list[str]) -> None:
    text = text_of(RECORDS / name)
    if ".json" in name:
        rows = text.splitlines() if name.endswith(".jsonl") else [text]
        assert not [k for row in rows for k, v in values(json.loads(row)) if k in TEXTS and v]
    assert len(questions) == 200 and not [one for one in questions if one in text]


@pytest.mark.parametrize("name, lines", [("vllm.log", 20), ("sglang.log", 19)])
def test_the_stamps_of_a_log_rise_by_ten_seconds(name: str, lines: int) -> None:
    seconds = record_of(name).lines["seconds"]
    assert len(seconds) == lines and (seconds.diff().dropna() == 10).all()


def test_the_card_tells_rounds_and_tau(healthy: AcceptanceRecord) -> None:
    card = (RECORDS / "README.md").read_text(encoding="utf-8")
    for record in (healthy, record_of("stale.jsonl")):
        assert f"{record.rounds:,.0f} rounds with a tau of {record.tau:.2f}" in card
    assert not [name for name in KINDS if f"| `{name}` |" not in card]
    assert sum(path.stat().st_size for path in RECORDS.iterdir()) < 3_000_000


def test_the_stale_cache_is_found_and_the_healthy_server_cleared() -> None:
    trace = load_traces().query("drafter == 'dspark-k7' and temperature == 0")
    assert diagnose(RECORDS / "stale.jsonl", trained=trace).cause == "stale cache"
    assert diagnose(RECORDS / "vllm_requests.jsonl", trained=trace).cause == "nothing wrong"


@pytest.mark.usefixtures("one_thread")
def test_the_same_requests_are_the_same_bytes(tmp_path: Path) -> None:
    pair, written = load_pair(), []
    for folder in ("first", "second"):
        requests = serve(pair, "stale cache", requests=3)
        write_files(faulty_files(requests) | healthy_files(requests), tmp_path / folder)
        written.append({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()})
    assert written[0] == written[1] and set(written[0]) == set(KINDS)
    assert load_acceptance(tmp_path / "first" / "stale.jsonl").lines["line"].tolist() == [
        f"request-00{number}" for number in (1, 2, 3)
    ]


def test_the_card_has_the_figures_of_the_records() -> None:
    card = (RECORDS / "README.md").read_text(encoding="utf-8")
    healthy, stale = (
        load_acceptance(RECORDS / name) for name in ("vllm_requests.jsonl", "stale.jsonl")
    )
    assert f"took {healthy.rounds:,.0f} rounds with a tau of {healthy.tau:.2f}" in card
    assert f"the other one {stale.rounds:,.0f} rounds with a tau of {stale.tau:.2f}" in card
    assert f"(seed {SEED:,})" in card
