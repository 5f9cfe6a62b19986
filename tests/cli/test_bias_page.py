"""The page of `longburn bias-view` in a real browser: keys and clicks, and its numbers against the policy's own."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longburn.bias import alibi_slopes
from longburn.bias.picture import BiasPicture, BiasRow
from longburn.cli.bias_drawing import page
from longburn.cli.bias_policies import Layer
from longburn.cli.bias_view import look, make_input, read_text

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
RIGHT, LEFT, HOME, END, SPACE, TAB = "\ue014", "\ue012", "\ue011", "\ue010", " ", "\ue004"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's reference, by the WebDriver standard
LAYER = Layer(dim=24, heads=3, head_dim=8, window=9, sink_tokens=2)


class Browser:
    """As much of a WebDriver client as these tests use."""

    def __init__(self, address: str) -> None:
        self.session = address
        options = {
            "binary": next(filter(None, map(shutil.which, BROWSERS))),
            "args": [*ARGUMENTS, f"--user-data-dir={os.environ['BIAS_PAGE_PROFILE']}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"{address}/session/{made['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"].splitlines()[0]) from error

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": path.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """A function body; it may await, and returns what it returns."""
        return self.call("POST", "/execute/sync", {"script": f"return (async () => {{{script}}})()", "args": arguments})

    def find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def keys(self, selector: str, keys: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": keys})
        self.settle()

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/click", {})
        self.settle()

    def choose(self, selector: str, value: str) -> None:
        self.click(f'{selector} option[value="{value}"]')

    def settle(self) -> None:
        """Until what is due was drawn."""
        self.run("await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self) -> list[str]:
        """What the console said since it was last asked."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def table(self) -> list[list[str]]:
        return self.run(
            "return [...document.querySelectorAll('#values tr')].map((r) => [...r.cells].map((c) => c.textContent))"
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or not any(map(shutil.which, BROWSERS)):
        pytest.skip("no browser: needs chromedriver and one of " + ", ".join(BROWSERS))
    folder = tmp_path_factory.mktemp("browser")
    log = folder / "driver.log"
    with (
        log.open("w") as output,
        subprocess.Popen([driver, "--port=0"], stdout=output, stderr=subprocess.STDOUT) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("BIAS_PAGE_PROFILE", str(folder / "profile"))
        opened = None
        try:
            opened = Browser(f"http://127.0.0.1:{wait_for_port(log)}")
            yield opened
        finally:
            if opened is not None:
                opened.call("DELETE", "")
            process.terminate()


def wait_for_port(log: Path) -> int:
    for _ in range(600):
        words = log.read_text().split("on port ")
        if len(words) > 2 or (len(words) == 2 and "successfully" in words[0]):
            return int(words[-1].split(".")[0].split()[0])
        time.sleep(0.05)
    raise AssertionError(f"chromedriver does not start: {log.read_text()}")


@pytest.fixture(scope="module")
def forget() -> BiasPicture:
    return look("forget", LAYER, make_input("random", 40, LAYER.dim, seed=1), seed=1)


@pytest.fixture
def forget_page(browser: Browser, forget: BiasPicture, tmp_path: Path) -> Browser:
    return show(browser, forget, tmp_path)


def show(browser: Browser, picture: BiasPicture, folder: Path) -> Browser:
    path = folder / "page.html"
    path.write_text(page(picture), encoding="utf-8")
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    browser.log()
    browser.open(path)
    browser.settle()
    return browser


def check_row(browser: Browser, row: BiasRow, head: int) -> None:
    """The table is this row's, and the line above says the same of its ends."""
    table = browser.table()
    assert [int(cells[0]) for cells in table] == row.keys.tolist()
    assert [int(cells[-2]) for cells in table] == (row.position - row.keys).tolist()
    shown = torch.tensor([float(cells[-1]) for cells in table])
    torch.testing.assert_close(shown, row.bias[head], rtol=6e-4, atol=1e-7)
    said = browser.text("#now")
    assert f"position {row.position}" in said
    assert f"sees {len(row.keys)} keys" in said
    assert f"Head {head + 1}:" in said


def test_the_slider_goes_through_time(forget_page: Browser, forget: BiasPicture) -> None:
    """By keys alone; every number of the table is the policy's."""
    browser = forget_page
    browser.click("#numbers summary")
    check_row(browser, forget.rows[39], 0)
    for keys, place in ((HOME, 0), (RIGHT * 3, 3), (RIGHT * 17, 20), (LEFT, 19), (END, 39)):
        browser.keys("#time", keys)
        check_row(browser, forget.rows[place], 0)
        assert browser.run("return document.querySelector('#time').getAttribute('aria-valuetext')") == (
            f"position {place}, {place + 1} of 40"
        )
    browser.choose("#head", "2")
    check_row(browser, forget.rows[39], 2)
    assert browser.log() == []


def test_factors_are_those_of_a_softmax(forget_page: Browser, forget: BiasPicture) -> None:
    browser = forget_page
    browser.click("#numbers summary")
    browser.choose("#show", "factor")
    browser.choose("#head", "1")
    bias = forget.rows[39].bias[1]
    shown = torch.tensor([float(cells[-1]) for cells in browser.table()])
    # Biases in the page are rounded to 4 digits, of up to some tens.
    torch.testing.assert_close(shown, torch.exp(bias - bias.max()), rtol=0.05, atol=1e-6)
    assert browser.text("#low") == "0"
    assert browser.text("#high") == "1"


def test_alibi_by_its_formula(browser: Browser, tmp_path: Path) -> None:
    """Nothing of ours between the paper's slopes and what the page says."""
    show(browser, look("alibi", LAYER, make_input("random", 30, LAYER.dim, seed=0), seed=0), tmp_path)
    browser.click("#numbers summary")
    browser.choose("#head", "1")
    browser.keys("#time", LEFT * 4)
    slope = alibi_slopes(3)[1].item()
    for key, distance, value in browser.table():
        assert int(key) + int(distance) == 25
        assert float(value) == pytest.approx(-slope * int(distance), rel=1e-3)
    assert [int(cells[0]) for cells in browser.table()] == [0, 1, *range(17, 26)]


def test_the_map_is_drawn_from_the_numbers(browser: Browser, tmp_path: Path) -> None:
    """Least is dark violet, largest yellow, at the place of their query and key; unseen keys are left empty."""
    bias = torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
    rows = tuple(BiasRow(p, torch.arange(2), bias[p : p + 1]) for p in range(2))
    show(browser, BiasPicture("t", (), rows), tmp_path)
    browser.choose("#columns", "keys")
    found = browser.run(
        "const c = document.querySelector('#map'), b = c.getBoundingClientRect(), s = c.width / b.width;"
        "const at = (x, y) => [...c.getContext('2d').getImageData(Math.round(x * s), Math.round(y * s), 1, 1).data];"
        "const w = b.width - 58 - 26, h = b.height - 4 - 38;"
        "return [0.25, 0.75].map((v) => [0.25, 0.75].map((u) => at(58 + u * w, 4 + v * h)))"
    )
    violet, yellow = [0x44, 0x01, 0x54, 255], [0xFD, 0xE7, 0x25, 255]
    assert found == [[yellow, violet], [violet, yellow]]


def test_a_click_on_the_map_goes_to_its_row(forget_page: Browser, forget: BiasPicture) -> None:
    browser = forget_page
    height = browser.run("return document.querySelector('#map').getBoundingClientRect().height")
    row = 12
    y = round(4 + (row + 0.5) / 40 * (height - 42) - height / 2)
    origin = {ELEMENT: browser.find("#map")}
    moves = [{"type": "pointerMove", "origin": origin, "x": 0, "y": y}, {"type": "pointerDown", "button": 0}]
    moves.append({"type": "pointerUp", "button": 0})
    browser.run("document.querySelector('#map').scrollIntoView({block: 'center'})")
    browser.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})
    browser.settle()
    assert f"position {forget.rows[row].position} " in browser.text("#now")
    assert browser.text("#under").startswith(f"query {row}")


