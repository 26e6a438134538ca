"""`check --report`: one page with all of a check, made of the document that --json prints.

The page fetches nothing and runs nothing: its Content-Security-Policy forbids both, so that
not even a mistake here would let a server's answer act. `render` is pure; `write` replaces the
file at once. Called by `command` and `watch`; page.html has the frame and the style.
"""

from __future__ import annotations

import json
import os
import string
import tempfile
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp8ctl.check import charts
from fp8ctl.check.markup import Html, join, table, tag
from fp8ctl.check.verdict import Evidence, found_text
from fp8ctl.errors import NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Rows of tensors that are not equal; --json has all.
SHOWN: Final = 1000
_MARKS: Final = {"ok": "✓", "failed": "✗", "not visible": "○"}
#: Of the facts of the live level, those that the table of evidence has not in its own words.
_FACTS: Final = (
    *("engine", "model", "mode", "quantization", "answer", "completion"),
    *("latency_s", "generation_s"),
)


def render(data: Mapping[str, Any]) -> str:
    """Return a check's page.

    Args:
        data: the document of `levels`.
    """
    frame = string.Template(
        resources.files("fp8ctl.check").joinpath("page.html").read_text(encoding="utf-8")
    )
    sections = [
        ("evidence", "Evidence", _evidence(data)),
        ("weights", "Weights", _weights(data["weights"])),
        ("logprobs", "Log-probabilities", _logprobs(data["logprobs"])),
        ("code", "The code that runs", _code(data["code"])),
        ("environment", "Environment", _environment(data)),
        ("again", "The same again", _commands(data)),
    ]
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in sections]
    return frame.substitute(
        title=tag("title", f"{_word(data)}: {data['url']}"),
        head=_head(data),
        links=tag("ul", *links),
        sections=join(
            tag("section", tag("h2", title, id=f"{name}-title"), body, id=name,
                aria_labelledby=f"{name}-title")
            for name, title, body in sections
        ),
    )  # fmt: skip


def require_place(path: Path) -> None:
    """Refuse a file that cannot be written before anything is asked.

    Raises:
        NotPermittedError: the folder is not there, or not writable, or the path is a folder.
    """
    folder = path.expanduser().absolute().parent
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"{folder} is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        why = f"{folder} is not writable"
    else:
        return
    raise NotPermittedError(f"cannot write --report {path}: {why}", hint="--report check.html")


def write(path: Path, text: str) -> None:
    """Put a page in place: whoever reads sees the old one or the new one, whole.

    Raises:
        NotPermittedError: it cannot be written.
    """
    path = path.expanduser().absolute()
    draft = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="replace",
            dir=path.parent,
            prefix=f".{path.name}.",
            delete=False,
        ) as file:
            draft = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is for its owner alone; a report is as any file that one writes.
        mask = os.umask(0)
        os.umask(mask)
        Path(draft).chmod(0o666 & ~mask)
        Path(draft).replace(path)
    except OSError as e:
        _drop(draft)
        raise NotPermittedError(
            f"cannot write --report {path}: {e.strerror}", hint="--report /a/folder/you/own/x.html"
        ) from e
    except BaseException:
        _drop(draft)
        raise


def _drop(draft: str) -> None:
    if draft:
        with suppress(OSError):
            Path(draft).unlink()


def _head(data: Mapping[str, Any]) -> Html:
    word = _word(data)
    kind = {"fp8-ok": "ok", "live: ok": "ok", "not proven": "open"}.get(word, "failed")
    return join(
        (
            tag("p", "fp8ctl check", class_="brand"),
            tag("h1", tag("span", word, class_=f"verdict {kind}")),
            tag("p", str(data["message"]), class_="message"),
            _pairs(
                {
                    "server": data["url"],
                    "level": data["level"],
                    "began": data["began"],
                    "took": f"{data['seconds']:.1f} s",
                }
            ),
        )
    )


def _word(data: Mapping[str, Any]) -> str:
    """Return the verdict; where there is none what was found instead."""
    if data["verdict"]:
        return str(data["verdict"])
    results = {one["check"]: one["result"] for one in data["evidence"]}
    if "failed" in results.values():
        return "failed"
    return "live: ok" if set(results) == {"live"} else "not proven"


