# The monitor alone: no torch, no compiler, no source tree. Build from the repository root.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY agent agent
COPY monitor monitor
COPY dashboards dashboards
COPY docs/runbooks docs/runbooks
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/gradiometer-*.whl)[monitor]" && rm -r /wheels
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin gradiometer
# A volume that is mounted here can be written by whatever user the container is given.
RUN install --directory --mode 1777 /state
USER gradiometer
ENTRYPOINT ["python", "-m", "gradiometer_monitor"]
CMD ["--dir", "/runs", "--host", "127.0.0.1", "--port", "9477"]
