"""The verdict on each rule of a check, as a table and as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pandas as pd

Verdict = Literal["held", "broken", "likely broken", "unsure", "variant", "no case", "note"]
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
    verdict: Verdict
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


class Findings:
    """The outcome of :func:`check_mask` or :func:`check_forward`; it prints as sentences.

    Attributes:
        table: a row for each rule, or for each fault where several break one rule: ``rule``,
            ``verdict`` (*held*, *broken*, *likely broken* on statistical evidence, *unsure*,
            *variant*: a legitimate difference, *no case*: nothing to judge by, *note*),
            ``finding``, ``count``, ``of``, ``unit``, ``pairs``, and the first place.
    """

    def __init__(self, subject: str, found: Sequence[Finding]) -> None:
        names = [field.name for field in fields(Finding) if field.name != "place"]
        table = pd.DataFrame([asdict(finding) for finding in found], columns=names)
        places = ["pairs", "row", "block", "slot", "key"]
        self.table = table.astype(dict.fromkeys(places, "Int64"))
        self._subject, self._found = subject, tuple(found)

    @property
    def ok(self) -> bool:
        """Whether no rule is broken; a variant breaks none."""
        return all(finding.verdict in PASSED for finding in self._found)

    @property
    def sentences(self) -> list[str]:
        """What differs from the rules, each with its verdict, and what could not be told."""
        told = [found for found in self._found if found.verdict not in ("held", "no case")]
        return [f"{found.verdict}: {found.sentence}" for found in told]

    def __repr__(self) -> str:
        held = [found.rule for found in self._found if found.verdict == "held"]
        start = f"{self._subject} is {'right' if self.ok else 'wrong'}; {len(held)} rules hold"
        return "\n".join([start, *(f"- {sentence}" for sentence in self.sentences)])
