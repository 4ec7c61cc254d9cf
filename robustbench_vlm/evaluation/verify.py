"""Verify bundles of evidence: what a result claims is computed again, by forward passes.

Every fingerprint is made by the code that an evaluation makes it with, from the cards, the dataset and the
model at hand; nothing is taken from a bundle but what it claims.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.data.tiny import write
from robustbench_vlm.engine.isolation import isolated, restored_buffers
from robustbench_vlm.errors import DataError, InputError, some
from robustbench_vlm.evaluation import measure, planning, protocols, provenance, verify_images
from robustbench_vlm.evaluation.attack_checks import attack_checks
from robustbench_vlm.evaluation.cells import Cell, Subject
from robustbench_vlm.evaluation.outcome import tally
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.evaluation.verify_images import Claim
from robustbench_vlm.models import zoo
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results import evidence, result_file, verdicts
from robustbench_vlm.results.evidence import Bundle
from robustbench_vlm.results.result_file import Result
from robustbench_vlm.threat import eps_text

NOT_COMPARED = ("bank_sha256", "engine", "precision")
"""Facts of a configuration that depend on the machine, or on who attacked; a forward pass cannot tell."""

CLAIM_OF = {
    **dict.fromkeys(("model", "model_sha256"), "model"),
    **dict.fromkeys(("attack", "attack_version", "attack_sha256"), "chain"),
    **dict.fromkeys(("subset_sha256", "n_requested", "seed", "split", "subset"), "subset"),
    "images_sha256": "images",
}
"""To which claim an entry of the configuration belongs; the others are `configuration`."""

COUNTED_AGAIN = ("n_classes", "square_only", "exposure", "substitutions")
"""Entries of an outcome that are made again from verdicts, model and dataset, beside counts and flags."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CellReport:
    """What was found out about one result.

    Attributes:
        path: the bundle, or the JSON file of a result without one.
        claims: everything that was checked.
        result: what the bundle says; None if it cannot be read.
        table: its verdicts.
        kinds: by kind of packing, the number of images and their bytes.
        near: images whose logits are so close that machines may differ about them; they are accepted.
        reattacked: survivors that were attacked again.
        cell: the same result as it is made here; None if there is none.
    """

    path: Path
    claims: tuple[Claim, ...]
    result: Result | None = None
    table: pd.DataFrame | None = None
    kinds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    near: int = 0
    reattacked: int = 0
    cell: Cell | None = None

    @property
    def faults(self) -> list[Claim]:
        """The claims that do not hold."""
        return [claim for claim in self.claims if claim.fault]

    @property
    def proved(self) -> bool:
        """Whether there is evidence at all."""
        return bool(self.claims)

    @property
    def status(self) -> str:
        """`failed`, `unproven` without evidence, `verified`, or `re-attacked` if survivors were, too."""
        if self.faults:
            return "failed"
        return "unproven" if not self.proved else "re-attacked" if self.reattacked else "verified"

    @property
    def survivors(self) -> list[str]:
        """Keys of the images that are said to have survived every attack."""
        return [] if self.table is None else list(self.table.key[verdicts.standing(self.table)])


