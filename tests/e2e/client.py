"""What a trainer does, run by the engine's interpreter: push named tensors to a server.

    python client.py URL TENSORS.safetensors

Sends the file's tensors through SGLang's own route, pickled as its clients do.
"""

from __future__ import annotations

import sys

import requests
import torch
from safetensors.torch import load_file
from sglang.srt.utils import MultiprocessingSerializer


def main() -> None:
    url, path = sys.argv[1:]
    # The default strategy hands file descriptors over, which the server may outlive.
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    named = list(load_file(path).items())
    for _, tensor in named:
        tensor.share_memory_()
    payload = MultiprocessingSerializer.serialize(named, output_str=True)
    answer = requests.post(
        f"{url}/update_weights_from_tensor",
        json={"serialized_named_tensors": [payload], "flush_cache": True},
        timeout=120,
    )
    answer.raise_for_status()
    print(answer.status_code, answer.text)


if __name__ == "__main__":
    main()
