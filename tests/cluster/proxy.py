"""A proxy between a client and a NATS server that loses bytes where a test says so."""

from __future__ import annotations

import asyncio
import contextlib


class Proxy:
    """Forwards connections to a port.

    ``lose_replies``: how many times what the server sends is lost, from a message with ``word`` in it on to the end of
    the read. ``open`` and ``answering``: whether what clients and the server send is forwarded.
    """

    def __init__(self, target):
        self.target = target
        self.word, self.lose_replies, self.lost = b"", 0, 0
        self.open = asyncio.Event()  # what clients send is forwarded
        self.open.set()
        self.answering = asyncio.Event()  # what the server sends is
        self.answering.set()
        self.sent = bytearray()  # by clients, as far as it was forwarded
        self.writers = set()
        self.tasks = set()

    async def start(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        return self

    async def serve(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        self.writers |= {writer, there_writer}
        await asyncio.gather(
            self.pump(reader, there_writer, self.open, from_server=False),
            self.pump(there_reader, writer, self.answering, from_server=True),
        )

    async def pump(self, reader, writer, gate, *, from_server):
        with contextlib.suppress(OSError):
            while True:
                await gate.wait()
                data = await reader.read(65536)
                await gate.wait()
                if not data:
                    break
                if from_server and self.lose_replies and self.word in data:
                    self.lose_replies -= 1
                    self.lost += 1
                    data = data[: data.rfind(b"\n", 0, data.rindex(b"MSG", 0, data.index(self.word))) + 1]
                if not from_server:
                    self.sent += data
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self):
        """Break all connections."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def stop(self):
        self.server.close()
        self.cut()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
