"""What a server said of the fixed texts, in a file: to compare another server with it.

One JSON object, version 1:

    fp8ctl_logprobs   1
    texts             version of `texts.TEXTS`
    model             the name that the server served under
    engine            `sglang` or `vllm`, and its version
    recorded          when, UTC
    noise             mean |difference| between two answers of that server
    fits, verdict     what check said of it then; null where nothing was compared
    apart             mean |difference| of BF16 and the nearest FP8 of that model; null likewise
    ids               token ids of each text
    logprobs          of every id but the first; null where it was no number
    top               likeliest token there; -1 where that was not told
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from fp8ctl.check.prompts import Scores
from fp8ctl.errors import NotFoundError, NotPermittedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.check.prompts import Ids

VERSION: Final = 1
_AGAIN: Final = "fp8ctl check URL --record FILE"


@dataclass(frozen=True, slots=True)
class Recording:
    """One file; the module says what the fields are."""

    texts: int
    model: str
    engine: str
    recorded: str
    noise: float
    fits: str | None
    verdict: str | None
    apart: float | None
    ids: Ids
    scores: Scores

    def to_json(self) -> dict[str, object]:
        """Return the file's object."""
        return {
            "fp8ctl_logprobs": VERSION,
            "texts": self.texts,
            "model": self.model,
            "engine": self.engine,
            "recorded": self.recorded,
            "noise": self.noise,
            "fits": self.fits,
            "verdict": self.verdict,
            "apart": self.apart,
            "ids": [list(text) for text in self.ids],
            "logprobs": [
                [value if math.isfinite(value) else None for value in text]
                for text in self.scores.logprobs
            ],
            "top": [list(text) for text in self.scores.top],
        }

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            NotPermittedError: it cannot be written.
        """
        try:
            path.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")
        except OSError as e:
            raise NotPermittedError(
                f"cannot write {path}: {e.strerror}", hint="--record /a/folder/you/own/FILE"
            ) from e


def now() -> str:
    """Return the time as a recording has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(path: Path) -> Recording:
    """Read a recording.

    Raises:
        NotFoundError: there is no file that can be read.
        UsageError: it is no recording, or one of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise NotFoundError(f"cannot read {path}: {e.strerror}", hint=_AGAIN) from e
    except ValueError as e:
        raise UsageError(f"{path} is not JSON: {e}", hint=_AGAIN) from e
    found = document.get("fp8ctl_logprobs") if isinstance(document, dict) else None
    if found is None:
        raise UsageError(f"{path} is no recording: it has no fp8ctl_logprobs", hint=_AGAIN)
    if found != VERSION:
        raise UsageError(
            f"{path} is a recording of version {found!r}; expected {VERSION}", hint=_AGAIN
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is no recording: {type(e).__name__} {e}", hint=_AGAIN) from e


def _parse(document: dict[str, Any]) -> Recording:
    ids = tuple(tuple(int(one) for one in text) for text in document["ids"])
    logprobs = tuple(
        tuple(math.nan if value is None else float(value) for value in text)
        for text in document["logprobs"]
    )
    top = tuple(tuple(int(one) for one in text) for text in document["top"])
    lengths = [len(text) - 1 for text in ids]
    if not ids or min(lengths) < 1:
        raise ValueError("a text without two tokens")
    if [len(text) for text in logprobs] != lengths or [len(text) for text in top] != lengths:
        raise ValueError("ids, logprobs and top are not of the same lengths")
    fits, verdict, apart = document["fits"], document["verdict"], document["apart"]
    return Recording(
        texts=int(document["texts"]),
        model=str(document["model"]),
        engine=str(document["engine"]),
        recorded=str(document["recorded"]),
        noise=float(document["noise"]),
        fits=None if fits is None else str(fits),
        verdict=None if verdict is None else str(verdict),
        apart=None if apart is None else float(apart),
        ids=ids,
        scores=Scores(logprobs, top),
    )
