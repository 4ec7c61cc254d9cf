"""The table of `training.py`: time, memory and share of the attainable ratio, for each way to take a step."""

from __future__ import annotations

from typing import Any

WAYS = ("ours", "ours, no cache", "released", "floor")
COLUMNS = (
    "batch", "precision", "way", "images/s", "over floor", "peak MiB", "released / it", "attainable",
    "reached",
)  # fmt: skip

Line = dict[str, Any]

NOTES = """\
- *ours*: `training.step.train_step`, everything that a run does in a step except reading the images. The
  outputs of the clean teacher on x are read from the cache, as from the second epoch on. *no cache*: the
  teacher is run, as in the first epoch or with `--no-cache`.
- *released*: the step as the released code does it: three teachers, one forward for each use, no cache. Its
  log and its probe (an APGD-50 every ten steps) are left out.
- *floor*: the passes that every way needs, and nothing else: one student forward and image gradient per
  attack step, the robust teacher on x', one forward and backward of the student over x and x'. No loss, no
  optimiser.
- *Attainable* is the ratio of released to floor in FLOP of the cost model (`vlmrob show recipe`). *Reached*
  is the measured ratio of released to ours, divided by it. Both sides work in one precision.
- *Peak* is the largest memory of the process beyond the loaded models (resident memory; on a GPU allocated
  memory), each way in a process of its own, or with `--one-process` all in one, where each way is charged for
  what the optimiser keeps. Seconds are medians over rounds in which every way takes a step.
"""


def render(lines: list[Line]) -> str:
    """The whole file from all lines of a run."""
    head, found = lines[0], lines[1:]
    settings = head["settings"]
    words = [
        f"--{name.replace('_', '-')} {_word(value)}".rstrip()
        for name, value in sorted(settings.items())
        if value
    ]
    student, teacher = (
        (settings["arch"], settings["teacher"]) if settings["arch"] else ("tiny", "the tiny teachers")
    )
    out = [
        "# A training step of MMT-ARD: ours, the released way, the floor",
        "",
        f"`python benchmarks/training.py {' '.join(words)}`",
        "",
        f"{student} from {teacher}, {settings['steps']} attack steps.",
        f"Commit {head['commit']}; torch {head['torch']}, Python {head['python']}; {head['cpu']},"
        f" {settings['threads']} thread{'s' * (settings['threads'] > 1)}; device {head['device']}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    clock = "wall" if head["device"] != "cpu" else "cpu"
    for line in found:
        spent = {way: line["seconds"][way][clock] for way in WAYS}
        for way in WAYS:
            ratio = spent["released"] / spent[way]
            attainable = line["flops"]["released"] / line["flops"][way]
            row = [line["batch"], line["precision"], way, f"{line['batch'] / spent[way]:.0f}"]
            row += [f"{spent[way] / spent['floor']:.3f}", f"{line['mib'][way]:.0f}", f"{ratio:.2f}"]
            row += (
                [f"{attainable:.2f}", f"{100 * ratio / attainable:.0f} %"]
                if way.startswith("ours")
                else ["", ""]
            )
            out.append(f"| {' | '.join(map(str, row))} |")
    out += ["", *_factors(found, clock), *_shares(settings, found, clock), NOTES]
    if clock == "cpu":
        out.append("Times are CPU seconds of one process: other work on the machine does not enter them.\n")
    return "\n".join(out)


def _word(value: Any) -> str:  # noqa: ANN401 - a setting
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)


def _factors(found: list[Line], clock: str) -> list[str]:
    """The gain by lower precision, stated separately: ours in bf16 over the released way in fp32."""
    out = []
    full = {line["batch"]: line for line in found if line["precision"] == "fp32"}
    for line in found:
        if line["precision"] == "bf16" and line["batch"] in full:
            ratio = full[line["batch"]]["seconds"]["released"][clock] / line["seconds"]["ours"][clock]
            out += [f"Batch {line['batch']}: ours in bf16 over the released way in fp32, {ratio:.2f}x.", ""]
    return out


def _shares(settings: Line, found: list[Line], clock: str) -> list[str]:
    """The share of the peak of the matrix units that each precision uses, where `--peak` gives that peak."""
    peak = dict(zip(settings["precision"], settings["peak"], strict=False))
    out = []
    for line in found:
        if line["precision"] in peak:
            rate = line["flops"]["ours"] * line["batch"] / line["seconds"]["ours"][clock] / 1e12
            share = 100 * rate / peak[line["precision"]]
            out += [
                f"Batch {line['batch']}, {line['precision']}:"
                f" ours runs at {rate:.1f} TFLOP/s, {share:.0f} % of peak.",
                "",
            ]
    return out
