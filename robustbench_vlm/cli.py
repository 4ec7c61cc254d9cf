"""The door: what people type, and the one place that prints errors and exits. Torch waits for its verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from robustbench_vlm import __version__, cards, console
from robustbench_vlm.errors import CardError, Incomplete, InputError, VlmrobError, nearest

app = typer.Typer(
    name="vlmrob",
    help="How robust is a CLIP-like model, compared with every other one, and can that number be trusted?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Datasets on disk.", no_args_is_help=True)
app.add_typer(data_app, name="data")

CHECK_FLAG = 3
INTERRUPTED = 130  # how typer leaves after Ctrl-C

DataRoot = Annotated[Path, typer.Option("--data-root", help="Folder of the datasets.", envvar="VLMROB_DATA")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU when there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Include = Annotated[list[Path] | None, typer.Option(help="Folder of further TOML cards; repeatable.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of the results.")]


def _version(wanted: bool) -> None:
    if wanted:
        console.result(__version__)
        raise typer.Exit


@app.callback()
def _root(
    include: Include = None,
    version: Annotated[  # noqa: ARG001 - it acts when it is read
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train defenses, attack models, read the leaderboard."""
    if include:
        cards.include(include)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A defense (mmt-ard), a recipe name, or a TOML file.")],
    recipe_option: Annotated[str | None, typer.Option("--recipe", help="Recipe name or TOML file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. optim.steps=100.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder; default runs/<recipe>-<hash>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on in a folder that was started before.")] = True,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
) -> None:
    """Train a defense into a checkpoint folder; the same command goes on after an interruption."""
    from robustbench_vlm import train as hall

    chosen = _recipe(recipe, recipe_option, settings or [])
    folder = out or Path("runs") / f"{chosen.name}-{chosen.fingerprint[:8]}"
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"--out {folder}", "not empty", "an empty folder with --no-resume", "choose another one"
        )
    if (folder / "card.json").exists() and (folder / "recipe.json").exists():
        console.remark(f"{folder} is finished already; held against the recipe, nothing is trained again")
    place = _device(device)
    _tiny_data([chosen.data.dataset], data_root)
    threat = chosen.inner.threat if chosen.inner else "no adversary"
    console.remark(f"training {chosen.name}: {chosen.optim.steps} steps, {threat}, on {place}, into {folder}")
    total = chosen.optim.steps
    with console.meter() as meter:

        def report(line: Any) -> None:  # noqa: ANN401 - a JSON line of the log
            if "probe" in line:
                console.remark(f"step {line['step']}: probe {line['probe']}")
            else:
                meter(chosen.name, line["step"], total, f"loss {line['loss']:.4f}")

        hall.run(chosen, folder, data_root, place, report)
    console.result(str(folder))
    console.remark(f"next: vlmrob eval --model {folder} --attack autoattack --suite tiny")


@app.command("eval")
def evaluate(  # noqa: PLR0913 - one parameter a flag
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Name, checkpoint folder or ARCH:TAG; repeatable; default: the newest under runs/."
        ),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack chain; repeatable; default: autoattack.")
    ] = None,
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    dataset: Annotated[
        list[str] | None, typer.Option(help="Only these datasets of the suite; repeatable.")
    ] = None,
    eps: Annotated[str, typer.Option(help="Radii, e.g. 4 or 1,2,4; default: the suite's.")] = "",
    norm: Annotated[str, typer.Option(help="linf or l2; default: the suite's.")] = "",
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and stop.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when a result carries a flag.")] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Attack models over a suite; finished cells are kept, half-finished ones go on."""
    from robustbench_vlm import session

    order = session.Order(
        models=tuple(model or [_newest_checkpoint()]),
        attacks=tuple(attack or ["autoattack"]),
        suite=suite,
        datasets=tuple(dataset or []),
        eps=eps,
        norm=norm,
        n=n,
        results=out,
        data_root=data_root,
        live=batch_size,
        keep_images=save_adversarial,
        skip_missing=skip_missing,
    )
    plan = session.plan(order, _device(device))
    if dry_run:  # writes nothing, so what would be rendered counts as there
        for line in session.price(plan):
            console.result(line)
        return
    _tiny_data([card.name for card in plan.datasets], data_root)
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
        _print_grids(rows)
        console.remark(
            f"results in {out}; next: vlmrob leaderboard --results {out} --suite {plan.suite.name}"
        )
    marked = rows[(rows.flag != "") & (rows.cell_sha256 != "")]
    flagged = sorted(set(marked.model_id + " on " + marked.dataset + ": " + marked.flag))
    for line in flagged:
        console.remark(f"flag: {line}")
    if strict and flagged:
        raise typer.Exit(CHECK_FLAG)


