"""Bodies of JSON with records in lists of objects: the compiled walk against a slow model of it, read in any pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdist._core import JsonRecords, json_fault
from fastdist.protocols.records import MAX_DEPTH

OTLP = (b"resourceLogs", b"resource", b"scopeLogs", b"scope", b"logRecords")
LOKI = (b"streams", b"stream", b"values")
NAMES = [[name.decode() for name in names] for names in (OTLP, LOKI)]

# ------------------------------------------------------------------------------------------------------------ the model


class Members(list):
    """An object of JSON: its members, also those of one name."""


def number(text):
    return "number", text


# int knows no NaN and no Infinity, and neither does JSON.
DECODER = json.JSONDecoder(object_pairs_hook=Members, parse_int=number, parse_float=number, parse_constant=int)


def groups_of(value, names, common_name=None, what="it"):
    """Return the records of an object and its lists: ``[(what they have in common, records)]``.

    The first value that is something else than it should be is a TypeError: what is wrong, and the value.
    """
    if type(value) is not Members:
        raise TypeError(f"{what} is no object", value)
    list_name, *inner = names
    common, groups = None, []
    for name, member in value:
        if name == list_name:
            items = container(name, member, list, names)
            groups = [((), items)] if items and not inner else []
            for item in items if inner else ():
                groups += groups_of(item, inner[1:], inner[0], f"an item of {name}")
        elif name == common_name:
            common = container(name, member, Members, names)
    if common_name is None:
        return groups
    own = [((common, *[None] * (len(inner) // 2)), [])] if common and (inner or not groups) else []
    return own + [((common or None, *above), records) for above, records in groups]


def container(name, value, kind, names):
    """Return a list or an object; of OTLP null counts as an empty one."""
    if value is None and names[-1] == "logRecords":
        return kind()
    if type(value) is not kind:
        raise TypeError(f"{name} is no {'array' if kind is list else 'object'}", value)
    return value


def model(body, names):
    fault = json_fault(body, MAX_DEPTH)
    assert (fault is None) == is_json(body)
    if fault is not None:
        return "fault", fault
    try:
        return "groups", groups_of(DECODER.decode(body.decode()), [name.decode() for name in names])
    except TypeError as error:
        return "wrong", error.args


def is_json(body):
    try:
        return depth_of(DECODER.decode(body.decode())) <= MAX_DEPTH
    except (ValueError, RecursionError):
        return False


def depth_of(value):
    if type(value) is Members:
        return 1 + max((depth_of(member) for _, member in value), default=0)
    return 1 + max(map(depth_of, value), default=0) if type(value) is list else 0


def walked(body, names, piece=1 << 16, most=100):
    """Return what the compiled walk says, as the model does; ``piece``: bytes that are checked in a step."""
    records = JsonRecords(body, MAX_DEPTH, names, names is OTLP)
    try:
        steps = 1
        while records.check(piece):
            steps += 1
        assert steps <= len(body) // piece + 1
    except TypeError as error:
        what, line, column, byte = error.args
        before = body[:byte].decode()
        assert (line, column) == (before.count("\n") + 1, len(before) - before.rfind("\n"))
        return "wrong", (what, DECODER.raw_decode(body[byte:].decode())[0])
    except ValueError as error:
        return "fault", error.args
    groups, last = [], None
    while (taken := records.take(most)) is not None:
        common, texts = taken
        assert len(texts) <= most
        if common is not last:
            groups.append((tuple(DECODER.decode(text.decode()) if text else None for text in common), []))
            last = common
        groups[-1][1].extend(DECODER.decode(text.decode()) for text in texts)
    return "groups", groups


def compared(body, names, piece=1 << 16, most=100):
    found = walked(body, names, piece, most)
    assert found == model(body, names), body
    return found[0]


# ------------------------------------------------------------------------------------------------ bodies, made up

any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["\ud800", "\U0001f600", "resourceLogs", "]", '"}']),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(st.tuples(st.text(max_size=3), inner), max_size=3).map(Members)
    ),
    max_leaves=6,
)


NOTHING = st.nothing()


def objects(names, commons, records, wrong=NOTHING, common_name=None):
    """Return objects with these names in any order, any number of times; ``wrong``: what may be there instead."""
    list_name, *inner = names
    null = st.none() if names[-1] == "logRecords" else NOTHING
    items = objects(inner[1:], commons, records, wrong, inner[0]) if inner else records
    members = [st.tuples(st.just(list_name), st.lists(items, max_size=3) | null | wrong)] * 4
    members.append(st.tuples(st.sampled_from(["x", "", list_name + "s", list_name[:-1]]), any_json))
    if common_name:
        members += [st.tuples(st.just(common_name), commons[common_name] | null | wrong)] * 3
    return st.lists(st.one_of(members), max_size=4).map(Members) | (wrong if common_name else NOTHING)


def written(value, chance):
    """Return a value as JSON, with spaces and escapes by chance."""
    space = lambda: chance.choice(["", "", "", " ", "\n", "\r\n \t"])  # noqa: E731
    if type(value) is Members:
        members = [f"{name_text(name, chance)}{space()}:{space()}{written(inner, chance)}" for name, inner in value]
        return "{" + space() + f"{space()},{space()}".join(members) + space() + "}"
    if type(value) is list:
        return "[" + space() + f"{space()},{space()}".join(written(inner, chance) for inner in value) + space() + "]"
    return json.dumps(value, ensure_ascii=chance.random() < 0.5 or value == "\ud800")


def name_text(name, chance):
    if not name or chance.random() < 0.9:
        return json.dumps(name)
    place = chance.randrange(len(name))
    return json.dumps(name[:place])[:-1] + f"\\u{ord(name[place]):04x}" + json.dumps(name[place + 1 :])[1:]


def bodies(names, commons, records, wrong=NOTHING):
    """Return bodies of JSON; ``commons``: what is said of records, by its name."""
    made = st.builds(written, objects(names, commons, records, wrong), st.randoms(use_true_random=False))
    return st.builds(lambda before, text, after: before + text.encode() + after, spaces, made, spaces)


spaces = st.sampled_from([b"", b"", b" ", b"\n\n\t"])
any_object = st.lists(st.tuples(st.text(max_size=3), any_json), max_size=3).map(Members)
COMMONS = dict.fromkeys(("resource", "scope", "stream"), any_object)
pieces = st.integers(1, 40)
CHANGES = [b"", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"1", b"n", b"\n", b"\x00", b"\xff", b"\xc3\xa9"]
EXAMPLES = (
    b"""{"resourceLogs":[{"scopeLogs":[{"logRecords":[1,2,{"a":[]}],"scope":{"a":1}},{},{"scope":{}}],"resource":{"r":1}},
{"resource":{"x":2}},{"scopeLogs":[{"logRecords":[4]}]}],"streams":[{"values":[1]}]}""",
    b'{"streams":[{"values":[[1],2,"\\ud800"],"str\\u0065am":{"a":1}},{"stream":{"b":2}},{"values":[]}],"scope":[]}',
    b"""{"resourceLogs":[{"scopeLogs":[{"logRecords":[1],"logRecords":null,"scope":{"a":1},"scope":null}]},
{"scopeLogs":[{"logRecords":[1]},{"logRecords":[2]}],"scopeLogs":[{"logRecords":[3]}]}]}""",
    b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[1]}]}],"resourceLogs":[{"resource":{"a":1}}],"x":[{"scopeLogs":5}]}',
    b'{"streams":[{"values":[1],"values":[2,3],"stream":{"a":1},"stream":{"b":1}}],"str\\ud800":1}',
)


@pytest.mark.parametrize("names", [OTLP, LOKI], ids=["otlp", "loki"])
@pytest.mark.parametrize("body", EXAMPLES)
def test_every_piece_gives_the_same(body, names):
    for piece in range(1, len(body) + 2):
        compared(body, names, piece, most=1 + piece % 3)


@given(bodies(NAMES[0], COMMONS, any_json), pieces, st.integers(1, 4))
def test_records_of_otlp_are_the_models(body, piece, most):
    assert compared(body, OTLP, piece, most) == "groups"


@given(bodies(NAMES[1], COMMONS, any_json), pieces, st.integers(1, 4))
def test_records_of_loki_are_the_models(body, piece, most):
    assert compared(body, LOKI, piece, most) == "groups"


@given(bodies(NAMES[0], COMMONS, any_json, any_json), bodies(NAMES[1], COMMONS, any_json, any_json), pieces)
@example(b"[]", b"5", 1)
@example(b" null", b'\n {"streams":null}', 1)
@example(b'{"resourceLogs":[{"scopeLogs":[null]}]}', b'{"streams":[{"stream":{},"stream":null}]}', 1)
@example(b'{"resourceLogs":5,"resourceLogs":[]}', b'{"x":"\xc3\xa9\n","streams":{}}', 1)
def test_what_is_wrong_is_found_first(of_otlp, of_loki, piece):
    compared(of_otlp, OTLP, piece)
    compared(of_loki, LOKI, piece)


@given(bodies(NAMES[0], COMMONS, any_json), st.integers(0, 10**6), st.sampled_from(CHANGES), pieces)
@settings(max_examples=settings().max_examples * 2)
def test_damage_is_found_where_it_is(body, place, change, piece):
    place %= len(body) + 1
    for rest in (body[place:], body[place + 1 :], b""):
        compared(body[:place] + change + rest, OTLP, piece)


@pytest.mark.parametrize("body", EXAMPLES)
def test_a_fault_anywhere_is_found(body):
    kinds = set()
    for place in range(len(body) + 1):
        for change in CHANGES:
            for rest in (body[place:], body[place + 1 :]):
                kinds.add(compared(body[:place] + change + rest, OTLP, 1 + place % 9))
    assert kinds >= {"fault", "groups"}


@given(st.binary(max_size=60), pieces)
def test_noise_is_walked_or_refused(body, piece):
    compared(body, OTLP, piece)
    compared(b'{"streams":[' + body + b"]}", LOKI, piece)


@pytest.mark.parametrize("inner", [b"%b", b'{"a":%b}', b"[%b,0]"])
def test_depth_is_that_of_the_whole_body(inner):
    for depth in (MAX_DEPTH - 8, MAX_DEPTH - 7, MAX_DEPTH - 6, MAX_DEPTH - 5):
        value = inner % (b"[" * depth + b"]" * depth)
        compared(b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[%b]}]}]}' % value, OTLP, 50)
        compared(b'{"resourceLogs":[{"scopeLogs":%b}]}' % value, OTLP, 50)
        compared(b'{"x":%b}' % value, OTLP, 50)


def test_long_spaces_are_passed_in_any_place():
    body = EXAMPLES[0]
    places = [place for place in range(len(body) + 1) if compared(body[:place] + b" " + body[place:], OTLP) == "groups"]
    assert len(places) > 100
    for place in places:
        for count in (31, 32, 33, 1000):
            compared(body[:place] + b" \n\t\r" * count + body[place:], OTLP, 64)


# ---------------------------------------------------------------------------------------------------- notes, their size


def walk(body, names=OTLP):
    records = JsonRecords(body, MAX_DEPTH, names, names is OTLP)
    while records.check(1000):
        pass
    return records


def test_only_what_is_checked_is_taken():
    records = JsonRecords(EXAMPLES[0], MAX_DEPTH, OTLP, True)
    with pytest.raises(ValueError, match="not checked"):
        records.take(1)
    assert records.check(10)
    with pytest.raises(ValueError, match="not checked"):
        records.take(1)
    wrong = JsonRecords(b'{"resourceLogs":5}', MAX_DEPTH, OTLP, True)
    for _ in range(2):
        with pytest.raises(TypeError):
            wrong.check(100)
    with pytest.raises(ValueError, match="wrong"):
        wrong.take(1)
    assert not walk(EXAMPLES[0]).check(10)


@pytest.mark.parametrize("names", [(), (b"a", b"b"), (b"a",) * 7])
def test_names_lead_to_records(names):
    with pytest.raises(ValueError, match="names of lists"):
        JsonRecords(b"{}", MAX_DEPTH, names, True)


@pytest.mark.parametrize(
    "part",
    [
        b"{}", b'{"scopeLogs":[]}', b'{"scopeLogs":[{}, {"scope":{}}, {"logRecords":[]}]}', b'{"resource":{}}',
        b'{"resource":{"a":1},"resource":null}', b'{"scopeLogs":[{"logRecords":[1]}],"scopeLogs":null}',
    ],
)  # fmt: skip
def test_empty_parts_leave_no_notes(part):
    records = walk(b'{"resourceLogs":[%b]}' % b",".join([part] * 5000))
    assert records.take(10) is None
    assert records.noted < 5000


@pytest.mark.parametrize(
    "part",
    [
        b'{"resource":{"":0}}', b'{"scopeLogs":[{"scope":{"":0}}]}', b'{"scopeLogs":[{"logRecords":[0]}]}',
        b'{"scopeLogs":[{"logRecords":[0]},{"logRecords":[0]}]}',
    ],
)  # fmt: skip
def test_notes_take_little_memory(part):
    body = b'{"resourceLogs":[%b]}' % b",".join([part] * 50_000)
    assert 0 < walk(body).noted < 2.5 * len(body)
