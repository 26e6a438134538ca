"""Random files and edits, and the damage that can be done to a diff: seeded, fast, nasty.

Drawn by `random` and not by hypothesis: 200,000 cases have to fit into minutes.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

# Lines that look like part of a diff to somebody, and every way to end one.
LINES = [
    b"", b"", b"x", b"y", b"same", b"same", b"same", b"def f(x):", b"class A:", b"    return x",
    b"\r", b"a\rb", b"a\r\rb", b"\x0c", b"\x0b", b"\x1c", b"\x85", b"\xe2\x80\xa8", b"\xc2\x85",
    b"\xff\x80", b"\0", b"a\0b", b"\x1a", b"\x1b[31m", b"\xef\xbb\xbf", b"\xc3\xa9",
    b"-- a/x", b"++ b/x", b"--- a/x", b"+++ b/x", b"@@ -1 +1 @@", b"diff --git a/x b/x",
    b"index 0000000..1111111 100644", b"rename from x", b"new file mode 120000",
    b"\\ No newline at end of file", b"\\", b" lead", b"\tb", b"-", b"+", b"--", b"-- ", b"+ x",
    b"*** 1,2 ****", b"--- 1,2 ----", b"***************", b"1,2c1,2", b"0a1", b"< x", b"> x", b".",
    b"Index: x", b"Prereq: 1.2", b"Only in a: b", b"GIT binary patch", b"literal 1", b"2.39.5",
    b"Binary files a/x and b/x differ", b"From me", b"w", b"!sh", b"trail ", b"trail\t",
]  # fmt: skip
NAMES = ["a.py", "b c.py", "d,e=1.json", "m-n_o.py", "x'y.py", "z#~!.py", "a.b.c", "b", "a"]


@dataclass(frozen=True, slots=True)
class Case:
    """One file before and after; None stands for a file that is not there."""

    path: str
    old: bytes | None
    new: bytes | None
    old_mode: int = 0o644
    new_mode: int = 0o644


def line(rng: Random) -> bytes:
    """Return one line without its end."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(LINES)
    if kind < 0.93:
        return b"line %d" % rng.randrange(400)
    if kind < 0.97:
        return rng.randbytes(rng.randrange(12)).replace(b"\n", b"")
    return bytes([rng.randrange(32, 127)]) * rng.randrange(100, 3000)


def content(rng: Random) -> bytes:
    """Return a file: LF, CRLF or both, with or without an end."""
    kind = rng.random()
    if kind < 0.05:
        return b""
    count = rng.randrange(4) if kind < 0.2 else rng.randrange(60)
    if kind > 0.9:  # repetitions: a hunk that could stand in many places
        block = [line(rng) for _ in range(rng.randrange(1, 4))]
        lines = block * rng.randrange(1, 20)
    else:
        lines = [line(rng) for _ in range(count)]
    ends = rng.choice([(b"\n",), (b"\n",), (b"\r\n",), (b"\n", b"\r\n", b"\n")])
    data = b"".join(one + rng.choice(ends) for one in lines)
    return data[:-1] if rng.random() < 0.2 else data


def edit(rng: Random, data: bytes) -> bytes:
    """Return what somebody makes of a file."""
    lines = data.split(b"\n")
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        at, size = rng.randrange(len(lines) + 1), rng.choice([0, 1, 1, 2, 5])
        kind = rng.random()
        if kind < 0.35:
            lines[at : at + size] = [line(rng) for _ in range(rng.choice([0, 1, 1, 2, 4]))]
        elif kind < 0.5:
            lines[at:at] = lines[at : at + size]
        elif kind < 0.65:
            del lines[at : at + size]
        elif kind < 0.75:
            block = lines[at : at + size]
            del lines[at : at + size]
            there = rng.randrange(len(lines) + 1)
            lines[there:there] = block
        elif kind < 0.82:
            lines = [one.removesuffix(b"\r") for one in lines]
        elif kind < 0.88:
            lines[at : at + size] = [one + b"\r" for one in lines[at : at + size]]
        elif kind < 0.94:
            lines = lines[:-1] if lines[-1:] == [b""] else [*lines, b""]
        elif kind < 0.96:
            return b""
        else:
            return content(rng)
        lines = lines or [b""]
    return b"\n".join(lines)


def case(rng: Random, number: int) -> Case:
    """Return a random change of a file of its own."""
    path = f"{number // 100:02}/{number % 100:02}{rng.choice(NAMES)}"
    old_mode, new_mode = rng.choice([0o644, 0o644, 0o644, 0o755]), 0o644
    kind = rng.random()
    if kind < 0.08:
        return Case(path, None, content(rng), 0, rng.choice([0o644, 0o755]))
    old = content(rng)
    if kind < 0.16:
        return Case(path, old, None, old_mode, 0)
    new_mode = old_mode if rng.random() < 0.97 else 0o755 ^ old_mode ^ 0o644
    return Case(path, old, edit(rng, old), old_mode, new_mode)


def hazards(one: Case) -> dict[str, bool]:
    """Return which hazards a case holds; the keys are always the same."""
    both = [data for data in (one.old, one.new) if data is not None]
    text = b"".join(both)
    return {
        "created": one.old is None,
        "deleted": one.new is None,
        "empty before": one.old == b"",
        "empty after": one.new == b"",
        "mode": one.old_mode != one.new_mode and len(both) == 2,
        "executable": 0o755 in (one.old_mode, one.new_mode),
        "CRLF": b"\r\n" in text,
        "lone CR": b"\r" in text.replace(b"\r\n", b""),
        "CRLF to LF": len(both) == 2 and b"\r\n" in both[0] and b"\r\n" not in both[1],
        "no newline before": bool(one.old) and not (one.old or b"").endswith(b"\n"),
        "no newline after": bool(one.new) and not (one.new or b"").endswith(b"\n"),
        "form feed": b"\x0c" in text,
        "NUL": b"\0" in text,
        "U+2028": b"\xe2\x80\xa8" in text,
        "not UTF-8": b"\xff" in text,
        "long line": any(len(part) > 500 for part in text.split(b"\n")),
        "repeated lines": any(b"same\nsame" in data for data in both),
        "like a header": b"diff --git " in text or b"--- a/" in text or b"@@ -" in text,
        "like a marker": b"\\ No newline" in text,
        "space in the name": " " in one.path,
    }


