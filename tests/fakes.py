"""A distributor that answers as it is told, for tests of what talks to one."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ACCEPTED = (202, {}, b'{"status":"accepted"}')


def problem(status, detail, **headers):
    return status, headers, json.dumps({"status": status, "detail": detail}).encode()


class Distributor(ThreadingHTTPServer):
    """Answers as ``script`` says (packet id -> answers, the last of them for good); notes what it accepts.

    ``says``: what it answers to GET, by path. Only what is posted is noted.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = {}
        self.otherwise = ACCEPTED
        self.says = {"/health": {"storage": "ok", "durability": "fsync", "syncIntervalSeconds": 0.5}}
        self.requests = []  # (path, headers, body)
        self.accepted = Counter()
        self.connections = 0
        self.before_answer = None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path, headers, body):
        if self.before_answer:
            self.before_answer()
        with self.lock:
            self.requests.append((path, headers, body))
            name = headers["Idempotency-Key"]
            answers = self.script.get(name, [self.otherwise])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer and 200 <= answer[0] < 300:
                self.accepted[name] += 1
            return answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    counted = False

    def do_GET(self):
        said = self.server.says.get(self.path)
        if said is None:
            self.do_POST()
        else:
            self._send(200, {}, json.dumps(said).encode())

    def do_POST(self):
        self.server.connections += not self.counted
        self.counted = True
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.answer(self.path, self.headers, body)
        if answer is None:  # hang up
            self.close_connection = True
            return
        self._send(*answer)

    def do_PATCH(self):
        self.do_POST()

    def do_DELETE(self):
        self.do_POST()

    def _send(self, status, headers, content):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
