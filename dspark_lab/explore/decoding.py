"""Decoding: an answer as text, the distributions at one slot, and an answer that grows."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dspark_lab import decoding
from dspark_lab.checks import checked
from dspark_lab.decoding import Decoded, Decoding, Prompt, Round
from dspark_lab.explore import controls as made
from dspark_lab.explore import explorer, style
from dspark_lab.explore.models import DrafterLike, Models, Prompts, TargetLike, load_models
from dspark_lab.explore.style import BLUE, GREEN, INK, ORANGE, RED, visible_text
from dspark_lab.explore.textpicture import Look, text_figure
from dspark_lab.serving import speed_table

# While an answer grows, its text is shown anew when it is at least so old.
REDRAW_SECONDS = 0.1

# How the outcome text marks its tokens; half transparent colours let either theme show through.
_OUTCOME_STYLE = """<style>
.dspark-answer{font:13px/1.9 var(--jp-code-font-family,monospace);white-space:pre-wrap;
 word-break:break-word;color:var(--jp-content-font-color1,inherit);max-height:26em;overflow-y:auto;
 padding:2px 4px}
.dspark-answer span,.dspark-outcomes span{border-radius:3px;padding:1px 0}
.dspark-answer span:hover{outline:2px solid #767676}
.dspark-outcomes{font-size:12px;line-height:2.2;color:var(--jp-content-font-color1,inherit)}
.dspark-outcomes span{padding:2px 6px;margin-right:8px;white-space:nowrap}
.dspark-accepted{background:rgba(86,180,233,.38)}
.dspark-corrected{background:rgba(230,159,0,.40);border-bottom:2px solid #D55E00}
.dspark-bonus{background:rgba(0,158,115,.30);border-bottom:2px dotted #009E73}
.dspark-first{border-bottom:2px solid #767676}
.dspark-rejected{font-size:11px;text-decoration:line-through 2px #D55E00;
 background:rgba(213,94,0,.18)}
.dspark-not-reached{font-size:11px;text-decoration:line-through 1px #767676;opacity:.65}
.dspark-not-verified{font-size:11px;font-style:italic;opacity:.65;border-bottom:1px dashed #767676}
</style>"""

# The same in a picture.
_LOOKS = {
    "accepted": Look("#CFE7F5"),
    "corrected": Look("#F8DFA6", "underline", RED),
    "bonus": Look("#BFE5D6", "dotted", GREEN),
    "first": Look(sign="underline"),
    "rejected": Look("#F6D5C3", "strike", RED),
    "not reached": Look(sign="strike"),
    "not verified": Look(sign="dashed"),
}


@checked
def outcome_text(table: pd.DataFrame, drafts: bool = True) -> str:
    """An answer, from :func:`dspark_lab.decoding.outcome_table`, as text in HTML.

    Each token has the colour of its outcome, and a tip with its numbers. Unless ``drafts`` is
    False, drafted tokens that are not part of the answer stand before what came in their place.
    """
    shown = table if drafts else table[table["kept"]]
    spans = [_outcome_span(token) for token in shown.itertuples(index=False)]
    return f'{_OUTCOME_STYLE}<div class="dspark-answer">{"".join(spans)}</div>'


@checked
def outcome_legend(table: pd.DataFrame) -> str:
    """The key to :func:`outcome_text` in HTML with the tokens of each outcome counted."""
    counts = decoding.column(table, "outcome").value_counts()
    shown = [name for name in decoding.OUTCOMES if name in counts]
    spans = [explorer.marked_text(f"{name} {counts[name]}", [name]) for name in shown]
    return f'{_OUTCOME_STYLE}<div class="dspark-outcomes">{" ".join(spans)}</div>'


@checked
def plot_outcomes(table: pd.DataFrame, drafts: bool = True) -> Figure:
    """An answer as a picture of coloured text, under the key to its outcomes.

    ``table`` and ``drafts`` are as in :func:`outcome_text`.
    """
    counts = decoding.column(table, "outcome").value_counts()
    legend = [(f"{name} {counts[name]}", look) for name, look in _LOOKS.items() if name in counts]
    shown = table if drafts else table[table["kept"]]
    # A line break that is not part of the answer does not break its line.
    pieces = [
        (token.text if token.kept else token.text.replace("\n", "⏎"), _LOOKS[token.outcome])
        for token in shown.itertuples(index=False)
    ]
    return text_figure(pieces, legend)


def _outcome_span(token: Any) -> str:
    place = "first token" if token.round < 0 else f"round {token.round}"
    facts = [place if token.slot < 0 else f"round.slot {token.round}.{token.slot}", token.outcome]
    for pairs in (
        (("confidence", token.confidence), ("accept rate", token.accept_rate)),
        (("draft probability", token.draft_prob), ("target probability", token.target_prob)),
    ):
        known = [f"{name} {value:.2f}" for name, value in pairs if not pd.isna(value)]
        if known:
            facts.append(", ".join(known))
    # A line break that is not part of the answer does not break its line.
    text = token.text.replace("\n", "⏎\n" if token.kept else "⏎")
    return explorer.marked_text(text, [token.outcome], facts)


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
    the controls start; a threshold of 0 verifies every slot. ``run`` answers the first prompt.
    """
    models = load_models(target, drafter, prompts)
    shown = DecodingExplorer(models, temperature, threshold, max_new_tokens, seed)
    if run:
        shown.run()
    return shown


@checked
class DecodingExplorer(ipywidgets.VBox):
    """Controls, Run and Stop above an answer, and below it one slot of one round.

    ``decoded`` and ``plain`` are what :func:`dspark_lab.decoding.decode` returned with and without
    the drafter, ``rounds`` the rounds with their distributions, on the CPU.
    """

    def __init__(
        self, models: Models, temperature: float, threshold: float, max_new_tokens: int, seed: int
    ) -> None:
        self._models = models
        self.rounds: list[Round] = []
        self.decoded: Decoded | None = None
        self.plain: Decoded | None = None
        self._problem, self._stopped = "not run yet", False

        labels = [(_short(prompt), index) for index, prompt in enumerate(models.prompts)]
        names = list(models.drafters)
        wide = {"style": {"description_width": "9em"}, "layout": {"width": "54em"}}
        example = ipywidgets.Dropdown(options=labels, description="example", **wide)
        placeholder = "or type a prompt"
        controls = [
            example,
            ipywidgets.Textarea(placeholder=placeholder, description="prompt", rows=2, **wide),
            made.plain_widget(made.dropdown("drafter", names[0], names)),
            made.plain_widget(
                made.number_slider("temperature", temperature, 0.0, 2.0, continuous_update=False)
            ),
            made.plain_widget(
                made.number_slider("threshold", threshold, 0.0, 1.0, continuous_update=False)
            ),
            made.plain_widget(made.slider("max_new_tokens", max_new_tokens, 1, 512)),
            made.plain_widget(made.slider("seed", seed, 0, 99)),
        ]
        self.controls: dict[str, Any] = {control.description: control for control in controls}
        example.observe(self._take_example, names="value")
        self._take_example()
        self.run_button = ipywidgets.Button(description="Run", button_style="primary", icon="play")
        self.run_button.on_click(self._clicked)
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.stop_button.on_click(self._stop)
        self.drafts = made.plain_widget(made.checkbox("drafts in vain", True))
        self.drafts.observe(self._show_again, names="value")
        self.step = {
            name: made.plain_widget(made.slider(name, 0, 0, 0)) for name in ("round", "slot")
        }
        self.step["round"].observe(self._choose_round, names="value")
        self.step["slot"].observe(self._show_step, names="value")
        wide_text = {"layout": {"width": "100%"}}
        self._status, self._text = ipywidgets.HTML(), ipywidgets.HTML(**wide_text)
        self._step_picture = ipywidgets.HTML(**wide_text)
        wrapped = {"layout": {"flex_flow": "row wrap"}}
        above = ipywidgets.Box(controls, **wrapped)
        buttons = ipywidgets.HBox([self.run_button, self.stop_button, self.drafts])
        steps = ipywidgets.Box(list(self.step.values()), **wrapped)
        super().__init__([above, buttons, self._status, self._text, steps, self._step_picture])

    @property
    def settings(self) -> dict[str, Any]:
        """The controls' values by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """``tokens``, ``distributions`` (of the chosen slot), ``rounds``, ``trace``, ``speed``.

        Empty before the first run, and where a run was refused.
        """
        if self.decoded is None:
            return {}
        tables = {"tokens": decoding.outcome_table(self.decoded, self._models.to_text)}
        if self.rounds:
            tables["distributions"] = self._distributions()
        tables |= {"rounds": self.decoded.rounds, "trace": self.decoded.trace}
        speed = self._speed()
        if speed is not None:
            tables["speed"] = speed.to_frame().T
        return tables

    @property
    def table(self) -> pd.DataFrame:
        """The answer token by token, with all that was drafted for it."""
        if self.decoded is None:
            raise ValueError(f"explore_decoding has nothing to show: {self._problem}")
        return self.tables["tokens"]

    def run(self) -> None:
        """Answer the prompt with the controls' present values, and wait until it is done."""
        if self.run_button.disabled:
            raise RuntimeError("a run must end or be stopped before the next, and one goes on")
        for _ in self._rounds_shown():
            pass

    def _clicked(self, _button: object) -> None:
        if self.run_button.disabled:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.run()
            return
        rounds = self._rounds_shown()
        next(rounds)
        self._task = loop.create_task(self._run_beside(rounds))

    async def _run_beside(self, rounds: Iterator[None]) -> None:
        for _ in rounds:
            # Other messages, such as a click on Stop, have their turn.
            await asyncio.sleep(0.001)

    def _stop(self, _button: object) -> None:
        self._stopped = True

    def _rounds_shown(self) -> Iterator[None]:
        """Clear away the last run; decode with and without the drafter, round by round."""
        self.run_button.disabled, self.stop_button.disabled = True, False
        self._stopped, self._problem = False, "it runs"
        self.rounds, self.decoded, self.plain = [], None, None
        for step in self.step.values():
            step.max = 0
        self._show_step()
        yield
        try:
            yield from self._decode()
        except (ValueError, TypeError) as problem:
            self._problem = str(problem)
            self._status.value = explorer.alert(problem)
            self._text.value = ""
        finally:
            self.run_button.disabled, self.stop_button.disabled = False, True

    def _decode(self) -> Iterator[None]:
        settings, target = self.settings, self._models.target
        self._drafter = self._models.drafters[settings["drafter"]]
        typed = settings["prompt"]
        asked = [typed if typed.strip() else self._models.prompts[settings["example"]]]
        options = {name: settings[name] for name in ("temperature", "max_new_tokens", "seed")}
        threshold = settings["threshold"] or None
        run = decoding.decode_rounds(target, self._drafter, asked, threshold=threshold, **options)
        self._status.value = "reading the prompt"
        redraw_at = 0.0
        for round_ in self._until_stopped(run):
            draft_probs, target_probs = round_.draft_probs.cpu(), round_.target_probs.cpu()
            self.rounds.append(replace(round_, draft_probs=draft_probs, target_probs=target_probs))
            if time.monotonic() > redraw_at:
                redraw_at = time.monotonic() + REDRAW_SECONDS
                self._show_answer(run.result())
                self._status.value = f"round {len(self.rounds)}"
            yield
        self.decoded = run.result()
        self._show_answer(self.decoded)
        self.step["round"].max = max(0, len(self.rounds) - 1)
        self._choose_round()
        self._status.value = "and now without the drafter, to compare"
        plain = decoding.decode_rounds(target, None, asked, **options)
        for _ in self._until_stopped(plain):
            yield
        self.plain = plain.result()
        self._status.value = self._in_words(self.decoded)

    def _until_stopped(self, run: Decoding) -> Iterator[Round]:
        for round_ in run:
            yield round_
            if self._stopped:
                return

    def _show_answer(self, decoded: Decoded) -> None:
        table = decoding.outcome_table(decoded, self._models.to_text)
        self._text.value = outcome_legend(table) + outcome_text(table, drafts=self.drafts.value)

    def _show_again(self, _change: object) -> None:
        if self.decoded is not None:
            self._show_answer(self.decoded)

    def _speed(self) -> pd.Series | None:
        """Beside plain decoding; None before both have had a round."""
        plain, decoded = self.plain, self.decoded
        if plain is None or decoded is None or plain.rounds.empty or decoded.rounds.empty:
            return None
        return speed_table([plain], [decoded], self._drafter.config.predicted)

    def _in_words(self, decoded: Decoded) -> str:
        tokens, speed = len(decoded.tokens[0]), self._speed()
        if speed is None:
            return f"{tokens} tokens, no round"
        return (
            f"{tokens} tokens in {len(decoded.rounds)} rounds, tau {speed['tau']:.2f}: "
            f"<b>{speed['tokens_per_second']:.0f} tokens/s</b>, plain "
            f"{speed['plain_tokens_per_second']:.0f}: <b>{speed['gain']:.2f} times</b> "
            f"(draft {speed['draft']:.0%}, verify {speed['verify']:.0%}, rest {speed['rest']:.0%})"
        )

    def _take_example(self, _change: object = None) -> None:
        prompt = self._models.prompts[self.controls["example"].value]
        self.controls["prompt"].value = prompt if isinstance(prompt, str) else ""

    def _choose_round(self, _change: object = None) -> None:
        slot = self.step["slot"]
        before = slot.value
        if self.rounds:
            round_ = self.rounds[self.step["round"].value]
            with slot.hold_trait_notifications():
                slot.max = len(round_.target_probs) - 1
                # Where it was decided: the first slot that was not accepted.
                slot.value = round_.accepted
        if slot.value == before:
            # Else the slot has shown itself.
            self._show_step()

    def _distributions(self) -> pd.DataFrame:
        round_ = self.rounds[self.step["round"].value]
        return decoding.distribution_table(round_, self.step["slot"].value, self._models.to_text)

    def _show_step(self, _change: object = None) -> None:
        shown = explorer.Frame({})
        if self.rounds:
            table = self._distributions()
            alt = "what drafter and target give to the likeliest tokens of this slot"
            shown = explorer.Frame({}, lambda: plot_distributions(table), alt=alt)
        self._step_picture.value = shown.as_html()

    def __repr__(self) -> str:
        return explorer.call_text("explore_decoding", self.settings)

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        """The widget, and its answer, or why there is none, for readers that run no widgets."""
        bundle = super()._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        if self.decoded is None:
            return bundle | {"text/html": self._status.value}
        picture = style.png(plot_outcomes(self.table, self.drafts.value))
        return bundle | {"image/png": b64encode(picture).decode("ascii")}


def _short(prompt: Prompt, longest: int = 90) -> str:
    whole = prompt if isinstance(prompt, str) else str([int(token) for token in prompt])
    text = " ".join(whole.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
