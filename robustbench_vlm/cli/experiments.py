"""The verbs that train, attack and tabulate. Torch waits for its verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from robustbench_vlm import cards, console
from robustbench_vlm.cli.options import (
    AsJson,
    DataRoot,
    Device,
    Engine,
    Results,
    place,
    print_grids,
    require_tiny,
)
from robustbench_vlm.errors import CardError, InputError, nearest

CHECK_FLAG = 3


def train(
    recipe: Annotated[str, typer.Argument(help="A defense (mmt-ard), a recipe name, or a TOML file.")],
    recipe_option: Annotated[str | None, typer.Option("--recipe", help="Recipe name or TOML file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. optim.steps=100.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder; default runs/<recipe>-<hash>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on in a folder that was started before.")] = True,
    cache: Annotated[
        bool,
        typer.Option(help="Keep what frozen teachers say of clean images; changes the time and no bit."),
    ] = True,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
) -> None:
    """Train a defense into a checkpoint folder; the same command goes on after an interruption."""
    from robustbench_vlm import embeddings
    from robustbench_vlm import train as hall

    chosen = _recipe(recipe, recipe_option, settings or [])
    folder = out or Path("runs") / f"{chosen.name}-{chosen.fingerprint[:8]}"
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"--out {folder}", "not empty", "an empty folder with --no-resume", "choose another one"
        )
    if (folder / "card.json").exists() and (folder / "recipe.json").exists():
        console.remark(f"{folder} is finished already; held against the recipe, nothing is trained again")
    where = place(device)
    judged = _suite_of(chosen.data.dataset)
    require_tiny([chosen.data.dataset], data_root)
    threat = chosen.inner.threat if chosen.inner else "no adversary"
    console.remark(f"training {chosen.name}: {chosen.optim.steps} steps, {threat}, on {where}, into {folder}")
    total = chosen.optim.steps
    with console.meter() as meter:

        def report(line: Any) -> None:  # noqa: ANN401 - a JSON line of the log
            if "probe" in line:
                console.remark(f"step {line['step']}: probe {line['probe']}")
            else:
                meter(chosen.name, line["step"], total, f"loss {line['loss']:.4f}")

        kept = embeddings.folder() if cache else None
        hall.run(chosen, folder, data_root, where, report, kept, console.remark)
    console.result(str(folder))
    if not judged:
        console.remark(f"no suite has {chosen.data.dataset}: write one, or take one of other datasets")
    told = "" if data_root == Path("data") else f" --data-root {data_root}"
    line = f"vlmrob eval --model {folder} --attack autoattack --suite {judged or 'SUITE'}{told}"
    console.remark(f"next: {line}{cards.as_typed()}")


def evaluate(  # noqa: PLR0913 - one parameter a flag
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Name, folder, weights file or ARCH:TAG; repeatable; default: the newest under runs/."
        ),
    ] = None,
    arch: Annotated[str, typer.Option(help="What a weights file was made from, e.g. ViT-L-14:openai.")] = "",
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack chain; repeatable; default: autoattack.")
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
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images under attack at once; never changes a verdict.")
    ] = None,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Keep the adversarial images.")
    ] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out datasets that are not on disk.")
    ] = False,
    engine: Engine = "native",
    mode: Annotated[
        str,
        typer.Option(help="fast, or reference: the noise and schedule of the reference implementation."),
    ] = "fast",
    precision: Annotated[
        str, typer.Option(help="In which attacks see the model: fp32 or bf16. Verdicts are in fp32.")
    ] = "fp32",
    tf32: Annotated[bool, typer.Option("--tf32", help="Let fp32 products round to TF32 (CUDA).")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Attack through torch.compile.")] = False,
    graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Attack by replayed CUDA graphs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and stop.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when a result carries a flag.")] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Attack models over a suite; finished cells are kept, half-finished ones go on."""
    from robustbench_vlm import session
    from robustbench_vlm.attacks.finder import Sight

    order = session.Order(
        models=tuple(model or [_newest_checkpoint()]),
        attacks=tuple(attack or ([] if protocol else ["autoattack"])),
        suite=suite or ("" if protocol else "tiny"),
        datasets=tuple(dataset or []),
        eps=eps,
        norm=norm,
        n=n,
        results=out,
        data_root=data_root,
        live=batch_size,
        keep_images=save_adversarial,
        skip_missing=skip_missing,
        engine=engine,
        mode=mode,
        sight=Sight(cast("Any", precision), tf32=tf32, compiled=compiled, graphs=graphs),
        arch=arch,
        protocol=protocol,
    )
    plan = session.plan(order, place(device))
    if dry_run:  # writes nothing, so what would be rendered counts as there
        for line in session.price(plan):
            console.result(line)
        return
    require_tiny([card.name for card in plan.datasets], data_root)
    for line in plan.protocol.differs if plan.protocol else ():
        console.remark(f"note: protocol {protocol}: {line}")
    whole, plan = plan, session.require_data(plan)
    for card in whole.datasets:
        if card not in plan.datasets:
            console.remark(f"left out: {card.name} is not below {data_root}")
    for line in session.price(plan):
        console.remark(line)
    with console.meter() as meter:
        paths = session.perform(plan, meter, console.remark)
    rows = session.rows(plan, paths)
    if as_json:
        console.result_json(rows.to_dict("records"))
    else:
        print_grids(rows)
        line = f"vlmrob leaderboard --results {out} --suite {plan.order.suite}{cards.as_typed()}"
        console.remark(f"results in {out}; next: {line}")
    marked = rows[(rows.flag != "") & (rows.cell_sha256 != "")]
    flagged = sorted(set(marked.model_id + " on " + marked.dataset + ": " + marked.flag))
    for line in flagged:
        console.remark(f"flag: {line}")
    if strict and flagged:
        raise typer.Exit(CHECK_FLAG)


