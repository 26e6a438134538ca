"""HTML that cannot be broken out of: every text is escaped where it goes in. Pure.

`tag("td", name, scope="row")` returns `Html`; a plain string among the children, and every
attribute's value, is escaped. Only `Html` is taken as it is. Called by `page` and `charts`.
"""

from __future__ import annotations

import html
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: They have no closing tag; what is inside of an SVG has always one.
_VOID = frozenset({"br", "hr", "img", "link", "meta", "wbr"})
_SHOWN_SPACES = "\n\t"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | int | None) -> Html:
    """Return an element.

    Args:
        name: of the element.
        children: text, which is escaped, or `Html`.
        attributes: `class_` is `class`, `aria_label` is `aria-label`; None leaves one out.
    """
    head = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not children:
        return Html(f"<{name}{head}>")
    return Html(f"<{name}{head}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """Return the children one behind the other, texts escaped."""
    return Html("".join(one if isinstance(one, Html) else escape(one) for one in children))


def escape(text: str) -> Html:
    """Return text as it may stand in an element or an attribute's value.

    Control characters, lone surrogates, and those that turn the direction of what follows are
    shown as U+FFFD: a name must not look like another one.
    """
    clean = text if text.isascii() and text.isprintable() else "".join(map(_seen, text))
    return Html(html.escape(clean, quote=True))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str) -> Html:
    """Return a table whose first column heads its rows; on a phone each cell names its column.

    Args:
        columns: headings.
        rows: cells, text or `Html`.
        caption: what the table is about.
    """
    # Roles that elements have anyway, until a style sheet makes blocks of them.
    titles = (tag("th", one, scope="col", role="columnheader") for one in columns)
    body = (
        tag(
            "tr",
            tag("th", cells[0], scope="row", role="rowheader"),
            *(
                tag("td", cell, data_label=name, role="cell")
                for name, cell in zip(columns[1:], cells[1:], strict=True)
            ),
            role="row",
        )
        for cells in rows
    )
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *titles, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        class_="rows",
        role="table",
    )


def _seen(one: str) -> str:
    category = unicodedata.category(one)
    hidden = category in {"Cc", "Cs", "Cf"} and one not in _SHOWN_SPACES
    return "\ufffd" if hidden else one
