"""Faults between training and serving, planted in a shipped pair's decoding.

    python -m data.make.planted        writes data/pocket/signatures.csv; goes on where it stopped

A case is decoded with one fault, or none, and written as a server would: a line of JSON for each
request, with the histogram of its rounds by accepted tokens. Its signature is what its figures
differ by from those of a healthy record, of other questions. Questions are new ones, filled into
the templates of the shipped conversations' prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.make.generate import Prompt, distinct_prompts, make_prompts
from data.make.recipes import POCKET_TEMPLATES
from dspark_lab.decoding import Decoded, Verdict, decode, loop
from dspark_lab.decoding.text import end_tokens, up_to_end
from dspark_lab.files import DATA, written_whole
from dspark_lab.model import Drafter, Target
from dspark_lab.model.layers import rope
from dspark_lab.pairs import Pair, load_pair
from dspark_lab.records import FIGURES, HEALTHY, AcceptanceRecord, figures_of, load_acceptance

# Requests of a record, and tokens of an answer that are decoded.
REQUESTS, TOKENS = 300, 64
# What a server drafts, whatever the drafter's block.
SLOTS = 7
# What signatures are learned on: other drafters, questions and seeds than those reported on.
DRAFTERS, TEMPERATURES = ("dspark-k15", "gated-k7", "dflash-k15"), (0.0, 1.0)
CASES, HEALTHY_CASES = 3, 8
SEED = 100_000


@dataclass(frozen=True)
class Case:
    """``cause``: one of :data:`FAULTS`, or "" for a healthy server, which ``seed`` varies."""

    cause: str
    drafter: str
    temperature: float
    seed: int
    pair: str = "pocket"


@dataclass
class Setup:
    """What decodes a case: everything that a fault may change."""

    target: Target
    drafter: Drafter
    prompts: list[Prompt]
    options: dict[str, Any]
    patches: list[Any]
    encoded: Callable[[str], Any] = str


def plant(pair: Pair, case: Case, requests: int = REQUESTS) -> AcceptanceRecord:
    """What a server with the fault of a case writes, read again."""
    decoded = decode_case(pair, case, requests)
    lines = record_lines(decoded, case, end_tokens(pair.target))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "server.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return load_acceptance(path)


def decode_case(pair: Pair, case: Case, requests: int = REQUESTS, tokens: int = TOKENS) -> Decoded:
    """Answers of up to so many ``tokens`` to so many requests."""
    setup = set_up(pair, case, requests, tokens)
    with ExitStack() as stack:
        for one in setup.patches:
            stack.enter_context(one)
        return decode(
            setup.target,
            setup.drafter,
            [setup.encoded(prompt.users[0]) for prompt in setup.prompts],
            domains=[prompt.domain for prompt in setup.prompts],
            batch_size=min(100, requests),
            **setup.options,
        )


def set_up(pair: Pair, case: Case, requests: int = REQUESTS, tokens: int = TOKENS) -> Setup:
    """What decodes a case, on questions drawn from all templates."""
    rng = random.Random(f"{case.seed}")
    if pair.name == "pocket":
        pool = distinct_prompts(POCKET_TEMPLATES, 40, case.seed)
    else:
        pool = make_prompts(4 * requests, case.seed, follow_up_share=0)
    options = {"temperature": case.temperature, "seed": case.seed, "draft_length": SLOTS}
    options["max_new_tokens"] = tokens
    drafter = pair.load_drafter(case.drafter)
    setup = Setup(pair.target, drafter, rng.sample(pool, requests), options, [])
    if case.cause:
        FAULTS[case.cause](setup, rng)
    return setup


def record_lines(decoded: Decoded, case: Case, ends: set[int]) -> list[str]:
    """What vLLM writes of each request, with the temperature that it was told.

    An answer's tokens are those up to its end of turn, one of ``ends``.
    """
    lines = []
    for request, rounds in decoded.rounds.groupby("prompt", sort=True):
        request = int(request)
        histogram = rounds["accepted"].value_counts().reindex(range(SLOTS + 1), fill_value=0)
        counts = {"acceptance_histogram": histogram.tolist(), "num_spec_steps": len(rounds)}
        counts["num_accepted_draft_tokens"] = int(rounds["accepted"].sum())
        # Servers draft whole blocks, at the end of an answer, too.
        counts["num_draft_tokens"] = SLOTS * len(rounds)
        row = {
            "request_id": f"{case.seed}-{request}",
            "temperature": case.temperature,
            "usage": {"completion_tokens": len(up_to_end(decoded.tokens[request], ends))},
            "metrics": {"speculative_decoding": counts},
        }
        lines.append(json.dumps(row))
    return lines


def _same_weights(setup: Setup, **changes: Any) -> None:
    """The drafter's weights, read by another configuration."""
    old = setup.drafter
    new = Drafter(replace(old.config, **changes)).to(old.device, old.dtype)
    new.load_state_dict(old.state_dict(), strict=False)
    new.embed_tokens.weight, new.lm_head.weight = old.embed_tokens.weight, old.lm_head.weight
    setup.drafter = new.eval()


