"""The training loop: one process or many, killed at any moment and resumed.

    python -m dspark_lab.training.loop --target smollm2 --data chats.jsonl --out run --steps 1000
    torchrun --nproc-per-node 8 -m dspark_lab.training.loop --parallel fsdp2 ...

A step is ``accumulate`` micro-batches on each process. Its blocks are drawn first, so that every
micro-batch is divided by the summed weights of them all, on all processes: the step's gradient is
that of one joined batch, however the supervised slots fall.

What a step sees follows from (seed, step) alone and no random number is drawn elsewhere. So a run
that is resumed from a checkpoint needs no history, and on a CPU ends with the very weights of a run
that was never stopped. This file knows the order of things in a run; what a forward, an objective
or a checkpoint is, is known elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Batch, Chat, Encoded, collate, encode, load_chats, pack
from dspark_lab.checks import require_int, require_number
from dspark_lab.model import (
    Drafter,
    DrafterConfig,
    FeatureSource,
    MarkovKind,
    Sums,
    Target,
    cached_features,
    dspark_objective,
    live_features,
    load_drafter,
    load_target,
    save_drafter,
    slot_weights,
)
from dspark_lab.rates import bootstrap, evaluate, whole_block_anchors

if TYPE_CHECKING:
    import pandas

__all__ = [
    "History",
    "TrainConfig",
    "checkpoints",
    "init_from_target",
    "mask_token_id",
    "new_drafter",
    "train",
]

Parallel = Literal["none", "ddp", "fsdp2"]
METRICS = "metrics.jsonl"
_CHECKPOINT = "checkpoint-"


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.

    ``steps`` of ``batch_size`` conversations x ``accumulate`` micro-batches on each process, each
    conversation cut to ``max_length`` tokens, one to a row, or packed into rows of ``pack_length``.
    ``num_anchors`` blocks a row. AdamW with a linear warm-up, then ``schedule`` down to
    ``final_lr_ratio`` of ``learning_rate``. ``ce_only_fraction``: over this first part of the run
    the weights move from cross-entropy alone to the given ones. ``precision`` "bf16" has the matrix
    products in bfloat16, weights and sums in fp32. ``vocabulary`` "seen" takes both softmaxes over
    the tokens that occur in the conversations alone, which is an approximation, and as much faster
    as they are fewer; evaluations are always over all. ``evaluate_anchors`` blocks are evaluated of
    each held-out conversation. 0 for ``checkpoint_every`` or ``evaluate_every`` means at the end
    alone, 0 for ``clip_norm`` no clipping.

    Raises TypeError or ValueError for a value that cannot be.
    """

    steps: int
    batch_size: int = 8
    accumulate: int = 1
    num_anchors: int = 64
    max_length: int = 2048
    pack_length: int | None = None
    learning_rate: float = 6e-4
    warmup_steps: int = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_ratio: float = 0.05
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    ce_weight: float = 0.1
    l1_weight: float = 0.9
    confidence_weight: float = 1.0
    loss_decay_gamma: float = 4.0
    ce_only_fraction: float = 0.0
    vocabulary: Literal["full", "seen"] = "full"
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    evaluate_anchors: int = 32

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "num_anchors",
            "max_length",
            "keep_checkpoints",
            "evaluate_anchors",
        ):
            require_int(name, getattr(self, name), 1)
        for name in ("warmup_steps", "checkpoint_every", "evaluate_every", "seed"):
            require_int(name, getattr(self, name), 0)
        if self.pack_length is not None:
            require_int("pack_length", self.pack_length, self.max_length)
        for name, choices in (
            ("schedule", ("cosine", "linear", "constant")),
            ("precision", ("fp32", "bf16")),
            ("vocabulary", ("full", "seen")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("final_lr_ratio", "ce_only_fraction"):
            _require_number(name, getattr(self, name), 0, 1)
        for name in (
            "learning_rate",
            "weight_decay",
            "clip_norm",
            "ce_weight",
            "l1_weight",
            "confidence_weight",
        ):
            _require_number(name, getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            _require_number(name, getattr(self, name), 0, math.nextafter(1, 0))
        _require_number("loss_decay_gamma", self.loss_decay_gamma, sys.float_info.min)

    def learning_rate_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1}
        return self.learning_rate * (
            self.final_lr_ratio + (1 - self.final_lr_ratio) * left[self.schedule]
        )

    def term_weights_at(self, step: int) -> dict[str, float]:
        """The three terms' weights at a step."""
        turn = self.ce_only_fraction * self.steps
        share = 1.0 if turn == 0 else min(1.0, step / turn)
        return {
            "ce_weight": 1 - share + self.ce_weight * share,
            "l1_weight": self.l1_weight * share,
            "confidence_weight": self.confidence_weight * share,
        }


@dataclass
class History:
    """What a run wrote down, a dictionary for each line of its ``metrics.jsonl``."""

    out: Path
    rows: list[dict[str, Any]]
    interrupted: bool = False

    def table(self) -> pandas.DataFrame:
        """One row for each training step."""
        import pandas as pd

        return pd.DataFrame([row for row in self.rows if "loss" in row])

    def evaluations(self) -> pandas.DataFrame:
        """One row for each evaluation of the held-out conversations."""
        import pandas as pd

        return pd.DataFrame([row for row in self.rows if "held_out_tau" in row])

    def signs(self) -> dict[str, bool]:
        """Whether the run learns: its last tenth of steps, on average, against its first.

        Raises:
            ValueError: there are fewer than two steps.
        """
        steps = self.table()
        if len(steps) < 2:
            raise ValueError(f"signs need at least 2 steps, got {len(steps)}")
        tenth = max(1, len(steps) // 10)
        change = steps[-tenth:].mean() - steps[:tenth].mean()
        return {
            "loss fell": bool(change["loss"] < 0),
            "accept rate rose": bool(change["accept_rate"] > 0),
            "tau rose": bool(change["tau"] > 0),
        }


def train(
    drafter: Drafter,
    target: Target,
    chats: Sequence[Chat | Encoded],
    config: TrainConfig,
    *,
    out: str | os.PathLike[str],
    held_out: Sequence[Chat | Encoded] = (),
    features: Literal["live", "cached"] = "live",
    cache: str | os.PathLike[str] | None = None,
    parallel: Parallel = "none",
    resume: bool = True,
    progress: bool = True,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> History:
    """Trains ``drafter`` in place, on the target's device, in fp32 at least.

    Embedding and LM head become the target's own. ``out`` receives ``metrics.jsonl`` and
    ``checkpoint-<step>`` folders, each a drafter that :func:`dspark_lab.model.checkpoint.load_drafter`
    reads, with the optimiser's state beside it. Ctrl-C ends the run after the step it is in, with a
    checkpoint; the same call goes on from there.

    Args:
        drafter: its weights are the start, unless there is a checkpoint to resume from. With
            "fsdp2" it is left in shards, and the last checkpoint holds it whole.
        target: frozen.
        chats: conversations, encoded already or with the target's tokenizer here.
        config: the settings.
        out: made where it does not exist; all processes must see it.
        held_out: conversations to evaluate on.
        features: ask the target for every batch, or read them from ``cache``, where they lie in
            bfloat16 unless the target is float64.
        cache: folder for cached features, ``out/features`` where None.
        parallel: over the processes of ``torch.distributed``, which must be initialised; each calls
            this function with the same arguments.
        resume: go on from the last checkpoint in ``out``; else ``out`` must hold none.
        progress: whether to show a bar.
        on_metrics: called with each new line of the metrics, in the main process.

    Raises:
        TypeError, ValueError: settings that cannot be, a checkpoint of other settings or data, or
            no conversation to train on or to evaluate.
        FloatingPointError: a gradient that is not finite; the weights are those before it.
        OSError: ``out`` cannot be written or the disk is full; earlier checkpoints are intact.
    """
    out = Path(out)
    tokens = [_encoded(chat, target, config) for chat in chats]
    others = [_encoded(chat, target, config) for chat in held_out]
    if len(tokens) < config.batch_size:
        raise ValueError(
            f"batch_size must be at most the number of conversations, {len(tokens)}, "
            f"got {config.batch_size}"
        )
    if others:
        _require_whole_block(others, drafter.config.block_size)
    drafter.to(target.device, torch.promote_types(drafter.fc.weight.dtype, torch.float32))
    drafter.use_target_embeddings(target.embed_weight, target.head_weight)
    drafter.train()
    world = _World(parallel)
    run = _Run(drafter, config, tokens, out, world)
    rows = run.start(resume)
    source = _source(target, tokens, drafter, features, cache or out / "features", progress)
    order = _Order(tokens, config, world, _pad_token_id(target))
    every = config.checkpoint_every or config.steps
    look = config.evaluate_every or config.steps
    stopped = False
    with (
        _Lines(out / METRICS if world.main else None) as lines,
        _interrupts() as interrupts,
        tqdm(
            total=config.steps,
            initial=run.step,
            desc="train",
            disable=not (progress and world.main),
        ) as bar,
    ):

        def record(row: dict[str, Any]) -> None:
            rows.append(row)
            lines.write(row)
            if on_metrics is not None and world.main:
                on_metrics(row)

        while run.step < config.steps and not stopped:
            row, stopped = run.advance(order, source, interrupts)
            record(row)
            bar.set_postfix(
                {name: f"{row[name]:.3f}" for name in ("loss", "accept_rate", "tau")}, refresh=False
            )
            bar.update()
            done = run.step == config.steps
            if others and (done or run.step % look == 0):
                record(_evaluation(run, target, others))
            if done or stopped or run.step % every == 0:
                run.save()
    drafter.eval()
    return History(out, rows, run.step < config.steps)


@torch.no_grad()
def init_from_target(drafter: Drafter, target: Target) -> None:
    """Starts a drafter from the target's own weights where shapes agree, before training.

    Its layers take the weights of the target's last ones of the same names, its final norm that of
    the target, and ``fc`` begins as the mean of the context layers where widths agree. A start, not
    an approximation: the drafter's layers see other inputs than those of the target.
    """
    own = dict(drafter.named_parameters())
    count, layers = drafter.config.num_hidden_layers, target.num_layers
    for name, weight in target.model.base_model.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) - layers + count)
        elif parts[0] != "norm":
            continue
        found = own.get(".".join(parts))
        if found is not None and found.shape == weight.shape:
            found.copy_(weight)
    hidden, depth = drafter.config.hidden_size, len(drafter.config.target_layer_ids)
    if drafter.config.context_size == depth * hidden:
        drafter.fc.weight.copy_(torch.eye(hidden).repeat(1, depth) / depth)


def new_drafter(
    target: Target,
    *,
    mask_token_id: int,
    num_hidden_layers: int = 2,
    block_size: int = 7,
    markov_rank: int = 64,
    markov_head_type: MarkovKind = "vanilla",
    target_layer_ids: Sequence[int] | None = None,
    num_anchors: int = 64,
) -> Drafter:
    """A fresh drafter of the target's own shape, started with :func:`init_from_target`.

    ``target_layer_ids`` None spreads up to five layers evenly over the target's, the last left out.
    """
    c = target.model.config
    heads = c.num_attention_heads
    rope = getattr(c, "rope_parameters", None) or {}
    has_markov_head = markov_rank > 0 and markov_head_type != "none"
    drafter = Drafter(
        DrafterConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=getattr(c, "intermediate_size", None) or 4 * target.hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(c, "num_key_value_heads", None) or heads,
            head_dim=getattr(c, "head_dim", None) or target.hidden_size // heads,
            target_layer_ids=tuple(target_layer_ids or _spread(target.num_layers)),
            block_size=block_size,
            mask_token_id=mask_token_id,
            num_anchors=num_anchors,
            num_target_layers=target.num_layers,
            markov_rank=markov_rank if has_markov_head else 0,
            markov_head_type=markov_head_type,
            confidence_head_with_markov=has_markov_head,
            rms_norm_eps=getattr(c, "rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or getattr(c, "rope_theta", None) or 10000),
            max_position_embeddings=c.max_position_embeddings,
        )
    )
    init_from_target(drafter, target)
    return drafter


def _spread(num_layers: int) -> list[int]:
    """Up to five layers between the first and the last but one."""
    last = num_layers - 2
    count = min(5, num_layers - 1)
    if count <= 1:
        return [last]
    first = min(1, last - count + 1)
    return [round(first + (last - first) * i / (count - 1)) for i in range(count)]


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C makes longer, so that a step is never torn; a second one is as always."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says what could not be written; safetensors has an error of its own for a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"could not write {path}, what was saved before is intact: {reason}"
        number = getattr(error, "errno", None)
        raise (OSError(number, message) if number else OSError(message)) from error


class _Lines:
    """Metrics as JSON lines, each on disk at once. JSON has no NaN: it is null there."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> _Lines:
        self.file = self.path and self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()

    def write(self, row: dict[str, Any]) -> None:
        if self.path and self.file:
            with _writing(self.path):
                self.file.write(_to_json(row) + "\n")
                self.file.flush()


def _to_json(row: dict[str, Any]) -> str:
    return json.dumps({name: None if value != value else value for name, value in row.items()})


def _from_json(line: bytes) -> dict[str, Any]:
    return {k: math.nan if value is None else value for k, value in json.loads(line).items()}


class _World:
    """The processes of the run."""

    def __init__(self, parallel: Parallel) -> None:
        if parallel not in get_args(Parallel):
            raise ValueError(f"parallel must be one of {get_args(Parallel)}, got {parallel!r}")
        if parallel != "none" and not torch.distributed.is_initialized():
            raise ValueError(f"parallel {parallel!r} needs torch.distributed to be initialised")
        self.parallel = parallel
        self.size = 1 if parallel == "none" else torch.distributed.get_world_size()
        self.rank = 0 if parallel == "none" else torch.distributed.get_rank()
        self.main = self.rank == 0

    def wrap(self, step: _Forward, config: TrainConfig) -> nn.Module:
        """The module whose gradients are means over the processes, all begun as the main one's."""
        if self.parallel == "ddp":
            # What a term without weight alone would reach has no gradient.
            idle = config.ce_only_fraction > 0 or config.confidence_weight == 0
            return nn.parallel.DistributedDataParallel(step, find_unused_parameters=idle)
        if self.parallel == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for parameter in step.drafter.parameters():
                if parameter.requires_grad:
                    torch.distributed.broadcast(parameter.detach(), 0)
            for layer in step.drafter.layers:
                fully_shard(layer)
            fully_shard(step)
        return step

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Where gradients may wait for a later backward to be shared."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


class _Order:
    """Which conversations a micro-batch holds: each epoch has its own order, from the seed."""

    def __init__(
        self, tokens: Sequence[Encoded], config: TrainConfig, world: _World, pad_token_id: int
    ) -> None:
        self.tokens, self.config, self.world, self.pad = tokens, config, world, pad_token_id
        self.epoch, self.groups = -1, [[0]]

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, int]]:
        """The micro-batches of this process, each with a seed for its blocks."""
        config, world = self.config, self.world
        for number in range(config.accumulate):
            place = (step * config.accumulate + number) * world.size + world.rank
            group = self._group(place)
            some = [self.tokens[index] for index in group]
            if config.pack_length is None:
                batch = collate(some, self.pad)
            else:
                batch = pack(some, config.pack_length, self.pad)
            places = torch.tensor([*group, -1])
            batch.chat_index.copy_(places[batch.chat_index])
            yield batch, ((config.seed << 40) + place) % 2**63

    def _group(self, place: int) -> list[int]:
        per_epoch = len(self.tokens) // self.config.batch_size
        epoch, number = divmod(place, per_epoch)
        if epoch != self.epoch:
            self.epoch, self.groups = epoch, self._shuffled(epoch)
        return self.groups[number]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """Conversations of similar length go together, so that little of a batch is padding.

        Each pool of conversations is sorted by itself: batches differ from epoch to epoch, since
        there are several pools, of sixteen batches at most.
        """
        size = self.config.batch_size
        rng = random.Random(f"{self.config.seed}/{epoch}")
        order = list(range(len(self.tokens)))
        rng.shuffle(order)
        groups = []
        batches = min(16, max(1, len(order) // (4 * size)))
        for first in range(0, len(order), batches * size):
            pool = order[first : first + batches * size]
            pool.sort(key=lambda index: len(self.tokens[index]))
            groups += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        # A last, smaller pool may leave a few over; they have their turn in another epoch.
        rng.shuffle(groups)
        return groups[: len(order) // size]


class _Forward(nn.Module):
    """Slots and objective as one module, which is what the parallel wrappers want."""

    def __init__(self, drafter: Drafter, config: TrainConfig, tokens: Sequence[Encoded]) -> None:
        super().__init__()
        self.drafter, self.config = drafter, config
        device = drafter.fc.weight.device
        vocab_size = drafter.config.vocab_size
        seen = torch.arange(vocab_size)
        if config.vocabulary == "seen":
            seen = torch.cat([item.input_ids for item in tokens]).unique()
        place = torch.zeros(vocab_size, dtype=torch.long)
        place[seen] = torch.arange(len(seen))
        self.seen, self.place = seen.to(device), place.to(device)
        # The head is frozen, so what a step needs of it is made once.
        head = drafter.lm_head.weight.detach()
        if config.precision == "bf16":
            head = head.bfloat16()
        self.head = head if config.vocabulary == "full" else head[self.seen]

    def forward(
        self,
        blocks: Blocks,
        context: Tensor,
        last: Tensor,
        normaliser: Tensor,
        terms: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        bf16 = self.config.precision == "bf16"
        with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
            slots = self.drafter.slots(blocks, context, last)
            w2 = self.drafter.markov_w2_weight
            if self.config.vocabulary == "seen":
                slots = replace(slots, target_ids=self.place[slots.target_ids])
                w2 = None if w2 is None else w2[self.seen]
            objective = dspark_objective(
                slots,
                self.head,
                w2,
                loss_decay_gamma=self.config.loss_decay_gamma,
                normaliser=normaliser,
                **terms,
            )
        return objective.loss, objective.sums.stacked()


class _Run:
    """Weights, optimiser and step of a run, and their checkpoints."""

    def __init__(
        self,
        drafter: Drafter,
        config: TrainConfig,
        tokens: Sequence[Encoded],
        out: Path,
        world: _World,
    ) -> None:
        self.drafter, self.config, self.out, self.world = drafter, config, out, world
        self.forward = world.wrap(_Forward(drafter, config, tokens), config)
        frozen = {id(drafter.embed_tokens.weight), id(drafter.lm_head.weight)}
        named = dict(drafter.named_parameters())
        self.weights = {name: p for name, p in named.items() if id(p) not in frozen}
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.trained.values() if p.dim() > 1]},
            {"params": [p for p in self.trained.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        # What a checkpoint must agree with, beside the configuration.
        self.facts = {"data": _digest(tokens), "processes": world.size}

    def backward(
        self, order: _Order, source: FeatureSource
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "field slot"], int]:
        """The gradients of the step to come, all micro-batches of all processes as one batch.

        Returns this process's part of the loss and of the stacked sums, and its tokens.
        """
        config, world = self.config, self.world
        device, dtype = self.drafter.fc.weight.device, self.drafter.fc.weight.dtype
        micro, tokens = [], 0
        total = torch.zeros((), device=device, dtype=dtype)
        for batch, seed in order.micro_batches(self.step):
            tokens += int(batch.seq_lens.sum())
            batch = batch.to(device)
            blocks = draw_blocks(
                batch,
                config.num_anchors,
                self.drafter.config.block_size,
                mask_token_id=self.drafter.config.mask_token_id,
                seed=seed,
            )
            total += slot_weights(blocks.eval_mask, config.loss_decay_gamma, dtype).sum()
            micro.append((batch, blocks))
        world.total(total)
        terms = config.term_weights_at(self.step)
        losses, sums = [], []
        for number, (batch, blocks) in enumerate(micro, start=1):
            given = source(batch)
            last = number == len(micro)
            with nullcontext() if last else world.alone(self.forward):
                loss, stacked = self.forward(blocks, given.context, given.last, total, terms)
                # The parallel wrappers average over processes what has to be summed.
                (loss * world.size).backward()
            losses.append(loss.detach())
            sums.append(stacked)
        return torch.stack(losses).sum(), torch.stack(sums).sum(dim=0), tokens

    def advance(
        self, order: _Order, source: FeatureSource, interrupts: Sequence[int] = ()
    ) -> tuple[dict[str, Any], bool]:
        """One step: its line of the metrics, and whether any process was asked to stop by then."""
        begin = time.perf_counter()
        config = self.config
        loss, stacked, tokens = self.backward(order, source)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), config.clip_norm or math.inf)
        # Everything that is reported crosses to the host at once.
        figures = torch.cat([loss.new_tensor([tokens, len(interrupts)]), loss.view(1)])
        figures = self.world.total(torch.cat([figures, stacked.flatten()]))
        figures = torch.cat([figures, _whole(norm).view(1)]).double().cpu()
        all_tokens, asked, all_loss = figures[:3].tolist()
        size = float(figures[-1])
        if not math.isfinite(size):
            raise FloatingPointError(
                f"the gradient of step {self.step + 1} is not finite (loss {all_loss}); the "
                "weights are as before it: go on from an earlier checkpoint with a lower "
                "learning_rate"
            )
        rate = config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        summary = Sums.from_stacked(figures[3:-1].view_as(stacked)).summary()
        row = {
            "step": self.step,
            "loss": round(all_loss, 5),
            **{k: round(summary[k], 5) for k in ("ce", "l1", "confidence", "accept_rate", "tau")},
            "slots": summary["slots"],
            "tokens": int(all_tokens),
            "lr": rate,
            "grad_norm": round(size, 5),
            "seconds": round(time.perf_counter() - begin, 4),
        }
        return row, asked > 0

    def start(self, resume: bool) -> list[dict[str, Any]]:
        """Makes the folder, reads the last checkpoint, and returns the metrics up to it."""
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"out must be a folder, got the file {self.out}")
        with _writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        found = checkpoints(self.out)
        if found and not resume:
            raise ValueError(f"{self.out} holds a run already; resume it or choose another folder")
        if found:
            self._load(found[-1])
        metrics = self.out / METRICS
        rows: list[dict[str, Any]] = []
        if metrics.exists():
            # A line that was not finished is of a step that is not in the checkpoint either.
            rows = [_from_json(line) for line in metrics.read_bytes().split(b"\n")[:-1]]
            rows = [row for row in rows if row["step"] <= self.step]
        self.world.wait()
        if self.world.main:
            with _writing(metrics):
                partial = metrics.with_suffix(".partial")
                text = "".join(_to_json(row) + "\n" for row in rows)
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, metrics)
            for left in self.out.glob("*.partial"):
                shutil.rmtree(left)
        return rows

    def save(self) -> None:
        """``checkpoint-<step>``, complete or not there at all; old ones beyond the limit go."""
        folder = self.out / f"{_CHECKPOINT}{self.step:06d}"
        whole = self.whole()
        state = {}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = _whole(value)
        if self.world.main and not folder.exists():
            self._write(folder, whole, state)
            for old in checkpoints(self.out)[: -self.config.keep_checkpoints]:
                # Renamed first, so that what looks like a checkpoint is always whole.
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))
        self.world.wait()

    def whole(self) -> Drafter:
        """The drafter itself, or, where its parameters are shards, a copy that has them whole."""
        if self.world.parallel != "fsdp2":
            return self.drafter
        copy = Drafter(self.drafter.config).to(self.drafter.fc.weight.device)
        named = {name: _whole(p.detach()) for name, p in self.drafter.named_parameters()}
        copy.load_state_dict(named)
        return copy

    def _write(self, folder: Path, whole: Drafter, state: dict[str, Tensor]) -> None:
        partial = folder.with_name(folder.name + ".partial")
        saved = {"step": self.step, "config": asdict(self.config), **self.facts}
        try:
            with _writing(folder):
                save_drafter(whole, partial)
                save_file(state, partial / "optimizer.safetensors")
                (partial / "state.json").write_text(json.dumps(saved, indent=2), encoding="utf-8")
                # The name must not reach the disk before the contents do.
                for path in (*partial.iterdir(), partial):
                    _settle(path)
                os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _load(self, folder: Path) -> None:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _require_same(folder, asdict(self.config), saved["config"])
        _require_same(folder, self.drafter.config.to_dict(), shape)
        _require_same(folder, self.facts, saved)
        weights = _read(folder / "model.safetensors")
        state = _read(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in self.weights.items():
                _fill(parameter, weights[name])
            for name, parameter in self.trained.items():
                # A parameter that has had no gradient yet has no state.
                if f"{name}/step" not in state:
                    continue
                mine = self.optimizer.state[parameter]
                mine["step"] = state[f"{name}/step"].to(parameter.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    mine[key] = torch.zeros_like(parameter)
                    _fill(mine[key], state[f"{name}/{key}"])
        self.step = saved["step"]


def checkpoints(out: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {
        int(number): path
        for path in Path(out).glob(f"{_CHECKPOINT}*")
        if (number := path.name.removeprefix(_CHECKPOINT)).isdigit()
    }
    return [found[number] for number in sorted(found)]


def _evaluation(run: _Run, target: Target, others: Sequence[Encoded]) -> dict[str, Any]:
    table = evaluate(run.whole(), target, others, num_anchors=run.config.evaluate_anchors)
    tau, low, high = bootstrap(table["tau"])
    slots = range(run.drafter.config.block_size)
    return {
        "step": run.step,
        "held_out_tau": round(tau, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "accept_by_slot": [round(float(table[f"accept_{k}"].mean()), 4) for k in slots],
    }


def _source(
    target: Target,
    tokens: Sequence[Encoded],
    drafter: Drafter,
    features: str,
    cache: str | os.PathLike[str],
    progress: bool,
) -> FeatureSource:
    layer_ids = drafter.config.target_layer_ids
    if features == "live":
        return live_features(target, layer_ids)
    if features == "cached":
        dtype = torch.bfloat16 if target.dtype != torch.float64 else None
        return cached_features(target, tokens, layer_ids, cache, dtype=dtype, progress=progress)
    raise ValueError(f"features must be 'live' or 'cached', got {features!r}")


def _encoded(chat: Chat | Encoded, target: Target, config: TrainConfig) -> Encoded:
    if isinstance(chat, Chat):
        if target.tokenizer is None:
            raise ValueError("the target has no tokenizer: pass encoded conversations")
        return encode(chat, target.tokenizer, config.max_length)
    if not isinstance(chat, Encoded):
        raise TypeError(f"conversations must be Chat or Encoded, got {type(chat).__name__}")
    return Encoded(
        chat.input_ids[: config.max_length], chat.loss_mask[: config.max_length], chat.chat
    )


def _pad_token_id(target: Target) -> int:
    return getattr(target.tokenizer, "pad_token_id", None) or 0


def _digest(tokens: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for item in tokens:
        digest.update(len(item).to_bytes(8, "little"))
        digest.update(item.input_ids.numpy().tobytes())
        digest.update(item.loss_mask.numpy().tobytes())
    return digest.hexdigest()[:32]


def _whole(x: Any) -> Tensor:
    """Of a shard, the tensor that it is of; all processes must ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _fill(x: Any, value: Tensor) -> None:
    if hasattr(x, "full_tensor"):
        # Imported here because it takes long and only "fsdp2" has shards.
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements)
    x.copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from None


def _settle(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_number(name: str, value: Any, low: float, high: float = sys.float_info.max) -> None:
    require_number(name, value)
    if not low <= value <= high:
        allowed = f"finite and >= {low}" if high == sys.float_info.max else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _require_whole_block(others: Sequence[Encoded], block_size: int) -> None:
    if any(len(whole_block_anchors(collate([item], 0), block_size)) for item in others):
        return
    raise ValueError(
        f"held_out must have a conversation with {block_size + 1} supervised tokens in a row, "
        "which a whole block needs"
    )


def _require_same(folder: Path, given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{name} must be as in the run that {folder} is of, {saved.get(name)!r}, "
                f"got {value!r}"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; under torchrun one process of many."""
    parser = _parser()
    options = parser.parse_args(arguments)
    parallel: Parallel = options.parallel or ("ddp" if "LOCAL_RANK" in os.environ else "none")
    if parallel != "none":
        _join(options.device)
    try:
        history = _train_as_asked(options, parser, parallel)
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    finally:
        if parallel != "none":
            torch.distributed.destroy_process_group()
    if history.interrupted:
        sys.exit(f"stopped, with {checkpoints(history.out)[-1]}; the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dspark_lab.training.loop", description=str(__doc__).splitlines()[0]
    )
    add, given = parser.add_argument, "default: %(default)s"
    add("--target", default="smollm2", help=f"a folder or a hub id, {given}")
    add("--data", type=Path, help="JSONL of conversations, default: the shipped ones")
    add("--held-out", type=Path, help="JSONL of conversations to evaluate on")
    add("--out", type=Path, required=True, help="folder of the run, new or to go on with")
    add("--features", choices=("live", "cached"), default="live", help=given)
    add("--cache", type=Path, help="folder of cached features, default: OUT/features")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=given)
    add("--target-dtype", choices=("float32", "bfloat16"), default="float32", help=given)
    add("--parallel", choices=("ddp", "fsdp2"), help="under torchrun, default: ddp")
    add = parser.add_argument_group("the drafter").add_argument
    add("--drafter", help="a checkpoint to start from; its shape stands instead of what follows")
    add("--layers", type=int, default=2, help=given)
    add("--block-size", type=int, default=7, help=given)
    add("--markov-rank", type=int, default=64, help=given)
    add("--markov-head", choices=get_args(MarkovKind), default="vanilla", help=given)
    add("--layer-ids", type=_layer_ids, help="of the target, as 1,8,15; default: spread evenly")
    add("--mask-token", help="default: the tokenizer's, or the last that no conversation has")
    add = parser.add_argument_group("training, see TrainConfig").add_argument
    kinds = get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        kind = int if kinds[field.name] == int | None else kinds[field.name]
        options: dict[str, Any] = {"choices": get_args(kind)} if get_args(kind) else {"type": kind}
        if field.default is MISSING:
            options["required"] = True
        else:
            options |= {"default": field.default, "help": given}
        add(f"--{field.name.replace('_', '-')}", **options)
    return parser


def _layer_ids(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _join(device: str) -> None:
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    torch.distributed.init_process_group(backend)


def _train_as_asked(
    options: argparse.Namespace, parser: argparse.ArgumentParser, parallel: Parallel
) -> History:
    config = TrainConfig(**{f.name: getattr(options, f.name) for f in fields(TrainConfig)})
    texts = load_chats(options.data)
    held_out = load_chats(options.held_out) if options.held_out else []
    dtype = getattr(torch, options.target_dtype)
    target = load_target(options.target, device=options.device, dtype=dtype)
    chats = [_encoded(chat, target, config) for chat in texts]
    torch.manual_seed(config.seed)
    if options.drafter:
        drafter = load_drafter(options.drafter, target=target, dtype=torch.float32)
    else:
        drafter = new_drafter(
            target,
            mask_token_id=mask_token_id(options.mask_token, target, chats),
            num_hidden_layers=options.layers,
            block_size=options.block_size,
            markov_rank=options.markov_rank,
            markov_head_type=options.markov_head,
            target_layer_ids=options.layer_ids,
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
    )


def mask_token_id(name: str | None, target: Target, chats: Sequence[Encoded]) -> int:
    """The token called ``name``; else the tokenizer's own, else the last that no chat contains.

    Raises:
        ValueError: the vocabulary has no such token, or the conversations contain every token.
    """
    vocabulary = target.tokenizer.get_vocab() if target.tokenizer is not None else {}
    if name is not None:
        if name not in vocabulary:
            raise ValueError(f"mask_token must be a token of the target's vocabulary, got {name!r}")
        return vocabulary[name]
    own = getattr(target.tokenizer, "mask_token_id", None)
    if own is not None:
        return own
    used = set(torch.cat([item.input_ids for item in chats]).tolist())
    unused = set(range(target.vocab_size)) - used
    if not unused:
        raise ValueError("the conversations contain every token: mask_token must name one")
    return max(unused)


if __name__ == "__main__":
    main()