def _evidence(data: Mapping[str, Any]) -> Html:
    levels = table(
        ("level", "result", "found"),
        [(one["check"], _result(one["result"]), one["found"]) for one in data["evidence"]],
        caption="What each level says",
    )
    live = table(
        ("check", "result", "found"),
        [
            (one["check"], _result(one["result"]), found_text(Evidence(**one)))
            for one in data["live"]["evidence"]
        ],
        caption="What was seen from outside",
    )
    return join((levels, live))


def _result(result: str) -> Html:
    return tag(
        "span",
        tag("span", _MARKS.get(result, "?"), aria_hidden="true"),
        f" {result}",
        class_=f"result {result.replace(' ', '-')}",
    )


def _weights(told: Mapping[str, Any]) -> Html:
    tensors: list[Mapping[str, Any]] = list(told.get("tensors") or ())
    unequal = [one for one in tensors if one.get("found") != "equal"]
    parts: list[str] = [_said(told)]
    if counts := told.get("counts"):
        parts.append(_pairs({name: str(count) for name, count in counts.items()}))
    if unequal:
        parts.append(_unequal(unequal))
    quality: Mapping[str, Any] = told.get("quality") or {}
    found = charts.stacks(quality, [str(one.get("name")) for one in unequal])
    ends = charts.scale(found)
    if ends is not None:
        many = any(len(cell.names) > 1 for stack in found for cell in stack.cells.values())
        parts += [
            tag("h3", "Error of quantisation"),
            tag(
                "p",
                "Signal to quantisation noise of every FP8 tensor, of the checkpoint against "
                "its FP8 form: what this plan costs, whatever a server does. More is better; "
                "6 dB are one bit." + (" Of experts the worst is shown." if many else ""),
            ),
            charts.legend(*ends),
            *(charts.heat_map(stack, *ends) for stack in found),
            _listed(found),
        ]
    return join(parts)


def _unequal(unequal: list[Mapping[str, Any]]) -> Html:
    rows = [
        (
            _breakable(str(one.get("name"))),
            str(one.get("found")),
            str(one.get("dtype") or ""),
            _difference(one),
        )
        for one in unequal[:SHOWN]
    ]
    more = len(unequal) - SHOWN
    return join(
        (
            tag("h3", "Tensors that are not equal"),
            table(
                ("tensor", "found", "dtype", "what differs"),
                rows,
                caption=f"{len(unequal)} of them",
            ),
            tag("p", f"and {more} more, which --json lists") if more > 0 else Html(),
        )
    )


def _difference(one: Mapping[str, Any]) -> str:
    """Return what is known of a difference, in words."""
    said = [str(one.get("detail") or "")]
    codes, rows = one.get("codes"), one.get("rows")
    if isinstance(codes, dict):
        said.append(f"{codes.get('different')} of {codes.get('of')} codes")
    if rows:
        told = rows if isinstance(rows, str) else " to ".join(dict.fromkeys(map(str, rows)))
        said.append(f"row {told}" if told.isdigit() else f"rows {told}")
    if looks := one.get("looks"):
        of = one.get("version") or one.get("with")
        said.append(f"looks {looks}" + (f" ({of})" if of else ""))
    return "; ".join(filter(None, said))


def _listed(found: Iterable[charts.Stack]) -> Html:
    rows = [
        (
            _breakable(cell.names[0] if len(cell.names) == 1 else f"{stack.name}.{layer}.{column}"),
            str(len(cell.names)),
            charts.decibel(cell.worst),
            f"{cell.amax:.4g}",
            f"{len(cell.unequal)} not equal" if cell.unequal else "",
        )
        for stack in found
        for (layer, column), cell in sorted(
            stack.cells.items(), key=lambda item: (not item[1].unequal, item[0][0])
        )
    ]
    rows.sort(key=lambda row: not row[4])
    return tag(
        "details",
        tag("summary", f"The same as a list, {len(rows)} rows"),
        table(
            ("tensor", "tensors", "SQNR", "largest value", "in the server"),
            rows,
            caption="Quantised tensors, those that are not equal first",
        ),
    )


