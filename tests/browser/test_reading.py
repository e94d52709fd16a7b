"""The dashboard for all users: by keyboard, on a phone, for screen readers, in the dark, with one analyzer or many."""

from __future__ import annotations

from pathlib import Path

import axe_core_python
import chromium
import pytest
from selenium.webdriver.common.keys import Keys
from support import Mocks, running, wait_until

AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
PHONE = (360, 760)
MANY = tuple(f"node-{number:02}" for number in range(1, 65))
WEIGHTS = {name: 1.0 + number % 4 for number, name in enumerate(MANY)}
LONG = "long." * 12 + "name"  # as long as an id may be


@pytest.fixture(scope="module")
def many():
    """64 analyzers."""
    mocks = Mocks(MANY)
    with running(mocks):
        yield mocks


@pytest.fixture(scope="module")
def single():
    """One analyzer, with a name that is as long as it may be."""
    mocks = Mocks((LONG,))
    with running(mocks):
        yield mocks


# ---- the policy


def test_the_policy_is_in_force(page, fastdist):
    """That no test reports an error means something only if what is forbidden would be noticed."""
    page.open(fastdist.port)
    assert chromium.console_errors(page.driver) == []
    page.run(
        "const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        "document.body.append(script);"
        "const image = document.createElement('img'); image.src = 'http://127.0.0.2/x.png';"
        "document.body.append(image);"
        "document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')"
    )
    seen = []

    def all_noticed():
        seen.extend(chromium.console_errors(page.driver))
        return all(
            any(f"{what}: " in line for line in seen) for what in ("script-src-elem", "img-src", "style-src-attr")
        )

    wait_until(all_noticed, "the policy's violations are noticed")
    assert page.run("return window.ran") is None


# ---- by keyboard


def test_everything_is_reached_by_keyboard(page, fastdist):
    page.open(fastdist.port)
    reached = []
    for _ in range(40):
        page.keys(Keys.TAB)
        reached.append(page.focused)
    wanted = [
        "Skip to the figures",
        "Throughput over the last five minutes",
        "Packets waiting over the last five minutes",
    ]
    for name in ("A1", "A2", "A3", "A4"):
        weight = fastdist.analyzers()[name]["weight"]
        wanted += [name, f"Weight of {name}: {weight}, change it", f"Drain {name}"]
    assert reached[: len(wanted)] == wanted


def test_an_analyzer_is_drained_by_keyboard(page, fastdist):
    page.open(fastdist.port)
    wait_until(lambda: [page.keys(Keys.TAB), page.focused][1] == "Drain A1", "the focus gets there")
    page.keys(Keys.ENTER)
    page.wait_for_state("A1", "draining")
    assert page.focused == "Undrain A1", "the focus stays"
    page.keys(Keys.SPACE)
    page.wait_for_state("A1", "online")
    fastdist.wait_for_state("A1", "online")


