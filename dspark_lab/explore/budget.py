"""Choosing for training: what a setting covers, gains, costs and needs, and its explorer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from html import escape
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from dspark_lab import tuning
from dspark_lab.blocks import PER, Per
from dspark_lab.chats import Encoded, Like
from dspark_lab.checks import Count, Positive, Share, checked, require_columns
from dspark_lab.explore import controls as make
from dspark_lab.explore import style
from dspark_lab.explore.anchors import loaded_tokenizer, require_some
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame, export_texts
from dspark_lab.explore.style import BLUE, GREEN, INK, ORANGE
from dspark_lab.explore.work import Progress
from dspark_lab.files import require_found
from dspark_lab.model import DrafterConfig
from dspark_lab.training import ChatsLike, encode_chats
from dspark_lab.tuning import Dtype, GradientNoise, Shape, Spans, StepTime

# The entry among the cards that stands for the user's own measurement.
MEASURED = "measured here"
_SEQ_LENS = tuple(2**power for power in range(8, 16))
_NUM_ANCHORS = tuple(2**power for power in range(2, 16))
_BATCH_SIZES = tuple(2**power for power in range(7))
# What is not known without the noise of gradients.
_UNKNOWN = (
    "This counts what is supervised. What a step teaches also depends on how much gradients differ "
    "between conversations and between anchors, which only a measurement tells: give the result of "
    "dspark_lab.tuning.measure_noise as noise."
)
# A row of more blocks takes longer to look at than a slider may.
_MOST_BLOCKS = 2**17
# How high the panels of a budget are, in inches.
_HIGH = 1.9
# The mark of the chosen setting, in every panel.
_CHOSEN: dict[str, Any] = {"color": ORANGE, "marker": "*", "markersize": 13, "linestyle": "none"}
_CHOSEN |= {"markeredgecolor": INK, "markeredgewidth": 0.6, "clip_on": False, "zorder": 4}
# Marks as a title writes them: a title is drawn in a third of the time that a legend takes.
_STAR, _RING, _SQUARE, _DIAMOND = "★", "○", "□", "◇"
# A log axis with more doublings than this names every second, or third.
_MOST_TICKS = 6


def plot_fit(
    table: pd.DataFrame, *, at: tuple[int, int] | None = None, ax: Axes | None = None
) -> Figure:
    """The largest number of anchors that fits, against the row's length, a line per block size.

    From :func:`dspark_lab.tuning.fit_table`. 0 anchors, where nothing fits, have a place of their
    own; marks are hollow where ``full`` is False. ``at`` is a row length and a number to mark.
    """
    require_columns("table", table, ["seq_len", "block_size", "num_anchors", "full"])
    if ax is None:
        _, ax = style.new_figure(7, 3.8)
    blocks = table["block_size"].unique()
    key = [f"block {blocks[0]}"] if len(blocks) == 1 else []
    for i, (block_size, part) in enumerate(table.groupby("block_size")):
        x, y, label = part["seq_len"], part["num_anchors"], f"block {block_size}"
        _line_and_marks(ax, x, y, part["full"], i, label, clip_on=False)
    numbers, lengths = table["num_anchors"].tolist(), table["seq_len"].tolist()
    if at is not None:
        ax.plot([at[0]], [at[1]], **_CHOSEN)
        key.append(f"{_STAR} chosen")
        lengths.append(at[0])
        numbers.append(at[1])
    if not table["full"].all():
        key.append("hollow: row is the limit")
    ax.set_xscale("log", base=2)
    # From 1 on it is a log axis; below there is room for 0.
    ax.set_yscale("symlog", base=2, linthresh=1)
    _name_doublings(ax.xaxis, lengths)
    _name_doublings(ax.yaxis, numbers, zero="none: 0" if 0 in numbers else "")
    ax.set_ylim(0 if 0 in numbers else 0.8 * min(numbers), 1.6 * max(1, *numbers))
    ax.set_xlabel("tokens of a row (seq_len)")
    ax.set_ylabel("most anchors that fit")
    style.add_rules(ax)
    style.add_title(ax, "   ".join(key), y=1)
    if len(blocks) > 1:
        style.add_legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    return cast(Figure, ax.figure)


def plot_parts(
    cost: pd.DataFrame,
    memory: pd.DataFrame | None = None,
    *,
    limit: float | None = None,
    seconds: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Where a training step's operations go, part by part, and its bytes below.

    The tables are from :func:`dspark_lab.tuning.training_cost` and
    :func:`dspark_lab.tuning.memory_table`. ``limit``, bytes that tensors may take, and ``seconds``
    of the step are told in words; ``ax`` is for the operations, without memory.
    """
    require_columns("cost", cost, ["part", "operations"])
    if memory is not None:
        require_columns("memory", memory, ["part", "held", "moment"])
    if memory is not None and ax is not None:
        raise ValueError("memory must be None where ax is given, got both")
    if limit is not None and memory is None:
        raise ValueError(f"limit must come with a memory table, got {limit} without")
    if ax is None:
        panels = [cost] if memory is None else [cost, memory]
        heights = [0.27 * len(panel) + 1.1 for panel in panels]
        grid: dict[str, Any] = {"rows": len(panels), "height_ratios": heights}
        _, axes = style.new_figure(7, sum(heights), **grid)
        ax, *others = np.atleast_1d(axes)
        if memory is not None:
            _plot_bytes(others[0], memory, limit)
    total = cost["operations"].sum()
    share = (cost["operations"] / total).to_numpy()
    labels = [f"{part:.1%}" if part >= 0.0005 else "< 0.1%" for part in share]
    _bars(ax, cost["part"], share, labels, BLUE)
    ax.set_xlabel("share of operations")
    ax.set_ylabel("part")
    title = f"a step: {EngFormatter(places=1)(total)} operations"
    if seconds is not None:
        title += f", {EngFormatter('s', places=1)(seconds)}"
    style.add_title(ax, title, y=1)
    return cast(Figure, ax.figure)


