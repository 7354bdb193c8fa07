"""What fitting a robust gate costs in time and memory, beside the exact convex programme, and how much data it needs.

A synthetic language: each domain is a Markov chain over 16 letters, each expert a perturbed copy of the chain of one
domain, all chains part of the way from a common one, so that they overlap. A sequence is 64 letters drawn from its
chain, and every log-likelihood is that of the drawn letters under the expert's chain, at every size: transition
probabilities are multiples of 1 / 4096, so that drawing is a look-up, and scores are counts of letter pairs times a
table.

    growth              `fit_robust_gate` for a fixed number of steps, data ready, against sequences in all (half of
                        domains, half drawn from experts, for Z) and experts; as many domains as experts. Mini-batches
                        have the same number of sequences whatever the experts are. What does not depend on the steps
                        (standardisation, offsets, two evaluations on all data) is in it
    memory              processes of their own that make the data, fit, and note the peak
    exact programme     `exact_robust_gate` (cvxpy, Clarabel) and `fit_robust_gate` (gate `tabular`, all of its steps)
                        on the same enumerated P and Q, in one process, in turns; both start from P and Q
    sample efficiency   the worst domain's regret to its own expert, nats per sequence, on a large fresh sample, of
                        gates fitted on n sequences of each domain and n of each expert

Seconds are of processor time, which on one thread is what the work takes where nothing else runs.

    python benchmarks/gate_fit.py --threads 1  # regenerates benchmarks/results/gate_fit.{json,md}
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import _common
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.gating.config import FitConfig
from weftlm.gating.exact import exact_robust_gate
from weftlm.gating.gate import CausalGate, Features, Gate, init_gate
from weftlm.gating.primal_dual import fit_robust_gate
from weftlm.gating.problem import Problem, evaluate, log_model, make_problem, measure
from weftlm.gating.sequences import ScoredSequences, sequence_features

LETTERS, LENGTH, UNITS = 16, 64, 4096
"""Letters of the alphabet; letters of a sequence; transition probabilities are multiples of 1 / UNITS."""
CHUNK = 1 << 11
"""Sequences drawn and scored at a time: little beside the data."""
OWN, PERTURBED = 0.35, 0.15
"""How much of a chain is its domain's own, and of an expert's chain is noise."""
GATES = ("linear",)
MINI, FULL = "mini-batches", "full batch"
BATCH = 1024
"""Sequences of all domains together in a mini-batch (and as many samples)."""
FULL_UP_TO = 800_000
"""Sequences x experts up to which fits on the full batch are timed."""
NEAR_LINEAR = 1.1
"""The largest exponent, over the last tenfold, that counts as near-linear."""
SUPPORTS, SUPPORT_DOMAINS = (40, 400, 4000), 4
EFFICIENCY_EXPERTS, FRESH = 4, 20_000
SIZES = tuple(1 << power for power in range(3, 13))
UNTRAINED: dict[str, dict[str, Any]] = {"bayes": {"gate": "bayes"}, "uniform": {"gate": "fixed_share", "share": 1.0}}
LARGE_BATCH = 256
"""Sequences per domain and step where there are more than so many."""


# -- the language -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Language:
    """Chains of domains and experts; both as transition counts out of UNITS.

    Attributes:
        domain_DSS: of domain d from one letter to the next.
        expert_ESS: of expert e.
    """

    domain_DSS: NDArray[np.int64]
    expert_ESS: NDArray[np.int64]

    @classmethod
    def draw(cls, experts: int, seed: int) -> Language:
        rng = np.random.default_rng([seed, experts])
        flat = np.full(LETTERS, 0.5)
        common_SS = rng.dirichlet(flat, size=LETTERS)
        own_DSS = rng.dirichlet(flat, size=(experts, LETTERS))
        noise_ESS = rng.dirichlet(flat, size=(experts, LETTERS))
        domain_DSS = (1 - OWN) * common_SS + OWN * own_DSS
        return cls(_in_units(domain_DSS), _in_units((1 - PERTURBED) * domain_DSS + PERTURBED * noise_ESS))

    @property
    def experts(self) -> int:
        return len(self.expert_ESS)

    def letters(self, chain_SS: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """`count` sequences of a chain, N x LENGTH + 1; the first letter is uniform and is not scored."""
        table_SU = np.stack([np.repeat(np.arange(LETTERS, dtype=np.uint8), row) for row in chain_SS])
        found_NT = np.empty((count, LENGTH + 1), dtype=np.uint8)
        found_NT[:, 0] = rng.integers(0, LETTERS, count)
        for place in range(LENGTH):
            found_NT[:, place + 1] = table_SU[found_NT[:, place], rng.integers(0, UNITS, count, dtype=np.uint16)]
        return found_NT

    def scores(self, letters_NT: NDArray[np.uint8]) -> NDArray[np.float32]:
        """log q_e of every sequence, N x E, nats."""
        logq_PE = np.log(self.expert_ESS / UNITS).reshape(self.experts, -1).T.astype(np.float32)
        found_NE = np.empty((len(letters_NT), self.experts), dtype=np.float32)
        for first in range(0, len(letters_NT), CHUNK):
            some_NT = letters_NT[first : first + CHUNK].astype(np.int64)
            pairs_NT = some_NT[:, :-1] * LETTERS + some_NT[:, 1:]
            places_NT = pairs_NT + np.arange(len(some_NT))[:, None] * LETTERS**2
            counts_NP = np.bincount(places_NT.ravel(), minlength=len(some_NT) * LETTERS**2).reshape(len(some_NT), -1)
            found_NE[first : first + CHUNK] = counts_NP.astype(np.float32) @ logq_PE
        return found_NE

    def sequences(self, count: int, seed: int) -> tuple[list[ScoredSequences], list[ScoredSequences]]:
        """`count` sequences of every domain, and of every expert."""
        rng = np.random.default_rng([seed, count, 1])

        def scored(chain_SS: NDArray[np.int64], name: str) -> ScoredSequences:
            parts = [
                self.scores(self.letters(chain_SS, min(CHUNK, count - first), rng)) for first in range(0, count, CHUNK)
            ]
            return ScoredSequences.of(np.concatenate(parts), tokens_N=np.full(count, LENGTH), name=name)

        domains = [scored(chain_SS, f"domain {d}") for d, chain_SS in enumerate(self.domain_DSS)]
        return domains, [scored(chain_SS, f"expert {e}") for e, chain_SS in enumerate(self.expert_ESS)]


def _in_units(chain_XSS: NDArray[np.float64]) -> NDArray[np.int64]:
    """Transition probabilities as counts, each at least 1, that sum to UNITS in every row."""
    spare = UNITS - chain_XSS.shape[-1]
    counts = np.floor(chain_XSS * spare).astype(np.int64) + 1
    largest = chain_XSS.argmax(axis=-1)[..., None]
    missing = UNITS - counts.sum(axis=-1, keepdims=True)
    np.put_along_axis(counts, largest, np.take_along_axis(counts, largest, -1) + missing, -1)
    return counts


# -- time and memory against sequences and experts --------------------------------------------------------------------


def per_set(sequences: int, experts: int) -> int:
    """Sequences of each domain, and of each expert, where there are so many in all."""
    return max(4, sequences // (2 * experts))


def fit_config(experts: int, way: str, seed: int, steps: int) -> FitConfig:
    return FitConfig(
        steps=steps, report_every_steps=steps, best_response_steps=0, seed=seed,
        batch_sequences=max(2, BATCH // experts) if way == MINI else None,
    )  # fmt: skip


def ways(sequences: int, experts: int) -> tuple[str, ...]:
    return (MINI, FULL) if sequences * experts <= FULL_UP_TO else (MINI,)


def growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every fit, by way, gate and experts: one list over sequences, of spreads over seeds."""
    seconds: dict[str, dict[str, dict[str, list[list[float]]]]] = {
        way: {gate: {str(e): [] for e in arguments.experts} for gate in GATES} for way in (MINI, FULL)
    }
    for gate in GATES:  # the warm-up
        data = Language.draw(2, 0).sequences(8, 0)
        fit_robust_gate(*data, gate=gate, config=fit_config(2, MINI, 0, 5))
    for experts in arguments.experts:
        for sequences in arguments.sequences:
            taken: dict[tuple[str, str], list[float]] = {}
            for seed in range(arguments.seeds):
                domains, samples = Language.draw(experts, seed).sequences(per_set(sequences, experts), seed)
                for way in ways(sequences, experts):
                    for gate in GATES:
                        config = fit_config(experts, way, seed, arguments.steps)
                        gc.collect()
                        start = time.process_time()
                        fit_robust_gate(domains, samples, gate=gate, config=config)
                        taken.setdefault((way, gate), []).append(time.process_time() - start)
                del domains, samples
            for (way, gate), values in taken.items():
                seconds[way][gate][str(experts)].append(values)
            shown = ", ".join(f"{way} {gate} {_common.spread(v).show()} s" for (way, gate), v in taken.items())
            _common.say(f"{sequences} sequences, {experts} experts: {shown}")
    return {
        way: {
            gate: {
                experts: {
                    "sequences": arguments.sequences[: len(by_size)],
                    "seconds": [_common.spread(values).as_json() for values in by_size],
                    **exponents(arguments.sequences[: len(by_size)], by_size),
                }
                for experts, by_size in by_experts.items()
                if by_size
            }
            for gate, by_experts in by_gate.items()
        }
        for way, by_gate in seconds.items()
    }


