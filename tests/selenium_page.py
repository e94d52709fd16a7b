"""The dashboard as its reader has it: what can be seen, clicked and typed. Everything is waited for."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import chromium
from selenium.webdriver import ActionChains
from support import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

# A name that leads here and is not one of this machine's own: what another's page can claim (DNS rebinding).
ELSEWHERE = "dashboard.example"


class Page:
    """A dashboard in a browser. ``forgiven``: patterns of what the console may report in this test."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self.forgiven: list[str] = []

    def open(self, port: int, host: str = "127.0.0.1") -> Page:
        """Open the dashboard, and wait until it shows figures."""
        self.driver.get(f"http://{host}:{port}/")
        wait_until(lambda: self.attribute("#live", "data-state") == "live", "the dashboard is live")
        return self

    def leave(self) -> None:
        """Leave nothing behind for the next test."""
        for command in ("Emulation.clearDeviceMetricsOverride", "Emulation.setEmulatedMedia"):
            self.driver.execute_cdp_cmd(command, {})
        self.run("sessionStorage.clear()")
        self.driver.get("about:blank")

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def run_module(self, name: str, body: str, *arguments: object) -> Any:
        """Run ``body``, with what a script of the dashboard exports as ``m`` and the arguments as ``a``."""
        script = f"""
            const done = arguments[arguments.length - 1], a = [...arguments].slice(0, -1);
            import("/dashboard/{name}.js").then((m) => done({{value: (() => {{ {body} }})()}}))
              .catch((error) => done({{error: String(error)}}));
        """
        answer = self.driver.execute_async_script(script, *arguments)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> WebElement:
        (element,) = self.all(css)
        return element

    def text(self, css: str) -> str:
        """Return the text of the one element, as it can be seen, on one line; "" if none of it can."""
        return " ".join(self.one(css).text.split())

    def attribute(self, css: str, name: str) -> str | None:
        return self.run("return document.querySelector(arguments[0])?.getAttribute(arguments[1])", css, name)

    def click(self, css: str) -> None:
        self.one(css).click()

    def wait_for_text(self, css: str, text: str) -> str:
        """Wait until the one element's text has ``text`` in it; return it."""

        def look() -> str | None:
            shown = self.text(css)
            return shown if text in shown else None

        return str(wait_until(look, f"{css} shows {text!r}"))

    def wait_for_state(self, analyzer: str, state: str) -> None:
        row = f"[data-analyzer={analyzer}]"
        wait_until(lambda: self.attribute(row, "data-state") == state, f"{analyzer} is shown {state}")

    def wait_for_level(self, level: str) -> None:
        wait_until(lambda: self.attribute("#banner", "data-level") == level, f"the banner is {level}")

    def cells(self, analyzer: str) -> dict[str, str]:
        """Return {what the cell is: its text} of an analyzer's row."""
        cells = self.all(f"[data-analyzer={analyzer}] td")
        return {str(cell.get_attribute("data-label")): " ".join(cell.text.split()) for cell in cells}

    def keys(self, *keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    @property
    def focused(self) -> str:
        """What has the focus: its label, or else its text or id."""
        return str(
            self.run(
                "const e = document.activeElement, named = e.matches('a, button') && e.textContent.trim();"
                "return e.getAttribute('aria-label') ?? (named || e.id)"
            )
        ).strip()

    @property
    def is_too_wide(self) -> bool:
        """Whether there is anything to scroll to sideways."""
        return bool(self.run("return document.documentElement.scrollWidth > document.documentElement.clientWidth"))


@contextmanager
def watched(driver: Chrome) -> Iterator[Page]:
    """Have a dashboard to be opened; see that in the end neither console nor policy have reported anything."""
    page = Page(driver)
    yield page
    errors = [
        line for line in chromium.console_errors(driver) if not any(re.search(each, line) for each in page.forgiven)
    ]
    page.leave()
    assert errors == []
