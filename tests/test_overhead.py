"""Kernels and bytes as `benchmarks/overhead.py` counts them, by hand; and what attacks move."""

import importlib
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("traffic")


def counted(traffic, call):
    with traffic.Traffic() as seen:
        call()
    return sum(seen.kernels.values()), sum(seen.moved.values())


def test_bytes_by_hand(traffic):
    images = torch.empty(4, 3, 8, 8, device="meta")
    row, batch = torch.empty(4, 1, 1, 1, device="meta"), 4 * 3 * 8 * 8 * 4
    out, mask = torch.empty_like(images), torch.empty(4, 1, 1, 1, dtype=torch.bool, device="meta")
    for call, moved in (
        (lambda: images.view(4, -1).T[None].detach(), None),  # views, and memory that nobody fills
        (lambda: torch.empty_like(images), None),
        (lambda: images + row, 2 * batch + 16),
        (lambda: images + row.expand_as(images), 2 * batch + 16),  # what is expanded is in memory once
        (lambda: images.mul_(2), 2 * batch),
        (lambda: torch.add(images, images, out=out), 3 * batch),  # `out` is not read
        (lambda: out.copy_(images), 2 * batch),
        (lambda: torch.where(mask, images, out), 3 * batch + 4),
        (lambda: images > 0, batch + batch // 4),
        (lambda: images.index_select(0, torch.empty(1, dtype=torch.int64, device="meta")), batch // 2 + 8),
    ):
        kernels, found = counted(traffic, call)
        assert (kernels, found) == ((0, 0) if moved is None else (1, moved))


def test_a_free_model_counts_for_nothing(traffic):
    images = torch.empty(4, 3, 8, 8, device="meta").requires_grad_()
    weights = torch.empty(4, 10, device="meta")
    assert counted(traffic, lambda: torch.autograd.grad(traffic.free(images), images, weights)) == (0, 0)


@pytest.mark.parametrize(
    ("norm", "name", "most"),
    [("linf", "apgd-t", 43), ("linf", "fab-t", 132), ("linf", "square", 17), ("l1", "apgd-t", 275)],
)
def test_an_iteration_moves_no_more_than_the_page_says(traffic, norm, name, most):
    del traffic  # the path to the benchmarks
    overhead, engines = importlib.import_module("overhead"), importlib.import_module("engines")
    ((_, attack),) = engines.stages([name], engines.Size(), norm)
    assert overhead.counted(attack, overhead.BALLS[norm], 224)["passes"] <= most + 0.1
