"""How much of an attack a race saves, and how often it errs: writes race.md (`python benchmarks/race.py`).

Verdicts are simulated: of every image it is drawn whether only A, only B, both or neither of two models get
it right. A race looks at its pairs after each further block of images of every dataset, with the functions
of `vlmrob race --decide`. `--results FOLDER` adds races between models that were evaluated there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robustbench_vlm import rng, store
from robustbench_vlm.cards import reader
from robustbench_vlm.results import e_process, ranks, result_file, stats, verdicts

DATASETS, IMAGES = 15, 1000
GAPS = (0.0, 0.3, 1.0, 2.5, 5.0, 10.0)  # points
APART = 0.12  # share of images that tell two models apart
BLOCKS = (1, 8, 64)
PAGE = Path(__file__).parent / "race.md"


def steps(block: int, images: int = IMAGES) -> list[int]:
    """Numbers of images of a dataset after which the race is looked at."""
    return [*range(block, images, block), images]


def pairs(gap: float, block: int, repetitions: int, *, opposed: float = 0.0) -> tuple[float, float]:
    """Share of decided races between two models, and the mean share of the images that they took.

    Args:
        gap: difference of the means, in points.
        block: images of every dataset between two looks.
        repetitions: races.
        opposed: further difference that half of the datasets have and the other half have the other way
            round, in points; one dataset has none.
    """
    dice = np.random.default_rng([int(10 * gap), block, int(opposed)])
    tilt = np.append(np.resize([opposed, -opposed], DATASETS - 1), 0.0)
    only_a = np.clip((APART + (gap + tilt) / 100) / 2, 0, 1)
    only_b = np.clip((APART - (gap + tilt) / 100) / 2, 0, 1)
    looks = np.array(steps(block))
    sizes = np.diff(looks, prepend=0)
    shape = (repetitions, len(looks), DATASETS)
    won = dice.binomial(sizes[:, None], only_a, size=shape)
    lost = dice.binomial(sizes[:, None] - won, only_b / (1 - only_a)).sum(axis=2).cumsum(axis=1)
    e = e_process.log_e(won.sum(axis=2).cumsum(axis=1), lost)
    over = e >= -np.log(stats.LEVEL)
    decided = over.any(axis=1)
    ended = np.where(decided, looks[over.argmax(axis=1)], IMAGES)
    return float(decided.mean()), float(ended.mean() / IMAGES)


def raced(bits: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A race over verdicts that are known already.

    Args:
        bits: (M, n, K) bool in the frozen order: whether model i is right on image j of dataset k.
        block: images of every dataset between two looks.

    Returns:
        (M, M) adjusted p-values; (M, M) images that row i alone of a pair got right; and (M,) images of every
        dataset that each model took.
    """
    models, images, _ = bits.shape
    used, looks = np.zeros(models, dtype=int), []
    only = np.zeros((models, models), dtype=np.int64)
    going = np.arange(models)
    for n in steps(block, images):
        only = only.copy()
        only[np.ix_(going, going)] = ranks.only_right(bits[going, :n].reshape(len(going), -1))
        looks.append(only)
        used[going] = n
        p = e_process.adjusted(looks)
        going = np.flatnonzero(((p >= stats.LEVEL) & ~np.eye(models, dtype=bool)).any(axis=1))
        if not len(going):
            break
    return p, only, used


def field(gaps: Sequence[float], repetitions: int, block: int = 64) -> tuple[float, float, float]:
    """Races of several models whose means lie the given points apart, the first two being equal if that is 0.

    Returns:
        Share of races with a wrong decision; share of the images that they took; and share of the decisions
        of the whole evaluation (`ranks.adjusted`) that the races came to as well.
    """
    dice = np.random.default_rng(len(gaps))
    levels = 0.35 + np.cumsum([0.0, *gaps]) / 100
    wrong, taken, agreed, whole_decisions = 0, [], 0, 0
    for _ in range(repetitions):
        own = dice.random((len(levels), IMAGES, DATASETS), dtype=np.float32)
        common = dice.random((IMAGES, DATASETS), dtype=np.float32)
        drawn = np.where(dice.random(own.shape, dtype=np.float32) < 0.86, common, own)
        bits = drawn < levels[:, None, None]
        p, only, used = raced(bits, block)
        decided = p < stats.LEVEL
        truth = np.sign(levels[:, None] - levels)
        wrong += bool((decided & (np.sign(only - only.T) != truth)).any())
        taken.append(used.mean() / IMAGES)
        whole = ranks.adjusted([bits[..., k] for k in range(DATASETS)]) < stats.LEVEL
        agreed += int((whole & decided).sum())
        whole_decisions += int(whole.sum())
    return wrong / repetitions, float(np.mean(taken)), agreed / max(whole_decisions, 1)


