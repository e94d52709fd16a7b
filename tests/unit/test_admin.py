"""Who may change a running service, what they may ask for, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from structlog.testing import capture_logs

from fastdist.errors import ConfigError, Fault, StartError
from fastdist.http import stats
from fastdist.http.admin import RefusedError, authorize, has_token, is_loopback, is_own_page, parse_override
from fastdist.ipc import Action
from fastdist.net.tls import read_pair
from fastdist.settings import Analyzer, Config, Queue, Security
from fastdist.shm.block import AnalyzerWord, SharedBlock
from fastdist.shm.snapshot import Snapshot
from fastdist.storage.jetstream.state import Value
from fastdist.supervisor.overrides import Override
from fastdist.supervisor.reload import Changes
from fastdist.supervisor.stream import SharedStream

AUTHORITY = trustme.CA()
UNREADABLE = [b'{"A1": {"weight": ', b'{"A1": {"weight": -0.5}}', b'{"A\xff": {}}', b'{"A1": {"x": ' + b"[" * 100_000]
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def analyzers(*weights: float, port: int = 4000) -> tuple[Analyzer, ...]:
    return tuple(
        Analyzer(id=f"A{n}", endpoint=f"http://127.0.0.1:{port + n}/analyze", weight=weight)
        for n, weight in enumerate(weights, 1)
    )


@pytest.fixture
def block():
    return SharedBlock.create(2, 8)


def changes(block, folder, *weights: float) -> Changes:
    made = Changes(Config(analyzers=analyzers(*weights)), block, folder)
    made.begin()
    return made


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("127.3.4.5", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2001:db8::1", False),
        ("", False),
        ("localhost", False),
    ],
)
def test_loopback_addresses(address, local):
    assert is_loopback(address) is local


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://127.0.0.1:3000", "127.0.0.1:3000", True),
        ("http://localhost:3000", "localhost:3000", True),
        ("https://[::1]:3000", "[::1]:3000", True),
        ("http://127.0.0.1:8080", "127.0.0.1:3000", False),
        ("http://localhost:3000", "127.0.0.1:3000", False),
        ("https://evil.example", "127.0.0.1:3000", False),
        ("http://evil.example:3000", "evil.example:3000", False),  # a name that was made to resolve to this machine
        ("null", "127.0.0.1:3000", False),
        ("", "", False),
        ("http://[", "[", False),
    ],
)
def test_pages_of_the_service_itself(origin, host, own):
    assert is_own_page(origin, host) is own


@pytest.mark.parametrize(
    ("authorization", "known"),
    [
        ("Bearer one", True),
        ("bearer two", True),
        ("BEARER   two  ", True),
        ("Bearer three", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Basic one", False),
        ("one", False),
        ("", False),
        (None, False),
        ("Bearer ö", False),
    ],
)
def test_only_known_tokens_are_accepted(authorization, known):
    assert has_token(authorization, ["one", "two"]) is known


@pytest.mark.parametrize(
    ("body", "action"),
    [
        (b'{"weight": 0.2}', Action("override", "A1", 0.2, None)),
        (b'{"weight": 0}', Action("override", "A1", 0.0, None)),
        (b'{"state": "draining"}', Action("override", "A1", None, True)),
        (b'{"state": "online", "weight": 3}', Action("override", "A1", 3.0, False)),
    ],
)
def test_changes_that_can_be_asked_for(body, action):
    assert parse_override("A1", body) == action


@pytest.mark.parametrize(
    ("body", "status", "pointers"),
    [
        (b"", 400, []),
        (b"{", 400, []),
        (b"[]", 422, []),
        (b"{}", 422, []),
        (b'{"weight": -1}', 422, ["/weight"]),
        (b'{"weight": "1"}', 422, ["/weight"]),
        (b'{"weight": null}', 422, ["/weight"]),
        (b'{"weight": true}', 422, ["/weight"]),
        (b'{"weight": 1e101}', 422, ["/weight"]),
        (b'{"weight": 1%s}' % (b"0" * 400), 422, ["/weight"]),
        (b'{"weight": 1e999}', 422, ["/weight"]),
        (b'{"weight": -1e999}', 422, ["/weight"]),
        (b'{"weight": NaN}', 400, []),
        (b'{"weight": Infinity}', 400, []),
        (b"[" * 100_000, 400, []),
        (b'{"state": "\xff"}', 400, []),
        (b'{"state": "offline"}', 422, ["/state"]),
        (b'{"state": null}', 422, ["/state"]),
        (b'{"state": ["online"]}', 422, ["/state"]),
        (b'{"state": {}}', 422, ["/state"]),
        (b'{"wait/~": 1, "weight": 1}', 422, ["/wait~1~0"]),
    ],
)
def test_changes_that_make_no_sense(body, status, pointers):
    with pytest.raises(RefusedError) as error:
        parse_override("A1", body)
    assert error.value.status == status
    assert [fault["pointer"] for fault in error.value.errors] == pointers


def test_override_is_applied_stored_undone(block, tmp_path):
    (tmp_path / "queue").mkdir()
    it = changes(block, tmp_path / "queue", 1, 1)
    epoch = block.analyzers.epoch
    assert it.apply(Action("override", "A1", 5.0, None)) == (200, None)
    assert it.apply(Action("override", "A1", None, True)) == (200, None)
    assert block.analyzers.epoch > epoch
    assert block.analyzers.weight(0) == 5.0
    assert block.analyzers.get(0, AnalyzerWord.DRAINING) == 1
    assert json.loads((tmp_path / "queue" / "overrides.json").read_text()) == {"A1": {"weight": 5.0, "draining": True}}

    later = SharedBlock.create(2, 8)
    again = changes(later, tmp_path / "queue", 1, 1)
    assert later.analyzers.weight(0) == 5.0
    assert later.analyzers.get(0, AnalyzerWord.WEIGHT_OVERRIDDEN) == 1
    assert again.apply(Action("override", "A1", None, False)) == (200, None)
    assert later.analyzers.get(0, AnalyzerWord.DRAINING) == 0
    assert again.apply(Action("clear", "A1")) == (200, None)
    assert later.analyzers.weight(0) == 1.0
    assert json.loads((tmp_path / "queue" / "overrides.json").read_text()) == {}


def test_last_analyzer_cannot_be_removed(block, tmp_path):
    it = changes(block, tmp_path, 1, 0)
    assert it.apply(Action("override", "A2", None, True))[0] == 200
    assert it.apply(Action("override", "A1", None, True))[0] == 422
    assert it.apply(Action("override", "A1", 0.0, None))[0] == 422
    assert it.apply(Action("clear", "A2"))[0] == 200
    assert it.apply(Action("override", "A1", None, True))[0] == 200  # A2 has weight 0: it is for need, and this is need
    assert it.apply(Action("override", "A9", 1.0, None))[0] == 404


def test_unstored_override_is_not_applied(block, tmp_path):
    (tmp_path / "file").write_text("")
    it = changes(block, tmp_path / "file", 1, 1)
    status, why = it.apply(Action("override", "A1", 5.0, None))
    assert status == 503
    assert "cannot be stored" in str(why)
    assert block.analyzers.weight(0) == 1.0


def test_unreachable_overrides_are_told(block, tmp_path):
    """Of a service whose queue is in memory: it starts nevertheless."""
    (tmp_path / "file").touch()
    it = changes(block, tmp_path / "file" / "queue", 1, 1)
    assert it.overrides.fault.startswith("cannot be read: ")
    assert block.analyzers.weight(0) == 1.0


@pytest.mark.parametrize("how", ["deleted", "exchanged", "the folder is another one"])
def test_overrides_outlive_their_file(block, tmp_path, how):
    folder = tmp_path / "queue"
    folder.mkdir()
    changes(block, folder, 1, 1).apply(Action("override", "A1", 4.0, None))
    it = changes(block, folder, 1, 1)  # has read them, and not written
    written = (folder / "overrides.json").read_text()
    for _ in range(2):
        if how == "deleted":
            (folder / "overrides.json").unlink()
        elif how == "exchanged":
            (folder / "other").write_text("{}")
            (folder / "other").rename(folder / "overrides.json")
        else:
            folder.rename(tmp_path / f"moved-{len(list(tmp_path.iterdir()))}")
            it.overrides.check_file()
            assert not folder.exists(), "it may yet come back"
            folder.mkdir()
        it.overrides.check_file()
        assert (folder / "overrides.json").read_text() == written
    (folder / "overrides.json").write_text("{}\n")
    it.overrides.check_file()
    assert (folder / "overrides.json").read_text() == "{}\n", "what another program writes into our file stays"


def test_no_override_file_without_a_queue(block, tmp_path):
    """A new folder would be in the way of the one that was renamed."""
    folder = tmp_path / "queue"
    it = changes(block, folder, 1, 1)
    assert it.apply(Action("override", "A1", 4.0, None))[0] == 503
    assert not folder.exists()
    it.overrides.locked = False  # as with durability memory
    assert it.apply(Action("override", "A1", 4.0, None))[0] == 200


def test_other_services_overrides_are_kept(block, tmp_path):
    """Ours was renamed, and a second service began in a new one of the same name, which it has locked."""
    folder = tmp_path / "queue"
    folder.mkdir()
    first = changes(block, folder, 1, 1)
    assert first.apply(Action("override", "A1", 4.0, None))[0] == 200
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    second = changes(block, folder, 1, 1)
    assert second.apply(Action("override", "A1", 9.0, None))[0] == 200
    first.overrides.check_file()
    assert json.loads((folder / "overrides.json").read_text()) == {"A1": {"weight": 9.0}}


def test_services_do_not_fight_on_overrides(block, tmp_path):
    """With durability memory the folder is not locked: the file there may be another service's."""
    it = changes(block, tmp_path, 1, 1)
    it.overrides.locked = False  # as with durability memory
    assert it.apply(Action("override", "A1", 4.0, None))[0] == 200
    path = tmp_path / "overrides.json"
    (tmp_path / "other").write_text("{}")
    (tmp_path / "other").rename(path)
    it.overrides.check_file()
    assert path.read_text() == "{}"
    path.unlink()
    it.overrides.check_file()
    assert json.loads(path.read_text()) == {"A1": {"weight": 4.0}}


