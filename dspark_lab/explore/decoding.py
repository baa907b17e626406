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
from dspark_lab.checks import Size, checked, require_columns
from dspark_lab.decoding import OUTCOMES, Decoded, Prompt, Round
from dspark_lab.explore import style
from dspark_lab.explore.controls import Control, dropdown, number_slider, slider, text_area
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame
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
    require_columns("table", table, ["outcome", "text", "kept"])
    counts = table["outcome"].value_counts()
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
    chances = ["draft", "target", "overlap", "residual"]
    require_columns("table", table, ["token", "text", *chances, "drafted", "drawn"])
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

    The columns are those of :func:`dspark_lab.decoding.outcome_table` and of the
    :func:`dspark_lab.decoding.distribution_table` of all slots of ``rounds``, where they are given.
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
    """The distributions of the slots of a round by columns.

    ``drafted`` and ``drawn`` are the rows of these tokens, -1 where there is none; ``target``,
    ``overlap`` and ``residual`` are None where the target was not asked.
    """
    table = decoding.distribution_tables(round_, to_text)
    states = []
    for _, rows in table.groupby("slot"):
        state = {"ids": rows["token"].tolist(), "texts": rows["text"].tolist()}
        state["draft"] = _numbers(rows["draft"])
        asked = rows["target"].notna().all()
        for name in ("target", "overlap", "residual"):
            state[name] = _numbers(rows[name]) if asked else None
        for name in ("drafted", "drawn"):
            marked = rows[name].tolist()
            state[name] = marked.index(True) if True in marked else -1
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
) -> DecodingExplorer:
    """One answer, decoded while you watch, then slot by slot, and its speed.

    ``target``, ``drafter`` and ``prompts`` are as in :func:`explore_acceptance`, the rest is where
    the controls start; a threshold of 0 verifies every slot. A control that changes begins anew.
    """
    given = dict(locals())
    models_of = open_models(target, drafter, prompts)
    settings = [
        number_slider("temperature", temperature, 0.0, 2.0, continuous_update=False),
        number_slider("threshold", threshold, 0.0, 1.0, continuous_update=False),
        slider("max_new_tokens", max_new_tokens, 1, 512),
        slider("seed", seed, 0, 99),
    ]
    for setting in settings:
        setting.continuous_update = False
    return DecodingExplorer(models_of, settings, given)


