"""Connecting to analyzers, for workers and the supervisor: names, addresses, time-outs, TLS."""