@app.command()
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
        _print_grids(rows)
    for path in files:
        console.remark(f"written: {path}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Model name, or the first digits of its fingerprint.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    results: Results = Path("results"),
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    as_json: AsJson = False,
) -> None:
    """Paired test of two models on the same images: exact McNemar, per dataset and over all of them."""
    from robustbench_vlm import compare as hall
    from robustbench_vlm import leaderboard as board

    cells = board.of_suite(board.read(results), cards.read("suites", suite, cards.Suite))
    lines = [line.texts for line in hall.compare(cells, a, b)]
    if as_json:
        console.result_json([dict(zip(hall.COLUMNS, line, strict=True)) for line in lines])
    else:
        title = f"A = {a}, B = {b}; differences in points, p of the exact McNemar test"
        console.show(title, [*hall.COLUMNS], lines)


@app.command()
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
        shown = hall.run(folder, data_root, _device("cpu"), meter, console.remark, full=full)
    _print_grids(shown.rows)
    title = f"A = {hall.OURS}, B = {hall.BASELINE}; differences in points, p of the exact McNemar test"
    console.show(title, [*COLUMNS], shown.paired)
    console.show("seconds", ["phase", "seconds"], [[name, f"{s:.0f}"] for name, s in shown.seconds.items()])
    for path in shown.files:
        console.result(str(path))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="defenses, attacks, suites, datasets, models or recipes.")],
    as_json: AsJson = False,
) -> None:
    """List what can be named on the command line."""
    from robustbench_vlm import catalogue

    rows = catalogue.names(what)
    if as_json:
        console.result_json([{"name": name, "title": title} for name, title in rows])
    else:
        console.show(what, ["name", "what it is"], [list(row) for row in rows])


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="defense, attack, suite, dataset, model or recipe.")],
    name: Annotated[str, typer.Argument(help="Its name.")],
) -> None:
    """Print everything that is known about one of them, as JSON."""
    from robustbench_vlm import catalogue

    console.result_json(catalogue.details(what, name))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do, and what is missing."""
    from robustbench_vlm import catalogue

    rows = catalogue.doctor()
    if as_json:
        console.result_json([{"what": what, "found": found, "do": do} for what, found, do in rows])
    else:
        console.show("doctor", ["what", "found", "what to do"], [list(row) for row in rows])


@data_app.command("make")
def data_make(
    suite: Annotated[str, typer.Argument(help="tiny, or a suite to make a generated miniature of.")],
    root: Annotated[
        Path, typer.Option("--root", "--data-root", envvar="VLMROB_DATA", help="Folder of the datasets.")
    ] = Path("data"),
    n: Annotated[int, typer.Option(min=1, help="Images a dataset, for a miniature.")] = 16,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Images of every class instead, for a miniature.")
    ] = None,
    label_with: Annotated[
        str, typer.Option(help="Model whose own predictions become the labels of a miniature.")
    ] = "",
) -> None:
    """Make the tiny world, or a miniature of a suite with generated images in the real layout."""
    from robustbench_vlm import session

    with console.meter() as meter:
        if suite == "tiny":
            session.make_tiny(root, meter)
        else:
            session.make_miniature(suite, root, n, label_with, meter, per_class)
    console.result(str(root))


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


def _require_defense(name: str) -> None:
    """Refuse an unknown defense without importing torch."""
    folder = Path(__file__).parent / "defenses"
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


def _device(name: str) -> Any:  # noqa: ANN401 - torch.device, not imported here
    from robustbench_vlm import session

    return session.device(name)


def _tiny_data(names: list[str], root: Path) -> None:
    """Render the datasets of the tiny world that are asked for and not there yet."""
    wanted = [name for name in names if name.startswith("tiny-")]
    if not wanted:
        return
    from robustbench_vlm import session

    with console.meter() as meter:
        made = session.make_tiny(root, meter, wanted)
    if made:
        console.remark(f"rendered the tiny world into {root}")


def _print_grids(rows: Any) -> None:  # noqa: ANN401 - a DataFrame, not imported here
    from robustbench_vlm import leaderboard as hall

    for title, grid in hall.grids(rows):  # datasets go down: there are many of them, and few models
        body = [[str(name), *[str(entry) for entry in grid[name]]] for name in grid.columns]
        console.show(f"{title}: clean / robust, %", ["dataset", *map(str, grid.index)], body)
    if (rows.flag != "").any():
        console.remark("! marks a number with a flag: read it in the table file before believing it")


def _exit(error: VlmrobError) -> NoReturn:
    console.err.print(f"error: {error}", style="bold red", markup=False)
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command line; every known error is one line and an exit code."""
    try:
        app()
    except VlmrobError as error:
        _exit(error)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _exit(Incomplete("stopped; the same command goes on where it was"))
        raise
    except OSError as error:
        _exit(VlmrobError(f"{error.filename or 'input or output'}: {error.strerror or error}"))


if __name__ == "__main__":
    main()
