"""`write_trace_page`: the routing of one text or several as one HTML page that needs no network.

Every token is coloured by the expert that worked most on it. A small script recolours the text by layer or module; the
page is complete without it for the mean over all modules. The same traces give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weftlm.errors import ConfigError
from weftlm.reporting.html import escape, section, write_page
from weftlm.reporting.layout import contents, page_text
from weftlm.reporting.trace_parts import trace_headline, trace_script, trace_sections, trace_size, trace_style
from weftlm.reporting.traces import LabelledTrace, Palette, TraceFacts


def write_trace_page(traces: Sequence[LabelledTrace], path: str | Path, title: str) -> Path:
    """Write one page about one trace or several.

    Args:
        traces: label, trace, and the text of each token. An expert has the same colour in all traces of its
            pool.
        path: the file to write; written whole or not at all.
        title: of the page.
    Returns:
        `path` as a path.
    Raises:
        ConfigError: no trace is given, one is empty, or its texts are not one per token.
        NumericsError: a weight is not a number between 0 and 1.
        DataError: the page cannot be written.
    """
    return write_page(render_trace_page(traces, title), path)


def render_trace_page(traces: Sequence[LabelledTrace], title: str) -> str:
    """The page as text. Its content policy allows its own script and nothing from elsewhere."""
    if not traces:
        raise ConfigError("a trace page needs at least one trace; none was given")
    facts = [TraceFacts.of(one) for one in traces]
    keys = [f"trace-{place}" for place in range(len(facts))]
    return page_text(
        title=title,
        kicker="Routing trace" if len(facts) == 1 else f"{len(facts)} routing traces",
        headline=trace_headline(facts),
        opening=contents([(f"{key}-section", escape(one.label)) for key, one in zip(keys, facts, strict=True)]),
        body="\n".join(
            section(
                f"{key}-section",
                escape(one.label),
                f'<p class="lead">{escape(trace_size(one))}</p>\n{trace_sections(one, palette, key)}',
            )
            for key, one, palette in zip(keys, facts, Palette.each(facts), strict=True)
        ),
        style="\n" + trace_style(),
        script=trace_script(),
    )