def exponents(sizes: Sequence[int], values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Slopes of log seconds on log sequences, over seeds: least squares over all sizes, and between the last two."""
    if len(sizes) < 2:
        return {"exponent": None, "exponent_last": None}
    logs_S = np.log(np.array(sizes, dtype=np.float64))
    logs_SR = np.log(np.array(values))
    return {
        "exponent": _common.spread(np.polyfit(logs_S, logs_SR, 1)[0].tolist()).as_json(),
        "exponent_last": _common.spread(
            ((logs_SR[-1] - logs_SR[-2]) / (logs_S[-1] - logs_S[-2])).tolist()
        ).as_json(),
    }  # fmt: skip


def peak_bytes() -> int:
    """Peak resident memory of this process. Linux's ru_maxrss would count the parent's from before it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1))  # type: ignore[union-attr]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_for_memory(gate: str, way: str, experts: int, sequences: int) -> None:
    """Fit once on a little data, so that libraries are in memory; then make the data, note the peak, fit, note it."""
    torch.set_num_threads(1)
    language = Language.draw(experts, 0)
    config = fit_config(experts, way, 0, 3)
    fit_robust_gate(*language.sequences(8, 0), gate=gate, config=config)
    empty = peak_bytes()
    domains, samples = language.sequences(per_set(sequences, experts), 0)
    data = sum(
        tensor.numel() * tensor.element_size()
        for one in (*domains, *samples)
        for tensor in (one.logq_NE, one.features.sequence_BF, one.tokens_N)
        if tensor is not None
    )
    made = peak_bytes()
    fit_robust_gate(domains, samples, gate=gate, config=config)
    sys.stdout.write(json.dumps({"data": data, "empty": empty, "made": made, "fitted": peak_bytes()}))


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory beyond the libraries', over the bytes of the data, at the most sequences of each way."""
    found = []
    for experts in arguments.experts:
        for way in (MINI, FULL):
            possible = [sequences for sequences in arguments.sequences if way in ways(sequences, experts)]
            for sequences in possible[-1:]:
                for gate in GATES:
                    command = [sys.executable, __file__, "--memory-of", gate, way, str(experts), str(sequences)]
                    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    one = json.loads(text)
                    row = {
                        "gate": gate, "way": way, "experts": experts, "sequences": sequences,
                        "data_bytes": one["data"],
                        "made_over_data": (one["made"] - one["empty"]) / one["data"],
                        "fitted_over_data": (one["fitted"] - one["empty"]) / one["data"],
                    }  # fmt: skip
                    found.append(row)
                    _common.say(
                        f"memory, {sequences} x {experts}, {way}, {gate}: {row['fitted_over_data']:.2f} of data"
                    )
    return found


