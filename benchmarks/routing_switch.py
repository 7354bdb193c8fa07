"""Text whose domain changes midway: how soon routers follow, and what it costs.

Windows are a stretch of one held-in domain followed by a stretch of another. Routers that decide once per sequence must
serve both halves with one choice; routers that decide per token can change. Told per position around the change: the
loss in bits per token, and the weight on the expert whose domain it is. Base, experts and gates are those of
`routing_quality.py`; give the same `--work` to train nothing again.

    python benchmarks/routing_switch.py --data PATH      # regenerates benchmarks/results/routing_switch.{json,md}
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from _common import environment_lines, finish, parser, say, spread, table
from _routing_setting import Setting
from matplotlib import pyplot as plt
from torch import Tensor

from weftlm.models.hf import token_losses
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Routing, TargetModule

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "assets" / "routing_switch.svg"
HALF = 64
PAIRS_PER_SEED = 96
ROUTERS: dict[str, dict[str, Any]] = {
    "merged": {"router": "merged"},
    "retrieval, first half": {"router": "retrieval", "read_tokens": HALF},
    "retrieval, whole text": {"router": "retrieval"},
    "arrow": {"router": "arrow"},
    "phatgoose": {"router": "phatgoose"},
    "prefix": {"router": "prefix"},
    "blend": {"router": "blend"},
}
BATCH = 16
AFTER = {"1 to 4": (0, 4), "5 to 16": (4, 16), "17 to 64": (16, HALF)}
"""Tokens after the change, counted from 1."""
NAMED = ("retrieval, first half", "phatgoose", "prefix", "blend")
"""Rows drawn."""


def windows(setting: Setting, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token windows (N, 2 * HALF + 1) of two domains each, and the two domains' places (N, 2)."""
    generator = np.random.default_rng(seed)
    names = [name for name in setting.domains if len(setting.parts[name]["report"]) > 4 * HALF]
    rows, places = [], []
    for _ in range(count):
        pair = generator.choice(len(names), size=2, replace=False)
        halves = []
        for side, place in enumerate(pair):
            source = setting.parts[names[place]]["report"]
            length = HALF + side
            start = int(generator.integers(0, len(source) - length))
            halves.append(torch.from_numpy(source.read(start, length).astype("int64")))
        rows.append(torch.cat(halves))
        places.append([setting.names.index(names[place]) for place in pair])
    return torch.stack(rows), torch.tensor(places)


