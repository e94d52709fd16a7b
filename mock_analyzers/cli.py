"""The command line: flags, their checks, and nothing else. What each fault does stands in ``options.py``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from msgspec.structs import fields

from mock_analyzers.options import Options, OptionsError
from mock_analyzers.service import Settings, run

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # fit for a path and for a line of the ledger file
_MAX_PORT = 65_535


def main() -> None:
    """Run the command line; never returns."""
    parser = _parser()
    flags = parser.parse_args()
    try:
        ports = [_port(port) for port in flags.ports.split(",")]
        ids = _ids(flags.ids, len(ports))
        options = Options().changed({field.encode_name: getattr(flags, field.name) for field in fields(Options)})
    except (argparse.ArgumentTypeError, OptionsError) as error:
        parser.error(str(error))
    sys.exit(run(Settings(flags.host, ports, ids, flags.control_port, flags.ledger, flags.quiet, flags.seed, options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mock_analyzers",
        description="Start mock analyzers that count what is delivered to them, and fail on request.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="Address to listen on.")
    add("--ports", default="3001,3002,3003,3004", help="One port per analyzer, separated by commas; 0 = any.")
    add("--ids", default="", help="Their ids; A1,A2,... unless given.")
    add("--control-port", type=_port, default=3100, help="Port of /control for all; 0 = any.")
    add("--ledger", type=Path, help="File to append 'id analyzer attempt' to.")
    add("--quiet", action="store_true", help="Print nothing but errors.")
    add("--seed", type=int, help="Makes the faults repeatable.")
    faults = parser.add_argument_group("faults", "Of all analyzers; each can be changed later by POST /control.")
    kinds = get_type_hints(Options)
    for field in fields(Options):
        name, description = f"--{field.name.replace('_', '-')}", get_args(field.type)[-1].description
        kind = next(iter(get_args(kinds[field.name])), kinds[field.name])  # that beside None, if None is allowed
        if kind is bool:
            faults.add_argument(name, action="store_true", help=description)
        else:
            faults.add_argument(name, type=kind, default=field.default, help=description)
    return parser


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= _MAX_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: expected 0 to {_MAX_PORT}")
    return int(text)


def _ids(text: str, count: int) -> list[str]:
    if not text:
        return [f"A{number}" for number in range(1, count + 1)]
    ids = text.split(",")
    if len(ids) != count or len(set(ids)) != count:
        raise argparse.ArgumentTypeError(f"{text!r} has to be {count} different ids, one for each port")
    if not all(_ID.fullmatch(name) for name in ids):
        raise argparse.ArgumentTypeError('an id consists of a-z, A-Z, 0-9, ".", "-" and "_"')
    return ids
