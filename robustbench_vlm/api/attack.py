"""Attack a classifier of pixels from Python."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TypedDict, Unpack

import pandas as pd
from torch import Tensor

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards.attack import MOST_ROWS
from robustbench_vlm.engine import attacked_view, batch_shapes, canonical, losses, model_checks, tied_classes
from robustbench_vlm.engine.attack_watch import AttackWatch
from robustbench_vlm.engine.isolation import isolated, restored_buffers
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.engine.oracle import out_of_memory
from robustbench_vlm.engine.tied_classes import TiedClasses
from robustbench_vlm.errors import InputError, UntrustedResultWarning, nearest
from robustbench_vlm.evaluation import tensors
from robustbench_vlm.evaluation.attack_checks import attack_checks
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.results import verdicts
from robustbench_vlm.results.open_table import opened
from robustbench_vlm.threat import Threat, eps_text
from robustbench_vlm.types import Classify, Finding


@dataclass(frozen=True)
class Attacked:
    """The result of an attack.

    Attributes:
        verdicts: one row an image, in the order given; columns as in the Parquet file of a result.
        images: (N, 3, H, W) on the CPU: the adversarial image where one was found, else that of the last
            stage which attacked the image: the last iterate of gradient attacks, the best image of Square,
            and the clean image of FAB, of mode `reference` and of packages.
        robust: number of images that are still classified correctly after each stage of the chain.
        engine: the attack engine with mode and version, as in a result.
        precision: in which the attacks saw the model, as in a result.
        checks: of the model before the attack, and of model and attack after it. Where `checks.failed` is not
            empty, `robust` does not mean robustness; each record says why in a sentence.
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
        batch_size: most images in a call of the attacked model; None, the default, for as many as are fast.
        engine: `native` (default), or the installed package `autoattack` or `torchattacks`, which attacks in
            batches of the chain's `rows`; this package gives the verdicts for its images, too.
        mode: of the native engine: `fast` (default), or `reference`, which has the schedule and noise of the
            reference implementation of AutoAttack. Only in mode `fast` do order and batch not matter.
        precision: in which attacks see the model, `fp32` (default) or `bf16`; verdicts are always in fp32.
    """

    keys: Sequence[str] | None
    seed: int
    batch_size: int | None
    engine: str
    mode: str
    precision: attacked_view.Format


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
            inside. Any callable, which gets copies of images; that of an encoder is
            `encoder.classifier(class_names)`. Classes with the same logits for every image are attacked as
            one (`engine.tied_classes`). Buffers that calls change, such as the statistics of batch norm in
            training mode, get their values back if it is a torch module.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device.
        labels: (N,) int64.
        threat: a `Threat`, or an Linf radius such as `"4/255"` or `4 / 255`.
        chain: one of `list_attacks()`, or a TOML file.
        **options: see `AttackOptions`.

    Raises:
        InputError: no classifier, one that tells no classes apart, pixels outside [0, 1], labels that do not
            fit, or an engine that is not installed or cannot do a stage of the chain.
        AttackError: the model returns no logits, or an attack left the ball or the box.

    Warns:
        UntrustedResultWarning: an examination of the model failed, with its sentence.

    Example:
        >>> from robustbench_vlm import load_model
        >>> model = load_model("tiny").classifier(["circle", "square"])
        >>> images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> found = attack(model, images, model(images).argmax(1), 8 / 255, chain="fgsm")
        >>> list(found.robust), len(found.verdicts), found.images.shape
        (['fgsm'], 4, torch.Size([4, 3, 32, 32]))
    """
    require_known("attack", options, AttackOptions)
    ball = threat if isinstance(threat, Threat) else Threat("linf", threat)
    built = Chain.named(chain)
    precision = attacked_view.Precision(options.get("precision", "fp32"))
    backend = Backend(options.get("engine", "native"), options.get("mode", "fast"), precision)
    job = _job(built, ball, options)
    tensors.require_classifier(model)
    tensors.require_tensors(model, images, labels)
    with isolated(), restored_buffers(model):
        block = _block(images.detach().clone(), labels.clone(), options.get("keys"))
        found = _attacked(model, built, backend, job, block)
    for check in found.checks.checks:
        if check.level == "fail":
            warnings.warn(f"{check.name}: {check.sentence}", UntrustedResultWarning, stacklevel=2)
    return found


def _examined(model: Classify, job: Job, block: ImageBlock, chain: Chain) -> model_checks.Examined:
    """What the model checks find, on the function that is attacked."""
    labels, needs = block.labels, chain.needs(job.n_classes)
    if job.tied is not None:
        model, labels = tied_classes.DistinctClasses(model, job.tied), job.tied.labels(labels)
    rows = batch_shapes.of_checks(len(block.keys), job.rows)
    return model_checks.examine(model, block.images, labels, block.keys, rows=rows, seed=job.seed, **needs)


