"""What the doctor makes of the last words of containers: lines as llama.cpp, vLLM, Redis and Docker print them."""

from __future__ import annotations

import re

import pytest

from millrace.symptoms import SYMPTOMS, telling

LINES = [
    ("millrace: MODEL_PATH=/models/x.gguf is not a GGUF file.", ""),
    ('could not select device driver "nvidia" with capabilities: [[gpu]]', "NVIDIA Container Toolkit"),
    (
        "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0, please update your driver",
        "Upgrade",
    ),
    ("Error 804: forward compatibility was attempted on non supported HW", "older image"),
    ("RuntimeError: Failed to infer device type, please set", "CPU image"),
    ("Free memory on device cuda:0 (1.2/8.0 GiB) on startup is less than", "GPU_MEMORY_UTILIZATION=0.7"),
    ("Available memory on node 0 (1.2/8.0 GiB) on startup is less than desired CPU memory utilization", "on a CPU"),
    ("ValueError: No available memory for the cache blocks. Try increasing", "Raise GPU_MEMORY_UTILIZATION"),
    (
        "To serve at least one request with the model's max seq len (8192), (4.00 GiB KV cache is needed",
        "MAX_MODEL_LEN",
    ),
    ("User-specified max_model_len (9000) is greater than the derived max_model_len (n_ctx=4096", "MAX_MODEL_LEN"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "N_GPU_LAYERS"),
    ("ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory", "N_GPU_LAYERS"),
    ("Total number of attention heads (14) must be divisible by tensor parallel size (4).", "TENSOR_PARALLEL_SIZE"),
    ("gguf_init_from_file: failed to open GGUF file '/models/x.gguf' (No such file or directory)", "MODEL_PATH"),
    ("llama_model_load: error loading model: unknown model architecture: 'qwen9'", "newer llama.cpp"),
    ("gguf_init_from_file_impl: invalid magic characters: 'vers', expected 'GGUF'", "download it again"),
    ("error loading model: tensor 'blk.3' data is not within the file bounds, model is corrupted", "download it again"),
    ("RuntimeError: Cannot find any model weights with `/models/x`", "safetensors"),
    ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "HF_TOKEN"),
    ("We couldn't connect to 'https://huggingface.co' to load the files", "models/hf"),
    ("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 99", "N_CTX"),
    ("main: exiting due to model loading error: error loading model: odd", "docker compose logs"),
    ("Illegal instruction (core dumped)", "another processor"),
    ("# Bad file format reading the append only file appendonly.aof.1.incr.aof", "redis-check-aof --fix"),
    ("# Can't open or create append-only dir appendonlydir: Permission denied", "another user"),
    ("*** FATAL CONFIG FILE ERROR (Redis 7.0.15) ***", ".env"),
    ("Bind for 127.0.0.1:8000 failed: port is already allocated", "`ports`"),
    ("write /data/x: no space left on device", "docker system df"),
    ("exec /usr/local/bin/docker-entrypoint.sh: exec format error", "docker compose build"),
]


@pytest.mark.parametrize(("line", "mend"), LINES)
def test_telling(line: str, mend: str) -> None:
    noise = ["INFO 11-21 02:00:00 [api_server.py:1] vLLM", "", "Traceback (most recent call last):", '  File "x.py"']
    told, cure = telling([*noise, line, "    raise", ""])
    assert told == line.removeprefix("millrace: ")
    assert mend in cure


def test_every_symptom_has_a_line() -> None:
    assert not [pattern for pattern, _ in SYMPTOMS if not any(re.search(pattern, line) for line, _ in LINES)]


def test_the_cause_goes_before_what_follows_from_it() -> None:
    lines = ["unable to allocate CUDA0 buffer", "cudaMalloc failed: out of memory", "error loading model: failed"]
    assert telling(lines)[0] == "cudaMalloc failed: out of memory"


def test_a_line_that_nobody_knows() -> None:
    assert telling(["one", "two", "", "  File x"]) == ("two", "")
    assert telling([]) == ("", "")
    assert len(telling(["x" * 1000])[0]) == 300
