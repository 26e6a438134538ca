"""The page of a check: whole, escaped, atomically written; and what a real browser makes of it."""

from __future__ import annotations

import json
import math
import os
import re
import time
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.check import charts, levels, page
from fp8ctl.check.levels import Request
from fp8ctl.check.verdict import VERDICTS, Evidence, LevelReport
from fp8ctl.errors import NotPermittedError
from tools import browser

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from fp8ctl.check.levels import Level

EVIL = '<script>document.title="owned"</script>" onload="x\u202e'
FRAME = resources.files("fp8ctl.check").joinpath("page.html").read_text(encoding="utf-8")
FLIPPED = "model.layers.7.mlp.down_proj.weight"


def quality(layers: int, experts: int = 0) -> dict[str, dict[str, float]]:
    """Return the errors of a model with so many layers, and experts in each."""
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    found = {
        f"model.layers.{layer}.{part}.weight": {"sqnr_db": 31.0 + (layer % 5) / 3, "amax": 0.5}
        for layer in range(layers)
        for part in parts
    }
    found |= {
        f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight": {"sqnr_db": 30.0, "amax": 1.0}
        for layer in range(layers)
        for e in range(experts)
        for part in ("gate", "up", "down")
    }
    return found


def document(
    text: str = "SmolLM2", *, unequal: int = 1, level: Level = "logprobs", **more: Any
) -> dict[str, Any]:
    """Return a check with something in every part of it, and `text` wherever a server is heard."""
    evidence = (
        Evidence("health", "ok", "HTTP 200", "200"),
        Evidence("model", "ok", text),
        Evidence("chat", "failed", text, f"an answer with {text}"),
        Evidence("mode", "not visible", text),
    )
    process = {"process": text, "result": "ok", "message": text, "pid": 7}
    code = {"result": "ok", "message": text, "patches": [text], "processes": [process]}
    facts = {"model": text, "answer": text, "server": {text: text}, "arguments": {"dtype": text}}
    live = LevelReport("live", "failed", None, evidence, facts, code)
    tensors = [
        {
            "name": FLIPPED if i == 0 else f"{text}.{i}.weight",
            "found": "different",
            "dtype": "float8_e4m3fn",
            "quantize": True,
            "detail": text,
            "codes": {"different": 1, "of": 4096},
            "rows": [3, 3],
            "looks": "stale",
            "version": text,
        }
        for i in range(unequal)
    ]
    weights = {
        "result": "failed" if unequal else "ok",
        "verdict": "wrong-weights" if unequal else "fp8-ok",
        "message": text,
        "model": text,
        "counts": {"equal": 400, "different": unequal},
        "tensors": tensors,
        "quality": quality(30),
    }
    edges = [i / 20 - 1 for i in range(41)]
    counts = [int(200 * math.exp(-((x / 0.2) ** 2))) for x in edges[:-1]]
    scores = {"mean_abs": 0.1, "p99_abs": 0.4, "k3_kl": 0.01, "top1": 0.9, "tokens": 900}
    logprobs = {
        "result": "ok",
        "verdict": "fp8-ok",
        "message": text,
        "fits": "fp8-block",
        "hypotheses": {"bf16": scores, "fp8-block": scores, text: scores},
        "histogram": {"edges": edges, "counts": {"fp8-block": counts, text: counts}},
    }
    found: Mapping[Level, Mapping[str, object]] = {
        "weights": weights | more,
        "logprobs": logprobs,
    }
    return levels.assemble(Request("http://127.0.0.1:30000", level), live, found).data


