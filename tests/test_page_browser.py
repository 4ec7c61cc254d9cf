"""The page as a reader meets it, in a real browser: opened as a file, without a network."""

import csv as csv_files
import io
import json
import re
import shutil
from urllib.parse import unquote_plus

import numpy as np
import pytest
from test_leaderboard import cell
from test_page import HOSTILE

from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.results import compare, leaderboard, mean_interval, ranks, result_file, verdicts

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")

SUITE = Suite(name="pair", title="A <b>pair</b> of datasets", datasets=("one", "two"), eps=("4/255",), n=10,
              means={"first": ("one",)})  # fmt: skip
N = 100


def some(count, stage="apgd-ce"):
    """The first images are broken, all by one stage."""
    return dict.fromkeys(range(count), stage)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Four models on 100 images of each of two datasets, one without the second; and a second contest."""
    folder = tmp_path_factory.mktemp("results")
    models = {"weak": (75, 78), "middle": (25, 30), "alike": (24, 29), "partial": (10, None)}
    for name, broken in models.items():
        facts = {
            "arch": "big" if name == "weak" else "small",
            "defense": "none" if name == "weak" else "tecoa",
        }
        for dataset, count in zip(("one", "two"), broken, strict=True):
            if count is not None:
                doubtful = name == "alike" and dataset == "two"
                outcome = {"flags": ["saturated" if doubtful else "tied-classes"]}
                cell(
                    folder, name, dataset, 90, some(count), labels=[0] * N, outcome=outcome, model_facts=facts
                )
    cell(folder, HOSTILE, "one", 90, some(50), labels=[0] * N)
    for dataset in ("one", "two"):
        cell(folder, "weak", dataset, 90, some(80, "pgd20"), labels=[0] * N, attack="pgd20")
    return result_file.of_suite(result_file.read(folder), SUITE)


@pytest.fixture(scope="module")
def address(results, tmp_path_factory):
    from robustbench_vlm.results.page import render

    path = tmp_path_factory.mktemp("page") / "pair.html"
    path.write_bytes(render.html(results, SUITE, leaderboard.table(results, SUITE)))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def view(browser, address):
    """Opens the page at a place in a new window; whatever it asks for or complains about fails the test."""
    contexts, faults = [], []

    def opened(place="", **options):
        context = browser.new_context(
            **{"offline": True, "viewport": {"width": 1280, "height": 900}} | options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda sent: None if sent.url.startswith(("file:", "data:", "blob:")) else
                faults.append(sent.url))  # fmt: skip
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(f"{address}#{place}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def names(page):
    """The names of the rows of the table, in its order."""
    return [text.split()[0] for text in page.locator("#board tbody th").all_inner_texts()]


def entry(page, model, head):
    heads = [re.sub(r"[ ▲▼]+$", "", text) for text in page.locator("#board thead th").all_inner_texts()]
    row = page.locator("#board tbody tr").filter(
        has=page.locator("th", has_text=re.compile(rf"^\s*{model} "))
    )
    return row.locator("th, td").nth(heads.index(head)).inner_text().strip()


def saved(page, press):
    with page.expect_download() as waiting:
        page.click(press)
    return waiting.value.path().read_bytes()


def bits_of(results, model, dataset):
    (found,) = [r for r in results if (r.model[0], r.dataset, r.contest.attack) == (model, dataset, "aa")]
    return verdicts.standing(found.verdicts()).to_numpy()


def expected(results, models, datasets):
    bits = [np.stack([bits_of(results, model, dataset) for model in models]) for dataset in datasets]
    standing = dict(zip(models, ranks.standings(bits), strict=True))
    counts = {model: [(int(part[i].sum()), N) for part in bits] for i, model in enumerate(models)}
    return standing, {model: mean_interval.mean_interval(found) for model, found in counts.items()}


def text_of(share):
    return f"{100 * share:.1f}"


def rank_text(standing):
    return f"{standing.low}" if standing.low == standing.high else f"{standing.low}–{standing.high}"


WHOLE = ["middle", "alike", "weak"]


def test_means_intervals_ranks_and_groups_are_those_of_python(view, results):
    page = view()
    standing, intervals = expected(results, WHOLE, ["one", "two"])
    for model in WHOLE:
        low, high = intervals[model].low, intervals[model].high
        assert entry(page, model, "robust, %").endswith(f"[{text_of(low)}, {text_of(high)}]")
        assert entry(page, model, "rank") == rank_text(standing[model])
        assert entry(page, model, "tie group") == standing[model].group
    assert entry(page, "partial", "rank") == "–"
    assert entry(page, "partial", "robust, %") == "–"
    assert entry(page, "partial", "two") == "–"
    assert "3 pairs" in page.inner_text("#summary")


def test_picking_datasets_and_rows_computes_everything_again(view, results):
    page = view()
    page.click("#sets-count")
    page.uncheck("#set-1")
    models = [*WHOLE, "partial"]
    page.fill("#search", "org-none")
    assert names(page) == []
    page.fill("#search", "")
    evil = page.locator("#board tbody tr").filter(has_text="onerror").locator("input")
    evil.uncheck()
    standing, intervals = expected(results, models, ["one"])
    for model in models:
        interval = intervals[model]
        assert entry(page, model, "robust, %").endswith(
            f"[{text_of(interval.low)}, {text_of(interval.high)}]"
        )
        assert entry(page, model, "rank") == rank_text(standing[model])
    assert names(page)[-1].startswith("</script>")  # a row that is not ranked stands last
    assert "exact McNemar test" in page.inner_text("#summary")
    page.click("#sets-1")  # datasets that no model has seen
    assert "3 rows" in page.inner_text("#summary")


def test_heads_sort_by_mouse_and_by_keyboard_and_say_so(view):
    page = view()
    assert names(page)[:3] == ["alike", "middle", "weak"]
    robust = page.locator("th", has=page.locator("#sort-robust"))
    assert robust.get_attribute("aria-sort") == "descending"
    page.focus("#sort-robust")
    page.keyboard.press("Enter")
    assert robust.get_attribute("aria-sort") == "ascending"
    assert names(page)[:3] == ["weak", "middle", "alike"]
    assert page.evaluate("document.activeElement.id") == "sort-robust"  # the keyboard keeps its place
    page.click("#sort-model")
    assert names(page)[1:] == ["alike", "middle", "partial", "weak"]
    assert robust.get_attribute("aria-sort") == "none"


def test_filters_search_and_columns(view):
    page = view()
    page.fill("#search", "WEAK")
    assert names(page) == ["weak"]
    assert page.evaluate("document.activeElement.id") == "search"
    page.fill("#search", "")
    page.click("summary:text('rows')")
    page.select_option("#filter-arch", "big")
    assert names(page) == ["weak"]
    page.select_option("#filter-arch", "")
    page.select_option("#filter-kind", "training-time")
    assert sorted(names(page)) == ["alike", "middle", "partial"]
    page.check("#unflagged")
    assert sorted(names(page)) == ["middle", "partial"]
    page.check("#complete")
    assert names(page) == ["middle"]
    page.click("summary:text('columns')")
    page.uncheck("#column-sets")
    page.check("#column-size")
    heads = page.locator("#board thead th").all_inner_texts()
    assert "parameters, M" in heads
    assert "one" not in heads
    assert "columns=" in page.url


def test_flags_are_words_with_their_sentence(view):
    page = view()
    assert entry(page, "alike", "flags") == "tied-classes, saturated"
    assert entry(page, "alike", "two").endswith("!")
    assert not entry(page, "alike", "one").endswith("!")
    assert "logits so large that the cross-entropy has no gradient" in page.inner_text("#legend")


def test_contests_are_never_mixed(view):
    page = view()
    page.select_option("#contest-attack", "pgd20")
    assert names(page) == ["weak"]
    assert page.inner_text("#summary").startswith("pgd20 linf 4/255 n=10: 1 of 1 rows")
    page.select_option("#contest-attack", "aa")
    assert len(names(page)) == 5


def test_the_page_opens_with_the_contest_of_most_images(browser, tmp_path):
    from robustbench_vlm.results.page import render

    for attack, stage, datasets in (("aa", (), ["one"]), ("pgd20", ("pgd20",), ["one", "two"])):
        for dataset in datasets:
            cell(tmp_path, "weak", dataset, 90, some(80, *stage), labels=[0] * N, attack=attack)
    found = result_file.of_suite(result_file.read(tmp_path), SUITE)
    path = tmp_path / "pair.html"
    path.write_bytes(render.html(found, SUITE, leaderboard.table(found, SUITE)))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.inner_text("#summary").startswith("pgd20 ")
    page.close()


def test_a_link_leads_to_a_row_and_back(view):
    page = view("without=two&sort=model")
    page.click("#board a:text('middle')")
    assert page.inner_text("#name") == "middle"
    assert page.is_visible("#view-model")
    place = page.url.partition("#")[2]
    assert "without=two" in place
    assert "model=middle@" in unquote_plus(place)
    again = view(place)
    assert again.inner_text("#name") == "middle"
    words = "vlmrob eval --suite pair --model middle --attack aa --norm linf --eps 4/255 --n 10"
    assert again.inner_text("[data-fact=command]") == words
    assert again.locator("#results tbody tr").count() == 2
    again.evaluate("location.hash = '#view=compare'")
    again.wait_for_selector("#view-compare:visible")


def test_tabs_go_by_arrow_keys(view):
    page = view()
    page.focus("#tab-table")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#view-figures")
    assert not page.is_visible("#view-table")
    assert page.get_attribute("#tab-figures", "aria-selected") == "true"
    assert page.evaluate("document.activeElement.id") == "tab-figures"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#view-model")


def test_two_rows_are_compared_as_the_command_compares_them(view, results):
    page = view("view=compare")
    keys = page.locator("#compare-a option").all_inner_texts()
    for box, model in (("a", "middle@"), ("b", "weak@")):
        page.select_option(f"#compare-{box}", next(key for key in keys if key.startswith(model)))
    lines = [line.split("\t") for line in page.inner_text("table:has(#counts)").split("\n")[1:]]
    tested = {line.dataset: line.robust for line in compare.compare(results, "middle", "weak")}
    for line in lines[:2]:
        test = tested[line[0]]
        both, only_a, only_b, neither = (int(text) for text in line[2:6])
        assert (only_a, only_b, both + only_a + only_b + neither) == (test.only_a, test.only_b, N)
        assert float(line[6]) == pytest.approx(100 * test.difference, abs=0.005)
        assert float(line[7]) == pytest.approx(test.p, rel=0.06, abs=5e-5)
    assert "A is more robust" in page.inner_text("#verdict")
    page.click("summary:text('one: 50 and 0')")
    keys = page.inner_text("#only-0 code >> nth=0").split()
    assert keys == [f"one/test/s{i:07d}" for i in range(25, 75)]


def test_what_is_on_screen_is_saved(view):
    page = view("sort=model&up=1")
    lines = list(csv_files.reader(io.StringIO(saved(page, "#save-csv").decode())))
    assert lines[0][:6] == ["rank", "model", "tie group", "robust, %", "robust low, %", "robust high, %"]
    assert [line[1].partition("@")[0] for line in lines[2:]] == ["alike", "middle", "partial", "weak"]
    assert lines[-1][3] == "13.50"
    whole = json.loads(saved(page, "#save-json"))
    assert whole["datasets"] == ["one", "two"]
    assert len(whole["adjusted_p"]) == 3
    latex = saved(page, "#save-tex").decode()
    assert "\\toprule" in latex
    assert "\\textbf" not in latex  # the two best rows cannot be told apart
    page.locator("#board tbody tr").filter(has_text="alike").locator("input").uncheck()
    bold = [line for line in saved(page, "#save-tex").decode().split("\n") if "\\textbf" in line]
    assert len(bold) == 1
    assert "middle@" in bold[0]


def test_a_saved_name_is_no_formula(view):
    page = view()
    assert page.evaluate("csv([['=1+1', '-0.5', '@a', 'a,\"b\"', ' +1']])") == (
        '\'=1+1,-0.5,\'@a,"a,""b""",\' +1\n'
    )
    assert page.evaluate("latexText('a_b & 50 % {\\\\x} ~')") == (
        "a\\_b \\& 50 \\% \\{\\textbackslash{}x\\} \\textasciitilde{}"
    )


