"""A llama.cpp server as a process of its own: the real C++ server out of the `xllamacpp` wheel.

Its first line of stdin is a JSON object (see `Launch`); its only line on stdout, once the model is loaded,
is `{"url": …}`; it ends when its stdin closes, so it cannot outlive whoever started it. Its own log goes
to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Launch:
    """How to start the server. `context` counts tokens of one slot; `gpu_layers` -1 means all."""

    model: str
    alias: str
    slots: int
    context: int
    gpu_layers: int = 0
    #: 0 for half the processors: its threads wait busily, and we need some of the machine as well.
    threads: int = 0
    api_key: str | None = None
    #: 0 for a free one.
    port: int = 0

    def to_json(self) -> str:
        """Return the line that `main` reads."""
        return json.dumps(asdict(self))


#: For requests that wait for a slot, and for those who ask how it is.
SPARE_THREADS = 32


def main() -> None:
    """Serve until stdin closes."""
    launch = Launch(**json.loads(sys.stdin.readline()))
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = launch.model
    params.model_alias = {launch.alias}
    params.n_parallel = launch.slots
    # Both set, and no unified cache: each slot has its own context and none can overflow the others'
    # (llama.cpp#23652).
    params.n_ctx = launch.slots * launch.context
    params.kv_unified = False
    params.n_gpu_layers = launch.gpu_layers
    # What does not fit is an error, not a silently smaller context.
    params.fit_params = False
    params.hostnames = ["127.0.0.1"]
    params.port = launch.port
    if launch.api_key:
        params.api_keys = [launch.api_key]
    # A request keeps its thread while it waits for a slot; whoever finds none is not even told that we are there.
    params.n_threads_http = launch.slots + SPARE_THREADS
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    # An input of /v1/embeddings has to fit one physical batch.
    params.n_ubatch = params.n_batch
    params.ui = False
    # The host's prompt cache takes 8 GiB by default; rows rarely come back.
    params.cache_ram_mib = 0
    threads = launch.threads or max(1, (os.cpu_count() or 1) // 2)
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    # Its destructor waits for slots that are still at work; whoever closed our stdin does not.
    os._exit(0)


if __name__ == "__main__":
    main()
