"""Values as people write them: durations (``500ms``, ``1.5m``), sizes (``16KiB``, ``10MiB``) and URLs.

The rules:

- A number is seconds or bytes; a string needs its unit, because ``"10"`` does not say ten of what.
- The arithmetic is decimal, so that ``35ms`` is the float ``0.035`` and ``1.5KiB`` is exactly 1536 bytes.
- A URL is parsed once, into what connecting and writing a request head need; nothing in it is guessed or corrected.
- Every error is a ValueError whose text can follow the name of a setting.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEFAULT_PORTS = {"http": 80, "https": 443}
NATS_PORT = 4222
_REST = re.compile(r"(?P<userinfo>[^/?]*@)?(?P<host>\[[^\]/?]*\]|[^/?:]*)(?::(?P<port>\d{1,5}))?(?P<target>[/?].*)?")
_LABEL = r"[A-Za-z0-9_-]{1,63}"  # with the "_" of container names
_HOSTNAME = re.compile(rf"(?=.{{1,254}}$){_LABEL}(\.{_LABEL})*\.?")

# Largest first: formatting takes the first unit that fits.
_SECONDS = {
    "d": Decimal(86_400),
    "h": Decimal(3_600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
    "us": Decimal("0.000001"),
}
_BYTES = {
    name: Decimal(base**power)
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))
    for name, base in ((f"{prefix}iB", 1024), (f"{prefix}B", 1000))
} | {"B": Decimal(1)}
_BYTES_FOLDED = {name.lower(): factor for name, factor in _BYTES.items()}

_QUANTITY = re.compile(r"(\d{1,400}(?:\.\d{1,400})?) *([A-Za-z]+)", re.ASCII)
_MAX = 2**63 - 1  # what a 64-bit counter of bytes or seconds holds


def number(text: str) -> int | float | str:
    """Return the number that an option or a variable holds; other text as it is, to be parsed later."""
    if re.fullmatch(r"\s*[+-]?[0-9]{1,300}\s*", text):
        return int(text)
    return float(text) if re.fullmatch(r"\s*[+-]?[0-9]+\.[0-9]+\s*", text) else text


def parse_duration(value: object) -> float:
    """Return seconds for a number of seconds or a string with a unit (``us``, ``ms``, ``s``, ``m``, ``h``, ``d``).

    Raises ValueError for anything else, and for what is negative, not finite or over 2**63.
    """
    return float(_amount(value, _SECONDS, "a duration such as 500ms, 2s or 1.5m"))


def parse_duration_or_never(value: object) -> float:
    """Return what ``parse_duration`` does, and infinity for ``never``. Raises ValueError likewise."""
    if value == "never":
        return math.inf
    return float(_amount(value, _SECONDS, 'a duration such as 500ms, 2s or 1.5m, or "never"'))


def parse_size(value: object) -> int:
    """Return bytes for a number of bytes or a string with a unit (``B``, ``KB``, ``KiB`` ... ``TiB``, in any case).

    Raises ValueError for anything else, and for what is negative, no whole number of bytes or over 2**63.
    """
    folded = value.lower() if isinstance(value, str) else value
    amount = _amount(folded, _BYTES_FOLDED, "a size such as 512B, 16KiB or 10MiB", written=value)
    if amount != amount.to_integral_value():
        raise ValueError(f"expected a whole number of bytes, got {_quote(value)}")
    return int(amount)


def format_duration(seconds: float) -> str:
    """Return the shortest exact text that ``parse_duration`` reads back; ``never`` for infinity."""
    return "never" if seconds == math.inf else _text(Decimal(repr(float(seconds))), _SECONDS, "s")


def format_size(size: int) -> str:
    """Return the shortest exact text that ``parse_size`` reads back."""
    return _text(Decimal(size), _BYTES, "B")


def _amount(value: object, units: Mapping[str, Decimal], expected: str, written: object = None) -> Decimal:
    """Return ``value`` in the base unit; ``written`` is how the user spelled it."""
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value.strip())) and match[2] in units:
        amount = Decimal(match[1]) * units[match[2]]
    elif isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # noqa: PLR0124  (NaN)
        raise ValueError(f"expected {expected}, got {_quote(value if written is None else written)}")
    elif value < 0:
        raise ValueError("must not be negative")
    else:
        amount = Decimal(min(value, 2 * _MAX))  # an int may have more digits than a Decimal or a person can take
    if amount > _MAX:
        raise ValueError("is too large")
    return amount


def _quote(value: object) -> str:
    """Return what an error shows of ``value``: enough to recognise it, never pages of it."""
    if isinstance(value, bool):
        return f"boolean {str(value).lower()}"
    kinds: dict[type, str] = {list: "a list", dict: "a table", type(None): "nothing"}
    return f"{value!r:.60}" if isinstance(value, str | float) else kinds.get(type(value), f"a {type(value).__name__}")


def _text(amount: Decimal, units: Mapping[str, Decimal], base: str) -> str:
    for unit, factor in units.items():
        tenths = amount / factor * 10  # more decimals read better in a smaller unit: 75s, not 1.25m
        if tenths >= 10 and tenths == tenths.to_integral_value():  # noqa: PLR2004  (at least one)
            return f"{(tenths / 10).normalize():f}{unit}"
    return f"{amount:f}{base}" if amount else f"0{base}"


class Endpoint(msgspec.Struct, frozen=True):
    """A parsed http(s) URL: what connecting and writing a request head need.

    ``host`` is what to resolve (no brackets), ``path_and_query`` begins with a slash, ``host_header`` has brackets
    around an IPv6 address and no default port.
    """

    scheme: str
    host: str
    port: int
    path_and_query: str
    host_header: str

    @property
    def origin(self) -> str:
        """Scheme, host and port as browsers write an origin."""
        return f"{self.scheme}://{self.host_header}"


@functools.lru_cache(maxsize=4096)  # more than the URLs of a thousand analyzers and of their health checks
def parse_endpoint(url: str) -> Endpoint:
    """Parse an absolute http(s) URL.

    Raises ValueError for any other; its text never shows the URL, which may hold a password.
    """
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in _DEFAULT_PORTS:
        raise ValueError("must be an http:// or https:// URL")
    return _endpoint(scheme.lower(), rest)


def parse_nats_url(url: str) -> Endpoint:
    """Parse the URL of a NATS server (``nats://`` or ``tls://``, host, port or 4222); its text never shows the URL.

    Raises ValueError for any other.
    """
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in {"nats", "tls"}:
        raise ValueError("must be a nats:// or tls:// URL")
    if "@" in rest:
        raise ValueError("must have no user name or password: they have settings of their own")
    if rest.startswith(":") or re.search(r"[/?]|^$", rest):
        raise ValueError("must have the form nats://host[:port], without a path")
    endpoint = _endpoint(scheme, rest)
    return msgspec.structs.replace(endpoint, port=endpoint.port or NATS_PORT)


def check_replicas(value: object) -> int:
    """Return the number of copies of a stream. Raises ValueError for what JetStream cannot keep a majority of."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in {1, 3, 5}:
        raise ValueError("must be 1, 3 or 5")
    return value


def check_url_or_path(text: str) -> None:
    """Raise ValueError for what is neither a path on some host nor an absolute http(s) URL."""
    if not re.match("/|https?://", text, re.IGNORECASE):
        raise ValueError("must be a path such as /health, or an http:// or https:// URL")
    parse_endpoint(f"http://host{text}" if text.startswith("/") else text)


def without_query(url: str) -> str:
    """Return a URL or a path as it is shown: a query, which may hold a key, as ``?...``."""
    before, mark, _ = url.partition("?")
    return f"{before}?..." if mark else url


def check_host(text: str) -> None:
    """Raise ValueError for what is neither an address nor a name that can be resolved."""
    try:
        text.encode("idna")
    except UnicodeError:
        raise ValueError("must be an address or a host name, each part of 1 to 63 characters") from None


def check_server_name(text: str) -> str:
    """Return the name of a TLS server, an IPv4 address among them, if it can be one; raises ValueError if not."""
    if text and not _HOSTNAME.fullmatch(text):
        raise ValueError("must be a host name such as analyzer.example")
    return text.lower()


def parse_origin(text: str) -> str:
    """Return the origin ``scheme://host[:port]`` as browsers send it (lower case, no default port); or ValueError."""
    scheme, mark, rest = text.lower().partition("://")
    if not mark or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or re.search(r"[/?]", rest):
        raise ValueError("must be scheme://host[:port], with no path and no slash at its end")
    return _endpoint(scheme, rest).origin


def parse_origin_or_any(text: str) -> str:
    """Return what ``parse_origin`` does, and ``*`` for ``*``. Raises ValueError likewise."""
    return text if text == "*" else parse_origin(text)


def parse_network(text: str) -> str:
    """Return a network (``10.0.0.0/8``), or that of a single address, in its normal form. Raises ValueError."""
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        hint = "; host bits are set" if "host bits" in str(error) else ""
        raise ValueError(f"must be an address, or a network such as 10.0.0.0/8{hint}") from None


def parse_listen(text: str) -> str:
    """Return an address and a port to listen on (``127.0.0.1:3001``, ``[::1]:3001``) as they are, and "" as it is.

    Raises ValueError for anything else.
    """
    if text:
        split_listen(text)
    return text


def split_listen(text: str) -> tuple[str, int]:
    """Return host (no brackets) and port of what ``parse_listen`` takes. Raises ValueError likewise."""
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]+):(\d{1,5})", text, re.ASCII)
    if not match or int(match[2]) > 65535:  # noqa: PLR2004  (the range of TCP ports)
        raise ValueError("must be an address and a port, such as 127.0.0.1:3001 or [::1]:3001")
    return _host(match[1]), int(match[2])


