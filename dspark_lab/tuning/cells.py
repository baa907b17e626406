"""Which drafters a sweep trains, and in which order.

A cell is one drafter: what it learns from, its rows, anchors and block size, its seed, and the
budget of its training, in supervised slots or in seconds of a training step's own time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, get_args

from dspark_lab.checks import Count, NonNegative, NotEmpty, Positive, Size, checked
from dspark_lab.training import TrainConfig

Budget = Literal["slots", "seconds"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
# The mix that holds every conversation; any other is the name of a domain.
ALL = "all"


@dataclass(frozen=True)
class Cell:
    """One drafter of a sweep; ``amount`` is how much of the budget's kind it may spend."""

    budget: Budget
    amount: float
    mix: str
    batch_size: int
    num_anchors: int
    block_size: int
    seed: int

    @property
    def step_kind(self) -> str:
        """All that decides how long a training step takes."""
        return f"{self.mix}-rows{self.batch_size}-n{self.num_anchors}-k{self.block_size}"

    @property
    def kind(self) -> str:
        """All but the seed."""
        return f"{self.budget}{self.amount:g}-{self.step_kind}"

    @property
    def key(self) -> str:
        return f"{self.kind}-seed{self.seed}"


@checked
@dataclass(frozen=True)
class SweepConfig:
    """The settings to sweep, and the budget of each drafter.

    By default those of the runs that ship, on which advice is judged, so that nothing may be tuned
    on them; their mixes are "all" and "code". Whoever changes rows, anchors or blocks leaves a
    recipe's learning rate as it is, so all have one (at two rows a tau of 2.25 or 2.26 with it or
    with 0.4 of it, after 2,000 steps). Each run's falls by its own budget's end, so a short run is
    no part of a long one.

    Args:
        num_anchors: blocks of a row.
        block_sizes: slots of a block.
        batch_sizes: rows of a training step's micro-batch.
        mixes: what to learn from: all conversations, or those of a domain, by its name.
        seeds: drafters of each kind.
        corners: seeds after the first only where anchors, block size and rows are each the least or
            the most; everywhere otherwise.
        only: these kinds of drafter and no others, by the name of their results without the seed,
            like seconds20-all-rows2-n16-k7.
        slots: budgets of supervised slots.
        seconds: budgets of training time.
        prompts: held-out questions to decode, domains in turn.
        max_new_tokens: of an answer.
        temperatures: at which every prompt is decoded.
        evaluations: how often in its course a drafter is evaluated on held-out conversations, the
            last time at its end.
        evaluate_chats: held-out conversations to evaluate on, domains in turn.
        evaluate_anchors: blocks of each of them, the same for all drafters.
        target: pocket, or a folder or hub id, which needs data and held_out.
        data: file of conversations to learn from.
        held_out: file of conversations to evaluate on, whose questions are asked.
        device: of target and drafters.
        features: of the target, stored first or asked for every batch.
        training: all other settings of a run; steps, rows, anchors, seed, warm-up and checkpoints
            are the cell's.
    """

    num_anchors: Annotated[tuple[Count, ...], NotEmpty()] = (4, 16, 96)
    block_sizes: Annotated[tuple[Count, ...], NotEmpty()] = (4, 7, 15)
    batch_sizes: Annotated[tuple[Count, ...], NotEmpty()] = (2, 8)
    mixes: Annotated[tuple[str, ...], NotEmpty()] = (ALL,)
    seeds: Annotated[tuple[Size, ...], NotEmpty()] = (0, 1, 2)
    corners: bool = True
    only: tuple[str, ...] = ()
    slots: tuple[Count, ...] = ()
    seconds: tuple[Positive, ...] = (20.0, 60.0, 180.0)
    prompts: Count = 60
    max_new_tokens: Count = 64
    temperatures: Annotated[tuple[NonNegative, ...], NotEmpty()] = (0.0, 1.0)
    evaluations: Count = 12
    evaluate_chats: Count = 48
    evaluate_anchors: Count = 8
    target: str = "pocket"
    data: str | None = None
    held_out: str | None = None
    device: str = "cpu"
    features: Literal["cached", "live"] = "cached"
    training: TrainConfig = TrainConfig(
        steps=1,
        max_length=512,
        learning_rate=3e-3,
        weight_decay=0.01,
        precision="bf16",
        keep_checkpoints=1,
    )

    def __post_init__(self) -> None:
        varied = ("num_anchors", "block_sizes", "batch_sizes", "mixes", "seeds", *BUDGETS)
        for name in (*varied, "temperatures"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must hold each value once, got {values}")
        if not (self.slots or self.seconds):
            raise ValueError("slots or seconds must hold a budget, got none")
        unknown = set(self.only) - {cell.kind for cell in self._every()}
        if unknown:
            raise ValueError(f"only must name drafters of the sweep, got {sorted(unknown)}")
        if self.target != "pocket" and not (self.data and self.held_out):
            raise ValueError(f"target {self.target!r} needs data and held_out")

    def cells(self) -> list[Cell]:
        """Every drafter, so ordered that a sweep that was stopped early has whole tables.

        Seed by seed; within a seed budget by budget, the least first.
        """
        first, cells = self.seeds[0], self._every()
        if self.only:
            cells = [cell for cell in cells if cell.kind in self.only]
        return [c for c in cells if c.seed == first or not self.corners or self._is_corner(c)]

    def _every(self) -> list[Cell]:
        budgets = [(kind, own) for kind in BUDGETS for own in sorted(getattr(self, kind))]
        sizes = product(self.mixes, self.batch_sizes, self.block_sizes, self.num_anchors)
        return [
            Cell(budget, amount, mix, rows, anchors, block_size, seed)
            for seed, (budget, amount), (mix, rows, block_size, anchors) in product(
                self.seeds, budgets, list(sizes)
            )
        ]

    def _is_corner(self, cell: Cell) -> bool:
        chosen = (cell.batch_size, cell.num_anchors, cell.block_size)
        every = (self.batch_sizes, self.num_anchors, self.block_sizes)
        return all(own in (min(of), max(of)) for own, of in zip(chosen, every, strict=True))
