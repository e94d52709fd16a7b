"""Debian's chromium, driven by Selenium: what the browser tests and the screenshots are made with.

Nothing is downloaded: where chromium or its driver is missing, ``missing()`` says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)
# Runs before anything of the page does, and remembers what the page's policy forbade.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sourceFile}`);
});
"""


def missing() -> str:
    """Return what is missing, "" if nothing is."""
    return ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


@contextlib.contextmanager
def browsing(*more: str, width: int = 1280, height: int = 900) -> Iterator[Chrome]:
    """Start a browser with a profile of its own, and ``more`` flags; it and its profile are gone at the end."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    flags = [*FLAGS, *more, f"--window-size={width},{height}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        for flag in [*flags, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        service = ChromeService(executable_path=str(shutil.which("chromedriver")))
        driver = Chrome(options=options, service=service)
        try:
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
            yield driver
        finally:
            driver.quit()


def resize(driver: Chrome, width: int, height: int, *, mobile: bool = False, scale: float = 1) -> None:
    """Give the page this size in CSS pixels, whatever the window's is."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver: Chrome, scheme: str) -> None:
    """Have the page believe that its reader prefers ``light`` or ``dark``."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def console_errors(driver: Chrome) -> list[str]:
    """Return what the console and the policy have reported since the last call."""
    logged = [str(entry["message"]) for entry in driver.get_log("browser") if entry["level"] != "INFO"]
    violations: list[Any] = driver.execute_script("return window.violations.splice(0)")
    return [*logged, *map(str, violations)]
