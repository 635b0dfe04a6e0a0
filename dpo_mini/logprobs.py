"""Log-probabilities of completions under a causal language model: the definition, in full view.

`fast_logprobs.py` computes the same numbers without the waste, and is tested against this.
"""

import torch
from torch import Tensor


def token_logps(model, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """log pi(token_t | tokens before t) for every position t >= 1.

    `input_ids`, `attention_mask`: [batch, length], the mask 1 on real tokens. Padding may be on
    the right for any causal model, on the left for one that takes `position_ids`. Returns float32
    [batch, length - 1] (float64 for a float64 model), in nats; entry t - 1 belongs to token t.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if not attention_mask[:, 0].all():  # padding on the left must not shift a token
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs).logits[:, :-1]
    if logits.dtype != torch.float64:
        logits = logits.float()  # bfloat16 is too coarse for sums of hundreds of nats
    next_logits = logits.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return next_logits - logits.logsumexp(-1)  # log softmax, of the token that came


def sequence_logps(
    model, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> Tensor:
    """log pi(y | x) = sum over the tokens of y of log pi(y_t | x, y_<t), the chain rule.

    `completion_mask` [batch, length] is 1 on the tokens of y (its EOS included) and 0 on prompt and
    padding. Returns [batch], in nats: a sum, never a mean.
    """
    logps = token_logps(model, input_ids, attention_mask)
    return (logps * completion_mask[:, 1:]).sum(1)
