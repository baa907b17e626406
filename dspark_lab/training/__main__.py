"""Train a drafter: python -m dspark_lab.training, or under torchrun with -m dspark_lab.training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dspark_lab.chats import Like
from dspark_lab.model import MarkovKind, load_drafter, load_target
from dspark_lab.training.config import TrainConfig
from dspark_lab.training.data import encode_chats
from dspark_lab.training.loop import train
from dspark_lab.training.processes import Parallel
from dspark_lab.training.start import mask_token_id, new_drafter
from dspark_lab.training.state import History, checkpoints

PROGRAM = "python -m dspark_lab.training"


@dataclass(frozen=True)
class Options:
    """Train a drafter for a target; the same command goes on where it stopped.

    Args:
        out: folder of the run, new or to go on with.
        training: the settings of the run.
        target: a folder or a hub id.
        data: file of conversations; the shipped ones where not given.
        held_out: file of conversations to evaluate on.
        features: ask the target for every batch, or store its features first.
        cache: folder of stored features, by default OUT/features.
        device: of target and drafter.
        target_dtype: of the target's weights.
        parallel: under torchrun, by default ddp.
        compile: run the drafter through torch.compile.
        drafter: a checkpoint to start from; its shape stands instead of the options that follow.
        layers: layers of a new drafter.
        block_size: slots of a block.
        sample_from_anchor: whether the first slot predicts; else it is the anchor's own.
        markov_rank: rank of the Markov head, 0 for none.
        markov_head: kind of the Markov head.
        layer_ids: layers of the target to read, such as 1,8,15; by default spread evenly.
        mask_token: by default the tokenizer's, or the last token that no conversation has.
        like: supervise what this trainer does with the conversations, its rows and its mask.
    """

    out: Path
    training: Annotated[TrainConfig, tyro.conf.arg(name="")]
    target: str = "smollm2"
    data: Path | None = None
    held_out: Path | None = None
    features: Literal["live", "cached"] = "live"
    cache: Path | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    target_dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["ddp", "fsdp2"] | None = None
    compile: bool = False
    drafter: str | None = None
    layers: int = 2
    block_size: int = 7
    sample_from_anchor: bool = True
    markov_rank: int = 64
    markov_head: MarkovKind = "vanilla"
    layer_ids: str | None = None
    mask_token: str | None = None
    like: Like | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; under torchrun one process of many."""
    try:
        options = tyro.cli(Options, prog=PROGRAM, args=arguments)
        parallel: Parallel = options.parallel or ("ddp" if "LOCAL_RANK" in os.environ else "none")
        with ExitStack() as stack:
            if parallel != "none":
                cuda = options.device.startswith("cuda")
                if cuda:
                    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                torch.distributed.init_process_group("nccl" if cuda else "gloo")
                stack.callback(torch.distributed.destroy_process_group)
            history = _train(options, parallel)
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    if history.interrupted:
        sys.exit(f"stopped, with {checkpoints(history.out)[-1]}; the same command goes on")


def _train(options: Options, parallel: Parallel) -> History:
    config = options.training
    layer_ids = _layer_ids(options.layer_ids) if options.layer_ids else None
    dtype = getattr(torch, options.target_dtype)
    target = load_target(options.target, device=options.device, dtype=dtype)
    tokenizer, length = target.tokenizer, config.max_length
    chats = encode_chats(options.data, tokenizer, length, options.like)
    held_out = encode_chats(options.held_out, tokenizer, length) if options.held_out else []
    torch.manual_seed(config.seed)
    if options.drafter:
        drafter = load_drafter(options.drafter, target=target, dtype=torch.float32)
    else:
        drafter = new_drafter(
            target,
            mask_token_id=mask_token_id(options.mask_token, target, chats),
            num_hidden_layers=options.layers,
            block_size=options.block_size,
            sample_from_anchor=options.sample_from_anchor,
            markov_rank=options.markov_rank,
            markov_head_type=options.markov_head,
            target_layer_ids=layer_ids,
            num_anchors=config.num_anchors,
        )
    return train(
        drafter,
        target,
        chats,
        config,
        out=options.out,
        held_out=held_out,
        features=options.features,
        cache=options.cache,
        parallel=parallel,
        compile=options.compile,
    )


def _layer_ids(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"layer_ids must be integers with commas between, got {text!r}") from None


if __name__ == "__main__":
    main()
