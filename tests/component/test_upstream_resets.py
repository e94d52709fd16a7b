"""An analyzer resets a connection behind its replies, and a send finds that out before they are read."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from upstream_harness import OK, PATIENCE, World, endpoint, reply, requests_in, reset_behind, run


class ResettingServer:
    """A server that answers when it is told to. It notes the ids and the attempt of each request."""

    def __init__(self, listener):
        self.listener, self.ids, self.attempts = listener, [], []

    async def accept(self):
        self.connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)

    async def get(self, count):
        """Wait for so many requests."""
        data = b""
        while data.count(b"\r\n\r\n") < count:
            data += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.connection, 65536), PATIENCE)
        for request in requests_in(data):
            self.ids.extend(request.ids)
            self.attempts.append(request.headers["X-Attempt"])


@contextlib.asynccontextmanager
async def resetting(tmp_path, **delivery):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        delivery = {"connections": 1, "timeout": 60.0} | delivery
        async with World(
            tmp_path, {"A1": endpoint(listener.getsockname()[1])}, delivery=delivery, health={"fall": 1}
        ) as w:
            server = ResettingServer(listener)
            w.push(2)
            await server.accept()
            yield w, server
            server.connection.close()


@pytest.mark.parametrize("size", [0, 70_000])  # more than one read brings
def test_replies_before_a_reset_count(tmp_path, size):
    """A server closes a pipelined connection behind some replies: what they settle is not delivered again."""

    async def scenario():
        async with resetting(tmp_path, pipeline=4) as (w, server):
            await server.get(2)
            (connection,) = w.pools[0].connections
            reset_behind(reply(200, body=b"x" * size) + OK, server.connection, connection.transport)
            w.push(1)
            w.dispatcher.flush()  # it is sent before the replies are read
            w.push(1)
            await server.accept()
            await server.get(2)
            server.connection.send(OK * 2)
            await w.until_empty()
            assert (w.delivered(0), w.counters.get_of(0, "failed")) == (4, 0)
            assert len(server.ids) == len(set(server.ids)) == 4
            assert sorted(server.attempts) == ["1", "1", "1", "2"]  # the last was not tried where nothing could be sent

    run(scenario())


def test_an_unsent_request_has_no_reply(tmp_path):
    """What lies unread on an idle connection that was reset is no reply to the request that finds that out."""

    async def scenario():
        async with resetting(tmp_path) as (w, server):
            for _ in range(2):
                await server.get(1)
                server.connection.send(OK)
            await w.until_empty()
            (connection,) = w.pools[0].connections
            reset_behind(reply(400), server.connection, connection.transport)
            w.push(1)
            w.dispatcher.flush()
            await server.accept()
            await server.get(1)
            server.connection.send(OK)
            await w.until_empty()
            assert (w.delivered(0), w.counters.get_of(0, "failed")) == (3, 0)  # none was refused
            assert w.states.error(0) == ""

    run(scenario())
