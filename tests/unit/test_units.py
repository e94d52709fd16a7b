"""Durations and sizes: what is read, what is refused and with which words, and that formatting is its inverse."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdist.units import (
    format_duration,
    format_size,
    parse_duration,
    parse_listen,
    parse_network,
    parse_size,
    split_listen,
)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0.0),
        (10, 10.0),
        (0.25, 0.25),
        ("0s", 0.0),
        ("1us", 1e-6),
        ("35ms", 0.035),
        ("500ms", 0.5),
        ("2s", 2.0),
        ("1.5s", 1.5),
        (" 2 s ", 2.0),
        ("1m", 60.0),
        ("1.5m", 90.0),
        ("1h", 3600.0),
        ("1d", 86400.0),
    ],
)
def test_reads_durations(written, seconds):
    result = parse_duration(written)
    assert result == seconds
    assert type(result) is float


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0),
        (10, 10),
        (1e6, 1_000_000),
        ("512B", 512),
        ("16KiB", 16 * 1024),
        ("16 kib", 16 * 1024),
        ("1.5KiB", 1536),
        ("10MiB", 10 * 2**20),
        ("1KB", 1000),
        ("1kB", 1000),
        ("1MB", 1_000_000),
        ("1GB", 10**9),
        ("1GiB", 2**30),
        ("2TiB", 2**41),
    ],
)
def test_written_sizes_are_parsed(written, size):
    result = parse_size(written)
    assert result == size
    assert type(result) is int


DURATION = "expected a duration such as 500ms, 2s or 1.5m, got "
SIZE = "expected a size such as 512B, 16KiB or 10MiB, got "


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("5 parsecs", DURATION + "'5 parsecs'"),
        ("", DURATION + "''"),
        ("10", DURATION + "'10'"),
        ("s", DURATION + "'s'"),
        ("-1s", DURATION + "'-1s'"),
        ("1,5s", DURATION + "'1,5s'"),
        ("1e3s", DURATION + "'1e3s'"),
        ("5M", DURATION + "'5M'"),
        ("1KiB", DURATION + "'1KiB'"),
        ("٣s", DURATION + "'٣s'"),
        ("nan", DURATION + "'nan'"),
        ("inf", DURATION + "'inf'"),
        ("never", DURATION + "'never'"),
        (math.nan, DURATION + "nan"),
        (True, DURATION + "boolean true"),
        (None, DURATION + "nothing"),
        ([1], DURATION + "a list"),
        (-1, "must not be negative"),
        (-0.5, "must not be negative"),
        (-math.inf, "must not be negative"),
        (math.inf, "is too large"),
        (1e300, "is too large"),
        (10**30, "is too large"),
        ("9" * 400 + "s", "is too large"),
    ],
)
def test_refuses_what_is_no_duration(written, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole text is compared below)
        parse_duration(written)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("5 floppies", SIZE + "'5 floppies'"),
        ("10", SIZE + "'10'"),
        ("10M", SIZE + "'10M'"),
        ("MiB", SIZE + "'MiB'"),
        ("-1B", SIZE + "'-1B'"),
        ("2s", SIZE + "'2s'"),
        (False, SIZE + "boolean false"),
        (math.nan, SIZE + "nan"),
        (-1, "must not be negative"),
        (math.inf, "is too large"),
        (2**63, "is too large"),
        ("9" * 30 + "B", "is too large"),
        ("0.3KiB", "expected a whole number of bytes, got '0.3KiB'"),
        ("0.5B", "expected a whole number of bytes, got '0.5B'"),
        (1.5, "expected a whole number of bytes, got 1.5"),
    ],
)
def test_refuses_what_is_no_size(written, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole text is compared below)
        parse_size(written)
    assert str(caught.value) == text


def test_error_shows_start_of_a_long_value():
    with pytest.raises(ValueError, match="got 'xxx") as caught:
        parse_duration("x" * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0, "0s"),
        (1e-6, "1us"),
        (0.035, "35ms"),
        (0.5, "500ms"),
        (2.0, "2s"),
        (90.0, "1.5m"),
        (100.0, "100s"),
        (5400.0, "1.5h"),
        (365 * 86400.0, "365d"),
        (1e-9, "0.000000001s"),
        (math.inf, "never"),
    ],
)
def test_formats_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (512, "512B"),
        (1000, "1KB"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (1025 * 1024, "1025KiB"),
        (10**6, "1MB"),
        (10 * 2**20, "10MiB"),
        (2**41, "2TiB"),
        (1_234_567, "1234567B"),
    ],
)
def test_sizes_are_formatted_with_units(size, text):
    assert format_size(size) == text


@given(st.floats(min_value=0, max_value=1e18))
@example(5e-324)
@example(-0.0)
@example(100.1)
def test_formatted_duration_reads_back_exact(seconds):
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_a_formatted_size_reads_back_exactly(size):
    assert parse_size(format_size(size)) == size


def test_unprintable_integer_is_too_large():
    for parse in (parse_duration, parse_size):
        with pytest.raises(ValueError, match="is too large"):
            parse(1 << 100_000)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_nothing_but_a_value_error_comes_out(value):
    for parse in (parse_duration, parse_size):
        with contextlib.suppress(ValueError):
            assert 0 <= parse(value) <= 2**63


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:3001", "127.0.0.1", 3001),
        ("0.0.0.0:0", "0.0.0.0", 0),
        ("[::1]:3001", "::1", 3001),
        ("[2001:DB8:0:0::1]:65535", "2001:db8::1", 65535),
        ("Admin.example:80", "admin.example", 80),
    ],
)
def test_addresses_to_listen_on(text, host, port):
    assert parse_listen(text) == text
    assert split_listen(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    ["3001", ":3001", "::1:3001", "[::1]", "a:65536", "a:b", "a:-1", "a:", "http://a:1", "a b:1", "[x]:1", "a:1/"],
)
def test_what_cannot_be_listened_on(text):
    with pytest.raises(ValueError, match="must "):
        parse_listen(text)


def test_no_address_to_listen_on_is_allowed():
    assert parse_listen("") == ""


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("127.0.0.1", "127.0.0.1/32"),
        ("10.1.2.0/255.255.255.0", "10.1.2.0/24"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("::1", "::1/128"),
    ],
)
def test_networks_have_one_form(text, network):
    assert parse_network(text) == network
    assert parse_network(network) == network


@pytest.mark.parametrize(
    ("text", "hint"), [("10.0.0.1/8", "; host bits are set"), ("10.0.0.0/33", ""), ("proxy", ""), ("", "")]
)
def test_what_is_no_network(text, hint):
    with pytest.raises(ValueError, match=f"must be an address, or a network such as 10.0.0.0/8{hint}$"):
        parse_network(text)
