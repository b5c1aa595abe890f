"""The names of the files in a run folder."""

from __future__ import annotations

ADAPTER, CONFIG, RECORD, METRICS, NORMAL = ("adapter", "config.yaml", "record.json", "metrics.jsonl", "normal.jsonl")

EVAL, EVAL_CACHE, REPORT = "eval.json", "eval-cache", "report.html"  # what later commands add
AUDIT, AUDIT_RESULT = "audit", "audit.json"  # a folder of its own, and what it comes to
