"""The carrier between a client and all ranks; a server has one at a time."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, get_args

from fp8ctl import wire
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.resting import quietly

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.engines.hooks.workers import Workers


class Connection:
    """What the ranks are connected to.

    Attributes:
        id: as its client was told; "" where there is none.
        disk: buckets are folders, and the ranks are connected to nothing.
    """

    def __init__(self, workers: Workers, engine: str) -> None:
        """Begin without one.

        Args:
            workers: of the engine.
            engine: its name, for hints.
        """
        self.id = ""
        self.disk = False
        self._workers = workers
        self._engine = engine

    async def open(self, offer: Mapping[str, Any]) -> None:
        """Have every rank open a carrier, instead of the one that was.

        Args:
            offer: the client's, of a known kind.

        Raises:
            RefusedError: the engine cannot load weights a second time, or a rank cannot open it.
        """
        try:
            answers = await self._workers.ask("refittable")
        except Exception as e:
            raise RefusedError(500, "FP8-ENGINE", f"{type(e).__name__}: {e}") from e
        why = [a.get("why", "") for a in answers if not a["refittable"]]
        if why:
            raise RefusedError(
                409,
                "FP8-REFIT",
                f"this server cannot load weights a second time: {why[0]}",
                hint=f"fp8ctl patch --backend {self._engine}" if "patch" in why[0] else "",
            )
        await self.close()
        kind = offer["kind"]
        if kind != "disk":
            try:
                await self._workers.ask("connect", carrier=offer)
            except Exception as e:
                await quietly(self._workers.ask("disconnect"))
                hint = 'via="disk", or via="nccl"' if kind in {"memory", "ipc"} else ""
                raise RefusedError(422, "FP8-CARRIER", str(e), hint=hint) from e
        self.id, self.disk = uuid.uuid4().hex, kind == "disk"

    async def close(self) -> None:
        """Have the ranks close what they have open."""
        if self.id and not self.disk:
            await quietly(self._workers.ask("disconnect"))
        self.id, self.disk = "", False

    def check(self, name: object) -> None:
        """Refuse who is not connected.

        Raises:
            RefusedError: there is no connection of this name.
        """
        if not name or name != self.id:
            raise RefusedError(
                404,
                "FP8-CONNECTION",
                f"there is no connection {name!r:.60}: another client came, or the server was"
                " started again",
                hint=f"POST {wire.CONNECT}",
            )


def read_offer(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a client offers; a folder where it offers nothing.

    Raises:
        WireError: another protocol, or a kind that nobody knows.
    """
    wire.check_protocol(found)
    offer = found.get("carrier") or {"kind": "disk"}
    if not isinstance(offer, dict) or offer.get("kind") not in get_args(wire.Kind):
        raise wire.WireError(f"carrier {offer!r:.200}; expected an offer of a known kind")
    return offer