@pytest.mark.parametrize("data", UNREADABLE)
def test_damaged_override_file_is_skipped(block, tmp_path, data):
    (tmp_path / "overrides.json").write_bytes(data)
    made = changes(block, tmp_path, 1, 1)
    assert block.analyzers.weight(0) == 1.0
    assert codes_of(made) == ["overrides_ignored"]


def test_removed_meanwhile_is_not_found(block, tmp_path):
    """A replica awaits the shared stream between its look and the change; a reload may remove the analyzer then."""
    it = changes(block, tmp_path, 1, 1)
    answer = it.put_override_in_force(Action("override", "A9", 4.0, None), it.overrides.get("A9"))
    assert answer == (404, "there is no analyzer 'A9'")


def test_change_is_logged_with_who_and_what(block, tmp_path):
    it = changes(block, tmp_path, 1, 1)
    plain = {"weight": 1.0, "draining": False, "override": False}
    drained = {"weight": 5.0, "draining": True, "override": True}
    with capture_logs() as lines:
        it.apply(Action("override", "A1", 5.0, True, by="10.0.0.7, token 2bb80d53"))
        it.apply(Action("clear", "A1", by="127.0.0.1"))
        it.apply(Action("override", "A9", 5.0, by="127.0.0.1"))
    assert [(line["event"], line["by"], line["before"], line["after"]) for line in lines] == [
        ("analyzer changed", "10.0.0.7, token 2bb80d53", plain, drained),
        ("analyzer changed", "127.0.0.1", drained, plain),
    ]


