"""Model cards of the shipped pairs: every number in them is measured or read from a run's notes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dspark_lab.rates import compare_drafters, drafter_table

MACHINE = "two x86-64 cores, no GPU"


def markdown_table(table: pd.DataFrame) -> str:
    """A table as Markdown, numbers on the right."""
    numeric = [pd.api.types.is_numeric_dtype(table[name]) for name in table.columns]
    lines = [
        "| " + " | ".join(map(str, table.columns)) + " |",
        "| " + " | ".join("--:" if right else "---" for right in numeric) + " |",
    ]
    rows = table.itertuples(index=False)
    return "\n".join([*lines, *("| " + " | ".join(map(_text, row)) + " |" for row in rows)])


def tau_lines(evaluations: Mapping[str, pd.DataFrame], what: str = "drafter") -> str:
    """Tau of each drafter, or of ``what`` else, over all and by domain, with its 95 % interval."""
    table = drafter_table(evaluations).rename(columns={"drafter": what})
    table["tau (95 %)"] = [_with_interval(*row) for row in table[["tau", "low", "high"]].to_numpy()]
    wide = table.pivot(index=what, columns="domain", values="tau (95 %)")
    order = list(dict.fromkeys(table["domain"]))
    return markdown_table(wide.loc[list(evaluations), order].reset_index())


def conversations_lines(evaluations: Mapping[str, pd.DataFrame]) -> str:
    """How many conversations and blocks each drafter was evaluated on, drafters alike together."""
    drafters: dict[tuple[int, int], list[str]] = {}
    for name, table in evaluations.items():
        drafters.setdefault((len(table), int(table["blocks"].sum())), []).append(name)
    return "; ".join(
        f"{conversations} with {blocks:,} such blocks for {', '.join(names)}"
        for (conversations, blocks), names in drafters.items()
    )


def code_commit() -> str:
    """The commit of the working tree that makes the files, for the card."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def gain_lines(
    evaluations: Mapping[str, pd.DataFrame], pairs: Mapping[str, tuple[str, str]]
) -> str:
    """How much larger the first drafter's tau is than the second's, paired by conversation."""
    rows = []
    for name, (ours, baseline) in pairs.items():
        gain = compare_drafters(evaluations[ours], evaluations[baseline])
        interval = f"{gain['low']:+.1f} to {gain['high']:+.1f}"
        rows.append((name, f"{gain['gain_percent']:+.1f} % ({interval})"))
    return markdown_table(pd.DataFrame(rows, columns=["comparison", "gain in tau"]))