# -- beside the exact programme ---------------------------------------------------------------------------------------


def random_support(points: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """P, D x X, and Q, E x X: domains part of the way from a common distribution, experts perturbed copies."""
    rng = np.random.default_rng([seed, points])
    common_X = rng.dirichlet(np.full(points, 0.5))
    own_DX = rng.dirichlet(np.full(points, 0.5), size=SUPPORT_DOMAINS)
    noise_EX = rng.dirichlet(np.full(points, 0.5), size=SUPPORT_DOMAINS)
    p_DX = 0.5 * common_X + 0.5 * own_DX
    return p_DX, 0.9 * p_DX + 0.1 * noise_EX


def beside_exact(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and values of the exact programme and of the fit, on the same P and Q."""
    try:
        exact_robust_gate(*random_support(10, 0))  # imports cvxpy
    except ConfigError as error:
        _common.say(f"no exact programme: {error}")
        return {"skipped": str(error), "rows": []}
    config = FitConfig(steps=100 if arguments.quick else 8000, gap_tolerance=None)
    rows = []
    for points in arguments.supports:
        ours, theirs, differences, values, gaps = [], [], [], [], []
        for seed in range(arguments.seeds):
            P, Q = random_support(points, seed)
            start = time.process_time()
            exact = exact_robust_gate(P, Q)
            between = time.process_time()
            fitted = fit_robust_gate(P, Q, gate="tabular", config=config)
            theirs.append(between - start)
            ours.append(time.process_time() - between)
            values.append(exact.value)
            differences.append(fitted.worst - exact.value)
            gaps.append(fitted.gap)
        row: dict[str, Any] = {"points": points}
        for key, each in (
            ("exact_seconds", theirs), ("fit_seconds", ours),
            ("fit_over_exact", [a / b for a, b in zip(ours, theirs, strict=True)]),
            ("exact_value", values), ("difference", differences), ("gap", gaps),
        ):  # fmt: skip
            row[key] = _common.spread(each).as_json()
        rows.append(row)
        _common.say(f"support of {points}: exact {theirs[-1]:.3g} s, fit {ours[-1]:.3g} s, {differences[-1]:+.2g} nats")
    return {"skipped": None, "rows": rows, "steps": config.steps, "cvxpy": metadata.version("cvxpy")}


# -- how much data a gate needs ---------------------------------------------------------------------------------------


def fit_on(
    domains: Sequence[ScoredSequences], samples: Sequence[ScoredSequences], gate: str, seed: int, steps: int
) -> Gate:
    batch = LARGE_BATCH if len(domains[0]) > LARGE_BATCH else None
    config = FitConfig(
        steps=steps, report_every_steps=steps, best_response_steps=0, batch_sequences=batch, seed=seed
    )  # fmt: skip
    return fit_robust_gate(domains, samples, gate=gate, config=config).gate


def causal_worst(gate: CausalGate, problem: Problem, letters_DNT: Sequence[Any], language: Language) -> float:
    """Worst regret of a causal gate, which wants the experts' score of every letter."""
    logq_ESS = torch.from_numpy(np.log(language.expert_ESS / UNITS))
    logs: list[Tensor] = []
    for one, letters_NT in zip(problem.domains, letters_DNT, strict=True):
        parts = []
        for rows in torch.arange(len(one)).split(2000):
            some_NT = torch.from_numpy(letters_NT[rows.numpy()].astype(np.int64))
            logp_NTE = logq_ESS[:, some_NT[:, :-1], some_NT[:, 1:]].permute(1, 2, 0).contiguous()
            parts.append(log_model(gate, one.logq_NE[rows], Features(logp_BTE=logp_NTE)))
        logs.append(torch.cat(parts))
    return measure(logs, problem).worst


def efficiency(arguments: argparse.Namespace) -> dict[str, Any]:
    """Worst regret on fresh data by sequences fitted on; and without fitting, and fitted on the fresh data itself."""
    by_size: dict[str, list[list[float]]] = {gate: [[] for _ in arguments.sizes] for gate in ("linear", "constant")}
    optimum: dict[str, list[float]] = {gate: [] for gate in by_size}
    errors: list[float] = []
    untrained: dict[str, list[float]] = {name: [] for name in UNTRAINED}
    for seed in range(arguments.seeds):
        language = Language.draw(EFFICIENCY_EXPERTS, 1000 + seed)
        rng = np.random.default_rng([seed, 2])
        letters_DNT = [language.letters(chain, arguments.fresh, rng) for chain in language.domain_DSS]
        letters_ENT = [language.letters(chain, arguments.fresh, rng) for chain in language.expert_ESS]

        def scored(letters_XNT: Sequence[Any], language: Language = language) -> list[ScoredSequences]:
            found = []
            for letters_NT in letters_XNT:
                logq_NE = language.scores(letters_NT)
                tokens_N = np.full(len(logq_NE), LENGTH)
                found.append(
                    ScoredSequences.of(logq_NE, features=sequence_features(logq_NE, tokens_N), tokens_N=tokens_N)
                )
            return found

        fresh = scored(letters_DNT), scored(letters_ENT)
        problem = make_problem(*fresh)
        # Fits on n sequences see the first n of the same draw, so that sizes differ in nothing else.
        domains, samples = language.sequences(max(arguments.sizes), 5000 + seed)
        for gate in by_size:
            for place, size in enumerate(arguments.sizes):
                few = torch.arange(size)
                seen = [one.rows(few) for one in domains], [one.rows(few) for one in samples]
                found = fit_on(*seen, gate, seed, arguments.fit_steps)
                by_size[gate][place].append(evaluate(found, problem).worst)
            best = evaluate(fit_on(*fresh, gate, seed, arguments.fit_steps), problem)
            optimum[gate].append(best.worst)
            errors.append(math.hypot(float(best.errors_D[best.worst_domain]), best.z_error / best.z))
        for name, values in untrained.items():
            seen = Features(logp_BTE=torch.zeros(1, 1, EFFICIENCY_EXPERTS))
            causal = init_gate(UNTRAINED[name], EFFICIENCY_EXPERTS, seen)
            assert isinstance(causal, CausalGate)
            values.append(causal_worst(causal, problem, letters_DNT, language))
        _common.say(f"sample efficiency, seed {seed}: optimum { ({k: round(v[-1], 3) for k, v in optimum.items()}) }")
    return {
        "sizes": list(arguments.sizes),
        "fresh": arguments.fresh,
        "gates": {gate: [_common.spread(values).as_json() for values in each] for gate, each in by_size.items()},
        "over_optimum": {
            gate: [
                _common.spread([a - b for a, b in zip(values, optimum[gate], strict=True)]).as_json()
                for values in each
            ]
            for gate, each in by_size.items()
        },
        "optimum": {gate: _common.spread(values).as_json() for gate, values in optimum.items()},
        "untrained": {name: _common.spread(values).as_json() for name, values in untrained.items()},
        "standard_error": max(errors),
    }  # fmt: skip


# -- the whole --------------------------------------------------------------------------------------------------------


def goals(grown: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whether the largest exponent over the last tenfold of sequences is near-linear; by the median."""
    found = []
    for way, by_gate in grown.items():
        for gate, by_experts in by_gate.items():
            last = {e: one["exponent_last"] for e, one in by_experts.items() if one["exponent_last"] is not None}
            if last:
                experts = max(last, key=lambda e: last[e]["median"])
                found.append(
                    {
                        "way": way, "gate": gate, "experts": int(experts), "measured": last[experts],
                        "limit": NEAR_LINEAR, "met": last[experts]["median"] <= NEAR_LINEAR,
                    }
                )  # fmt: skip
    return found


def to_markdown(record: Mapping[str, Any]) -> str:
    def show(spread: Mapping[str, float] | None, form: str = "{:.3g}") -> str:
        return "" if spread is None else _common.Spread(**spread).show(form)  # type: ignore[arg-type]

    setting = record["setting"]
    lines = [
        "# Fitting a robust gate: time, memory, data", "", __doc__ or "",
        f"{setting['seeds']} seeds; median (lowest .. highest).", "",
        f"## Growth: seconds for {setting['steps']} steps", "",
        f"Mini-batches: {setting['batch']} sequences of all domains together and as many samples per step. The "
        f"full batch is fitted up to {setting['full_up_to']:,} sequences times experts. Exponent: the slope of log "
        "seconds on log sequences, over all sizes and over the last two. Goal: at most "
        f"{NEAR_LINEAR:g} over the last two, at every number of experts; the largest:", "",
        _common.table(
            ["", "gate", "experts", "exponent", "goal", "met"],
            [
                [
                    one["way"], one["gate"], one["experts"], show(one["measured"], "{:.2f}"), f"≤ {one['limit']:g}",
                    "yes" if one["met"] else "no",
                ]
                for one in record["goals"]
            ],
        ),
    ]  # fmt: skip
    for way, by_gate in record["growth"].items():
        sizes = setting["sequences"]
        rows = []
        for gate, by_experts in by_gate.items():
            for experts, one in by_experts.items():
                cells = [show(value) for value in one["seconds"]] + [""] * (len(sizes) - len(one["seconds"]))
                slopes = [show(one[key], "{:.2f}") for key in ("exponent", "exponent_last")]
                rows.append([gate, experts, *cells, *slopes])
        header = ["gate", "experts", *(f"{size:,}" for size in sizes), "exponent", "of the last two"]
        lines += ["", f"### {way[0].upper() + way[1:]}, seconds by sequences", "", _common.table(header, rows)]
    if record["memory"]:
        rows = [
            [
                one["way"], one["gate"], one["experts"], f"{one['sequences']:,}", f"{one['data_bytes'] / 2**20:.0f}",
                f"{one['made_over_data']:.2f}", f"{one['fitted_over_data']:.2f}",
            ]
            for one in record["memory"]
        ]  # fmt: skip
        lines += [
            "", "## Memory", "",
            "Data: log-likelihoods, features (two per expert) and lengths, as `ScoredSequences` hold them. Peak memory "
            "beyond the libraries', over the bytes of the data: when the data was made, and after fitting.", "",
            _common.table(["", "gate", "experts", "sequences", "data, MiB", "made", "fitted"], rows),
        ]  # fmt: skip
    exact = record["exact"]
    lines += ["", "## Beside the exact programme", ""]
    if exact["skipped"]:
        lines.append(f"Not run: {exact['skipped']}")
    else:
        rows = [
            [
                one["points"], show(one["exact_seconds"]), show(one["fit_seconds"]), show(one["fit_over_exact"]),
                show(one["exact_value"], "{:.5f}"), show(one["difference"], "{:+.1e}"), show(one["gap"], "{:.1e}"),
            ]
            for one in exact["rows"]
        ]  # fmt: skip
        lines += [
            f"{SUPPORT_DOMAINS} domains and experts, {exact['steps']} steps, cvxpy {exact['cvxpy']}. Value: the worst "
            "KL, nats; difference: the fit's minus the exact one; gap: what the fit itself says it may be off by.", "",
            _common.table(
                ["points", "exact, s", "fit, s", "fit over exact", "exact value", "difference", "gap"], rows
            ),
        ]  # fmt: skip
    data = record["efficiency"]
    rows = [
        [size, *(show(data[key][gate][place], "{:.3f}") for gate in data["gates"] for key in ("gates", "over_optimum"))]
        for place, size in enumerate(data["sizes"])
    ]
    rows.append(
        ["optimum", *(cell for gate in data["gates"] for cell in (show(data["optimum"][gate], "{:.3f}"), "0"))]
    )  # fmt: skip
    header = ["sequences per domain", *(cell for gate in data["gates"] for cell in (gate, "over its optimum"))]
    lines += [
        "", "## Sample efficiency: worst regret on fresh data, nats per sequence", "",
        f"{EFFICIENCY_EXPERTS} domains and experts, {data['fresh']:,} fresh sequences of each, {setting['fit_steps']} "
        f"steps. Optimum: fitted on the fresh sequences themselves. Standard error of a figure: up to "
        f"{data['standard_error']:.3f}. A constant gate is Bayes' gate with its weights as prior, so it is causal too. "
        "Below 0: better than every domain's own expert, which is a perturbed copy of its chain.", "",
        _common.table(header, rows), "",
        "Not fitted: " + ", ".join(f"{who} {show(value, '{:.3f}')}" for who, value in data["untrained"].items()) + ".",
    ]  # fmt: skip
    return "\n".join([*lines, "", _common.environment_lines(record)])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    grown = growth(arguments)
    return {
        "setting": {
            "seeds": arguments.seeds, "steps": arguments.steps, "batch": BATCH, "full_up_to": FULL_UP_TO,
            "sequences": list(arguments.sequences), "experts": list(arguments.experts),
            "fit_steps": arguments.fit_steps, "letters": LETTERS, "length": LENGTH, "own": OWN, "perturbed": PERTURBED,
        },
        "growth": grown,
        "goals": goals(grown),
        "memory": None if arguments.quick else memory(arguments),
        "exact": beside_exact(arguments),
        "efficiency": efficiency(arguments),
    }  # fmt: skip


def main() -> None:
    flags = _common.parser((__doc__ or "").splitlines()[0])
    flags.add_argument(
        "--sequences", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="in all, ascending"
    )
    flags.add_argument("--experts", type=int, nargs="+", default=[2, 8, 16, 64], help="numbers of experts")
    flags.add_argument("--supports", type=int, nargs="+", default=list(SUPPORTS), help="points of enumerated problems")
    flags.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="sequences per domain fitted on")
    flags.add_argument("--fresh", type=int, default=FRESH, help="fresh sequences per domain")
    flags.add_argument("--steps", type=int, default=100, help="of a timed fit")
    flags.add_argument("--fit-steps", type=int, default=1500, help="of a fit whose gate is judged")
    flags.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        gate, way, *numbers = arguments.memory_of
        run_for_memory(gate, way, *(int(number) for number in numbers))
        return
    if arguments.quick:
        arguments.seeds, arguments.sequences, arguments.experts = 1, [1_000, 10_000], [2, 8]
        arguments.supports, arguments.sizes, arguments.fresh = [40], [8, 64], 1_000
        arguments.steps, arguments.fit_steps = 20, 100
    _common.finish("gate_fit", arguments, run(arguments), to_markdown)


if __name__ == "__main__":
    main()