def test_masked_weights_are_named(block, tmp_path):
    it = changes(block, tmp_path, 1, 2, 3)
    it.apply(Action("override", "A1", 5.0))
    it.apply(Action("override", "A2", 2.0))  # as it is configured
    it.apply(Action("override", "A3", None, True))
    assert it.masked == ["A1"]
    it.reload(Config(analyzers=analyzers(4, 7, 3)))
    assert it.masked == ["A1", "A2"]
    it.reload(Config(analyzers=analyzers(5)))
    assert it.masked == []


def test_state_of_the_configuration(block, tmp_path):
    it = changes(block, tmp_path, 1)
    start = it.state.success_ns
    assert it.problems() == []
    it.failed([Fault("a.b: no", "/a/b", "f.toml", 3), Fault("c: no")])
    assert (it.state.success_ns, it.state.attempt_ns >= start) == (start, True)
    assert [each.detail for each in it.problems()] == ["the last reload failed: a.b: no (f.toml:3), and 1 more"]
    it.succeeded(["server.port"])
    assert it.state.success_ns == it.state.attempt_ns > start
    assert [each.detail for each in it.problems()] == ["settings wait for a restart: server.port"]
    it.failed([Fault("c: no")])
    assert it.state.needs_restart == ["server.port"], "that is so all the same"
    it.succeeded([])
    assert it.problems() == []


