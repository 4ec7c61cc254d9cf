"""The options with which an evaluation was typed, to be printed in another command."""

from __future__ import annotations

from robustbench_vlm.evaluation.planning import Plan


def of(plan: Plan) -> list[str]:
    """The options of a plan apart from models, attacks, numbers of images and what needs all of them."""
    request, backend, words = plan.request, plan.settings.backend, list[str]()
    options = {
        "--arch": (request.arch, ""),
        "--suite": (request.suite, ""),
        "--dataset": (",".join(request.datasets), ""),
        "--norm": (request.norm, ""),
        "--eps": (request.eps, ""),
        "--data-root": (request.data_root, ""),
        "--out": (request.results, "results"),
        "--device": (plan.settings.device, "auto"),
        "--engine": (backend.name, "native"),
        "--mode": (backend.mode, "fast"),
        "--precision": (backend.precision.format, "fp32"),
        "--batch-size": (request.batch_size or "", ""),
        "--workers": (request.workers, ""),
    }
    for option, (value, default) in options.items():
        words += [option, str(value)] if str(value) != default else []
    flags = {
        "--tf32": backend.precision.tf32,
        "--compile": backend.precision.compiled,
        "--cuda-graphs": backend.precision.graphs,
        "--skip-missing": request.skip_missing,
    }
    return words + [flag for flag, given in flags.items() if given]