def leaderboard(
    results: Results = Path("results"),
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("leaderboards"),
    as_json: AsJson = False,
) -> None:
    """Render leaderboards/<suite>.csv and .md from the results."""
    from robustbench_vlm import leaderboard as hall

    rows, files = hall.render(results, cards.read("suites", suite, cards.Suite), out)
    if as_json:
        console.result_json(rows.to_dict("records"))
    else:
        print_grids(rows)
    for path in files:
        console.remark(f"written: {path}")


def compare(
    a: Annotated[str, typer.Argument(help="Model name, or the first digits of its fingerprint.")],
    b: Annotated[str, typer.Argument(help="The other one; none with --published.")] = "",
    results: Results = Path("results"),
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    published: Annotated[
        bool, typer.Option("--published", help="Beside what papers printed under the same protocol.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Paired test of two models on the same images: exact McNemar, per dataset and over all of them."""
    from robustbench_vlm import compare as hall
    from robustbench_vlm import leaderboard as board

    if published == bool(b):
        raise InputError("compare", "two models or --published", "one of them", "see vlmrob compare --help")
    cells = board.of_suite(board.read(results), cards.read("suites", suite, cards.Suite))
    if published:
        _beside(cells, a, as_json=as_json)
        return
    lines = [line.texts for line in hall.compare(cells, a, b)]
    if as_json:
        console.result_json([dict(zip(hall.COLUMNS, line, strict=True)) for line in lines])
    else:
        title = f"A = {a}, B = {b}; differences in points, p of the exact McNemar test"
        console.show(title, [*hall.COLUMNS], lines)


def _beside(cells: Any, model: str, *, as_json: bool) -> None:  # noqa: ANN401 - cells, not imported here
    """Print a model's rows beside those of papers; copied rows say so."""
    from robustbench_vlm import published as hall

    lines = hall.beside(cells, model)
    if as_json:
        console.result_json([dict(zip(hall.COLUMNS, line, strict=True)) for line in lines])
    else:
        console.show("measured rows, and copied ones with their source", [*hall.COLUMNS], lines)


def demo(
    full: Annotated[
        bool, typer.Option("--full", help="500 images a dataset, and the teachers and a TeCoA student too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of everything it makes; default runs/demo.")
    ] = None,
    data_root: DataRoot = Path("data"),
) -> None:
    """The whole job on the built-in tiny world: train two defenses, attack three models, read the table."""
    from robustbench_vlm import demo as hall
    from robustbench_vlm.compare import COLUMNS

    folder = out or Path("runs") / ("demo-full" if full else "demo")
    with console.meter() as meter:
        shown = hall.run(folder, data_root, place("cpu"), meter, console.remark, full=full)
    print_grids(shown.rows)
    title = f"A = {hall.OURS}, B = {hall.BASELINE}; differences in points, p of the exact McNemar test"
    console.show(title, [*COLUMNS], shown.paired)
    console.show("seconds", ["phase", "seconds"], [[name, f"{s:.0f}"] for name, s in shown.seconds.items()])
    for path in shown.files:
        console.result(str(path))


def _recipe(name: str, option: str | None, settings: list[str]) -> cards.Recipe:
    """The recipe meant: `--recipe`, a TOML file, a recipe name, or the tiny recipe of a defense."""
    known = cards.names("recipes")
    if option is None and (name.endswith(".toml") or name in known):
        chosen = name
    else:
        _require_defense(name)
        chosen = option or f"tiny-{name}"
        if option is None:
            console.remark(f"no recipe was named: taking {chosen}, for the built-in tiny world")
            paper = f"paper-{name}"
            if paper in known:
                console.remark(f"the paper's setting: vlmrob train {name} --recipe {paper}")
    path = cards.path("recipes", chosen)
    recipe = cards.parse(cards.override(cards.toml(path), settings), cards.Recipe, str(path))
    if option is not None and recipe.defense.get("name") != name:
        found = f"a recipe of {recipe.defense.get('name')!r}"
        raise CardError(f"--recipe {option}", found, f"one of {name!r}")
    return recipe


def _suite_of(dataset: str) -> str:
    """The suite to judge a model by that was trained on `dataset`; empty if none has it.

    One of --include before the project's own, then the one of fewest datasets.
    """
    found = []
    for name in cards.names("suites"):
        path = cards.path("suites", name)
        members = cards.toml(path).get("datasets")
        if isinstance(members, list) and dataset in members:
            found.append((path.parent == cards.home(), len(members), name))
    return min(found)[2] if found else ""


def _require_defense(name: str) -> None:
    """Refuse an unknown defense without importing torch."""
    folder = Path(__file__).parents[1] / "defenses"
    known = [
        path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem not in ("__init__", "losses")
    ]
    if name not in known and ":" not in name:
        from robustbench_vlm import registry

        if name not in registry.names("defenses"):
            hint = nearest(name, {*known, *cards.names("recipes")})
            raise CardError(f"defense or recipe {name!r}", "no such thing", do=hint)


def _newest_checkpoint() -> str:
    """The newest checkpoint folder below runs/; said aloud, never silently."""
    found = sorted(Path("runs").rglob("card.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        console.remark("no --model and no checkpoint under runs/: taking the packaged `tiny`")
        return "tiny"
    console.remark(f"no --model: taking the newest checkpoint, {found[-1].parent}")
    return str(found[-1].parent)
