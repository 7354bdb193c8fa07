"""Blocks of a report's page as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from weftlm.reporting.page import Block, Page, Section, render_page


def render_blocks(blocks: Sequence[Block]) -> str:
    """What a page writes for some blocks, without the rest of the page."""
    page = render_page(Page("title", "kicker", "headline", [Section("one", "one", "one", [*blocks])]))
    return page.partition("</h2>\n")[2].partition("</section>")[0]
