"""What stays between updates: a carrier, and every server's end of it."""

from __future__ import annotations

import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from fp8ctl import __version__
from fp8ctl.carriers import ends
from fp8ctl.carriers.sent import Carrier
from fp8ctl.course import Places
from fp8ctl.errors import BusyError, ConflictError, UsageError
from fp8ctl.kernels import known
from fp8ctl.push.fleet import answers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from fp8ctl.carriers.ends import Sender
    from fp8ctl.course import Course
    from fp8ctl.push.client import Server
    from fp8ctl.push.fleet import Fleet
    from fp8ctl.wire import Kind


class Served(NamedTuple):
    """What the servers serve since the last update of this rollout, if nobody else changed it."""

    version: str
    digests: Mapping[str, str]


Via = Literal["ipc", "nccl", "disk"]


class Link:
    """The carrier and the connections of a rollout; made when first needed, and anew when broken.

    Attributes:
        kind: of the carrier; "disk" has none.
        sender: the trainer's end; None before `open`, and via disk.
        connections: as the servers named them, in their order.
        served: what the last update brought; None: nobody knows.
        course: of that update, to be followed by the next.
        places: what lies in the carrier's memory.
    """

    def __init__(
        self,
        via: Via,
        manifest: str,
        *,
        device: torch.device | None,
        host: str | None,
        timeout: float,
    ) -> None:
        """Say how, and by which plan; nothing is opened.

        Args:
            via: what the user asked for.
            manifest: digest of the plan; "" for none.
            device: where buckets are filled; None: what fits the servers.
            host: address of this host that the servers reach, for a process group; None: by
                which this host reaches them.
            timeout: seconds that joining, and one bucket, may take.
        """
        self.kind: Kind = "disk"
        self.sender: Sender | None = None
        self.connections: list[str] = []
        self.served: Served | None = None
        self.course: Course | None = None
        self.places = Places()
        self._via, self._manifest = via, manifest
        self._device, self._host, self._timeout = device, host, timeout
        self._nbytes = 0

    @property
    def carrier(self) -> Carrier | None:
        """What carries the bytes; None before `open`."""
        if self._via == "disk":
            return Carrier("disk")
        return None if self.sender is None else self.sender.carrier

    @property
    def device(self) -> torch.device:
        """Where buckets are filled."""
        if self.sender is not None:
            return self.sender.buffer(0).device
        if self._device is not None:
            return self._device
        cuda: Any = torch.cuda
        return torch.device("cuda" if cuda.is_initialized() else "cpu")

    def open(self, fleet: Fleet, nbytes: int, meanwhile: Callable[[], None] | None = None) -> None:
        """Have every server connected, with buckets of at least `nbytes` bytes.

        Args:
            fleet: the servers.
            nbytes: of a bucket.
            meanwhile: is called while they connect, if they have to.

        Raises:
            UnsupportedError: a server that cannot take a push, with what makes it able to.
            ConflictError: one has another plan.
            CarrierError: what is asked for does not reach it.
        """
        alive = self.sender is None or self.sender.alive
        if self.connections and alive and (self.sender is None or nbytes <= self._nbytes):
            return
        if self.connections and alive:
            self.close(fleet)  # the servers first: they have the smaller carrier open
        self.drop()
        states = fleet.all(lambda _, server: server.state())
        self._check(fleet.servers, states)
        if self._via != "disk":
            self.kind, device = self._way(fleet.servers, states)
            self.sender = ends.sender(
                self.kind,
                nbytes,
                device=self._device if self._device is not None else device,
                ranks=[int(state["ranks"]) for state in states] if self.kind == "group" else (),
                host=self._host or _here(fleet.servers),
                timeout=self._timeout,
            )
            self._nbytes = nbytes
        self.connect(fleet, meanwhile=meanwhile)

    def look(self, fleet: Fleet) -> None:
        """Leave a group that a rank has left: `open` makes another.

        Its server was started anew, or met another client. Other carriers are offered again
        when its update begins; a group is not joined twice.
        """
        if self.kind != "group" or not self.connections or self.sender is None:
            return
        self.sender.look()
        if not self.sender.alive:
            self.close(fleet)

    def connect(
        self,
        fleet: Fleet,
        those: Collection[int] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Offer the carrier to the servers.

        Args:
            fleet: the servers.
            those: by their numbers, where some were started anew; None: all.
            meanwhile: is called while they connect.
        """
        sender = self.sender
        client = {"fp8ctl": __version__, "torch": torch.__version__, "pid": os.getpid()}
        client["host"] = socket.gethostname()

        def one(i: int, server: Server) -> dict[str, Any]:
            return server.connect({"kind": "disk"} if sender is None else sender.offer(i), client)

        asked = [*range(len(fleet.servers))] if those is None else sorted(those)
        futures: list[Any] = list(fleet.start(one, asked))
        try:
            with ThreadPoolExecutor(1) as joining:
                try:
                    if sender is not None:
                        futures.append(joining.submit(sender.join))
                    if meanwhile is not None:
                        meanwhile()
                    found = answers(futures)
                except BaseException:
                    if sender is not None:
                        sender.cancel("a server could not connect")
                    raise
            for i, told in zip(asked, found, strict=False):
                self._check_manifest(fleet.servers[i], str(told["manifest"]))
        except BaseException:
            self.drop()
            raise
        if those is None:
            self.connections = [""] * len(asked)
        for i, told in zip(asked, found, strict=False):
            self.connections[i] = str(told["connection"])

    def close(self, fleet: Fleet) -> None:
        """Say goodbye to the servers, as far as they hear it, and give the carrier back."""
        connections, self.connections = self.connections, []
        if connections:
            with contextlib.suppress(Exception):
                fleet.all(lambda i, server: server.disconnect(connections[i]))
        self.drop()

    def drop(self) -> None:
        """Forget the connections; servers find out when another is made."""
        self.connections, self.served = [], None
        self.places.clear()  # no tensor may be left that uses the carrier's memory
        known.forget()
        sender, self.sender = self.sender, None
        if sender is not None:
            sender.close()

    def _check(self, servers: Sequence[Server], states: Sequence[dict[str, Any]]) -> None:
        for server, state in zip(servers, states, strict=True):
            if self._via == "nccl" and not state.get("ranks"):
                raise BusyError(
                    f"{server.url} does not know its ranks yet", hint="fp8ctl ps", data={}
                )

    def _check_manifest(self, server: Server, found: str) -> None:
        if found == self._manifest:
            return
        shown = [digest[:16] or "none" for digest in (self._manifest, found)]
        raise ConflictError(
            f"{server.url} was started with another plan: {shown[1]}; here it is {shown[0]}",
            hint='Plan.read(Path("manifest.json")) of the server\'s run folder is its plan'
            if found
            else "Rollout(urls, None) for a server that quantises itself",
            data={"server": server.url, "found": found, "expected": self._manifest},
        )

    def _way(
        self, servers: Sequence[Server], states: Sequence[dict[str, Any]]
    ) -> tuple[Kind, torch.device]:
        """Return the carrier for these servers, and where its buckets are filled."""
        kinds = {str(state.get("device")) for state in states}
        if len(kinds) > 1:
            on = ", ".join(
                f"{server.url}: {state.get('device')}"
                for server, state in zip(servers, states, strict=True)
            )
            raise UsageError(
                f"servers on a GPU and on a CPU ({on}) take no carrier together",
                hint="a Rollout for each kind",
            )
        gpu = kinds == {"cuda"}
        device = torch.device("cuda" if gpu else "cpu")
        if gpu and not torch.cuda.is_available():
            raise UsageError(
                "the servers are on GPUs, and this process has none to fill buckets on",
                hint='Rollout(urls, plan, via="disk")',
            )
        if self._via == "nccl":
            return "group", device
        return ("ipc" if gpu else "memory"), device


def _here(servers: Sequence[Server]) -> str:
    """Return the address of this host by which a server of another one is reached, if any is."""
    found = [server.here for server in servers]
    away = (one for one in found if one and one != "::1" and not one.startswith("127."))
    return next(away, "127.0.0.1")
