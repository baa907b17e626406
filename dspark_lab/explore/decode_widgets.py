"""Explorers of decoding: whether a confidence can be trusted, and one answer round by round.

    explore_acceptance(target, drafter, prompts)    predicted beside actual, on many answers
    explore_decoding(target, drafter, prompts)      one answer: Run, watch it grow, step through it

Both show the pocket pair where nothing is given, and take the user's own target, checkpoint and
prompts. Nothing is worked out here: tables come from ``acceptance``, ``calibration`` and
``outcomes``, pictures from ``decode_plots``.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, Literal

import ipywidgets
import pandas as pd

from dspark_lab.chats import Chat, load_chats
from dspark_lab.checks import require_number
from dspark_lab.decoding import (
    Decoded,
    Decoding,
    Prompt,
    Round,
    decode,
    decode_rounds,
    distribution_table,
    outcome_table,
    token_kinds,
)
from dspark_lab.explore.decode_plots import (
    outcome_legend,
    outcome_text,
    plot_bias,
    plot_distributions,
    plot_rates,
    plot_reliability,
    plot_thresholds,
)
from dspark_lab.explore.explorer import WIDE, Explorer, Frame, checkbox, slider
from dspark_lab.explore.plots import png
from dspark_lab.model import Drafter, Target, load_drafter, load_target
from dspark_lab.pairs import drafter_names, load_pair, question
from dspark_lab.rates import (
    rate_table,
    reliability_tables,
    split_prompts,
    study,
    tau_table,
    threshold_sweep,
    trace_sums,
)
from dspark_lab.serving import speed_table

__all__ = ["VIEWS", "DecodingExplorer", "explore_acceptance", "explore_decoding"]

VIEWS = ("rates", "survival", "reliability", "domains", "token kinds", "thresholds", "text")
# Those of the views that look at the confidence alone.
_OF_CONFIDENCE = ("reliability", "domains", "token kinds", "thresholds")
# So many of the shipped conversations are asked where no prompts are given, or a few more.
_SHIPPED_PROMPTS = 40
# While an answer grows, its text is shown anew when it is at least so old.
REDRAW_SECONDS = 0.1

TargetLike = Target | str | os.PathLike[str]
DrafterLike = Drafter | str | os.PathLike[str]
Prompts = str | os.PathLike[str] | Sequence[Chat | Prompt]


def explore_acceptance(
    target: TargetLike | None = None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None = None,
    prompts: Prompts | None = None,
    *,
    temperature: float = 1.0,
    view: str = "rates",
    max_new_tokens: int = 64,
    batch_size: int | None = 40,
    seed: int = 0,
) -> Explorer:
    """How well the confidence head predicts what the target accepts, on answers decoded for it.

    Args:
        target: a target, its folder or hub id; the pocket target where None.
        drafter: a drafter, a checkpoint's folder, or several by name.
        prompts: user messages, token ids or conversations (their first question), or a JSONL file
            of conversations; some 40 of the shipped ones where None.
        temperature, view: where the controls start. The views are ``VIEWS``: conditional accept
            rates and survival by slot; reliability before and after scaling, which is fitted on
            half of the conversations and shown on the others; bias by domain and by kind of token;
            a sweep of thresholds; and an answer as text.
        max_new_tokens, batch_size, seed: see :func:`dspark_lab.decoding.loop.decode_rounds`; a target that
            decodes one row at a time does so here, too.

    Returns:
        an explorer whose ``table`` is the one behind the view; ``tables["trace"]`` is the trace,
        ``tables["tau"]`` tau with its intervals.

    Raises:
        ValueError, TypeError, OSError: a view that there is none of, models or prompts that cannot
            be read, or that do not fit together.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {VIEWS}, got {view!r}")
    models = _models(target, drafter, prompts)

    @lru_cache(maxsize=8)
    def decoded(drafter: str, temperature: float) -> tuple[Decoded, dict[str, pd.DataFrame]]:
        run = decode(
            models.target,
            models.drafters[drafter],
            models.prompts,
            domains=models.domains,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size if models.target.decodes_batches else None,
            seed=seed,
        )
        tables = {"trace": run.trace}
        if len(run.trace):
            tables["tau"] = tau_table(trace_sums(run.trace))
        return run, tables

    def draw(view: str, drafter: str, temperature: float, conversation: int) -> Frame:
        if view in _OF_CONFIDENCE and not models.drafters[drafter].config.enable_confidence_head:
            raise ValueError(f"{view} needs a drafter with a confidence head, got {drafter}")
        run, tables = decoded(drafter, temperature)
        show = _show_answer(models, conversation) if view == "text" else _SHOWS[view]
        frame = show(run, models)
        return replace(frame, tables=frame.tables | tables)

    controls: dict[str, Any] = {
        "view": ipywidgets.Dropdown(options=VIEWS, value=view, description="view", **WIDE),
        "drafter": _choice("drafter", list(models.drafters)),
        "temperature": _float("temperature", temperature, 0.0, 2.0),
        "conversation": slider("conversation", 0, 0, len(models.prompts) - 1),
    }
    return Explorer("explore_acceptance", controls, draw)