def test_playing_stops_at_the_end(forget_page: Browser) -> None:
    browser = forget_page
    browser.keys("#time", LEFT * 3)
    browser.keys("#play", SPACE)
    assert browser.text("#play") == "Pause"
    for _ in range(100):
        if browser.text("#play") == "Play":
            break
        time.sleep(0.05)
    assert browser.text("#play") == "Play"
    assert "position 39" in browser.text("#now")


def test_every_control_is_named_and_reached_by_keys(forget_page: Browser) -> None:
    browser = forget_page
    nameless = browser.run(
        "return [...document.querySelectorAll('input, select, button')]"
        ".filter((e) => !(e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert nameless == []
    assert all(browser.run("return [...document.querySelectorAll('[role=img]')].map((e) => e.ariaLabel)"))
    reached = []
    browser.run("document.activeElement.blur()")
    tab = {"type": "key", "id": "keys", "actions": [{"type": t, "value": TAB} for t in ("keyDown", "keyUp")]}
    for _ in range(6):
        browser.call("POST", "/actions", {"actions": [tab]})
        reached.append(browser.run("const e = document.activeElement; return e.id || e.localName"))
    assert reached == ["time", "play", "head", "show", "columns", "summary"]


@pytest.mark.parametrize("width", [320, 400, 1100])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_narrow_and_wide_in_both_themes(forget_page: Browser, width: int, theme: str, tmp_path: Path) -> None:
    """Nothing is cut off or spills over, and text stands out from what is behind it by at least 4.5 to 1 (WCAG AA)."""
    browser = forget_page
    browser.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=2, mobile=False)
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.settle()
    browser.click("#numbers summary")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    spilled = browser.run(
        "return [...document.querySelectorAll('.controls *, .panel > *')]"
        ".filter((e) => e.getBoundingClientRect().right > e.closest('.controls, .panel').getBoundingClientRect().right)"
        ".map((e) => e.id || e.localName)"
    )
    assert spilled == []
    assert browser.run("return [...document.querySelectorAll('canvas')].every((c) => c.width >= 100)")
    ratios = browser.run(
        "const parse = (c) => c.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)"
        ".map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);"
        "const light = (c) => { const [r, g, b] = parse(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
        "const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;"
        "  if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };"
        "return [...document.querySelectorAll('h1, h2, p, li, label, output, select, button, td, th, summary, span')]"
        ".map((e) => [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a))"
        ".map(([a, b]) => (a + 0.05) / (b + 0.05))"
    )
    assert min(ratios) >= 4.5
    body = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, body[4:-1].split(","))) < 200) == (theme == "dark")
    inked = browser.run(
        "const c = document.querySelector('#curve'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n"
    )
    assert inked > 500
    assert browser.log() == []
    if folder := os.environ.get("LONGBURN_SCREENSHOTS"):
        shot = base64.b64decode(browser.devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        (Path(folder) / f"{theme}-{width}.png").write_bytes(shot)


def test_nothing_is_asked_of_the_network(forget_page: Browser) -> None:
    browser = forget_page
    assert browser.run("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    blocked = browser.run("try { await fetch('data:,x'); return false } catch { return true }")
    assert blocked, "the page's own policy lets it fetch"


def test_tokens_of_a_text_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    """With their quotes, and without becoming markup."""
    given = read_text('He said "<b>no</b>" & left\nat once.', 40)
    layer = Layer(given.x.shape[2], 2, 8, 64, 0)
    show(browser, look("forget", layer, given, seed=0), tmp_path)
    browser.click("#numbers summary")
    assert "".join(json.loads(cells[1]) for cells in browser.table()) == "".join(given.labels)
    assert browser.run("return document.querySelectorAll('main b').length") == 0
    assert json.dumps(given.labels[-1]) in browser.text("#now")
    assert browser.log() == []


def test_a_bias_of_later_keys_too(browser: Browser, tmp_path: Path) -> None:
    """Both directions, one query, one head, one key: nothing breaks at the edges."""
    both = tuple(BiasRow(p, torch.arange(7), -(p - torch.arange(7.0)).abs()[None]) for p in range(7))
    show(browser, BiasPicture("both", ("a note",), both), tmp_path)
    browser.click("#numbers summary")
    browser.keys("#time", HOME)
    assert [cells[1:] for cells in browser.table()] == [[str(-d), str(-d)] for d in range(7)]
    show(browser, BiasPicture("one", (), (BiasRow(0, torch.tensor([0]), torch.zeros(1, 1)),), 4), tmp_path)
    browser.click("#numbers summary")
    assert browser.table() == [["0", "0", "0"]]
    assert browser.log() == []
