"""Speculative against plain decoding: the same target, the same prompts, one prompt at a time.

All take turns, prompt by prompt: with the drafter, without it, and transformers' own ``generate``,
as a check that the plain loop is no straw man. The pocket pair always, SmolLM2 where it is there.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.measure import seconds
from dspark_lab.decoding import decode, encode_prompt
from dspark_lab.pairs import Pair, load_pair, question
from dspark_lab.serving import speed_table

# Prompts, tokens of each answer, runs over all of them.
SIZES = {"pocket": (12, 64, 5), "smollm2": (4, 48, 3)}


def run() -> Iterator[str]:
    for name in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                pair = load_pair(name, dtype=dtype)
            except (FileNotFoundError, OSError) as error:
                yield f"{name}: left out, {error}"
                continue
            for temperature in (0.0, 1.0):
                runs = measured(pair, temperature, *SIZES[name])
                yield f"{name}, {str(dtype)[6:]}, temperature {temperature:.0f}: " + _line(runs)


def measured(
    pair: Pair, temperature: float, prompts: int, tokens: int, runs: int
) -> list[dict[str, float]]:
    """The speed table of each run, and in it the gain over ``generate``."""
    step = len(pair.held_out) // prompts
    questions = [question(chat) for chat in pair.held_out[::step]][:prompts]
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": tokens}
    tables = []
    for drafter in (None, pair.drafter):
        decode(pair.target, drafter, questions[:1], **options)
    for seed in range(runs):
        plain, drafted, generated = [], [], [0, 0.0]
        for prompt in questions:
            plain.append(decode(pair.target, None, [prompt], seed=seed, **options))
            drafted.append(decode(pair.target, pair.drafter, [prompt], seed=seed, **options))
            count, spent = _generate(pair, prompt, temperature, tokens, seed)
            generated = [generated[0] + count, generated[1] + spent]
        table = dict(speed_table(plain, drafted, pair.drafter.config.block_size))
        table["against_generate"] = table["tokens_per_second"] * generated[1] / generated[0]
        tables.append(table)
    return tables


def _line(tables: list[dict[str, float]]) -> str:
    tables = sorted(tables, key=lambda table: table["speedup"])
    middle = tables[len(tables) // 2]
    gains, checks = (sorted(t[name] for t in tables) for name in ("speedup", "against_generate"))
    return (
        f"{middle['tokens_per_second']:.0f} tokens/s, plain "
        f"{middle['plain_tokens_per_second']:.0f}: {middle['speedup']:.2f} x "
        f"({gains[0]:.2f} to {gains[-1]:.2f}), generate {checks[len(checks) // 2]:.2f} x "
        f"({checks[0]:.2f} to {checks[-1]:.2f}); tau {middle['tau']:.2f}; draft "
        f"{middle['draft']:.0%}, verify {middle['verify']:.0%}, rest {middle['rest']:.0%}; "
        f"breaks even at tau {middle['break_even_tau']:.2f}, rate {middle['break_even_rate']:.2f}"
    )


def _generate(
    pair: Pair, prompt: str, temperature: float, tokens: int, seed: int
) -> tuple[int, float]:
    """Tokens and seconds of transformers' ``generate``, the prompt's prefill included."""
    ids = torch.tensor([encode_prompt(pair.target, prompt)], device=pair.target.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    torch.manual_seed(seed)
    answers = []

    @torch.inference_mode()
    def call() -> None:
        model: Any = pair.target.model
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=0,
            **({"do_sample": False} | sampling),
        )
        answers.append(answer.shape[1] - ids.shape[1])

    spent = seconds(call)
    return answers[0], spent
