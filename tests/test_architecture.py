"""The house holds its shape: who may import whom, what no file may contain, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import robustbench_vlm

PACKAGE = Path(robustbench_vlm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]

LAYERS = (
    {"safe_text"},
    {"errors"},
    {"threat", "types", "rng", "version", "interruption", "text_files", "threads", "launcher"},
    {"store", "devices", "console", "one_writer"},
    {"tensor_files"},
    {"cards", "engine", "defenses"},
    {"attacks", "data", "models", "results"},  # these do not know each other
    {"backends", "training"},
    {"evaluation"},
    {"catalogue", "demo", "studies"},
    {"api"},
    {"cli"},
    {"__main__", "__init__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

LINES_OF_A_FILE = 350
LINES_OF_A_FUNCTION = 60  # with its docstring; a command lists its options and may take more
PARAMETERS = 10  # likewise

RUNS_CODE = {"pickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
FORBIDDEN = {
    "sys.path": "paths come from arguments",
    "os.system": "no shell",
    "os.chdir": "paths come from arguments",
    "random.seed": "randomness is keyed by name (rng)",
    "np.random.seed": "randomness is keyed by name (rng)",
    "numpy.random.seed": "randomness is keyed by name (rng)",
    "time.time": "seconds are time.perf_counter, dates are datetime with a zone",
}
HOMES = ("/mnt/", "/home/", "/root/", "/Users/")


def trees():
    return [
        pytest.param(name, ast.parse(path.read_text("utf-8")), id=name)
        for name, path in zip(NAMES, FILES, strict=True)
    ]


def part(name):
    """The part of the house that a file or dotted module belongs to."""
    return name.replace(".py", "").replace("/", ".").split(".")[0]


def at_run_time(tree):
    """All nodes but those under `if TYPE_CHECKING:`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def imported(tree, name):
    """Parts of this package that a file imports when it runs, inside functions too."""
    package = ["robustbench_vlm", *Path(name).parent.parts]
    for node in at_run_time(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        for module in modules:
            first, _, rest = module.partition(".")
            if first == "robustbench_vlm" and rest:
                yield part(rest)


def file_of(module):
    """The file of a dotted module of this package, if it is one."""
    path = module.removeprefix("robustbench_vlm.").replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in NAMES), None)


def files_imported(tree):
    """Files of this package that a tree imports, for annotations alone or not; no relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (file for alias in node.names if (file := file_of(alias.name)))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if file := file_of(f"{node.module}.{alias.name}") or file_of(node.module):
                    yield file


def dotted(node):
    """`a.b.c` of an attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def test_every_part_has_a_place():
    parts = {part(name) for name in NAMES}
    assert parts <= RANK.keys(), (
        f"give these a layer here and a line in docs/architecture.md: {parts - RANK.keys()}"
    )


@pytest.mark.parametrize(("name", "tree"), trees())
def test_imports_go_down(name, tree):
    here = part(name)
    for other in imported(tree, name):
        assert other == here or RANK[other] < RANK[here], f"{name} imports {other}"


@pytest.mark.parametrize(("name", "tree"), trees())
def test_forbidden_words(name, tree):
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not RUNS_CODE & {module.partition(".")[0] for module in modules}, f"{where}: runs code"
        elif isinstance(node, ast.Attribute):
            text = dotted(node)
            assert text not in FORBIDDEN, f"{where}: {text}: {FORBIDDEN[text]}"
            settings = text in ("torch.cuda", "torch.backends.cuda")
            assert node.attr != "cuda" or settings, f"{where}: .cuda; use .to(device)"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not any(home in node.value for home in HOMES), f"{where}: somebody's folder"
        elif isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("shell") != "True", f"{where}: no shell"
            assert options.get("allow_pickle") != "True", f"{where}: runs code"
            if dotted(node.func) == "torch.load":
                assert options.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"


@pytest.mark.parametrize(("name", "tree"), trees())
def test_files_and_functions_are_short_and_documented(name, tree):
    assert (ast.get_docstring(tree) or "").strip(), f"{name}: no module docstring"
    lines = (PACKAGE / name).read_text("utf-8").count("\n")
    assert lines <= LINES_OF_A_FILE, f"{name}: {lines} lines"
    for node in ast.walk(tree) if part(name) != "cli" else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LINES_OF_A_FUNCTION, f"{name}: {node.name} has {length} lines"
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            assert count <= PARAMETERS, f"{name}: {node.name} has {count} parameters"


def test_no_file_imports_itself_through_others():
    """Imports for annotations alone count too: a circle of types is a circle to its reader."""
    arrows = {}
    for name, path in zip(NAMES, FILES, strict=True):
        arrows[name] = {file for file in files_imported(ast.parse(path.read_text("utf-8"))) if file != name}
    while ends := {name for name, others in arrows.items() if not others & arrows.keys()}:
        for name in ends:
            del arrows[name]
    assert not arrows, f"a circle, or what leads to it: {sorted(arrows)}"


WITHOUT_TORCH = [
    "console",
    "errors",
    "rng",
    "store",
    "text_files",
    "threads",
    "threat",
    "types",
    "results.stats",
    "results.verdicts",
    "training.cost",
    "training.world",
]


def test_reading_cards_and_verdicts_needs_no_torch():
    cards = [f"cards.{path.stem}" for path in (PACKAGE / "cards").glob("*.py")]
    modules = ", ".join(f"robustbench_vlm.{name}" for name in [*WITHOUT_TORCH, *cards])
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_rules_see_what_they_forbid():
    """The checks above are not vacuous."""
    bad = "def f():\n    from robustbench_vlm.cli import x\n    from ..models import clip\n"
    assert set(imported(ast.parse(bad), "data/x.py")) == {"cli", "models"}
    fine = "if TYPE_CHECKING:\n    from robustbench_vlm.cli import x\nfrom .pixels import rgb\n"
    assert set(imported(ast.parse(fine), "data/x.py")) == {"data"}
    for line in ("import pickle", "x.cuda()", "sys.path.append('x')", "torch.load(f)", "open('/mnt/x')"):
        with pytest.raises(AssertionError):
            test_forbidden_words("x.py", ast.parse(line))
    test_forbidden_words("x.py", ast.parse("torch.load(f, weights_only=True); torch.cuda.is_available()"))