def _layout(setup: Setup, rng: random.Random) -> None:
    """A block is read as that of the other layout, with as many slots that predict."""
    given = setup.drafter.config.sample_from_anchor
    size = setup.drafter.config.predicted + given
    _same_weights(setup, sample_from_anchor=not given, block_size=size)


def _layers(setup: Setup, rng: random.Random) -> None:
    """Context features of the next layers, or of those before."""
    step = rng.choice((-1, 1))
    ids = [number + step for number in setup.drafter.config.target_layer_ids]
    _same_weights(setup, target_layer_ids=ids)


def _window(setup: Setup, rng: random.Random) -> None:
    """Layers see a window of the context alone."""
    kinds = ["sliding_attention"] * setup.drafter.config.num_hidden_layers
    width = rng.choice((4, 8, 16))
    _same_weights(setup, layer_types=kinds, sliding_window=width, is_causal=False)


class _Stale(loop.Decoding):
    """The drafter's cache keeps what was rejected, too."""

    def _commit(self, verdict: Verdict, accepted: list[int], context: Tensor) -> None:
        self._anchors = verdict.next_token
        kept = self._keep_going([count + 1 for count in accepted])
        if kept:
            self._read_context(context[kept], [context.shape[1]] * len(kept))


def _stale(setup: Setup, rng: random.Random) -> None:
    start = setup.drafter.start_cache
    room = setup.options["max_new_tokens"] * (SLOTS + 1)
    setup.patches.append(patch.object(loop, "Decoding", _Stale))
    setup.patches.append(
        patch.object(
            setup.drafter, "start_cache", lambda rows, capacity: start(rows, capacity + room)
        )
    )


class _GreedyDrafts(loop.Decoding):
    def _draft(self, room: Sequence[int]) -> Any:
        asked = self.settings
        self.settings = replace(asked, temperature=0.0, top_p=1.0)
        try:
            return super()._draft(room)
        finally:
            self.settings = asked


def _greedy(setup: Setup, rng: random.Random) -> None:
    """The drafter takes its likeliest token, the target samples."""
    setup.patches.append(patch.object(loop, "Decoding", _GreedyDrafts))


def _temperature(setup: Setup, rng: random.Random) -> None:
    """Answers are drawn in another way than the record says."""
    if setup.options["temperature"] > 0:
        others = [{"temperature": 0.0}, {"temperature": 0.3}, {"top_p": 0.5}]
    else:
        others = [{"temperature": 1.0}, {"temperature": 0.8}]
    setup.options |= rng.choice(others)


def _template(setup: Setup, rng: random.Random) -> None:
    """Prompts as another template writes them."""
    tokenizer = setup.target.tokenizer
    assert tokenizer is not None
    form = rng.choice(
        (
            "User: {}\nAssistant:",
            "<s>[INST] {} [/INST]",
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        )
    )
    setup.encoded = lambda question: tokenizer(form.format(question))["input_ids"]


def _end_of_turn(setup: Setup, rng: random.Random) -> None:
    """Answers go on behind their end, and all of their rounds count."""
    setup.options["end_ids"] = []


def _quantised(setup: Setup, rng: random.Random) -> None:
    """Four bits a weight of both models, with a scale for each matrix."""
    model = copy.deepcopy(setup.target.model)
    setup.drafter = copy.deepcopy(setup.drafter)
    _round_weights(model)
    _round_weights(setup.drafter)
    setup.target = Target(model, setup.target.tokenizer)


@torch.no_grad()
def _round_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().max() / 7
            module.weight.copy_((module.weight / scale).round() * scale)


def _positions(setup: Setup, rng: random.Random) -> None:
    """A block's slots stand one or more places too early or too late."""
    shift = rng.choice((-4, -2, 2, 4))
    propose = setup.drafter.propose

    def turned(positions: Tensor, *given: Any) -> Any:
        return rope(positions + shift, *given)

    def shifted(*given: Any) -> Any:
        with patch("dspark_lab.model.drafter.rope", turned):
            return propose(*given)

    setup.patches.append(patch.object(setup.drafter, "propose", shifted))


def _no_markov(setup: Setup, rng: random.Random) -> None:
    _same_weights(
        setup,
        markov_rank=0,
        markov_head_type="none",
        confidence_head_with_markov=False,
        enable_confidence_head=False,
    )


