"""What the attacker may do: a norm and a radius.

Torch is not imported here, so that the command line refuses a mistyped radius at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, get_args

from robustbench_vlm.errors import InputError, nearest

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[str, ...] = get_args(Norm)

LONGEST = 10**6  # a ball of this radius holds every image of 300,000 pixels, in each norm
LARGEST_PLAIN = Fraction(32, 255)  # above this a plain Linf fraction is more likely a typing error
ZERO = "at radius 0 no attack is run: robust accuracy is the clean accuracy"
SNAP = Fraction(1, 100_000)  # 0.015686 is meant as 4/255
NUMBER = re.compile(
    r"-?\d{1,9}(\.\d{0,20})?(/\d{1,9})?|\.\d{1,12}|\d(\.\d{0,12})?e-?\d{1,2}|\d{1,150}/\d{1,150}",
    re.IGNORECASE,
)
DENOMINATOR = 999_999_999  # largest of the fraction that a decimal of many digits stands for
ROUNDING = Fraction(1, 10**12)  # share of a radius that the digits of a decimal may lack


@dataclass(frozen=True)
class Threat:
    """The set of admissible images: {x' in [0, 1] : ||x' - x||_norm <= eps}.

    Attributes:
        norm: `linf`, `l2` or `l1`, over all channels and pixels of one image.
        eps: radius in units of the [0, 1] pixel range, exact. Text and floats are read by `parse_eps`.

    Example:
        >>> str(Threat("linf", "4/255")), str(Threat("linf", 8 / 255)), str(Threat("l2", 0.5))
        ('linf 4/255', 'linf 8/255', 'l2 0.5')
    """

    norm: Norm
    eps: Fraction

    if TYPE_CHECKING:  # what a caller may write; `eps` is a Fraction afterwards

        def __init__(self, norm: Norm, eps: Fraction | float | str) -> None: ...

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError("norm", repr(self.norm), do=nearest(str(self.norm), NORMS))
        if not isinstance(self.eps, Fraction):
            object.__setattr__(self, "eps", parse_eps(self.eps, self.norm))
        if self.eps <= 0:
            do = ZERO if self.eps == 0 else "type for example 4/255"
            raise InputError("eps", str(self.eps), "a positive radius", do)

    @property
    def slack(self) -> float:
        """What float32 rounding may add to a distance: 1e-6 for Linf, else 1e-5 of the radius or 1e-6."""
        return 1e-6 if self.norm == "linf" else max(1e-6, 1e-5 * float(self.eps))

    def __str__(self) -> str:
        return f"{self.norm} {eps_text(self.norm, self.eps)}"

    @property
    def column(self) -> str:
        """The radius as tables print it: the numerator of /255 for Linf, the length for L2."""
        value = self.eps * 255 if self.norm == "linf" else self.eps
        return f"{float(value):.6g}"


def eps_text(norm: str, eps: Fraction) -> str:
    """`4/255` for Linf, a plain decimal for L2 and L1; a ratio where six digits would be another radius.

    So `parse_eps` reads the radius back, whatever it is.
    """
    text = _six_digits(norm, eps)
    try:
        exact = parse_eps(text, norm) == eps
    except InputError:
        exact = False
    return text if exact else str(eps)


def _six_digits(norm: str, eps: Fraction) -> str:
    """A radius as earlier versions spelled it, whatever it is."""
    if norm != "linf":
        return f"{float(eps):.6g}"
    scaled = eps * 255
    return f"{scaled}/255" if scaled.denominator == 1 else f"{float(scaled):.6g}/255"


def in_ladder(text: str, norm: str, ladder: Sequence[Fraction]) -> Fraction | None:
    """The radius of a ladder that a table means, in the spelling of any version; None for another one."""
    for spelling in (eps_text, _six_digits):
        for eps in ladder:
            if text == spelling(norm, eps):
                return eps
    try:
        meant = parse_eps(text, norm)
    except InputError:
        return None
    return meant if meant in ladder else None


def typed_eps(value: str | float) -> str:
    """A radius as it would be typed: text as it is, a number in decimals."""
    if not isinstance(value, float):
        return str(value).strip()
    text = f"{value:.20f}" if "e" in repr(value) else repr(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_eps(typed: str | float, norm: str = "linf") -> Fraction:
    """The radius that text or a number means.

    For Linf `2` and `2/255` mean 2/255; `0.0314` is a fraction of the pixel range, read as `N/255` when
    within 1e-5 of it; a plain fraction above 32/255 must be written `N/255`. For other norms the number is a
    length in [0, 1] pixel units. A decimal with as many digits as a float has means the simple fraction that
    was rounded to it.

    Raises:
        InputError: not a number, not positive, a decimal of 1 or more, or a plain fraction above 32/255.

    Example:
        >>> parse_eps("4"), parse_eps(8 / 255), parse_eps("0.5", "l2")
        (Fraction(4, 255), Fraction(8, 255), Fraction(1, 2))
    """
    where, text = f"eps {typed!r}", typed_eps(typed)
    if not NUMBER.fullmatch(text):
        raise InputError(where, "not a number", "4/255, 4 or 0.0157")
    above, _, below = text.partition("/")
    try:
        value = Fraction(above) / Fraction(below or 1)
    except ZeroDivisionError:
        raise InputError(where, "not a number", "4/255, 4 or 0.0157") from None
    if value <= 0:
        do = ZERO if value == 0 else ""
        raise InputError(where, "not positive", "a positive radius such as 4/255", do)
    if value > LONGEST:
        raise InputError(where, "longer than any image", f"at most {LONGEST}")
    if not below:
        simple = value.limit_denominator(DENOMINATOR)
        value = simple if abs(simple - value) <= ROUNDING * value else value
    if norm != "linf":
        return value
    if "/" in text or value >= 1:
        return _of_255(where, text, value)
    snapped = Fraction(round(value * 255), 255)
    if snapped > 0 and abs(snapped - value) <= SNAP:
        value = snapped
    if value > LARGEST_PLAIN:
        meant = f"type {float(value * 255):.4g}/255 if that is meant"
        raise InputError(
            where, "a plain fraction above 32/255", "the form N/255 for so large a radius", meant
        )
    return value


def require_radii(typed: Sequence[str], norm: str) -> None:
    """Refuse the radii of a card, where there is none or one that is no radius.

    Raises:
        ValueError: the message names the radius.
    """
    if not typed:
        raise ValueError("eps is empty, expected one radius at least, such as '4/255'")
    for text in typed:
        try:
            parse_eps(text, norm)
        except InputError as error:
            raise ValueError(str(error)) from None


def _of_255(where: str, text: str, value: Fraction) -> Fraction:
    """An Linf radius written as a ratio or as a number of at least 1."""
    if "/" not in text:
        if value.denominator != 1:
            raise InputError(
                where,
                "a decimal above 1 is ambiguous",
                "an integer N, which means N/255",
                f"type {text}/255 if that is meant",
            )
        value /= 255
    if value > 1:
        raise InputError(where, "larger than the pixel range", "at most 255/255")
    return value
