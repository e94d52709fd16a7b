"""Draw the pictures of ``fastdist top`` and ``fastdist send`` in docs/ again: real servers, real traffic, as SVG.

What is drawn is what the commands show, made by the code that shows it. Takes about a minute.
"""

from __future__ import annotations

import io
import json
import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support import Distributor, Emitter, Mocks, running  # noqa: E402  (found in the path that was just added)

from fastdist.client.connection import Target  # noqa: E402
from fastdist.client.logfile import Trail  # noqa: E402
from fastdist.client.offsets import OffsetFile  # noqa: E402
from fastdist.client.packing import Recipe, Style  # noqa: E402
from fastdist.client.send import Shipper  # noqa: E402
from fastdist.client.send_view import SendView  # noqa: E402
from fastdist.client.top import Watcher  # noqa: E402
from fastdist.client.top_view import History, render  # noqa: E402

DOCS = ROOT / "docs"
WIDTH, SEND_WIDTH = 150, 120  # columns
FRAMES = 40  # of one second, before a picture
OUTAGE = 15  # frames an analyzer has been gone in the second picture
LINES = 400_000
SHOWN_URL = "http://logs.example:3000"  # instead of this machine's port
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # which rich would have loaded from elsewhere


def recorder(width: int) -> Console:
    """Return a terminal that remembers what it shows, and shows it nowhere."""
    return Console(record=True, force_terminal=True, width=width, highlight=False, file=io.StringIO())


def save(console: Console, name: str, title: str) -> None:
    """Write docs/NAME.svg."""
    path = DOCS / f"{name}.svg"
    path.write_text(FONTS.sub("", console.export_svg(title=title, unique_id=name)))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")


def draw_top(watcher: Watcher, history: History, name: str, frames: int) -> None:
    """Look for so many seconds, then draw."""
    for _ in range(frames):
        frame = watcher.look()
        if frame.responses is None:
            sys.exit(f"no answer: {frame.trouble}")
        history.add(frame.responses)
        time.sleep(1)
    console = recorder(WIDTH)
    frame = watcher.look()._replace(url=SHOWN_URL)
    console.print(render(frame, WIDTH, None, history))
    save(console, name, "fastdist top")


def swell(emitter: Emitter, over: threading.Event) -> None:
    """Let the traffic change, so that there is something to see."""
    while not over.wait(0.5):
        emitter.pause = random.uniform(0.01, 0.05)


def write_log(path: Path) -> None:
    """Write a log of text and JSON."""
    with path.open("w") as log:
        for number in range(LINES):
            text = f"GET /cart/{number % 977} 200 in {number % 37} ms"
            log.write(f"{json.dumps({'message': text, 'level': 'info'}) if number % 3 else text}\n")


def draw_send(folder: Path, url: str) -> None:
    """Send a log; draw the bar when half of it is sent, and the end."""
    log = folder / "access.log"
    write_log(log)
    console = recorder(SEND_WIDTH)
    command = Text(f"$ fastdist send access.log --url {SHOWN_URL} --offset-file access.offset", style="bold")
    console.print(command)
    view = SendView(console=console)
    half = log.stat().st_size * 0.55
    drawn: list[str] = []
    accepted = view.accepted

    def accepted_and_drawn(packet):  # noqa: ANN001, ANN202  (as the view has it)
        accepted(packet)
        if not drawn and view.bar.tasks[0].completed > half:
            drawn.append("now")
            console.print(view.bar.get_renderable())
            save(console, "send", "fastdist send")

    view.accepted = accepted_and_drawn  # type: ignore[method-assign]
    shipper = Shipper(Target.parse(url, None), 8, 60.0, view)
    started = time.monotonic()
    # The bar is not started: what is drawn is one state of it, not the redrawing.
    with OffsetFile(folder / "access.offset") as offsets:
        trail = Trail(log, Recipe(Style("web-42", "access.log")), view.note)
        shipper.run(trail.sources(offsets, shipper.is_stopping), offsets, follow=False)
    done = recorder(SEND_WIDTH)
    done.print(command)
    for line in shipper.summary.lines(time.monotonic() - started):
        done.print(line)
    done.print(f"all is accepted up to byte {shipper.summary.offset}, as access.offset says")
    save(done, "send-done", "fastdist send")


def main() -> None:
    """Draw all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mocks = Mocks()
        with running(mocks):
            mocks.set_all(latency=0.002, jitter=0.004)
            fastdist = Distributor(folder, mocks, {"queue": {"durability": "disk"}})
            with running(fastdist):
                url = f"http://127.0.0.1:{fastdist.port}"
                draw_send(folder, url)
                watcher, history = Watcher(Target.parse(url, None)), History()
                emitter = Emitter(fastdist.port, 16).start()
                over = threading.Event()
                threading.Thread(target=swell, args=(emitter, over), daemon=True).start()
                draw_top(watcher, history, "top", FRAMES)
                mocks.set("A2", refuse=True)
                draw_top(watcher, history, "top-analyzer-down", OUTAGE)
                over.set()
                emitter.stop()


if __name__ == "__main__":
    main()
