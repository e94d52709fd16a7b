"""Where the commands about dead letters find them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.cli.options import CANNOT_START, exit_for, fail, jetstream_problems, load_or_exit
from fastdist.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.client.dead_letter_store import Store
    from fastdist.settings import Jetstream


@contextlib.contextmanager
def dead_letters_at(path: Path | None, config: str | None) -> Iterator[Store]:
    """Give the dead letters of a path, or of a configuration; exit if they cannot be had. Raises OSError, ValueError.

    Nothing is needed beside the configuration: with a stream, no part of the service has to run on this machine.
    """
    if (path is None) == (config is None):
        fail("where are the dead letters? Name PATH or --config FILE, one of them")
    if path is None:
        settings = load_or_exit(config, {}).config
        if settings.queue.backend == "jetstream":
            if problems := jetstream_problems(settings):
                exit_for(problems)
            with _stream(settings.jetstream) as store:
                yield store
            return
    from fastdist.client.dead_letter_store import Files
    from fastdist.storage.dead_letter_format import files_of, find_files

    if path is None and settings.dead_letters.path:  # that is the folder, whatever folders are in it
        yield Files(files_of(Path(settings.dead_letters.path)))
    else:
        yield Files(find_files(path or Path(settings.queue.path)))


@contextlib.contextmanager
def _stream(settings: Jetstream) -> Iterator[Store]:
    from fastdist.storage.jetstream import require_client

    logs.configure(logging.ERROR, lasting=False)
    try:
        require_client()
        from fastdist.client.dead_letter_stream import DeadLetterStream

        with DeadLetterStream(settings) as store:
            yield store
    except StartError as error:
        fail(str(error), CANNOT_START)
