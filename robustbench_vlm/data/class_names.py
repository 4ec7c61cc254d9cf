"""Which class is meant: spellings found in folders and tables -> indices of a card's class names.

A label is never guessed. Whatever does not match by one of the rules below is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from robustbench_vlm.errors import DataError, some

NUMBERED = re.compile(r"\d{3}\.")  # 001.ak47, as in Caltech-256
DIGITS = re.compile(r"[0-9]{1,7}")

OtherNames = Mapping[str, Sequence[str]]
"""Names of the classes of a card beside its class names; see `DatasetCard.other_names`."""

NO_OTHER_NAMES: OtherNames = MappingProxyType({})


@dataclass(frozen=True)
class Matched:
    """Classes that were found, and which classes of the card they are.

    Attributes:
        labels: index in the card's class names of each class, in the order in which they were found.
        rule: how they were matched, as words that follow `by`.
    """

    labels: tuple[int, ...]
    rule: str

    @property
    def exact(self) -> bool:
        """Whether every class was spelt exactly as the card spells it."""
        return self.rule == EXACT


EXACT, SPELLING, NUMBER = "name", "spelling", "number"


def plain(name: str) -> str:
    """A class name without differences of spelling: case, Unicode form, and `_`, `-`, `/` for a blank."""
    joined = re.sub(r"[\s_/-]+", " ", unicodedata.normalize("NFC", name)).strip()
    return unicodedata.normalize("NFC", joined.casefold())


def spelt(classes: Sequence[str]) -> list[str]:
    """Folder names as class names: `_` is a blank; numbered ones lose `001.` and a final `-101`."""
    if classes and all(NUMBERED.match(name) for name in classes):
        classes = [name[4:].removesuffix("-101").replace("-", " ") for name in classes]
    return [name.replace("_", " ") for name in classes]


def require_distinct(found: Sequence[str], where: str) -> None:
    """Refuse two spellings of one class where the classes are called as they were found.

    Raises:
        DataError: two of them differ in case, Unicode form, blank, `_`, `-` or `/` alone.
    """
    first: dict[str, str] = {}
    for name in found:
        if (other := first.setdefault(plain(name), name)) != name:
            do = "rename one, or give the class names with --names if they are two classes"
            raise DataError(
                where, f"{other!a:.80} and {name!a:.80} are spelt alike", "one spelling a class", do
            )


def match(
    found: Sequence[str],
    names: Sequence[str],
    where: str,
    other_names: OtherNames = NO_OTHER_NAMES,
    *,
    merge: bool = False,
) -> Matched:
    """Match classes that were found to the class names of a card by the first rule that fits all of them.

    1. `name`: they are spelt exactly as class names.
    2. `spelling`: they are the same without differences of case, Unicode form, blank, `_`, `-` and `/`, and
       without the numbers of folders such as `001.ak47`.
    3. `number`: they are the numbers from 0 to C - 1, with or without leading zeros. Where a class name is a
       number itself, they are class names with or without leading zeros, and never positions.
    4. `WordNet id`, `WordNet synset`: they are among the further names that the card has for its classes
       (`n01440764`; `tench, Tinca tinca`). Two classes whose words are the same are told apart by a final 2.

    A name that two classes share matches none of them by the first two rules.

    Args:
        found: distinct names of folders or of labels.
        names: C class names in label order.
        where: the folder or the table, for the error.
        other_names: further names of the C classes by the rule that reads them; empty ones are left out.
        merge: whether two spellings may be one class, as in a table that was typed by hand.

    Raises:
        DataError: no rule fits.
    """
    readings: list[tuple[str, Sequence[str], Callable[[str], str]]] = [
        (EXACT, found, str),
        (SPELLING, found, plain),
        (SPELLING, spelt(found), plain),
    ]
    if numeral := has_numbers(names):
        readings.append((NUMBER, found, _value))
    for rule, spellings, form in readings:
        labels = _indices([form(text) for text in spellings], [form(name) for name in names], merge=merge)
        if labels is not None:
            return Matched(labels, rule)
    numbers = _numbers(found)
    if sorted(numbers) == list(range(len(names))) and not numeral:
        return Matched(tuple(numbers), NUMBER)
    for rule, others in other_names.items():
        labels = _indices(found, others, merge=merge)
        if labels is not None and not _ambiguous(found, others):
            return Matched(labels, rule)
    raise _refusal(found, names, where, other_names)


def _indices(found: Sequence[str], names: Sequence[str], *, merge: bool) -> tuple[int, ...] | None:
    """The index of each among names that occur once; None if one is not there, or two are the same."""
    counts = Counter(names)
    index = {name: i for i, name in enumerate(names) if counts[name] == 1}
    if (len(set(found)) != len(found) and not merge) or any(text not in index for text in found):
        return None
    return tuple(index[text] for text in found)


def _ambiguous(found: Sequence[str], names: Sequence[str]) -> bool:
    """Whether `crane` is there without `crane2`: elsewhere both classes are called `crane`."""
    known = set(names)
    both = [(name, f"{name}2") for name in names if f"{name}2" in known]
    return any((first in found) != (second in found) for first, second in both)


def has_numbers(names: Sequence[str]) -> bool:
    """Whether a class name is a number, so that a number may mean that class as well as a position."""
    return any(DIGITS.fullmatch(name) for name in names)


def _value(name: str) -> str:
    """A number without leading zeros; other names without differences of spelling."""
    return str(int(name)) if DIGITS.fullmatch(name) else plain(name)


def _numbers(found: Sequence[str]) -> list[int]:
    """The classes as numbers; empty unless all of them are."""
    return [int(text) for text in found] if all(DIGITS.fullmatch(text) for text in found) else []


def _refusal(found: Sequence[str], names: Sequence[str], where: str, other_names: OtherNames) -> DataError:
    """The error for classes that no rule matches."""
    numbers, last, numeral = sorted(_numbers(found)), len(names) - 1, has_numbers(names)
    if numbers == list(range(1, len(names) + 1)) and not numeral:
        what = f"classes are numbered 1 to {len(names)}"
        return DataError(
            where, what, f"0 to {last}, or the class names", "rename them: a label is not guessed"
        )
    known = {plain(name) for name in names}
    shared = sorted(name for name, count in Counter(map(plain, names)).items() if count > 1)
    strange = [name for name in found if plain(name) not in known]
    what = f"{len(strange)} of {len(found)} classes are none of the {len(names)} class names: {some(strange)}"
    if not strange:
        what = f"several classes are called {some(shared)}" if shared else "two classes are spelt alike"
    others = "".join(f", {rule}s ({words[0]}, ...)" for rule, words in other_names.items() if words)
    positions = "" if numeral else f", numbers from 0 to {last}"  # where names are numbers, these are names
    wanted = f"class names ({some(list(names))}){positions}{others}"
    return DataError(where, what, wanted, "rename them: a label is not guessed from an order")
