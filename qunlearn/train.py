"""The loop. One step: forget, mismatch and retain rows through their losses; then one look at target and drift."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from qunlearn.config import Config
from qunlearn.data.batch import ANSWER, batches_by_length, collate
from qunlearn.data.roles import Mismatcher, batches
from qunlearn.data.tokenize import Example
from qunlearn.errors import DoesNotFitError, TrainingError
from qunlearn.evaluate.score import mean_kl, row_nlls
from qunlearn.model.policy import Policy
from qunlearn.objectives.losses import Supervised
from qunlearn.objectives.table import OBJECTIVES, Term
