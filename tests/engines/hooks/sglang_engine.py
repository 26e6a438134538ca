"""Ranks of SGLang as stand-ins: what a question to them goes through."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import sglang_worker
from fp8ctl.engines.hooks.sglang_ranks import Workers

if TYPE_CHECKING:
    from torch import nn


class Engine:
    """Two ranks of SGLang: hands a request to the custom loader of each, rank 0 last.

    Attributes:
        rank: whose turn it is.
        silent: ranks that never get the request.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self.rank = 0
        self.silent: set[int] = set()
        self.waiting = False
        self.refusal = ""
        self.replicas = 1
        self.requests: list[Any] = []

    def auto_create_handle_loop(self) -> None:
        pass

    async def update_weights_from_tensor_communicator(self, request: Any) -> list[Any]:
        """As SGLang's own: one question at a time, and one that is left alone blocks it."""
        assert not self.waiting
        self.waiting = True
        await asyncio.sleep(0.01)
        self.waiting = False
        self.requests.append(request)
        if self.refusal:
            return [SimpleNamespace(success=False, message=self.refusal)] * self.replicas
        assert request.load_format == sglang_worker.LOADER
        assert not request.flush_cache
        for rank in reversed(range(len(self.models))):
            self.rank = rank
            if rank not in self.silent:
                named = pickle.loads(request.serialized_named_tensors[rank])
                named = [(name, tensor.to("the device")) for name, tensor in named]
                sglang_worker.load(self.models[rank], named)
        return [SimpleNamespace(success=True, message=sglang_worker.taken("Success"))]


def workers(engine: Engine) -> Workers:
    http_server = SimpleNamespace(_global_state=SimpleNamespace(tokenizer_manager=engine))
    arguments = SimpleNamespace(tp_size=len(engine.models), enable_memory_saver=False)
    return Workers(http_server, arguments)