def test_token_is_named_by_a_hash():
    security = Security(admin_tokens=("secret-one", "secret-two"))
    named = [authorize({"authorization": f"Bearer  {token}"}, "10.0.0.7", security) for token in security.admin_tokens]
    digests = [hashlib.sha256(token.encode()).hexdigest()[:8] for token in security.admin_tokens]
    assert named == [f"10.0.0.7, token {digest}" for digest in digests]
    assert authorize({}, "127.0.0.1", Security()) == "127.0.0.1"


def test_reload_adds_removes_and_brings_back(block, tmp_path):
    it = changes(block, tmp_path, 1, 2, 3)
    it.apply(Action("override", "A3", 9.0, None))
    assert it.reload(Config(analyzers=analyzers(1, 2))) == []
    assert block.analyzers.get(2, AnalyzerWord.IN_USE) == 0
    assert it.slots_in_use() == {"A1": 0, "A2": 1}
    assert it.reload(Config(analyzers=analyzers(4, 2, 3))) == []
    assert it.slots_in_use() == {"A1": 0, "A2": 1, "A3": 2}
    assert block.analyzers.weight(0) == 4.0
    assert block.analyzers.weight(2) == 9.0  # an override outlives its analyzer's absence


def test_reload_must_leave_an_analyzer(block, tmp_path):
    it = changes(block, tmp_path, 1, 1)
    it.apply(Action("override", "A1", None, True))
    with pytest.raises(ConfigError, match="nothing would be left"):
        it.reload(Config(analyzers=analyzers(1)))
    assert it.slots_in_use() == {"A1": 0, "A2": 1}
    later = SharedBlock.create(2, 8)
    changes(later, tmp_path, 1)  # a restart with that configuration: rather without the override than without analyzers
    assert later.analyzers.is_pickable(0)


def test_another_endpoint_is_another_server(block, tmp_path):
    it = changes(block, tmp_path, 1, 1)
    assert block.analyzers.go_offline(0)
    it.reload(Config(analyzers=analyzers(1, 1)))
    assert not block.analyzers.is_online(0)
    it.reload(Config(analyzers=analyzers(1, 1, port=5000)))
    assert block.analyzers.is_online(0)


def test_more_analyzers_than_slots(block, tmp_path):
    it = changes(block, tmp_path, 1)
    it.reload(Config(analyzers=analyzers(*[1] * 8)))
    with pytest.raises(ConfigError, match="needs a restart"):
        it.reload(Config(analyzers=analyzers(*[1] * 9)))
    assert len(it.slots_in_use()) == 8


def certificate(folder, name: str, ends: datetime | None = None) -> Security:
    """Return the settings for a certificate made just now."""
    pair = AUTHORITY.issue_cert("emitters.example", not_before=ends and ends - timedelta(days=9), not_after=ends)
    pair.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    pair.private_key_pem.write_to_path(folder / f"{name}.key")
    return Security(tls_cert=str(folder / f"{name}.pem"), tls_key=str(folder / f"{name}.key"))