def measure(model: Any, tokens_NT1: Tensor, places_N2: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bits per position (2 * HALF), and the weight on the right expert per position where something is routed."""
    losses, weights = [], []
    for begin in range(0, len(tokens_NT1), BATCH):
        batch = tokens_NT1[begin : begin + BATCH]
        places = places_N2[begin : begin + BATCH]
        seen: dict[str, Routing] = {}

        def record(target: TargetModule, routing: Routing, seen: dict[str, Routing] = seen) -> None:
            seen[target.name] = routing

        if isinstance(model, RoutedModel) and model.router.static_weights_E is None:
            with model.recording(record):
                losses.append(token_losses(model, batch))
            right_BT = places.repeat_interleave(HALF, dim=1)
            each = [
                (routing.weights_BTK * (routing.experts_BTK == right_BT[..., None])).sum(dim=-1)
                for routing in seen.values()
            ]
            weights.append(torch.stack(each).mean(dim=0))
        else:
            losses.append(token_losses(model, batch))
    return torch.cat(losses).mean(dim=0) / math.log(2), torch.cat(weights).mean(dim=0) if weights else None


def summary(bits_ST: np.ndarray[Any, Any], weight_ST: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    """Spread over seeds: before the change, and in stretches after it."""
    stretches = {"before": (HALF // 2, HALF), **{name: (HALF + a, HALF + b) for name, (a, b) in AFTER.items()}}
    # Position t is the prediction of token t + 1.
    bits = {name: bits_ST[:, a - 1 : b - 1].mean(axis=1) for name, (a, b) in stretches.items()}
    return {
        "bits": {name: spread(values.tolist()).as_json() for name, values in bits.items()},
        "weight": None
        if weight_ST is None
        else {name: spread(weight_ST[:, a:b].mean(axis=1).tolist()).as_json() for name, (a, b) in stretches.items()},
        "bits_by_position": bits_ST.mean(axis=0).round(4).tolist(),
        "weight_by_position": None if weight_ST is None else weight_ST.mean(axis=0).round(4).tolist(),
    }


def to_markdown(record: Mapping[str, Any]) -> str:
    """Losses and weights before and after the change."""

    def show(values: Mapping[str, float] | None) -> str:
        return "-" if values is None else f"{values['median']:.3f} ({values['low']:.3f} .. {values['high']:.3f})"

    stretches = ["before", *AFTER]
    lines = [
        "# When the domain changes midway",
        "",
        f"{record['windows']} windows of {HALF} tokens of one domain and {HALF} of another, {record['seeds']} seeds of "
        "windows (median, lowest .. highest). `before`: the last half of the first stretch; then tokens after the "
        "change. `oracle` uses the first domain's expert up to the change and the second's after it.",
        "",
        "## Bits per token",
        "",
        table(
            ["router", *stretches],
            [[name, *(show(row["bits"][each]) for each in stretches)] for name, row in record["rows"].items()],
        ),
        "",
        "## Weight on the expert of the token's own domain, mean over modules",
        "",
        table(
            ["router", *stretches],
            [
                [name, *(show(row["weight"][each]) for each in stretches)]
                for name, row in record["rows"].items()
                if row["weight"] is not None
            ],
        ),
        "",
        "![loss and weight around the change](../../docs/assets/routing_switch.svg)",
    ]
    return "\n".join([*lines, "", environment_lines(record)])


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Loss relative to the base and weight on the right expert, by position."""
    mpl.rcParams["svg.hashsalt"] = "weftlm"
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, constrained_layout=True)
    positions = np.arange(2 * HALF) - HALF + 1
    base = np.array(record["rows"]["base"]["bits_by_position"])
    kernel = np.ones(5) / 5
    for name in (*NAMED, "oracle"):
        row = record["rows"][name]
        gain = np.array(row["bits_by_position"]) - base
        style = {"color": "0.5", "linestyle": "--"} if name == "oracle" else {}
        above.plot(positions[2:-2], np.convolve(gain, kernel, "valid"), label=name, **style)
        if row["weight_by_position"] is not None:
            below.plot(positions, row["weight_by_position"], label=name)
    for axes in (above, below):
        axes.axvline(0, color="0.7", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    above.axhline(0, color="0.8", linewidth=1)
    above.set_ylabel("bits per token over the base\n(mean of 5 positions)")
    below.set_ylabel("weight on the expert\nof the token's own domain")
    below.set_xlabel("tokens from the change of domain")
    above.legend(frameon=False, ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure every router, report and draw."""
    flags = parser(str(__doc__).splitlines()[0])
    flags.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with domains/ and tasks/")
    flags.add_argument("--work", type=Path, default=None, help="where trained models are kept")
    arguments = flags.parse_args()
    if not (arguments.data / "domains").is_dir():
        if not arguments.quick:
            flags.error(f"{arguments.data} holds no domains/*.jsonl.zst; name the folder with --data")
        sys.stdout.write(json.dumps({"theme": "routing_switch", "skipped": "no text; name it with --data"}) + "\n")
        return
    torch.set_num_threads(1)
    count, seeds = (8, 1) if arguments.quick else (PAIRS_PER_SEED, arguments.seeds)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        setting = Setting(arguments.data, arguments.work or Path(temporary), quick=arguments.quick)
        with torch.inference_mode(False):
            setting.train_experts()
        data = [windows(setting, count, seed) for seed in range(seeds)]
        rows: dict[str, Any] = {}
        base = setting.base()
        rows["base"] = _row([measure(base, *each) for each in data])
        model = RoutedModel(base, setting.experts())
        rows["oracle"] = _row([(_oracle(model, *each), None) for each in data])
        for name, router in ROUTERS.items():
            model.use_router(router)
            rows[name] = _row([measure(model, *each) for each in data])
            say(name)
    record = {"windows": count, "seeds": seeds, "half": HALF, "routers": ROUTERS, "rows": rows}
    finish("routing_switch", arguments, record, to_markdown)
    if not arguments.quick:
        draw(record, PICTURE)


def _row(found: list[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    weights = [weight for _, weight in found if weight is not None]
    return summary(
        torch.stack([bits for bits, _ in found]).double().numpy(),
        torch.stack(weights).double().numpy() if weights else None,
    )


def _oracle(model: RoutedModel, tokens_NT1: Tensor, places_N2: Tensor) -> Tensor:
    """Bits per position with the right expert in each half; the second half reads the first with its own expert."""
    bits_NT = torch.zeros(len(tokens_NT1), 2 * HALF)
    for place in places_N2.unique().tolist():
        model.use_router({"router": "single", "expert": model.experts[place].name})
        for side in (0, 1):
            rows = (places_N2[:, side] == place).nonzero().flatten()
            for some in rows.split(BATCH):
                if len(some):
                    half = slice(side * HALF, (side + 1) * HALF)
                    bits_NT[some, half] = token_losses(model, tokens_NT1[some])[:, half] / math.log(2)
    return bits_NT.mean(dim=0)


if __name__ == "__main__":
    main()