def _logprobs(told: Mapping[str, Any]) -> Html:
    parts: list[str] = [_said(told)]
    fits = told.get("fits")
    hypotheses = told.get("hypotheses")
    if isinstance(hypotheses, dict) and hypotheses:
        rows = [
            (
                f"{name} (fits best)" if name == fits else str(name),
                *(_number(one.get(key)) for key in ("mean_abs", "p99_abs", "k3_kl", "top1")),
                str(one.get("tokens", "")),
            )
            for name, one in hypotheses.items()
            if isinstance(one, dict)
        ]
        columns = ("if it were", "mean |diff|", "p99 |diff|", "k3 KL", "top-1", "tokens")
        parts.append(
            table(columns, rows, caption="Log-probabilities of the server against what each gives")
        )
    parts += _spreads(told.get("histogram"), fits)
    return join(parts)


def _spreads(drawn: Any, fits: object) -> list[Html]:
    """Return a histogram for each hypothesis, the one that fits first, all of one scale."""
    if not isinstance(drawn, dict) or not isinstance(drawn.get("counts"), dict):
        return []
    edges = [charts.number(one) or 0.0 for one in drawn.get("edges") or ()]
    found = {
        str(name): [charts.number(one) or 0.0 for one in counts]
        for name, counts in sorted(drawn["counts"].items(), key=lambda item: item[0] != fits)
        if isinstance(counts, list | tuple) and len(edges) == len(counts) + 1 > 1
    }
    most = max((one for counts in found.values() for one in counts), default=0.0)
    return [
        charts.histogram(edges, counts, f"Differences of log-probabilities from {name}", most)
        for name, counts in found.items()
    ]


def _code(told: Mapping[str, Any]) -> Html:
    parts: list[str] = [_said(told)]
    rows = [
        (
            str(one.get("process")),
            _result(str(one.get("result"))),
            str(one.get("message")),
            str(one.get("pid") or ""),
        )
        for one in told.get("processes") or ()
    ]
    if rows:
        columns = ("process", "result", "found", "pid")
        parts.append(table(columns, rows, caption="Processes of the server"))
    if patches := told.get("patches"):
        parts.append(_pairs({"patches": ", ".join(patches)}))
    return join(parts)


def _environment(data: Mapping[str, Any]) -> Html:
    facts: Mapping[str, Any] = data["live"].get("facts") or {}
    parts: list[str] = []
    for title, found in (
        ("The server", {name: facts.get(name) for name in _FACTS}),
        ("What it says of itself", facts.get("server")),
        ("Its arguments, those that are shown", facts.get("arguments")),
        (
            "The weights level",
            {k: data["weights"].get(k) for k in ("model", "mode", "recipe", "ranks")},
        ),
        ("The check", data["environment"]),
    ):
        known = {k: v for k, v in (found or {}).items() if v not in (None, "", [], {})}
        if known:
            parts += [tag("h3", title), _pairs(known)]
    return join(parts)


def _commands(data: Mapping[str, Any]) -> Html:
    lines = "\n".join(str(one) for one in data["commands"])
    return tag("pre", tag("code", lines), tabindex=0)


def _said(told: Mapping[str, Any]) -> Html:
    """Return a level's result and its words."""
    result = str(told.get("result"))
    message = str(told.get("message") or "not asked for: --level goes further")
    return tag("p", _result(result), f": {message}")


def _pairs(found: Mapping[str, Any]) -> Html:
    return tag(
        "dl",
        *(
            join(
                (tag("dt", str(name)), tag("dd", value if isinstance(value, str) else _json(value)))
            )
            for name, value in found.items()
        ),
    )


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _number(value: Any) -> str:
    found = charts.number(value)
    return "" if found is None else f"{found:.4g}"


def _breakable(name: str) -> Html:
    """Return a tensor's name that may be broken behind its dots."""
    parts = name.split(".")
    return join(
        part if i == len(parts) - 1 else join((f"{part}.", tag("wbr")))
        for i, part in enumerate(parts)
    )
