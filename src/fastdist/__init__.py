"""fastdist: an HTTP endpoint that splits a stream of log packets over analyzers by weight, and loses none of them."""

from importlib.metadata import version

__version__ = version("fastdist")