def pocket_card(
    target: Mapping[str, Any],
    drafters: Mapping[str, Mapping[str, Any]],
    evaluations: Mapping[str, pd.DataFrame],
) -> str:
    """The card of ``data/pocket``.

    Args:
        target: ``facts.json`` of the target.
        drafters: ``facts.json`` of each drafter's run.
        evaluations: of each drafter, from :func:`dspark_lab.rates.evaluate`.
    """
    rows = [
        (name, facts["steps"], f"{facts['slots']:,}", round(facts["seconds"] / 60, 1))
        for name, facts in drafters.items()
    ]
    runs = pd.DataFrame(rows, columns=["drafter", "steps", "slots seen", "minutes"])
    gains = {
        "vanilla Markov head, K 7": ("dspark-k7", "dflash-k7"),
        "vanilla Markov head, K 15": ("dspark-k15", "dflash-k15"),
        "gated against vanilla, K 7": ("gated-k7", "dspark-k7"),
        "rnn against vanilla, K 7": ("rnn-k7", "dspark-k7"),
    }
    gains = {n: p for n, p in gains.items() if p[0] in evaluations and p[1] in evaluations}
    return f"""# The pocket pair

A language model small enough to train in minutes on a laptop, and drafters for it. Its answers read as text on the topics of the lab's prompts; they are not to be believed.

| folder | what it is |
| --- | --- |
| `target/` | a Llama of {target["parameters"] / 1e6:.1f} million parameters, BPE vocabulary of {target["vocabulary"]:,}, bfloat16 |
| `dspark-k7/`, `dspark-k15/` | DSpark with a vanilla Markov head, blocks of 7 and 15 |
| `dflash-k7/`, `dflash-k15/` | the same without Markov head |
| `gated-k7/`, `rnn-k7/` | gated and RNN Markov head, blocks of 7 |
| `train.jsonl` | the conversations that the drafters learned from |
| `held_out.jsonl` | conversations whose questions neither target nor drafters have seen |
| `traces.parquet` | what each drafter drafted for 120 held-out questions, greedy and at temperature 1, slot by slot |
| `signatures.csv` | how the figures of a server's record change with each of thirteen faults, planted in decoding with three of the drafters; made by `python -m data.make.planted` |
| `runs.parquet` | drafters trained for 20 seconds, one and three minutes over mixes of conversations, rows, anchors and block size, with the course of each: advice for training is judged on them (`python -m dspark_lab.tuning.sweep --mixes all code`) |
| `learned.json` | what the runs of one seed teach of how tau grows and of how learning curves go on: forecasts and pilots of other data begin with it (`python -m data.make.learned`) |
| `noise-all-*.safetensors`, `noise-code-*.safetensors` | how gradients vary between conversations and between anchors on either mix, before the first step, after 100 and after 400 (`python -m data.make.noise`) |
| `engine.csv` | seconds of the target's steps, of drafting and of the rest of a round, by tokens and requests, two x86-64 cores, one thread (`python -m data.make.recipes pocket --engine`) |

## Target

Trained from scratch on {target["conversations"]:,} conversations of SmolLM2-135M-Instruct, {target["tokens"]:,} tokens of its own vocabulary, {target["tokens_seen"]:,} tokens seen in all, {round(target["seconds"] / 60)} minutes. Then its logits were divided by {target["temperature"]} for good (folded into its last norm): sampled at temperature 1 it talks as the trained model does at {target["temperature"]}.

Perplexity on the answers of {target["held_out_conversations"]} held-out conversations of SmolLM2, per token of this vocabulary: **{target["trained_perplexity"]}** as trained, {target["held_out_perplexity"]} after the division.

## Drafters

Two layers of the target's own shape, started from its last two, trained on the target's own answers at temperature 1, all alike and on equally many slots:

{markdown_table(runs)}

Tau, teacher-forced at temperature 1, on the held-out conversations that have a block whose every slot is supervised: {conversations_lines(evaluations)}. In brackets the 95 % interval over conversations:

{tau_lines(evaluations)}

Gain in tau, paired by conversation:

{gain_lines(evaluations, gains)}

## Recipe

```
python -m data.make.recipes pocket
```

does all of it, seed 0, and goes on where it stopped; the conversations take by far the longest. The times above are of {MACHINE}, other work on it. Another machine rounds otherwise and gets a target and drafters alike, not the same. Made by the code of commit {code_commit()}.

## Licence

Apache-2.0, as the project and SmolLM2 are.
"""


def smollm2_card(facts: Mapping[str, Any], evaluations: Mapping[str, pd.DataFrame]) -> str:
    """The card of ``data/smollm2``.

    Args:
        facts: of the run.
        evaluations: by how the answers were drawn, from :func:`dspark_lab.rates.evaluate`.
    """
    first = next(iter(evaluations.values()))
    return f"""# The drafter of SmolLM2-135M-Instruct

`dspark-k7/`: two layers of the target's own shape, {facts["parameters"] / 1e6:.1f} million weights in bfloat16, blocks of 7, vanilla Markov head of rank 64, confidence head. Embedding and LM head are the target's: `load_pair("smollm2")` fetches and converts it on first use.

`traces.parquet`: what it drafted for 120 held-out questions of the shipped conversations, greedy and at temperatures 0.7 and 1, slot by slot, answers of up to 64 tokens; `load_traces("smollm2")` reads it.

`engine.csv`: seconds of the target's steps, of drafting and of the rest of a round in fp32, by tokens and requests, two x86-64 cores, two threads (`python -m data.make.recipes smollm2 --engine`); `load_engine("smollm2")` reads it.

## Training

On {facts["conversations"]:,} conversations with the target's own answers, drawn at temperatures of 0.3 to 1 ({facts["supervised_tokens"]:,} answer tokens), {facts["slots"]:,} slots in {facts["steps"]} steps, {round(facts["seconds"] / 60)} minutes beside other work on {MACHINE}. It began with the weights of the target's last two layers. Both softmaxes were over the {facts["seen_tokens"]:,} tokens alone that occur in the conversations; the evaluation is over all 49,152.

## Results

Tau, teacher-forced at temperature 1, on the target's own answers to {len(first)} prompts of public benchmarks that were never trained on, by how those answers were drawn (about {int(first["blocks"].sum()):,} blocks each); in brackets the 95 % interval over conversations.

{tau_lines(evaluations, "answers")}

For comparison: published trainer code reached a tau of 1.35 after 400 steps of two conversations on the same kind of machine.

## Recipe

```
python -m data.make.recipes smollm2
```

with seed 0; it goes on where it stopped. Made by the code of commit {code_commit()}.

## Licence

Apache-2.0, as the project and SmolLM2 are.
"""


def _with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
