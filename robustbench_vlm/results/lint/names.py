"""What the words of a table mean: methods, architectures, datasets, attacks, radii."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from robustbench_vlm.cards import reader

ARCHITECTURE = re.compile(
    r"(?i)\b(?:vit-?([blhg])[-/ ]?(\d\d)(-336)?|(rn(?:50|101)(?:-quickgelu)?)|(convnext_base_w))"
)
CLIP_NAMES = {
    "clip",
    "vanillaclip",
    "originalclip",
    "zeroshotclip",
    "openaiclip",
    "cliporiginal",
    "clipopenai",
}
DROPPED = re.compile(r"\([^)]*\)|\[[^]]*\]|(?i:\b(?:ours|openai|laion2b(?:-augreg)?)\b)|[*†‡]")
MEAN = re.compile(r"(?i)\b(?:avg\w*|average|mean)(?![\w/])")
RADIUS = re.compile(r"(?<![\d./])(\d{1,2})\s*/\s*255\b")
FAMILIES = (
    ("autoattack", re.compile(r"(?i)\bauto-?\s?attack\b|\baa\b")),
    ("apgd", re.compile(r"(?i)\bapgd")),
    ("cw", re.compile(r"(?i)\bc&?w\b")),
    ("pgd", re.compile(r"(?i)\bpgd")),
)
"""Attacks by what a table calls them; the first that is found counts."""

CLEAN = re.compile(r"(?i)\b(?:clean|natural|nat|standard acc\w*|benign)\b")
ROBUST = re.compile(r"(?i)\b(?:robust\w*|adv\w*|attacked)\b")
KEPT = 4096  # texts of a table whose meaning is kept, since each is asked for once a record
OTHER_NAMES = {
    **{"flowers": "flowers102", "aircraft": "fgvc_aircraft", "fgvc": "fgvc_aircraft", "pets": "oxford_pets"},
    **{"stanfordcars": "cars", "food": "food101", "sun": "sun397", "oxfordpet": "oxford_pets"},
    **{"stanfordcar": "cars", "imagenets": "imagenet-sketch", "tinyimagenet": "tinyimagenet"},
}


def squeezed(text: str) -> str:
    """Letters and digits alone, in small letters."""
    return re.sub(r"[^a-z0-9+]", "", text.lower())


def method(text: str) -> str:
    """The name of a method without architecture, brackets and citations; undefended CLIP is `clip`."""
    name = squeezed(ARCHITECTURE.sub(" ", DROPPED.sub(" ", text)))
    return "clip" if name in CLIP_NAMES else name


def architecture(text: str) -> str:
    """An architecture in one spelling, `vit-b-32`; empty where none is named."""
    found = ARCHITECTURE.search(text)
    if not found:
        return ""
    letter, patch, large, resnet, convnext = found.groups()
    return f"vit-{letter.lower()}-{patch}{large or ''}" if letter else (resnet or convnext).lower()


@cache
def _datasets() -> dict[str, str]:
    cards = {squeezed(name): name for name in reader.names("datasets") if not name.startswith("tiny-")}
    return cards | OTHER_NAMES


@lru_cache(KEPT)
def dataset(text: str) -> str:
    """The dataset that a text names: a card's name, `mean` for an average, or empty.

    Longer names win: `ImageNet-R` is not `imagenet`.
    """
    words = re.findall(r"[A-Za-z0-9_-]+", text)
    known = _datasets()
    for length in (3, 2, 1):
        for i in range(len(words) - length + 1):
            name = known.get(squeezed("".join(words[i : i + length])))
            if name:
                return name
    return "mean" if MEAN.search(text) else ""


@lru_cache(KEPT)
def family(text: str) -> str:
    """The kind of attack that a text names, or empty."""
    return next((name for name, pattern in FAMILIES if pattern.search(text)), "")


def steps(text: str) -> str:
    """The number of steps of `PGD-20`, or empty."""
    found = re.search(r"(?i)\bpgd[- ]?(\d+)\b", text)
    return found[1] if found else ""


def radius(text: str) -> str:
    """The radius that a text names, `4/255`, or empty; two different ones count as none."""
    found = set(RADIUS.findall(text))
    return f"{found.pop()}/255" if len(found) == 1 else ""


def norm(text: str) -> str:
    """The norm that a text names, `linf`, `l2` or `l1`, or empty."""
    found = re.search(r"(?i)\b[lℓ][-_ ]?(inf|∞|1|2)(?![\w/])", text)
    return f"l{found[1].lower().replace('∞', 'inf')}" if found else ""


@lru_cache(KEPT)
def fields(text: str) -> tuple[str, ...]:
    """Which of `clean` and `robust` the numbers below a header may be."""
    if CLEAN.search(text):
        return ("clean",)
    return ("robust",) if ROBUST.search(text) or family(text) or radius(text) else ("clean", "robust")
