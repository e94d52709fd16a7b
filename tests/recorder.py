"""An analyzer that keeps the bytes of each request, for tests of what it is sent, and over which connections."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from typing import NamedTuple


class Received(NamedTuple):
    """A request: the lines of its head, and its body."""

    lines: list[bytes]
    body: bytes

    @property
    def is_check(self):
        return self.lines[0].startswith(b"GET ")

    def values(self, name):
        """Return the values of all headers with that name, in any case, byte for byte."""
        pairs = [line.split(b":", 1) for line in self.lines[1:]]
        return [value.removeprefix(b" ") for key, value in pairs if key.lower() == name.lower()]

    @property
    def ids(self):
        return b",".join(self.values(b"X-Packet-Id") + self.values(b"X-Packet-Ids")).decode().split(",")


class Recorder:
    """Listens on a free port, with TLS if there is a ``context``; a thread for each connection.

    ``latency``: seconds before each answer to a packet. ``answer(request)``: status and body for one.
    """

    def __init__(self, context=None, *, latency=0.0, answer=lambda _request: (200, b"")):
        self.context, self.latency, self.answer = context, latency, answer
        self.requests = []
        self.names_asked = []  # over TLS
        self.open = self.peak_open = 0  # connections that packets came on
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        if context is not None:
            context.sni_callback = lambda _socket, name, _context: self.names_asked.append(name)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self):
        return f"http{'s' if self.context else ''}://127.0.0.1:{self.port}/analyze"

    @property
    def packets(self):
        return [request for request in list(self.requests) if not request.is_check]

    @property
    def checks(self):
        return [request for request in list(self.requests) if request.is_check]

    @property
    def ids(self):
        """The ids of all packets that were answered or will be, in the order they came."""
        return [name for request in self.packets for name in request.ids]

    def close(self):
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        carries_packets = False
        with contextlib.suppress(OSError), contextlib.closing(connection):
            if self.context is not None:
                connection = self.context.wrap_socket(connection, server_side=True)
            stream = connection.makefile("rb")
            while (request := self._read(stream)) is not None:
                if not request.is_check and not carries_packets:
                    carries_packets = True
                    self._count(1)
                self.requests.append(request)
                status, body = (200, b"") if request.is_check else self._decide(request)
                connection.sendall(b"HTTP/1.1 %d Reason\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
        if carries_packets:
            self._count(-1)
        with contextlib.suppress(OSError, ssl.SSLError):
            connection.close()

    def _decide(self, request):
        time.sleep(self.latency)
        return self.answer(request)

    def _count(self, change):
        with self._lock:
            self.open += change
            self.peak_open = max(self.peak_open, self.open)

    def _read(self, stream):
        lines = []
        while (line := stream.readline()) not in (b"\r\n", b""):
            lines.append(line.removesuffix(b"\r\n"))
        if not lines:
            return None
        request = Received(lines, b"")
        length = request.values(b"Content-Length")
        return Received(lines, stream.read(int(length[0]))) if length else request
