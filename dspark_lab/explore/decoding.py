"""Decoding: an answer as text in colour, the distributions at a slot, an answer that grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dspark_lab import decoding
from dspark_lab.checks import Size, checked
from dspark_lab.decoding import OUTCOMES, Decoded, Prompt, Round
from dspark_lab.explore import style
from dspark_lab.explore.controls import Control, dropdown, number_slider, slider, text_area
from dspark_lab.explore.explorer import Explorer, Frame
from dspark_lab.explore.models import DrafterLike, Models, Prompts, TargetLike, open_models
from dspark_lab.explore.style import BLUE, GREEN, INK, ORANGE, PAPER, RED, visible_text
from dspark_lab.explore.textpicture import Look, text_figure
from dspark_lab.explore.widget import WidgetView
from dspark_lab.explore.work import Cancelled, Progress, threads_for
from dspark_lab.serving import repeated_speeds

# While an answer grows, its text is shown anew when it is at least so old.
REDRAW_SECONDS = 0.1
# Runs with and without the drafter, in turns, whose median is the speed.
REPEATS = 3

_NUMBERS = ("confidence", "accept_rate", "accept_prob", "draft_prob", "target_prob")
# How a picture of an answer marks its tokens.
_LOOKS = {
    "accepted": Look("#CFE7F5"),
    "corrected": Look("#F8DFA6", "underline", "#8A6000"),
    "bonus": Look("#BFE5D6", "dotted", GREEN),
    "first": Look(sign="double"),
    "rejected": Look(PAPER, "frame", RED, ink="#A03000"),
    "not reached": Look(PAPER, "frame", INK, ink=INK),
    "not verified": Look(PAPER, "frame", INK, ink=INK),
}
_NOT_SAID = Look(PAPER, ink=INK)


class DecodingView(WidgetView):
    """An answer as text whose tokens open their slots, or a chart of answers."""

    names: ClassVar[tuple[str, ...]] = ("shared", "decoding", "chart", "answers")


@checked
def plot_outcomes(table: pd.DataFrame, drafts: bool = False) -> Figure:
    """An answer, from :func:`dspark_lab.decoding.outcome_table`, as text in colour under its key.

    With ``drafts``, drafted tokens that are not part of the answer stand, in frames and with "not
    said" before them, where another came in their place.
    """
    counts = decoding.column(table, "outcome").value_counts()
    shown = table if drafts else table[table["kept"]]
    known = set(shown["outcome"])
    legend = [(f"{name} {counts[name]}", _LOOKS[name]) for name in _LOOKS if name in known]
    pieces: list[tuple[str, Look]] = []
    kept = True
    for token in shown.itertuples(index=False):
        if kept and not token.kept:
            pieces.append((" not said:", _NOT_SAID))
        elif token.kept and not kept:
            pieces.append((" ", _NOT_SAID))
        kept = token.kept
        # A line break that is not part of the answer does not break its line.
        text = token.text if kept else token.text.replace("\n", "⏎")
        pieces.append((text, _LOOKS[token.outcome]))
    return text_figure(pieces, legend, noun="pieces" if drafts else "tokens")


def plot_distributions(table: pd.DataFrame, drafted_text: str | None = None) -> Figure:
    """The two distributions at one slot, from :func:`dspark_lab.decoding.distribution_table`.

    The filled part of each pair of bars is the overlap, whose sum is the accept rate; a diamond is
    the probability with which the token is drawn in place of a rejected one. ``drafted_text`` names
    the drafted token in the title, in place of its text in the table.
    """
    figure, ax = style.new_figure(style.WIDEST, 0.36 * len(table) + 1.4)
    y = np.arange(len(table))
    overlap = table["overlap"].fillna(0)
    bars = {"draft": (ORANGE, "////", -0.19), "target": (BLUE, "", 0.19)}
    for name, (colour, hatch, shift) in bars.items():
        ax.barh(y + shift, overlap, 0.34, color=colour, hatch=hatch, edgecolor=INK, linewidth=0)
        ax.barh(y + shift, table[name], 0.34, color="none", edgecolor=colour, linewidth=1.2)
    rest = table["residual"].where(table["residual"] > 0)
    diamond: dict[str, Any] = {"marker": "D", "color": RED, "fillstyle": "none", "markersize": 5}
    ax.plot(rest, y, linestyle="", clip_on=False, **diamond)
    ends = table[["draft", "target", "residual"]].max(axis=1)
    for i, row in enumerate(table.itertuples(index=False)):
        words = ["drafted"] * row.drafted + ["drawn by the target"] * row.drawn
        if words:
            note = "← " + ",\n    ".join(words)
            style.add_note(ax, note, (ends.iloc[i], i), (8, 0), va="center")
    written = table["text"].map(visible_text)
    named = written.where(written != "", "(id " + table["token"].astype(str) + ")")
    ax.set_yticks(y, named.where(table["token"] >= 0, table["text"]))
    ax.set_ylim(len(table) - 0.4, -0.6)
    # Room for the words beside the longest bar, but no tick beyond certainty.
    longest = float(ends.max())
    ticks = MaxNLocator(6).tick_values(0, longest)
    ax.set_xticks([tick for tick in ticks if tick <= 1])
    ax.set_xlim(0, 1.3 * longest)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set(xlabel="probability", ylabel="token")
    if drafted_text is None and table["drafted"].any():
        drafted_text = table.loc[table["drafted"], "text"].iloc[0]
    title = "nothing drafted"
    if drafted_text is not None:
        asked = table["overlap"].notna().all()
        rate = f"accept rate {table['overlap'].sum():.3f}" if asked else "the target was not asked"
        title = f"drafted {visible_text(drafted_text)}   {rate}"
    style.add_title(ax, title, pad=22)
    handles = [
        Patch(facecolor=ORANGE, edgecolor=INK, hatch="////", linewidth=0, label="draft"),
        Patch(facecolor=BLUE, linewidth=0, label="target"),
        Patch(facecolor="none", edgecolor=INK, label="outline: not shared"),
        Line2D([], [], linestyle="", label="residual", **diamond),
    ]
    style.legend_above(ax, 4, handles=handles)
    return figure


@checked
def decoding_state(
    decoded: Decoded,
    to_text: Callable[[int], str],
    *,
    prompt: Size = 0,
    rounds: Sequence[Round] = (),
) -> dict[str, Any]:
    """What the browser is given of an answer: its tokens, and every slot's distributions.

    The rows are those of :func:`dspark_lab.decoding.outcome_table` and of
    :func:`dspark_lab.decoding.distribution_table`, of ``rounds`` as far as they are given.
    """
    table = decoding.outcome_table(decoded, to_text, prompt)
    tokens: dict[str, Any] = {
        name: table[name].tolist() for name in ("round", "slot", "position", "text")
    }
    tokens["outcome"] = [OUTCOMES.index(outcome) for outcome in table["outcome"]]
    tokens |= {name: _numbers(table[name]) for name in _NUMBERS}
    slots = [_slot_states(round_, to_text) for round_ in rounds]
    return {"show": "answer", "tokens": tokens, "slots": slots}


def _slot_states(round_: Round, to_text: Callable[[int], str]) -> list[dict[str, Any]]:
    table = decoding.distribution_tables(round_, to_text)
    ends = np.flatnonzero(np.diff(table["slot"], append=-1)) + 1
    columns = {name: table[name].tolist() for name in ("token", "text", "drafted", "drawn")}
    columns |= {name: _numbers(table[name]) for name in ("draft", "target", "overlap", "residual")}
    states = []
    for begin, end in zip([0, *ends], ends, strict=False):
        rows = {name: column[begin:end] for name, column in columns.items()}
        asked = rows["target"][0] is not None
        state = {"ids": rows["token"], "texts": rows["text"], "draft": rows["draft"]}
        state |= {n: rows[n] if asked else None for n in ("target", "overlap", "residual")}
        state |= {n: rows[n].index(True) if True in rows[n] else -1 for n in ("drafted", "drawn")}
        states.append(state)
    return states


def _numbers(values: pd.Series) -> list[float | None]:
    """Numbers as JSON knows them."""
    return [None if np.isnan(value) else round(value, 7) for value in values.tolist()]


@checked
def explore_decoding(
    target: TargetLike | None = None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None = None,
    prompts: Prompts | None = None,
    *,
    temperature: float = 0.0,
    threshold: float = 0.0,
    max_new_tokens: int = 96,
    seed: int = 0,
    run: bool = True,
) -> DecodingExplorer:
    """One answer, decoded while you watch, and then slot by slot.

    ``target``, ``drafter`` and ``prompts`` are as in :func:`explore_acceptance`, the rest is where
    the controls start; a threshold of 0 verifies every slot. A control that changes begins anew.
    ``run`` answers the first prompt at once.
    """
    given = dict(locals())
    models_of = open_models(target, drafter, prompts)
    at_once = [
        number_slider("temperature", temperature, 0.0, 2.0, continuous_update=False),
        number_slider("threshold", threshold, 0.0, 1.0, continuous_update=False),
        slider("max_new_tokens", max_new_tokens, 1, 512),
        slider("seed", seed, 0, 99),
    ]
    at_once[2].continuous_update = at_once[3].continuous_update = False
    return DecodingExplorer(models_of, at_once, run, given)


@dataclass
class _Answer:
    """An answer to one prompt: decoded again and again, with the drafter and without."""

    block_size: int
    rounds: list[Round] = field(default_factory=list)
    drafted: list[Decoded] = field(default_factory=list)
    plain: list[Decoded] = field(default_factory=list)

    def speeds(self) -> pd.DataFrame | None:
        """Beside plain decoding, run by run; None before both have had a round."""
        pairs = [
            (plain, drafted)
            for plain, drafted in zip(self.plain, self.drafted, strict=False)
            if len(plain.rounds) and len(drafted.rounds)
        ]
        if not pairs:
            return None
        plain, drafted = zip(*pairs, strict=True)
        return repeated_speeds(plain, drafted, self.block_size)

    def in_words(self) -> str:
        decoded, speeds = self.drafted[0], self.speeds()
        tokens = f"{len(decoded.tokens[0])} tokens in {len(decoded.rounds)} rounds"
        if not len(decoded.rounds):
            return f"{len(decoded.tokens[0])} tokens, no round"
        if speeds is None:
            return f"{tokens}, tau {decoded.tau:.2f}"
        middle, low, high = (getattr(speeds, name)() for name in ("median", "min", "max"))
        runs = f"median of {len(speeds)} runs" if len(speeds) > 1 else "one run"
        return (
            f"{tokens}, tau {decoded.tau:.2f}; break-even tau here {middle['break_even_tau']:.2f}: "
            f"{middle['tokens_per_second']:.0f} tokens/s, plain "
            f"{middle['plain_tokens_per_second']:.0f}, {middle['gain']:.2f} times "
            f"({runs}, {low['gain']:.2f} to {high['gain']:.2f}; draft {middle['draft']:.0%}, "
            f"verify {middle['verify']:.0%}, rest {middle['rest']:.0%})"
        )


@checked
class DecodingExplorer(Explorer):
    """An answer that grows under its controls; a click on a token opens its slot.

    ``decoded`` and ``plain`` are what :func:`dspark_lab.decoding.decode` returned with and without
    the drafter, ``rounds`` the rounds with their distributions, on the CPU. What is asked for
    while it works is waited for.
    """

    def __init__(
        self,
        models_of: Callable[[Progress], Models],
        at_once: Sequence[Control],
        run: bool,
        given: Mapping[str, Any],
    ) -> None:
        self._models_of, self._asked_for = models_of, run

        def controls(progress: Progress) -> list[Control]:
            models = models_of(progress)
            names = list(models.drafters)
            labels = [short_prompt(prompt) for prompt in models.prompts]
            examples = dropdown("example", 0, range(len(labels)), labels=labels, argument=False)
            chosen = dropdown("drafter", names[0], names, argument=False)
            return [examples, text_area("prompt", ""), chosen, *at_once]

        def reasons(chosen: SimpleNamespace) -> dict[str, str]:
            return {"example": "a prompt of your own is answered"} if chosen.prompt.strip() else {}

        options: dict[str, Any] = {"view": DecodingView, "slow": True, "given": given}
        super().__init__("explore_decoding", controls, self._answer, reasons=reasons, **options)

    @property
    def rounds(self) -> list[Round]:
        answer = self.frame.detail
        return [] if answer is None else answer.rounds

    @property
    def decoded(self) -> Decoded | None:
        answer = self.frame.detail
        return None if answer is None else answer.drafted[0]

    @property
    def plain(self) -> Decoded | None:
        answer = self.frame.detail
        return None if answer is None or not answer.plain else answer.plain[0]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """``tokens``, ``distributions`` (of the chosen slot), ``rounds``, ``trace``, ``speed``.

        Without a choice, the slot of the first round where it was decided. Empty before the first
        run, and where a run was refused.
        """
        tables = super().tables
        rounds = self.rounds
        if not rounds:
            return tables
        chosen = self.selection or {}
        number = chosen.get("round", 0)
        if not 0 <= number < len(rounds):
            number, chosen = 0, {}
        slot = chosen.get("slot", rounds[number].accepted)
        to_text = self._models_of(Progress()).to_text
        shown = decoding.distribution_table(rounds[number], slot, to_text)
        first, *others = tables.items()
        return dict([first, ("distributions", shown), *others])

    def select(self, round: Size, slot: Size | None = None) -> None:
        """Open a slot of a round, by default the one where the round was decided."""
        rounds = self.rounds
        if round >= len(rounds):
            raise ValueError(f"round must be below {len(rounds)}, got {round}")
        one = rounds[round]
        last = max(len(one.drafted) - 1, one.verified)
        if slot is not None and slot > last:
            raise ValueError(f"slot must be in [0, {last}], got {slot}")
        if self.view is not None:
            self.view.selection = {"round": round, "slot": one.accepted if slot is None else slot}

    def run(self) -> None:
        """Answer the prompt with the controls' present values, and wait until it is done."""
        self._asked_for = True
        self.redraw()
        _ = self.frame

    def _answer(self, chosen: SimpleNamespace, progress: Progress) -> Frame:
        models = self._models_of(progress)
        if not self._asked_for:
            self._asked_for = True
            raise ValueError("not run yet: change a control, or call run()")
        target, drafter = models.target, models.drafters[chosen.drafter]
        asked = chosen.prompt if chosen.prompt.strip() else models.prompts[chosen.example]
        options: dict[str, Any] = {
            name: getattr(chosen, name) for name in ("temperature", "max_new_tokens", "seed")
        }
        answer = _Answer(drafter.config.predicted)
        shown = {"asked": short_prompt(asked, 2000), "words": ""}

        def rounds_of(with_drafter: bool) -> Any:
            one = drafter if with_drafter else None
            more = {"threshold": chosen.threshold or None} if with_drafter else {}
            return decoding.decode_rounds(target, one, [asked], **more, **options)

        def decode_once(with_drafter: bool, words: str) -> None:
            run, done = rounds_of(with_drafter), 0
            first = with_drafter and not answer.drafted
            redraw_at = 0.0
            try:
                for round_ in run:
                    done += len(round_.tokens)
                    if first:
                        answer.rounds.append(_on_host(round_))
                    progress(done, options["max_new_tokens"], words)
                    if first and time.monotonic() > redraw_at:
                        redraw_at = time.monotonic() + REDRAW_SECONDS
                        grown = decoding_state(run.result(), models.to_text)
                        self._show_grown(grown | shown | {"running": True})
            except Cancelled:
                if first:
                    answer.drafted.append(run.result())
                raise
            (answer.drafted if with_drafter else answer.plain).append(run.result())

        try:
            with threads_for(target.model):
                decode_once(True, "the answer grows")
                for number in range(REPEATS):
                    turns = [False] if number == 0 else [number % 2 == 0, number % 2 == 1]
                    for with_drafter in turns:
                        how = "with" if with_drafter else "without"
                        words = f"timed {how} the drafter, run {number + 1} of {REPEATS}"
                        decode_once(with_drafter, words)
        except Cancelled:
            # What there is stays.
            if not answer.drafted:
                raise
        decoded = answer.drafted[0]
        shown["words"] = answer.in_words()
        state = decoding_state(decoded, models.to_text, rounds=answer.rounds) | shown
        tokens = decoding.outcome_table(decoded, models.to_text)
        tables = {"tokens": tokens, "rounds": decoded.rounds, "trace": decoded.trace}
        speeds = answer.speeds()
        if speeds is not None:
            tables["speed"] = speeds
        alt = "the answer in the colours of its tokens' outcomes"
        return Frame(tables, lambda: plot_outcomes(tokens), alt, state=state, detail=answer)

    def _show_grown(self, state: dict[str, Any]) -> None:
        """Show what there is of an answer; it is no new frame."""
        if self.view is not None:
            self.view.state = state | {"frame": self.frames_drawn}


def _on_host(round_: Round) -> Round:
    draft_probs, target_probs = round_.draft_probs.cpu(), round_.target_probs.cpu()
    return replace(round_, draft_probs=draft_probs, target_probs=target_probs)


def short_prompt(prompt: Prompt, longest: int = 90) -> str:
    """A prompt in one line of at most ``longest`` characters."""
    whole = prompt if isinstance(prompt, str) else str([int(token) for token in prompt])
    text = " ".join(whole.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
