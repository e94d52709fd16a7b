"""What HEALTHCHECK runs in the container: exit status 0 when the distributor in it answers GET /health, 1 otherwise.

It asks where the distributor listens according to the same file and variables, so it need not be changed with them;
options given to ``fastdist serve`` it cannot see. Where there is one, it asks at the address of ``admin.listen``, at
which no PROXY header is asked for. A certificate is not checked: it is made out to another name.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

from fastdist.config import load
from fastdist.errors import ConfigError
from fastdist.units import split_listen

SECONDS = 2.0


def main() -> int:
    """Ask, and say what is wrong."""
    try:
        config = load(None, os.environ, {}).config
    except ConfigError as error:  # of the file as it is now: what runs may have been started with a better one
        sys.stderr.write(f"{error}\n")
        config = load(None, {name: value for name, value in os.environ.items() if name != "FASTDIST_CONFIG"}, {}).config
    host, port, tls = config.server.host, config.server.port, bool(config.security.tls_cert)
    if config.admin.listen:
        host, port = split_listen(config.admin.listen)
        tls = tls and config.admin.tls == "on"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (not bound)
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    if tls:
        unchecked = ssl._create_unverified_context()  # noqa: S323, SLF001  (we ask ourselves)
        connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=unchecked)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        answer = response.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"no answer from {host} port {port}: {error}\n")
        return 1
    sys.stdout.write(f"{answer}\n")
    return 0 if response.status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())
