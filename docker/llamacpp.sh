#!/bin/sh
# Runs a llama.cpp server with the settings that .env.sample describes; `llamacpp.sh health` asks it how it is.
# Our image has it inside, and it also runs in the public image of llama.cpp.
# It looks at the model first: a wrong one ends in a sentence, not in a page of log.
set -eu

PORT=${PORT:-8000}
LLAMACPP_SERVER=${LLAMACPP_SERVER:-native}
if [ -z "${LLM_API_KEY:-}" ] && [ -n "${LLM_API_KEY_FILE:-}" ]; then
    LLM_API_KEY=$(cat "$LLM_API_KEY_FILE")
fi

wrong() {
    printf 'millrace: %s\n' "$1" >&2
    exit 2
}

health() {
    # Only llama-server has /health; the other one lists its models when it is ready.
    route=/health
    [ "$LLAMACPP_SERVER" = native ] || route=/v1/models
    # From stdin: everybody on this machine can read a process's arguments.
    printf 'header = "Authorization: Bearer %s"\n' "${LLM_API_KEY:-}" |
        curl -fsS -o /dev/null -m 4 -K - "http://127.0.0.1:$PORT$route"
}

find_model() {
    case "${MODEL_PATH:-}" in
    '')
        set -- /models/*.gguf
        [ -f "$1" ] || wrong "There is no .gguf file in /models, which is models/gguf of the project. Put one there."
        if [ $# -gt 1 ]; then
            # The demo's own comes with the repository: nobody has put it there to be served.
            for file; do
                shift
                [ "${file##*/}" = millrace-demo.gguf ] || set -- "$@" "$file"
            done
        fi
        [ $# -eq 1 ] || wrong "There are $# .gguf files in /models: choose one with MODEL_PATH, such as MODEL_PATH=$1."
        MODEL_PATH=$1
        ;;
    # As it is called outside of the container.
    models/gguf/* | ./models/gguf/*) MODEL_PATH=/models/${MODEL_PATH#*models/gguf/} ;;
    esac
    [ -f "$MODEL_PATH" ] ||
        wrong "MODEL_PATH=$MODEL_PATH is not there. /models, which is models/gguf of the project, has: $(ls /models 2>/dev/null | head -20 | tr '\n' ' ')"
    [ -r "$MODEL_PATH" ] || wrong "MODEL_PATH=$MODEL_PATH cannot be read by user $(id -u): chmod a+r it."
    [ "$(head -c 4 "$MODEL_PATH" | tr -d '\0')" = GGUF ] || wrong "MODEL_PATH=$MODEL_PATH is not a GGUF file."
    if [ -z "${LLM_MODEL:-}" ]; then
        LLM_MODEL=${MODEL_PATH##*/}
        LLM_MODEL=${LLM_MODEL%.gguf}
    fi
}

serve() {
    find_model
    slots=${N_PARALLEL:-8} context=${N_CTX:-4096} layers=${N_GPU_LAYERS:-0} threads=${N_THREADS:-0}
    # Its threads wait busily, and the workers need some of the machine as well.
    [ "$threads" -gt 0 ] || threads=$((($(nproc) + 1) / 2))
    if [ "$LLAMACPP_SERVER" = python ]; then
        serve_python
    fi
    server=$(command -v llama-server || echo /app/llama-server)
    [ "$layers" -ge 0 ] || layers=all
    export LLAMA_API_KEY="${LLM_API_KEY:-}" LLAMA_ARG_MODEL="$MODEL_PATH" LLAMA_ARG_ALIAS="$LLM_MODEL"
    export LLAMA_ARG_HOST="${HOST:-0.0.0.0}" LLAMA_ARG_PORT="$PORT" LLAMA_ARG_N_GPU_LAYERS="$layers"
    # Both set, and no unified cache: each slot has its own context and none can overflow the others'
    # (llama.cpp#23652).
    export LLAMA_ARG_N_PARALLEL="$slots" LLAMA_ARG_CTX_SIZE=$((slots * context))
    # What does not fit is an error, not a silently smaller context.
    export LLAMA_ARG_FIT=off
    # The host's prompt cache takes 8 GiB by default; rows rarely come back.
    export LLAMA_ARG_CACHE_RAM=0
    export LLAMA_ARG_THREADS="$threads" LLAMA_ARG_ENDPOINT_METRICS=1 LLAMA_ARG_UI=0
    # A request keeps its thread while it waits for a slot: there must be some for those who ask how it is.
    export LLAMA_ARG_THREADS_HTTP=$((slots + 32))
    # /v1/embeddings beside the rest; one input of it has to fit one physical batch.
    export LLAMA_ARG_EMBEDDINGS=1 LLAMA_ARG_POOLING=mean LLAMA_ARG_BATCH=2048 LLAMA_ARG_UBATCH=2048
    # shellcheck disable=SC2086  # LLAMACPP_ARGS is a list of options
    exec "$server" ${LLAMACPP_ARGS:-}
}

serve_python() {
    # One request at a time, and a new one must not cancel the one that runs, as it does by default.
    export MODEL="$MODEL_PATH" MODEL_ALIAS="$LLM_MODEL" N_CTX="$context" N_GPU_LAYERS="$layers" N_THREADS="$threads"
    export HOST="${HOST:-0.0.0.0}" PORT INTERRUPT_REQUESTS=false
    [ -z "${LLM_API_KEY:-}" ] || export API_KEY="$LLM_API_KEY"
    # shellcheck disable=SC2086
    exec /opt/llama/python/bin/python -m llama_cpp.server ${LLAMACPP_ARGS:-}
}

case "${1:-serve}" in
serve) serve ;;
health) health ;;
*) exec "$@" ;;
esac
