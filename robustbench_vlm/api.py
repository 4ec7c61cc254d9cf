"""The Python interface: load a model, attack it, evaluate and train models, read the tables.

Everything public here can be imported from `robustbench_vlm`. Each function does what the command of its name
does, and calls the same functions.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import pandas as pd
import torch
from torch import Tensor

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards import reader
from robustbench_vlm.devices import choose_device
from robustbench_vlm.engine import attacked_view, canonical, losses, model_checks
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.evaluation import evaluate as evaluation
from robustbench_vlm.evaluation import planning, tensors
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.results import compare as comparison
from robustbench_vlm.results import leaderboard as tables
from robustbench_vlm.results import result_file, verdicts
from robustbench_vlm.threat import Threat, eps_text, typed_eps
from robustbench_vlm.training import resolve
from robustbench_vlm.training import train as training
from robustbench_vlm.types import Classify, Finding

LOG = logging.getLogger("robustbench_vlm")
"""Gets the lines that a command prints to stderr, at level INFO."""


@dataclass(frozen=True)
class Attacked:
    """The result of an attack.

    Attributes:
        verdicts: one row an image, in the order given; columns as in the Parquet file of a result.
        images: (N, 3, H, W) on the CPU: the adversarial image where one was found, else the last iterate.
        robust: number of images that are still classified correctly after each stage of the chain.
        engine: the attack engine with mode and version, as in a result.
        precision: in which the attacks saw the model, as in a result.
        checks: examinations of the model before the attack. Where `checks.failed` is not empty, `robust` does
            not mean robustness; each record says why in a sentence.
    """

    verdicts: pd.DataFrame
    images: Tensor
    robust: dict[str, int]
    engine: str
    precision: str
    checks: model_checks.Examined


class AttackOptions(TypedDict, total=False):
    """Further arguments of `attack`.

    Attributes:
        keys: N distinct names that the noise is drawn from; by default the hash of each image and its label,
            so that neither order nor batch matters.
        seed: of the noise; 0 by default.
        active_rows: images under attack at once, at most the chain's `rows`; never changes a verdict.
        engine: `native` (default), or the installed package `autoattack` or `torchattacks`, which attacks in
            batches of the chain's `rows`; this package gives the verdicts for its images, too.
        mode: of the native engine: `fast` (default), or `reference`, which has the schedule and noise of the
            reference implementation of AutoAttack. Only in mode `fast` do order and batch not matter.
        precision: in which attacks see the model, `fp32` (default) or `bf16`; verdicts are always in fp32.
    """

    keys: Sequence[str] | None
    seed: int
    active_rows: int | None
    engine: str
    mode: str
    precision: attacked_view.Format


class EvalOptions(TypedDict, total=False):
    """Further arguments of `evaluate`; what is left out is as the suite says.

    Attributes:
        datasets: only these datasets of the suite.
        norm: `linf`, `l2` or `l1`.
        protocol: evaluate as a paper does; the name of a protocol card.
        arch: of models that are weights files, the model that they were made from.
        device: `auto` (default), `cpu`, `cuda` or `cuda:N`.
        engine: as for `attack`.
        mode: as for `attack`.
        save_images: whether adversarial images are stored, too.
        skip_missing: whether datasets that are not on disk are left out.
    """

    datasets: Sequence[str]
    norm: str
    protocol: str
    arch: str
    device: str
    engine: str
    mode: str
    save_images: bool
    skip_missing: bool


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
    return zoo.load(name, device, arch).model.eval()


def attack(
    model: Classify,
    images: Tensor,
    labels: Tensor,
    threat: Threat | str | float,
    chain: str = "autoattack",
    **options: Unpack[AttackOptions],
) -> Attacked:
    """Run a chain of attacks on a classifier of pixels.

    Args:
        model: (B, 3, H, W) float32 in [0, 1] -> logits (B, C), in eval mode, with normalisation and resizing
            inside. Any callable; that of an encoder is `encoder.classifier(class_names)`.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device.
        labels: (N,) int64.
        threat: a `Threat`, or an Linf radius such as `"4/255"` or `4 / 255`.
        chain: one of `list_attacks()`, or a TOML file.
        **options: see `AttackOptions`.

    Raises:
        InputError: no classifier, pixels outside [0, 1], labels that do not fit, or an engine that is not
            installed or cannot do a stage of the chain.
        AttackError: the model returns no logits, or an attack left the ball or the box.

    Warns:
        UserWarning: an examination of the model failed, with its sentence.

    Example:
        >>> model = load_model("tiny").classifier(["circle", "square"])
        >>> images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> found = attack(model, images, model(images).argmax(1), 8 / 255, chain="fgsm")
        >>> list(found.robust), len(found.verdicts), found.images.shape
        (['fgsm'], 4, torch.Size([4, 3, 32, 32]))
    """
    _require_known("attack", options, AttackOptions)
    ball = threat if isinstance(threat, Threat) else Threat("linf", threat)
    built = Chain.named(chain)
    precision = attacked_view.Precision(options.get("precision", "fp32"))
    backend = Backend(options.get("engine", "native"), options.get("mode", "fast"), precision)
    job = _job(built, ball, options)
    tensors.require_classifier(model)
    tensors.require_tensors(model, images, labels)
    shas = tensors.sha256_of_images(images)
    keys = tensors.distinct_keys(options.get("keys"), shas, labels)
    clean = canonical.logits(model, images, job.rows)
    job = _with_classes(job, clean, labels)
    examined = model_checks.examine(
        model, images, labels, keys, rows=job.rows, seed=job.seed, **built.needs(job.n_classes)
    )
    table, adversarial = _attacked(backend, model, job, ImageBlock(images, labels, keys, clean), shas)
    after = verdicts.robust_after(table, [name for name, _ in job.stages], eps_text(ball.norm, ball.eps))
    for check in examined.checks:
        if check.level == "fail":
            warnings.warn(f"{check.name}: {check.sentence}", UserWarning, stacklevel=2)
    return Attacked(table, adversarial, after, backend.label, precision.label, examined)


def _job(chain: Chain, ball: Threat, options: AttackOptions) -> Job:
    """The stages of a chain and how they are run; the number of classes is not known yet."""
    chain.require_norm(ball.norm)
    active = options.get("active_rows")
    if active is not None and active < 1:
        raise InputError("active_rows", str(active), f"1 to {chain.rows}, the rows of every model call")
    active = None if active is None else min(active, chain.rows)
    return chain.job(ball, n_classes=0, seed=options.get("seed", 0), active_rows=active)


def _with_classes(job: Job, clean: Tensor, labels: Tensor) -> Job:
    """The job, once every label is a class of the model."""
    classes = clean.shape[1]
    if int(labels.max()) >= classes:
        raise InputError("labels", f"{int(labels.max())}", f"below {classes}, the classes of the model")
    return replace(job, n_classes=classes)


def _attacked(
    backend: Backend, model: Classify, job: Job, block: ImageBlock, shas: Sequence[str]
) -> tuple[pd.DataFrame, Tensor]:
    """The verdicts of all images, and the adversarial images, after every stage of the job."""
    images, labels, clean = block.images, block.labels, block.clean
    assert clean is not None
    margins, predictions = losses.correct_margin(clean, labels), clean.argmax(1)
    table = verdicts.begin(
        list(block.keys), labels.cpu().numpy(), shas, predictions.cpu().numpy(), margins.cpu().numpy()
    )
    adversarial = images.detach().cpu().clone()
    position = {key: i for i, key in enumerate(block.keys)}
    eps = eps_text(job.threat.norm, job.threat.eps)

    def enter(finding: Finding) -> None:
        i = position[finding.key]
        adversarial[i] = finding.adv
        line = verdicts.line(finding, images[i].detach().cpu(), shas[i], int(labels[i]), job.threat)
        verdicts.enter(table, i, line, finding.stage, eps)

    sample = canonical.padded(images[: job.rows], job.rows)
    seen = Model(model, attacked_view.build(model, backend.precision, sample))
    standing = [int(i) for i in table.index[verdicts.standing(table)]]
    backend.run_chain(seen, job, block.take(standing), enter)
    return table, adversarial


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
        UserWarning: a result carries a flag, so that its number does not mean what it says.

    Example:
        >>> rows = evaluate("tiny", "fgsm", datasets=["tiny-digits"], eps="4/255", n=4)
        >>> rows[["model_id", "dataset", "attack", "eps"]].iloc[0].tolist()
        ['tiny', 'tiny-digits', 'fgsm', '4/255']
    """
    _require_known("evaluate", options, EvalOptions)
    protocol = options.get("protocol", "")
    request = planning.EvalRequest(
        models=_names(models),
        attacks=_names(attacks) or (() if protocol else ("autoattack",)),
        suite=suite or ("" if protocol else "tiny"),
        results=Path(results),
        data_root=Path(data_root),
        datasets=tuple(options.get("datasets", ())),
        eps=",".join(map(typed_eps, [eps] if isinstance(eps, str | float | int) else eps)),
        norm=options.get("norm", ""),
        n=n,
        save_images=options.get("save_images", False),
        skip_missing=options.get("skip_missing", False),
        backend=Backend(options.get("engine", "native"), options.get("mode", "fast")),
        arch=options.get("arch", ""),
        protocol=protocol,
    )
    plan = planning.plan(request, choose_device(options.get("device", "auto")))
    rows = evaluation.evaluate(plan, _no_progress, LOG.info)
    for line in evaluation.flags(rows):
        warnings.warn(line, UserWarning, stacklevel=2)
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
    chosen = resolve.resolve(name, recipe, settings, LOG.info)
    folder = training.folder_of(chosen) if out is None else Path(out)
    return training.train(chosen, folder, Path(data_root), device, _no_progress, LOG.info, resume=resume)