def plot_progress(
    table: pd.DataFrame,
    *,
    at: tuple[int, int] | None = None,
    coverage: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Expected progress a second over anchors, from :func:`dspark_lab.tuning.progress_table`.

    A line with its 95 % interval for all that differs otherwise, relative to the best of the same
    block size that fits, which has a frame; hollow marks do not fit. ``at`` is a chosen number of
    rows and of anchors, ``coverage`` that which covers most, both to be marked.
    """
    option = ["seq_len", "per", "batch_size", "num_anchors", "block_size"]
    require_columns("table", table, [*option, "rate", "low", "high", "fits"])
    if ax is None:
        _, ax = style.new_figure(style.WIDEST, 2.9)
    best = {}
    for size, own in table.groupby("block_size"):
        if own["fits"].any():
            best[size] = tuning.best_option(own)
    # All are 0 where the mean gradient is not told from 0.
    unit = table["block_size"].map({size: one["rate"] or 1.0 for size, one in best.items()})
    rates = table[["rate", "low", "high"]].div(unit.fillna(1.0), axis=0)
    table = table.assign(**rates).sort_values("num_anchors")
    names = {"batch_size": _rows, "block_size": "K {}".format}
    names |= {"seq_len": "S {:,}".format, "per": "per {}".format}
    by = [name for name in names if table[name].nunique() > 1] or ["batch_size"]
    for i, (option, line) in enumerate(table.groupby(by)):
        label = ", ".join(names[name](value) for name, value in zip(by, option, strict=True))
        style.add_band(
            ax, line["num_anchors"], line["low"], line["high"], style.line_look(i)["color"]
        )
        _line_and_marks(ax, line["num_anchors"], line["rate"], line["fits"], i, label, markersize=4)
    key = [f"{_STAR} chosen"] if at else []
    ring: dict[str, Any] = {"fillstyle": "none", "markeredgewidth": 1.8, "linestyle": "none"}
    for one in best.values():
        place = one["num_anchors"], table.loc[one.name, "rate"]
        ax.plot(*place, marker="s", color=GREEN, markersize=11, **ring)
    if len(best) == 1:
        (one,) = best.values()
        key.append(f"{_SQUARE} best: N {one['num_anchors']:,}, {_rows(one['batch_size'])}")
    elif best:
        found = [f"K {size}: N {one['num_anchors']:,}" for size, one in best.items()]
        key.append(f"{_SQUARE} best, " + ", ".join(found))
    if coverage:
        ax.plot(*_place(table, coverage), marker="D", color=INK, markersize=8, **ring)
        key.append(f"{_DIAMOND} by coverage alone: N {coverage[1]:,}")
    if not table["fits"].all():
        key.append(f"{_RING} too large")
    if at:
        ax.plot(*_place(table, at), **_CHOSEN)
    ax.set_ylim(0, 1.04 * max(1.0, float(table["high"].clip(upper=1.6).max())))
    _budget_axes(ax, table, "progress/s, of the best")
    style.add_title(ax, "   ".join(key), y=1)
    style.add_legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    return cast(Figure, ax.figure)


def _rows(count: int) -> str:
    return f"{count:,} row" + ("s" if count != 1 else "")


def _place(table: pd.DataFrame, option: tuple[int, int]) -> tuple[int, float]:
    """Where an option of so many rows and anchors is drawn."""
    options = list(table[["batch_size", "num_anchors"]].itertuples(index=False, name=None))
    style.require_one_of("rows and anchors", option, options)
    return option[1], float(table["rate"].iloc[options.index(option)])


def plot_budget(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    fit: pd.DataFrame,
    *,
    num_anchors: int,
    at: tuple[int, int],
    progress: pd.DataFrame | None = None,
    rows: int = 1,
    coverage: int | None = None,
) -> Figure:
    """Coverage, gain, cost and memory of a choice for training, in four panels.

    Args:
        options: ``table`` of :func:`dspark_lab.choose_training` for one block size and row length.
        cost, fit: of the chosen step, as in :func:`plot_parts`, and as in :func:`plot_fit`.
        at: where it stands in ``fit``: the longest row, and its blocks.
        progress: as in :func:`plot_progress`, of the chosen block size and row length; it takes the
            place of coverage and gain.
        rows, coverage: of the chosen step, and the anchors that cover most with so many rows.
    """
    shown = ["share", "gain_per_second", "fits"] if progress is None else []
    require_columns("options", options, ["num_anchors", "seconds", *shown])
    options = options.sort_values("num_anchors")
    style.require_one_of("num_anchors", num_anchors, options["num_anchors"].tolist())
    chosen = options[options["num_anchors"] == num_anchors]
    width, height = style.WIDEST, 5.6
    figure, axes = style.new_figure(width, height, columns=2, rows=2, layout="none")
    covered, gain, parts, fits = axes
    first = 2.6 if progress is None else 5.4
    # Fixed places, in inches, also of labels: finding the best ones would take long.
    for ax, left, bottom, wide, beside, under in (
        (covered, 0.7, 3.3, first, 0.55, 0.25),
        (gain, 4.2, 3.3, 3.0, 0.55, 0.25),
        (parts, 1.95, 0.5, 1.35, 1.8, 0.08),
        (fits, 4.2, 0.5, 3.0, 0.6, 0.25),
    ):
        ax.set_position((left / width, bottom / height, wide / width, _HIGH / height))
        ax.xaxis.set_label_coords(0.5, -under / _HIGH)
        ax.yaxis.set_label_coords(-beside / wide, 0.5)
    if progress is None:
        _plot_coverage(covered, options, chosen)
        _plot_gain(gain, options, chosen)
    else:
        gain.remove()
        by_coverage = None if coverage is None else (rows, coverage)
        plot_progress(progress, at=(rows, num_anchors), coverage=by_coverage, ax=covered)
    plot_parts(cost, seconds=float(chosen["seconds"].iloc[0]), ax=parts)
    # Its title begins where that of the panel above does.
    style.add_title(parts, parts.get_title(loc="left"), y=1, x=(0.7 - 1.95) / 1.35)
    plot_fit(fit, at=at, ax=fits)
    return figure


def _plot_coverage(covered: Axes, options: pd.DataFrame, chosen: pd.DataFrame) -> None:
    covered.plot(options["num_anchors"], options["share"], "-o", color=BLUE, markersize=4)
    covered.plot(chosen["num_anchors"], chosen["share"], **_CHOSEN)
    covered.set_ylim(0, 1.02)
    _budget_axes(covered, options, "tokens covered")
    words = (
        f"{_STAR} chosen: N {chosen['num_anchors'].iloc[0]:,} covers {chosen['share'].iloc[0]:.0%}"
    )
    style.add_title(covered, words, y=1)


def _plot_gain(ax: Axes, options: pd.DataFrame, chosen: pd.DataFrame) -> None:
    """Relative to the best that fits, or to the best of all where nothing does."""
    fits = options["fits"]
    possible = options[fits] if fits.any() else options
    best = possible.loc[[possible["gain_per_second"].idxmax()]]
    unit = best["gain_per_second"].iloc[0]
    gain = options["gain_per_second"] / unit
    _line_and_marks(ax, options["num_anchors"], gain, fits, 0)
    key = [f"{_STAR} chosen"]
    if fits.any():
        frame: dict[str, Any] = {"markersize": 11, "fillstyle": "none", "markeredgewidth": 1.8}
        ax.plot(best["num_anchors"], [1], "s", color=GREEN, **frame)
        key.append(f"{_SQUARE} best that fits: N {best['num_anchors'].iloc[0]:,}")
    if not fits.all():
        key.append(f"{_RING} too large")
    ax.plot(chosen["num_anchors"], chosen["gain_per_second"] / unit, **_CHOSEN)
    ax.set_ylim(0, 1.08 * gain.max())
    _budget_axes(ax, options, "gain/s, of the best")
    style.add_title(ax, "   ".join(key), y=1)


def _line_and_marks(
    ax: Axes, x: pd.Series, y: pd.Series, filled: pd.Series, i: int, label: str = "", **look: Any
) -> None:
    """Line ``i``, with hollow marks where they are not to be filled."""
    full, look = filled.to_numpy(dtype=bool), style.line_look(i) | {"markersize": 5} | look
    ax.plot(x, y, linewidth=1.4, label=label, markevery=full, **look)
    ax.plot(x[~full], y[~full], **look | {"linestyle": "none", "fillstyle": "none"})


def _plot_bytes(ax: Axes, memory: pd.DataFrame, limit: float | None) -> None:
    held = (memory["held"] / 1e9).to_numpy()
    _bars(ax, memory["part"], held, [f"{size:.2f} GB" if size else "0" for size in held], GREEN)
    ax.set_xlabel("held, in GB")
    ax.set_ylabel("what is held")
    title = f"{held.sum():.1f} GB at the fullest moment: {memory['moment'].iloc[0]}"
    if limit is not None and math.isfinite(limit):
        title += f"\n{held.sum() / (limit / 1e9):.0%} of the {limit / 1e9:.1f} GB that it may take"
    style.add_title(ax, title, y=1)


def _bars(ax: Axes, names: pd.Series, values: np.ndarray, labels: list[str], colour: str) -> None:
    """A bar for each part, the first on top; its axis names the part and its value."""
    y = np.arange(len(values))
    ax.barh(y, values, 0.7, color=colour)
    ax.set_yticks(y, [f"{name}  {label}" for name, label in zip(names, labels, strict=True)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.set_xticks([])


def _budget_axes(ax: Axes, options: pd.DataFrame, label: str) -> None:
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 5, 10]))
    style.percent_axis(ax, label)
    ax.set_xscale("log", base=2)
    _name_doublings(ax.xaxis, options["num_anchors"].tolist())
    ax.set_xlabel("num_anchors")


def _name_doublings(axis: Any, values: list[int], zero: str = "") -> None:
    """Ticks at powers of two, as plain numbers, and at 0 where it has a name."""
    positive = [value for value in values if value > 0] or [1]
    powers = range(math.floor(math.log2(min(positive))), math.ceil(math.log2(max(positive))) + 1)
    ticks = [2**power for power in powers[:: -(-len(powers) // _MOST_TICKS)]]
    names = [f"{tick:,}" for tick in ticks]
    if zero:
        ticks, names = [0, *ticks], [zero, *names]
    axis.set_ticks(ticks, names)
    axis.set_minor_locator(NullLocator())


@checked
def explore_training_budget(
    chats: ChatsLike | None = None,
    model: Shape | str | os.PathLike[str] | Mapping[str, Any] | DrafterConfig = "qwen3-4b",
    tokenizer: Any = None,
    *,
    num_anchors: Count = 512,
    block_size: Count | None = None,
    seq_len: Count = 4096,
    packed: bool = True,
    per: Per = "row",
    batch_size: Count = 1,
    card: str | None = None,
    time: StepTime | None = None,
    memory: float | None = None,
    noise: GradientNoise | str | os.PathLike[str] | None = None,
    gamma: Positive = 4.0,
    export: str = "dspark-lab",
    dtype: Dtype = "bf16",
    features: Literal["live", "cached"] = "live",
    target_dtype: Dtype | None = None,
    objective: Literal["chunked", "full"] = "chunked",
    supervised: Share = 1.0,
    vocabulary: Count | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    like: Like | None = None,
) -> Explorer:
    """Progress, coverage, cost and memory of a training step on these conversations.

    Args:
        chats, tokenizer, like: as in :func:`explore_anchors`.
        model: a shape, or what :meth:`dspark_lab.tuning.Shape.of` makes one of.
        num_anchors, block_size, seq_len, packed, per, batch_size, export: where the controls start;
            ``export`` at "json" or one of :data:`~dspark_lab.tuning.TRAINERS`, ``block_size`` at 7,
            or the nearest that the noise is known of, where None.
        card: where that control starts, one of :data:`~dspark_lab.tuning.CARDS`, of whose peak a
            share is assumed, or "measured here", the default with ``time``; an H100 otherwise.
        time: step times fitted on the user's own device; the choice "measured here".
        memory: bytes of that device; everything fits there where None.
        noise: of gradients, from :func:`dspark_lab.tuning.measure_noise`, or a file of it
            (:func:`dspark_lab.tuning.save_noise`). Expected progress a second then takes the place
            of coverage, rows are recommended, too, and block sizes are those that were measured.
        gamma: decay of the slots' weights.
        dtype, features, target_dtype, objective, supervised, vocabulary, device: see
            :class:`dspark_lab.tuning.Step`.

    Returns:
        an explorer whose ``table`` has a line per number of anchors, see
        :func:`dspark_lab.choose_training`. ``tables`` also has ``recommended`` (its best line, with
        the reason), ``settings`` (the chosen ones), ``coverage``, ``slots`` and ``never`` (of
        tokens), ``cost``, ``memory`` and ``fit``. With ``noise`` also ``progress``
        (:func:`~dspark_lab.tuning.progress_table`), and ``recommended`` has a line of its best
        option and one of what coverage alone would recommend.
    """
    given = dict(locals())
    if isinstance(noise, (str, os.PathLike)):
        noise = tuning.load_noise(noise)
    sizes = range(1, 17) if noise is None else noise.block_sizes
    if block_size is None:
        block_size = min(sizes, key=lambda size: abs(size - 7))
    elif noise is not None and block_size not in sizes:
        raise ValueError(
            f"block_size must be one of {sizes}, whose noise was measured, got {block_size}"
        )
    shape = model if isinstance(model, Shape) else Shape.of(model)
    step_options: dict[str, Any] = {"dtype": dtype, "features": features, "device": device}
    step_options |= {"target_dtype": target_dtype, "objective": objective}
    step_options |= {"supervised": supervised, "vocabulary": vocabulary}
    tuning.Step(seq_len, num_anchors, block_size, batch_size, **step_options).require_fit(shape)
    if time is None and memory is not None:
        raise ValueError(f"memory must come with a time, got {memory} without")
    if memory is not None:
        tuning.usable_bytes(memory)
    cards: dict[str, tuple[Any, Any]] = {} if time is None else {MEASURED: (time, memory)}
    cards |= {name: (name, name) for name in tuning.CARDS}
    controls = [
        make.selection_slider("num_anchors", num_anchors, sorted({*_NUM_ANCHORS, num_anchors})),
        make.slider("block_size", block_size, 1, 16)
        if noise is None
        else make.selection_slider("block_size", block_size, sizes),
        make.selection_slider("seq_len", seq_len, sorted({*_SEQ_LENS, seq_len})),
        make.checkbox("packed", packed),
        make.dropdown("per", per, PER),
        make.slider("batch_size", batch_size, 1, 64),
        make.dropdown("card", card or (MEASURED if time else "H100"), tuple(cards)),
        make.dropdown("export", export, ("json", *tuning.TRAINERS)),
    ]
    tokenizer = loaded_tokenizer(tokenizer)
    if isinstance(chats, (str, os.PathLike)):
        require_found(chats)
    elif chats is not None:
        require_some(chats)

    # What is encoded once, on the worker's thread.
    rows: list[Sequence[Encoded]] = []

    @lru_cache(maxsize=8)
    def spans_of(seq_len: int, packed: bool, batch_size: int) -> Spans:
        spans = Spans.of(rows[0], seq_len=seq_len, row_length=seq_len if packed else None)
        return tuning.in_training_batches(spans, batch_size)

    choice_of = lru_cache(maxsize=8)(tuning.choose_training)

    @lru_cache(maxsize=8)
    def progress_of(
        chosen: tuple[int, bool, int], batch_sizes: tuple[int, ...], card: str, **options: Any
    ) -> pd.DataFrame:
        assert isinstance(noise, tuning.GradientNoise)
        time, memory = cards[card]
        time = time if isinstance(time, StepTime) else tuning.card_time(time)
        step = tuning.Step(1, 1, 1, **step_options)
        options |= {"shape": shape, "step": step, "memory": memory}
        return tuning.progress_table(
            noise, spans_of(*chosen), time, batch_sizes=batch_sizes, **options
        )

    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        if not rows:
            made = encode_chats(chats, tokenizer, like=like, progress=progress)
            require_some(made)
            rows.append(made)
        progress(0, 0, "counting what a step covers, costs and needs")
        spans = spans_of(chosen.seq_len, chosen.packed, chosen.batch_size)
        n, k, per, batch_size = chosen.num_anchors, chosen.block_size, chosen.per, chosen.batch_size
        candidates = int(spans.candidates(per).max())
        if not candidates:
            raise ValueError(
                "No conversation has two supervised tokens in a row among its first "
                f"{chosen.seq_len:,}: there is nothing to learn from. Choose a longer row."
            )
        blocks, most = tuning.row_blocks(spans, n, per)
        if most > _MOST_BLOCKS:
            raise ValueError(
                f"A row has {most:,} blocks, more than {_MOST_BLOCKS:,}. Choose fewer."
            )
        tried = tuple(sorted({n, *(other for other in _NUM_ANCHORS if other <= candidates)}))
        time, memory = cards[chosen.card]
        asked: dict[str, Any] = {"time": time, "memory": memory, "num_anchors": tried}
        asked |= {"block_sizes": (k,), "per": per, "batch_size": batch_size, "gamma": gamma}
        choice = choice_of(spans, shape, **asked, **step_options)
        line = choice.table[choice.table["num_anchors"] == n].iloc[0]
        longest = int(line["seq_len"])
        step = {"num_anchors": blocks, "block_size": k, "batch_size": batch_size, **step_options}
        cost = tuning.training_cost(shape, seq_len=max(1, round(line["row_tokens"])), **step)
        room = memory or math.inf
        fit = tuning.fit_table(shape, room, _SEQ_LENS, (k,), batch_size=batch_size, **step_options)

        def settings_of(num_anchors: int, batch_size: int) -> tuning.TrainingSettings:
            return tuning.TrainingSettings(
                *(num_anchors, k, chosen.seq_len, batch_size, gamma),
                pack_length=chosen.seq_len if chosen.packed else None,
                per=per,
                layout=shape.layout,
            )

        settings = settings_of(n, batch_size)
        best = None if choice.best is None else int(choice.best["num_anchors"])
        counted: dict[str, Any] = {"gamma": gamma, "per": per, "layout": shape.layout}
        recommended = {} if choice.best is None else choice.best.to_dict()
        recommended |= {"sure": choice.sure, "reason": choice.reason}
        tables = {
            "options": choice.table,
            "recommended": pd.DataFrame([recommended]),
            "settings": pd.DataFrame([asdict(settings)]),
            "coverage": tuning.supervision_table(spans, tried, (k,), **counted),
            "slots": tuning.slot_supervision(spans, n, k, **counted),
            "never": tuning.never_table(spans),
            "cost": cost,
            "memory": tuning.memory_table(shape, seq_len=longest, **(step | {"num_anchors": most})),
            "fit": fit,
        }

        said = [choice.reason, _in_words(line, chosen, tuning.usable_bytes(room))]
        use = {} if best is None else {"num_anchors": best}
        marks: dict[str, Any] = {"num_anchors": n, "at": (longest, most)}
        if noise is None:
            said.append(_UNKNOWN)
        else:
            tables["progress"] = surface = progress_of(
                (chosen.seq_len, chosen.packed, 1),
                tuple(sorted({b for b in _BATCH_SIZES if b <= spans.rows} | {batch_size})),
                chosen.card,
                num_anchors=tried,
                block_sizes=(k,),
                per=per,
            )
            marks |= {"rows": batch_size, "coverage": best}
            marks["progress"] = _near(surface, batch_size)
            if surface["fits"].any():
                tables["recommended"] = both = _recommended(surface, batch_size, best)
                use = {name: int(both[name].iloc[0]) for name in ("num_anchors", "batch_size")}
                said = [both["reason"].iloc[0], said[1], *both["reason"].iloc[1:]]
                if not isinstance(time, StepTime):
                    said[0] += " Step times are assumed, not measured."

        def figure() -> Figure:
            return plot_budget(choice.table, cost, fit, **marks)

        words = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
        advised = settings_of(**{"batch_size": batch_size, **use}) if use else None
        words += export_texts(chosen.export, advised, settings, tuning.export)
        alt = "what the chosen setting teaches, costs and leaves room for"
        return Frame(tables, figure, html=words, alt=alt, recommended=use)

    options: dict[str, Any] = {"slow": True, "given": given}
    return Explorer("explore_training_budget", controls, draw, **options)


def _recommended(progress: pd.DataFrame, batch_size: int, covering: int | None) -> pd.DataFrame:
    """The best option by progress, and that by coverage: so many anchors of so many rows."""
    best = tuning.best_option(progress)
    options, reasons = [best], [tuning.progress_reason(progress)]
    if covering is not None:
        mine = progress["batch_size"] == batch_size
        other = progress[mine & (progress["num_anchors"] == covering)].iloc[0]
        said = f"By coverage alone it would be N {covering:,} with {_rows(batch_size)}"
        if best["rate"] > 0:
            said += f", which makes {other['rate'] / best['rate']:.0%} of that progress a second"
        options.append(other)
        reasons.append(f"{said}.")
    columns = ["batch_size", "num_anchors", "block_size", "seconds", "rate", "low", "high", "best"]
    table = progress.loc[[one.name for one in options], columns].reset_index(drop=True)
    table.insert(0, "by", ["progress", "coverage"][: len(table)])
    return table.assign(reason=reasons)


def _near(progress: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """The lines of the best number of rows, half and twice as many, and the chosen number."""
    shown = {batch_size}
    if progress["fits"].any():
        best = tuning.best_option(progress)["batch_size"]
        shown |= {best // 2, best, 2 * best}
    return progress[progress["batch_size"].isin(shown)]


def _in_words(line: pd.Series, chosen: SimpleNamespace, limit: float) -> str:
    """The chosen setting in a sentence."""
    counted = {"document": " for each document", "batch": " in total"}.get(chosen.per, "")
    held, seconds = line["memory_bytes"] / 1e9, line["seconds"]
    place = "on the device that was measured" if chosen.card == MEASURED else f"on {chosen.card}"
    room = "" if math.isinf(limit) else f" of {limit / 1e9:.1f} GB that it may take"
    said = (
        f"Your setting now: N {chosen.num_anchors:,}{counted}, K {chosen.block_size}, "
        f"S {chosen.seq_len:,} covers {line['share']:.0%} of the supervised tokens in a pass; "
        f"a step {place} takes {seconds:.3g} s and {held:.1f} GB{room}"
    )
    if line["seq_len"] < chosen.seq_len:
        said += f", as the longest row has {line['seq_len']:,.0f} tokens"
    said += "." if line["fits"] else ": it does not fit."
    return said
