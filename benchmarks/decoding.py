"""Speculative against plain decoding: the same target, the same prompts, one prompt at a time.

The pocket pair always, SmolLM2 where it is installed. Both take turns, prompt by prompt.
"""

from collections.abc import Iterator

from dspark_lab.decode import decode
from dspark_lab.pairs import load_pair, question
from dspark_lab.speed import speed_table

PROMPTS, TOKENS, RUNS = 12, 96, 3


def run() -> Iterator[str]:
    for name in ("pocket", "smollm2"):
        try:
            pair = load_pair(name)
        except (FileNotFoundError, OSError) as error:
            yield f"{name}: left out, {error}"
            continue
        prompts = [question(chat) for chat in pair.held_out[:PROMPTS]]
        for temperature in (0.0, 1.0):
            tables = []
            for seed in range(RUNS):
                plain, drafted = [], []
                for prompt in prompts:
                    for drafter, kept in ((None, plain), (pair.drafter, drafted)):
                        answer = decode(
                            pair.target,
                            drafter,
                            [prompt],
                            temperature=temperature,
                            max_new_tokens=TOKENS,
                            seed=seed,
                        )
                        kept.append(answer)
                tables.append(speed_table(plain, drafted, pair.drafter.config.block_size))
            gains = sorted(table["gain"] for table in tables)
            middle = sorted(tables, key=lambda table: table["gain"])[RUNS // 2]
            yield (
                f"{name}, temperature {temperature:.0f}: "
                f"{middle['tokens_per_second']:.0f} tokens/s, "
                f"plain {middle['plain_tokens_per_second']:.0f}: {middle['gain']:.2f} x "
                f"({gains[0]:.2f} to {gains[-1]:.2f}); tau {middle['tau']:.2f}; "
                f"draft {middle['draft']:.0%}, verify {middle['verify']:.0%}, "
                f"rest {middle['rest']:.0%}; breaks even at tau {middle['break_even_tau']:.2f}, "
                f"a rate of {middle['break_even_rate']:.2f}"
            )