@pytest.mark.parametrize("name", ["clean-robust", "robust-radius", "by-attack", "by-iteration"])
def test_figures_are_drawn_have_their_numbers_and_are_saved(view, name):
    page = view("view=figures")
    assert page.locator(f"#drawn-{name} svg path, #drawn-{name} svg rect").count() > 5
    drawn = saved(page, f"#svg-{name}").decode()
    assert drawn.startswith("<svg")
    assert "middle" in drawn
    assert saved(page, f"#png-{name}").startswith(b"\x89PNG")
    lines = list(csv_files.reader(io.StringIO(saved(page, f"#csv-{name}").decode())))
    assert len(lines) == 4
    page.locator("figure", has=page.locator(f"#drawn-{name}")).locator("summary").click()
    assert page.locator(f"#numbers-{name} tbody tr").count() == 3
    if name == "by-attack":
        assert lines[1] == [lines[1][0], "20", "0", "53", "0", "127"]


def test_hostile_names_are_text(view):
    page = view("view=model")
    page.select_option("#model", index=0)
    assert page.inner_text("#name").startswith(
        "</script><img src=x onerror=alert(1)>|=1+1\\n\\x1b[31m\\u202e"
    )
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == SUITE.title
    assert page.evaluate("document.title") == SUITE.title


