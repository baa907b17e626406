"""What servers and trainers write of rounds, in each format that ``lab.load_acceptance`` reads.

A request is its rounds in order. Requests arrive at ``START``, one a second: no time is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

# A round: how many drafted tokens were accepted, the target's own left out, and how many verified.
Round = tuple[int, int]
Requests = Sequence[Sequence[Round]]
Fields = dict[str, Any]
MODEL = "pocket"
START = datetime(2026, 6, 2, 9, tzinfo=timezone.utc)
# Seconds that a line of a log stands for, and decoding steps that one of SGLang's does.
INTERVAL, STEPS = 10, 40


def json_lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def passed(rounds: Sequence[Round], slots: int) -> list[int]:
    """Rounds by slot that accepted it and all before it."""
    return [sum(a > slot for a, _ in rounds) for slot in range(slots)]


def survival(rounds: Sequence[Round], slots: int) -> list[float]:
    return [count / len(rounds) for count in passed(rounds, slots)]


def histogram(rounds: Sequence[Round], slots: int) -> list[int]:
    """Rounds by accepted tokens."""
    return [sum(a == j for a, _ in rounds) for j in range(slots + 1)]


def pooled(requests: Requests) -> list[Round]:
    return [step for request in requests for step in request]


def sums(rounds: Sequence[Round]) -> tuple[int, int, int]:
    """Rounds, accepted and drafted tokens."""
    return len(rounds), sum(a for a, _ in rounds), sum(d for _, d in rounds)


def with_others(
    requests: Requests, others: Sequence[Fields], name: str = "id"
) -> Iterable[tuple[Sequence[Round], Fields]]:
    """Each request with the fields that its row has besides; numbered by default."""
    return zip(requests, others or [{name: f"r{n}"} for n in range(len(requests))], strict=True)


def steps_of(requests: Requests, running: int | None = None) -> list[list[tuple[int, int]]]:
    """The request and the number of each round of a step, for all steps.

    So many requests run at once, by default all of them; where one ends, the next begins.
    """
    waiting = [[(n, k) for k in range(len(one))] for n, one in enumerate(requests) if one]
    most = len(waiting) if running is None else running
    steps, going = [], list[list[tuple[int, int]]]()
    while waiting or going:
        free = most - len(going)
        going, waiting = going + waiting[:free], waiting[free:]
        steps.append([one.pop(0) for one in going])
        going = [one for one in going if one]
    return steps


def vllm_object(rounds: Sequence[Round], slots: int, detailed: bool = True) -> Fields:
    steps, accepted, drafted = sums(rounds)
    found: Fields = {
        "mean_acceptance_length": 1 + accepted / steps,
        "draft_acceptance_rate": accepted / drafted,
        "acceptance_histogram": histogram(rounds, slots),
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": slots,
    }
    if detailed:
        found["per_step_accepted"] = [a for a, _ in rounds]
        found["per_step_drafted"] = [d for _, d in rounds]
    return found


def vllm_row(found: Fields, name: str = "cmpl-1", **other: Any) -> Fields:
    return {"id": name, "metrics": {"speculative_decoding": found}, **other}


def vllm_requests(
    requests: Requests, slots: int, others: Sequence[Fields] = (), detailed: bool = True
) -> str:
    rows = with_others(requests, others)
    return json_lines(*(vllm_row(vllm_object(r, slots, detailed), **own) for r, own in rows))


def aiperf_row(
    rounds: Sequence[Round], slots: int, detailed: bool = True, tokens: int = 40, **metadata: Any
) -> Fields:
    found: Fields = {"engine": "vllm"} | vllm_object(rounds, slots, detailed)
    counts = enumerate(histogram(rounds, slots))
    found["acceptance_histogram"] = {str(j): count for j, count in counts if count}
    about = {"x_request_id": "a1", "benchmark_phase": "profiling", "was_cancelled": False}
    rate = {"value": 100 * found["draft_acceptance_rate"], "unit": "%"}
    return {
        "metadata": about | metadata,
        "metrics": {"spec_decode_draft_acceptance_rate": rate},
        "spec_decode_acceptance": found | {"completion_tokens": tokens},
        "error": None,
    }


def aiperf(
    requests: Requests, slots: int, others: Sequence[Fields] = (), detailed: bool = True
) -> str:
    rows = with_others(requests, others, "x_request_id")
    return json_lines(*(aiperf_row(r, slots, detailed, **own) for r, own in rows))


def sglang_object(rounds: Sequence[Round], slots: int, tokens: int | None = None) -> Fields:
    """The histogram is as long as the most accepted; proposed are whole blocks, cut or not."""
    steps, accepted, _ = sums(rounds)
    tokens = steps + accepted - 1 if tokens is None else tokens
    return {
        "prompt_tokens": 12,
        "completion_tokens": tokens,
        "spec_verify_ct": steps,
        "spec_num_correct_drafts": accepted,
        "spec_num_proposed_drafts": steps * slots,
        "spec_correct_drafts_histogram": histogram(rounds, max(a for a, _ in rounds)),
        "spec_accept_rate": accepted / (steps * slots),
        "spec_accept_length": tokens / steps,
    }


def sglang_meta(requests: Requests, slots: int, others: Sequence[Fields] = ()) -> str:
    rows = []
    for request, own in with_others(requests, others):
        found = sglang_object(request, slots, own.get("completion_tokens"))
        rows.append({"text": "", "meta_info": found | own})
    return json_lines(*rows)


def dump_request(accepted: int, verified: int, **other: Any) -> Fields:
    """A request of a step; the window counts the slot of the last token."""
    found = {"req_pool_index": 3, "prefix_len": 100, "verify_len": verified + 1}
    return found | {"correct_drafts": accepted, "acc_len": accepted + 1} | other


def dump_of(
    steps: Sequence[Sequence[Fields]], slots: int, mode: str = "compact", **top: Any
) -> Fields:
    records = [
        {"forward_ct": 900 + n, "bs": len(reqs), "mode": mode, "reqs": list(reqs)}
        for n, reqs in enumerate(steps)
    ]
    head = {"mode": mode, "gamma": slots, "verify_num_draft_tokens": slots + 1}
    return head | {"components": ["core", "reqs"], "records": records} | top


def sglang_dump(
    requests: Requests,
    slots: int,
    others: Sequence[Sequence[Fields]] = (),
    running: int | None = None,
    mode: str = "compact",
) -> str:
    """``others``: the further fields of each request's rounds."""
    others = others or [[{"rid": f"r{n}"}] * len(one) for n, one in enumerate(requests)]
    steps = [
        [dump_request(*requests[n][k], **others[n][k]) for n, k in step]
        for step in steps_of(requests, running)
    ]
    state = {"dspark_info_record": dump_of(steps, slots, mode)}
    return json.dumps({"internal_states": [state]}, separators=(",", ":"))