@pytest.mark.parametrize("turned", ["on", "off"])
def test_tls_on_or_off_needs_a_restart(block, tmp_path, turned):
    """What workers get, and their successors, is what the others speak."""
    with_tls, without = certificate(tmp_path, "one"), Security()
    before, after = (without, with_tls) if turned == "on" else (with_tls, without)
    it = Changes(Config(analyzers=analyzers(1), security=before), block, tmp_path)
    it.begin()
    wanted = Config(
        analyzers=analyzers(2),
        security=Security(tokens=("secret",), tls_cert=after.tls_cert, tls_key=after.tls_key),
    )
    for _ in range(2):  # the next reload says so again
        assert it.reload(wanted) == ["security.tls_cert", "security.tls_key"]
        assert (it.config.security.tls_cert, it.config.security.tls_key) == (before.tls_cert, before.tls_key)
        assert it.config.security.tokens == ("secret",), "all else is in force"
        assert block.analyzers.weight(0) == 2.0


def test_certificate_changes_without_restart(block, tmp_path):
    one, two = certificate(tmp_path, "one"), certificate(tmp_path, "two")
    it = Changes(Config(analyzers=analyzers(1), security=one), block, tmp_path, read_pair(one))
    it.begin()
    assert it.reload(Config(analyzers=analyzers(1), security=two), read_pair(two)) == []
    assert (it.config.security, it.pair) == (two, read_pair(two))


def test_loaded_pair_outlives_its_files(block, tmp_path):
    """TLS is still on, until a restart: workers that are replaced meanwhile get what the others have."""
    one = certificate(tmp_path, "one")
    pair = read_pair(one)
    it = Changes(Config(analyzers=analyzers(1), security=one), block, tmp_path, pair)
    it.begin()
    (tmp_path / "one.pem").unlink()
    it.reload(Config(analyzers=analyzers(2)), None)
    assert (it.pair, it.config.security.tls_cert) == (pair, one.tls_cert)
    assert block.analyzers.weight(0) == 2.0


def test_expired_certificate_is_not_loaded(block, tmp_path):
    one, two = certificate(tmp_path, "one"), certificate(tmp_path, "two", LONG_AGO)
    it = Changes(Config(analyzers=analyzers(1), security=one), block, tmp_path, read_pair(one))
    it.begin()
    with pytest.raises(StartError, match=r"two\.pem expired on 2020-01-01 00:00:00 UTC"):
        it.reload(Config(analyzers=analyzers(2), security=two), read_pair(two))
    assert (it.pair, it.config.security, block.analyzers.weight(0)) == (read_pair(one), one, 1.0)


def test_expired_certificate_allows_changes(block, tmp_path):
    old = certificate(tmp_path, "old", LONG_AGO)
    it = Changes(Config(analyzers=analyzers(1), security=old), block, tmp_path, read_pair(old))
    it.begin()
    assert it.reload(Config(analyzers=analyzers(2), security=old), read_pair(old)) == []
    assert block.analyzers.weight(0) == 2.0


def named(*names: str) -> Config:
    return Config(analyzers=tuple(Analyzer(id=name, endpoint="http://127.0.0.1:4000/", weight=1) for name in names))


def test_reused_slot_starts_counters_at_0(block, tmp_path):
    it = Changes(named("old", *"bcdefgh"), block, tmp_path)  # all the slots there are
    it.begin()
    for row in block.rows:
        for field in ("delivered", "messages_delivered", "bytes_delivered", "failed", "retries"):
            row.add_to(0, field, 40)
        row.observe_delivery(0, 8_000_000)
    it.reload(named(*"bcdefgh"))
    it.reload(named("new", *"bcdefgh"))
    assert it.slots_in_use()["new"] == 0
    block.rows[1].add_to(0, "delivered", 3)
    block.rows[1].observe_delivery(0, 1_000_000)
    it.block.rows[0].add_to(1, "delivered", 1)
    snapshot = Snapshot(block, it.config, it.analyzers, "1")
    new = stats.analyzer(snapshot, "new")
    assert (new.delivered, new.failed, new.retried, new.actual_share) == (3, 0, 0, 0.75)
    assert new.latency_ms.max < 2.0
    assert snapshot.delivery([0]).cumulative()[-1] == 1
    assert snapshot.delivery([0]).sum_ns == 1_000_000
    assert snapshot.delivered == 84
    assert snapshot.total_of_analyzers("failed") == 80
    assert snapshot.delivery().cumulative()[-1] == 3