@dataclass(frozen=True)
class AtHand:
    """What was read or computed once, and serves several results.

    Attributes:
        models: by the name that was loaded.
        plans: by what an evaluation is asked for.
        subjects: models on datasets, by what decides them.
        flags: names of the failed checks of a model on a dataset before a chain.
    """

    models: dict[str, Loaded] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    subjects: dict[str, Subject] = field(default_factory=dict)
    flags: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verifier:
    """What results are checked with.

    Attributes:
        data_root: folder of the datasets.
        scratch: an empty folder, into which bundles are unpacked.
        device: of the forward passes.
        models: names or folders of the models; those of the results where none fits.
        report: called as images are rendered.
        at_hand: what is known already.
    """

    data_root: Path
    scratch: Path
    device: torch.device
    models: tuple[str, ...] = ()
    report: Report = lambda *_: None
    at_hand: AtHand = field(default_factory=AtHand)

    def verify(self, path: Path) -> CellReport:
        """Check one bundle.

        Raises:
            InputError: model, dataset, suite or chain is not at hand, so nothing can be said.
        """
        try:
            bundle = evidence.read(path)
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            result = evidence.unpack(bundle, folder, "result")
            table = result.verdicts()
        except DataError as error:
            return CellReport(path, (Claim("bundle", str(error)),))
        claims = [Claim("bundle"), Claim("result beside", _beside(path, bundle, result))]
        plan = self._plan(result, bundle)
        if isinstance(plan, Claim):
            return CellReport(path, (*claims, plan), result, table, bundle.kinds())
        with isolated():
            cell = self._cell(result, plan)
            claims += [*_configuration(cell, result, bundle, plan), *verify_images.same_images(cell, table)]
            with restored_buffers(cell.subject.loaded.model):
                forward = verify_images.forward(cell, table, bundle.images)
                claims += [*forward.claims, Claim("flags", self._flags(cell, result, table))]
        return CellReport(path, tuple(claims), result, table, bundle.kinds(), forward.near, cell=cell)

    def _plan(self, result: Result, bundle: Bundle) -> Plan | Claim:
        """The evaluation that a result claims to come from, or why there is no such evaluation."""
        config, contest = result.config, result.contest
        suite = str(bundle.suite.get("name", ""))
        protocol = contest.protocol.partition("/")[0]
        needed = {"datasets": result.dataset, "attacks": contest.attack, "protocols": protocol}
        for kind, name in needed.items():
            if name:
                reader.path(kind, name)
        reader.suite(suite)
        request = planning.EvalRequest(
            models=(),
            attacks=(contest.attack,),
            suite=suite,
            results=Path(),
            data_root=self.data_root,
            datasets=(result.dataset,),
            eps="" if protocol else ",".join(contest.radii),  # a protocol has its whole ladder
            norm=contest.norm,
            n=int(config["n_requested"]),
            protocol=protocol,
        )
        asked = repr(request)
        if asked not in self.at_hand.plans:
            try:
                plan = planning.plan(request, self.device)
            except InputError as error:
                return Claim("configuration", str(error))
            write.make_missing(self.data_root, self.report, [card.name for card in plan.datasets])
            self.at_hand.plans[asked] = planning.require_data(plan)
        plan, ladder = self.at_hand.plans[asked], contest.ladder
        if protocol and plan.settings.ladder[: len(ladder)] != ladder:
            return Claim("configuration", f"radii {' '.join(contest.radii)} are not those of {protocol}")
        stopped = {"stop_rule": contest.stop_rule} if contest.stop_rule else {}
        tags = {**plan.settings.tags, **stopped}
        return replace(plan, settings=replace(plan.settings, ladder=ladder, tags=tags))

    def _cell(self, result: Result, plan: Plan) -> Cell:
        loaded = protocols.with_protocol_resize(self._model(result), plan.protocol)
        settings, key = plan.settings, [result.dataset, _settings_key(plan), loaded.id, loaded.card.sha256]
        known, subjects = store.fingerprint(key), self.at_hand.subjects
        if known not in subjects:
            (split,) = planning.open_data(plan)
            subjects[known] = Subject.of(loaded, split.card, split)
        return Cell(subjects[known], settings.chains[0], settings, result.contest.ladder)

    def _model(self, result: Result) -> Loaded:
        """The model of that fingerprint among those at hand, else the one of that name, to be compared."""
        name, sha256 = result.model
        for typed in self.models:
            if self._load(typed).card.sha256 == sha256:
                return self._load(typed)
        named = [typed for typed in self.models if self._load(typed).card.name == name]
        return self._load((*named, name)[0])

    def _load(self, name: str) -> Loaded:
        if name not in self.at_hand.models:
            self.at_hand.models[name] = zoo.load(name, self.device)
        return self.at_hand.models[name]

    def _flags(self, cell: Cell, result: Result, table: pd.DataFrame) -> str:
        """Flags that are raised here and not in the result, or other facts of its outcome; empty if none.

        Flags that only an attack can raise may stand in a result beside those that are found here.
        """
        if {*table.key} != {*cell.subject.split.keys}:
            return ""  # of other images: `published subset` says so
        eps = eps_text(cell.settings.norm, cell.threat.eps)
        seen = attack_checks(table, cell.chain, cell.subject.card.n_classes, eps)
        failed = [check.name for check in seen if check.level == "fail"]
        made, stated = tally(cell, table, [*failed, *self._failed(cell)]), result.content.outcome
        lacking = sorted({*made["flags"]} - {*stated["flags"]})
        if lacking:
            return f"{some(lacking)} is raised here and not in the result"
        for key in COUNTED_AGAIN:
            if key in stated and stated[key] != made[key]:
                return f"{key} is {_short(stated[key])}, here {_short(made[key])}"
        return ""

    def _failed(self, cell: Cell) -> list[str]:
        """Names of the checks of the model that fail; they do not depend on the radius."""
        facts = [cell.subject.facts, cell.subject.split.sha256, *cell.subject.image_shas]
        known = store.fingerprint([*facts, cell.chain.record, cell.settings.seed])
        if known not in self.at_hand.flags:
            examined = measure.examine(cell.subject, cell.chain, cell.settings)
            self.at_hand.flags[known] = examined.failed
        return self.at_hand.flags[known]


