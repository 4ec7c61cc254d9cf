"""Sentences that are longer than what a text tower reads; tokenizers cut them without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from robustbench_vlm.errors import InputError

Tokenize = Callable[[list[str]], Tensor]
"""N sentences -> (N, L) token ids, padded or cut to the context length L."""


def cut_sentences(tokenize: Tokenize, sentences: Sequence[str]) -> list[str]:
    """The sentences whose tokens do not fit into the context, each once and in their order.

    A token stands for at least one byte, so most sentences need not be tokenised. A row without padding is
    either full or cut: it is cut if the tokens of its two halves do not fit together.
    """
    (probe,) = tokenize(["a"]).tolist()
    length, padding = len(probe), probe[-1]
    special = _used(probe, padding) - 1
    space = length - special
    long = [text for text in dict.fromkeys(sentences) if len(text.encode()) > space]
    if not long:
        return []
    full = [text for text, row in zip(long, tokenize(long).tolist(), strict=True) if row[-1] != padding]
    return [
        text
        for text in full
        if sum(_used(row, padding) - special for row in tokenize(list(_halves(text))).tolist()) > space
    ]


def require_distinct(tokenize: Tokenize, sentences: Sequence[Sequence[str]]) -> None:
    """Refuse two classes whose sentences differ only behind the end of the context.

    Args:
        tokenize: of the text tower.
        sentences: those of each of C classes.

    Raises:
        InputError: there are two such classes.
    """
    cut = set(cut_sentences(tokenize, [text for group in sentences for text in group]))
    if not cut:
        return
    seen: dict[tuple[tuple[int, ...], ...], Sequence[str]] = {}
    for group in sentences:
        if not cut.isdisjoint(group):
            rows = tuple(map(tuple, tokenize(list(group)).tolist()))
            other = seen.setdefault(rows, group)
            if list(other) != list(group):
                where = f"class sentences {_end(other[0])} and {_end(group[0])}"
                found = f"equal up to the {len(rows[0])} tokens that the text tower reads"
                raise InputError(
                    where, found, "names that differ earlier", "shorten the names or the templates"
                )


def _end(text: str) -> str:
    """The end of a sentence, quoted, where the two differ."""
    return repr(f"...{text[-40:]}" if len(text) > 40 else text)


def _used(row: Sequence[int], padding: int) -> int:
    """Number of token ids before the padding."""
    used = len(row)
    while used and row[used - 1] == padding:
        used -= 1
    return used


def _halves(text: str) -> tuple[str, str]:
    """A sentence in two parts, at the blank nearest to its middle."""
    middle = len(text) // 2
    blanks = [i for i, letter in enumerate(text) if letter == " "] or [middle]
    at = min(blanks, key=lambda i: abs(i - middle))
    return text[:at], text[at:]
