"""Names of the files that stages leave in a run folder."""

from __future__ import annotations

GATE, STATE, FIT, CERTIFICATE = "gate.safetensors", "state.safetensors", "fit.json", "certificate.json"
EVALUATION = "evaluation.json"
RESULT = "result.json"
REPORT, SUMMARY = "report.html", "summary.json"
COMPARED, TRAINING = "compared.html", "training.html"
"""Pages of several runs, and of a project's training alone: never over a project's own page."""
ROUTING = "routing.json"
STUDENT, DIRECT, DENSE = "student", "direct", "dense"
MONOLITH = "monolith"
