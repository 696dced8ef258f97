#!/bin/sh
# Runs vLLM with the settings that .env.sample describes; `vllm.sh health` asks it how it is.
# It looks at the model and the GPU first: a wrong one ends in a sentence, not after minutes in a page of log.
set -eu

PORT=${PORT:-8000}
if [ -z "${LLM_API_KEY:-}" ] && [ -n "${LLM_API_KEY_FILE:-}" ]; then
    LLM_API_KEY=$(cat "$LLM_API_KEY_FILE")
fi

wrong() {
    printf 'millrace: %s\n' "$1" >&2
    exit 2
}

find_model() {
    case "${MODEL_NAME:-}" in
    '')
        set -- /models/*/config.json
        [ -f "$1" ] || wrong "There is no model folder in /models, which is models/hf of the project. Put one there, or name one of the Hub in MODEL_NAME."
        [ $# -eq 1 ] || wrong "There are $# model folders in /models: choose one with MODEL_NAME, such as MODEL_NAME=${1%/config.json}."
        MODEL_NAME=${1%/config.json}
        ;;
    # As it is called outside of the container.
    models/hf/* | ./models/hf/*) MODEL_NAME=/models/${MODEL_NAME#*models/hf/} ;;
    esac
    MODEL_NAME=${MODEL_NAME%/}
    case "$MODEL_NAME" in
    /*)
        [ -d "$MODEL_NAME" ] ||
            wrong "MODEL_NAME=$MODEL_NAME is not there. /models, which is models/hf of the project, has: $(ls /models 2>/dev/null | head -20 | tr '\n' ' ')"
        [ -r "$MODEL_NAME/config.json" ] || wrong "MODEL_NAME=$MODEL_NAME has no config.json that user $(id -u) can read: it is no Hugging Face model folder."
        set -- "$MODEL_NAME"/*.safetensors
        [ -f "$1" ] || wrong "MODEL_NAME=$MODEL_NAME has no .safetensors file. Pickled .bin weights can run code and are not loaded: take the model's safetensors."
        ;;
    esac
    [ -n "${LLM_MODEL:-}" ] || LLM_MODEL=${MODEL_NAME##*/}
}

find_gpu() {
    # The CPU build says so in its version.
    version=$(python3 -c 'from importlib.metadata import version; print(version("vllm"))')
    case "$version" in *cpu*) return ;; esac
    for device in /dev/nvidiactl /dev/dxg /dev/kfd; do
        [ ! -e "$device" ] || return 0
    done
    wrong "vLLM $version is built for GPUs, and this container has none: add docker-compose.gpu.yml to COMPOSE_FILE, or set VLLM_IMAGE to a CPU image, or choose llama.cpp."
}

serve() {
    find_model
    find_gpu
    [ -z "${LLM_API_KEY:-}" ] || export VLLM_API_KEY="$LLM_API_KEY"
    [ -z "${HF_TOKEN:-}" ] || export HF_TOKEN
    # shellcheck disable=SC2086  # VLLM_ARGS is a list of options
    exec vllm serve "$MODEL_NAME" --served-model-name "$LLM_MODEL" --host "${HOST:-0.0.0.0}" --port "$PORT" \
        --max-model-len "${MAX_MODEL_LEN:-4096}" --tensor-parallel-size "${TENSOR_PARALLEL_SIZE:-1}" \
        --gpu-memory-utilization "${GPU_MEMORY_UTILIZATION:-0.9}" --max-num-queued-reqs "${MAX_NUM_QUEUED_REQS:-1024}" \
        --shutdown-timeout 60 --disable-access-log-for-endpoints /health,/metrics ${VLLM_ARGS:-}
}

case "${1:-serve}" in
serve) serve ;;
health) curl -fsS -o /dev/null -m 4 "http://127.0.0.1:$PORT/health" ;;
*) exec "$@" ;;
esac
