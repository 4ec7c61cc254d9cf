"""Adversarial images that an evaluation kept (`vlmrob eval --save-adversarial`), and images as PNG files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import SafetensorError, safe_open

from robustbench_vlm.errors import DataError, InputError
from robustbench_vlm.results.result_file import Result


def path(result: Result) -> Path:
    """The file of a result's adversarial images."""
    return result.path.with_suffix(".safetensors")


def line(result: Result, key: str) -> pd.Series:
    """The verdict of the image that a key, or its end after a `/`, names.

    Raises:
        InputError: no such image, or one that was not broken and so has no adversarial image.
    """
    found = result.verdicts().set_index("key", drop=False)
    named = [name for name in found.index if name == key or name.endswith(f"/{key}")]
    broken = found.index[found.broken_by != ""]
    do = f"broken ones: {', '.join(broken[:5])}" + (" ..." if len(broken) > 5 else "")
    if len(named) != 1:
        what = f"{len(named)} images of that name" if named else "no such image"
        raise InputError(f"image {key!r}", what, f"a key of {result.path.name}", do)
    verdict: pd.Series = found.loc[named[0]]
    if not verdict.broken_by:
        how = "survived every attack" if verdict.clean_correct else "is misclassified without attack"
        raise InputError(f"image {key!r}", f"it {how}", "an image that was broken", do)
    return verdict


def read(result: Result, verdict: pd.Series) -> np.ndarray:
    """(3, H, W) float32 in [0, 1]: the adversarial image of a broken image.

    Args:
        result: the file beside it is read.
        verdict: of the image; see `line`.

    Raises:
        DataError: no such file, no such image in it, or another image than the verdict was given for.
    """
    file, key = path(result), verdict.key
    do = "run the same eval again with --save-adversarial"
    try:
        with safe_open(file, framework="numpy") as opened:
            if key not in opened.keys():  # noqa: SIM118 - not a mapping
                raise DataError(str(file), f"no image {key}", "every image that was broken", do)
            image: np.ndarray = opened.get_tensor(key)
    except FileNotFoundError:
        raise DataError(str(file), "no such file", "the adversarial images of the result", do) from None
    except (SafetensorError, OSError) as error:
        raise DataError(str(file), f"not a whole safetensors file ({error})", do=do) from None
    if hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() != verdict.adv_sha256:
        found = f"another image {key} than that of the verdict"
        raise DataError(str(file), found, "it as it was written", do)
    return image


def png(image: np.ndarray) -> bytes:
    """An image (3, H, W) in [0, 1] as a PNG file of 8 bits a channel, rounded to the nearest step."""
    steps = np.clip(np.rint(np.asarray(image, dtype=np.float64) * 255), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.moveaxis(steps, 0, -1)).save(file, format="PNG", optimize=True)
    return file.getvalue()


def require_distance(clean: np.ndarray, adversarial: np.ndarray, norm: str, stated: float) -> None:
    """Refuse a clean image from which the adversarial one is not as far as its verdict says.

    Raises:
        DataError: another distance, by more than float32 can be off.
    """
    delta = (np.asarray(adversarial, dtype=np.float64) - clean).ravel()
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    found = float(np.linalg.norm(delta, ord=order))
    if abs(found - stated) > 1e-6 + 1e-5 * stated:
        what = f"the adversarial image is {found:.6g} away"
        do = "use the data that the result was measured on"
        raise DataError("clean image", what, f"{stated:.6g}, as the verdict says", do)


def perturbation(clean: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
    """The difference of two images, scaled so that its largest value is 0 or 1; grey is no difference."""
    delta = np.asarray(adversarial, dtype=np.float64) - np.asarray(clean, dtype=np.float64)
    largest = float(np.abs(delta).max())
    scaled: np.ndarray = 0.5 + delta / (2 * largest) if largest else np.full_like(delta, 0.5)
    return scaled


def find(results: Sequence[Result], name: str) -> Result:
    """The result that a path, or the first digits of a fingerprint, names.

    Args:
        results: those that may be meant.
        name: the path of its JSON file, the digits at the end of that name, or the first digits of
            `cell_sha256` in a leaderboard.

    Raises:
        InputError: none, or several.
    """
    digits = name.lower()
    if len(digits) >= 4:
        for found in (
            [result for result in results if result.content.sha256.startswith(digits)],
            [result for result in results if result.path.stem.rpartition("-")[2].startswith(digits)],
        ):
            if len(found) == 1:
                return found[0]
    expected = "the path of its JSON file, or the first four digits or more of cell_sha256 in the CSV"
    raise InputError(f"result {name!r}", "no such result", expected, "see the column cell_sha256")