def leaderboard(
    results: str | Path = "results", suite: str = "tiny", out: str | Path | None = None
) -> pd.DataFrame:
    """The rows of every result of a suite, as `vlmrob leaderboard` renders them.

    Args:
        results: folder of the results.
        suite: one of `list_suites()`, or a TOML file.
        out: folder to write `<suite>.csv` and `<suite>.md` into; by default nothing is written.

    Example:
        >>> rows = leaderboard("results")  # after `evaluate`
        >>> sorted(set(rows.model_id))
        ['tiny']
    """
    chosen = reader.suite(suite)
    if out is not None:
        return tables.render(Path(results), chosen, Path(out))[0]
    return tables.table(result_file.of_suite(result_file.read(Path(results)), chosen), chosen)


def compare(a: str, b: str, results: str | Path = "results", suite: str = "tiny") -> pd.DataFrame:
    """Paired tests of two models on the same images, as `vlmrob compare` makes them.

    Args:
        a: name of a model, or the first digits of its fingerprint.
        b: the other one.
        results: folder of the results.
        suite: one of `list_suites()`, or a TOML file.

    Returns:
        One row a dataset and one over all of them, for each attack and radius that both models have.

    Raises:
        InputError: a model without results, or no attack and radius that both have.

    Example:
        >>> rows = evaluate(["tiny", "tiny-robust-teacher"], "fgsm", datasets=["tiny-digits"], eps=4, n=4)
        >>> compare("tiny", "tiny-robust-teacher").columns[0]
        'dataset'
    """
    found = result_file.of_suite(result_file.read(Path(results)), reader.suite(suite))
    lines = [line.texts for line in comparison.compare(found, a, b)]
    return pd.DataFrame(lines, columns=[*comparison.COLUMNS])


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _no_progress(*what: object) -> None:
    """Show no progress."""


def _require_known(function: str, options: AttackOptions | EvalOptions, known: type) -> None:
    """Refuse an option that the function does not have."""
    names = known.__annotations__
    for name in options:
        if name not in names:
            raise InputError(f"{function}({name}=...)", "no such argument", do=nearest(name, names))
