"""How noisy gradients are as a drafter of the pocket target learns, on each mix of conversations.

python -m data.make.noise                        noise-all.* and noise-code.* in data/pocket
python -m data.make.noise --conversations 128    with narrower intervals

A drafter of 15 slots trains as those of the judged sweep do, with 8 rows of 16 anchors. The noise
of its gradients is measured before the first step, after 100 and after 400, for every block size of
that sweep and for each slot. An interrupted command goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dspark_lab.chats import Encoded
from dspark_lab.files import DATA
from dspark_lab.pairs import load_pair
from dspark_lab.training import encode_chats, mask_token_id, new_drafter, train
from dspark_lab.tuning import ALL, NOISE_RUN, NOISE_STEPS, SweepConfig, measure_noise, save_noise

# The learning rate falls over so many steps, as many as a few minutes pay for, so that after the
# last measurement it is still nearly at its highest.
SCHEDULE = 2000


def measure(
    mix: str,
    stages: Sequence[int],
    conversations: int,
    out: Path,
    work: Path,
    rows: int = NOISE_RUN[0],
    anchors: int = NOISE_RUN[1],
    block_sizes: Sequence[int] = SweepConfig.block_sizes,
) -> None:
    """Write ``noise-<mix>-<step>.safetensors`` for each stage that ``out`` does not have yet."""
    pair = load_pair("pocket")
    training = replace(
        SweepConfig.training,
        steps=max(SCHEDULE, *stages),
        warmup_steps=max(SCHEDULE, *stages) // 20,
        batch_size=rows,
        num_anchors=anchors,
    )
    chats = encode_chats(pair.chats, pair.target.tokenizer, training.max_length)
    own: Sequence[Encoded] = [one for one in chats if mix in (ALL, one.domain)]
    for stage in stages:
        path = out / f"noise-{mix}-{stage}.safetensors"
        if path.exists():
            continue
        torch.manual_seed(training.seed)
        mask = mask_token_id(None, pair.target, chats)
        sizes: dict[str, Any] = {"block_size": max(block_sizes), "num_anchors": anchors}
        drafter = new_drafter(pair.target, mask_token_id=mask, **sizes)
        if stage:
            options: dict[str, Any] = {
                "features": "cached",
                "cache": work / "features",
                "until": stage,
            }
            train(drafter, pair.target, own, training, out=work / mix, **options)
        noise = measure_noise(
            *(drafter, pair.target, own, training),
            conversations=conversations,
            block_sizes=block_sizes,
            by_slot=True,
        )
        save_noise(noise, path)
        print(f"{path}\n{noise.table().round(2).to_string(index=False)}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", nargs="*", default=[ALL, "code"])
    parser.add_argument("--steps", nargs="*", type=int, default=NOISE_STEPS)
    parser.add_argument("--conversations", type=int, default=96)
    parser.add_argument("--work", type=Path, default=Path("build/noise"))
    parser.add_argument("--out", type=Path, default=DATA / "pocket")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for mix in options.mixes:
        measure(mix, sorted(options.steps), options.conversations, options.out, options.work)


if __name__ == "__main__":
    main()
