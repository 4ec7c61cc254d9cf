"""`vlmrob show image`, and where `vlmrob leaderboard --gallery` gets clean images from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from robustbench_vlm import console, store
from robustbench_vlm.errors import DataError


def show(name: str, key: str, results: Path, out: Path, data_root: Path) -> None:
    """Write a broken image as PNG files and print what is known about it, as JSON.

    Args:
        name: the result: path of its JSON file, or first digits of its fingerprint.
        key: the image.
        results: folder of all results.
        out: folder of the PNG files.
        data_root: folder of the datasets; without the dataset only the adversarial image is written.
    """
    from robustbench_vlm.results import adversarial_images, pictures, result_file

    is_file = Path(name).is_file()
    found = result_file.read_one(Path(name)) if is_file else None
    result = found or adversarial_images.find(result_file.read(results), name)
    verdict = adversarial_images.line(result, key)
    images = pictures.of_verdict(result, verdict, partial(clean_or_none, data_root=data_root))
    if not images:
        do = "say where the dataset is with --data-root"
        what = "a bundle of evidence, which holds the difference from the clean image"
        raise DataError(f"image {verdict.key}", what, "its dataset below --data-root", do)
    stem = store.file_name(f"{result.model[0]}-{verdict.key.replace('/', '-')}")
    files = {kind: out / f"{stem}-{kind}.png" for kind in images}
    for kind, image in images.items():
        store.write(files[kind], adversarial_images.png(image))
    facts = {name: _plain(verdict[name]) for name in verdict.index if name not in ("error", "progress")}
    console.result_json({**facts, "files": {kind: str(path) for kind, path in files.items()}})


def clean_or_none(result: Any, verdict: Any, adversarial: Any, data_root: Path) -> Any:  # noqa: ANN401
    """The clean image of a verdict; None, with a remark, where the dataset is not below the data root."""
    from robustbench_vlm.evaluation import clean_images

    try:
        return clean_images.read(result, verdict, adversarial, data_root)
    except DataError as error:
        console.remark(f"without the clean image: {error}")
        return None


def _plain(value: Any) -> Any:  # noqa: ANN401 - a scalar of numpy, or a text
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and plain != plain else plain
