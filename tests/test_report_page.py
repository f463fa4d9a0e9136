"""The page of a report in a browser without a network."""

from __future__ import annotations

import shutil

import helpers
import pytest
from report_helpers import copy

from peft_pretraining.report import finding, page
from peft_pretraining.report.grouping import grouped

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the `dev` extra has it")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")

NASTY = ("<img src=x onerror=alert(1)>", "x<%2fscript><script>alert(2)<%2fscript>", "\"';&amp; \\u003c %{y} <b>日本é")


WIDE = {"width": 1400, "height": 900}
INK = "document.getElementById('plot-tokens')._fullLayout.font.color"
LOOKS = {"light": ("rgb(255, 255, 255)", "#1d2430"), "dark": ("rgb(18, 22, 28)", "#e6eaf0")}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory, small_study):
    """A page of runs with two methods, two seeds, two rates, one that diverged, and others with names that are HTML."""
    folder = tmp_path_factory.mktemp("page")
    runs = shutil.copytree(small_study, folder / "runs")
    for number, name in enumerate(NASTY):
        copy(runs / "galore/lr0.01", runs / name.replace("%2f", "∕"), clip_grad_norm=number + 0.5)
    nothing = {"loss": None, "final_eval_loss": None, "final_eval_perplexity": None}
    records = helpers.records(runs / "full_rank/seed1")
    records = [{name: None if name in nothing else value for name, value in record.items()} for record in records]
    copy(runs / "full_rank/seed1", runs / "diverged", records, lr=1.0, method="</script><script>alert(3)</script>")
    path = folder / "report.html"
    path.write_text(page.build(grouped(finding.find([runs], [])), "</title><script>alert(4)</script>", "today"))
    return path


@pytest.fixture(scope="module")
def faults():
    return []


@pytest.fixture(scope="module")
def opened(browser, written, faults):
    """The page, opened once for all tests, as reading plotly takes a second: and its looks then, in dark. What it asks
    of a network, or complains of, is a fault."""
    opened = browser.new_context(offline=True, color_scheme="dark", viewport=WIDE).new_page()
    opened.set_default_timeout(20_000)
    own = (written.as_uri(), "blob:")  # the latter is the page's memory
    opened.on("request", lambda request: None if request.url.startswith(own) else faults.append(request.url))
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    opened.goto(written.as_uri())
    opened.wait_for_selector("html[data-ready=yes]")
    return opened, looks(opened)


@pytest.fixture
def shown(opened, faults):
    """The page in light, as it is at first."""
    shown = opened[0]
    shown.set_viewport_size(WIDE)
    shown.emulate_media(color_scheme="light")
    until(shown, f"{INK} === '{LOOKS['light'][1]}'")
    yield shown
    assert faults == []
    shown.get_by_role("button", name="all", exact=True).click()
    shown.locator("input[type=search]").evaluate_all("all => all.forEach(one => (one.value = ''))")
    shown.get_by_label("every seed").uncheck()
    shown.get_by_label("only those that differ").check()


def looks(shown):
    """The background, and the colour of a plot's text."""
    return shown.evaluate("getComputedStyle(document.body).backgroundColor"), shown.evaluate(INK)


def until(shown, expression):
    """Wait for what is true before long. Playwright's own waiting evaluates text, which the page's policy forbids."""
    for _ in range(500):
        if shown.evaluate(expression):
            return
        shown.wait_for_timeout(20)
    raise AssertionError(expression)


def drawn(shown, plot="tokens"):
    """Names of what a plot shows, as its reader sees them."""
    return set(shown.evaluate(f"document.getElementById('plot-{plot}').data.filter(t => t.visible).map(t => t.name)"))


def column(shown, key):
    heads = shown.eval_on_selector_all("#table thead th", "all => all.map(head => head.textContent)")
    rows = f"all => all.filter(row => !row.hidden).map(row => row.cells[{heads.index(key)}].textContent)"
    return shown.eval_on_selector_all("#table tbody tr", rows)


def test_the_legend_hides_a_run(shown):
    before = drawn(shown)
    assert shown.locator("#plot-tokens .scatterlayer .trace").count() > 0
    entry = shown.get_by_role("button", name="full_rank (2 seeds)", exact=True)
    entry.click()
    assert before - drawn(shown) == {"full_rank"} and entry.get_attribute("aria-pressed") == "false"
    assert "full_rank" not in drawn(shown, "state")
    heads = shown.locator("#settings thead th").all_text_contents()
    assert "full_rank (2 seeds)" not in heads and len(heads) > 3
    entry.click()
    assert drawn(shown) == before
    shown.get_by_role("button", name="none", exact=True).click()
    assert drawn(shown) == set()
    entry.dblclick()
    assert drawn(shown) == {"full_rank"}
    shown.get_by_role("button", name="all", exact=True).click()
    assert drawn(shown) == before


