"""The held-out sets of prepared data as a recipe's experts are scored on them."""

from __future__ import annotations

from weftlm.corpora.source import Source
from weftlm.experts.examples import training_source
from weftlm.pipeline.prepared import PreparedData


def heldout_sets(data: PreparedData, examples: bool | None) -> tuple[dict[str, Source], Source | None]:
    """Held-out text by domain, and the target's.

    Args:
        data: prepared.
        examples: as `experts.examples`: False has documents with prompts scored as text.
    Raises:
        ConfigError: examples are asked of plain text.
    """
    domains = {
        domain.name: training_source(domain.heldout, domain.name, examples)
        for domain in data.domains
        if domain.heldout is not None
    }
    target = data.target_heldout
    return domains, None if target is None else training_source(target, "target", examples)
