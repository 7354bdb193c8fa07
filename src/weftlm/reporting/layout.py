"""The frame that every page shares: head, title, headline, contents, sections, footer."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from string import Template

from weftlm import __version__
from weftlm.reporting.html import escape


def page_text(
    *,
    title: str,
    kicker: str,
    headline: str,
    opening: str,
    body: str,
    style: str = "",
    source: str = "",
    script: str = "",
) -> str:
    """A whole page as text.

    Args:
        title: plain text, escaped here.
        kicker: the line above the title, HTML.
        headline: what the page found; plain text, escaped here.
        opening: what follows the headline: notes, contents; HTML.
        body: the sections, HTML.
        style: CSS beyond what all pages share, beginning with a line break.
        source: what the footer says the page was written from, beginning with a space; HTML.
        script: JavaScript run at the end of the page. The page's policy allows nothing beyond it, the theme's script
            and inline styles: text that came as data can neither run nor load anything.
    """
    theme = page_file("theme.js")
    hashes = " ".join(f"'sha256-{_digest(one)}'" for one in (theme, script) if one)
    return Template(page_file("page.html") + "\n").substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}",
        version=escape(__version__),
        title=escape(title),
        style=page_file("theme.css") + "\n" + page_file("report.css") + style,
        theme=theme,
        kicker=kicker,
        headline=escape(headline),
        opening=opening,
        body=body,
        source=source,
        ending=f"<script>{script}</script>\n" if script else "",
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def page_file(name: str) -> str:
    """A file of the folder page/, as text."""
    return resources.files("weftlm.reporting").joinpath(f"page/{name}").read_text(encoding="utf-8").strip()


def contents(parts: Sequence[tuple[str, str]]) -> str:
    """Links to a page's sections, by anchor and name, both HTML; nothing for a single section."""
    if len(parts) < 2:
        return ""
    links = "\n".join(f'<a href="#{key}">{name}</a>' for key, name in parts)
    return f'<nav aria-label="Contents">{links}</nav>'


def notes(texts: Sequence[str]) -> str:
    """Sentences under the headline, plain text."""
    return "\n".join(f'<p class="note">{escape(text)}</p>' for text in texts)
