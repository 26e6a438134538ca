"""A request of a push client that is turned down, as it is answered."""

from __future__ import annotations


class RefusedError(Exception):
    """What is answered instead of a result.

    Attributes:
        status: of HTTP.
        id: stable identifier (docs/design.md).
        message: one sentence with the value found and the value expected.
        hint: what to type or to set next; "" where nothing helps.
        data: facts for a program.
    """

    def __init__(
        self,
        status: int,
        id_: str,
        message: str,
        *,
        hint: str = "",
        data: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.id = id_
        self.message = message
        self.hint = hint
        self.data = data or {}

    def body(self, state: str) -> dict[str, object]:
        """Return the answer's body.

        Args:
            state: of the gate, now.
        """
        error = {"id": self.id, "message": self.message, "hint": self.hint, "data": self.data}
        return {"error": error, "state": state}
