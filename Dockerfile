# Two images from one file:
#   docker build -t fastdist:0.1.0 .                                            the distributor (the last stage)
#   docker build -t fastdist-mock-analyzers:0.1.0 --target mock-analyzers .     analyzers to try it with
#
# The distributor reads /etc/fastdist/fastdist.toml (mount yours there; the image has the defaults), keeps its queue in
# /var/lib/fastdist (mount a volume there) and runs as user 10001. `docker stop` waits 10 s unless told otherwise, and
# draining may take 30: use --stop-timeout 60.

FROM python:3.13.12-bookworm AS build
WORKDIR /build
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir dist .
# Without pip of its own: nothing in the final image installs anything. The extra is for queue.backend = "jetstream".
RUN python -m venv --without-pip /opt/fastdist \
    && set -- dist/*.whl \
    && python -m pip --python /opt/fastdist/bin/python install --no-cache-dir "$1[jetstream]"

FROM build AS build-mock-analyzers
# The parser that the mock analyzers are built on; all else they need, fastdist needs as well.
RUN python -m pip --python /opt/fastdist/bin/python install --no-cache-dir "httptools>=0.9"

FROM python:3.13.12-slim-bookworm AS base
RUN groupadd --gid 10001 fastdist \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fastdist --shell /usr/sbin/nologin fastdist \
    && install -d -m 0700 -o 10001 -g 10001 /var/lib/fastdist
ENV PATH="/opt/fastdist/bin:$PATH" \
    PYTHONUNBUFFERED=1
USER 10001:10001

FROM base AS mock-analyzers
COPY --from=build-mock-analyzers /opt/fastdist /opt/fastdist
COPY mock_analyzers /opt/fastdist/mock/mock_analyzers
WORKDIR /opt/fastdist/mock
EXPOSE 3001 3100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:3001/health', timeout=2)"]
ENTRYPOINT ["python", "-m", "mock_analyzers", "--host", "0.0.0.0", "--ports", "3001", "--control-port", "3100"]
CMD ["--ids", "A1"]

FROM base AS fastdist
COPY --from=build /opt/fastdist /opt/fastdist
COPY deploy/docker/healthcheck.py /opt/fastdist/lib/healthcheck.py
COPY fastdist.example.toml /etc/fastdist/fastdist.toml
ENV FASTDIST_CONFIG=/etc/fastdist/fastdist.toml \
    FASTDIST_QUEUE__PATH=/var/lib/fastdist
WORKDIR /var/lib/fastdist
VOLUME ["/var/lib/fastdist"]
EXPOSE 3000
# Process 1 without an init: it acts on signals from its first moments on, and reaps what others leave behind.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-P", "/opt/fastdist/lib/healthcheck.py"]
ENTRYPOINT ["fastdist"]
CMD ["serve"]
