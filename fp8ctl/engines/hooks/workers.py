"""What a push's session asks of an engine; each engine's server module answers in its own way.

The session (`updates`) knows no engine: it closes the gate, has running requests
held, has buckets loaded, and settles the state. Everything that touches an engine
is behind this Protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.wire import InFlight


class Reloaded(NamedTuple):
    """How an engine's own reload from a folder ended.

    Attributes:
        ok: every rank has taken the folder.
        message: what went wrong.
        changed: False only where it is known that no rank has written a weight.
    """

    ok: bool
    message: str = ""
    changed: bool = True


class Workers(Protocol):
    """All workers of one server, and the requests that run on them.

    No two methods are called at a time, but for a `hold` that is cancelled.

    Attributes:
        ranks: how many answers `ask` gives.
    """

    ranks: int

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        """Return one answer per rank, in the order of ranks.

        What is asked, and what each rank answers:

        - "refittable" {}: `refittable` (bool); `why` (str) where it is not.
        - "connect" {carrier: the client's offer}: {}. A rank that cannot open it fails.
        - "disconnect" {}: {}. Also where nothing is connected.
        - "receive" {number, slot, nbytes, list: a name, entries: without digests or facts}, or
          without entries where the rank was told them under this name: `loaded` (how many
          tensors), `broken` (True where weights were written and it then failed), `error`
          ("" or why; this question never raises for it), `seconds` {stage: seconds}. When
          it answers, the client may write where the bucket lies. With {then: details of
          "progress"} also `then`, the answer to that, unless there is an error.
        - "progress" {expected: names}, as `settle`: the rank brings up to date what it derives from
          weights and waits for its device, then answers `broken` (an update raised half-way since
          the last `forget`), `unfilled` {name: which part} of the unscaled guard, `missing` (the
          first of `expected` that never arrived) and `missing_count`. With {layouts: by rank, or
          []} also `digests`, the answer to "digests", unless it is broken. With {sums}, asked where
          there is one rank: one that lacks nothing and whose digests are these lets the engine
          compute again at once, and says so: `resumed`.
        - "trust" {names}, as `resume`: {}. Digests of these were found to be those that were sent:
          from now on the rank may copy them to where it holds them, around the loaders.
        - "forget" {}: {}. Counts arrived names, and what the guard counts, from nothing; trusts
          nothing.
        - "names" {}: `names` of the checkpoint tensors that the rank holds something of, as far as
          the engine's own names say it, and `same` {name: another one in the same memory}.
        - "digests" {} or {layouts: by rank}: `rank`, `format` ("checkpoint", "online", "shared" or
          "engine"), `layout` (a name for which tensors lie where) and `unfilled`, `tensors`
          (`shards.describe`), `next` and `seconds`; or, to one that is asked with this very layout,
          `sums` alone (`held.packed`), in the order of `tensors`.
        - "digests" {starts: by rank, most}: a slice, as above without `layout`.
        - "inspect" {names, rows, most}: `rank`, `tensors` (`inspection.inspect`).

        Raises:
            RuntimeError: a rank failed or did not answer; the message names it.
        """
        ...

    async def load_from_disk(self, path: str) -> Reloaded:
        """Have every rank load a folder of safetensors that it can read."""
        ...

    async def hold(self, in_flight: InFlight, within: float) -> None:
        """Bring the engine to rest; afterwards nothing runs on the weights until `resume`.

        A request that comes after waits for `resume` too, without being computed.
        "finish": wait for what runs. "abort": end it, so that its client has an answer.
        "pause": take it out; it goes on after `resume` and computes its keys and values anew.
        May be called when the engine is held: "abort" then ends what is paused.
        May be cancelled at any point; `resume` is called after that, and after an exception.

        Raises:
            TimeoutError: requests still run after `within` seconds.
        """
        ...

    async def resume(self, trust: Sequence[str] = ()) -> str:
        """Let the engine compute again; does nothing where it is not held.

        Args:
            trust: names of "trust", which all ranks are told first.

        Returns:
            Why a rank does not trust them, and none must be taken to; "" where all do.

        Raises:
            RuntimeError: the engine could not be brought back.
        """
        ...

    async def receive(
        self, details: Mapping[str, Any], then: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Ask "receive"; and what `settle` asks as well, where the update ends with this bucket.

        Args:
            details: of "receive".
            then: of "progress"; None: more is to come, as far as anybody knows.

        Raises:
            RuntimeError: of either.
        """
        ...

    async def settle(self, **details: Any) -> list[dict[str, Any]]:
        """Ask "progress" and `flush`, both at once; called when the last bucket was taken.

        Raises:
            RuntimeError: of either.
        """
        ...

    async def flush(self) -> None:
        """Forget all keys and values of the weights that were; called while held.

        Raises:
            RuntimeError: some could not be forgotten.
        """
        ...
