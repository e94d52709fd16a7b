"""``python -m mock_analyzers``."""

from mock_analyzers.cli import main

if __name__ == "__main__":
    main()