def _show_rates(value: Literal["conditional", "survival"]) -> Callable[[Decoded, _Models], Frame]:
    def show(run: Decoded, _models: _Models) -> Frame:
        table = rate_table(trace_sums(run.trace))
        return _picture("rates", table, plot_rates(table, value), f"{value} by slot")

    return show


def _show_reliability(run: Decoded, _models: _Models) -> Frame:
    tables = reliability_tables(*split_prompts(run.trace))
    table = pd.concat(tables, names=["values", "bin"]).reset_index()
    return _picture("reliability", table, plot_reliability(tables), "reliability diagram")


def _show_bias(by: str) -> Callable[[Decoded, _Models], Frame]:
    def show(run: Decoded, models: _Models) -> Frame:
        kinds = token_kinds(run.trace["token"], models.to_text)
        table = study(run.trace.assign(kind=kinds), by=[by])
        return _picture("bias", table, plot_bias(table, by), f"bias by {by}")

    return show


def _show_thresholds(run: Decoded, _models: _Models) -> Frame:
    table = threshold_sweep(run.trace)
    return _picture("thresholds", table, plot_thresholds(table), "a sweep of thresholds")


def _show_answer(models: _Models, conversation: int) -> Callable[[Decoded, _Models], Frame]:
    def show(run: Decoded, _models: _Models) -> Frame:
        table = outcome_table(run, models.to_text, conversation)
        return Frame({"tokens": table}, html=outcome_legend(table) + outcome_text(table))

    return show


_SHOWS = {
    "rates": _show_rates("conditional"),
    "survival": _show_rates("survival"),
    "reliability": _show_reliability,
    "domains": _show_bias("domain"),
    "token kinds": _show_bias("kind"),
    "thresholds": _show_thresholds,
}


