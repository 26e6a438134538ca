"""What a server answers, as an error of the one tree, with the server's name and a way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8ctl.errors import (
    BusyError,
    CarrierError,
    CheckFailedError,
    ConflictError,
    EngineFailedError,
    Fp8ctlError,
    NotPermittedError,
    PlanDoesNotFitError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

#: By the server's id. Its own id stays in the error's `data`, as `reply`.
_KINDS: Mapping[str, type[Fp8ctlError]] = {
    "FP8-REFIT": UnsupportedError,
    "FP8-WIRE": UnsupportedError,
    "FP8-CARRIER": CarrierError,
    "FP8-BUSY": BusyError,
    "FP8-RELEASED": BusyError,
    "FP8-DRAIN": BusyError,
    "FP8-MANIFEST": ConflictError,
    "FP8-CONNECTION": ConflictError,
    "FP8-ORDER": ConflictError,
    "FP8-TENSOR": PlanDoesNotFitError,
    "FP8-INCOMPLETE": ConflictError,
    "FP8-UNEQUAL": CheckFailedError,
}
_HINTS: Mapping[str, str] = {
    "FP8-REFIT": "fp8ctl patch --backend {backend}, then start the server anew: fp8ctl launch",
    "FP8-WIRE": "install the same fp8ctl on both sides: fp8ctl --version",
    "FP8-CARRIER": 'Rollout(urls, plan, via="disk")',
    "FP8-BUSY": "fp8ctl push-log {url}",
    "FP8-DRAIN": 'Rollout(urls, plan, in_flight="abort")',
    "FP8-MANIFEST": "start it by the trainer's plan: fp8ctl launch --backend {backend} --plan F",
    "FP8-TENSOR": "plan what is trained: fp8ctl plan --model M --backend {backend} --out plan.json",
    "FP8-INCOMPLETE": "send all tensors of the checkpoint, or update(..., complete=False)",
    "FP8-UNEQUAL": "update again; and look at the server: fp8ctl check --level weights {url}",
}


#: What the server would have its client do, and this client does by itself.
_OURS: Mapping[str, str] = {"FP8-CONNECTION": "update again: that connects anew"}


def refused(url: str, status: int, body: Any, *, backend: str, secret: str) -> Fp8ctlError:
    """Return the error that an answer is.

    Args:
        url: of the server.
        status: of the answer.
        body: of the answer, read as JSON; None: it was none.
        backend: "vllm" or "sglang", for hints.
        secret: the API key, which no error shows; "" for none.
    """
    told = body.get("error") if isinstance(body, dict) else None
    if status in (401, 403) and not isinstance(told, dict):
        return NotPermittedError(
            f"{url} wants another API key (it answers {status})",
            hint="export FP8CTL_API_KEY=KEY, or Rollout(urls, plan, api_key=KEY)",
            data={"server": url, "status": status},
        )
    if not isinstance(told, dict):
        return EngineFailedError(
            f"{url} answers {status}, and not as fp8ctl's server does",
            hint="fp8ctl ps; fp8ctl logs NAME",
            data={"server": url, "status": status},
        )
    reply = str(told.get("id") or "")
    message = str(told.get("message") or f"it answers {status}")
    hint = _OURS.get(reply) or str(told.get("hint") or "").replace("URL", url)
    hint = hint or _HINTS.get(reply, "").format(url=url, backend=backend)
    more = told.get("data")
    data: dict[str, object] = dict(more) if isinstance(more, dict) else {}
    state = body.get("state") if isinstance(body, dict) else None
    data |= {"server": url, "status": status, "reply": reply, "state": state}
    if secret:
        message, hint, data = _without(secret, (message, hint, data))
    kind = _KINDS.get(reply, EngineFailedError)
    return kind(f"{url}: {message}", hint=hint or "fp8ctl ps; fp8ctl logs NAME", data=data)


def _without(secret: str, said: Any) -> Any:
    """Return what was said, of JSON types, with the secret blotted out wherever it stands."""
    if isinstance(said, str):
        return said.replace(secret, "***")
    if isinstance(said, dict):
        return {_without(secret, k): _without(secret, v) for k, v in said.items()}
    if isinstance(said, (list, tuple)):
        return [_without(secret, one) for one in said]
    return said


def stock(url: str, backend: str) -> UnsupportedError:
    """Return the error of a server that does not have fp8ctl's routes."""
    return UnsupportedError(
        f"{url} was not started by fp8ctl: it has no routes for a push",
        hint=f"fp8ctl patch --backend {backend}, then start it: fp8ctl launch",
        data={"server": url},
    )


def silent(url: str, path: str, what: str) -> EngineFailedError:
    """Return the error of a server that does not answer."""
    return EngineFailedError(
        f"{url} does not answer {path}: {what}",
        hint="fp8ctl ps; fp8ctl logs NAME",
        data={"server": url},
    )
