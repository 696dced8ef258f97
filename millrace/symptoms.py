"""What engines, Redis and Docker print when they fail, and what mends it.

The words are those of llama.cpp (b11549), vLLM 0.33, Redis 7 and the NVIDIA Container Toolkit.
"""

from __future__ import annotations

import re

#: What stands for a cause in a log, the most telling first; and what mends it.
SYMPTOMS: tuple[tuple[str, str], ...] = (
    # Our own entrypoints look first, and say what to do themselves.
    (r"^millrace: ", ""),
    # The GPU.
    (
        r"could not select device driver|nvidia-container-cli: initialization error|unresolvable CDI devices",
        "Install the NVIDIA Container Toolkit and a driver, or take docker-compose.gpu.yml out of COMPOSE_FILE.",
    ),
    (
        r"unsatisfied condition: cuda|forward compatibility was attempted|driver version is insufficient"
        r"|NVIDIA driver on your system is too old",
        "Upgrade the NVIDIA driver, or pick an older image (VLLM_IMAGE, LLAMACPP_IMAGE).",
    ),
    (
        r"Failed to infer device type|no CUDA-capable device|No CUDA GPUs are available",
        "Add docker-compose.gpu.yml to COMPOSE_FILE, or set VLLM_IMAGE to a CPU image.",
    ),
    (
        r"Free memory on device|Error in memory profiling",
        "End what else uses the GPU (nvidia-smi names it), or set GPU_MEMORY_UTILIZATION=0.7.",
    ),
    (
        r"Available memory on node",
        "Lower GPU_MEMORY_UTILIZATION: on a CPU it is the share of this machine's memory.",
    ),
    (
        r"No available memory for the cache blocks",
        "Raise GPU_MEMORY_UTILIZATION, or take a smaller model.",
    ),
    (
        r"To serve at least one request with the model|is greater than the derived max_model_len",
        "Lower MAX_MODEL_LEN, such as to 2048.",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|cudaMalloc failed|CUDA error: out of memory",
        "Lower GPU_MEMORY_UTILIZATION (0.7) and MAX_MODEL_LEN (2048) with vLLM, N_GPU_LAYERS or N_CTX with llama.cpp.",
    ),
    (r"must be divisible by tensor parallel size", "Set TENSOR_PARALLEL_SIZE to 1, 2, 4 or 8."),
    # The model.
    (
        r"failed to open GGUF file|Invalid repository ID or local directory",
        "Correct MODEL_PATH or MODEL_NAME; `docker compose exec llm-server ls -lh /models` shows what is there.",
    ),
    (
        r"unknown model architecture|GGUFv1 is no longer supported",
        "Take a newer llama.cpp (LLAMACPP_IMAGE), or a newer file of the model.",
    ),
    (
        r"invalid magic characters|not within the file bounds|corrupted or incomplete|tensor .* out of bounds",
        "The file is damaged or not whole: download it again.",
    ),
    (
        r"Cannot find any model weights",
        "The folder has no .safetensors: take the model's safetensors.",
    ),
    (
        r"GatedRepoError|Repository Not Found|401 Client Error",
        "Correct MODEL_NAME, or set HF_TOKEN for a model that is gated.",
    ),
    (
        r"couldn't connect to 'https?://|Max retries exceeded|Temporary failure in name resolution",
        "The Hub is not reachable from here: put the model into models/hf and set MODEL_NAME=/models/….",
    ),
    (
        r"unable to allocate|failed to allocate|Cannot allocate memory|std::bad_alloc|Out Of Memory allocating",
        "Lower N_CTX or N_PARALLEL, take a smaller quantization, or raise LLM_MEMORY.",
    ),
    (
        r"error loading model|failed to load model",
        "`docker compose logs llm-server` says more; try another model file.",
    ),
    (r"Illegal instruction", "The image is for another processor: build it here (docker compose build llm-server)."),
    # Redis.
    (
        r"Bad file format reading the append only file|Unexpected end of file reading the append only file",
        "Copy its volume, then: docker compose run --rm redis redis-check-aof --fix /data/appendonlydir/*.manifest",
    ),
    (
        r"Can't open or create append-only dir|Can't chdir to|Permission denied",
        "The volume belongs to another user: give it to the one who runs in the container.",
    ),
    (r"FATAL CONFIG FILE ERROR", "Correct what the line names in docker-compose.yml or .env."),
    # The machine.
    (
        r"port is already allocated|address already in use|Address already in use",
        "See `ports` below.",
    ),
    (r"[Nn]o space left on device", "Free some space: docker system df shows what Docker holds."),
    (r"exec format error", "The image is for another kind of processor: docker compose build --pull."),
)

_NOISE = re.compile(r"^\s*(at |File |\^+|Traceback|During handling|The above exception|$)")


def telling(lines: list[str]) -> tuple[str, str]:
    """Return the line that tells the cause, and what mends it.

    Where no line is known: the last one that says something, and an empty mend.
    """
    for pattern, mend in SYMPTOMS:
        for line in reversed(lines):
            if re.search(pattern, line):
                return _short(line), mend
    spoken = [line for line in lines if not _NOISE.match(line)]
    return (_short(spoken[-1]) if spoken else ""), ""


def _short(line: str) -> str:
    line = line.strip().removeprefix("millrace: ")
    return line if len(line) <= 300 else line[:299] + "…"