def damage(rng: Random, text: bytes) -> bytes:
    """Return a diff that somebody mangled: bytes, lines, counts, headers."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.random()
        if kind < 0.2:  # bytes
            flipped = bytearray(text)
            for _ in range(rng.choice([1, 1, 2, 8])):
                if flipped:
                    at = rng.randrange(len(flipped))
                    flipped[at] ^= 1 << rng.randrange(8)
            text = bytes(flipped)
            continue
        if kind < 0.28:  # truncation, mostly at a line
            at = rng.randrange(len(text) + 1)
            at = text.rfind(b"\n", 0, at) + 1 if rng.random() < 0.8 else at
            text = text[:at]
            continue
        if kind < 0.36:  # a few bytes out or in
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.randbytes(rng.randrange(3)) + text[at + rng.randrange(4) :]
            continue
        lines = text.split(b"\n")
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        if kind < 0.46:
            del lines[at : at + rng.choice([1, 1, 2, 5])]
        elif kind < 0.54:
            lines.insert(other, lines[at])
        elif kind < 0.62:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind < 0.68:
            block = lines[at : at + rng.randrange(12)]
            lines[other:other] = block
        elif kind < 0.76:
            lines.insert(at, rng.choice(b" +-\\@").to_bytes(1, "big") + line(rng))
        elif kind < 0.8:
            lines[at] = rng.choice([b" ", b"+", b"-", b"\\", b""]) + lines[at][1:]
        elif kind < 0.9:  # numbers of a hunk's header
            heads = [i for i, one in enumerate(lines) if one.startswith(b"@@ ")]
            if heads:
                at = rng.choice(heads)
                lines[at] = _renumbered(rng, lines[at])
        else:
            heads = [
                i
                for i, one in enumerate(lines)
                if one.startswith((b"diff ", b"index ", b"--- ", b"+++ ", b"new ", b"deleted "))
            ]
            if heads:
                at = rng.choice(heads)
                lines[at] = rng.choice(HEADERS) if rng.random() < 0.6 else b""
                if rng.random() < 0.3:
                    lines[at:at] = [rng.choice(HEADERS)]
        text = b"\n".join(lines)
    return recounted(text) if rng.random() < 0.6 else text


def recounted(text: bytes) -> bytes:
    """Return a diff whose hunks count right again, so that more than the counts is looked at."""
    lines = text.split(b"\n")
    heads = [i for i, one in enumerate(lines) if one.startswith(b"@@ -")]
    shift = 0
    for i in heads:
        match = _HEAD.match(lines[i])
        if match is None:
            continue
        if i == 0 or lines[i - 1].startswith(b"+++ "):
            shift = 0
        body = itertools.takewhile(lambda one: one[:1] in _BODY, lines[i + 1 :])
        tags = Counter(one[:1] for one in body)
        old, new = tags[b" "] + tags[b"-"], tags[b" "] + tags[b"+"]
        start = int(match[1])
        there = start + shift + (old == 0) - (new == 0)
        lines[i] = b"@@ -%d,%d +%d,%d @@" % (start, old, there, new) + match[2]
        shift += new - old
    return b"\n".join(lines)


_HEAD = re.compile(rb"@@ -(\d{1,9})(?:,\S+)? \S+ @@(.*)", re.DOTALL)
_BODY = (b" ", b"+", b"-", b"\\")
HEADERS = [
    b"new file mode 100644", b"new file mode 100755", b"new file mode 120000", b"old mode 100644",
    b"new mode 100755", b"deleted file mode 100644", b"index 1234567..1234567 100644",
    b"index 1234567..89abcde", b"similarity index 100%", b"rename from pkg/a.py",
    b"rename to pkg/b.py", b"copy from pkg/a.py", b"copy to pkg/b.py", b"--- a/pkg/b.py",
    b"+++ b/pkg/b.py", b"--- /dev/null", b"+++ /dev/null", b"--- a/pkg/a.py\t2025-01-01",
    b"+++ b/pkg/a.py\t", b"diff --git a/pkg/b.py b/pkg/b.py", b"diff --git a/../x b/../x",
    b'diff --git "a/pkg/a.py" "b/pkg/a.py"', b"--- a/pkg/a.py\r", b"Prereq: 1", b"Index: pkg/b.py",
    b"GIT binary patch", b"Binary files a/pkg/a.py and b/pkg/a.py differ",
    b"dissimilarity index 1%",
]  # fmt: skip


def _renumbered(rng: Random, head: bytes) -> bytes:
    parts = head.split(b" ")
    which = rng.choice([1, 2]) if len(parts) > 2 else 0
    sign, numbers = parts[which][:1], parts[which][1:].split(b",")
    at = rng.randrange(len(numbers))
    with_value = int(numbers[at]) if numbers[at].isdigit() else 1
    numbers[at] = b"%d" % rng.choice(
        [with_value + 1, with_value - 1, 0, 1, with_value * 10, 10**9, 2**64, -1]
    )
    if rng.random() < 0.2:
        numbers = numbers[:1]
    parts[which] = sign + b",".join(numbers)
    return b" ".join(parts)