def test_returning_analyzer_keeps_counters(block, tmp_path):
    it = Changes(named("a", "b"), block, tmp_path)
    it.begin()
    block.rows[0].add_to(0, "delivered", 40)
    it.reload(named("b"))
    it.reload(named("b", "a"))
    figures = {each.analyzer.id: each for each in Snapshot(block, it.config, it.analyzers, "1").analyzers}
    assert figures["a"].delivered == 40


def test_slot_awaiting_replies_is_last(block, tmp_path):
    it = Changes(named(*"abcdefgh"), block, tmp_path)
    it.begin()
    it.reload(named(*"defgh"))
    block.rows[1].add_to(0, "packets_in_flight", 1)
    it.reload(named(*"efgh", "x"))  # d is removed in the same step: workers do not know it yet
    assert it.slots_in_use()["x"] == 1


def test_online_override_ends_a_pause(block, tmp_path):
    it = changes(block, tmp_path, 1, 1)
    later = 2**62
    for slot in (0, 1):
        block.analyzers.pause(slot, later)
    assert it.apply(Action("override", "A1", 2.0, None))[0] == 200  # another weight is no reason to disturb it
    assert block.analyzers.get(0, AnalyzerWord.PAUSED_UNTIL_NS) == later
    epoch = block.analyzers.epoch
    assert it.apply(Action("override", "A1", None, False))[0] == 200
    assert block.analyzers.get(0, AnalyzerWord.PAUSED_UNTIL_NS) == 0
    assert block.analyzers.epoch > epoch
    assert block.analyzers.get(1, AnalyzerWord.PAUSED_UNTIL_NS) == later


# ---- overrides that replicas share


@pytest.fixture
def shared(block, tmp_path):
    """Return the changes of a replica with two analyzers."""
    config = Config(analyzers=analyzers(1, 1), queue=Queue(backend="jetstream"))
    made = Changes(config, block, tmp_path)
    made.begin()
    return made


BOTH = {"A1": Override(draining=True), "A2": Override(draining=True)}  # of one that has more


def draining(block):
    return [block.analyzers.get(slot, AnalyzerWord.DRAINING) for slot in range(3)]


def codes_of(made):
    return [problem.code for problem in made.problems()]


def test_ignored_overrides_wait_for_a_reload(block, shared):
    assert not shared.use_overrides(BOTH)
    assert (draining(block), codes_of(shared)) == ([0, 0, 0], ["overrides_ignored"])
    before = shared.config, shared.pair
    shared.reload(Config(analyzers=analyzers(1, 1, 1)))
    assert (draining(block), codes_of(shared)) == ([1, 1, 0], [])
    shared.put_in_force(*before)  # as a worker cannot follow
    assert (draining(block)[:2], codes_of(shared)) == ([0, 0], ["overrides_ignored"])
    shared.reload(Config(analyzers=analyzers(1, 1, 1)))
    assert draining(block) == [1, 1, 0]
    assert shared.use_overrides({})
    assert draining(block) == [0, 0, 0]


@pytest.mark.parametrize("data", UNREADABLE)
def test_unreadable_shared_overrides(block, shared, data):
    """Those in force stay, and no change is made upon what is not known."""
    shared.use_overrides({"A1": Override(draining=True)})
    stream = SharedStream(shared.config, block, shared)
    stream._use(Value(data, 1))

    async def get(_key):
        return Value(data, 1)

    stream._bucket.get = get
    status, error = asyncio.run(stream.apply(Action("override", "A2", 4.0, None)))
    assert (status, error.startswith("the change cannot be shared")) == (503, True)
    assert (draining(block), block.analyzers.weight(1)) == ([1, 0, 0], 1.0)


def test_ignored_overrides_are_changed(block, shared):
    """The change that leaves an analyzer again is made on what the others have, and is not lost for them."""
    shared.use_overrides(BOTH)
    end = Action("override", "A1", None, False)
    wanted = shared.wanted(end, BOTH)
    assert wanted == {"A2": Override(draining=True)}
    shared.overrides.by_id = wanted
    assert shared.put_override_in_force(end, Override()) == (200, None)
    assert (draining(block)[:2], codes_of(shared)) == ([0, 1], [])
    assert shared.wanted(Action("override", "A1", None, True), wanted) == (422, "nothing would be left to deliver to")