def _picture(name: str, table: pd.DataFrame, figure: Any, alt: str) -> Frame:
    return Frame({name: table}, png=png(figure), alt=alt)


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

    Args:
        target, drafter, prompts: see :func:`explore_acceptance`.
        temperature, threshold, max_new_tokens, seed: where the controls start; a threshold of 0
            verifies every slot.
        run: whether to answer the first prompt at once.

    Raises:
        ValueError, TypeError, OSError: models or prompts that cannot be read, or do not fit
            together.
    """
    explorer = DecodingExplorer(
        _models(target, drafter, prompts), temperature, threshold, max_new_tokens, seed
    )
    if run:
        explorer.run()
    return explorer


class DecodingExplorer(ipywidgets.VBox):
    """Controls, Run and Stop above an answer, and below it one slot of one round.

    ``decoded`` and ``plain`` are what :func:`dspark_lab.decoding.loop.decode` returned with and without
    the drafter, ``rounds`` the rounds with their distributions, on the CPU.
    """

    def __init__(
        self,
        models: _Models,
        temperature: float,
        threshold: float,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self._models = models
        self.rounds: list[Round] = []
        self.decoded: Decoded | None = None
        self.plain: Decoded | None = None
        self._problem, self._stopped = "not run yet", False

        labels = [(_short(prompt), index) for index, prompt in enumerate(models.prompts)]
        wide = {"style": WIDE["style"], "layout": {"width": "54em"}}
        example = ipywidgets.Dropdown(options=labels, description="example", **wide)
        prompt = ipywidgets.Textarea(
            placeholder="or type a prompt", description="prompt", rows=2, **wide
        )
        self.controls: dict[str, Any] = {
            "example": example,
            "prompt": prompt,
            "drafter": _choice("drafter", list(models.drafters)),
            "temperature": _float("temperature", temperature, 0.0, 2.0),
            "threshold": _float("threshold", threshold, 0.0, 1.0),
            "max_new_tokens": slider("max_new_tokens", max_new_tokens, 1, 512),
            "seed": slider("seed", seed, 0, 99),
        }
        example.observe(self._take_example, names="value")
        self._take_example()
        self.run_button = ipywidgets.Button(description="Run", button_style="primary", icon="play")
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.drafts = checkbox("drafts in vain", True)
        self.run_button.on_click(self._clicked)
        self.stop_button.on_click(self._stop)
        self._status, self._text = ipywidgets.HTML(), ipywidgets.HTML(layout={"width": "100%"})
        self.drafts.observe(self._show_again, names="value")
        self.step = {"round": slider("round", 0, 0, 0), "slot": slider("slot", 0, 0, 0)}
        self.step["round"].observe(self._choose_round, names="value")
        self.step["slot"].observe(self._show_step, names="value")
        self._step_picture = ipywidgets.HTML(layout={"width": "100%"})
        row = {"flex_flow": "row wrap"}
        super().__init__(
            [
                ipywidgets.Box(list(self.controls.values()), layout=row),
                ipywidgets.HBox([self.run_button, self.stop_button, self.drafts]),
                self._status,
                self._text,
                ipywidgets.Box(list(self.step.values()), layout=row),
                self._step_picture,
            ]
        )

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
        tables = {"tokens": outcome_table(self.decoded, self._models.to_text)}
        if self.rounds:
            tables["distributions"] = self._distributions()
        tables |= {"rounds": self.decoded.rounds, "trace": self.decoded.trace}
        speed = self._speed()
        if speed is not None:
            tables["speed"] = speed.to_frame().T
        return tables

    @property
    def table(self) -> pd.DataFrame:
        """The answer token by token, with all that was drafted for it.

        Raises:
            ValueError: there is no answer.
        """
        if self.decoded is None:
            raise ValueError(f"explore_decoding has nothing to show: {self._problem}")
        return self.tables["tokens"]

    def run(self) -> None:
        """Answer the prompt with the controls' present values, and wait until it is done.

        Raises:
            RuntimeError: a run that a click began goes on.
        """
        if self._running:
            raise RuntimeError("a run must end or be stopped before the next, and one goes on")
        self._begin()
        for _ in self._rounds_shown():
            pass

    def _clicked(self, _button: object) -> None:
        if self._running:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.run()
            return
        self._begin()
        self._task = loop.create_task(self._run_beside())

    @property
    def _running(self) -> bool:
        return bool(self.run_button.disabled)

    def _begin(self) -> None:
        """Away with the last run, its buttons and its steps."""
        self.run_button.disabled, self.stop_button.disabled = True, False
        self._stopped, self._problem = False, "it runs"
        self.rounds, self.decoded, self.plain = [], None, None
        for step in self.step.values():
            step.max = 0
        self._show_step()

    async def _run_beside(self) -> None:
        for _ in self._rounds_shown():
            # Other messages, such as a click on Stop, have their turn.
            await asyncio.sleep(0.001)

    def _stop(self, _button: object) -> None:
        self._stopped = True

    def _rounds_shown(self) -> Iterator[None]:
        """Decodes with and without the drafter, and gives way after each round."""
        try:
            yield from self._decode()
        except (ValueError, TypeError) as problem:
            self._problem = str(problem)
            self._status.value = f'<p role="alert">{escape(self._problem)}</p>'
            self._text.value = ""
        finally:
            self.run_button.disabled, self.stop_button.disabled = False, True

    def _decode(self) -> Iterator[None]:
        settings = self.settings
        self._drafter = settings["drafter"]
        typed = settings["prompt"]
        chosen = typed if typed.strip() else self._models.prompts[settings["example"]]
        options = {name: settings[name] for name in ("temperature", "max_new_tokens", "seed")}
        drafter = self._models.drafters[self._drafter]
        threshold = settings["threshold"] or None
        decoding = decode_rounds(
            self._models.target, drafter, [chosen], threshold=threshold, **options
        )
        self._status.value = "reading the prompt"
        shown = -math.inf
        for round_ in self._until_stopped(decoding):
            draft, target = round_.draft_probs.cpu(), round_.target_probs.cpu()
            self.rounds.append(replace(round_, draft_probs=draft, target_probs=target))
            if time.monotonic() - shown > REDRAW_SECONDS:
                shown = time.monotonic()
                self._show_answer(decoding.result())
                self._status.value = f"round {len(self.rounds)}"
            yield
        self.decoded = decoding.result()
        self._show_answer(self.decoded)
        self.step["round"].max = max(0, len(self.rounds) - 1)
        self._choose_round()
        self._status.value = "and now without the drafter, to compare"
        plain = decode_rounds(self._models.target, None, [chosen], **options)
        for _ in self._until_stopped(plain):
            yield
        self.plain = plain.result()
        self._status.value = self._in_words(self.decoded)

    def _until_stopped(self, decoding: Decoding) -> Iterator[Round]:
        for round_ in decoding:
            yield round_
            if self._stopped:
                return

    def _show_answer(self, decoded: Decoded) -> None:
        table = outcome_table(decoded, self._models.to_text)
        self._text.value = outcome_legend(table) + outcome_text(table, drafts=self.drafts.value)

    def _show_again(self, _change: object) -> None:
        if self.decoded is not None:
            self._show_answer(self.decoded)

    def _speed(self) -> pd.Series | None:
        """Beside plain decoding; None before both have had a round."""
        plain, decoded = self.plain, self.decoded
        if plain is None or decoded is None or plain.rounds.empty or decoded.rounds.empty:
            return None
        drafter = self._models.drafters[self._drafter]
        return speed_table([plain], [decoded], drafter.config.block_size)

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
        return distribution_table(round_, self.step["slot"].value, self._models.to_text)

    def _show_step(self, _change: object = None) -> None:
        if not self.rounds:
            self._step_picture.value = ""
            return
        figure = plot_distributions(self._distributions())
        alt = "what drafter and target give to the likeliest tokens of this slot"
        self._step_picture.value = Frame({}, png=png(figure), alt=alt).as_html()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"explore_decoding({settings})"

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        """The widget, and its answer, or why there is none, for readers that run no widgets."""
        bundle = super()._repr_mimebundle_(**options)
        shown = self._text.value or self._status.value
        return bundle | {"text/plain": repr(self), "text/html": shown}


@dataclass(frozen=True)
class _Models:
    """What is explored: drafters of one target by name, and prompts with their domains."""

    target: Target
    drafters: dict[str, Drafter]
    prompts: list[Prompt]
    domains: list[str]

    def to_text(self, token: int) -> str:
        if self.target.tokenizer is None:
            return f"{token} "
        return str(self.target.tokenizer.decode([token]))


def _models(
    target: TargetLike | None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None,
    prompts: Prompts | None,
) -> _Models:
    if (target is None) != (drafter is None):
        raise ValueError("target and drafter must be given together, got one of them")
    drafters: Mapping[str, DrafterLike]
    if target is None or drafter is None:
        pair = load_pair("pocket")
        target = pair.target
        drafters = {name: pair.load_drafter(name) for name in drafter_names("pocket")}
        if prompts is None:
            prompts = pair.held_out[:: len(pair.held_out) // _SHIPPED_PROMPTS]
    elif isinstance(drafter, Mapping):
        drafters = drafter
    else:
        name = "drafter" if isinstance(drafter, Drafter) else Path(drafter).name
        drafters = {name: drafter}
    if not isinstance(target, Target):
        target = load_target(target)
    if prompts is None:
        # Domains and kinds of questions take turns there: every n-th would be of one kind.
        prompts = random.Random(0).sample(load_chats(), _SHIPPED_PROMPTS)
    elif isinstance(prompts, (str, os.PathLike)):
        prompts = load_chats(prompts)
    if len(prompts) == 0 or not drafters:
        raise ValueError(
            f"there must be a prompt and a drafter at least, got {len(prompts)} and {len(drafters)}"
        )
    loaded = {
        name: one if isinstance(one, Drafter) else load_drafter(one, target=target)
        for name, one in drafters.items()
    }
    chats = [prompt if isinstance(prompt, Chat) else None for prompt in prompts]
    domains = [(chat.domain if chat else None) or "none" for chat in chats]
    asked = [question(prompt) if isinstance(prompt, Chat) else prompt for prompt in prompts]
    for one in loaded.values():
        # Refuses what does not fit together; no round of it is asked for.
        decode_rounds(target, one, asked, max_new_tokens=1)
    return _Models(target, loaded, asked, domains)


def _short(prompt: Prompt, longest: int = 90) -> str:
    whole = prompt if isinstance(prompt, str) else str([int(token) for token in prompt])
    text = " ".join(whole.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _choice(name: str, options: Sequence[str]) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, description=name, **WIDE)


def _float(name: str, value: float, low: float, high: float) -> ipywidgets.FloatSlider:
    require_number(name, value)
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name} must be a finite number >= {low}, got {value}")
    high = max(high, value)
    return ipywidgets.FloatSlider(
        value, min=low, max=high, step=0.05, description=name, continuous_update=False, **WIDE
    )
