"""``python -m fastdist``, and the installed command."""

from __future__ import annotations

import sys

from fastdist import early


def main() -> None:
    """Run the command line; never returns."""
    early.open_standard_streams()
    if sys.argv[1:2] == ["serve"]:
        early.watch_signals()
    from fastdist.cli import main  # noqa: PLC0415  (takes a while)

    main.main()


if __name__ == "__main__":
    main()
