"""Somebody's table: how it is read, where its numbers are from, and which of them may not be compared."""

import json
import re
from decimal import Decimal
from pathlib import Path

import command_line
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from robustbench_vlm.errors import InputError
from robustbench_vlm.results.lint import judging, matching, names, records, settings, table
from robustbench_vlm.results.lint.report import lint

PIECES = [
    *(
        "Method",
        "CLIP",
        "TeCoA",
        "64.42",
        "0.0",
        "PGD",
        "Avg.",
        ",",
        ";",
        "\n",
        "&",
        r"\\",
        r"\\",
        '"',
        "{",
        "}",
    ),
    *("%", " ", "$", "^", "_", "~", r"\hline", r"\multicolumn{2}{c}{a}", r"\multirow{2}{*}{b}", r"\textbf"),
    *(r"\x", "\0", "é", "\u202e", "[", "]", "\\", r"\multicolumn", r"\cite{", "& 64.42", ",64.42"),
]
DOCS = Path(__file__).parents[1] / "docs" / "lint.md"


@pytest.fixture
def write(tmp_path):
    """Write a table and return its path."""

    def written(text, name="table.csv"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return written


def found(report):
    """The kinds of all findings with their columns."""
    return {(finding["kind"], finding["column"]) for finding in report["findings"]}


def sides(report, kind):
    """The sides of the one finding of a kind: what they have, and their rows."""
    (finding,) = [finding for finding in report["findings"] if finding["kind"] == kind]
    return {side["is"]: side["rows"] for side in finding["groups"]}


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("43.6", "43.6"), ("27.0", "27.0"), ("0", "0"), ("100", "100"), ("43,6", "43.6")),
        *((" 43.6 % ", "43.6"), ("4e1", None), ("", None), ("-", None), ("nan", None), ("inf", None)),
        *(("43.6 ± 0.2", "43.6"), ("43.6 (+1.2)", "43.6"), ("43.6 (−1,2)†", "43.6"), ("43.6**", "43.6")),
        *(("-3.0", None), ("101", None), ("100.1", None)),
        *(("2024", None), ("43.6/27.0", None), ("=1+1", None), ("4\u0663.6", None), ("43.6 2", None)),
    ],
)  # fmt: skip
def test_a_cell_is_a_percentage_or_a_text(text, value):
    assert table.Cell.of(text).value == (None if value is None else Decimal(value))


def test_rounding_is_half_of_the_last_digit():
    assert [table.rounding(Decimal(text)) for text in ("43.6", "27", "4.90")] == [
        Decimal("0.05"),
        Decimal("0.5"),
        Decimal("0.005"),
    ]


LATEX = r"""
% \begin{tabular}{c} is a comment
\begin{table}[t]
\begin{tabular}{l|c@{\hspace{3pt}}cc} % columns
\toprule
\multirow{2}{*}{Method} & \multicolumn{2}{c}{CIFAR-10} & Avg.\\% 100 %
\cmidrule(lr){2-3}
 & Clean & PGD-100 & Clean \\[2pt]
\midrule
\multicolumn{4}{c}{\textit{ViT-B/32}} \\
\rowcolor{gray!10} CLIP~\cite{a,b} & 88.06 & 2.42 & 64.42 \\
TGA-ZSR (ours) & \textbf{86.46} & $\mathbf{61.45}_{\pm 0.10}$ & \textcolor{red}{56.44}$^{\dagger}$ \\
\midrule
Nobody \& Co. & -- & 99.9\% & 4$_{5}$ \\
\bottomrule
\end{tabular}
\end{table}
"""


def test_latex_is_read_with_spans_rules_and_looks(write):
    read = table.read(write(LATEX, "table.tex"))
    assert read.header == ("Method", "CIFAR-10 Clean", "CIFAR-10 PGD-100", "Avg. Clean")
    assert [row.label for row in read.rows] == ["CLIP", "TGA-ZSR (ours)", "Nobody & Co."]
    assert all("ViT-B/32" in row.context for row in read.rows)
    assert [[str(cell.value) for cell in row.cells[1:]] for row in read.rows] == [
        ["88.06", "2.42", "64.42"],
        ["86.46", "61.45", "56.44"],
        ["None", "99.9", "None"],  # an index is no digit of the number before it
    ]


