"""Use an installed fastdist where nothing else of this project is: ``wheel_smoke.py COMMAND``.

Only the standard library is there, and the current folder is for us to write in.
"""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PACKET = b'{"emitterId":"wheel","messages":[{"message":"hello"}]}'
CONFIG = """
[server]
host = "127.0.0.1"
port = 0
workers = 1

[queue]
path = "data"
capacity = "8MiB"

[[analyzers]]
id = "only"
endpoint = "http://127.0.0.1:{}/analyze"
weight = 1
"""


class Analyzer(BaseHTTPRequestHandler):
    """Takes everything, and keeps it for the test."""

    taken: queue.Queue[bytes] = queue.Queue()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.taken.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer()

    def answer(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def look_at_dashboard(url):
    """See that the page is there, and everything it names or a script of it imports."""
    to_see, seen = [""], set()
    while to_see:
        path = to_see.pop()
        seen.add(path)
        with urllib.request.urlopen(f"{url}/{path}", timeout=20) as response:
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; "), path
            text = response.read().decode()
        named = re.findall(r'"(dashboard/[\w.]+)"', text) + [
            f"dashboard/{name}" for name in re.findall(r'from "./([\w.]+)"', text)
        ]
        to_see.extend(set(named) - seen - set(to_see))
    assert seen >= {"dashboard/app.js", "dashboard/style.css", "dashboard/icon.svg", "dashboard/dom.js"}, seen


def main(command):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Analyzer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Path("fastdist.toml").write_text(CONFIG.format(server.server_port))
    subprocess.run([command, "check", "fastdist.toml"], check=True)
    service = subprocess.Popen([command, "serve", "--config", "fastdist.toml"], stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, service.kill)
    watchdog.start()
    try:
        for line in service.stderr:
            sys.stderr.write(line)
            if "fastdist is ready" in line:
                break
        else:
            sys.exit("the service did not start")
        threading.Thread(target=lambda: sys.stderr.writelines(service.stderr), daemon=True).start()
        url = json.loads(line)["url"]
        look_at_dashboard(url)
        request = urllib.request.Request(url + "/logs", PACKET, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            assert response.status == 202, response.status
        assert Analyzer.taken.get(timeout=20) == PACKET
        service.send_signal(signal.SIGTERM)
        assert service.wait(40) == 0, service.returncode
    finally:
        watchdog.cancel()
        service.kill()


if __name__ == "__main__":
    main(sys.argv[1])
