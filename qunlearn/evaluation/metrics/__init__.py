"""Measures as pure functions over per-row data: token log-probabilities and texts. No model, no file, no torch.

Each function says what it computes, in which unit, and where the definition comes from. Where the public definition
has a defect, the sound one is the default, and the docstring names the difference.
"""

from qunlearn.evaluation.metrics.rows import RowScore, SetScore, TokenStats, aggregate
from qunlearn.evaluation.metrics.verdicts import LEAKS, VERDICTS, verdict

__all__ = ["LEAKS", "VERDICTS", "RowScore", "SetScore", "TokenStats", "aggregate", "verdict"]