def evaluated(results: Path) -> list[str]:
    """A line for each race between the models of a folder: all of them, block by block."""
    suite = reader.suite("tiny")
    found = [r for r in result_file.of_suite(result_file.read(results), suite) if not r.contest.stop_rule]
    contest = found[0].contest
    models = sorted({r.model for r in found})
    columns = []
    for name in suite.datasets:
        tables = [r.verdicts() for m in models for r in found if (r.model, r.dataset) == (m, name)]
        order = np.argsort([rng.rank(suite.seed, key) for key in tables[0].key], kind="stable")
        columns.append(np.stack([verdicts.standing(t).to_numpy(bool)[order] for t in tables]))
    n = min(column.shape[1] for column in columns)
    bits = np.stack([column[:, :n] for column in columns], axis=-1)
    whole = ranks.adjusted(columns) < stats.LEVEL
    upper = np.triu_indices(len(models), 1)
    lines = [
        f"{', '.join(name for name, _ in models)} under {contest.title} on {len(columns)} datasets, whose",
        "images are taken in random order here (the suite's own order goes class by class). The whole",
        f"evaluation decides {int(whole[upper].sum())} of {len(upper[0])} pairs.",
        "",
        "| block | pairs decided | the same as the whole | images a dataset | share |",
        "| ---: | ---: | ---: | --- | ---: |",
    ]
    for block in BLOCKS:
        p, _, used = raced(bits, block)
        decided = p < stats.LEVEL
        lines.append(
            f"| {block} | {int(decided[upper].sum())} | {int((decided & whole)[upper].sum())} | "
            f"{', '.join(map(str, used))} of {n} | {100 * used.mean() / n:.1f} % |"
        )
    return lines


def page(repetitions: int, results: Path | None) -> str:
    """The page, with tables made now."""
    lines = [
        "# What a race saves",
        "",
        f"`python benchmarks/race.py`: {DATASETS} datasets of {IMAGES} images, simulated, level 5 %.",
        "A look comes after each further block of images of every dataset. `vlmrob race` takes the rows of",
        "the chain, 16 in all packaged chains, which lie between the columns for 8 and 64.",
        "",
        "## Two models",
        "",
        f"{100 * APART:g} % of the images tell them apart; {repetitions} races a row. Without a gap every",
        "decision is an error. Share: of the images that the whole evaluation takes. Opposed datasets differ",
        "by 10 points, half of them in favour of each model.",
        "",
        "| gap, points | " + " | ".join(f"decided, block {b} | share" for b in BLOCKS) + " |",
        "| --- |" + " ---: | ---: |" * len(BLOCKS),
    ]
    rows = [(f"{gap:g}", gap, 0.0) for gap in GAPS] + [("0, datasets opposed", 0.0, 10.0)]
    for name, gap, opposed in rows:
        cells = [pairs(gap, block, repetitions, opposed=opposed) for block in BLOCKS]
        lines.append(
            f"| {name} | " + " | ".join(f"{100 * d:.1f} % | {100 * s:.1f} %" for d, s in cells) + " |"
        )
    lines += [
        "",
        "## Several models",
        "",
        "Block 64. Wrong: races in which any pair was decided wrongly. Agreed: decisions of the whole",
        f"evaluation that the race came to as well. {max(repetitions // 20, 2)} races a row.",
        "",
        "| means apart, points | wrong | share of the images | agreed |",
        "| --- | ---: | ---: | ---: |",
    ]
    for gaps in ((2.5,) * 4, (5.0,) * 4, (0.0, 5.0, 0.0, 5.0), (1.0,) * 4):
        wrong, share, agreed = field(gaps, max(repetitions // 20, 2))
        named = ", ".join(f"{gap:g}" for gap in gaps)
        lines.append(f"| {named} | {100 * wrong:.1f} % | {100 * share:.1f} % | {100 * agreed:.1f} % |")
    if results is not None:
        lines += ["", "## Models of the tiny world", "", *evaluated(results)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--results", type=Path, help="folder with evaluations of the suite tiny")
    parser.add_argument("--out", type=Path, default=PAGE)
    typed = parser.parse_args()
    store.write(typed.out, page(typed.repetitions, typed.results).encode())
