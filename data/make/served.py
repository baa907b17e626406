"""Records of two servers of the pocket pair, in every format that ``lab.load_acceptance`` reads.

    python -m data.make.served        writes data/records/, a minute

Both answer the same requests. One is healthy; the drafter's cache of the other keeps rejected
tokens. Servers draft whole blocks: what a request's last round drafts behind the end of its answer
counts as rejected.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from data.make import server_files as write
from data.make.generate import complete_folder
from data.make.planted import SLOTS, TOKENS, Case, decode_case, set_up
from dspark_lab.chats import SHIPPED_CHATS
from dspark_lab.decoding import Decoded
from dspark_lab.decoding.text import encode_prompt, end_tokens, up_to_end
from dspark_lab.files import DATA, written_whole
from dspark_lab.pairs import Pair, load_pair
from dspark_lab.rates import auroc, brier, expected_calibration_error

RECORDS = DATA / "records"
# Other questions than those that signatures are learned and reported on.
SEED = 900_000
DRAFTER, FAULT, REQUESTS = "dspark-k7", "stale cache", 200
# Requests at once in SGLang's and TensorRT-LLM's steps; decimals of a dump's confidences.
RUNNING, DECIMALS = 4, 6


@dataclass(frozen=True, eq=False)
class Request:
    """A request as it was served; ``before``: tokens before each round, those of the prompt too."""

    name: str
    domain: str
    prompt_tokens: int
    output_tokens: int
    before: Int[np.ndarray, " round"]
    accepted: Int[np.ndarray, " round"]
    confidence: Float[np.ndarray, "round slot"]

    @property
    def rounds(self) -> list[write.Round]:
        return [(int(count), SLOTS) for count in self.accepted]


def serve(pair: Pair, cause: str, requests: int = REQUESTS) -> list[Request]:
    """The requests of a server with a fault, or of a healthy one."""
    case = Case(cause, DRAFTER, 0.0, SEED)
    prompts = set_up(pair, case, requests).prompts
    lengths = [len(encode_prompt(pair.target, prompt.users[0])) for prompt in prompts]
    # So long that the blocks of the last rounds are whole.
    decoded = decode_case(pair, case, requests, TOKENS + SLOTS)
    return requests_of(decoded, lengths, end_tokens(pair.target))


def requests_of(
    decoded: Decoded, prompt_tokens: Sequence[int], ends: Collection[int]
) -> list[Request]:
    """The requests of a decoding run whose answers are cut at ``TOKENS``."""
    found = []
    for (number, domain), own in decoded.trace.groupby(["prompt", "domain"], sort=True):
        rounds = own.groupby("round")
        begin = rounds["position"].min().to_numpy()
        kept = begin < TOKENS
        # A round's last token is the target's own.
        accepted = np.minimum(rounds["accepted"].sum().to_numpy(), TOKENS - 1 - begin)
        confidence = own.pivot(index="round", columns="slot", values="confidence").to_numpy()
        found.append(
            Request(
                name=f"request-{number + 1:03d}",
                domain=domain,
                prompt_tokens=prompt_tokens[number],
                output_tokens=len(up_to_end(decoded.tokens[number][:TOKENS], ends)),
                before=prompt_tokens[number] + begin[kept],
                accepted=accepted[kept],
                confidence=confidence[kept],
            )
        )
    return found


def faulty_files(requests: Sequence[Request]) -> dict[str, bytes]:
    """What is written of the server with the fault, by the name of the file."""
    rounds = [one.rounds for one in requests]
    lines = write.vllm_requests(rounds, SLOTS, _vllm_fields(requests), detailed=False)
    return {"stale.jsonl": lines.encode(), "stale_dump.json.gz": _dump(requests)}


def healthy_files(requests: Sequence[Request]) -> dict[str, bytes]:
    """What is written of the healthy server, by the name of the file."""
    rounds = [one.rounds for one in requests]
    tokens = [one.output_tokens for one in requests]
    asked = [one.prompt_tokens for one in requests]
    domains = list(dict.fromkeys(one.domain for one in requests))
    by_domain = [
        write.pooled([one.rounds for one in requests if one.domain == domain]) for domain in domains
    ]
    every = range(0, len(rounds), write.INTERVAL)
    intervals = [write.pooled(rounds[n : n + write.INTERVAL]) for n in every]
    usage = _usage(requests)
    named = [{"id": one.name, "created": _created(n)} for n, one in enumerate(requests)]
    flat = [{"id": one.name} | own for one, own in zip(requests, usage, strict=True)]
    aiperf = [
        {"x_request_id": one.name, "request_start_ns": 10**9 * _created(n)}
        | {"tokens": one.output_tokens}
        for n, one in enumerate(requests)
    ]
    answers = [one | {"usage": own} for one, own in zip(named, usage, strict=True)]
    bench = {"input_lens": asked, "output_lens": tokens}
    texts = {
        "vllm_requests.jsonl": write.vllm_requests(rounds, SLOTS, _vllm_fields(requests)),
        "vllm.log": write.vllm_log(intervals, SLOTS),
        "vllm_metrics.txt": write.vllm_metrics([write.pooled(rounds)], SLOTS),
        "vllm_bench.json": write.vllm_bench(rounds, SLOTS, **bench) + "\n",
        "aiperf.jsonl": write.aiperf(rounds, SLOTS, aiperf),
        "sglang.log": write.sglang_log(rounds, SLOTS, RUNNING),
        "sglang_requests.jsonl": write.sglang_meta(rounds, SLOTS, flat),
        "trtllm_requests.jsonl": write.trt_requests(rounds, SLOTS, answers),
        "trtllm_iterations.jsonl": write.json_lines(*write.trt_rows(rounds, RUNNING)),
        "trtllm_metrics.txt": write.trt_metrics(rounds, SLOTS),
        "llama_cpp.log": write.llama_log(rounds, SLOTS),
        "llama_cpp.jsonl": write.llama_timings(rounds, SLOTS, tokens, named),
        "llama_cpp_metrics.txt": write.llama_metrics(rounds, SLOTS),
        "speculators.csv": write.speculators(by_domain, SLOTS, domains),
        "deepspec.json": write.deepspec(rounds, SLOTS, scores(requests), "pocket") + "\n",
        "automodel.json": write.automodel(rounds, SLOTS) + "\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    return files | {"sglang_dump.json.gz": _dump(requests)}


def scores(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """How well each slot's confidence, times those before it, predicts that all are accepted."""
    reached = np.cumprod(np.concatenate([one.confidence for one in requests]), axis=1)
    accepted = np.concatenate([one.accepted for one in requests])
    found = []
    for slot in range(SLOTS):
        predicted, outcome = reached[:, slot], (accepted > slot).astype(float)
        figures = {
            "ece": expected_calibration_error(predicted, outcome),
            "auc": auroc(predicted, outcome),
            "brier": brier(predicted, outcome),
            "pred_mean": float(predicted.mean()),
        }
        found.append({name: round(value, DECIMALS) for name, value in figures.items()})
    return found