def test_the_table_is_sorted_by_numbers_and_by_text(shown):

    def click(title):
        shown.locator("#table thead").get_by_role("button", name=title, exact=True).click()

    click("final perplexity")
    values = column(shown, "final perplexity")
    known = [float(value.split(" ±")[0].replace(",", "")) for value in values if value != "—"]
    assert known == sorted(known) and len(set(known)) > 2 and values[-1] == "—"
    click("final perplexity")
    values = column(shown, "final perplexity")
    again = [float(value.split(" ±")[0].replace(",", "")) for value in values if value != "—"]
    assert again == sorted(known, reverse=True) and values[-1] == "—"  # what is not known stays below
    assert shown.locator("#table th[aria-sort=descending]").text_content() == "final perplexity"
    click("method")
    methods = column(shown, "method")
    assert methods[0] == "</script><script>alert(3)</script>" and methods[1:] == sorted(methods[1:])
    few = len(methods)
    shown.get_by_label("every seed").check()
    assert len(column(shown, "method")) == few + 1
    shown.get_by_label("find a run").fill("seed2")
    assert column(shown, "run") == ["full_rank/seed2"]


def test_no_button_uploads_a_plot_and_one_saves_it(shown):
    titles = shown.locator("#plot-tokens .modebar-btn").evaluate_all("all => all.map(one => one.dataset.title)")
    assert titles == ["Download as PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Autoscale", "Reset axes"]
    with shown.expect_download() as download:
        shown.locator("#plot-tokens .modebar-btn").first.click(force=True)
    assert download.value.suggested_filename == "perplexity_over_tokens.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_axes_become_logarithmic(shown):
    kind = {letter: f"document.getElementById('plot-tokens')._fullLayout.{letter}axis.type" for letter in "xy"}
    assert shown.evaluate(kind["x"]) == "linear" and shown.evaluate(kind["y"]) == "log"
    buttons = shown.locator("section", has=shown.locator("#plot-tokens")).locator("button.axis")
    for which, letter, after in ((0, "x", "log"), (1, "y", "linear")):
        buttons.nth(which).click()
        until(shown, f"{kind[letter]} === '{after}'")
        assert buttons.nth(which).get_attribute("aria-pressed") == str(after == "log").lower()


def test_settings_that_differ_are_marked(shown):
    names = shown.locator("#settings tbody th").all_text_contents()
    assert {"lr", "rank", "clip_grad_norm", "seed"} <= set(names) and not {"batch_size", "save_dir"} & set(names)
    row = shown.locator("#settings tbody tr", has=shown.locator("th", has_text="clip_grad_norm"))
    assert sorted(row.locator("td.other").all_text_contents()) == ["0.5", "1.5", "2.5"]
    shown.get_by_label("only those that differ").uncheck()
    assert "batch_size" in shown.locator("#settings tbody th").all_text_contents()


def test_light_and_dark(opened, shown):
    """As the system is, also when it changes; then as was chosen."""
    assert opened[1] == LOOKS["dark"] and looks(shown) == LOOKS["light"]
    for scheme in ("dark", "light"):
        shown.locator("#theme").click()
        until(shown, f"{INK} === '{LOOKS[scheme][1]}'")
        assert looks(shown) == LOOKS[scheme]
    shown.emulate_media(color_scheme="dark")
    shown.wait_for_timeout(50)
    assert looks(shown) == LOOKS["light"]
    shown.evaluate("localStorage.clear()")


@pytest.mark.parametrize("width", [400, 1400])
def test_narrow_and_wide(shown, width):
    shown.set_viewport_size({"width": width, "height": 900})
    box = "document.querySelector('#plot-tokens .main-svg').getBoundingClientRect()"
    until(shown, f"{box}.width > 300 && {box}.right <= {width}")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll in themselves


def test_titles_and_names_are_text(shown):
    assert shown.title() == shown.locator("h1").text_content() == "</title><script>alert(4)</script>"
    assert shown.locator("img").count() == 0
    shown.get_by_label("every seed").check()
    runs = column(shown, "run")
    legend = shown.locator("#legend button").all_text_contents()
    methods = column(shown, "method")
    assert any(name.startswith("</script><script>alert(3)</script>") for name in legend)
    assert "</script><script>alert(3)</script>" in methods and len(runs) == len(methods)
    # Plotly's names are HTML of its own, in which these are escaped.
    assert any(
        "&lt;/script&gt;" in name
        for name in shown.evaluate("document.getElementById('plot-time').data.map(t => t.name)")
    )
