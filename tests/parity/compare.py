"""One comparison each: an attack of ours and the reference's on the same images, told image by image."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import shared
import theirs
import torch
from subjects import Subject
from torch import Tensor

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_eot import ApgdEot
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import losses
from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Finding

VERSIONS = {"autoattack": "standard", "autoattack-l1": "standard", "plus": "plus", "rand": "rand"}
FAB = {"alpha_max": 0.1, "eta": 1.05, "beta": 0.9}


@dataclass(frozen=True)
class Outcome:
    """Verdicts of both sides.

    Attributes:
        n: images, all of them right when clean.
        ours, theirs: how many each side broke.
        flips: images on which the sides disagree: key, who broke it, and the margin of correctness of the
            image that each side ended with (at most 0 where it is broken).
        equal: adversarial images that are equal bit for bit, of those that both sides broke; None where the
            images are not meant to be equal.
        both: images that both sides broke.
        apart: largest difference of a pixel between them.
        broken: which images ours broke.
    """

    n: int
    ours: int
    theirs: int
    flips: list[dict[str, Any]] = field(default_factory=list)
    equal: int | None = None
    both: int = 0
    apart: float = 0.0
    broken: list[bool] = field(default_factory=list)

    @property
    def mixed(self) -> bool:
        """Whether some images broke and some did not, on both sides."""
        return 0 < self.ours < self.n and 0 < self.theirs < self.n

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def outcome(who: Subject, found: list[Finding], adv: Tensor, *, images: bool) -> Outcome:
    """Ours against what the reference returned; `images` says whether images are compared too."""
    ours, wrong = [f.broken for f in found], who.wrong(adv)
    margins = losses.correct_margin(who.logits(adv), who.labels).tolist()
    flips = [
        {"key": f.key, "broken by": "ours" if f.broken else "theirs", "ours": f.margin, "theirs": margin}
        for f, theirs_wrong, margin in zip(found, wrong, margins, strict=True)
        if f.broken != theirs_wrong
    ]
    pairs = [(f.adv, adv[i]) for i, f in enumerate(found) if f.broken and wrong[i]]
    apart = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
    equal = sum(torch.equal(a, b) for a, b in pairs) if images else None
    return Outcome(len(found), sum(ours), sum(wrong), flips, equal, len(pairs), apart, ours)


def apgd(who: Subject, threat: Threat, loss: str, steps: int, targets: int = 0, **more) -> Outcome:
    """APGD run to its end from the same start: verdicts and last misclassified iterates."""
    name = "targeted-dlr" if targets else loss
    found = who.attack(Apgd(name, steps, 0.75, more.get("n_restarts", 1), targets), threat, stop="last")
    model = theirs.Watched(who.model, who.rows)
    run = theirs.fed(theirs.apgd(model, threat, loss, steps, targets, **more), who)
    return outcome(who, found, theirs.run(run, who), images=True)


def apgd_l1(who: Subject, threat: Threat, loss: str, steps: tuple[int, ...], targets: int = 0) -> Outcome:
    """l1-APGD from the same noise: one run, or the schedule of three radii if there are three steps."""
    radii = (3.0, 2.0, 1.0) if len(steps) == 3 else (1.0,)
    name = "targeted-dlr" if targets else loss
    found = who.attack(ApgdL1(name, steps, radii, 1, targets), threat, stop="last")
    model = theirs.Watched(who.model, who.rows)
    more = {"use_largereps": len(steps) == 3}
    run = theirs.fed(theirs.apgd(model, threat, loss, sum(steps), targets, **more), who)
    return outcome(who, found, theirs.run(run, who), images=True)


def eot(who: Subject, threat: Threat, steps: int, draws: int) -> Outcome:
    """APGD with the mean of several gradients, run to its end from the same start."""
    found = who.attack(ApgdEot("dlr", steps, 0.75, 1, 0, eot=draws), threat, stop="last")
    run = theirs.apgd(theirs.Watched(who.model, who.rows), threat, "dlr", steps, eot_iter=draws)
    return outcome(who, found, theirs.run(theirs.fed(run, who), who), images=True)


def fab_t(who: Subject, threat: Threat, steps: int, targets: int, stop: str = "first") -> Outcome:
    """FAB without restarts, untargeted without targets; under `stop=last` both return the nearest point."""
    found = who.attack(Fab(steps=steps, targets=targets, restarts=1, **FAB), threat, stop=stop)
    run = theirs.fab(theirs.Watched(who.model, who.rows), threat, steps, targets)
    return outcome(who, found, theirs.run(run, who), images=False)


def square(who: Subject, threat: Threat, queries: int, seeds: tuple[int, int] = (0, 0)) -> Outcome:
    """Square with seeds of each side's own."""
    found = who.attack(Square(queries=queries, p=0.8, restarts=1), threat, seed=seeds[0])
    run = theirs.squares(theirs.Watched(who.model, who.rows), threat, queries, seed=seeds[1])
    return outcome(who, found, theirs.run(run, who), images=False)


