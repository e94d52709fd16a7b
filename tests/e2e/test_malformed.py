"""Twenty thousand broken requests over real sockets: nothing falls, nothing hangs, nothing slips through."""

from __future__ import annotations

import asyncio
import json
import random
import re

import pytest
from support import BODY, own_body

HEAD = "POST /logs HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nIdempotency-Key: {}\r\n"
STATUSES = {200, 202, 400, 404, 405, 408, 413, 415, 417, 431, 501, 505}  # "none of ours" is no reason for a 500
ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def packet(name, body=BODY):
    return (HEAD.format(name) + f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def flip(rng, data, first=0):
    """Change one to five bytes from ``first`` on."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        changed[rng.randrange(first, len(data))] ^= rng.randint(1, 255)
    return bytes(changed)


def cut(rng, data):
    return data[: rng.randrange(1, len(data))]


def doubled(rng, data):
    """Repeat a part of it, or leave it out."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 60))
    return data[:end] + data[start:] if rng.random() < 0.5 else data[:start] + data[end:]


def chunked(rng, name):
    """The same packet in chunks, whose sizes may lie."""
    body, parts = BODY, []
    while body:
        size = rng.randint(1, 200)
        parts.append(b"%x\r\n%b\r\n" % (len(body[:size]), body[:size]))
        body = body[size:]
    whole = (HEAD.format(name) + "Transfer-Encoding: chunked\r\n\r\n").encode() + b"".join(parts) + b"0\r\n\r\n"
    return flip(rng, whole, len(HEAD)) if rng.random() < 0.8 else whole


def oversized(rng, name):
    kind = rng.randrange(4)
    if kind == 0:
        return (HEAD.format(name) + f"Content-Length: {10 ** rng.randint(6, 25)}\r\n\r\n").encode() + BODY
    if kind == 1:
        return (HEAD.format(name) + "X: " + "y" * 20_000 + "\r\n\r\n").encode()
    if kind == 2:
        return HEAD.format("z" * rng.randint(65, 5000)).encode() + b"Content-Length: 2\r\n\r\n{}"
    return (HEAD.format(name) + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n").encode() + BODY


def broken_request(rng, name):
    whole = packet(name)
    kind = rng.randrange(6)
    if kind == 0:
        return flip(rng, whole)
    if kind == 1:
        return cut(rng, whole)
    if kind == 2:
        return doubled(rng, whole)
    if kind == 3:
        return chunked(rng, name)
    if kind == 4:
        return oversized(rng, name)
    return flip(rng, whole + packet(f"{name}-next"), len(whole) - 10)  # the second of two on one connection


async def send_alone(port, data):
    """Send, close our side, and return the statuses that came until the other side closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        received = bytearray()
        while part := await reader.read(65536):
            received += part
    except ConnectionError:
        return None
    finally:
        writer.close()
    return [int(status) for status in ANSWER.findall(received)]


@pytest.mark.slow
def test_20_000_broken_requests(mocks, serve):
    """Half break the HTTP, each on a connection of its own; half break the packet inside, on a few connections."""
    mocks.set_all(verify=True)
    fastdist = serve(mocks)
    rng = random.Random(7)
    outcomes: dict[str, list[int] | None] = {}

    async def emit_broken_http(numbers):
        for number in numbers:
            name = f"http-{number}"
            outcomes[name] = await asyncio.wait_for(send_alone(fastdist.port, broken_request(rng, name)), 30)

    async def emit_broken_packets(numbers):
        reader, writer = await asyncio.open_connection("127.0.0.1", fastdist.port)
        for number in numbers:
            name = f"packet-{number}"
            body = own_body(name)
            writer.write(packet(name, rng.choice((flip, cut, doubled))(rng, body)))
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))
            outcomes[name] = [int(head[9:12])]
        writer.close()

    async def emit_all():
        await asyncio.gather(
            *(emit_broken_http(range(first, 10_000, 24)) for first in range(24)),
            *(emit_broken_packets(range(first, 10_000, 8)) for first in range(8)),
        )

    asyncio.run(emit_all())
    assert len(outcomes) == 20_000
    cut_off = [name for name, statuses in outcomes.items() if statuses is None]
    statuses = [status for each in outcomes.values() for status in each or []]
    assert set(statuses) <= STATUSES
    assert {202, 400, 413, 431} <= set(statuses)
    stats = fastdist.wait_at_rest()
    assert [row["restarts"] for row in stats["workers"]] == [0, 0]
    accepted = statuses.count(202)
    assert accepted <= stats["packets"]["accepted"] <= accepted + 2 * len(cut_off)
    assert len(cut_off) < 100, "answers were lost in resets"
    assert stats["packets"]["delivered"] == stats["packets"]["accepted"]
    assert sum(mocks.totals(name)["acknowledged"] for name in mocks.ids) == stats["packets"]["delivered"]
    assert all(mocks.totals(name)["broken"] == 0 for name in mocks.ids), "what is no JSON was let through"
    assert stats["packets"]["deadLettered"] == 0
    assert not [line for line in fastdist.lines if "Traceback" in line or json.loads(line).get("level") == "error"]
    assert fastdist.post()[0] == 202


def test_request_is_same_wherever_split(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1}})
    body = b'{"emitterId":"e","messages":[{"message":"m"}]}'

    async def in_two(cut):
        data = packet(f"cut-{cut}", body)
        reader, writer = await asyncio.open_connection("127.0.0.1", fastdist.port)
        writer.write(data[:cut])
        await asyncio.sleep(0.02)
        writer.write(data[cut:])
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.close()
        return int(head[9:12])

    async def all_cuts():
        return await asyncio.gather(*(in_two(cut) for cut in range(1, len(packet("cut-1", body)))))

    statuses = asyncio.run(all_cuts())
    assert set(statuses) == {202}
    fastdist.wait_at_rest()
    assert mocks.delivered() == {f"cut-{number + 1}": 1 for number in range(len(statuses))}