def _created(number: int) -> int:
    return int(write.START.timestamp()) + number


def _usage(requests: Sequence[Request]) -> list[dict[str, int]]:
    return [
        {"prompt_tokens": one.prompt_tokens, "completion_tokens": one.output_tokens}
        for one in requests
    ]


def _vllm_fields(requests: Sequence[Request]) -> list[dict[str, Any]]:
    return [
        {"id": one.name, "created": _created(n), "temperature": 0.0, "domain": one.domain}
        | {"usage": usage}
        for n, (one, usage) in enumerate(zip(requests, _usage(requests), strict=True))
    ]


def _dump(requests: Sequence[Request]) -> bytes:
    """SGLang's debug record, without the drafted tokens, which would tell the answers."""
    others = []
    for number, one in enumerate(requests):
        place = {"rid": one.name, "req_pool_index": number % RUNNING}
        rows = zip(one.before, one.confidence, np.cumprod(one.confidence, axis=1), strict=True)
        others.append(
            [
                place
                | {"prefix_len": int(before)}
                | {"confidence": own.round(DECIMALS).tolist()}
                | {"survival": product.round(DECIMALS).tolist()}
                for before, own, product in rows
            ]
        )
    rounds = [one.rounds for one in requests]
    text = write.sglang_dump(rounds, SLOTS, others, RUNNING, "static")
    return gzip.compress(text.encode(), mtime=0)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with written_whole(folder / name) as path:
            path.write_bytes(content)


def main() -> None:
    # A second thread changes the bits of a sum.
    torch.set_num_threads(1)
    pair = load_pair()
    write_files(faulty_files(serve(pair, FAULT)) | healthy_files(serve(pair, "")), RECORDS)
    complete_folder(SHIPPED_CHATS)


if __name__ == "__main__":
    main()
