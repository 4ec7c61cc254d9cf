"""`vlmrob demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cli.options import DataRoot, device_of, print_grids


def demo(
    full: Annotated[
        bool, typer.Option("--full", help="500 images a dataset, and the teachers and a TeCoA student too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of everything it makes; default runs/demo.")
    ] = None,
    data_root: DataRoot = Path("data"),
) -> None:
    """Do the whole job on the built-in tiny world: train two defenses, attack three models, print tables."""
    from robustbench_vlm.demo import whole_job
    from robustbench_vlm.devices import one_thread
    from robustbench_vlm.results import compare

    folder = out or Path("runs") / ("demo-full" if full else "demo")
    # Its towers are so small that a second thread costs processor time and gains none.
    with one_thread(), console.meter() as meter:
        shown = whole_job.run(folder, data_root, device_of("cpu"), meter, console.remark, full=full)
    print_grids(shown.rows)
    title = (
        f"A = {whole_job.OURS}, B = {whole_job.BASELINE}; differences in points, p of the exact McNemar test"
    )
    console.show(title, [*compare.COLUMNS], [line.texts for line in shown.paired])
    console.show("seconds", ["phase", "seconds"], [[name, f"{s:.0f}"] for name, s in shown.seconds.items()])
    for path in shown.files:
        console.result(str(path))
    for line in compare.conclusion(shown.paired, whole_job.OURS, whole_job.BASELINE):
        console.result(line)