def _settings_key(plan: Plan) -> list[Any]:
    """What decides which images of a dataset are drawn, and how they are shown to a model."""
    protocol = None if plan.protocol is None else plan.protocol.model_dump(mode="json")
    return [plan.suite.model_dump(mode="json"), plan.settings.n, protocol]


def _beside(path: Path, bundle: Bundle, result: Result) -> str:
    """What the result beside a bundle says otherwise; empty if nothing, or if there is none."""
    beside = evidence.result_of(path)
    if not beside.is_file():
        return ""
    try:
        other = result_file.read_one(beside)
        if beside.with_suffix(".parquet").read_bytes() != bundle.verdicts:
            other.verdicts()  # raises an error unless they are the same in another form
        stated = store.read_json(beside).get("evidence")
    except (InputError, OSError) as error:
        return str(error)
    if other.content.sha256 != result.content.sha256:
        return f"{beside.name} is another result than the one in the bundle"
    if isinstance(stated, dict) and stated.get("root") != bundle.root:
        return f"{beside.name} names another root of evidence"
    return ""


def _configuration(cell: Cell, result: Result, bundle: Bundle, plan: Plan) -> list[Claim]:
    """Compare every entry of the configuration with what an evaluation here would write."""
    stated, made = result.config, cell.config
    faults: dict[str, list[str]] = {}
    for key in sorted({*stated, *made} - {*NOT_COMPARED}):
        if stated.get(key) != made.get(key):
            found = f"{key} is {_short(stated.get(key))}, here {_short(made.get(key))}"
            faults.setdefault(CLAIM_OF.get(key, "configuration"), []).append(found)
    if bundle.suite != plan.suite.model_dump(mode="json"):
        faults.setdefault("suite", []).append(f"another suite than {plan.suite.name} here")
    stages = cell.chain.stage_records
    if result.content.stages != stages or bundle.chain != cell.chain.record:
        faults.setdefault("chain", []).append(f"other numbers than chain {cell.chain.name} has here")
    facts = provenance.of_model(cell.subject.loaded)
    for key, value in facts.items():
        if _plain(result.content.model.get(key)) != _plain(value):
            said = f"{key} is {_short(result.content.model.get(key))}, here {_short(value)}"
            faults.setdefault("model", []).append(said)
    names = ("model", "suite", "chain", "subset", "images", "configuration")
    return [Claim(name, some(faults.get(name, []))) for name in names]


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    return list(value) if isinstance(value, tuple) else value


def _short(value: object) -> str:
    return f"{value!s:.40}" if value is not None else "missing"
