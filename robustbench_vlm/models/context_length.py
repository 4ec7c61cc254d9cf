"""Sentences that are longer than what a text tower reads; tokenizers cut them without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from robustbench_vlm.errors import InputError, WeightsError

Tokenize = Callable[[list[str]], Tensor]
"""N sentences -> (N, L) token ids, padded or cut to the context length L."""


def cut_sentences(tokenize: Tokenize, sentences: Sequence[str]) -> list[str]:
    """The sentences whose tokens do not fit into the context, each once and in their order.

    A full row is either an exact fit or cut: it is cut if the tokens of its two halves do not fit together.
    """
    full, special, space = _full_rows(tokenize, sentences)
    return [
        text for text in full if sum(used - special for used in _used(tokenize, list(_halves(text)))) > space
    ]


def require_distinct(tokenize: Tokenize, sentences: Sequence[Sequence[str]]) -> None:
    """Refuse two classes whose sentences differ only behind the end of the context.

    Args:
        tokenize: of the text tower.
        sentences: those of each of C classes.

    Raises:
        InputError: there are two such classes.
    """
    every = [text for group in sentences for text in group]
    cut = set(cut_sentences(tokenize, every))
    if not cut:
        return
    full = set(_full_rows(tokenize, every)[0])  # what is cut may become equal to an exact fit
    seen: dict[tuple[tuple[int, ...], ...], Sequence[str]] = {}
    for group in sentences:
        if full.isdisjoint(group):
            continue
        rows = tuple(map(tuple, tokenize(list(group)).tolist()))
        other = seen.setdefault(rows, group)
        if list(other) != list(group) and not cut.isdisjoint([*other, *group]):
            where = f"class sentences {_end(other[0])} and {_end(group[0])}"
            found = f"equal up to the {len(rows[0])} tokens that the text tower reads"
            raise InputError(where, found, "names that differ earlier", "shorten the names or the templates")


def _full_rows(tokenize: Tokenize, sentences: Sequence[str]) -> tuple[list[str], int, int]:
    """The sentences that leave no room in the context, each once and in their order.

    A token stands for at least one byte, so most sentences need not be tokenised. Some tokenizers pad with
    the token that ends every sentence, so what a full row looks like is seen from one that is surely full.

    Returns:
        The sentences, the number of special tokens that are told from padding, and that of all other tokens
        for which there is room.
    """
    length = tokenize(["a"]).shape[1]
    try:
        one, most = _used(tokenize, ["a", " ".join(["a"] * length)])
    except WeightsError:  # one that leaves room for learned prompts refuses what it would have to cut
        return [], 0, 0
    special = one - 1
    space = most - special
    long = [text for text in dict.fromkeys(sentences) if len(text.encode()) >= space]
    used = _used(tokenize, long) if long else []
    return [text for text, count in zip(long, used, strict=True) if count == most], special, space


def _end(text: str) -> str:
    """The end of a sentence, quoted, where the two differ."""
    return repr(f"...{text[-40:]}" if len(text) > 40 else text)


def _used(tokenize: Tokenize, sentences: list[str]) -> list[int]:
    """For each sentence, the number of token ids before the padding."""
    *rows, short = tokenize([*sentences, "a"]).tolist()
    padding = short[-1]
    return [max((i + 1 for i, token in enumerate(row) if token != padding), default=0) for row in rows]


def _halves(text: str) -> tuple[str, str]:
    """A sentence in two parts, at the blank nearest to its middle."""
    middle = len(text) // 2
    blanks = [i for i, letter in enumerate(text) if letter == " "] or [middle]
    at = min(blanks, key=lambda i: abs(i - middle))
    return text[:at], text[at:]
