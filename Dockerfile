# The worker, for those who want it in a container too; see docker-compose.worker.yml. Flower runs from it as well.
#
#   docker build -t localhost/millrace .

ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install -q --no-cache-dir "uv>=0.9,<1"
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE celery_app.py ./
COPY millrace millrace
COPY worker worker
COPY tasks tasks
# The locked versions, and of them only what a worker needs.
RUN python3 -m venv /opt/millrace \
 && UV_NO_CACHE=1 UV_SYSTEM_CERTS=1 /opt/uv/bin/uv pip install -q --python /opt/millrace/bin/python \
      --constraint requirements.lock ".[flower,postgres]" \
 && /opt/millrace/bin/pip uninstall -q -y pip setuptools

FROM ${PYTHON_IMAGE}
RUN useradd --uid 1000 --user-group --no-create-home millrace \
 && mkdir /data && chown 1000:1000 /data
COPY --from=build /opt/millrace /opt/millrace
# SIGTERM is a soft shutdown of a plain `celery worker` as well; `millrace worker` does it by itself.
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp DATA_DIR=/data REMAP_SIGTERM=SIGQUIT
WORKDIR /opt/millrace
USER 1000:1000
STOPSIGNAL SIGTERM
CMD ["millrace", "worker", "--listen", "0.0.0.0"]
