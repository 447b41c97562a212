# chatd in a container: docs/deploying.md says how to run it. It needs no more than /data and /tmp
# to write to, so `--read-only` works, and it is nobody's root.

FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
# The versions that the tests run with.
RUN python -m venv /opt/chatd && \
    /opt/chatd/bin/pip install --no-cache-dir --constraint constraints.txt ".[postgres]"

FROM python:3.11-slim
RUN groupadd --gid 10001 chatd && \
    useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin chatd && \
    install --directory --owner 10001 --group 10001 --mode 0700 /data
COPY --from=build /opt/chatd /opt/chatd
ENV PATH="/opt/chatd/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# Where chatd.db is made, and chatd.yaml is found, if there is one.
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8000') + '/healthz', timeout=4)"]
# Docker's SIGTERM lets running turns finish: give it more time than server.drain_seconds.
CMD ["chatd", "serve", "--host", "0.0.0.0"]
