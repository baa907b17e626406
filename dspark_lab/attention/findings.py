"""The verdict on each rule of a check, as a table and as sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import pandas as pd

Mark = Literal["held", "broken", "likely broken", "unsure", "variant", "no case", "note"]
# Verdicts with which a check still passes.
PASSED = ("held", "unsure", "variant", "no case", "note")


@dataclass
class Finding:
    """What a check found of one rule: how often, and the first place.

    ``count`` of ``of`` blocks (or what ``unit`` says) differ, in ``pairs`` pairs of query and key.
    ``place`` says the first one in words; ``key`` is a place of the row, or of the slots behind
    it, ``token`` its text, or its id.
    """

    rule: str
    verdict: Mark
    finding: str = ""
    count: int = 0
    of: int = 0
    unit: str = "blocks"
    pairs: int | None = None
    row: int | None = None
    block: int | None = None
    slot: int | None = None
    key: int | None = None
    token: str | None = None
    place: str = ""

    @property
    def sentence(self) -> str:
        if not self.finding:
            return self.rule
        counted = f": {self.count:,} of {self.of:,} {self.unit}" if self.of else ""
        return f"{self.finding}{counted}{', first ' + self.place if self.place else ''}"


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """The outcome of :func:`check_mask` or :func:`check_forward`; it prints as sentences.

    ``found`` has a finding for each rule, or for each fault where several break one rule. A verdict
    is *held*, *broken*, *likely broken* (on statistical evidence), *unsure*, *variant* (a known and
    legitimate difference), *no case* (there was nothing to judge by) or *note*.
    """

    subject: str
    found: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no rule is broken; a variant breaks none."""
        return all(finding.verdict in PASSED for finding in self.found)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each finding: the fields of :class:`Finding`, but for ``place``."""
        names = [field.name for field in fields(Finding) if field.name != "place"]
        rows = [[getattr(finding, name) for name in names] for finding in self.found]
        places = ["pairs", "row", "block", "slot", "key"]
        return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(places, "Int64"))

    @property
    def sentences(self) -> list[str]:
        """What differs from the rules, each with its verdict, and what could not be told."""
        told = [found for found in self.found if found.verdict not in ("held", "no case")]
        return [f"{found.verdict}: {found.sentence}" for found in told]

    def __repr__(self) -> str:
        held = sum(found.verdict == "held" for found in self.found)
        start = f"{self.subject} is {'right' if self.ok else 'wrong'}; {held} rules hold"
        return "\n".join([start, *(f"- {sentence}" for sentence in self.sentences)])


def token_shown(token: int, to_text: Callable[[int], str] | None) -> tuple[str | None, str]:
    """A token for a table, and behind its place in a sentence."""
    if token < 0:
        return None, ""
    if to_text is None:
        return str(token), f" (token {token})"
    text = to_text(token)
    return text, f" {text!r}"
