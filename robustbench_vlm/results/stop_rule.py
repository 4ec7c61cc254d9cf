"""The rule that ended an evaluation before all images: part of a result and of what makes rows comparable."""

from __future__ import annotations

import re
from dataclasses import dataclass

from robustbench_vlm.results import stats

FORM = re.compile(r"(?P<goal>[^;]{1,80}); (?P<looks>[1-9]\d{0,5}) looks of (?P<block>[1-9]\d{0,8})")


@dataclass(frozen=True)
class StopRule:
    """A rule that was fixed before the first image.

    Attributes:
        goal: what ends the evaluation, in words: `until 2 points or 500 images`, `race 1a2b3c4d of 3 models`.
        looks: how often the results may be looked at until all images are used.
        block: further images of every dataset from one look to the next.
    """

    goal: str
    looks: int
    block: int

    @classmethod
    def of(cls, text: str) -> StopRule:
        """The rule that `text` writes down.

        Raises:
            ValueError: another text than `text` makes.
        """
        found = FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no stop rule, expected GOAL; N looks of N")
        return cls(found["goal"], int(found["looks"]), int(found["block"]))

    @property
    def text(self) -> str:
        """The rule in one line, as results and tables hold it."""
        return f"{self.goal}; {self.looks} looks of {self.block}"

    @property
    def confidence(self) -> float:
        """Confidence of an interval at one look, so that all looks hold together with 95 % (Bonferroni)."""
        return 1 - stats.LEVEL / self.looks


def confidence(text: str) -> float:
    """Confidence that the intervals of a row need for a coverage of 95 %: see `StopRule.confidence`.

    Args:
        text: a rule; empty for a number of images that was fixed before.
    """
    return StopRule.of(text).confidence if text else 1 - stats.LEVEL
