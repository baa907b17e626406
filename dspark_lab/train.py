"""The training loop: one process or many, killed at any moment and resumed.

    python -m dspark_lab.train --target smollm2 --data chats.jsonl --out run --steps 1000
    torchrun --nproc-per-node 8 -m dspark_lab.train --parallel fsdp2 ...

A step is ``accumulate`` micro-batches on each process. Its blocks are drawn first, so that every
micro-batch is divided by the summed weights of them all, on all processes: the step's gradient is
that of one joined batch, however the supervised slots fall.

What a step sees follows from (seed, step) alone and no random number is drawn elsewhere. So a run
that is resumed from a checkpoint needs no history, and on a CPU ends with the very weights of a run
that was never stopped. This file knows the order of things in a run; what a forward, an objective
or a checkpoint is, is known elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Batch, Chat, Encoded, collate, encode, pack
from dspark_lab.checkpoint import save_drafter
from dspark_lab.checks import require_int
from dspark_lab.drafter import Drafter
from dspark_lab.evaluate import bootstrap, evaluate
from dspark_lab.features import FeatureSource, cached_features, live_features
from dspark_lab.objective import Sums, dspark_objective, slot_weights
from dspark_lab.target import Target

if TYPE_CHECKING:
    import pandas

__all__ = ["History", "TrainConfig", "init_from_target", "train"]

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
    alone.

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
            "ce_weight": 1 + (self.ce_weight - 1) * share,
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
    """Trains ``drafter`` in place, on the target's device.

    Embedding and LM head become the target's own. ``out`` receives ``metrics.jsonl`` and
    ``checkpoint-<step>`` folders, each a drafter that :func:`dspark_lab.checkpoint.load_drafter`
    reads, with the optimiser's state beside it. Ctrl-C ends the run after the step it is in, with a
    checkpoint.

    Args:
        drafter: its weights are the start, unless there is a checkpoint to resume from.
        target: frozen.
        chats: conversations, encoded already or with the target's tokenizer here.
        config: the settings.
        out: made where it does not exist.
        held_out: conversations to evaluate on.
        features: ask the target for every batch, or read them from ``cache``.
        cache: folder for cached features, ``out/features`` where None.
        parallel: over the processes of ``torch.distributed``, which must be initialised.
        resume: go on from the last checkpoint in ``out``; else ``out`` must hold none.
        progress: whether to show a bar.
        on_metrics: called with each line of the metrics, in the main process.

    Raises:
        TypeError, ValueError: settings that cannot be, a checkpoint of other settings, or no
            conversation to train on.
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
    drafter.to(target.device)
    drafter.use_target_embeddings(target.embed_weight, target.head_weight)
    drafter.train()
    world = _World(parallel)
    source = _source(target, tokens, drafter, features, cache or out / "features", progress)
    run = _Run(drafter, config, tokens, out, world)
    rows = run.start(resume)
    order = _Order(tokens, config, world, _pad_token_id(target))
    every = config.checkpoint_every or config.steps
    look = config.evaluate_every or config.steps
    bar = tqdm(
        total=config.steps, initial=run.step, desc="train", disable=not (progress and world.main)
    )
    with (
        (out / METRICS).open("a", encoding="utf-8") if world.main else nullcontext() as file,
        _interrupts() as interrupted,
    ):

        def record(row: dict[str, Any]) -> None:
            rows.append(row)
            if file is not None:
                file.write(json.dumps(row) + "\n")
                file.flush()
            if on_metrics is not None and world.main:
                on_metrics(row)

        while run.step < config.steps and not interrupted:
            row = run.advance(order, source)
            record(row)
            bar.update()
            bar.set_postfix({name: row[name] for name in ("loss", "accept_rate", "tau")})
            done = run.step == config.steps
            if others and (run.step % look == 0 or done):
                record(_evaluation(run, target, others))
            if interrupted or run.step % every == 0 or done:
                run.save()
    bar.close()
    drafter.eval()
    return History(out, rows, bool(interrupted))


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


