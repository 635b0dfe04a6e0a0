"""The family that DPO started, and the baselines of its paper.

Each is a function of the same `PairLogps`, one loss per pair, tensor [batch]; KTO, which needs no
pairs, and Plackett-Luce, which takes rankings, come last. r_w = log pi(y_w|x) - log pi_ref(y_w|x)
and r_l likewise are the log-ratios of chosen and rejected, in nats. Where a loss divides by
lengths, |y| counts the tokens of a completion, its EOS included.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mini.losses import PairLogps, cdpo_loss, dpo_loss, implicit_rewards


def per_token(logps: PairLogps) -> PairLogps:
    """The same pairs with log-probabilities averaged over tokens: log pi(y | x) / |y|.

    The mean log-probability of a token is no log-probability of any completion; losses built on it
    trade that meaning for indifference to length.
    """
    return logps._replace(
        chosen=logps.chosen / logps.chosen_tokens,
        rejected=logps.rejected / logps.rejected_tokens,
        reference_chosen=logps.reference_chosen / logps.chosen_tokens,
        reference_rejected=logps.reference_rejected / logps.rejected_tokens,
    )


# --- with a reference ---


def dpo_norm_loss(logps: PairLogps, beta: float = 2.0) -> Tensor:
    """Length-normalised DPO: -log sigmoid(beta (r_w / |y_w| - r_l / |y_l|)).

    Lambert et al. 2024 (Tülu 3, arXiv 2411.15124), section 5. `beta` is some tens of times that of
    DPO, since it multiplies nats per token.
    """
    return dpo_loss(per_token(logps), beta)


def ipo_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """(r_w - r_l - 1 / (2 beta))²: the margin is drawn to a finite value, not to infinity.

    Azar et al. 2023 (arXiv 2310.12036), equation 17, `beta` being its tau; sums over tokens as
    the paper writes it.
    """
    chosen, rejected = implicit_rewards(logps, 1.0)
    return (chosen - rejected - 1 / (2 * beta)).square()


def ipo_token_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """IPO on means over tokens in place of sums: (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))².

    What TRL computes as "ipo"; the target is a margin of nats per token, so that the same `beta` is
    a much weaker constraint.
    """
    return ipo_loss(per_token(logps), beta)


def hinge_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta (r_w - r_l)): a pair is done once its margin is 1 / beta.

    SLiC's loss (Zhao et al. 2023, arXiv 2305.10425) on log-ratios, as Liu et al. 2023 (RSO, arXiv
    2309.06657) write it ("hinge-norm").
    """
    chosen, rejected = implicit_rewards(logps, beta)
    return F.relu(1 - (chosen - rejected))


