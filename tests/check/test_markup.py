"""HTML that cannot be broken out of."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ctl.check import markup
from fp8ctl.check.markup import Html, escape, table, tag


class Reader(HTMLParser):
    """Collects what a browser would make of markup."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(markup: str) -> Reader:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


@given(st.text())
def test_text_stays_text_wherever_it_goes_in(text: str) -> None:
    found = read(tag("td", text, title=text))
    assert found.tags == ["td"]
    assert set(found.attributes) == {"title"}
    seen = "".join(map(markup._seen, text))
    assert found.text == seen
    assert found.attributes["title"] == seen


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '" onload="x',
        "' x='",
        "</td></table>",
        "<!--",
        "&lt;",
        "$title",
    ],
)
def test_what_would_break_out_is_shown(text: str) -> None:
    found = read(tag("td", text, title=text))
    assert (found.tags, found.text, found.attributes) == (["td"], text, {"title": text})


@pytest.mark.parametrize(
    "hidden", ["\u202e", "\u200b", "\u2066", "\x00", "\x1b", "\ud800", "\ufeff"]
)
def test_what_cannot_be_seen_is_shown(hidden: str) -> None:
    assert escape(f"a{hidden}b") == "a\ufffdb"
    assert escape("a\nb\tc é 中 ✓") == "a\nb\tc é 中 ✓"


def test_markup_goes_in_once_and_as_it_is() -> None:
    assert tag("p", tag("b", "a & b"), " <") == "<p><b>a &amp; b</b> &lt;</p>"
    assert isinstance(tag("p"), Html)
    assert tag("a", "x", href="#y", title=None, class_="z") == '<a href="#y" class="z">x</a>'


def test_a_table_heads_its_columns_and_rows() -> None:
    found = table(("tensor", "found"), [("a.weight", "different")], caption="of them")
    assert '<th scope="col" role="columnheader">tensor</th>' in found
    assert '<th scope="row" role="rowheader">a.weight</th>' in found
    assert '<td data-label="found" role="cell">different</td>' in found
    assert "<caption>of them</caption>" in found
