"""Preference losses: pure functions of log-probabilities.

Each takes the same `PairLogps` and returns one loss per pair, tensor [batch]; the training loop
takes the mean. Log-probabilities are in nats and *summed* over the tokens of a completion, so that
exp(logp) is the probability of the whole completion.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLogps(NamedTuple):
    """Log-probabilities of a batch of pairs, each a tensor [batch], in nats.

    Only the policy's two, `chosen` and `rejected`, carry a gradient.
    """

    chosen: Tensor  # log pi(y_w | x)
    rejected: Tensor  # log pi(y_l | x)
    reference_chosen: Tensor  # log pi_ref(y_w | x)
    reference_rejected: Tensor  # log pi_ref(y_l | x)
    chosen_tokens: Tensor | None = None  # |y_w|, for the losses that divide by it
    rejected_tokens: Tensor | None = None  # |y_l|


def implicit_rewards(logps: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """The rewards implied by the policy, r̂(x, y) = beta log(pi(y | x) / pi_ref(y | x)), of chosen
    and rejected.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 5 without beta log Z(x), which no pair can
    reveal. Two tensors [batch], in the reward's unit.
    """
    return (
        beta * (logps.chosen - logps.reference_chosen),
        beta * (logps.rejected - logps.reference_rejected),
    )


def dpo_loss(logps: PairLogps, beta: float = 0.1) -> Tensor:
    """-log sigmoid(r̂(x, y_w) - r̂(x, y_l)): the negative log-likelihood of the preference under
    Bradley-Terry.

    Rafailov et al. 2023, equation 7. `beta` > 0 is the strength of the KL constraint: larger stays
    closer to pi_ref.
    """
    chosen, rejected = implicit_rewards(logps, beta)
    return -F.logsigmoid(chosen - rejected)


def cdpo_loss(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """DPO when a label is wrong with probability eps: (1 - eps) L(y_w, y_l) + eps L(y_l, y_w), with
    L(y_w, y_l) the loss of DPO where y_w is called better.

    Mitchell 2023, "A note on DPO with noisy preferences"; eps is `label_smoothing`, in [0, 0.5).
    """
    chosen, rejected = implicit_rewards(logps, beta)
    loss_if_right = -F.logsigmoid(chosen - rejected)
    loss_if_wrong = -F.logsigmoid(rejected - chosen)
    return (1 - label_smoothing) * loss_if_right + label_smoothing * loss_if_wrong


def preference_metrics(logps: PairLogps, beta: float) -> dict[str, Tensor]:
    """What to watch while training, in TRL's names; each a tensor [batch] without gradient.

    An accuracy is 1 where the chosen completion has the higher implicit reward, 1/2 at a tie
    (before the first step all pairs tie, up to rounding; a coin is right half the time). It
    compares sums over tokens, whatever the loss compares: SimPO's compares means, so that a pair
    may be ranked rightly by the one and wrongly by the other.
    """
    with torch.no_grad():
        chosen, rejected = implicit_rewards(logps, beta)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (1 + torch.sign(chosen - rejected)) / 2,
            "logps/chosen": logps.chosen.detach(),
            "logps/rejected": logps.rejected.detach(),
        }
