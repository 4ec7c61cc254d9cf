"""The reference in docs/ is what the code says."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from robustbench_vlm.results import columns, flags, verdicts

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_committed_reference_is_what_the_code_says(pages):
    for name, text in pages.items():
        committed = (DOCS / "reference" / name).read_text("utf-8")
        assert committed == text, f"docs/reference/{name} is not what the code says: type `make docs`"


def test_every_key_option_and_column_has_a_meaning(pages):
    for name, text in pages.items():
        empty = [line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")]
        assert empty == [], name


def test_types_are_in_words(pages):
    assert not re.findall(r"\| <\w+", "".join(pages.values()))
    assert "| `--format` | one of svg, png, pdf | `svg` |" in pages["commands.md"]


def test_every_column_of_a_verdict_table_is_listed():
    none = np.zeros(0, dtype=np.int64)
    table = verdicts.begin([], none, [], none, np.zeros(0, dtype=np.float32))
    assert list(table.columns) == list(columns.VERDICTS)


def test_every_flag_is_explained():
    page = (DOCS / "attacks.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [flag for flag in flags.WORDS if not any(f"`{flag}`" in row for row in rows)] == []


@pytest.mark.parametrize("name", ["docs/reliability.md", "SECURITY.md"])
def test_every_test_that_a_page_names_exists(name):
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (DOCS.parent / name).read_text("utf-8"))
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (DOCS.parent / "tests" / file).read_text("utf-8"), f"{file}::{test}"