def _job(chain: Chain, ball: Threat, options: AttackOptions) -> Job:
    """The stages of a chain and how they are run; the number of classes is not known yet."""
    chain.require_norm(ball.norm)
    batch_size = options.get("batch_size")
    if batch_size is not None and (not _is_whole(batch_size) or not 1 <= batch_size <= MOST_ROWS):
        raise InputError(
            "batch_size", f"{batch_size!r:.40}", f"a whole number from 1 to {MOST_ROWS}, or None"
        )
    seed = options.get("seed", 0)
    if not _is_whole(seed):
        raise InputError("seed", f"{seed!r:.40}", "a whole number")
    return chain.job(ball, n_classes=0, seed=seed, batch_size=batch_size)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _with_classes(job: Job, clean: Tensor, labels: Tensor) -> Job:
    """The job, once every label is a class of the model."""
    classes = clean.shape[1]
    if int(labels.max()) >= classes:
        raise InputError("labels", f"{int(labels.max())}", f"below {classes}, the classes of the model")
    return replace(job, n_classes=classes)


def _tied(model: Classify, images: Tensor, clean: Tensor, rows: int) -> TiedClasses | None:
    """Classes that the model cannot tell apart: those with one text embedding, or with the same logits.

    Raises:
        InputError: all classes are the same, so no image can be taken for another class.
    """
    if isinstance(model, Classifier):
        tied = tied_classes.of_bank(model.bank)
    else:
        tied = tied_classes.found_in(model, images, clean, rows)
    if tied is not None and len(tied.distinct) < 2:
        found = f"all {clean.shape[1]} classes have the same logits for every image"
        raise InputError("model", found, "two different classes", "give each class a name of its own")
    return tied


def _block(images: Tensor, labels: Tensor, keys: Sequence[str] | None) -> ImageBlock:
    """Images with their names; by default the hash of each image and its label."""
    return ImageBlock(images, labels, tensors.distinct_keys(keys, tensors.sha256_of_images(images), labels))


def _attacked(model: Classify, chain: Chain, backend: Backend, job: Job, block: ImageBlock) -> Attacked:
    """Check the model, run every stage, check what it brought to light."""
    images = block.images
    clean = _clean_logits(model, images, job.rows)
    job = _with_classes(job, clean, block.labels)
    job = replace(job, tied=_tied(model, images, clean, job.rows))
    examined = _examined(model, job, block, chain)
    sample = canonical.padded(images[: job.rows], job.rows)
    view = attacked_view.build(model, backend.precision, sample)
    called = batch_shapes.of_checks(len(images), job.rows)
    watch = AttackWatch(Model(model, view), job.rows, called)
    table, adversarial = _run(watch, backend, job, replace(block, clean=clean))
    eps = eps_text(job.threat.norm, job.threat.eps)
    seen, _ = watch.checks(images[: job.rows], clean[: job.rows])
    checks = examined.joined([*seen, *attack_checks(table, chain, job.n_classes, eps)])
    if job.tied is not None:
        checks = checks.joined([tied_classes.check_of(job.tied)])
    after = verdicts.robust_after(table, [name for name, _ in job.stages], eps)
    return Attacked(table, adversarial, after, backend.label, backend.precision.label, checks)


def _clean_logits(model: Classify, images: Tensor, rows: int) -> Tensor:
    """(N, C) canonical logits, by the first calls of the model."""
    try:
        return canonical.logits(model, images, rows)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = [*str(error).strip().splitlines(), "no message"][0]
        found = f"shape {tuple(images.shape)}, on which the model fails: {reason}"
        raise InputError("images", found, "images that the model takes") from error


def _run(watch: AttackWatch, backend: Backend, job: Job, block: ImageBlock) -> tuple[pd.DataFrame, Tensor]:
    """The verdicts of all images, and the adversarial images, after every stage of the job."""
    images, labels, clean = block.images, block.labels, block.clean
    assert clean is not None
    margins, predictions = losses.correct_margin(clean, labels), clean.argmax(1)
    if job.tied is not None:
        margins, predictions = job.tied.correct_margin(clean, labels), job.tied.predictions(clean)
    shas = tensors.sha256_of_images(images)
    table = verdicts.begin(
        list(block.keys), labels.cpu().numpy(), shas, predictions.cpu().numpy(), margins.cpu().numpy()
    )
    originals = images.cpu()
    adversarial = originals.clone()
    position = {key: i for i, key in enumerate(block.keys)}

    def enter(finding: Finding) -> None:
        i = position[finding.key]
        adversarial[i] = finding.adv
        watch.note(finding, originals[i], int(labels[i]))
        line = verdicts.line(finding, originals[i], shas[i], int(labels[i]), job.threat)
        entries.enter(i, line, finding.stage)

    standing = [int(i) for i in table.index[verdicts.standing(table)]]
    with opened(table, eps_text(job.threat.norm, job.threat.eps)) as entries:
        backend.run_chain(watch.watched, job, block.take(standing), enter)
    return table, adversarial


def require_known(function: str, options: Mapping[str, object], known: type) -> None:
    """Refuse an option that the function does not have."""
    names = known.__annotations__
    for name in options:
        if name not in names:
            raise InputError(f"{function}({name}=...)", "no such argument", do=nearest(name, names))
