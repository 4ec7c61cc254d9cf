"""`vlmrob plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console
from robustbench_vlm.cli.eval import default_suite, newest_checkpoint
from robustbench_vlm.cli.options import (
    AsJson,
    BatchSize,
    DataRoot,
    Device,
    batch_size_of,
    comma_separated,
    device_of,
    require_tiny,
)

GIB = 2**30


def plan(  # noqa: PLR0913 - one parameter a flag
    model: Annotated[
        list[str] | None, typer.Option(help="As for eval: names, folders, ARCH:TAG; a,b.")
    ] = None,
    arch: Annotated[
        str, typer.Option(help="What a weights file was made from, e.g. ViT-L-14:openai or local-dir:DIR.")
    ] = "",
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack chains, e.g. aa2,pgd20; default: autoattack.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="Suite name or TOML file; default: the protocol's, or tiny.")
    ] = "",
    protocol: Annotated[
        str, typer.Option(help="Evaluate as a paper does: attack, radii, images, prompts, canvas.")
    ] = "",
    dataset: Annotated[
        list[str] | None, typer.Option(help="Only these datasets of the suite; repeatable.")
    ] = None,
    eps: Annotated[str, typer.Option(help="Radii, e.g. 4 or 1,2,4; default: the suite's.")] = "",
    norm: Annotated[str, typer.Option(help="linf, l2 or l1; default: the suite's.")] = "",
    n: Annotated[
        int | None, typer.Option(min=0, help="Images a dataset, 0 for all; default: the suite's.")
    ] = None,
    batch_size: BatchSize = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Say also how long so many workers on this machine take.")
    ] = 0,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="Say also how long a GPU takes that is not here, e.g. H100; a,b; repeatable."),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            help="With --gpu: share of the peak rate that model calls reach; default: an assumed one.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; those that are there cost nothing.")
    ] = Path("results"),
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what an evaluation takes and how precise it will be, before it begins.

    The models are timed, and a few images of each dataset are attacked by the first stage of the chain, for
    half a minute at most. No result is kept.
    """
    from robustbench_vlm.evaluation import forecast, gpus, planning

    named, reached = comma_separated(gpu), utilisation or gpus.UTILISATION
    for name in named:
        gpus.named(name)
    datasets = comma_separated(dataset)
    request = planning.EvalRequest(
        models=comma_separated(model) or (newest_checkpoint(),),
        attacks=comma_separated(attack) or (() if protocol else ("autoattack",)),
        suite=suite or ("" if protocol else default_suite(datasets)),
        datasets=datasets,
        eps=eps,
        norm=norm,
        n=n,
        results=out,
        data_root=data_root,
        batch_size=batch_size_of(batch_size),
        arch=arch,
        protocol=protocol,
    )
    planned = planning.plan(request, device_of(device))
    require_tiny([card.name for card in planned.datasets], data_root)
    with console.meter() as meter:
        found = forecast.forecast(planned, meter, workers=workers, gpu_names=named, utilisation=reached)
    if as_json:
        console.result_json(record(found, workers))
        return
    title = (
        f"{', '.join(planned.request.attacks)} on {len(planned.datasets)} datasets of {planned.suite.name}"
    )
    console.show(title, ["what", "least", "expected", "most"], lines(found, workers, str(device_of(device))))
    for line in remarks(found, reached if named else 0.0):
        console.remark(line)


def lines(found: Any, workers: int, device: str) -> list[list[str]]:  # noqa: ANN401 - a Forecast
    """The rows of the table."""
    from robustbench_vlm.evaluation.estimate import duration

    def seconds(what: str, price: Any) -> list[str]:  # noqa: ANN401 - a Price
        return [what, *map(duration, (price.least, price.typical, price.worst))]

    def points(what: str, widths: Any) -> list[str]:  # noqa: ANN401 - Widths
        return [what, *(f"± {width:.1f}" for width in (widths.least, widths.expected, widths.most))]

    rows = [["images", "", str(found.images), ""]]
    rows += [["results", "", f"{found.cells}, {found.measured} of them measured already", ""]]
    rows += [seconds(f"time, this process on {device}", found.here)]
    if found.by_workers is not None:
        rows += [seconds(f"time, {workers} worker{'s' * (workers > 1)} here", found.by_workers)]
    rows += [seconds(f"time, {name} {precision}", price) for (name, precision), price in found.on_gpu.items()]
    rows += [[f"memory, this process on {device}, GiB", "", f"{found.memory / GIB:.1f}", ""]]
    if workers:
        rows += [
            [
                f"memory, {workers} worker{'s' * (workers > 1)} and the driver, GiB",
                "",
                f"{(workers + 1) * found.memory / GIB:.1f}",
                "",
            ]
        ]
    if found.on_gpu:
        rows += [["memory, GPU, GiB", "", f"{found.gpu_memory / GIB:.1f}", ""]]
    rows += [points(f"95 % interval of {name}, points", widths) for name, widths in found.widths.items()]
    if found.mean is not None and len(found.widths) > 1:
        rows += [points("95 % interval of the mean, points", found.mean)]
    return rows


def remarks(found: Any, utilisation: float) -> list[str]:  # noqa: ANN401 - a Forecast
    """What the numbers rest on."""
    pilot = found.found
    said = ["time: least if every image is broken at once, most if none is broken; start-up is left out"]
    if pilot.images:
        robust = [share for shares in pilot.shares.values() for share in shares]
        said += [
            f"expected: {pilot.images} images of {len({name for _, name in pilot.shares})} datasets were "
            f"attacked by the first stage alone for {pilot.seconds:.0f} s; "
            f"{100 * sum(robust) / len(robust):.0f} % survived, and it took {pilot.factor:.2f} of its price"
        ]
    else:
        said += [
            "expected: if half of the images survive; nothing was attacked, since no dataset is on disk or "
            "8 images of one take more than half a minute"
        ]
    said += ["interval: half of its width; least if no image is robust, most if half of them are"]
    if utilisation:
        said += [
            f"GPU: counted operations at {100 * utilisation:.0f} % of the peak rate of the data sheet, an "
            "assumption (--utilisation), and the time beside model calls as on this machine"
        ]
    return said


def record(found: Any, workers: int) -> dict[str, Any]:  # noqa: ANN401 - a Forecast
    """The forecast with seconds, bytes and points as numbers."""
    from dataclasses import asdict

    gpus = [
        {"gpu": name, "precision": precision, "seconds": asdict(price)}
        for (name, precision), price in found.on_gpu.items()
    ]
    pilot = found.found
    return {
        "images": found.images,
        "results": found.cells,
        "measured": found.measured,
        "seconds": asdict(found.here),
        "workers": workers,
        "seconds_by_workers": None if found.by_workers is None else asdict(found.by_workers),
        "gpus": gpus,
        "bytes": found.memory,
        "gpu_bytes": found.gpu_memory if gpus else None,
        "half_width_points": {name: asdict(widths) for name, widths in found.widths.items()},
        "half_width_points_of_the_mean": None if found.mean is None else asdict(found.mean),
        "pilot": {
            "images": pilot.images,
            "seconds": pilot.seconds,
            "over_price": pilot.factor,
            "robust": [
                {"model_sha256": model, "dataset": name, "shares": list(shares)}
                for (model, name), shares in pilot.shares.items()
            ],
        },
    }
