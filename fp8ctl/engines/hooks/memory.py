"""Memory that an engine has given up for a while: nothing may read or write what lay there.

SGLang's /release_memory_occupation and vLLM's /sleep unmap it, and leave the addresses as they
are. A copy to one of them, or a digest of what was there, ends the process.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks.refused import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: As both engines call the parts.
WEIGHTS, CACHE = "weights", "kv_cache"
ALL = frozenset({WEIGHTS, CACHE})
#: What brings it back, by engine.
_BACK = {
    "sglang": "curl -X POST URL/resume_memory_occupation"
    " -H 'Content-Type: application/json' -d '{}'",
    "vllm": "curl -X POST URL/wake_up",
}


class Memory:
    """What of one server's memory is there.

    Attributes:
        released: parts that are not.
    """

    def __init__(self, engine: str) -> None:
        """Begin with all of it.

        Args:
            engine: "sglang" or "vllm", for hints.
        """
        self.released: frozenset[str] = frozenset()
        #: Held by who reads weights, and by who gives them up.
        self.turn = asyncio.Lock()
        self._engine = engine

    def give_up(self, parts: Iterable[str]) -> None:
        """Note that parts are released, or will be as far as anybody knows."""
        self.released |= ALL & frozenset(parts)

    def bring_back(self, parts: Iterable[str]) -> None:
        """Note that parts are there again."""
        self.released -= frozenset(parts)

    def require_weights(self) -> None:
        """Refuse what would touch weights that are not there.

        Raises:
            RefusedError: they are not.
        """
        if WEIGHTS in self.released:
            raise RefusedError(
                409,
                "FP8-RELEASED",
                "the memory of the weights is released: there is nothing to write to",
                hint=_BACK.get(self._engine, ""),
                data={"released": sorted(self.released)},
            )


def released_by(body: bytes) -> frozenset[str]:
    """Return the parts that a body of SGLang's /release_memory_occupation means.

    Nothing said means all; what is no body means nothing: SGLang refuses it.
    """
    try:
        tags: Any = json.loads(body or b"{}").get("tags")
        return ALL if tags is None else ALL & frozenset(tags)
    except (ValueError, AttributeError, TypeError):
        return frozenset()


def resumed_by(body: bytes) -> frozenset[str]:
    """Return the parts that a body of /resume_memory_occupation means: an empty list is all."""
    try:
        tags: Any = json.loads(body or b"{}").get("tags")
        return ALL & frozenset(tags) if tags else ALL
    except (ValueError, AttributeError, TypeError):
        return frozenset()
