"""Reports in a real browser: nothing from the network, no overflow on a phone, contrast.

Skipped where no Chromium is installed (Debian: `apt-get install chromium`).
"""

import json
import re
from pathlib import Path

import pytest

from moequant.report import gather, write_report
from tests.report import browser
from tests.report.inputs import evaluation_json, routing_json, write_model

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None,
    reason="no Chromium here (apt-get install chromium): REPORTS WERE NOT OPENED IN A BROWSER",
)

HOSTILE = "<script>document.title='taken'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"
OVERFLOW = """(document, window) => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const scale = text => Math.hypot(text.getCTM().a, text.getCTM().b);
  const root = document.documentElement, seen = element => element.getClientRects().length > 0;
  const texts = [...document.querySelectorAll("svg text")].filter(seen);
  const outside = texts.filter(text => {
    const a = text.getBoundingClientRect(), b = text.closest("svg").getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1
        || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  });
  return {width: root.clientWidth, content: root.scrollWidth, texts: texts.length,
          font: Math.min(...texts.map(text => parseFloat(window.getComputedStyle(text).fontSize)
                                   * scale(text))),
          outside: outside.map(text => text.textContent)};
}"""
TABLE = """(document, window) => {
  const box = document.querySelector("#fidelity .scroll"), cells = "tr > :nth-child(";
  const edges = n => [...box.querySelectorAll(`${cells}${n})`)].map(c => c.getBoundingClientRect());
  const file = Math.max(...edges(2).map(cell => cell.right));
  box.scrollLeft = 1000;
  return {file, names: edges(1).map(cell => cell.left), next: edges(2).map(cell => cell.left),
          head: [...box.querySelectorAll("th")].map(cell => cell.textContent),
          seen: box.getBoundingClientRect().left};
}"""
CONTRAST = """(document, window) => {
  const channel = value => (value /= 255) <= 0.04045 ? value / 12.92
                                                      : Math.pow((value + 0.055) / 1.055, 2.4);
  const luminance = color => { const [r, g, b] = color.match(/[0-9.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const page = luminance(window.getComputedStyle(document.body).backgroundColor);
  const ratio = color => { const other = luminance(color);
    return (Math.max(page, other) + 0.05) / (Math.min(page, other) + 0.05); };
  const style = name => [...document.querySelectorAll(name)].map(
    element => window.getComputedStyle(element));
  const words = style("p, td, th, dt, dd, a, h1, h2, summary, footer").map(s => ratio(s.color));
  const plots = style("svg text").map(s => ratio(s.fill));
  const series = [1, 2, 3, 4].map(number => {
    document.body.style.outlineColor = `var(--series-${number})`;
    return ratio(window.getComputedStyle(document.body).outlineColor); });
  return {page, words: Math.min(...words), plots: Math.min(...plots), n: plots.length,
          series: Math.min(...series)};
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 60 layers of 128 experts, with every section."""
    folder = tmp_path_factory.mktemp("browser")
    file = write_model(folder / "model.gguf", 60, 128, banked=True,
                       metadata={"general.name": HOSTILE})  # fmt: skip
    evaluation, routing = folder / "evaluation.json", folder / "routing.json"
    evaluation.write_text(json.dumps(evaluation_json(file, 60)))
    routing.write_text(json.dumps(routing_json(60, 128)))
    write_report(folder / "model.html", gather(file, evaluation, routing))
    return folder / "model.html"


def test_page_opens_from_disk_without_a_word_on_the_console(page: Path, tmp_path: Path) -> None:
    dom, console = browser.dump(page.as_uri(), tmp_path)
    assert not console
    assert "<title>&lt;script&gt;" in dom
    assert dom.count('role="img"') > 8
    assert not re.search(r"<script|<img", dom)


def test_page_asks_for_nothing(page: Path, tmp_path: Path) -> None:
    with browser.serving(page.parent) as server:
        browser.dump(f"http://127.0.0.1:{server.port}/{page.name}", tmp_path)
    assert [path for path in server.asked if path != "/favicon.ico"] == [f"/{page.name}"]


@pytest.mark.parametrize("width", [320, 390, 760, 1200])
def test_nothing_overflows_and_letters_stay_large(page: Path, width: int) -> None:
    found = browser.measure(page, OVERFLOW, width)
    assert found["content"] <= found["width"] == width
    assert found["texts"] > 100
    assert found["font"] >= 12
    assert found["outside"] == []


def test_the_files_own_figures_come_first_and_are_seen_on_a_phone(page: Path) -> None:
    """The names of the rows stay where they are as the table is moved to the baselines."""
    data = json.loads((page.parent / "evaluation.json").read_text())
    long = "a-model-with-a-name-of-many-letters_in_places_without_any_break-Q4_K_M.gguf"
    for number, model in enumerate(data["models"]):
        model["name"] = f"{number}-{long}"
    evaluation = page.parent / "names.json"
    evaluation.write_text(json.dumps(data))
    narrow = page.with_name("names.html")
    write_report(narrow, gather(page.with_suffix(".gguf"), evaluation))
    found = browser.measure(narrow, TABLE, 390)
    assert found["head"] == ["", f"0-{long}", f"1-{long}"]
    assert found["file"] <= 390
    assert set(found["names"]) == {found["seen"]}
    assert min(found["next"]) < found["seen"] + 100  # it was moved


@pytest.mark.parametrize(("scheme", "dark"), [(browser.LIGHT, False), (browser.DARK, True)])
def test_contrast_meets_wcag_aa_in_both_schemes(page: Path, scheme: str, dark: bool) -> None:
    """4.5 for text, 3 for lines and bars (WCAG 2.2, 1.4.3 and 1.4.11)."""
    found = browser.measure(page, CONTRAST, 1200, scheme)
    assert (found["page"] < 0.2) == dark
    assert found["n"] > 100
    assert found["words"] >= 4.5
    assert found["plots"] >= 4.5
    assert found["series"] >= 3
