"""Read a ledger: the findings of one stage, with every line checked before it is believed.

Beside a ledger stands what the attacks that wrote it brought to light about the model, if a check failed. A
later run that takes the findings takes the failures too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.engine.check_record import Check
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import Threat


@dataclass(frozen=True)
class Ledger:
    """The findings of one stage of a chain.

    Attributes:
        path: the file, which need not exist.
        threat: the ball of the attack.
        n_classes: of the dataset.
    """

    path: Path
    threat: Threat
    n_classes: int

    def lines(self) -> Iterator[tuple[store.Line, str]]:
        """Every complete line, and why it is not believed; empty for the lines that are."""
        farthest = verdicts.farthest(self.threat)
        for line in store.lines(self.path):
            yield line, line.damage or verdicts.line_fault(line.record, farthest, self.n_classes)

    def records(self, fault: Callable[[str], None] = lambda _: None) -> Iterator[dict[str, Any]]:
        """What the lines say that are believed; `fault` gets a sentence about each other one."""
        for line, why in self.lines():
            if why:
                fault(f"{self.path}, line {line.number}: {why}")
            else:
                yield line.record

    def remove_faulty(self) -> None:
        """Remove every line that is not believed."""
        store.write(self.path, b"".join(line.text for line, fault in self.lines() if not fault))

    @property
    def failures(self) -> list[Check]:
        """The checks that failed when findings of this ledger were made.

        Raises:
            InputError: a line of their file is damaged.
        """
        return [Check(**record) for record in store.records(self._failures)]

    def add_failures(self, failed: Iterable[Check]) -> None:
        """Keep failed checks, of each name the first."""
        for check in failed:
            if check.name not in {known.name for known in self.failures}:
                store.mend(self._failures)
                store.append(self._failures, asdict(check))

    @property
    def _failures(self) -> Path:
        return self.path.with_suffix(".checks.jsonl")

    def image(self, record: dict[str, Any]) -> Tensor | None:
        """The saved adversarial image of a finding, (3, H, W); None if it is missing or is another one."""
        try:
            saved: Tensor | None = load_file(image_path(self.path, record)).get("adv")
        except (OSError, SafetensorError):
            return None
        return saved if saved is not None and verdicts.image_sha256(saved) == record["adv_sha256"] else None


def image_path(ledger: Path, record: dict[str, Any]) -> Path:
    """The file of the adversarial image that a line of a ledger is about."""
    identity = store.fingerprint([record["key"], record["image"], record["label"]])
    return ledger.with_suffix("") / f"{identity[:24]}.safetensors"
