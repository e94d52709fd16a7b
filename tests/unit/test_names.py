"""Look-ups of names: shared, kept for a moment, and blocking no other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import Counter

import pytest

from fastdist.net import names
from fastdist.net.names import Names

SECONDS = 20.0  # only a broken test waits so long


def infos(*addresses):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]


class Resolver:
    """Stands for the system's: ``answers`` by name (addresses, an error, or an event to wait for before ``late``)."""

    def __init__(self, real):
        self.real, self.answers, self.asked = real, {}, Counter()
        self.late = infos("127.0.0.9")

    def getaddrinfo(self, host, *args, flags=0, **options):
        if flags & socket.AI_NUMERICHOST:
            return self.real(host, *args, flags=flags, **options)
        self.asked[host] += 1
        answer = self.answers[host]
        if isinstance(answer, threading.Event):
            assert answer.wait(SECONDS)
            answer = self.late
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def resolver(monkeypatch):
    resolver = Resolver(socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
    yield resolver
    for answer in resolver.answers.values():
        if isinstance(answer, threading.Event):
            answer.set()


def addresses(found):
    return [info[4] for info in found]


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110  (what it waits for happens in threads)
            await asyncio.sleep(0.001)


def test_names_that_hang_delay_no_other(resolver, monkeypatch):
    monkeypatch.setattr(names, "LONG", 0.01)
    hanging = [f"slow{number}.test" for number in range(2 * names.AT_ONCE)]
    resolver.answers = {host: threading.Event() for host in hanging} | {"good.test": infos("127.0.0.1")}

    async def scenario():
        known = Names()
        waiting = [asyncio.ensure_future(known.infos(host, 80, SECONDS)) for host in hanging]
        await until(lambda: len(resolver.asked) == len(hanging))
        assert addresses(await known.infos("good.test", 80, SECONDS)) == [("127.0.0.1", 80)]
        assert not any(each.done() for each in waiting)
        for each in waiting:
            each.cancel()

    asyncio.run(scenario())


def test_one_lookup_serves_all_requests(resolver):
    resolver.answers = {"a.test": threading.Event()}

    async def scenario():
        known = Names()
        asking = [asyncio.ensure_future(known.infos("a.test", port, SECONDS)) for port in range(20)]
        await until(lambda: resolver.asked)
        resolver.answers["a.test"].set()
        assert [addresses(found) for found in await asyncio.gather(*asking)] == [
            [("127.0.0.9", port)] for port in range(20)
        ]
        await known.infos("a.test", 80, SECONDS)
        assert resolver.asked == {"a.test": 1}

    asyncio.run(scenario())


def test_hanging_lookup_is_logged_by_name(resolver):
    resolver.answers = {"a.test": threading.Event()}

    async def scenario():
        known = Names()
        for _ in range(2):
            with pytest.raises(OSError, match=r"the name a\.test cannot be looked up: no answer within 0\.05 s"):
                await known.infos("a.test", 80, 0.05)
        assert resolver.asked == {"a.test": 1}

    asyncio.run(scenario())


def test_stale_answer_is_used_until_the_next(resolver, monkeypatch):
    monkeypatch.setattr(names, "FRESH", 0.0)
    resolver.answers = {"a.test": infos("127.0.0.1")}

    async def scenario():
        known = Names()
        assert addresses(await known.infos("a.test", 1, SECONDS)) == [("127.0.0.1", 1)]
        resolver.answers["a.test"] = threading.Event()
        for _ in range(3):
            assert addresses(await known.infos("a.test", 1, SECONDS)) == [("127.0.0.1", 1)]
            assert known.current("a.test") == {"127.0.0.1"}
        resolver.answers["a.test"].set()
        await until(lambda: known.current("a.test") == {"127.0.0.9"})

    asyncio.run(scenario())


def test_an_old_answer_waits_for_the_next(resolver, monkeypatch):
    monkeypatch.setattr(names, "FRESH", 0.0)
    monkeypatch.setattr(names, "OLD", 0.0)
    resolver.answers = {"a.test": infos("127.0.0.1")}

    async def scenario():
        known = Names()
        monkeypatch.setattr(names, "MOMENT", SECONDS)
        await known.infos("a.test", 1, SECONDS)
        resolver.answers["a.test"] = infos("127.0.0.2")
        assert addresses(await known.infos("a.test", 1, SECONDS)) == [("127.0.0.2", 1)]
        monkeypatch.setattr(names, "MOMENT", 0.01)
        resolver.answers["a.test"] = threading.Event()  # and is used when that does not come
        assert addresses(await known.infos("a.test", 1, SECONDS)) == [("127.0.0.2", 1)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), {"127.0.0.1"}),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), set()),
    ],
    ids=["no answer", "no such name"],
)
def test_addresses_outlive_servers_not_names(resolver, monkeypatch, error, left):
    monkeypatch.setattr(names, "FRESH", 0.0)
    monkeypatch.setattr(names, "FAILED", 0.0)
    resolver.answers = {"a.test": infos("127.0.0.1")}

    async def scenario():
        known = Names()
        await known.infos("a.test", 80, SECONDS)
        resolver.answers["a.test"] = error
        before = resolver.asked["a.test"]
        await until(lambda: known.current("a.test") is not None and resolver.asked["a.test"] > before + 2)
        assert known.current("a.test") == left
        with contextlib.nullcontext() if left else pytest.raises(OSError, match="Name or service not known"):
            await known.infos("a.test", 80, SECONDS)
        resolver.answers["a.test"] = infos("127.0.0.2")
        await until(lambda: known.current("a.test") == {"127.0.0.2"})

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_addresses_are_never_looked_up(resolver, host):
    async def scenario():
        known = Names()
        assert [address[:2] for address in addresses(await known.infos(host, 80, SECONDS))] == [(host, 80)]
        assert known.current(host) == set()
        assert not resolver.asked

    asyncio.run(scenario())


def test_failed_address_is_tried_last(resolver, monkeypatch):
    resolver.answers = {"a.test": infos("127.0.0.1", "127.0.0.2", "127.0.0.3")}

    async def scenario():
        known = Names()
        known.deprioritize("b.test", "127.0.0.1")  # not a name that is in use
        await known.infos("a.test", 0, SECONDS)
        known.deprioritize("a.test", "127.0.0.1")
        found = await known.infos("a.test", 0, SECONDS)
        assert [address for address, _ in addresses(found)] == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
        monkeypatch.setattr(names, "BEHIND", -1.0)
        known.deprioritize("a.test", "127.0.0.1")
        assert addresses(await known.infos("a.test", 0, SECONDS))[0] == ("127.0.0.1", 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), UnicodeError("label too long")], ids=str)
def test_any_failed_lookup_is_a_lookup_error(resolver, monkeypatch, error):
    resolver.answers = {"a.test": error}
    if isinstance(error, RuntimeError):
        monkeypatch.setattr(threading.Thread, "start", lambda _thread: (_ for _ in ()).throw(error))

    async def scenario():
        with pytest.raises(OSError, match=f"the name a.test cannot be looked up: {error}"):
            await Names().infos("a.test", 80, SECONDS)

    asyncio.run(scenario())