def square_fed(who: Subject, threat: Threat, queries: int) -> tuple[Outcome, list[str], list[str]]:
    """Square with the same proposals; also the images with another number of queries, and with another end.

    Ours passes over proposals that change nothing without a query for Linf, and only there. For L2 the sides
    add up in another order, so a proposal may be better by a rounding error to one of them alone.
    """
    search = shared.search(who, threat, queries)
    found = who.attack(shared.ours(who, queries), threat)
    assert search.ends is not None
    told = outcome(who, found, search.ends, images=True)
    spent = search.queries - (search.idle if threat.norm == "linf" else 0)
    counted = [f.key for f, queried in zip(found, spent.tolist(), strict=True) if f.forwards != queried]
    close = 0 if threat.norm == "linf" else 1e-3
    apart = ((f.adv - end).abs().max() > close for f, end in zip(found, search.ends, strict=True))
    return told, counted, [f.key for f, other in zip(found, apart, strict=True) if other]


def chain(
    who: Subject, threat: Threat, card: str, steps: int, queries: int, seeds: tuple[int, int] = (0, 0)
) -> Outcome:
    """A whole chain with seeds of each side's own."""
    found = ours_chain(who, threat, card, steps, queries, seeds[0])
    adv, _ = their_chain(who, threat, card, steps, queries, seeds[1])
    return outcome(who, found, adv, images=False)


def fed_chain(who: Subject, threat: Threat, steps: int, queries: int) -> tuple[list[str], list[str]]:
    """What broke each image in AutoAttack's chain with the same noise: ours, and theirs ("" if nothing).

    Square meets one image at a time, which is how the reference can be fed with each image's own proposals.
    """
    found = ours_chain(who, threat, "autoattack", steps, queries, seed=0)
    by = [""] * len(who.images)
    for name, attack in stages("autoattack", steps, queries):
        left = [i for i, breaker in enumerate(by) if not breaker]
        groups = [[i] for i in left] if name == "square" or not left else [left]
        for group in groups:
            some = who.only(group)
            for i, wrong in zip(group, some.wrong(_their_stage(some, threat, name, attack)), strict=True):
                by[i] = name if wrong else ""
    return [f.stage if f.broken else "" for f in found], by


def _their_stage(who: Subject, threat: Threat, name: str, attack: Any) -> Tensor:
    """What the reference's attack returns, fed with the noise of ours."""
    model = theirs.Watched(who.model, who.rows)
    if name == "square":
        ends = shared.search(who, threat, attack.queries, stage=name).ends
        assert ends is not None
        return ends
    if name == "fab-t":
        return theirs.run(theirs.fab(model, threat, attack.steps, attack.targets), who)
    run = theirs.apgd(model, threat, "ce", attack.steps, attack.targets)
    return theirs.run(theirs.fed(run, who, stage=name), who)


def ours_chain(who: Subject, threat: Threat, card: str, steps: int, queries: int, seed: int) -> list[Finding]:
    """What each image ended with: every stage is given the survivors of the one before."""
    found: list[Finding] = []
    left = list(range(len(who.images)))
    for name, attack in stages(card, steps, queries):
        met = who.attack(attack, threat, stage=name, seed=seed, order=left)
        for i, finding in zip(left, met, strict=True):
            found[i : i + 1] = [finding]
        left = [i for i in left if not found[i].broken]
    return found


def stages(card: str, steps: int, queries: int) -> list[tuple[str, Attack]]:
    """The attacks of a chain, with fewer steps and queries."""
    chosen = []
    for stage in reader.read("attacks", card, AttackCard).stage:
        short = {"queries": queries} if "queries" in stage.fields else {"steps": steps}
        if stage.attack == "apgd-l1":  # the reference's split of its steps
            part = math.ceil(0.3 * steps)
            short = {"steps": (part, part, steps - 2 * part)}
        chosen.append((stage.name, plugins.build("attacks", stage.attack, {**stage.fields, **short}, card)))
    return chosen


def their_chain(
    who: Subject, threat: Threat, card: str, steps: int, queries: int, seed: int
) -> tuple[Tensor, list[str]]:
    """What the reference's chain of the same name returns, and the attack that broke each image, "" if none.

    Its attacks are run one at a time on what is left, which is what it does itself.
    """
    whole = theirs.chain(theirs.Watched(who.model, who.rows), threat, VERSIONS[card], seed, steps, queries)
    adv, by = who.images.clone(), [""] * len(who.images)
    for name in list(whole.attacks_to_run):
        left = [i for i, breaker in enumerate(by) if not breaker]
        if not left:
            break
        whole.attacks_to_run = [name]
        images, labels = who.images[left].clone(), who.labels[left].clone()
        adv[left] = whole.run_standard_evaluation(images, labels, batch_size=len(left))[0].detach()
        for i, wrong in zip(left, who.only(left).wrong(adv[left]), strict=True):
            by[i] = name if wrong else ""
    return adv, by
