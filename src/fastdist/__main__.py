"""``python -m fastdist``: the same as the installed command."""

from fastdist.cli import main

if __name__ == "__main__":
    main()
