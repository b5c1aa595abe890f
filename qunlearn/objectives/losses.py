"""A page of equations: what is minimised on each role of the data, unreduced.

Per supervised token (N,), or per answer (R,) where a method weighs whole answers, or per pair of answers (P,). Sums
over an answer count each token by its weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from qunlearn.model.head import Head, token_kl, token_log_odds, token_logps, token_range, token_soft_ce


@dataclass(frozen=True)
class Supervised:
    """What a loss sees of one role: the supervised positions and nothing else.

    `owner[n]` numbers the answers from 0 in the order in which they stand; None for losses that need no answers.
    """

    h: Tensor  # (N, D) policy
    h_ref: Tensor | None  # (N, D) reference, where the loss needs it
    labels: Tensor  # (N,)
    head: Head
    weights: Tensor | None = None  # (N,)
    owner: Tensor | None = None  # (N,)
    rest: Tensor | None = None  # (N,): the share of `objective.rest` that is meant for each

    @property
    def reference(self) -> Tensor:
        """(N, D)"""
        if self.h_ref is None:
            raise ValueError("this loss needs the reference's hidden states")
        return self.h_ref

    def logps(self) -> Tensor:
        return token_logps(self.h, self.labels, self.head)  # (N,)

    def log_odds(self) -> Tensor:
        return token_log_odds(self.h, self.labels, self.head)  # (N,)

    @torch.no_grad()
    def reference_logps(self) -> Tensor:
        return token_logps(self.reference, self.labels, self.head)  # (N,)

    def answer_sums(self, values: Tensor) -> Tensor:
        """(N,) -> (R,): each answer's weighted sum."""
        if self.owner is None:
            raise ValueError("this loss needs to know which answer a token belongs to")
        weighted = values if self.weights is None else values * self.weights
        out = torch.zeros(int(self.owner.max()) + 1 if self.owner.numel() else 0, device=values.device)
        return out.index_add(0, self.owner, weighted)


# -- on the forget side ----------------------------------------------------------------------------------


def log_odds(s: Supervised, rest: float) -> Tensor:
    """Log-odds ascent with a soft floor: softplus(log p/(1 - p) - log rest/(1 - rest)), minimised. -> (N,)

    The gradient of log p vanishes as 1 - p where a model is certain; that of the log odds is 1 whatever p is. The floor
    fades it out below p = `rest`, so that a token that is gone is left in peace. Ours; its gradient to the logits is
    that of CE-U (arXiv 2503.01224) divided by p, times the floor.
    """
    if s.rest is None:
        return softplus(s.log_odds() - math.log(rest / (1 - rest)))
    return softplus(s.log_odds() - torch.logit(rest * s.rest))


def log_odds_at(p: float, rest: float) -> float:
    """Return the log-odds loss of a token of probability p."""
    return math.log1p(p / max(1 - p, 1e-9) * (1 - rest) / rest)


def ascent(s: Supervised, floor_nll: float) -> Tensor:
    """Gradient ascent on the bad answer: log p, minimised (LLMU, arXiv 2310.10683, Eq. 2-3, L_fgt).

    Unbounded below, so a token whose NLL has passed `floor_nll` is no longer pushed: its gradient is zero.
    `inf` is the paper's own, unguarded form. -> (N,)
    """
    return s.logps().clamp(min=-floor_nll)


def nll(s: Supervised) -> Tensor:
    """Cross-entropy -log p (LLMU Eq. 4, L_rdn, on random mismatched answers). -> (N,)"""
    return -s.logps()


def weighted_ascent(s: Supervised, beta: float) -> Tensor:
    """WGA: sg(p)^beta log p, so that a token is pushed less the less probable it is (arXiv 2502.19301). -> (N,)"""
    logps = s.logps()
    return (beta * logps.detach()).exp() * logps


def saturation_importance(s: Supervised, beta1: float, beta2: float) -> Tensor:
    """SatImp: sg(p)^beta1 sg(1 - p)^beta2 log p (arXiv 2505.11953). -> (N,)"""
    logps = s.logps()
    p = logps.detach().exp()
    return torch.pow(p, beta1) * torch.pow(1 - p, beta2) * logps


def npo(s: Supervised, beta: float) -> Tensor:
    """NPO: -2/beta log sigmoid(-beta (log p(y|x) - log p_ref(y|x))) (arXiv 2404.05868, Eq. 3). -> (R,)"""
    ratio = s.answer_sums(s.logps() - s.reference_logps())
    return -2 / beta * logsigmoid(-beta * ratio)


def simnpo(s: Supervised, beta: float, delta: float) -> Tensor:
    """SimNPO: -2/beta log sigmoid(beta (NLL / |y| - delta)), without a reference (arXiv 2410.07163, Eq. 4). -> (R,)"""
    logps = s.logps()
    length = s.answer_sums(torch.ones_like(logps))
    return -2 / beta * logsigmoid(beta * (-s.answer_sums(logps) / length - delta))


def preference(s: Supervised, beta: float) -> Tensor:
    """DPO of another answer over the bad one: -2/beta log sigmoid(beta (r_other - r_bad)), r = log pi / pi_ref.

    Answers stand as (bad, other), (bad, other), …; the factor 2 is open-unlearning's, so that beta -> 0 has the scale
    of NPO (arXiv 2305.18290, Eq. 7; 2401.06121 with refusals; 2409.13474 with the model's own alternatives). -> (P,)
    """
    ratios = s.answer_sums(s.logps() - s.reference_logps())
    return -2 / beta * logsigmoid(beta * (ratios[1::2] - ratios[0::2]))