def _endpoint(scheme: str, rest: str) -> Endpoint:
    if not re.fullmatch(r"[\x21-\x7e]*", rest):
        raise ValueError("must be visible ASCII characters only (percent-encode the others)")
    if "#" in rest:
        raise ValueError("must have no fragment (#)")
    match = _REST.fullmatch(rest)
    if match and match["userinfo"]:
        raise ValueError("must have no user name or password")
    if not match or not match["host"]:
        raise ValueError("must have the form http://host[:port][/path]")
    host, default, target = _host(match["host"]), _DEFAULT_PORTS.get(scheme, 0), match["target"] or ""
    port = int(match["port"]) if match["port"] else default
    if match["port"] and not 1 <= port <= 65535:  # noqa: PLR2004  (the range of TCP ports)
        raise ValueError("must have a port from 1 to 65535")
    shown = f"[{host}]" if ":" in host else host
    header = shown if port == default else f"{shown}:{port}"
    return Endpoint(scheme, host, port, target if target.startswith("/") else f"/{target}", header)


def _host(text: str) -> str:
    """Return the host without brackets, in its normal form."""
    if text.startswith("["):
        try:
            address = ipaddress.IPv6Address(text[1:-1])
        except ValueError:
            raise ValueError("must have a valid IPv6 address in its brackets") from None
        if address.scope_id:
            raise ValueError("must have no IPv6 zone")
        return address.compressed
    if not _HOSTNAME.fullmatch(text):
        raise ValueError("must have a valid host name")
    return text.lower()
