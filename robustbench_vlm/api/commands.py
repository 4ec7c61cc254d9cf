"""The commands as Python functions: load a model, evaluate and train, read the tables.

Each does what the command of its name does, and calls the same functions.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pandas as pd
import torch

from robustbench_vlm.api.attack import require_known
from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards import reader
from robustbench_vlm.devices import choose_device
from robustbench_vlm.engine.isolation import default_state
from robustbench_vlm.errors import UntrustedResultWarning
from robustbench_vlm.evaluation import planning
from robustbench_vlm.evaluation.run import flagged, run_plan
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.results import compare as paired_tests
from robustbench_vlm.results import leaderboard as tables
from robustbench_vlm.results import result_file
from robustbench_vlm.threat import typed_eps
from robustbench_vlm.training.folder import folder_of
from robustbench_vlm.training.resolve import resolve
from robustbench_vlm.training.run import run_recipe

LOG = logging.getLogger("robustbench_vlm")
"""Gets the lines that a command prints to stderr, at level INFO."""


class EvalOptions(TypedDict, total=False):
    """Further arguments of `evaluate`; what is left out is as the suite says.

    Attributes:
        datasets: only these datasets of the suite, or this one.
        norm: `linf`, `l2` or `l1`.
        protocol: evaluate as a paper does; the name of a protocol card.
        until: stop a model when the interval of its mean robust accuracy is this many points to each side.
        arch: of models that are weights files, the model that they were made from.
        device: `auto` (default), `cpu`, `cuda` or `cuda:N`.
        engine: as for `attack`.
        mode: as for `attack`.
        save_images: whether adversarial images are stored, too.
        save_evidence: whether a bundle a result is stored, too, which `vlmrob verify` can check.
        skip_missing: whether datasets that are not on disk are left out.
        workers: a number of workers on this machine, or `"ray"` for those of the cluster of `RAY_ADDRESS`;
            by default this process attacks.
    """

    datasets: str | Sequence[str]
    norm: str
    protocol: str
    until: float | None
    arch: str
    device: str
    engine: str
    mode: str
    save_images: bool
    save_evidence: bool
    skip_missing: bool
    workers: int | str


AS_TYPED = {"norm", "protocol", "arch", "until", "save_images", "save_evidence", "skip_missing"}
"""Options of `evaluate` that an `EvalRequest` has under the same name."""


def load_model(name: str, device: torch.device | str = "cpu", arch: str = "") -> Clip:
    """The encoder called `name`, in eval mode.

    Args:
        name: one of `list_models()`, a checkpoint folder, `ARCH:TAG` of open_clip, `hf-hub:ORG/NAME`,
            `local-dir:PATH`, a weights file, or a folder of transformers.
        device: where it is put.
        arch: of a weights file, the model that it was made from, such as `ViT-L-14:openai`.

    Raises:
        WeightsError: nothing of that name, or weights that do not fit their card or architecture.

    Example:
        >>> encoder = load_model("tiny")
        >>> encoder(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])
        >>> classifier = encoder.classifier(["circle", "square"], ["a photo of a {c}"])
        >>> classifier(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 2])
    """
    with default_state():
        return zoo.load(name, device, arch).model.eval()


def evaluate(
    models: str | Sequence[str],
    attacks: str | Sequence[str] = (),
    suite: str = "",
    *,
    eps: str | float | Sequence[str | float] = (),
    n: int | None = None,
    data_root: str | Path = "data",
    results: str | Path = "results",
    **options: Unpack[EvalOptions],
) -> pd.DataFrame:
    """Attack models over the datasets of a suite, as `vlmrob eval` does; finished cells are not run again.

    Args:
        models: as for `load_model`.
        attacks: chains out of `list_attacks()`, or TOML files; by default the protocol's, or `autoattack`.
        suite: one of `list_suites()`, or a TOML file; by default the protocol's, or `tiny`.
        eps: radii, such as `"4/255"` or `[1, 2, 4]`; by default the suite's.
        n: images a dataset, 0 for all; by default the suite's.
        data_root: folder of the datasets. Those of the tiny world are rendered where they are missing.
        results: folder of the results.
        **options: see `EvalOptions`.

    Returns:
        The rows of the leaderboard for these models, attacks and radii alone.

    Raises:
        InputError: an unknown name, a radius or a model that cannot be used, or missing datasets.

    Warns:
        UntrustedResultWarning: a check of a result failed, so that its number does not mean what it says.

    Example:
        >>> rows = evaluate("tiny", "fgsm", datasets=["tiny-digits"], eps="4/255", n=4)
        >>> rows[["model_id", "dataset", "attack", "eps"]].iloc[0].tolist()
        ['tiny', 'tiny-digits', 'fgsm', '4/255']
    """
    require_known("evaluate", options, EvalOptions)
    protocol = options.get("protocol", "")
    typed: Any = {name: value for name, value in options.items() if name in AS_TYPED}
    request = planning.EvalRequest(
        models=_names(models),
        attacks=_names(attacks) or (() if protocol else ("autoattack",)),
        suite=suite or ("" if protocol else "tiny"),
        results=Path(results),
        data_root=Path(data_root),
        datasets=_names(options.get("datasets", ())),
        eps=",".join(map(typed_eps, [eps] if isinstance(eps, str | float | int) else eps)),
        n=n,
        backend=Backend(options.get("engine", "native"), options.get("mode", "fast")),
        workers=str(options.get("workers", "")),
        **typed,
    )
    device = options.get("device", "auto")
    with default_state():
        rows = run_plan(planning.plan(request, choose_device(device)), _no_progress, LOG.info)
    for line in flagged(rows, "failed"):
        warnings.warn(line, UntrustedResultWarning, stacklevel=2)
    return rows


def train(
    name: str,
    recipe: str = "",
    *,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    data_root: str | Path = "data",
    device: str = "auto",
    resume: bool = True,
) -> Path:
    """Train a defense into a checkpoint folder, as `vlmrob train` does; goes on where it was stopped.

    Args:
        name: one of `list_defenses()` or `list_recipes()`, or a TOML file.
        recipe: with a defense as `name`: the recipe to train it with; by default `tiny-<defense>`.
        settings: `key=value` each, such as `"optim.steps=100"`.
        out: checkpoint folder; by default `runs/<recipe>-<hash>`.
        data_root: folder of the datasets. Those of the tiny world are rendered where they are missing.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resume: whether `out` may hold an earlier run.

    Returns:
        The checkpoint folder, which `load_model` and `evaluate` take.

    Raises:
        InputError: no such defense or recipe, or a setting, model, dataset or folder that cannot be used.
        TrainingError: a loss or gradient is not finite.

    Example:
        >>> folder = train("clean", settings=["optim.steps=1", "optim.batch_size=4"], out="runs/first")
        >>> load_model(str(folder)).image_size
        32
    """
    chosen = resolve(name, recipe, settings, LOG.info)
    folder = folder_of(chosen) if out is None else Path(out)
    with default_state():
        return run_recipe(chosen, folder, Path(data_root), device, _no_progress, LOG.info, resume=resume)


def leaderboard(
    results: str | Path = "results", suite: str = "tiny", out: str | Path | None = None
) -> pd.DataFrame:
    """The rows of every result of a suite, as `vlmrob leaderboard` renders them.

    Args:
        results: folder of the results.
        suite: one of `list_suites()`, or a TOML file.
        out: folder to write `<suite>.csv`, `.md` and `.html` into; by default nothing is written.

    Raises:
        DataError: no results of the suite, or results that cannot share a table.

    Example:
        >>> rows = leaderboard("results")  # after `evaluate`
        >>> sorted(set(rows.model_id))
        ['tiny']
    """
    chosen = reader.suite(suite)
    if out is not None:
        return tables.render(Path(results), chosen, Path(out))[0]
    return tables.rows_of(Path(results), chosen)


def compare(a: str, b: str, results: str | Path = "results", suite: str = "tiny") -> pd.DataFrame:
    """Paired tests of two models on the same images, as `vlmrob compare` makes them.

    Args:
        a: name of a model, or the first digits of its fingerprint.
        b: the other one.
        results: folder of the results.
        suite: one of `list_suites()`, or a TOML file.

    Returns:
        For each attack and radius that both models have, one row a dataset, and two over all of them:
        `all images`, and `mean` of the datasets.

    Raises:
        InputError: a model without results, or no attack and radius that both have.

    Example:
        >>> rows = evaluate(["tiny", "tiny-robust-teacher"], "fgsm", datasets=["tiny-digits"], eps=4, n=4)
        >>> compare("tiny", "tiny-robust-teacher").dataset.iloc[0]
        'tiny-digits'
    """
    found = result_file.of_suite(result_file.read(Path(results)), reader.suite(suite))
    lines = [line.texts for line in paired_tests.compare(found, a, b)]
    return pd.DataFrame(lines, columns=[*paired_tests.COLUMNS])


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _no_progress(*what: object) -> None:
    """Show no progress."""
