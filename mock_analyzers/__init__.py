"""Mock analyzers: HTTP servers that take packets, misbehave on request, and count what was really delivered.

``python -m mock_analyzers`` starts A1..A4 on ports 3001..3004. Tests use them as the ledger outside fastdist, so the
counts are the point: see :mod:`mock_analyzers.ledger` for what each of them means. Two rules hold throughout:

1. One request costs no task, no future and no timer (unless a latency is set): the load generator, fastdist and the
   mock share the machine, and what the mock burns is missing from the measurement.
2. Nothing a client sends may stop the mock or make it print a traceback.
"""