def test_a_phone_sees_the_page_without_moving_it_sideways(view):
    page = view(viewport={"width": 360, "height": 740}, is_mobile=True)
    for tab in ("table", "figures", "compare", "model"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab


def test_dark_and_light_differ_and_the_figures_follow(view):
    page = view("view=figures", color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark, drawn = (
        page.evaluate(paper),
        page.locator("#drawn-clean-robust svg rect").first.get_attribute("fill"),
    )
    page.emulate_media(color_scheme="light")
    assert page.evaluate(paper) != dark
    followed = "(old) => document.querySelector('#drawn-clean-robust svg rect').getAttribute('fill') !== old"
    page.wait_for_function(followed, arg=drawn, timeout=5000)


def test_without_script_there_is_a_plain_table(view):
    page = view(java_script_enabled=False)
    assert page.locator("noscript table").count() == 2 or page.locator("table").count() >= 2
    assert "weak" in page.inner_text("body")
    assert not page.is_visible("#app")


def test_print_shows_the_view_and_no_controls(view):
    page = view()
    page.emulate_media(media="print")
    assert page.is_visible("#board")
    assert not page.is_visible("#bar")
    assert not page.is_visible("#tabs")


def test_a_page_without_verdicts_ranks_nothing_and_says_so(browser, results, tmp_path):
    from robustbench_vlm.results.page import render

    path = tmp_path / "small.html"
    path.write_bytes(render.html(results, SUITE, leaderboard.table(results, SUITE), with_bits=False))
    page = browser.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(path.as_uri())
    assert entry(page, "middle", "rank") == "–"
    assert "no paired tests and no ranks" in page.inner_text("header")
    for tab in ("figures", "compare", "model"):
        page.click(f"#tab-{tab}")
    page.click("#tab-compare")
    assert "no verdicts of single images" in page.inner_text("#verdict")
    page.close()
    assert faults == []
