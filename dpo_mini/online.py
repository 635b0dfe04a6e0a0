"""Online DPO: the pairs are the policy's own, sampled and judged anew as it changes."""

from collections.abc import Sequence
from dataclasses import replace

from dpo_mini.curation import sampled_pairs
from dpo_mini.losses import dpo_loss
from dpo_mini.models import context_length
from dpo_mini.reference import reference_logps
from dpo_mini.settings import MOST_ITEMS, MOST_TOKENS, TrainingConfig, check_real, check_whole
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import preference_objective, train


def online_dpo(
    policy, reference, tokenizer, prompts: Sequence[str], reward, config: TrainingConfig, *,
    beta=0.1, rounds=5, samples=4, max_new_tokens=40, monitor=None, progress=False,
) -> list[dict]:  # fmt: skip
    """`rounds` times: sample `samples` completions of new prompts from the policy, label all their
    pairs by `reward`, and take `config.steps / rounds` steps of DPO on them. Returns the log.

    The policy changes in place; the reference stays what it was, so that beta means what it means
    offline. With one round it is offline DPO. Guo et al. 2024 (arXiv 2402.04792) take a fresh batch
    at every step, `rounds` = `config.steps`. The learning rate falls from round to round in place
    of from step to step. A round whose completions are all alike to the reward teaches nothing and
    is passed over, and so is one that no step is left for. Raises SettingsError, a ValueError, for
    numbers out of range: each round needs a new prompt.
    """
    check_real("beta", beta, 0, "Try 0.1.", above=True)
    advice = "Each needs a new prompt: give more prompts, or ask for fewer rounds."
    check_whole("rounds", rounds, 1, len(prompts), advice)
    check_whole("samples", samples, 2, MOST_ITEMS, "Try 4: a pair needs two.")
    check_whole("max_new_tokens", max_new_tokens, 1, MOST_TOKENS, "Try 40.")
    log: list[dict] = []
    objective = preference_objective(lambda logps: dpo_loss(logps, beta), beta)
    for k in range(rounds):
        new_prompts, done = prompts[k::rounds], k * config.steps // rounds  # steps before it
        steps = (k + 1) * config.steps // rounds - done
        if not steps:
            continue
        pairs, _ = sampled_pairs(
            policy, tokenizer, new_prompts, reward, samples, max_new_tokens,
            seed=config.seed * 100_003 + k, progress=progress,
        )  # fmt: skip
        if not pairs:
            continue
        tokenized = tokenize_pairs(pairs, tokenizer, context_length(policy))
        items = list(zip(tokenized, reference_logps(reference, tokenized).tolist()))
        its_config = replace(
            config,
            steps=steps,
            learning_rate=config.learning_rate * (1 - k / rounds),
            warmup_steps=config.warmup_steps if k == 0 else 0,
            schedule="constant" if rounds > 1 else config.schedule,
            seed=config.seed + k,
        )
        rows = train(policy, items, objective, its_config, monitor=monitor, progress=progress)
        for row in rows[1 if log else 0 :]:
            log.append({**row, "step": row["step"] + done, "round": k + 1})
    return log
