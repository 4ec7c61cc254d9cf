"""Run the stages of a chain for one cell: attack what the ledgers lack, and record every finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
from safetensors.torch import save
from torch import Tensor

from robustbench_vlm import store, text_files
from robustbench_vlm.engine import canonical
from robustbench_vlm.engine.check_record import Check
from robustbench_vlm.engine.job import Cost, ImageBlock, Stages
from robustbench_vlm.evaluation.attack_checks import attack_checks
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.evaluation.ledgers import Ledger, image_path
from robustbench_vlm.evaluation.model_work import Block, Line, ModelWork
from robustbench_vlm.results import verdicts
from robustbench_vlm.results.open_table import OpenTable, opened
from robustbench_vlm.threat import eps_text

Report = Callable[[str, int, int], None]
"""Called with (what, done, total) as images finish."""

Remark = Callable[[str], None]
"""Called with a line of log."""


@dataclass(frozen=True)
class CellRun:
    """A cell that is being measured.

    Attributes:
        cell: which.
        work: does what needs the model.
        clean: logits of the canonical pass on the clean images.
        table: verdicts of the images, which the stages fill in.
        remark: called with a line about each line of a ledger that is not believed.
        attacked: stages that were run now, on one image at least.
    """

    cell: Cell
    work: ModelWork
    clean: canonical.Record
    table: pd.DataFrame
    remark: Remark = lambda _: None
    attacked: set[int] = field(default_factory=set)

    @property
    def eps(self) -> str:
        """The radius as the verdict table spells it."""
        return eps_text(self.cell.settings.norm, self.cell.threat.eps)

    @cached_property
    def positions(self) -> dict[str, int]:
        """The position of each image, by its key."""
        return {key: i for i, key in enumerate(self.cell.subject.split.keys)}

    def attack(self, number: int, stages: Stages, report: Report) -> Cost:
        """Run stages that share rows on the images that are still right, and record what they find.

        Args:
            number: position of the first of these stages in the chain.
            stages: name and attack of each.
            report: called as images finish.

        Returns:
            Model calls that were made now, without those of an earlier run whose findings are in the ledgers.
        """
        subject, settings, rows = self.cell.subject, self.cell.settings, self.cell.chain.rows
        ledgers = {name: self.ledger(number + i) for i, (name, _) in enumerate(stages)}
        for ledger in ledgers.values():
            text_files.require_own(ledger.path)
        standing = [int(i) for i in self.table.index[verdicts.standing(self.table)]]
        with opened(self.table, self.eps) as entries:
            begin, faulty = self.resume(ledgers, standing, entries)
        names = [subject.loaded.card.name, subject.card.name, " + ".join(ledgers), str(self.cell.threat)]
        title, done = " · ".join(names), len(standing) - len(begin)
        report(title, done, len(standing))
        if not begin:
            return Cost()
        for ledger in ledgers.values():
            store.mend(ledger.path)
        for ledger in faulty:
            ledger.remove_faulty()

        order = list(ledgers)
        self.attacked.update(range(number + min(begin.values()), number + len(order)))

        def note(stage: str, line: Line, image: Tensor | None) -> None:
            nonlocal done
            i = self.positions[line["key"]]
            if begin.get(i) != order.index(stage):  # it is known already
                return
            self.record(line, image, ledgers[stage].path)
            entries.enter(i, line, stage)
            ended = line["broken"] or bool(line["error"]) or stage == order[-1]
            if ended:
                del begin[i]
            else:
                begin[i] += 1
            done += ended
            report(title, done, len(standing))

        members = settings.backend.batches(standing, begin, rows)
        with opened(self.table, self.eps) as entries:
            return self.work.attack(stages, members, lambda part: self.block(part, begin), note)

    def keep_failures(self) -> Cost:
        """Make the checks of what was attacked now, and keep those that fail; returns the model calls."""
        if not self.attacked:
            return Cost()
        seen, cost = self.work.checks(self.clean.rows(range(len(self.table))[: self.cell.chain.rows]))
        # Failures alone: a run that was resumed saw less, and what is recorded must not depend on that.
        failed = [check for check in seen if check.level == "fail"]
        for number in sorted(self.attacked):
            self.ledger(number).add_failures(failed)
        return cost

    def attack_checks(self) -> list[Check]:
        """Checks after the last stage: what attacks brought to light, and what the verdicts say."""
        chain, n_classes = self.cell.chain, self.cell.subject.card.n_classes
        kept = [check for number in range(len(chain.stages)) for check in self.ledger(number).failures]
        return [*kept, *attack_checks(self.table, chain, n_classes, self.eps)]

    def ledger(self, number: int) -> Ledger:
        """The findings of stage `number`."""
        return Ledger(self.cell.ledger(number), self.cell.threat, self.cell.subject.card.n_classes)

    def record(self, line: Line, image: Tensor | None, ledger: Path) -> None:
        """Write a finding to its ledger.

        Args:
            line: of the ledger.
            image: (3, H, W) the adversarial image, if it is kept.
            ledger: of the stage.
        """
        if image is not None:  # before the line, which says that the image is there
            store.write(image_path(ledger, line), save({"adv": image.contiguous()}))
        store.append(ledger, line)

    def block(self, members: Sequence[int], begin: Mapping[int, int]) -> Block:
        """Images that are read together.

        Args:
            members: positions of the images.
            begin: by position, the stage in which an image begins. Images that are not in it have their
                findings; where noise is drawn in batches, they are attacked again beside the others.
        """
        subject = self.cell.subject
        keys = [subject.split.keys[i] for i in members]
        images = ImageBlock(
            subject.images.floats(members),
            subject.labels[members],
            keys,
            self.clean.rows(members),
            [begin.get(i, 0) for i in members],
        )
        again = frozenset(key for i, key in zip(members, keys, strict=True) if i not in begin)
        return Block(images, [subject.image_shas[i] for i in members], again)

    def resume(
        self, ledgers: Mapping[str, Ledger], standing: Sequence[int], entries: OpenTable
    ) -> tuple[dict[int, int], list[Ledger]]:
        """Enter the findings that ledgers have about some images.

        Args:
            ledgers: by name of the stage, in order.
            standing: positions of the images.
            entries: of the table.

        Returns:
            By position, the stage in which each image that is not finished begins; and the ledgers with lines
            that are not believed.
        """
        begin, faulty = dict.fromkeys(standing, 0), []
        for stage, (name, ledger) in enumerate(ledgers.items()):
            faults: list[str] = []
            for i, line in self.recorded(ledger, faults.append):
                if begin.get(i) != stage:
                    continue
                entries.enter(i, line, name)
                begin[i] = stage + 1
                if line["broken"] or line["error"] or stage + 1 == len(ledgers):
                    del begin[i]
            for fault in faults:
                self.remark(f"note: {fault}: left out, and its image is attacked again")
            faulty += [ledger] if faults else []
        return begin, faulty

    def recorded(
        self, ledger: Ledger, fault: Callable[[str], None] = lambda _: None
    ) -> Iterator[tuple[int, Line]]:
        """Position and line of the images of this cell in a ledger.

        A line counts if it is about the same file with the same label and, where images are to be saved, if
        its adversarial image was. `fault` gets a sentence about each line that is not believed.
        """
        subject, settings = self.cell.subject, self.cell.settings
        positions, shas, labels = self.positions, subject.image_shas, subject.split.labels.tolist()
        for line in ledger.records(fault):
            i = positions.get(line["key"])
            if i is None or line["image"] != shas[i] or line["label"] != labels[i]:
                continue
            if not settings.keeps_image(broken=line["broken"]) or ledger.image(line) is not None:
                yield i, line

    def broken_images(self) -> dict[str, Tensor]:
        """Key -> (3, H, W) adversarial image of every image that was broken at this cell's own radius."""
        found: dict[str, Tensor] = {}
        own = self.table[self.table.broken_at_eps == self.eps]
        for number, stage in enumerate(self.cell.chain.stage_names):
            ledger = self.ledger(number)
            wanted = set(own.index[own.broken_by == stage])
            for i, line in self.recorded(ledger):
                image = ledger.image(line) if i in wanted else None
                if image is not None:
                    found[line["key"]] = image
        return found