class _World:
    """The processes of the run."""

    def __init__(self, parallel: Parallel) -> None:
        if parallel not in ("none", "ddp", "fsdp2"):
            raise ValueError(f"parallel must be 'none', 'ddp' or 'fsdp2', got {parallel!r}")
        if parallel != "none" and not torch.distributed.is_initialized():
            raise ValueError(f"parallel {parallel!r} needs torch.distributed to be initialised")
        self.parallel = parallel
        self.size = 1 if parallel == "none" else torch.distributed.get_world_size()
        self.rank = 0 if parallel == "none" else torch.distributed.get_rank()
        self.main = self.rank == 0

    def wrap(self, step: nn.Module, drafter: Drafter, config: TrainConfig) -> nn.Module:
        if self.parallel == "ddp":
            return nn.parallel.DistributedDataParallel(
                step, find_unused_parameters=config.ce_only_fraction > 0
            )
        if self.parallel == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in drafter.layers:
                fully_shard(layer)
            fully_shard(step)
        return step

    def total(self, x: Tensor) -> Tensor:
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
            yield batch, (config.seed << 40) + place

    def _group(self, place: int) -> list[int]:
        per_epoch = len(self.tokens) // self.config.batch_size
        epoch, number = divmod(place, per_epoch)
        if epoch != self.epoch:
            self.epoch, self.groups = epoch, self._shuffled(epoch)
        return self.groups[number]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """Conversations of similar length go together, so that little of a batch is padding."""
        size = self.config.batch_size
        rng = random.Random(f"{self.config.seed}/{epoch}")
        order = list(range(len(self.tokens)))
        rng.shuffle(order)
        groups = []
        for first in range(0, len(order), 16 * size):
            pool = order[first : first + 16 * size]
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
        batch: Batch,
        context: Tensor,
        last: Tensor,
        blocks: Blocks,
        normaliser: Tensor,
        terms: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        packed = batch.seq_lens.shape[1] > 1
        bf16 = self.config.precision == "bf16"
        with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
            slots = self.drafter.slots(
                batch.input_ids,
                context,
                batch.loss_mask,
                last,
                doc_remaining=batch.doc_remaining if packed else None,
                position_ids=batch.position_ids if packed else None,
                seq_lens=batch.seq_lens if packed else None,
                anchor_positions=blocks.anchor_positions,
                block_keep_mask=blocks.block_keep_mask,
            )
            w2 = None
            if self.drafter.markov_head is not None:
                w2 = self.drafter.markov_head.markov_w2.weight
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
        self.forward = world.wrap(_Forward(drafter, config, tokens), drafter, config)
        trained = {n: p for n, p in drafter.named_parameters() if p.requires_grad}
        self.names = list(trained)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained.values() if p.dim() > 1]},
            {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.trained = trained
        self.step = 0

    def advance(self, order: _Order, source: FeatureSource) -> dict[str, Any]:
        """One step; the weights change at its very end, so an interrupt before leaves them."""
        begin = time.perf_counter()
        config, world = self.config, self.world
        device = self.drafter.fc.weight.device
        micro = []
        total = torch.zeros((), device=device)
        for batch, seed in order.micro_batches(self.step):
            batch = batch.to(device)
            blocks = draw_blocks(
                batch,
                config.num_anchors,
                self.drafter.config.block_size,
                mask_token_id=self.drafter.config.mask_token_id,
                seed=seed,
            )
            total += slot_weights(blocks.eval_mask, config.loss_decay_gamma, total.dtype).sum()
            micro.append((batch, blocks))
        total = world.total(total)
        terms = config.term_weights_at(self.step)
        loss = torch.zeros((), device=device)
        stacked = None
        tokens = 0
        for batch, blocks in micro:
            given = source(batch)
            one, sums = self.forward(batch, given.context, given.last, blocks, total, terms)
            # The parallel wrappers average over processes what has to be summed.
            (one * world.size).backward()
            loss += one.detach()
            stacked = sums if stacked is None else stacked + sums
            tokens += int(batch.seq_lens.sum())
        assert stacked is not None
        norm = nn.utils.clip_grad_norm_(
            self.trained.values(), config.clip_norm if config.clip_norm > 0 else math.inf
        )
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        rate = config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Everything that is reported crosses to the host at once.
        figures = torch.cat(
            [world.total(torch.cat([loss.view(1), stacked.flatten()])), norm.view(1)]
        )
        figures = figures.cpu()
        summary = Sums.from_stacked(figures[1:-1].view_as(stacked)).summary()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {
            "step": self.step,
            "loss": round(float(figures[0]), 5),
            **{k: round(summary[k], 5) for k in ("ce", "l1", "confidence", "accept_rate", "tau")},
            "slots": summary["slots"],
            "tokens": tokens,
            "lr": rate,
            "grad_norm": round(float(figures[-1]), 5),
            "seconds": round(time.perf_counter() - begin, 4),
        }

    def start(self, resume: bool) -> list[dict[str, Any]]:
        """Makes the folder, reads the last checkpoint, and returns the metrics up to it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(f"out must be a folder, {self.out} is not: {error}") from None
        found = checkpoints(self.out)
        if found and not resume:
            raise ValueError(f"{self.out} holds a run already; resume it or choose another folder")
        if found:
            self._load(found[-1])
        metrics = self.out / METRICS
        rows: list[dict[str, Any]] = []
        if metrics.exists():
            for line in metrics.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                if row["step"] > self.step:
                    break
                rows.append(row)
        self.world.wait()
        if self.world.main:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            partial = metrics.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, metrics)
            for left in self.out.glob("*.partial*"):
                shutil.rmtree(left, ignore_errors=True)
        return rows

    def save(self) -> None:
        """``checkpoint-<step>``, complete or not there at all; old ones beyond the limit go."""
        folder = self.out / f"{_CHECKPOINT}{self.step:06d}"
        weights = {name: _whole(p.detach()) for name, p in self.trained.items()}
        state = {}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = _whole(value).cpu().contiguous()
        if self.world.main and not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            try:
                shutil.rmtree(partial, ignore_errors=True)
                save_drafter(self._plain(weights), partial)
                save_file(state, partial / "optimizer.safetensors")
                saved = {"step": self.step, "config": asdict(self.config)}
                (partial / "state.json").write_text(json.dumps(saved, indent=2), encoding="utf-8")
                os.replace(partial, folder)
            except Exception as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise OSError(f"could not write the checkpoint {folder}: {error}") from error
            for old in checkpoints(self.out)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.world.wait()

    def _plain(self, weights: dict[str, Tensor]) -> Drafter:
        """The drafter itself, or, where its parameters are shards, a whole one of the weights."""
        if self.world.parallel != "fsdp2":
            return self.drafter
        whole = Drafter(self.drafter.config)
        whole.load_state_dict(weights, strict=False)
        return whole

    def _load(self, folder: Path) -> None:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, value in asdict(self.config).items():
            if saved["config"].get(name) != value:
                raise ValueError(
                    f"{name} must be as in the run that {folder} is of, "
                    f"{saved['config'].get(name)!r}, got {value!r}"
                )
        weights = load_file(folder / "model.safetensors")
        state = load_file(folder / "optimizer.safetensors")
        if set(weights) != set(self.trained):
            raise ValueError(f"{folder} is of a drafter of another shape than the one given")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                _fill(parameter, weights[name])
                mine = self.optimizer.state[parameter]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = state.get(f"{name}/{key}")
                    if value is None:
                        continue
                    mine[key] = value if key == "step" else torch.zeros_like(parameter)
                    if key != "step":
                        _fill(mine[key], value)
                if not mine:
                    del self.optimizer.state[parameter]
        self.step = saved["step"]


def checkpoints(out: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(
        path
        for path in Path(out).glob(f"{_CHECKPOINT}*")
        if path.name.removeprefix(_CHECKPOINT).isdigit()
    )


def _evaluation(run: _Run, target: Target, others: Sequence[Encoded]) -> dict[str, Any]:
    table = evaluate(run.drafter, target, others, num_anchors=run.config.evaluate_anchors)
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
    return Encoded(
        chat.input_ids[: config.max_length], chat.loss_mask[: config.max_length], chat.chat
    )


def _pad_token_id(target: Target) -> int:
    return getattr(target.tokenizer, "pad_token_id", None) or 0


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _fill(x: Tensor, value: Tensor) -> None:
    if isinstance(x, DTensor):
        value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements)
    x.copy_(value)