def test_dialog_keeps_and_returns_the_focus(page, fastdist):
    page.open(fastdist.port)
    page.run("document.querySelector('[data-analyzer=A2] .weight').focus()")
    opener = page.focused
    page.keys(Keys.ENTER)
    wait_until(lambda: page.focused == "weight", "the weight can be typed")
    for _ in range(8):
        page.keys(Keys.TAB)
        assert page.run("return document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keys(Keys.ESCAPE)
    wait_until(lambda: not page.one("#analyzer").is_displayed(), "the dialog is closed")
    assert page.focused == opener


def test_a_chart_is_read_by_keyboard(page, fastdist):
    page.open(fastdist.port)
    points = "return document.querySelector('#depth path.waiting').getAttribute('d').split('L').length"
    wait_until(lambda: page.run(points) >= 4, "there are some points")
    page.run("document.getElementById('depth').focus()")
    assert page.attribute("#depth", "aria-valuetext") == "now: waiting 0, oldest 0 s"

    def two_seconds_ago():
        page.keys(Keys.ESCAPE, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
        return (
            page.attribute("#depth", "aria-valuenow") == "-2"
            and page.attribute("#depth", "aria-valuetext").endswith(" s ago: waiting 0, oldest 0 s")
            and page.text("#depth-legend .when").endswith("s ago")
        )

    wait_until(two_seconds_ago, "there are figures of that time")
    page.keys(Keys.ESCAPE)
    assert page.attribute("#depth", "aria-valuenow") == "0"


# ---- on a phone


@pytest.mark.parametrize("width", [320, 360, 768, 1000, 1280, 1920])
def test_nothing_scrolls_sideways(page, mocks, fastdist, width):
    mocks.set("A2", refuse=True)
    fastdist.wait_for_state("A2", "offline")
    chromium.resize(page.driver, width, 760, mobile=width < 768)
    page.open(fastdist.port)
    page.click("[data-analyzer=A1] .drain")
    page.wait_for_state("A1", "draining")
    assert page.run("return window.innerWidth") == width
    assert not page.is_too_wide
    page.click("[data-analyzer=A2] .name")
    assert page.run("const d = document.getElementById('analyzer'); return d.scrollWidth <= d.clientWidth")


def test_a_long_name_fits_on_a_phone(page, single, serve):
    fastdist = serve(single, weights={LONG: 1.0})
    chromium.resize(page.driver, *PHONE, mobile=True)
    page.open(fastdist.port)
    assert page.text("#analyzers-note") == "1 of 1 analyzer online"
    assert not page.is_too_wide
    page.click(".analyzers .name")
    assert page.run("const d = document.getElementById('analyzer'); return d.scrollWidth <= d.clientWidth")


@pytest.mark.parametrize("width", [320, 1280])
def test_dead_letters_fit_on_a_phone(page, mocks, fresh, width):
    mocks.set_all(status=422)
    for number in range(3):
        assert fresh.post(Idempotency_Key=f"{number}{'x' * 63}")[0] == 202
    fresh.wait_at_rest()
    mocks.set_all(status=None)
    chromium.resize(page.driver, width, 760, mobile=width < 768)
    page.open(fresh.port)
    wait_until(lambda: len(page.all("#dead-letters-last tr")) == 3, "they are shown")
    assert not page.is_too_wide
    assert violations(page) == []


def test_touch_targets_are_large_enough(page, fastdist):
    chromium.resize(page.driver, *PHONE, mobile=True)
    page.open(fastdist.port)
    for button in page.all("main button"):
        if button.is_displayed():
            assert button.size["height"] >= 24, button.text
            assert button.size["width"] >= 24, button.text


# ---- for screen readers, in light and dark


def violations(page):
    """Return what axe finds: rule and elements."""
    page.run(AXE)
    result = page.driver.execute_async_script(
        "axe.run(document, {runOnly: arguments[0]}).then(arguments[arguments.length - 1])", RULES
    )
    assert len(result["passes"]) > 20
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in result["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), PHONE], ids=["desk", "phone"])
def test_rules_of_accessibility_are_kept(page, mocks, fastdist, scheme, size):
    chromium.prefer(page.driver, scheme)
    chromium.resize(page.driver, *size)
    mocks.set("A2", refuse=True)
    page.open(fastdist.port)
    page.wait_for_state("A2", "offline")
    page.click("[data-analyzer=A1] .drain")
    page.wait_for_state("A1", "draining")
    wait_until(lambda: page.text("#done") == "", "the message is gone")  # it lies over other things
    assert violations(page) == []
    page.click("[data-analyzer=A2] .name")
    assert violations(page) == []


@pytest.mark.parametrize("size", [(1280, 900), PHONE], ids=["desk", "phone"])
def test_tables_stay_tables(page, fastdist, size):
    """As cards, too, screen readers find rows and what each cell is."""
    chromium.resize(page.driver, *size)
    page.open(fastdist.port)
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("table") == 3
    assert roles.count("columnheader") == 12 + 4 + 9
    assert roles.count("rowheader") == 4 + 5 + 2
    names = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]}
    assert {("table", "Analyzers"), ("table", "Latency"), ("table", "Workers")} <= names
    assert {("region", "Throughput"), ("region", "Analyzers"), ("main", ""), ("banner", "")} <= names


def test_the_banner_is_announced_once(page, mocks, fastdist):
    page.open(fastdist.port)
    page.wait_for_level("ok")
    page.run(
        "window.told = 0; new MutationObserver(() => window.told++)"
        ".observe(document.getElementById('conditions'), {subtree: true, childList: true, characterData: true})"
    )
    assert page.attribute("#conditions", "role") == "status"
    mocks.set("A2", refuse=True)
    page.wait_for_level("warning")
    shown = page.text("[data-figure='stats:uptimeSeconds']")
    wait_until(lambda: page.text("[data-figure='stats:uptimeSeconds']") != shown, "the page has been drawn again")
    told = page.run("return window.told")
    shown = fastdist.stats()["uptimeSeconds"]
    wait_until(lambda: fastdist.stats()["uptimeSeconds"] > shown + 2.5, "time passes")
    assert page.run("return window.told") == told


# ---- many of them


def test_64_analyzers_are_found_and_ordered(page, many, serve):
    many.start_anew()
    fastdist = serve(many, weights=WEIGHTS)
    page.open(fastdist.port)
    rows = "return [...document.querySelectorAll('#analyzers tr')].map((row) => row.dataset.analyzer)"
    assert page.run(rows) == list(MANY)
    assert page.text(".scale") == "0 to 5 %"
    many.set("node-37", refuse=True)
    page.wait_for_state("node-37", "offline")
    page.run("document.querySelector('[name=state][value=offline]').click()")
    assert page.run(rows) == ["node-37"]
    assert page.text("[data-count=offline]") == "1"
    page.run("document.querySelector('[name=state][value=\"\"]').click()")
    page.one("#find").send_keys("NODE-1")
    assert page.run(rows) == [f"node-1{digit}" for digit in range(10)]
    page.one("#find").send_keys("xyz")
    assert page.one("#none-found").is_displayed()
    page.one("#find").clear()
    page.one("#find").send_keys(" ")
    page.one("#order").send_keys("offline first")
    wait_until(lambda: page.run(rows)[0] == "node-37", "the one that is offline comes first")
    assert not page.is_too_wide
    chromium.resize(page.driver, *PHONE, mobile=True)
    wait_until(lambda: page.run("return innerWidth") == PHONE[0], "the page is narrow")
    assert not page.is_too_wide
