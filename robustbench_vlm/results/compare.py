"""Two models on the same images: an exact paired test on each dataset, and two on all of a suite together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.results import result_file, stats, verdicts
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.results.result_file import Result
from robustbench_vlm.results.stats import Paired, Stratified

COLUMNS = ("attack", "dataset", "n", "clean A-B", "clean p", "robust A-B", "robust p")

POOLED = "all images"
MEAN = "mean"
"""Lines of a comparison over all datasets."""

WEIGHTS = "all images: each image weighs alike; mean: each dataset does"

ByContest = dict[tuple[Contest, str], Result]
"""The results of one model by contest and dataset."""


@dataclass(frozen=True)
class Comparison:
    """One line of a comparison.

    Attributes:
        attack: title of the contest, which no other contest of the comparison has.
        dataset: its name; `POOLED`, the images of every dataset that both models have together, each of
            which counts alike; or `MEAN`, the mean over these datasets, each of which counts alike.
        clean: paired test of clean correctness.
        robust: paired test of the final verdicts.
    """

    attack: str
    dataset: str
    clean: Paired | Stratified
    robust: Paired | Stratified

    @property
    def record(self) -> dict[str, str | int | float]:
        """The line with numbers as numbers: differences in points, unrounded p."""
        return {
            "attack": self.attack,
            "dataset": self.dataset,
            "n": self.robust.n,
            "clean_difference": round(100 * self.clean.difference, 4),
            "clean_p": self.clean.p,
            "robust_difference": round(100 * self.robust.difference, 4),
            "robust_p": self.robust.p,
        }

    def sentence(self, a: str, b: str) -> str:
        """Which of the two models is better at what, as far as the test can tell."""
        parts = [_verdict(name, test) for name, test in (("clean", self.clean), ("robust", self.robust))]
        return f"{self.attack}, {self.dataset}, {self.robust.n} images: {a} against {b}: {'; '.join(parts)}"

    @property
    def texts(self) -> list[str]:
        """The line in the order of `COLUMNS`; differences in points."""
        tests = (self.clean, self.robust)
        numbers = [text for test in tests for text in (f"{100 * test.difference:+.2f}", f"{test.p:.3g}")]
        return [self.attack, self.dataset, str(self.robust.n), *numbers]


def _verdict(what: str, test: Paired | Stratified) -> str:
    points = f"{100 * test.difference:+.2f} points {what}, p = {test.p:.3g}"
    if test.p >= stats.LEVEL:
        return f"{points}: no difference can be claimed"
    return f"{points}: {'better' if test.difference > 0 else 'worse'}"


def conclusion(lines: Sequence[Comparison], a: str, b: str) -> list[str]:
    """One sentence for every contest: about the mean over its datasets, else about its only dataset."""
    last = {line.attack: line for line in lines}  # the line of the mean, where there is one, ends its contest
    return [line.sentence(a, b) for line in last.values()]


def compare(results: Sequence[Result], a: str, b: str) -> list[Comparison]:
    """Paired tests of model `a` against `b` wherever both were evaluated in the same contest.

    Over several datasets there are two more lines. `POOLED` is the exact test of all discordant images of all
    datasets together, so a dataset weighs as much as it has images. `MEAN` tests the difference of the
    unweighted means (`stats.stratified_p`), which is what leaderboards rank by.

    Args:
        results: of a suite.
        a: name of a model, or the first digits of its fingerprint.
        b: the other model.

    Raises:
        InputError: a model without results, or two without a contest in common. Results that were stopped by
            a rule have none: a test at a time that the results chose does not hold its level.
    """
    of_a, of_b = _of(results, a), _of(results, b)
    shared = [entry for entry in of_a if entry in of_b and not entry[0].stop_rule]
    if not shared and any(entry in of_b for entry in of_a):
        found = "only results that were stopped by a rule in common"
        do = f"evaluate both on a fixed number of images, or type vlmrob race {a} {b} --decide"
        raise InputError(f"compare {a} {b}", found, do=do)
    if not shared:
        raise InputError(f"compare {a} {b}", "no dataset and attack in common", do="evaluate both alike")
    lines: list[Comparison] = []
    titles = _titles(list(dict.fromkeys(contest for contest, _ in shared)))
    for contest, title in titles.items():
        datasets = [dataset for at, dataset in shared if at == contest]
        pairs = [_joined(of_a[contest, dataset], of_b[contest, dataset]) for dataset in datasets]
        tests = [_test(pair) for pair in pairs]
        lines += [Comparison(title, name, *both) for name, both in zip(datasets, tests, strict=True)]
        if len(pairs) > 1:
            lines.append(Comparison(title, POOLED, *_test(pd.concat(pairs))))
            clean, robust = (stats.stratified(part) for part in zip(*tests, strict=True))
            lines.append(Comparison(title, MEAN, clean, robust))
    return lines


def _titles(contests: Sequence[Contest]) -> dict[Contest, str]:
    """A title for each contest; what else tells them apart where several have one title."""
    titles = [contest.title for contest in contests]
    return {
        contest: contest.title
        if titles.count(contest.title) == 1
        else f"{contest.title} {contest.engine} {contest.precision} chain={contest.attack_sha256[:8]} "
        f"seed={contest.seed} split={contest.split}"
        for contest in contests
    }


def _of(results: Sequence[Result], name: str) -> ByContest:
    own = result_file.of_model(results, name)
    shas = {result.model[1] for result in own}
    if not own:
        hint = nearest(name, {result.model[0] for result in results})
        raise InputError(f"model {name!r}", "no results of it", do=f"{hint}; or run vlmrob eval first")
    if len(shas) > 1:
        folders = {result.model[1][:8]: str(result.path.parents[1]) for result in own}
        prints = ", ".join(f"{sha} ({folder})" for sha, folder in sorted(folders.items()))
        do = "type the digits in place of the name, or the folder of the checkpoint"
        raise InputError(f"model {name!r}", f"{len(shas)} models of that name", f"one of: {prints}", do)
    return {(result.contest, result.dataset): result for result in own}


def _joined(a: Result, b: Result) -> pd.DataFrame:
    """The verdicts of two results side by side, image by image."""
    columns = ["key", "image_sha256", "clean_correct", "robust"]
    left, right = (result.verdicts().assign(robust=verdicts.standing)[columns] for result in (a, b))
    merged = left.merge(right, on=["key", "image_sha256"], suffixes=("_a", "_b"), validate="one_to_one")
    if len(merged) != len(left) or len(merged) != len(right):
        raise InputError(str(b.path), "other images", f"those of {a.path}", "evaluate both on the same data")
    return merged


def _test(merged: pd.DataFrame) -> tuple[Paired, Paired]:
    """The tests of clean correctness and of the final verdicts."""
    clean = stats.mcnemar(merged.clean_correct_a.tolist(), merged.clean_correct_b.tolist())
    robust = stats.mcnemar(merged.robust_a.tolist(), merged.robust_b.tolist())
    return clean, robust