def _tokenizer(setup: Setup, rng: random.Random) -> None:
    """A share of the drafter's ids mean other tokens."""
    drafter = setup.drafter = copy.deepcopy(setup.drafter)
    size = drafter.config.vocab_size
    moved = rng.sample(range(size), round(size * rng.uniform(0.1, 0.3)))
    order = list(range(size))
    for place, token in zip(moved, moved[1:] + moved[:1], strict=True):
        order[place] = token
    tables: list[Any] = [drafter.embed_tokens, drafter.lm_head]
    if drafter.markov_head is not None:
        tables += [drafter.markov_head.markov_w1, drafter.markov_head.markov_w2]
    for table in tables:
        table.weight = nn.Parameter(table.weight.detach()[order], requires_grad=False)


def _harder(setup: Setup, rng: random.Random) -> None:
    """Half or more of the questions are of templates that neither model has learned."""
    count = len(setup.prompts)
    new = round(count * rng.uniform(0.5, 1.0))
    others = make_prompts(count, setup.options["seed"], follow_up_share=0)
    setup.prompts = others[:new] + setup.prompts[new:]


FAULTS: dict[str, Callable[[Setup, random.Random], None]] = {
    "block layout": _layout,
    "context layers": _layers,
    "window": _window,
    "stale cache": _stale,
    "greedy drafts": _greedy,
    "temperature": _temperature,
    "template": _template,
    "end of turn": _end_of_turn,
    "quantised": _quantised,
    "positions": _positions,
    "no Markov head": _no_markov,
    "tokenizer": _tokenizer,
    "harder prompts": _harder,
}


def possible(cause: str, drafter: Drafter, temperature: float) -> bool:
    """Whether a drafter can have a fault at a temperature."""
    if cause == "no Markov head":
        return drafter.config.has_markov_head
    return cause != "greedy drafts" or temperature > 0


def planned(drafters: Sequence[str], cases: int, healthy: int, seed: int) -> list[Case]:
    """So many cases of each fault, and healthy ones, at each drafter and temperature."""
    pair = load_pair()
    found: list[tuple[float, Case]] = []
    for name in drafters:
        drafter = pair.load_drafter(name)
        for temperature in TEMPERATURES:
            wanted = {cause: cases for cause in FAULTS if possible(cause, drafter, temperature)}
            for cause, count in ({"": healthy} | wanted).items():
                for number in range(count):
                    case = Case(cause, name, temperature, seed + len(found))
                    found.append((number / count, case))
    # One of each kind comes first: the work can be stopped at any time.
    return [case for _, case in sorted(found, key=lambda one: one[0])]


def healthy_case(drafter: str, temperature: float, seed: int) -> Case:
    """What cases of a drafter at a temperature are held against: as many other questions."""
    return Case("", drafter, temperature, seed + 50_000 + round(10 * temperature))


@lru_cache
def _healthy(drafter: str, temperature: float) -> AcceptanceRecord:
    return plant(load_pair(), healthy_case(drafter, temperature, SEED))


def _signature(case: Case) -> dict[str, Any]:
    torch.set_num_threads(1)
    pair, healthy = load_pair(), _healthy(case.drafter, case.temperature)
    record = plant(pair, case)
    difference = figures_of(record) - figures_of(healthy)
    told: dict[str, Any] = {"cause": case.cause or HEALTHY, "drafter": case.drafter}
    told |= {"temperature": case.temperature, "seed": case.seed}
    told |= {"tau": round(record.tau, 4), "healthy": round(healthy.tau, 4)}
    return told | dict(zip(FIGURES, difference.round(4).tolist(), strict=True))


def work_through(
    cases: Sequence[Case], judge: Callable[[Case], dict[str, Any]], work: Path | None = None
) -> list[dict[str, Any]]:
    """What ``judge`` says of each case, in two processes; ``work`` keeps it, line by line.

    Cases whose seed is in ``work`` already are not decoded again.
    """
    done = [json.loads(line) for line in work.open()] if work and work.exists() else []
    known = {one["seed"] for one in done}
    left = [case for case in cases if case.seed not in known]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for found in tqdm(processes.map(judge, left), total=len(left), unit="case", disable=None):
            done.append(found)
            if work is not None:
                with work.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    wanted = {case.seed for case in cases}
    return [one for one in done if one["seed"] in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("signatures.jsonl"))
    given = parser.parse_args()
    done = work_through(planned(DRAFTERS, CASES, HEALTHY_CASES, SEED), _signature, given.work)
    done.sort(key=lambda one: one["seed"])
    with written_whole(DATA / "pocket" / "signatures.csv") as path:
        pd.DataFrame(done).to_csv(path, index=False)


if __name__ == "__main__":
    main()
