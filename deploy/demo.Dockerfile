# A job that trains for ever, on the CPU: the demo of the stack. Build from the repository root.
FROM python:3.12.11-slim-bookworm AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/gradiometer \
    && /opt/gradiometer/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" torch==2.13.0
COPY pyproject.toml constraints-dev.txt README.md LICENSE ./
COPY agent agent
COPY monitor monitor
COPY dashboards dashboards
COPY docs/runbooks docs/runbooks
RUN /opt/gradiometer/bin/pip install --no-cache-dir --constraint constraints-dev.txt .

FROM python:3.12.11-slim-bookworm
ENV PATH=/opt/gradiometer/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=build /opt/gradiometer /opt/gradiometer
COPY deploy/demo.py /opt/gradiometer/demo.py
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin gradiometer
USER gradiometer
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["sh", "-c", "find /runs -path '*/stack-demo-*' -type f -mmin -1 | grep -q ."]
ENTRYPOINT ["python", "/opt/gradiometer/demo.py"]
CMD ["--dir", "/runs"]
