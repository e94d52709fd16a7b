"""The files for TLS that a configuration names, read together: so all that is wrong with them is told at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdist.errors import ConfigError, StartError
from fastdist.net import tls, upstream_tls

if TYPE_CHECKING:
    from fastdist.ipc import Pair
    from fastdist.settings import Config


def read_files(config: Config) -> tuple[Config, Pair | None]:
    """Return the configuration with what its analyzers' files say, and its own certificate and key, if it has some.

    Raises ConfigError when any of the files cannot be used.
    """
    pair, problems = None, []
    try:
        pair = tls.read_pair(config.security)
    except StartError as error:
        problems += str(error).split("\n")
    try:
        config = upstream_tls.with_files(config)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config, pair