def robust_loss(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """rDPO: ((1 - eps) L(y_w, y_l) - eps L(y_l, y_w)) / (1 - 2 eps), with L the loss of DPO.

    On labels of which a share eps is turned round its expectation is that of DPO on the right
    ones (Ray Chowdhury et al. 2024, arXiv 2403.00409, section 3). eps, in [0, 1/2), is
    `label_smoothing`. It has no lower bound: a large wrong margin in a pair earns without end.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    loss_if_right = -F.logsigmoid(chosen - rejected)
    loss_if_wrong = -F.logsigmoid(rejected - chosen)
    weighted = (1 - label_smoothing) * loss_if_right - label_smoothing * loss_if_wrong
    return weighted / (1 - 2 * label_smoothing)


def apo_zero_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): chosen up and rejected down, each against the
    reference; for pairs whose chosen completion is better than what the model writes.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)): both down, the rejected further; for pairs
    whose chosen completion is worse than what the model writes.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def rpo_loss(logps: PairLogps, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """DPO's loss - alpha log pi(y_w|x) / |y_w|: a likelihood term keeps the chosen completion up.

    Pang et al. 2024 (arXiv 2404.19733), whose weight stands before the other term; known as RPO.
    Liu et al. 2024 (arXiv 2405.16436) derive the term as a guard against over-optimisation.
    """
    return dpo_loss(logps, beta) - alpha * per_token(logps).chosen


def dpo_positive_loss(logps: PairLogps, beta: float = 0.1, alpha: float = 5.0) -> Tensor:
    """-log sigmoid(beta (r_w - r_l - alpha max(0, -r_w))): a chosen completion that is less likely
    than under the reference loses margin.

    Pal et al. 2024 (DPO-Positive, arXiv 2402.13228), equation 3, `alpha` being its lambda. Below
    the reference the slope by r_w is that of DPO times 1 + alpha.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    return -F.logsigmoid(chosen - rejected - alpha * F.relu(-chosen))


def r_dpo_loss(logps: PairLogps, beta: float = 0.1, alpha: float = 0.02) -> Tensor:
    """-log sigmoid(beta (r_w - r_l) + alpha (|y_w| - |y_l|)): what length explains of a label needs
    no margin.

    Park et al. 2024 (R-DPO, arXiv 2403.19159), equation 9. `alpha`, in reward per token, is what
    the labels are taken to pay for a token; the optimum is that of the reward r - alpha |y|.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    longer = (logps.chosen_tokens - logps.rejected_tokens).to(chosen.dtype)
    return -F.logsigmoid(chosen - rejected + alpha * longer)


LARGEST_LOG_RATIO = 20.0  # whose exponential still counts: float32 keeps 7 digits of e^20


def chi_po_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (phi(r_w) - phi(r_l))), phi(u) = exp(u) + u: chi-squared PO.

    Huang et al. 2024 (arXiv 2407.13399). The price of a ratio pi / pi_ref is its logarithm in DPO,
    here the ratio itself as well: the optimum pays beta for the KL and for half the chi-squared
    divergence (`exact.optimal_chi_policy`). exp(u) is cut at u = 20, so that it is
    finite; the paper cuts the margin in place of it.
    """

    def price(log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp() + log_ratio

    chosen, rejected = implicit_rewards(logps, 1.0)
    return -F.logsigmoid(beta * (price(chosen) - price(rejected)))


# --- without a reference ---


def simpo_loss(logps: PairLogps, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma).

    Meng et al. 2024 (arXiv 2405.14734), equation 6. `gamma` is the target margin in the unit of the
    reward; code that takes a ratio has gamma / beta.
    """
    means = per_token(logps)
    return -F.logsigmoid(beta * (means.chosen - means.rejected) - gamma)


def cpo_loss(logps: PairLogps, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """-log sigmoid(beta (log pi(y_w|x) - log pi(y_l|x))) - alpha log pi(y_w|x) / |y_w|.

    DPO with a uniform reference, and a likelihood term without which it is another method: Xu et
    al. 2024 (arXiv 2401.08417), L_prefer + L_NLL. The likelihood is per token, as in its code.
    """
    preference = -F.logsigmoid(beta * (logps.chosen - logps.rejected))
    return preference - alpha * per_token(logps).chosen


def orpo_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """-log pi(y_w|x) / |y_w| - beta log sigmoid(log odds(y_w) - log odds(y_l)).

    odds(y) = p / (1 - p) with p = exp(log pi(y|x) / |y|): Hong et al. 2024 (arXiv 2403.07691),
    equations 3-7, `beta` being its lambda. With whole-sequence probabilities 1 - p would be 1 and
    the odds no odds at all.
    """
    means = per_token(logps)
    ratio = log_odds(means.chosen) - log_odds(means.rejected)
    return -means.chosen - beta * F.logsigmoid(ratio)


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp); finite at p = 1, where rounding puts a sure token."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def preferred_ft_loss(logps: PairLogps) -> Tensor:
    """-log pi(y_w|x): supervised fine-tuning on what was chosen; the rejected is not used.

    Preferred-FT of Rafailov et al. 2023, section 6.
    """
    return -logps.chosen


def unlikelihood_loss(logps: PairLogps, alpha: float = 0.1) -> Tensor:
    """-log pi(y_w|x) + alpha log pi(y_l|x): chosen more likely, rejected less.

    The baseline of Rafailov et al. 2023, section 6, after Welleck et al. 2019 (arXiv 1908.04319).
    It has no lower bound: nothing says when the rejected completion is unlikely enough.
    """
    return -logps.chosen + alpha * logps.rejected


# --- with more than a yes or no: each takes a second tensor [batch], what the label says ---


def soft_label_loss(logps: PairLogps, probability: Tensor, beta: float = 0.1) -> Tensor:
    """-p log sigmoid(h) - (1 - p) log sigmoid(-h), h = beta (r_w - r_l): the cross-entropy to the
    `probability` p that the chosen completion is preferred.

    cDPO with a p of each pair's own, such as sigmoid(gap of two rewards) or the share of people who
    chose it; Furuta et al. 2024 (arXiv 2409.06691), section 3, call it conservative DPO with soft
    labels. Its minimum is at h = logit p, so that beta sets the margin: logit(p) / beta.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    gap = chosen - rejected
    return -probability * F.logsigmoid(gap) - (1 - probability) * F.logsigmoid(-gap)


def offset_loss(logps: PairLogps, offset: Tensor, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (r_w - r_l) - offset): the chosen must be ahead by at least `offset`.

    Amini et al. 2024 (ODPO, arXiv 2402.10571); the offset is an increasing function of the gap. It
    moves the curve and gives it no minimum: as in DPO, the margin of a certain pair has no limit.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    return -F.logsigmoid(chosen - rejected - offset)


def rao_kupper_loss(
    logps: PairLogps, tied: Tensor, beta: float = 0.1, threshold: float = 0.5
) -> Tensor:
    """-log sigmoid(h - a) of a win and -log((exp(2 a) - 1) sigmoid(h - a) sigmoid(-h - a)) of a tie
    (`tied`, bool), h = beta (r_w - r_l), a = `threshold` > 0: a smaller gap is seldom seen.

    Rao and Kupper 1967; on policies Chen et al. 2024 (arXiv 2409.17431). Of a tie, which of the two
    is called chosen does not matter.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    gap = chosen - rejected
    if_tied = -F.logsigmoid(-gap - threshold) - math.log(math.expm1(2 * threshold))
    return -F.logsigmoid(gap - threshold) + torch.where(tied, if_tied, 0)


def davidson_loss(
    logps: PairLogps, tied: Tensor, beta: float = 0.1, tie_weight: float = 1.0
) -> Tensor:
    """-log(exp(h / 2) / s) of a win and -log(nu / s) of a tie (`tied`, bool), with s = exp(h / 2) +
    exp(-h / 2) + nu, h = beta (r_w - r_l), nu = `tie_weight` > 0.

    Davidson 1970; on policies Chen et al. 2024 (arXiv 2409.17431). Given that there is no tie it is
    Bradley-Terry: pairs without ties are then a fair sample of DPO's, which they are not in Rao and
    Kupper's model.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    half = (chosen - rejected) / 2
    log_weight = torch.full_like(half, math.log(tie_weight))
    total = torch.stack([half, -half, log_weight]).logsumexp(0)
    return total - torch.where(tied, log_weight, half)


LOSSES = {
    "dpo": dpo_loss,
    "cdpo": cdpo_loss,
    "robust": robust_loss,
    "dpo-norm": dpo_norm_loss,
    "ipo": ipo_loss,
    "ipo-token": ipo_token_loss,
    "hinge": hinge_loss,
    "apo-zero": apo_zero_loss,
    "apo-down": apo_down_loss,
    "rpo": rpo_loss,
    "dpo-positive": dpo_positive_loss,
    "r-dpo": r_dpo_loss,
    "chi-po": chi_po_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
    "preferred-ft": preferred_ft_loss,
    "unlikelihood": unlikelihood_loss,
}
REFERENCE_FREE = {"simpo", "cpo", "orpo", "preferred-ft", "unlikelihood"}


# --- without pairs ---


class LabelledLogps(NamedTuple):
    """Log-probabilities of single completions, each a tensor [batch], in nats.

    Where a batch is cut into parts, `log_ratios_elsewhere` is still that of the whole batch, since
    its mean is what the loss needs; the others are of the part.
    """

    policy: Tensor  # log pi(y | x), the only one that carries a gradient
    reference: Tensor  # log pi_ref(y | x)
    desirable: Tensor  # bool: was y called good?
    log_ratios_elsewhere: Tensor  # log pi(y'|x) / pi_ref(y'|x) of another prompt's completion y'


def kto_loss(
    logps: LabelledLogps,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """lambda_D (1 - sigmoid(beta (r - z))) for a desirable completion and lambda_U
    (1 - sigmoid(beta (z - r))) for an undesirable one, r = log pi(y|x) - log pi_ref(y|x).

    Ethayarajh et al. 2024 (arXiv 2402.01306), L_KTO. z, the point that gains and losses are
    felt from, stands for KL(pi || pi_ref): the mean of `log_ratios_elsewhere` over the batch, at
    least 0, without gradient. With one item in a batch it is noise.
    """
    kl = logps.log_ratios_elsewhere.detach().mean().clamp(min=0)
    gain = beta * (logps.policy - logps.reference - kl)
    good = desirable_weight * (-gain).sigmoid()
    bad = undesirable_weight * gain.sigmoid()
    return torch.where(logps.desirable, good, bad)


UNPAIRED = {"kto": kto_loss}  # of LabelledLogps; pairs are taken as two labelled completions each


# --- rankings ---


class RankingLogps(NamedTuple):
    """Log-probabilities of the k completions of each ranking, best first, tensors [batch, k], in
    nats.
    """

    policy: Tensor  # log pi(y_1 | x), ..., log pi(y_k | x), the only one that carries a gradient
    reference: Tensor  # log pi_ref of the same


def plackett_luce_loss(logps: RankingLogps, beta: float = 0.1) -> Tensor:
    """-log P(y_1 over y_2 over ... over y_k), tensor [batch]: DPO on whole rankings.

    The best is drawn from all k with odds exp(r̂), the second from those left, and so on: Plackett
    1975, Luce 1959; with r̂ = beta log(pi / pi_ref), Rafailov et al. 2023, appendix A.3. Of two
    completions it is `dpo_loss`.
    """
    rewards = beta * (logps.policy - logps.reference)
    left = rewards.flip(1).logcumsumexp(1).flip(1)  # log sum of exp(r̂) of those not yet drawn
    return (left - rewards)[:, :-1].sum(1)  # the last is drawn for certain
