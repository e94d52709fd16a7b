"""fastdist: an HTTP endpoint that splits a stream of log packets over analyzers by weight, and loses none of them."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes a while to import
if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Look the version up on first use: that takes longer than all that must be done first at a start."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version  # noqa: PLC0415

        globals()[name] = found = version("fastdist")
        return found
