"""Draw the README's picture, docs/assets/mixture.svg, from a finished demonstration: `docs/figures.py runs/demo`.

Above, the mixture DGA found while the model trained; below, the target's and the domains' bits per byte of every run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from weftlm.evaluation.suite import TARGET
from weftlm.pipeline.names import MONOLITH
from weftlm.reporting.figures import Curve, Panel, domain_lines, draw, inline_svg, run_lines, to_svg
from weftlm.reporting.runs import GENERIC, Run, read_runs

PICTURE = Path(__file__).resolve().parent / "assets" / "mixture.svg"
MARGIN = 18.0


def mixture_figure(run: Run) -> str:
    """The run's weights over training, as an SVG document."""
    curves = tuple(Curve(name, *run.series("mixture", "weights", name)) for name in run.domains)
    panel = Panel(f"What {run.label} draws", curves)
    return to_svg(draw([panel], domain_lines(run.domains), stacked=True))


def loss_figure(runs: Sequence[Run]) -> str:
    """Held-out bits per byte of every run over training: on the target, and the mean over the domains."""
    panels = [
        Panel(
            f"{name}, bits per byte",
            tuple(
                Curve(
                    run.label,
                    np.array([one.tokens for one in run.evaluations]),
                    np.array([one.scores[name].value for one in run.evaluations]),
                )
                for run in runs
            ),
        )
        for name in (TARGET, GENERIC)
    ]
    return to_svg(draw(panels, run_lines([run.label for run in runs], baseline="uniform"), zoomed=True))


def stack(figures: Mapping[str, str]) -> str:
    """Figures one below the other on a white card, legible on a light page and on a dark one.

    Args:
        figures: description -> SVG document.
    """
    sizes = [tuple(map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())) for svg in figures.values()]  # type: ignore[union-attr]
    width = max(size[0] for size in sizes) + 2 * MARGIN
    height = sum(size[1] for size in sizes) + (len(sizes) + 1) * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">',
        f"<title>{'; '.join(figures)}</title>",
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="#ffffff"/>',
    ]
    top = MARGIN
    for index, ((description, svg), size) in enumerate(zip(figures.items(), sizes, strict=True)):
        place = f'x="{MARGIN:g}" y="{top:g}" width="{size[0]:g}" height="{size[1]:g}" '
        parts.append(str(inline_svg(svg, f"figure{index}", description)).replace("<svg ", f"<svg {place}", 1))
        top += size[1] + MARGIN
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    """Read the runs below a demonstration's folder and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demonstration")
    parser.add_argument("--output", type=Path, default=PICTURE, help="where the picture goes")
    arguments = parser.parse_args()
    found = arguments.demo.glob("baselines/*/result.json")
    baselines = sorted(path.parent for path in found if path.parent.name != MONOLITH)
    runs = read_runs([*([arguments.demo] if (arguments.demo / "result.json").exists() else []), *baselines])
    dga = [run for run in runs if run.policy == "dga"]
    if not dga:
        print(f"{arguments.demo} holds no finished run of the policy dga; run `make demo` first", file=sys.stderr)
        return 1
    picture = stack({
        "The mixture over training": mixture_figure(dga[0]),
        "Held-out bits per byte over training": loss_figure(runs),
    })  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(picture, encoding="utf-8")
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
