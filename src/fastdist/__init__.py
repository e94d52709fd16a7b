"""fastdist: an HTTP endpoint that splits a stream of log packets over analyzers by weight, and loses none of them."""

__version__ = "0.1.0"  # read from here by pyproject.toml and the docs: to look it up in the metadata takes 60 ms
