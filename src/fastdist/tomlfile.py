"""Reading a TOML file that may be written at this moment: half of it may be valid as well."""

from __future__ import annotations

import os
import re
import stat
import time
import tomllib
from typing import TYPE_CHECKING, Any

from fastdist.errors import ConfigError, Fault

if TYPE_CHECKING:
    from pathlib import Path

READINGS, PAUSE = 20, 0.01  # attempts to read a file that changes meanwhile, and seconds between them


def read(file: Path, origin: str, quiet: float) -> tuple[dict[str, Any], str]:
    """Return what a file says, and its text, once it has stayed the same for ``quiet`` seconds after it was read.

    Raises ConfigError; ``origin`` says there where the file's name came from.
    """
    line = 0
    try:
        text = read_whole(file, quiet).decode("utf-8-sig")
        return tomllib.loads(text), text
    except OSError as error:
        problem = f"cannot be read: {error.strerror}{origin}"
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1}: not UTF-8"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # TOMLDecodeError, and what int() and datetime() raise inside tomllib
        text = str(error)
        where = re.fullmatch(r"(.*) \(at (line (\d+), column \d+|end of document)\)", text, re.DOTALL)
        problem = f"{where[2]}: {where[1]}" if where else text
        line = int(where[3]) if where and where[3] else 0
    raise ConfigError([Fault(f"{file}: {problem}", file=str(file), line=line)])


def read_whole(file: Path, quiet: float) -> bytes:
    """Return what a file holds, as ``read`` does it. Raises OSError, and ValueError if it changes all the time."""
    for _ in range(READINGS):
        with file.open("rb") as stream:
            before, data = _identity(os.fstat(stream.fileno())), stream.read()
        time.sleep(quiet)
        if before == _identity(file.stat()):
            return data
        time.sleep(PAUSE)
    raise ValueError("changes while it is read; try again when it is written")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what distinguishes states of a regular file; nothing for a pipe, which can be read only once."""
    if not stat.S_ISREG(status.st_mode):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
