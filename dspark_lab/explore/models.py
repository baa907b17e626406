"""Loads what explorers of decoding show: a target, its drafters, and prompts."""

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import nn

from dspark_lab.chats import Chat, TokenText, load_chats
from dspark_lab.decoding import Decoded, Prompt, RandomNumbers, Round, decode_rounds
from dspark_lab.explore.work import Progress, threads_for
from dspark_lab.files import require_found
from dspark_lab.model import (
    Drafter,
    Target,
    load_drafter,
    load_target,
    require_checkpoint,
    require_target,
)
from dspark_lab.pairs import drafter_names, load_pair, question, without_bars

# So many of the shipped conversations are asked where no prompts are given, or a few more.
_SHIPPED_PROMPTS = 40

TargetLike = Target | str | os.PathLike[str]
DrafterLike = Drafter | str | os.PathLike[str]
Prompts = str | os.PathLike[str] | Sequence[Chat | Prompt]


@dataclass(frozen=True)
class Models:
    """A target, its drafters by name, and prompts with their domains."""

    target: Target
    drafters: dict[str, Drafter]
    prompts: list[Prompt]
    domains: list[str]

    @cached_property
    def to_text(self) -> Callable[[int], str]:
        """The text of a token id."""
        tokenizer = self.target.tokenizer
        return "{} ".format if tokenizer is None else TokenText(tokenizer)

    def decode(
        self,
        drafter: str,
        batch_size: int | None,
        progress: Progress,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> Decoded:
        """Answer all prompts, one by one where the target decodes no batches."""
        run = decode_rounds(
            self.target,
            self.drafters[drafter],
            self.prompts,
            batch_size=batch_size if self.target.decodes_batches else None,
            domains=self.domains,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        asked, answered = len(self.prompts), len(self.prompts) * max_new_tokens
        words = f"{drafter} answers {asked} prompts at temperature {temperature:g}: token"
        layers = self._layers
        done = layer = 0

        def tell(*_: object) -> None:
            """Said at each layer: a batch of long prompts takes long, and ends when cancelled."""
            nonlocal layer
            layer = layer % len(layers) + 1
            if done:
                progress(done, answered, words)
            else:
                progress(layer, len(layers), f"{drafter} reads {asked} prompts: layer")

        hooks = [one.register_forward_pre_hook(tell) for one in layers]
        try:
            with threads_for(self.target.model):
                for round_ in run:
                    done += len(round_.tokens)
                    progress(done, answered, words)
        finally:
            for hook in hooks:
                hook.remove()
        return run.result()

    @property
    def _layers(self) -> list[nn.Module]:
        """The target's layers, or what stands for them in a model that has no list of them."""
        model = self.target.model
        lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one)]
        return list(max(lists, key=lambda one: len(list(one)))) if lists else [model]

    def decode_again(
        self,
        decoded: Decoded,
        prompt: int,
        drafter: str,
        progress: Progress,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> list[Round]:
        """The rounds of one answer of :meth:`decode`, with the distributions that it did not keep.

        None where one prompt alone is answered otherwise, which rounding can do.
        """
        one = self.drafters[drafter]
        numbers = RandomNumbers(1, seed, one.config.predicted, first=prompt)
        run = decode_rounds(
            self.target,
            one,
            [self.prompts[prompt]],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            random_numbers=numbers,
        )
        rounds, done = [], 0
        with threads_for(self.target.model):
            for round_ in run:
                rounds.append(round_)
                done += len(round_.tokens)
                progress(done, max_new_tokens, f"the distributions of answer {prompt}")
        trace = decoded.trace[decoded.trace["prompt"] == prompt]
        again = run.result()
        same = again.tokens[0] == decoded.tokens[prompt]
        return rounds if same and again.trace["token"].tolist() == trace["token"].tolist() else []


def open_models(
    target: TargetLike | None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None,
    prompts: Prompts | None,
    draft_length: int | None = None,
) -> Callable[[Progress], Models]:
    """:func:`load_models` for later; whatever needs no loading is done and refused at once."""
    if (target is None) != (drafter is None):
        raise ValueError("target and drafter must be given together, got one of them")
    if isinstance(prompts, (str, os.PathLike)):
        require_found(prompts)
        prompts = load_chats(prompts).conversations
    _require_some(prompts, drafter)
    drafters = list(drafter.values()) if isinstance(drafter, Mapping) else [drafter]
    stored = [one for one in (target, *drafters) if isinstance(one, (str, os.PathLike))]
    configs = [
        require_checkpoint(one) if isinstance(one, (str, os.PathLike)) else one.config
        for one in drafters
        if one is not None
    ]
    most = min((config.predicted for config in configs), default=math.inf)
    if draft_length is not None and draft_length > most:
        raise ValueError(f"draft_length must be at most {most}, a block's, got {draft_length}")
    if isinstance(target, (str, os.PathLike)):
        require_target(target)
    if target is not None and not stored:
        models = load_models(target, drafter, prompts)
        return lambda _progress: models

    @cache
    def load() -> Models:
        return load_models(target, drafter, prompts)

    def loaded(progress: Progress) -> Models:
        progress(0, 0, "loading the models")
        return load()

    return loaded


def _require_some(prompts: Any, drafter: Any) -> None:
    """Refuse that there is no prompt or no drafter, where they are given."""
    asked = 1 if prompts is None or isinstance(prompts, (str, os.PathLike)) else len(prompts)
    made = len(drafter) if isinstance(drafter, Mapping) else 1
    if not asked or not made:
        raise ValueError(f"there must be a prompt and a drafter at least, got {asked} and {made}")


def load_models(
    target: TargetLike | None,
    drafter: DrafterLike | Mapping[str, DrafterLike] | None,
    prompts: Prompts | None,
) -> Models:
    """Load what is not loaded yet; the pocket pair where neither target nor drafter is given."""
    if (target is None) != (drafter is None):
        raise ValueError("target and drafter must be given together, got one of them")
    if target is None or drafter is None:
        pair = load_pair("pocket")
        target = pair.target
        drafter = {name: pair.load_drafter(name) for name in drafter_names("pocket")}
        if prompts is None:
            prompts = pair.held_out[:: len(pair.held_out) // _SHIPPED_PROMPTS]
    if not isinstance(target, Target):
        with without_bars():
            target = load_target(target)
    if not isinstance(drafter, Mapping):
        drafter = {"drafter" if isinstance(drafter, Drafter) else Path(drafter).name: drafter}
    if prompts is None:
        # Domains and kinds of questions take turns there: every n-th would be of one kind.
        prompts = random.Random(0).sample(load_chats().conversations, _SHIPPED_PROMPTS)
    elif isinstance(prompts, (str, os.PathLike)):
        prompts = load_chats(prompts).conversations
    _require_some(prompts, drafter)
    domains = [(isinstance(prompt, Chat) and prompt.domain) or "none" for prompt in prompts]
    asked = [question(prompt) if isinstance(prompt, Chat) else prompt for prompt in prompts]
    loaded = {}
    for name, one in drafter.items():
        loaded[name] = one if isinstance(one, Drafter) else load_drafter(one, target=target)
        # Refuses what does not fit together; no round of it is asked for.
        decode_rounds(target, loaded[name], asked, max_new_tokens=1)
    return Models(target, loaded, asked, domains)