class Reader(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_what_a_server_says_stays_text() -> None:
    plain, evil = Reader(page.render(document())), Reader(page.render(document(EVIL)))
    assert "script" not in evil.tags
    assert sorted(plain.tags) == sorted(evil.tags), "no element comes or goes with the text"
    assert not [name for name, _ in evil.attributes if name.startswith("on")]
    text = page.render(document(EVIL))
    assert text.count("&lt;script&gt;") > 15, "the control: it is there, as text"
    assert "\u202e" not in text


def test_a_page_names_nothing_that_would_be_fetched() -> None:
    found = Reader(page.render(document()))
    assert not {"script", "img", "iframe", "object", "form"} & set(found.tags)
    links = [value for name, value in found.attributes if name in {"href", "src", "action"}]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in FRAME
    assert "@import" not in FRAME
    assert "default-src 'none'" in FRAME


def test_headings_charts_and_tables_are_for_those_who_do_not_see_them() -> None:
    text = page.render(document())
    found = Reader(text)
    assert found.tags.count("h1") == 1
    headings = [tag for tag in found.tags if re.fullmatch(r"h\d", tag)]
    assert all(int(b[1]) - int(a[1]) <= 1 for a, b in pairwise(headings))
    assert found.tags.count("caption") == found.tags.count("table")
    pictures = re.findall(r"<svg[^>]*>", text)
    assert len(pictures) == 2
    assert all('role="img"' in one and "aria-label=" in one for one in pictures)
    ids = {value for name, value in found.attributes if name == "id"}
    inside = {v.removeprefix("#") for k, v in found.attributes if k == "href" and v[0] == "#"}
    assert inside <= ids
    assert re.findall(r'<html lang="en">', text)


def test_the_page_tells_what_the_document_tells() -> None:
    data = document()
    text = page.render(data)
    assert '<span class="verdict failed">wrong-weights</span>' in text
    for told in ("SmolLM2", "HTTP 200", "1 of 4096 codes; row 3;", "looks stale (SmolLM2)"):
        assert told in text
    assert text.index("Tensors that are not equal") < text.index("Error of quantisation")
    # The cell of the tensor that differs is marked in the map.
    assert re.search(rf'class="q\d unequal" title="{re.escape(FLIPPED)}', text)
    for command in data["commands"]:
        assert command in text


@pytest.mark.parametrize("word", [*VERDICTS, None])
def test_every_verdict_has_a_page(word: str | None) -> None:
    data = document(unequal=0) | {"verdict": word}
    text = page.render(data)
    kind = "ok" if word == "fp8-ok" else "failed"
    assert f'<span class="verdict {kind}">{word or "failed"}</span>' in text


def test_a_check_of_the_live_level_alone_and_of_nobody_have_pages() -> None:
    live = LevelReport("live", "ok", None, (Evidence("health", "ok", "HTTP 200"),), {})
    data = levels.assemble(Request("http://127.0.0.1:1"), live, {}).data
    assert '<span class="verdict ok">live: ok</span>' in page.render(data)
    assert "<svg" not in page.render(data)
    gone = (Evidence("connection", "failed", "refused", "an answer"),)
    live = LevelReport("live", "failed", "unreachable", gone, {})
    data = levels.assemble(Request("http://127.0.0.1:1"), live, {}).data
    assert '<span class="verdict failed">unreachable</span>' in page.render(data)


@pytest.mark.parametrize("odd", [None, [], "x", {}, {"tensors": None, "quality": None}])
def test_a_level_that_says_something_else_than_it_should_still_has_a_page(odd: Any) -> None:
    more: dict[str, Any] = {"quality": None, "tensors": None, "counts": None}
    data = document() | {"logprobs": {"result": "ok", "histogram": odd, "hypotheses": odd}}
    data["weights"] |= more
    assert "</html>" in page.render(data)


def test_thousands_of_tensors_are_a_page_of_moderate_size() -> None:
    data = document(unequal=70_000, quality=quality(61, experts=384))
    began = time.perf_counter()
    text = page.render(data)
    seconds = time.perf_counter() - began
    assert len(data["weights"]["quality"]) > 70_000
    assert f"and {70_000 - page.SHOWN} more, which --json lists" in text
    assert len(text) < 2_500_000
    assert seconds < 10


# --- the file -------------------------------------------------------------------------------------


def test_a_page_replaces_another_at_once_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "check.html"
    file.write_text("old")
    before = file.stat().st_ino
    page.write(file, "new \udcff")
    assert file.read_text() == "new ?"
    assert file.stat().st_ino != before, "by rename: a reader of the old one has it whole"
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["check.html"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "check.html"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotPermittedError, match="No space left") as caught:
        page.write(file, "new")
    assert caught.value.hint
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["check.html"]


# --- contrast -------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(scheme: str) -> None:
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", FRAME, re.S)
    )
    assert light.keys() == dark.keys()
    colours = light if scheme == "light" else dark
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for text in ("text", "dim", "link", "ok", "failed", "open"):
        for back in ("back", "raised"):
            assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    for shade in range(charts.SHADES):
        assert contrast(colours["on"], colours[f"q{shade}"]) >= 4.5, shade
    assert contrast(colours["bar"], colours["back"]) >= 3