def sglang_line(
    length: float,
    rate: float | None = None,
    time: str = "09:12:44",
    cap: float | None = None,
    running: int = 6,
) -> str:
    return (
        f"[2026-06-02 {time} DP0 TP0] Decode batch, #running-req: {running}, #full token: 9120, "
        f"full token usage: 0.09, accept len: {length:.2f}, "
        + (f"accept rate: {rate:.2f}, " if rate is not None else "")
        + (f"cap len: {cap:.2f}, " if cap is not None else "")
        + "cuda graph: True, gen throughput (token/s): 402.77, #queue-req: 0\n"
    )


def sglang_log(requests: Requests, slots: int, running: int | None = None) -> str:
    """A line for each ``STEPS`` steps, so that the last steps have none."""
    steps = [[requests[n][k] for n, k in step] for step in steps_of(requests, running)]
    lines = []
    for end in range(STEPS, len(steps) + 1, STEPS):
        count, accepted, drafted = sums(pooled(steps[end - STEPS : end]))
        time = START + timedelta(seconds=INTERVAL * end // STEPS)
        figures = 1 + accepted / count, accepted / drafted
        lines.append(sglang_line(*figures, f"{time:%H:%M:%S}", running=len(steps[end - 1])))
    return "".join(lines)


def trt_object(rounds: Sequence[Round], slots: int) -> Fields:
    steps, accepted, drafted = sums(rounds)
    return {
        "acceptance_rate": accepted / drafted,
        "total_accepted_draft_tokens": accepted,
        "total_draft_tokens": drafted,
        "num_spec_steps": steps,
        "acceptance_histogram": histogram(rounds, slots),
        "num_spec_tokens": slots,
    }


def trt_requests(requests: Requests, slots: int, others: Sequence[Fields] = ()) -> str:
    rows = []
    for request, own in with_others(requests, others):
        choice = {"index": 0, "speculative_decoding": trt_object(request, slots)}
        rows.append(own | {"choices": [choice]})
    return json_lines(*rows)


def trt_rows(requests: Requests, running: int | None = None) -> list[Fields]:
    """Each iteration verifies once for every request that runs; some draft nothing."""
    rows: list[Fields] = [{"iter": 1, "iterLatencyMS": 9.5, "specDecodingStats": None}]
    for n, step in enumerate(steps_of(requests, running)):
        steps, accepted, drafted = sums([requests[one][k] for one, k in step])
        found = {
            "numDraftTokens": drafted,
            "numAcceptedTokens": accepted,
            "numRequestsWithDraftTokens": steps,
            "acceptanceLength": (accepted + steps) / steps,
            "iterLatencyMS": 0.0,
            "draftOverhead": 0.0,
        }
        rows.append({"iter": n + 2, "iterLatencyMS": 11.5, "specDecodingStats": found})
    return rows


def counters(requests: Requests, slots: int, program: str) -> str:
    """A scrape in which each request is an engine's."""
    parts: dict[str, list[str]] = {}
    for engine, request in enumerate(requests):
        names = ("num_drafts", "num_accepted_tokens", "num_draft_tokens")
        samples = [(name, "", value) for name, value in zip(names, sums(request), strict=True)]
        for slot, count in enumerate(passed(request, slots)):
            samples.append(("num_accepted_tokens_per_pos", f'position="{slot}",', count))
        for name, place, value in samples:
            labels = f'{place}engine="{engine}",model_name="{MODEL}"'
            whole = f"{program}:spec_decode_{name}"
            lines = parts.setdefault(whole, [f"# TYPE {whole}_total counter"])
            lines.append(f"{whole}_total{{{labels}}} {value}.0")
            lines.append(f"{whole}_created{{{labels}}} 1.77e+09")
    return "".join(line + "\n" for lines in parts.values() for line in lines)


def vllm_metrics(requests: Requests, slots: int) -> str:
    return counters(requests, slots, "vllm")


def llama_metrics(requests: Requests, slots: int) -> str:
    scrape = counters([pooled(requests)], slots, "llamacpp")
    return scrape.replace(f',model_name="{MODEL}"', "")


def trt_metrics(requests: Requests, slots: int) -> str:
    rounds = pooled(requests)
    verified = [sum(d > slot for _, d in rounds) for slot in range(slots)]
    lines = []
    for name, counts in (("accepted", passed(rounds, slots)), ("drafted", verified)):
        for slot, count in enumerate(counts):
            labels = f'{{engine_type="trtllm",model_name="{MODEL}",token_position="{slot}"}}'
            lines.append(f"trtllm_spec_decode_{name}_tokens_total{labels} {count}.0")
            lines.append(f"trtllm_spec_decode_{name}_tokens_created{labels} 1.77e+09")
    return "\n".join(lines) + "\n"


def vllm_bench(requests: Requests, slots: int, **other: Any) -> str:
    rounds = pooled(requests)
    steps, accepted, drafted = sums(rounds)
    found: Fields = {"backend": "vllm", "completed": len(requests)} | other
    found["spec_decode_acceptance_rate"] = 100 * accepted / drafted
    found["spec_decode_acceptance_length"] = 1 + accepted / steps
    found["spec_decode_num_drafts"] = steps
    found["spec_decode_draft_tokens"] = drafted
    found["spec_decode_accepted_tokens"] = accepted
    found["spec_decode_per_position_acceptance_rates"] = survival(rounds, slots)
    return json.dumps(found)


def csv_head(slots: int) -> str:
    head = "subset,num_drafts,num_draft_tokens,num_accepted_tokens,acceptance_length,"
    return head + ",".join(f"acceptance_at_pos_{slot}" for slot in range(slots)) + "\n"


def csv_row(name: str, rounds: Sequence[Round], slots: int) -> str:
    steps, accepted, drafted = sums(rounds)
    counts = [float(steps), float(drafted), float(accepted), 1 + accepted / steps]
    return ",".join([name, *map(repr, counts + survival(rounds, slots))]) + "\n"


def speculators(requests: Requests, slots: int, subsets: Sequence[str] = ()) -> str:
    """Each request is a subset's rounds."""
    names = subsets or [f"set{n}" for n in range(len(requests))]
    rows = [csv_row(name, one, slots) for name, one in zip(names, requests, strict=True)]
    return csv_head(slots) + "".join(rows)


def deepspec(
    requests: Requests, slots: int, scores: Sequence[Fields] = (), dataset: str = "math"
) -> str:
    """``scores``: of the confidences of each slot; by default none has a ROC area."""
    rounds = pooled(requests)
    steps, accepted, drafted = sums(rounds)
    rates = survival(rounds, slots)
    spec: Fields = {"dataset": dataset, "draft_tokens_per_proposal": slots}
    spec |= {"acceptance_length": 1 + accepted / steps, "accept_rates_by_position": rates}
    spec |= {"verify_rate": (accepted + steps) / (drafted + steps)}
    spec |= {"output_tokens": accepted + steps}
    scores = scores or [{"ece": 0.02, "auc": math.nan, "brier": 0.1, "pred_mean": 0.9}] * slots
    positions = [
        {"position": slot, "total_weight": float(steps)} | own | {"target_mean": rates[slot]}
        for slot, own in enumerate(scores)
    ]
    confidence = {"dataset": dataset, "proposal_count": steps, "per_position": positions}
    means = {f"{name}_mean": sum(one[name] for one in scores) / slots for name in ("ece", "auc")}
    found = {"config": {}, "spec": spec, "confidence": confidence, "confidence_summary": means}
    return json.dumps(found, indent=2)


def automodel_object(rounds: Sequence[Round], **other: Any) -> Fields:
    steps, accepted, drafted = sums(rounds)
    found: Fields = {"model": MODEL, "num_prompts": 4, "completed": 4, "failed": 0}
    found |= {"output_tokens": accepted + steps} | other
    found |= {"accept_length": round(1 + accepted / steps, 4)}
    found |= {"acceptance_rate": accepted / drafted, "num_drafts": steps}
    return found | {"num_draft_tokens": drafted, "num_accepted_tokens": accepted}


def automodel(requests: Requests, slots: int) -> str:
    counts = {"num_prompts": len(requests), "completed": len(requests)}
    return json.dumps(automodel_object(pooled(requests), **counts), indent=2)


def vllm_line(rounds: Sequence[Round], slots: int, time: str = "03-14 09:26:53") -> str:
    """A line of the log as it is since 2025."""
    steps, accepted, drafted = sums(rounds)
    rates = ", ".join(f"{rate:.3f}" for rate in survival(rounds, slots))
    return (
        f"(APIServer pid=42) INFO {time} [metrics.py:120] SpecDecoding metrics: "
        f"Mean acceptance length: {1 + accepted / steps:.2f}, "
        f"Accepted throughput: {accepted / INTERVAL:.2f} tokens/s, "
        f"Drafted throughput: {drafted / INTERVAL:.2f} tokens/s, "
        f"Accepted: {accepted} tokens, Drafted: {drafted} tokens, "
        f"Per-position acceptance rate: {rates}, "
        f"Avg Draft acceptance rate: {100 * accepted / drafted:.1f}%\n"
    )


def vllm_log(intervals: Requests, slots: int) -> str:
    lines = []
    for n, rounds in enumerate(intervals, start=1):
        time = f"{START + timedelta(seconds=INTERVAL * n):%m-%d %H:%M:%S}"
        steps, accepted, _ = sums(rounds)
        speed = f"Avg generation throughput: {(steps + accepted) / INTERVAL:.1f} tokens/s"
        lines.append(f"(APIServer pid=42) INFO {time} [loggers.py:310] Engine 000: {speed}\n")
        lines.append(vllm_line(rounds, slots, time))
    return "".join(lines)


def llama_line(
    rounds: Sequence[Round],
    slots: int,
    task: int = 40,
    by_slot: bool = True,
    time: str = "0.16.519.195",
) -> str:
    steps, accepted, drafted = sums(rounds)
    mean, name = 1 + accepted / steps, "mean acceptance length" if by_slot else "mean len"
    rates = ", ".join(f"{rate:.3f}" for rate in survival(rounds, slots))
    return (
        f"{time} I slot print_timing: id  1 | task {task} | draft acceptance = "
        f"{accepted / drafted:.5f} ({accepted:5d} accepted / {drafted:5d} generated), "
        f"{name} = {mean:5.2f}" + (f", acceptance rate per position = ({rates})" * by_slot) + "\n"
    )


def llama_log(requests: Requests, slots: int) -> str:
    """The stamps count minutes and seconds since the server's start."""
    lines = []
    for task, request in enumerate(requests):
        time = f"{(task + 1) // 60}.{(task + 1) % 60:02d}.000.000"
        steps, accepted, _ = sums(request)
        said = f"eval time = 1000.00 ms / {steps + accepted} tokens"
        lines.append(f"{time} I slot print_timing: id  1 | task {task} | {said}\n")
        lines.append(llama_line(request, slots, task, time=time))
    return "".join(lines)


def llama_timings(
    requests: Requests, slots: int, tokens: Sequence[int], others: Sequence[Fields] = ()
) -> str:
    """``tokens``: of each answer, of which the rounds are worked out."""
    rows = []
    for (request, own), count in zip(with_others(requests, others), tokens, strict=True):
        _, accepted, drafted = sums(request)
        timings = {"predicted_n": count, "predicted_ms": 1000.0}
        timings |= {"draft_n": drafted, "draft_n_accepted": accepted}
        rows.append(own | {"content": "", "timings": timings})
    return json_lines(*rows)