def bounded_ce(s: Supervised) -> Tensor:
    """Unlearning cross-entropy -log(1 - p/2): between 0 and log 2, without a gradient at p = 0 (MOLLM). -> (N,)"""
    return -torch.log1p(-s.logps().exp() / 2)


def bounded_ce_at(p: float) -> float:
    """The unlearning cross-entropy of a token of probability p."""
    return -math.log1p(-p / 2)


def prod(s: Supervised, top_p: float, temperature: float, alpha: float) -> Tensor:
    """PROD: cross-entropy against the reference without the label, cut to `top_p`, renormalised. -> (N,)

    arXiv 2506.17125, as in the released code, on the answer's tokens instead of all.
    The label's own target is -alpha p_ref(y): 0, or pushed down explicitly, or (alpha < 0) left some mass.
    """

    def target(z: Tensor, labels: Tensor) -> Tensor:  # (n, V), (n,) -> (n, V)
        y = labels.unsqueeze(1)
        z_own = z.gather(1, y) if alpha else None
        rest = z.scatter_(1, y, -torch.inf)
        p = rest.softmax(dim=1)
        q = nucleus(p if temperature == 1 else (rest / temperature).softmax(dim=1), p, top_p)
        if z_own is None:
            return q
        likeliest = p.argmax(dim=1, keepdim=True)
        # Its logit less its log-probability is the others' log-sum-exp: no further pass over the vocabulary.
        own = torch.sigmoid(z_own - rest.gather(1, likeliest) + p.gather(1, likeliest).log())
        return q.scatter(1, y, -alpha * own)

    return token_soft_ce(s.h, s.reference, s.labels, s.head, target)


_DIGIT = 10  # bits of a digit; the first one has 11, without the sign


def nucleus(q: Tensor, p: Tensor, top_p: float) -> Tensor:
    """q (n, V) on the smallest set of tokens that p gives a mass of `top_p`, the most probable first; renormalised.

    Sorting a vocabulary would cost more than the rest of the step. The least probability inside is found digit by
    digit instead: the bits of the numbers are in the order of the numbers, and a pass adds up what each digit weighs.
    """
    if top_p >= 1:
        return q
    bits = p.contiguous().view(torch.int32)  # (n, V)
    least, above = torch.zeros_like(bits[:, :1]), torch.zeros_like(p[:, :1])  # (n, 1): its first digits; mass over them
    for shift in (20, 10, 0):
        known = (bits >> (shift + _DIGIT)) == (least >> (shift + _DIGIT))
        digit = ((bits >> shift) & (2**_DIGIT - 1)) if shift < 20 else bits >> shift
        weight = p.new_zeros(len(p), 2048).scatter_add_(1, digit.long(), p * known if shift < 20 else p)
        over = above + weight.flip(1).cumsum(dim=1).flip(1)  # (n, 2048): mass with at least this digit
        found = (over >= top_p).sum(dim=1, keepdim=True).sub_(1).clamp_(min=0)
        above = over.gather(1, found) - weight.gather(1, found)
        least = least | (found.int() << shift)
    inside, equal = bits >= least, bits == least
    # Of several that are just as probable only as many as are needed; in real numbers there are none.
    needed = ((top_p - above) / least.view(p.dtype)).ceil().clamp(min=1)
    if bool((equal.sum(dim=1, keepdim=True) > needed).any()):
        inside &= ~equal | (equal.cumsum(dim=1) <= needed)
    q = q * inside
    return q / q.sum(dim=1, keepdim=True)


def undial(s: Supervised, beta: float) -> Tensor:
    """UNDIAL: cross-entropy against the reference with the label's logit lowered by beta (arXiv 2402.10052). -> (N,)"""

    def target(z: Tensor, labels: Tensor) -> Tensor:
        lowered = torch.full_like(labels, -beta, dtype=z.dtype).unsqueeze(1)
        return z.scatter_add_(1, labels.unsqueeze(1), lowered).softmax(dim=1)

    return token_soft_ce(s.h, s.reference, s.labels, s.head, target)


def self_without(s: Supervised) -> Tensor:
    """CE-U: cross-entropy against the model's own distribution without the label (arXiv 2503.01224, Eq. 5). -> (N,)"""

    def target(z: Tensor, labels: Tensor) -> Tensor:
        return z.scatter_(1, labels.unsqueeze(1), -torch.inf).softmax(dim=1)

    return token_soft_ce(s.h, s.h.detach(), s.labels, s.head, target)


def flatten(s: Supervised) -> Tensor:
    """Logits made equal: (max_v z - mean_v z)^2 (PDU, arXiv 2506.05314). -> (N,)"""
    return token_range(s.h, s.head)


def steer(s: Supervised, direction: Tensor, scale: float) -> Tensor:
    """RMU: a block's states pulled to `scale` times their reference's length along one random direction. -> (N,)

    mean_d (h - c u)^2 with u (D,) of length 1 (arXiv 2403.03218, Eq. 1). The published c is an absolute number that
    fits one layer of one model; here c = scale * |h_ref|.
    """
    c = scale * s.reference.float().norm(dim=1, keepdim=True)
    return torch.mean((s.h.float() - c * direction).square(), dim=1)


# -- on the retain side ----------------------------------------------------------------------------------


def reference_kl(s: Supervised) -> Tensor:
    """Forward KL(reference || policy) over the whole vocabulary (LLMU Eq. 6, L_nor). -> (N,)"""
    return token_kl(s.h, s.reference, s.head)


def hold(s: Supervised) -> Tensor:
    """RMU's retain side: mean_d (h - h_ref)^2 of a block's states (arXiv 2403.03218, Eq. 2). -> (N,)"""
    return (s.h.float() - s.reference.float()).square().mean(dim=1)
