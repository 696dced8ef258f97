#!/bin/sh
# Runs Prometheus on loopback with prometheus.yml and alerts.yml of this folder, and the ports and the key of .env.
# Arguments are handed on to it.
set -eu

here=$(dirname "$0")
# In the container /tmp is memory: the key is on no disk.
umask 077
folder=$(mktemp -d)
cp "$here/alerts.yml" "$folder"
printf %s "${LLM_API_KEY:-}" >"$folder/llm_api_key"
sed -e "s/:9809\$/:${METRICS_PORT:-9809}/" -e "s/:8000\"/:${LLM_PORT:-8000}\"/" \
    "$here/prometheus.yml" >"$folder/prometheus.yml"
unset LLM_API_KEY
exec prometheus --config.file="$folder/prometheus.yml" \
    --web.listen-address="127.0.0.1:${PROMETHEUS_PORT:-9090}" \
    --storage.tsdb.retention.time=30d --storage.tsdb.retention.size=5GB "$@"