@pytest.mark.parametrize(
    ("tabular", "header"),
    [
        (r"\begin{tabular}{lc} Method & Clean \\ \hline CLIP & 64.42 \end{tabular}", ("Method", "Clean")),
        (r"\begin{tabular}[t]{lc} Method & Clean \\ CLIP & 64.42 \\ \end{tabular}", ("Method", "Clean")),
        (r"\begin{tabular*}{3cm}{lc} \hline Method & Clean \\ \hline CLIP & 64.42 \end{tabular*}", None),
        (r"\begin{tabularx}{3cm}{lX}Method & {\bf Clean} \\ \midrule CLIP & 64.42 \end{tabularx}", None),
        (r"\begin{longtable}{lc}Method & \makecell{Clean\\acc} \\ \endhead CLIP & 64.42 \end{longtable}",
         ("Method", "Clean acc")),
    ],
)  # fmt: skip
def test_variants_of_latex_tables(write, tabular, header):
    read = table.read(write(tabular, "t.tex"))
    assert read.header == (header or ("Method", "Clean"))
    assert [(row.label, str(row.cells[1].value)) for row in read.rows] == [("CLIP", "64.42")]


def test_a_cell_over_several_rows_is_in_all_of_them(write):
    body = r"Arch & Method & Avg. \\ \midrule \multirow{2}{*}{ViT-B/32} & CLIP & 64.42 \\ & UCAT & 54.17 \\"
    body += r" & TeCoA & 50.00 \\"  # below the cell
    read = table.read(write(rf"\begin{{tabular}}{{llc}} {body} \end{{tabular}}", "t.tex"))
    assert [(row.label, row.context) for row in read.rows] == [
        ("CLIP", "ViT-B/32 Method"),
        ("UCAT", "ViT-B/32 Method"),
        ("TeCoA", "Method"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.txt", "a,b\n", "expected TABLE.csv or TABLE.tex"),
        ("t.csv", "", "no row below the header"),
        ("t.csv", "Method,Clean\n", "no row below the header"),
        ("t.csv", "Method,Clean\nCLIP,64.42,3\n", "3 cells in row 2, 2 in the first"),
        ("t.csv", "Method,Clean\nCLIP,high\n", "no row with a name and a number"),
        ("t.csv", 'Method,Clean\n"CLIP,64.42\n', "not a CSV file"),
        ("t.csv", "a,b\n" + "x,1\n" * 6000, "12002 cells"),
        ("t.tex", "no table", "0 tables"),
        ("t.tex", r"\begin{tabular}{l} a \\ 1", "without"),
        ("t.tex", r"\begin{tabular}{l} a \\ b \end{tabular}\begin{tabular}{l} a \end{tabular}", "2 tables"),
        ("t.tex", r"\begin{tabular}{lc} Method & \best{1} \\ a & 2 \end{tabular}", r"the command \best"),
        ("t.tex", r"\begin{tabular}{lc} \multicolumn{9999}{c}{a} \\ a & 2 \end{tabular}", "'9999' columns"),
        ("t.tex", r"\begin{tabular}{lc} {a & b \\ a & 2 \end{tabular}", "braces that do not match"),
        ("t.tex", r"\begin{tabular", "0 tables"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(write, name, text, words):
    with pytest.raises(InputError) as error:
        table.read(write(text, name))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_folders_and_missing_files_are_wrong_input(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"Method,Clean\nCLIP\xff,1\n")
    (tmp_path / "folder.csv").mkdir()
    for name, words in (("t.csv", "not UTF-8"), ("folder.csv", "egular file"), ("none.csv", "No such file")):
        with pytest.raises(InputError, match=words):
            table.read(tmp_path / name)


@settings_of_hypothesis(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.sampled_from(["csv", "tex"]))
def test_any_text_is_a_table_or_wrong_input(tmp_path_factory, text, kind):
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.write_text(text if kind == "csv" else rf"\begin{{tabular}}{{lc}}{text}\end{{tabular}}", "utf-8")
    try:
        report = lint(path)
    except InputError:
        return
    assert report["matches"] or report["unmatched"]


# --- words -------------------------------------------------------------------------------------------------


def test_names_of_methods_architectures_and_datasets():
    assert {
        names.method(text) for text in ("CLIP", "CLIP ViT-B/32", "Vanilla CLIP", "CLIP (openai) [3]")
    } == {"clip"}
    assert names.method("TeCoA2 ViT-L/14") == "tecoa2"
    assert names.method("PMG-AFT (ours)") == "pmgaft"
    spelled = ("ViT-B/32", "CLIP vit-b-32", "ViT-L/14", "ViT-L-14-336", "RN50", "none")
    assert [names.architecture(text) for text in spelled] == [
        *("vit-b-32", "vit-b-32", "vit-l-14", "vit-l-14-336", "rn50", ""),
    ]
    spelled = ("CIFAR-10 clean", "CIFAR-100", "ImageNet-R", "ImageNet", "Stanford Cars", "Avg.", "PGD")
    assert [names.dataset(text) for text in spelled] == [
        *("cifar10", "cifar100", "imagenet-r", "imagenet", "cars", "mean", ""),
    ]


def test_attacks_radii_and_norms():
    assert [names.family(text) for text in ("AA", "AutoAttack", "PGD-20", "C&W", "APGD-CE", "clean")] == [
        *("autoattack", "autoattack", "pgd", "cw", "apgd", ""),
    ]
    assert (names.steps("PGD-20"), names.radius("eps = 4/255"), names.radius("1/255 and 2/255")) == (
        "20",
        "4/255",
        "",
    )
    assert [names.norm(text) for text in ("Linf", "ℓ∞ 2/255", "L2", "ViT-L/14", "l-2")] == [
        *("linf", "linf", "l2", "", "l2"),
    ]
    assert names.fields("Clean") == ("clean",)
    assert names.fields("PGD") == names.fields("2/255") == ("robust",)
    assert names.fields("CIFAR-10") == ("clean", "robust")


# --- what is known -----------------------------------------------------------------------------------------


def test_facts_come_from_protocol_cards_and_settings():
    fare = settings.facts("arXiv:2402.12336 Table 4", "fare/1", "cifar10", "robust")
    assert (fare.canvas, fare.images, fare.prompts) == ("native 32 px", "1000", "prompt pack clip")
    assert settings.facts("arXiv:2402.12336 Table 4", "fare/1", "cifar10", "clean").images == "whole split"
    assert settings.facts("arXiv:2402.12336 Table 4", "", "imagenet", "robust") == settings.Facts()
    tga = settings.facts("arXiv:2410.21802 Table 3", "", "cifar10", "robust")
    assert (tga.canvas, tga.images, tga.resize) == ("model input", "whole split", "bilinear-squash")
    assert settings.facts("unknown", "", "cifar10", "robust") == settings.Facts()


def test_every_setting_belongs_to_a_source():
    sources = {record.source for record in records.read()}
    for setting in settings._settings():
        assert any(source.startswith(setting.source) for source in sources), setting.source


def test_attacks_of_printed_numbers_are_split_into_name_and_steps():
    attacks = {(record.attack, record.steps) for record in records.read() if record.field == "robust"}
    assert {("pgd", "100"), ("pgd", "20"), ("pgd", ""), ("apgd-ce+apgd-t", ""), ("autoattack", "")} < attacks
    assert not any("(" in attack or "step" in attack for attack, _ in attacks)


# --- matching ----------------------------------------------------------------------------------------------


def test_a_row_is_traced_to_one_paper(write):
    report = lint(
        write("Method,Avg. clean,Avg. robust 2/255,Avg. robust 4/255\nTeCoA ViT-L/14,60.0,43.6,27.0\n")
    )
    assert report["findings"] == report["unmatched"] == []
    assert {source["model"] for cell in report["matches"] for source in cell["sources"]} == {
        "TeCoA2 ViT-L/14"
    }
    assert [{source["eps"] for source in cell["sources"]} for cell in report["matches"][1:]] == [
        {"2/255"},
        {"4/255"},
    ]


def test_fewer_digits_than_printed_still_match_and_more_do_not(write):
    report = lint(write("Method,Avg. clean,Avg. PGD-100\nTGA-ZSR,56.4,42.1\nUCAT,54.17,32.207\n"))
    assert [(cell["row"], cell["text"]) for cell in report["matches"]] == [
        *(("TGA-ZSR", "56.4"), ("TGA-ZSR", "42.1"), ("UCAT", "54.17")),
    ]
    assert [cell["text"] for cell in report["unmatched"]] == ["32.207"]


def test_what_is_not_matched_is_named_with_the_nearest_number(write):
    report = lint(
        write("Method,CIFAR-10 clean\nSomebody's,88.06\nCLIP ViT-B/32,88.5\nTGA-ZSR,86.46\nFARE,oops\n")
    )
    assert {cell["row"]: cell["why"].partition(":")[0] for cell in report["unmatched"]} == {
        "Somebody's": 'no source prints a method "Somebody\'s"',
        "CLIP ViT-B/32": "no source prints it; the nearest is 88.06",
        "FARE": "not a percentage between 0 and 100",
    }
    assert [cell["row"] for cell in report["matches"]] == ["TGA-ZSR"]


def test_a_common_number_alone_tells_no_source(write):
    report = lint(write("Method,Robust\nCLIP,0.0\nTeCoA,38\n"))
    assert report["matches"] == report["findings"] == []
    assert len(report["unmatched"]) == 2


def test_a_long_table_compares_rows_of_one_dataset(write):
    rows = [
        "cifar10,TGA-ZSR,1,PGD-100,61.45",
        "stl10,TGA-ZSR,1,PGD-100,84.22",
        "cifar10,AGFT,1,PGD-20,71.72",
    ]
    report = lint(write("dataset,Method,eps,attack,robust\n" + "\n".join(rows) + "\n"))
    assert len(report["matches"]) == 3
    assert not {finding for finding in found(report) if finding[0] == "datasets"}
    assert sides(report, "steps") == {"pgd-100": ["TGA-ZSR"], "pgd-20": ["AGFT"]}
    assert ("steps", "robust (cifar10)") in found(report)


# --- judging -----------------------------------------------------------------------------------------------


def record(**changes):
    """A printed number with every fact stated."""
    facts = {
        "canvas": "native 32 px",
        "resize": "bicubic",
        "images": "1000",
        "prompts": "prompt pack clip",
        "metric": "top1",
    }
    known = {
        **{"model": "X ViT-B/32", "method": "x", "arch": "vit-b-32", "dataset": "cifar10", "field": "robust"},
        **{"value": Decimal("50.12"), "attack": "pgd", "steps": "20", "eps": "1/255", "norm": "linf"},
        **{"split": "test", "trained_on": "ImageNet", "source": "P Table 1", "paper": "P"},
    }
    own = {key: value for key, value in changes.items() if key not in facts}
    stated = {key: changes.get(key, value) for key, value in facts.items()}
    return records.Record(**{**known, **own}, facts=settings.Facts(**stated))


def judged(a, b, cells=("50.12", "50.12")):
    """Kinds of what is found in a column of two cells with these records."""
    rows = [table.Row(label, "", (table.Cell.of(text),)) for label, text in zip("ab", cells, strict=True)]
    read = table.Table(("",), tuple(rows))
    matches = [matching.Match(i, 0, rows[i].cells[0], side) for i, side in enumerate((a, b))]
    return [finding.kind for finding in judging.judge(read, matches, [*a, *b])]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(("datasets", {"dataset": "stl10"}), ("attack", {"attack": "cw"}), ("steps", {"steps": "100"})),
        *(("radius", {"eps": "2/255"}), ("norm", {"norm": "l2"}), ("canvas", {"canvas": "model input"})),
        *(("resize", {"resize": "bilinear"}), ("images", {"images": "all"}), ("split", {"split": "val"})),
        *(("prompts", {"prompts": "prompt pack tecoa"}), ("metric", {"metric": "mean per-class recall"})),
        *(("training-data", {"trained_on": "TinyImageNet"}), ("field", {"field": "clean"})),
    ],
)  # fmt: skip
def test_each_fact_that_differs_is_one_finding_and_an_unknown_one_is_none(kind, changes):
    assert judged([record()], [record()]) == []
    assert judged([record()], [record(**changes)]) == [kind]
    ((name, _),) = changes.items()
    if kind != "field":
        assert judged([record()], [record(**{name: ""})]) == []
    assert judged([record()], [record(), record(**changes)]) == []  # it may be either


def test_rounding_is_named_where_it_may_decide():
    assert judged([record()], [record()], ("50.12", "50.1")) == ["rounding"]
    assert judged([record()], [record()], ("50.16", "50.1")) == []
    assert judged([record()], [record()], ("50.1", "50.1")) == []
    assert judged([record()], [record(dataset="stl10")], ("50.12", "50.1")) == ["datasets"]


def test_clean_of_another_source_and_labels_that_the_source_denies(write):
    report = lint(write("Method,CIFAR-10 clean,CIFAR-10 AA\nCLIP ViT-B/32,89.82,0.01\nTGA-ZSR,86.46,61.45\n"))
    assert sides(report, "clean-of-another-source") == {
        "clean: LAION-AI/CLIP_benchmark:benchmark/benchmark.csv": ["CLIP ViT-B/32"],
        "robust: arXiv:2410.21802": ["CLIP ViT-B/32"],
    }
    assert sides(report, "header-attack") == {
        "table: autoattack": ["TGA-ZSR"],
        "source: pgd (arXiv:2410.21802)": [],
    }
    assert sides(report, "baseline") == {
        "LAION-AI/CLIP_benchmark:benchmark/benchmark.csv: 89.82 (vit-b-32, cifar10)": ["CLIP ViT-B/32"],
        "arXiv:2410.21802: 88.06 (vit-b-32, cifar10)": ["TGA-ZSR"],
    }
    report = lint(write("Method,Avg. AA 4/255\nGRACE,22.44\n"))
    assert sides(report, "header-attack") == {
        "table: autoattack": ["GRACE"],
        "source: apgd-ce (GRACE paper)": [],
    }
    report = lint(write("Method,Avg. AA 2/255\nFARE4 ViT-L/14,45.9\n"))
    assert (len(report["matches"]), report["findings"]) == (1, [])
    report = lint(write("Method,CIFAR-10 L2 PGD-20 2/255\nTGA-ZSR,61.45\n"))
    assert sides(report, "header-attack") == {
        "table: pgd-20": ["TGA-ZSR"],
        "source: pgd-100 (arXiv:2410.21802)": [],
    }
    assert {"header-radius", "header-norm"} < {kind for kind, _ in found(report)}


# --- the command -------------------------------------------------------------------------------------------


def examples():
    """What docs/lint.md shows: (file name, table, first columns of the findings)."""
    pattern = re.compile(r"```(?:csv|latex)\n(.*?)```\n\n`vlmrob lint (\S+)`.*?```text\n(.*?)```", re.DOTALL)
    return [
        pytest.param(name, text, said, id=name)
        for text, name, said in pattern.findall(DOCS.read_text("utf-8"))
    ]


def test_there_are_five_examples():
    assert len(examples()) >= 5


@pytest.mark.parametrize(("name", "text", "said"), examples())
def test_the_documented_inconsistencies_are_found(monkeypatch, capsys, tmp_path, name, text, said):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text, "utf-8")
    assert command_line.run_command(monkeypatch, "lint", name) == 3
    lines = [line.split("\t") for line in capsys.readouterr().out.partition("# sources")[0].splitlines()[2:]]
    assert [": ".join(filter(None, line[:3])) for line in lines] == said.splitlines()


def test_exit_codes_json_and_hostile_text(monkeypatch, capsys, write):
    path = write("Method,CIFAR-10 clean\n\x1b[31m=cmd|x,88.06\nTGA-ZSR,86.46\n")
    assert command_line.run_command(monkeypatch, "lint", path) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[31m=cmd|x" in out
    assert command_line.run_command(monkeypatch, "lint", path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"table", "findings", "matches", "unmatched"}
    assert command_line.run_command(monkeypatch, "lint", write("a", "t.pdf")) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
