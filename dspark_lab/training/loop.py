"""The training loop: one process or many, killed at any moment and resumed.

A step is ``accumulate`` micro-batches on each process. Its blocks are drawn first, so that every
micro-batch is divided by the summed weights of them all, on all processes: the step's gradient is
that of one joined batch, however the supervised slots fall.

What a step sees follows from (seed, step) alone and no random number is drawn elsewhere. So a run
that is resumed from a checkpoint needs no history, and on a CPU ends with the very weights of a run
that was never stopped.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from dspark_lab.attention import Compiled, choose_backend
from dspark_lab.blocks import Blocks, cut_blocks, draw_anchors, draw_blocks
from dspark_lab.chats import (
    Batch,
    Chat,
    Encoded,
    Like,
    collate,
    rows_with_labels,
    seen_tokens,
)
from dspark_lab.checks import Count, checked
from dspark_lab.files import read_json, upload
from dspark_lab.model import (
    WEIGHTS,
    Drafter,
    FeatureSource,
    Objective,
    Slots,
    Sums,
    Target,
    at_least_fp32,
    cached_features,
    dspark_objective,
    live_features,
    slot_weights,
)
from dspark_lab.rates import bootstrap, evaluate, whole_block_anchors
from dspark_lab.training import state
from dspark_lab.training.config import TrainConfig
from dspark_lab.training.data import encode_chats
from dspark_lab.training.order import BatchOrder
from dspark_lab.training.processes import Parallel, Processes, fill, whole
from dspark_lab.training.state import History


@checked
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
    compile: bool = False,
    resume: bool = True,
    until: Count | None = None,
    progress: bool = True,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    like: Like | None = None,
) -> History:
    """Train ``drafter`` in place, on the target's device, in fp32 at least.

    Embedding and LM head become the target's own. ``out`` receives ``run.json`` with the
    configuration, ``metrics.jsonl`` and ``checkpoint-<step>`` folders, each a drafter that
    :func:`dspark_lab.load_drafter` reads, with the optimiser's state beside it. Ctrl-C ends the run
    after the step it is in, with a checkpoint; the same call goes on from there.

    Args:
        drafter: with "fsdp2" it is left in shards; the last checkpoint holds it whole.
        chats: conversations, encoded already (:func:`dspark_lab.encode_all` for many) or with the
            target's tokenizer here.
        out: a folder, made where it does not exist; all processes must see it.
        features: ask the target for every batch, or read them from ``cache``, by default
            ``out/features``, where they lie in bfloat16 unless the target is float64.
        parallel: over the processes of an initialised ``torch.distributed``, each of which makes
            this call.
        compile: run the drafter through ``torch.compile``, or, where that fails, without it after a
            warning. It changes results by rounding. On CUDA attention is compiled in any case.
        resume: go on from the last checkpoint in ``out``; else ``out`` must hold none.
        until: stop after this step, with a checkpoint; a later call goes on as if it had not.
        progress: show a bar, and say how many conversations have no label.
        like: supervise what another trainer does, see :func:`dspark_lab.encode`; evaluations are on
            the lab's own mask in any case.
        on_metrics: called with each new line of the metrics, in the main process.

    Raises:
        ValueError: a checkpoint of other settings or data, damaged files, no conversation to
            evaluate on, or nothing to learn: no two supervised tokens in a row.
        FloatingPointError: a gradient that is not finite; the weights are those before it.
        OSError: ``out`` cannot be written or the disk is full; earlier checkpoints are intact.
    """
    out = Path(out)
    tokens = encode_chats(chats, target.tokenizer, config.max_length, like)
    others = encode_chats(held_out, target.tokenizer, config.max_length)
    _require_use(tokens, others, config, drafter.config.predicted)
    processes = Processes(parallel)
    unlabelled = int((~rows_with_labels(tokens)).sum())
    if unlabelled and progress and processes.main:
        tqdm.write(f"{unlabelled} of {len(tokens)} conversations have no label", sys.stderr)
    drafter.to(target.device, at_least_fp32(drafter.dtype))
    drafter.use_target_embeddings(target.embed_weight, target.head_weight, target.logit_rule)
    drafter.train()
    pad_token_id = getattr(target.tokenizer, "pad_token_id", None) or 0
    run = Run(drafter, config, tokens, out, processes, pad_token_id, compile)
    rows = run.start(resume)
    layer_ids = drafter.config.target_layer_ids
    if features == "live":
        source = live_features(target, layer_ids)
    else:
        stored = None if target.dtype == torch.float64 else torch.bfloat16
        cache = cache or out / "features"
        source = cached_features(target, tokens, layer_ids, cache, dtype=stored, progress=progress)

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        if processes.main:
            state.append_metrics(out, row)
            if on_metrics is not None:
                on_metrics(row)

    hidden = not (progress and processes.main)
    last = min(until or config.steps, config.steps)
    bar = tqdm(total=last, initial=run.step, desc="train", disable=hidden)
    stopped = False
    with _interrupts() as interrupts, bar:
        while run.step < last and not stopped:
            row, stopped = run.advance(source, interrupts)
            record(row)
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "accept_rate", "tau")}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if others and run.is_due(config.evaluate_every):
                record(run.evaluate(target, others))
            if stopped or run.step == last or run.is_due(config.checkpoint_every):
                run.save()
    drafter.eval()
    return History(out, rows, run.step < config.steps, unlabelled)


def _require_use(
    tokens: Sequence[Encoded], others: Sequence[Encoded], config: TrainConfig, slots: int
) -> None:
    """Refuse conversations that fill no batch, teach nothing, or cannot be evaluated on."""
    rows = len(BatchOrder(tokens, config).rows)
    if rows < config.batch_size:
        kind = "conversations" if config.pack_length is None else "packed rows"
        most = f"at most the number of {kind}, {rows}"
        raise ValueError(f"batch_size must be {most}, got {config.batch_size}")
    if not rows_with_labels(tokens).any():
        raise ValueError(
            "chats must hold something to learn, two supervised tokens in a row within max_length "
            f"{config.max_length}, got none in {len(tokens)} conversations"
        )
    whole_blocks = (whole_block_anchors(collate([item], 0), slots) for item in others)
    if others and not any(map(len, whole_blocks)):
        raise ValueError(
            f"held_out must have a conversation with {slots + 1} supervised tokens in a row, "
            "which a whole block needs"
        )


class Forward(nn.Module):
    """Slots and objective as one module, for the parallel wrappers."""

    def __init__(
        self,
        drafter: Drafter,
        config: TrainConfig,
        tokens: Sequence[Encoded],
        compile: Literal["no", "whole", "layers"] = "no",
    ) -> None:
        super().__init__()
        self.drafter, self.config = drafter, config
        self.slots: Callable[..., Slots] = drafter.slots
        if compile == "whole":
            self.slots = Compiled(drafter.slots, drafter.slots)
        elif compile == "layers":
            for layer in drafter.layers:
                layer.forward = Compiled(layer.forward, layer.forward)
        vocab_size = drafter.config.vocab_size
        if config.vocabulary == "seen" and drafter.draft_ids is not None:
            wanted = "vocabulary must be 'full' for a drafter of a reduced vocabulary"
            raise ValueError(f"{wanted}, got 'seen'")
        seen = torch.arange(vocab_size)
        if config.vocabulary == "seen":
            seen = seen_tokens(tokens, vocab_size).nonzero().flatten()
        place = torch.zeros(vocab_size, dtype=torch.long)
        place[seen] = torch.arange(len(seen))
        self.seen, self.place = seen.to(drafter.device), place.to(drafter.device)
        # The head is frozen, so its cast and its rows are taken once.
        head = drafter.lm_head.weight.detach()
        if config.precision == "bf16":
            head = head.bfloat16()
        self.head = head if config.vocabulary == "full" else head[self.seen]

    def forward(
        self, blocks: Blocks, context: Tensor, last: Tensor, normaliser: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        objective = self.objective(self.read(blocks, context, last), normaliser, step)
        return objective.loss, objective.sums.stacked()

    def read(self, blocks: Blocks, context: Tensor, last: Tensor) -> Slots:
        """The slots of a training forward."""
        # Made here, since what it takes to compile it for every length is long.
        backend = choose_backend(context.device)
        forms = self.drafter.mask_forms(blocks, backend)
        with self._autocast():
            return self.slots(blocks, context, last, backend=backend, forms=forms)

    def objective(self, slots: Slots, normaliser: Tensor, step: int) -> Objective:
        """The objective of slots, as weighted at a 0-based step."""
        terms: dict[str, Any] = self.config.term_weights_at(step)
        terms |= {"loss_decay_gamma": self.config.loss_decay_gamma, "normaliser": normaliser}
        w2 = self.drafter.markov_w2_weight
        if self.config.vocabulary == "seen":
            slots = replace(slots, target_ids=self.place[slots.target_ids])
            w2 = None if w2 is None else w2[self.seen]
        with self._autocast():
            return dspark_objective(slots, self.head, w2, **terms, **self.drafter.vocabulary)

    def _autocast(self) -> torch.autocast:
        bf16, device = self.config.precision == "bf16", self.drafter.device.type
        return torch.autocast(device, torch.bfloat16, enabled=bf16)


@checked
class Run:
    """Weights, optimiser, order of the data and step of a run in the folder ``out``."""

    def __init__(
        self,
        drafter: Drafter,
        config: TrainConfig,
        tokens: Sequence[Encoded],
        out: Path,
        processes: Processes,
        pad_token_id: int = 0,
        compile: bool = False,
    ) -> None:
        self.drafter, self.config, self.out, self.processes = drafter, config, out, processes
        # Zero-weight terms leave parameters unused.
        unused = config.ce_only_fraction > 0 or config.confidence_weight == 0
        # Gathering shards stands between the layers and cannot be compiled.
        part: Literal["whole", "layers"] = "layers" if processes.parallel == "fsdp2" else "whole"
        step = Forward(drafter, config, tokens, part if compile else "no")
        self.forward = processes.wrap(step, drafter, unused)
        frozen = {id(drafter.embed_tokens.weight), id(drafter.lm_head.weight)}
        named = dict(drafter.named_parameters())
        self.weights = {name: p for name, p in named.items() if id(p) not in frozen}
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}
        # What no term trains while the confidence head's has no weight.
        head = drafter.confidence_head
        self.untrained = [] if head is None else list(head.parameters())
        matrices = [p for p in self.trained.values() if p.dim() > 1]
        vectors = [p for p in self.trained.values() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate, betas, fused=True)
        self.order = BatchOrder(tokens, config, pad_token_id, processes.rank, processes.size)
        self.step = 0
        # A checkpoint must agree with these, too.
        self.facts = {"data": state.digest(tokens), "processes": processes.size}

    def backward(
        self, source: FeatureSource
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "field slot"], int]:
        """The gradients of the next step, all micro-batches of all processes as one batch.

        Returns this process's part of the loss and of the stacked sums, and its tokens.
        """
        config, drafter = self.config, self.drafter
        micro, tokens = [], 0
        total = torch.zeros((), device=drafter.device, dtype=drafter.dtype)
        for batch, seed in self.order.micro_batches(self.step):
            tokens += int(batch.seq_lens.sum())
            batch, blocks = self.blocks(batch, seed)
            total += slot_weights(blocks.eval_mask, config.loss_decay_gamma, drafter.dtype).sum()
            micro.append((batch, blocks))
        self.processes.total(total)
        # Only DDP has it: gradients wait for the last micro-batch to be shared.
        unshared = getattr(self.forward, "no_sync", nullcontext)
        losses, sums = [], []
        for number, (batch, blocks) in enumerate(micro, start=1):
            given = source(batch)
            with unshared() if number < len(micro) else nullcontext():
                loss, stacked = self.forward(blocks, given.context, given.last, total, self.step)
                # The parallel wrappers average over processes, where a sum is needed.
                (loss * self.processes.size).backward()
            losses.append(loss.detach())
            sums.append(stacked)
        if config.term_weights_at(self.step)["confidence_weight"] == 0:
            # As where nothing is compiled. A compiled drafter has zeros, which age AdamW's moments.
            for parameter in self.untrained:
                parameter.grad = None
        return torch.stack(losses).sum(), torch.stack(sums).sum(dim=0), tokens

    def blocks(self, batch: Batch, seed: int) -> tuple[Batch, Blocks]:
        """A batch that is on the host, and the blocks drawn on it, on the drafter's device."""
        config, own = self.config, self.drafter.config
        here = batch.to(self.drafter.device)
        sizes: dict[str, Any] = {"block_size": own.block_size, "mask_token_id": own.mask_token_id}
        sizes["layout"] = own.layout
        if config.anchors_per == "row":
            return here, draw_blocks(here, config.num_anchors, seed=seed, **sizes)
        # Drawn on the host, which then knows how many blocks the fullest row has.
        drawn = draw_anchors(batch, config.num_anchors, per=config.anchors_per, seed=seed)
        anchors, keep = (upload(tensor, here.input_ids.device) for tensor in drawn)
        return here, cut_blocks(here, anchors, keep, **sizes)

    def advance(
        self, source: FeatureSource, interrupts: Sequence[int] = ()
    ) -> tuple[dict[str, Any], bool]:
        """One step: its line of the metrics, and whether any process was interrupted by then."""
        begin = time.perf_counter()
        loss, stacked, tokens = self.backward(source)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip_norm or math.inf)
        # Everything that is reported crosses to the host at once.
        counted = upload(torch.tensor([tokens, len(interrupts)], dtype=loss.dtype), loss.device)
        figures = torch.cat([counted, loss.view(1)])
        figures = self.processes.total(torch.cat([figures, stacked.flatten()]))
        figures = torch.cat([figures, whole(norm).view(1)]).double().cpu()
        all_tokens, asked, all_loss = figures[:3].tolist()
        size = float(figures[-1])
        if not math.isfinite(size):
            raise FloatingPointError(
                f"the gradient of step {self.step + 1} is not finite (loss {all_loss}); the "
                "weights are as before it: go on from an earlier checkpoint with a lower "
                "learning_rate"
            )
        rate = self.config.learning_rate_at(self.step)
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

    def evaluate(self, target: Target, others: Sequence[Encoded]) -> dict[str, Any]:
        """The line of the metrics for the held-out conversations."""
        drafter, anchors = self.whole_drafter(), self.config.evaluate_anchors
        table = evaluate(drafter, target, others, num_anchors=anchors)
        tau, low, high = (round(value, 4) for value in bootstrap(table["tau"]))
        rates = [table[f"accept_{k}"].mean() for k in range(drafter.config.predicted)]
        line = {"step": self.step, "held_out_tau": tau, "low": low, "high": high}
        return line | {"accept_by_slot": [round(float(rate), 4) for rate in rates]}

    def is_due(self, every: int) -> bool:
        """Whether something that happens after ``every`` steps, and at the end, happens now."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def start(self, resume: bool) -> list[dict[str, Any]]:
        """Make the folder, read its last checkpoint, and return the metrics up to it."""
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"out must be a folder, got the file {self.out}")
        with state.write_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        found = state.checkpoints(self.out)
        if found and not resume:
            raise ValueError(f"{self.out} holds a run already; resume it or choose another folder")
        if found:
            self._load(found[-1])
        rows = state.read_metrics(self.out, self.step)
        self.processes.wait()
        if self.processes.main:
            state.cut_to_checkpoint(self.out, rows)
            state.write_run(self.out, self.config)
        return rows

    def save(self) -> None:
        """Write a checkpoint, and remove old ones beyond the limit."""
        drafter, moments = self.whole_drafter(), self._moments()
        if self.processes.main:
            facts = {"step": self.step, "config": asdict(self.config), **self.facts}
            state.save_checkpoint(self.out, drafter, moments, facts, self.config.keep_checkpoints)
        self.processes.wait()

    def whole_drafter(self) -> Drafter:
        """The drafter, or a copy with whole parameters, which all processes must ask for."""
        if self.processes.parallel != "fsdp2":
            return self.drafter
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True)
        copy = Drafter(self.drafter.config).to(self.drafter.device, self.drafter.dtype)
        copy.load_state_dict(get_model_state_dict(self.drafter, options=options))
        return copy

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's whole state on the CPU; with shards, on the main process alone."""
        kept = {name: self.optimizer.state.get(p, {}) for name, p in self.trained.items()}
        if self.processes.parallel == "fsdp2":
            from torch.distributed.checkpoint import state_dict

            options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
            gathered: Any = state_dict.get_optimizer_state_dict(
                self.drafter, self.optimizer, options=options
            )
            kept = gathered.get("state", {})
        return {f"{name}/{key}": x.cpu() for name, held in kept.items() for key, x in held.items()}

    def _load(self, folder: Path) -> None:
        saved, shape = state.read_state(folder), read_json(folder / "config.json")
        state.require_same(folder, asdict(self.config), saved["config"])
        state.require_same(folder, self.drafter.config.to_dict(), shape)
        state.require_same(folder, self.facts, saved)
        weights = state.read_tensors(folder / WEIGHTS)
        moments = state.read_tensors(folder / state.OPTIMIZER)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                fill(parameter, weights[name])
            for name, parameter in self.trained.items():
                # A parameter that has had no gradient yet has no state.
                if f"{name}/step" not in moments:
                    continue
                mine = self.optimizer.state[parameter]
                mine["step"] = moments[f"{name}/step"].to(parameter.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    mine[key] = torch.zeros_like(parameter)
                    fill(mine[key], moments[f"{name}/{key}"])
        self.step = saved["step"]


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Record SIGINT in a list, so that the step is finished; a second one acts as usual."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.getsignal(signal.SIGINT)

    def record(number: int, _frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, record)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
