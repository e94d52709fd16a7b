"""Take the pictures of the dashboard in docs/ again: real mock analyzers, a real distributor, traffic, and chromium.

Takes about three minutes, most of which is traffic for the charts.
"""

from __future__ import annotations

import base64
import math
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import chromium  # noqa: E402  (found in the path that was just added)
from selenium_page import Page  # noqa: E402
from support import Distributor, Emitter, Mocks, running, wait_until  # noqa: E402

DOCS = ROOT / "docs"
DESK = (1280, 900)
PHONE = (360, 760)
TRAFFIC = 130.0  # seconds before the first picture
OUTAGE = 40.0  # seconds an analyzer has been gone in the second


def swell(emitter: Emitter, over: threading.Event) -> None:
    """Let the traffic rise and fall, so that the charts have something to show."""
    begun = time.monotonic()
    while not over.wait(0.2):
        at = time.monotonic() - begun
        emitter.pause = 0.02 * (1.3 + math.sin(at / 17) * 0.6 + math.sin(at / 5.3) * 0.2)


def take(page: Page, name: str, *, most: int = 4000) -> None:
    """Write docs/NAME.png: the whole page, or its first ``most`` pixels."""
    width, height = page.run("return [window.innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, most), "scale": 1}
    picture = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path = DOCS / f"{name}.png"
    path.write_bytes(base64.b64decode(picture["data"]))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")


def take_all(page: Page, mocks: Mocks, fastdist: Distributor) -> None:
    """Take one picture after the other."""
    chromium.resize(page.driver, *DESK)
    page.open(fastdist.port)
    print(f"traffic for {TRAFFIC:g} s ...")
    time.sleep(TRAFFIC)
    page.wait_for_level("ok")
    take(page, "dashboard")
    chromium.prefer(page.driver, "dark")
    take(page, "dashboard-dark")
    chromium.prefer(page.driver, "light")
    mocks.set("A2", refuse=True)
    page.wait_for_state("A2", "offline")
    time.sleep(OUTAGE)
    take(page, "dashboard-analyzer-down")
    chromium.resize(page.driver, *PHONE, mobile=True, scale=2)
    wait_until(lambda: page.run("return window.innerWidth") == PHONE[0], "the page is that of a phone")
    time.sleep(1.5)  # it is drawn again
    take(page, "dashboard-phone", most=1500)
    errors = chromium.console_errors(page.driver)
    if errors:
        sys.exit("\n".join(errors))


def main() -> None:
    """Start everything, take the pictures, end everything."""
    if missing := chromium.missing():
        sys.exit(f"missing: {missing}; scripts/peers.sh installs it")
    mocks = Mocks()
    over = threading.Event()
    with running(mocks), tempfile.TemporaryDirectory() as folder:
        mocks.set_all(latency=0.006, jitter=0.012)
        fastdist = Distributor(Path(folder), mocks, {"queue": {"durability": "disk"}})
        with running(fastdist), chromium.browsing() as driver:
            emitter = Emitter(fastdist.port, connections=12).start()
            threading.Thread(target=swell, args=(emitter, over), daemon=True).start()
            try:
                take_all(Page(driver), mocks, fastdist)
            finally:
                over.set()
                emitter.stop()


if __name__ == "__main__":
    main()