# --- a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium on PATH: what a browser makes of the page is not tested")
    with browser.started(program) as started:
        yield started


def shown(chromium: browser.Browser, tmp_path: Path, data: Mapping[str, Any], width: int = 360,
          *, dark: bool = False) -> float:  # fmt: skip
    """Open the page of a check; return the seconds that took."""
    file = tmp_path / "check.html"
    page.write(file, page.render(data))
    return chromium.open(file.as_uri(), width, dark=dark)


def complaints(chromium: browser.Browser) -> list[object]:
    events = chromium.of("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return list(events)


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("text", ["SmolLM2", EVIL, "x" * 4000])
def test_in_a_browser_nothing_is_fetched_said_run_or_wider_than_the_screen(
    chromium: browser.Browser, tmp_path: Path, text: str, width: int
) -> None:
    shown(chromium, tmp_path, document(text, unequal=3), width)
    assert complaints(chromium) == []
    asked = [one["request"]["url"] for one in chromium.of("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [
        (tmp_path / "check.html").as_uri()
    ]
    assert chromium.ask("document.title") == "wrong-weights: http://127.0.0.1:30000"
    chromium.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    assert chromium.ask("document.querySelectorAll('script').length") == 0


def test_the_browser_that_judges_sees_a_fault(chromium: browser.Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text(
        "<meta name=viewport content='width=device-width'><img src='http://127.0.0.1:9/x'>"
        "<div style='width:900px'>x</div><script>console.error('no')</script>"
    )
    chromium.open(file.as_uri(), 360)
    assert complaints(chromium)
    assert any("127.0.0.1:9" in str(one) for one in chromium.of("Network.requestWillBeSent"))
    assert chromium.ask("document.documentElement.scrollWidth") > 360


def test_no_script_runs_even_if_one_got_in(chromium: browser.Browser, tmp_path: Path) -> None:
    file = tmp_path / "check.html"
    inside = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x'></main>"
    file.write_text(page.render(document()).replace("</main>", inside))
    chromium.open(file.as_uri())
    assert chromium.ask("document.title") != "owned"
    assert "Content Security Policy" in json.dumps(complaints(chromium)), "the control"


def test_the_page_is_dark_where_the_system_is(chromium: browser.Browser, tmp_path: Path) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    shown(chromium, tmp_path, document())
    light = chromium.ask(back)
    shown(chromium, tmp_path, document(), dark=True)
    assert (light, chromium.ask(back)) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")


def test_on_a_phone_tables_are_still_tables_for_a_screen_reader(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    shown(chromium, tmp_path, document())
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    roles = [one["role"]["value"] for one in nodes if not one.get("ignored")]
    names = [str(one.get("name", {}).get("value", "")) for one in nodes]
    for role in ("table", "row", "rowheader", "columnheader", "cell", "heading", "navigation"):
        assert role in roles, role
    assert any(one.startswith("Histogram, ") for one in names)
    assert "SQNR in dB, model.layers" in names


def test_every_word_and_bar_of_a_histogram_is_seen(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    shown(chromium, tmp_path, document(), 1100)
    boxes = "[...document.querySelectorAll('svg %s')].map(one => one.getBoundingClientRect().width)"
    for name, least in (("text", 2 * 7), ("rect", 2 * 10), ("line", 2)):
        widths = chromium.ask(boxes % name)
        assert len(widths) >= least, name
        assert min(widths) > 0, name


def test_thousands_of_tensors_open_in_a_moment(chromium: browser.Browser, tmp_path: Path) -> None:
    data = document(unequal=page.SHOWN, quality=quality(61, experts=128))
    assert shown(chromium, tmp_path, data) < 5
    assert chromium.ask("document.documentElement.scrollWidth") <= 360
    assert chromium.ask("document.querySelectorAll('#weights tbody tr').length") > page.SHOWN