@dataclass
class _Answer:
    """An answer to one prompt, its rounds, and its timed runs with the drafter and without."""

    block_size: int
    decoded: Decoded = field(init=False)
    rounds: list[Round] = field(default_factory=list)
    slots: list[list[dict[str, Any]]] = field(default_factory=list)
    drafted: list[Decoded] = field(default_factory=list)
    plain: list[Decoded] = field(default_factory=list)

    def speeds(self) -> pd.DataFrame | None:
        """Beside plain decoding; None before both have had a round."""
        both = list(zip(self.plain, self.drafted, strict=False))
        if not both or any(one.rounds.empty for pair in both for one in pair):
            return None
        plain, drafted = zip(*both, strict=True)
        return repeated_speeds(plain, drafted, self.block_size)

    def state(self, to_text: Callable[[int], str], cancelled: str = "") -> dict[str, Any]:
        """What the browser is given of the whole answer, with a sentence where it is cut short."""
        words = f"{self.in_words()} {cancelled}".strip()
        return decoding_state(self.decoded, to_text) | {"slots": self.slots, "words": words}

    def in_words(self) -> str:
        """How many tokens in how many rounds, and how fast."""
        tokens, rounds, speeds = len(self.decoded.tokens[0]), len(self.rounds), self.speeds()
        if not rounds:
            return f"{tokens} tokens, no round."
        words = f"{tokens} tokens in {rounds} rounds: tau {self.decoded.tau:.2f} tokens a round"
        if speeds is None:
            return f"{words}."
        middle, low, high = (row for _, row in speeds.iterrows())
        return (
            f"{words}, break-even {middle['break_even_tau']:.2f} on this machine. "
            f"{middle['tokens_per_second']:,.0f} tokens/s, "
            f"{middle['plain_tokens_per_second']:,.0f} without the drafter: "
            f"{middle['speedup']:.2f} times as fast (median of {middle['runs']:.0f}, "
            f"{low['speedup']:.2f} to {high['speedup']:.2f}). Of a round's time: draft "
            f"{middle['draft']:.0%}, verify {middle['verify']:.0%}, rest {middle['rest']:.0%}."
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
        settings: Sequence[Control],
        given: Mapping[str, Any],
    ) -> None:
        self._models_of = models_of
        # What is chosen where no widget is shown.
        self._chosen: dict[str, int] | None = None

        def controls(progress: Progress) -> list[Control]:
            models = models_of(progress)
            names = list(models.drafters)
            labels = [short_prompt(prompt) for prompt in models.prompts]
            examples = dropdown("example", 0, range(len(labels)), labels=labels, argument=False)
            chosen = dropdown("drafter", names[0], names, argument=False)
            return [examples, text_area("prompt", ""), chosen, *settings]

        def reasons(chosen: SimpleNamespace) -> dict[str, str]:
            found = {}
            if chosen.prompt.strip():
                found["example"] = "a prompt of your own is answered"
            if not _has_confidence(models_of(Progress()), chosen):
                found["threshold"] = "this drafter has no confidence head"
            if chosen.temperature == 0:
                found["seed"] = "at temperature 0 nothing is drawn"
            return found

        options: dict[str, Any] = {"view": DecodingView, "slow": True, "given": given}
        super().__init__("explore_decoding", controls, self._answer, reasons=reasons, **options)

    @property
    def rounds(self) -> list[Round]:
        answer = self.frame.detail
        return [] if answer is None else answer.rounds

    @property
    def decoded(self) -> Decoded | None:
        answer = self.frame.detail
        return None if answer is None else answer.decoded

    @property
    def plain(self) -> Decoded | None:
        answer = self.frame.detail
        return answer.plain[0] if answer is not None and answer.plain else None

    @property
    def selection(self) -> Any:
        """The ``round`` and ``slot`` that are open; None where there are none."""
        return self._chosen if self.view is None else self.view.selection

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """``tokens``, ``distributions``, ``rounds``, ``trace``, ``speed``; empty where refused.

        The distributions are those of the open slot, or of the one where the first round was
        decided. The speed is beside plain decoding, the median and range of several runs.
        """
        tables, rounds = super().tables, self.rounds
        if not rounds:
            return tables
        chosen = self.selection or {}
        number = chosen.get("round", 0)
        if not 0 <= number < len(rounds) or chosen.get("slot", 0) > rounds[number].last_slot:
            number, chosen = 0, {}
        slot = chosen.get("slot", rounds[number].accepted)
        shown = decoding.distribution_table(
            rounds[number], slot, self._models_of(Progress()).to_text
        )
        first, *others = tables.items()
        return dict([first, ("distributions", shown), *others])

    def select(self, round: Size, slot: Size | None = None) -> None:
        """Open a slot of a round, by default the one where the round was decided."""
        rounds = self.rounds
        if round >= len(rounds):
            raise ValueError(f"round must be below {len(rounds)}, got {round}")
        one = rounds[round]
        if slot is not None and slot > one.last_slot:
            raise ValueError(f"slot must be in [0, {one.last_slot}], got {slot}")
        self._chosen = {"round": round, "slot": one.accepted if slot is None else slot}
        if self.view is not None:
            self.view.selection = self._chosen

    def _answer(self, chosen: SimpleNamespace, progress: Progress) -> Frame:
        models = self._models_of(progress)
        target, drafter, to_text = models.target, models.drafters[chosen.drafter], models.to_text
        asked = chosen.prompt if chosen.prompt.strip() else models.prompts[chosen.example]
        answer = _Answer(drafter.config.predicted)
        shown = {"asked": short_prompt(asked, 2000), "running": True}
        options: dict[str, Any] = {
            name: getattr(chosen, name) for name in ("temperature", "max_new_tokens", "seed")
        }
        threshold = chosen.threshold if _has_confidence(models, chosen) else 0.0

        def run(with_drafter: bool) -> decoding.Decoding:
            if not with_drafter:
                return decoding.decode_rounds(target, None, [asked], **options)
            return decoding.decode_rounds(
                target, drafter, [asked], threshold=threshold or None, **options
            )

        def grow() -> None:
            """Decode with the drafter, and show the answer as it grows."""
            growing, done, redraw_at = run(True), 0, 0.0
            progress(0, 0, "reading the prompt")
            try:
                for round_ in growing:
                    answer.rounds.append(_on_host(round_))
                    answer.slots.append(_slot_states(answer.rounds[-1], to_text))
                    done += len(round_.tokens)
                    progress(done, chosen.max_new_tokens, "the answer grows: token")
                    if time.monotonic() > redraw_at:
                        redraw_at = time.monotonic() + REDRAW_SECONDS
                        self._show_grown(decoding_state(growing.result(), to_text) | shown)
            finally:
                answer.decoded = growing.result()

        def measure(number: int, with_drafter: bool) -> None:
            timed, done = run(with_drafter), 0
            how = "with" if with_drafter else "without"
            for round_ in timed:
                done += len(round_.tokens)
                words = f"timed {how} the drafter, run {number + 1} of {REPEATS}: token"
                progress(done, chosen.max_new_tokens, words)
            (answer.drafted if with_drafter else answer.plain).append(timed.result())

        with threads_for(target.model):
            cancelled = "The answer was cancelled."
            try:
                grow()
                cancelled = "The measuring of its speed was cancelled."
                self._show_grown(answer.state(to_text) | shown)
                for number in range(REPEATS):
                    # In turns, so that what slows the machine down falls on both.
                    for with_drafter in (False, True) if number % 2 else (True, False):
                        measure(number, with_drafter)
                cancelled = ""
            except Cancelled:
                # What there is stays.
                if not answer.rounds:
                    raise
        state = answer.state(to_text, cancelled) | shown | {"running": False}
        tokens = decoding.outcome_table(answer.decoded, to_text)
        tables = {"tokens": tokens, "rounds": answer.decoded.rounds, "trace": answer.decoded.trace}
        speeds = answer.speeds()
        if speeds is not None:
            tables["speed"] = speeds
        return Frame(
            tables,
            lambda: plot_outcomes(tokens),
            "the answer in the colours of its tokens' outcomes",
            state=state,
            detail=answer,
            incomplete=bool(cancelled),
        )

    def _show_grown(self, state: dict[str, Any]) -> None:
        """Show what there is of an answer; it is no new frame."""
        if self.view is not None:
            self.view.state = state | {"frame": self.frames_drawn}


def _has_confidence(models: Models, chosen: SimpleNamespace) -> bool:
    return models.drafters[chosen.drafter].confidence_head is not None


def _on_host(round_: Round) -> Round:
    draft_probs, target_probs = round_.draft_probs.cpu(), round_.target_probs.cpu()
    return replace(round_, draft_probs=draft_probs, target_probs=target_probs)


def short_prompt(prompt: Prompt, longest: int = 90) -> str:
    """A prompt in one line of at most ``longest`` characters."""
    whole = prompt if isinstance(prompt, str) else str([int(token) for token in prompt])
    text = " ".join(whole.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
