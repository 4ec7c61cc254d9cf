"""Checks of an attack by its verdicts: had it a gradient, did it rise, and was it the strongest?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from robustbench_vlm.engine.check_record import Check, check
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.results import verdicts

ZERO_GRADIENT = 0.01
"""Share of attacked images with exactly zero gradients above which the attack was blind."""
NO_PROGRESS = 0.01
"""Share of survivors whose objective never rose above which the attack did not work."""
BLACK_BOX = 0.002
"""Share of images that only a black-box stage broke above which gradients are unreliable."""
MOSTLY = 0.5
"""Share of zero gradients of an image above which it counts, where a loss takes part that cannot saturate."""


def attack_checks(table: pd.DataFrame, chain: Chain, n_classes: int, eps: str) -> list[Check]:
    """Checks of an attack by its verdicts.

    Args:
        table: verdicts after the last stage.
        chain: that was run.
        n_classes: of the model.
        eps: the radius as the table spells it.
    """
    black_box = chain.black_box(n_classes)
    zero = _zero_gradient_share(table, black_box, only_ce=chain.needs(n_classes)["only_ce"])
    still = verdicts.no_progress_share(table)
    blind = verdicts.broken_in(table, black_box, eps) / max(len(table), 1)
    found = (
        ("zero-gradient", zero, ZERO_GRADIENT, "the gradient was exactly zero on {} of the attacked images"),
        ("no-progress", still, NO_PROGRESS, "the objective never rose on {} of the surviving images"),
        (
            "square-beats-white-box",
            blind,
            BLACK_BOX,
            "{} of the images were broken only without gradients: masked gradient?",
        ),
    )
    return [
        check(name, "fail" if share > bound else "pass", share, bound, sentence.format(f"{share:.1%}"))
        for name, share, bound, sentence in found
    ]


def _zero_gradient_share(table: pd.DataFrame, black_box: Sequence[str], *, only_ce: bool) -> float:
    """Share of attacked images whose gradients were zero.

    Cross-entropy alone is blind wherever it saturates, so a single zero counts. Beside it other losses go on:
    there most gradients of the image have to be zero, and none may have broken it.
    """
    if only_ce:
        return verdicts.zero_gradient_share(table)
    survived = (table.broken_by == "") | table.broken_by.isin(list(black_box))
    counted = table.assign(zero_gradients=table.zero_gradients.where(survived, 0))
    return verdicts.zero_gradient_share(counted, MOSTLY)
