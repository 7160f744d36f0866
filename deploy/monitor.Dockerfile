# The monitor alone: no torch, no compiler, no source tree. Build from the repository root.
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints-dev.txt README.md LICENSE ./
COPY agent agent
COPY monitor monitor
COPY dashboards dashboards
COPY docs/runbooks docs/runbooks
RUN python -m venv /opt/gradiometer \
    && /opt/gradiometer/bin/pip install --no-cache-dir --constraint constraints-dev.txt ".[monitor]"

FROM python:3.12.11-slim-bookworm
ENV PATH=/opt/gradiometer/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=build /opt/gradiometer /opt/gradiometer
# A volume that is mounted at /state can be written by whatever user the container is given.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin gradiometer \
    && install --directory --mode 1777 /state
USER gradiometer
EXPOSE 9477
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9477/-/healthy', timeout=4)"]
ENTRYPOINT ["python", "-m", "gradiometer_monitor"]
CMD ["--dir", "/runs", "--host", "127.0.0.1", "--port", "9477"]
