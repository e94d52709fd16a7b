"""``python -m fastdist``, and the installed command."""

from __future__ import annotations

import gc
import sys

from fastdist import before_imports


def main() -> None:
    """Run the command line; never returns."""
    before_imports.open_standard_streams()
    if sys.argv[1:2] == ["serve"]:
        before_imports.watch_signals()
    gc.set_threshold(100_000)  # more than all imports make: none of that is garbage
    from fastdist.cli import main  # noqa: PLC0415  (takes a while)

    main.main()


if __name__ == "__main__":
    main()
