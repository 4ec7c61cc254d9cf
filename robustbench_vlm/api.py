"""Attack any classifier of pixels from Python: `robustbench_vlm.attack(model, images, labels, "4/255")`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import attacked_view, canonical, losses, model_checks
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation.chain import needs, plugin, require_norm
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import Threat, eps_text, parse_eps
from robustbench_vlm.types import Classify, Finding


@dataclass(frozen=True)
class Attacked:
    """What an attack found.

    Attributes:
        verdicts: one row an image, in the order given; columns as in the Parquet of a cell.
        images: (N, 3, H, W) on the CPU: the adversarial image where one was found, else the last iterate.
        robust: images still classified correctly after each stage of the chain, by stage.
        engine: who attacked, with mode and version, as in a cell.
        precision: of the model as attacks saw it, as in a cell.
        checks: what was examined about the model before the attack. Where `checks.failed` is not empty the
            counts above do not mean what they say; each record says why in a sentence.
    """

    verdicts: pd.DataFrame
    images: Tensor
    robust: dict[str, int]
    engine: str
    precision: str
    checks: model_checks.Examined


def attack(  # noqa: PLR0913 - what a command line says in flags
    model: Classify,
    images: Tensor,
    labels: Tensor,
    threat: Threat | str,
    *,
    chain: str = "autoattack",
    keys: Sequence[str] | None = None,
    seed: int = 0,
    live: int | None = None,
    engine: str = "native",
    mode: str = "fast",
    precision: attacked_view.Format = "fp32",
) -> Attacked:
    """Run a chain of attacks on any callable that maps pixels to logits.

    Args:
        model: (B, 3, H, W) float32 in [0, 1] -> logits (B, C); normalisation and resizing inside it, in eval
            mode. Its parameters never receive a gradient.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device.
        labels: (N,) int64.
        threat: a `Threat`, or an Linf radius such as `"4/255"`.
        chain: name of a card of `suites/attacks`, or a TOML file.
        keys: N distinct names that the noise is drawn from; by default the hash of each image and its label,
            so that order and batch never matter.
        seed: of the noise.
        live: images under attack at once, at most the chain's `rows`; never changes a verdict.
        engine: `native`, or the package `autoattack` or `torchattacks`, which attacks in batches of the
            chain's `rows` and must be installed; its images are judged as ours are.
        mode: of the native engine: `fast`, or `reference`, in the schedule and with the noise of the
            reference implementation of AutoAttack, for comparison with published numbers. Only in mode
            `fast` are verdicts free of order and batch.
        precision: in which attacks see the model, `fp32` or `bf16`; verdicts are always in fp32.

    Returns:
        Verdicts, adversarial images and the count of survivors after each stage.

    Raises:
        InputError: pixels outside [0, 1] (a normalised tensor, for one), shapes or labels that disagree; an
            engine that is not installed, or cannot do a stage of the chain.
        AttackError: the attack left the ball or the box, or the model gives no gradient.
    """
    ball = threat if isinstance(threat, Threat) else Threat("linf", parse_eps(threat))
    card = reader.read("attacks", chain, AttackCard)
    backend = Backend(engine, mode, attacked_view.Precision(precision))
    stages = [(stage.name, plugin(card, stage)) for stage in card.stage]
    require_norm(card, ball.norm)
    if live is not None and live < 1:
        raise InputError("live", str(live), f"1 to {card.rows}, the rows of every model call")
    _require_place(model, images, labels)
    _require_pixels(images, labels)
    shas = [
        hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest() for image in images
    ]
    names = list(keys) if keys is not None else _names(shas, labels)
    if len(names) != len(images) or len(set(names)) != len(names):
        found = f"{len(names)} keys, {len(set(names))} of them distinct"
        raise InputError("keys", found, f"{len(images)} distinct names, one an image")
    clean = canonical.logits(model, images, card.rows)
    if int(labels.max()) >= clean.shape[1]:
        raise InputError(
            "labels", f"{int(labels.max())}", f"below {clean.shape[1]}, the classes of the model"
        )
    examined = model_checks.examine(
        model, images, labels, names, rows=card.rows, seed=seed, **needs(card, clean.shape[1])
    )
    margins, predictions = losses.correct_margin(clean, labels), clean.argmax(1)
    table = verdicts.begin(
        names, labels.cpu().numpy(), shas, predictions.cpu().numpy(), margins.cpu().numpy()
    )
    adversarial = images.detach().cpu().clone()
    place = {name: i for i, name in enumerate(names)}
    eps = eps_text(ball.norm, ball.eps)

    def take(finding: Finding) -> None:
        i = place[finding.key]
        adversarial[i] = finding.adv
        line = verdicts.line(finding, images[i].detach().cpu(), shas[i], int(labels[i]), ball)
        verdicts.enter(table, i, line, finding.stage, eps)

    standing = [int(i) for i in table.index[verdicts.standing(table)]]
    sample = canonical.padded(images[: card.rows], card.rows)
    job = Job(
        stages=stages,
        threat=ball,
        rows=card.rows,
        n_classes=clean.shape[1],
        active_rows=None if live is None else min(live, card.rows),
        stop=card.stop,
        seed=seed,
    )
    backend.run_chain(
        Model(model, attacked_view.build(model, backend.precision, sample)),
        job,
        ImageBlock(images, labels, names, clean).take(standing),
        take,
    )
    after = verdicts.robust_after(table, [stage.name for stage in card.stage], eps)
    return Attacked(table, adversarial, after, backend.label, backend.precision.label, examined)


def _require_pixels(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise InputError("images", f"shape {tuple(images.shape)}", "(N, 3, H, W) with N of at least 1")
    low, high = float(images.min()), float(images.max())
    if images.dtype != torch.float32 or low < 0 or high > 1 or not math.isfinite(low + high):
        found = f"{str(images.dtype).removeprefix('torch.')} in [{low:.4g}, {high:.4g}]"
        do = "give unnormalised pixels and let the model normalise them"
        raise InputError("images", found, "float32 pixels in [0, 1]", do)
    if labels.shape != (len(images),) or labels.dtype != torch.int64 or int(labels.min()) < 0:
        found = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        raise InputError("labels", found, f"int64 class indices of shape ({len(images)},)")


def _require_place(model: Classify, images: Tensor, labels: Tensor) -> None:
    for name, given in (("images", images), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise InputError(name, f"a {type(given).__name__}", "a torch.Tensor")
    if labels.device != images.device:
        raise InputError("labels", f"on {labels.device}", f"on {images.device}, where the images are")
    state = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    if state and all(tensor.device != images.device for tensor in state):
        where = str(state[0].device)
        raise InputError(
            "images",
            f"on {images.device}",
            f"on {where}, where the model is",
            f"move them with images.to({where!r})",
        )


def _names(shas: Sequence[str], labels: Tensor) -> list[str]:
    """Names from content: the hash of image and label; a repeated pair gets its count."""
    met: dict[str, int] = {}
    names = []
    for sha, label in zip(shas, labels.tolist(), strict=True):
        name = f"{sha}/{label}"
        met[name] = met.get(name, 0) + 1
        names.append(name if met[name] == 1 else f"{name}/{met[name]}")
    return names
