"""When the flags of rows are read: at once where iterations are long, else one iteration behind."""

import pytest
import torch
from attack_models import blobs, classifier

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fgsm import Fgsm
from robustbench_vlm.engine import row_table, scheduler
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.threat import Threat, parse_eps

LARGE = Threat("linf", parse_eps("16/255"))  # breaks every image soon


@pytest.mark.parametrize(
    ("device", "launched", "waited", "behind"),
    [
        ("cpu", 1.0, 0.0, False),
        ("cuda", 0.002, 0.001, True),  # the device had nearly finished when the iteration was launched
        ("cuda", 0.002, 0.017, True),
        ("cuda", 0.002, 0.019, False),  # an iteration of 21 ms: waiting costs less than a tenth of it
    ],
)
def test_short_iterations_are_read_one_behind(device, launched, waited, behind):
    assert row_table.reads_behind(torch.device(device), launched, waited) == behind


def gradient_calls(n, attack, monkeypatch, *, behind):
    """Calls of 64 rows, and how often each image was broken."""
    monkeypatch.setattr(row_table, "reads_behind", lambda *_: behind)
    images, labels = blobs(n, 10, seed=4)
    found = []
    job = Job([("s", attack)], LARGE, 16, 10, 64)
    block = ImageBlock(images, labels, [str(i) for i in range(n)])
    cost = scheduler.run(Model(classifier(10)), job, [block], found.append)
    return cost.gradients, sorted((finding.key, finding.iteration) for finding in found)


@pytest.mark.parametrize(
    ("n", "attack", "extra"),
    [(64, Apgd("ce", 100, 0.75, 1, 0), 1), (256, Apgd("ce", 100, 0.75, 1, 0), 5), (256, Fgsm("ce"), 4)],
)
def test_a_row_that_has_ended_is_stepped_once_more_at_most(n, attack, extra, monkeypatch):
    at_once, found = gradient_calls(n, attack, monkeypatch, behind=False)
    later, same = gradient_calls(n, attack, monkeypatch, behind=True)
    assert same == found
    assert at_once < later <= at_once + extra
