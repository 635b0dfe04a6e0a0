"""The training loop. SFT and every preference loss are the same loop with another objective.

Read `train` first: a batch, its log-probabilities, the loss, its gradient, a step. What makes a run
safe (stopping, resuming, saving, watching) stands around it, in `checkpoints.py`; what lets several
processes share it, in `processes.py`.

Left out, since AdamW on one model in memory needs none of it: sharded parameters, gradient scaling
(bfloat16 has float32's range), packing, an average of the weights, a reference that moves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini import processes
from dpo_mini.checkpoints import Run, steps_of_run, stop_unless_finite
from dpo_mini.family import LOSSES, REFERENCE_FREE, UNPAIRED, LabelledLogps, RankingLogps
from dpo_mini.fast_logprobs import completion_logps
from dpo_mini.losses import PairLogps, preference_metrics
from dpo_mini.models import context_length, in_bfloat16, without_dropout
from dpo_mini.reference import data_fingerprint, reference_logps, weights_fingerprint
from dpo_mini.settings import TrainingConfig, TrainingError
from dpo_mini.tokens import TokenizedPair, unpaired


class Objective(NamedTuple):
    """What to minimise: the mean of a batch's loss terms, however the batch is cut into parts.

    `logps` is the only one that reads the model. What it returns is handed to `loss` and `metrics`.
    DPO, with `policy_and_reference` a function that makes `PairLogps` of model and items:

        Objective(logps=policy_and_reference,
                  loss=lambda logps: dpo_loss(logps, beta=0.1),
                  metrics=lambda logps: preference_metrics(logps, beta=0.1))
    """

    logps: Callable  # (model, items) -> log-probabilities of the items, with their gradient
    loss: Callable[..., Tensor]  # of those: [items]; their sum over a batch, divided by its terms
    metrics: Callable[..., dict]  # of those: name -> tensor [items] to watch, without gradient
    terms: Callable[[object], int] = lambda item: 1  # loss terms of an item: of a text, its tokens
    # KTO only: (model, items) -> [items], the log-ratios of mismatched completions, without
    # gradient. They are read for the whole batch before it is cut; `logps` takes them as a third
    # argument.
    of_whole_batch: Callable | None = None


def train(
    model, items, objective, config, *,
    identity=None, output=None, resume=False, monitor=None, progress=False,
) -> list[dict]:  # fmt: skip
    """Minimise the objective, changing the model in place. Returns the log, a row for each step.

    The model is put into evaluation mode. `output`: a folder for checkpoints; `resume`: go on from
    the one there, to the same weights bit for bit. `monitor(model, log) -> dict` is called before
    the first step, every `monitor_every` steps and after the last; its numbers are added to the
    log's last row. `identity` says what run this is, beside settings, data and weights: another
    run's checkpoint is refused. Raises TrainingError where it cannot start or go on.
    """
    parameters = common_start(model, config)
    weights = list(parameters.values())
    optimizer = torch.optim.AdamW(
        weights, config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    run = Run(parameters, optimizer, run_identity(model, items, config, identity, output), log=[])
    steps = steps_of_run(
        run, config, model.device, folder=output, resume=resume, progress=progress,
        monitor=lambda: monitor(model, run.log) if monitor else {},
    )  # fmt: skip
    with closing(steps):
        # A resumed run begins behind its checkpoint. After each step, before the next number comes,
        # `steps` adds the monitor's numbers to the step's row and saves.
        for step in steps:
            # 1. The batch of this step, and this process's share of it.
            order = batch_indices(
                len(items), step - 1, config.batch_size, config.block_size, config.seed
            )
            batch = [items[i] for i in order]
            my_share = processes.share(batch)
            mismatched = mismatched_log_ratios(model, my_share, objective, config)  # () but for KTO
            # Two means: the loss's over its terms (of a text, the tokens), a metric's over items.
            terms, sums = sum(map(objective.terms, batch)), {}
            for part in parts(my_share, config.micro_batch_size):  # what memory holds at once
                with in_bfloat16(model, config.bf16):
                    # 2. Log-probabilities: the policy's [part] carry a gradient, the reference's
                    #    came with the items.
                    logps = objective.logps(model, part, *mismatched)
                    # 3. The loss. Every term weighs 1 / (terms of the whole batch), so that it is
                    #    the same however the batch is cut.
                    loss = objective.loss(logps).sum() / terms
                # 4. Its gradient, added to that of the parts before.
                loss.backward()
                sums = with_part(sums, loss, objective.metrics(logps), len(batch))
            means = processes.summed(sums)
            processes.add_gradients(weights)
            # 5. A step against the gradient, clipped, at this step's rate.
            norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm).item()
            rate = learning_rate(step - 1, config)
            stop_unless_finite(step, means["loss"], norm, rate, output)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            run.log.append({"step": step, **means, "grad_norm": norm, "learning_rate": rate})
    return run.log


# --- the parts of a step ---


def common_start(model, config) -> dict[str, Tensor]:
    """The parameters to train, by name: the same numbers in every process, and no dropout."""
    without_dropout(model)
    processes.join_processes(model.device, config.batch_size)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    processes.equal_start(parameters.values())
    return parameters


def run_identity(model, items, config, given: dict | None, output) -> dict:
    """What makes this run this run: settings, data and weights, and what the caller has `given`."""
    identity = {**asdict(config), "items": len(items)}
    if output:  # without a checkpoint there is nothing to compare with
        identity |= {"lora": lora_rank(model), "model": weights_fingerprint(model)}
        identity |= {"data": data_fingerprint(items)}
    return identity | (given or {})


def lora_rank(model) -> int:
    """The rank of a model's LoRA adapters; 0 where it has none."""
    ranks = [adapter.r for adapter in getattr(model, "peft_config", {}).values()]
    return max(ranks, default=0)


def batch_indices(n: int, step: int, batch_size: int, block_size: int, seed: int) -> list[int]:
    """The items of step 0, 1, ...: an endless stream of permutations of 0..n-1, cut into batches.

    Blocks of `block_size` neighbours stay together: of n = 6 items in blocks of 2, an epoch may be
    4 5 0 1 2 3. A function of its arguments alone: a resumed run sees what an undisturbed one would
    have seen.
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n)
        if not indices or offset == 0:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            blocks = torch.randperm(-(-n // block_size), generator=generator).tolist()
            starts = [block * block_size for block in blocks]
            order = [i for start in starts for i in range(start, min(n, start + block_size))]
        indices.append(order[offset])
    return indices


def mismatched_log_ratios(model, my_share: list, objective: Objective, config) -> tuple:
    """KTO's log-ratios of mismatched completions, a tuple of one tensor [batch]; () for other
    losses.

    KTO's KL is a mean over the whole batch, also where the batch is cut into parts or shared among
    processes. So they are read first, without a gradient.
    """
    if objective.of_whole_batch is None:
        return ()
    with torch.no_grad(), in_bfloat16(model, config.bf16):
        log_ratios = [
            objective.of_whole_batch(model, part)
            for part in parts(my_share, config.micro_batch_size)
        ]
    return (processes.gathered(torch.cat(log_ratios)),)


def parts(items: list, size: int | None) -> Iterator[list]:
    """The items in parts of `size`; None: all at once."""
    size = size or len(items)
    return (items[start : start + size] for start in range(0, len(items), size))


def with_part(sums: dict, loss: Tensor, metrics: dict[str, Tensor], batch_size: int) -> dict:
    """Adds this micro-batch's contribution to the batch's means.

    `loss` is divided by the batch's terms already; `metrics` are tensors [part].
    """
    shares = {"loss": loss.detach()}
    shares |= {name: values.sum() / batch_size for name, values in metrics.items()}
    return {name: sums.get(name, 0) + share for name, share in shares.items()}


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, or to 0 linearly or by cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    fraction = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * fraction)) / 2
    shape = {"constant": 1.0, "linear": 1 - fraction, "cosine": cosine}[config.schedule]
    return config.learning_rate * shape


# --- objectives: what a loss needs of the model ---


def preference_objective(loss: Callable[[PairLogps], Tensor], beta: float) -> Objective:
    """Items are (TokenizedPair, (reference logp of chosen, of rejected)); `loss` as in LOSSES.

    `beta` scales the logged rewards; it does not reach the loss.
    """

    def policy_and_reference(model, items) -> PairLogps:
        pairs, reference = zip(*items)
        policy = completion_logps(model, [row for pair in pairs for row in pair.rows]).view(-1, 2)
        reference = torch.tensor(reference, device=policy.device, dtype=policy.dtype)  # [pairs, 2]
        tokens = torch.tensor([(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs])
        tokens = tokens.to(policy.device)
        return PairLogps(*policy.unbind(1), *reference.unbind(1), *tokens.unbind(1))

    return Objective(policy_and_reference, loss, lambda logps: preference_metrics(logps, beta))


def graded_objective(loss: Callable[[PairLogps, Tensor], Tensor], beta: float) -> Objective:
    """Items are (TokenizedPair, (reference logps), grade); `loss(logps, grades)` takes what each
    pair's label says besides its order, tensor [pairs]: a probability, an offset, a tie.
    """
    plain = preference_objective(lambda logps: logps, beta)

    def with_grades(model, items) -> tuple[PairLogps, Tensor]:
        logps = plain.logps(model, [item[:2] for item in items])
        return logps, torch.tensor([item[2] for item in items], device=logps.chosen.device)

    return Objective(with_grades, lambda both: loss(*both), lambda both: plain.metrics(both[0]))


def unpaired_objective(loss: Callable[[LabelledLogps], Tensor], beta: float) -> Objective:
    """Items are (LabelledCompletion, (reference logp of the completion, of the other)); `loss` as
    `kto_loss`.

    The log-ratios of the other prompts' completions, whose mean is the KL, are those of the whole
    batch [batch], also where `logps` reads only a part of it.
    """

    def log_ratios_elsewhere(model, items) -> Tensor:
        labelled, reference = zip(*items)
        elsewhere = completion_logps(model, [item.rows[1] for item in labelled])
        return elsewhere - elsewhere.new_tensor([pair[1] for pair in reference])

    def policy_and_reference(model, items, elsewhere: Tensor) -> LabelledLogps:
        labelled, reference = zip(*items)
        policy = completion_logps(model, [item.rows[0] for item in labelled])
        desirable = torch.tensor([item.desirable for item in labelled], device=policy.device)
        reference = policy.new_tensor([pair[0] for pair in reference])
        return LabelledLogps(policy, reference, desirable, elsewhere)

    def metrics(logps: LabelledLogps) -> dict[str, Tensor]:
        with torch.no_grad():
            signs = torch.where(logps.desirable, 1, -1)
            signed = beta * (logps.policy - logps.reference) * signs
            kl = logps.log_ratios_elsewhere.mean().clamp(min=0)
            return {
                "rewards/signed": signed,  # of an undesirable completion, its negative
                "rewards/accuracies": (1 + torch.sign(signed)) / 2,
                "kl": kl.expand(len(signed)),
                "logps/completion": logps.policy.detach(),
            }

    return Objective(policy_and_reference, loss, metrics, of_whole_batch=log_ratios_elsewhere)


def ranking_objective(loss: Callable[[RankingLogps], Tensor], beta: float) -> Objective:
    """Items are (k rows (prompt ids, completion ids), best first; their k reference logps), k the
    same for all; `loss` as `plackett_luce_loss`.

    An item's accuracy is the share of its pairs that the implicit rewards order rightly.
    """

    def policy_and_reference(model, items) -> RankingLogps:
        rankings, reference = zip(*items)
        policy = completion_logps(model, [row for ranking in rankings for row in ranking])
        return RankingLogps(policy.view(len(items), -1), policy.new_tensor(reference))

    def metrics(logps: RankingLogps) -> dict[str, Tensor]:
        with torch.no_grad():
            rewards = beta * (logps.policy - logps.reference)
            better, worse = torch.triu_indices(*[rewards.shape[1]] * 2, offset=1)
            margins = rewards[:, better] - rewards[:, worse]
            return {
                "rewards/margins": margins.mean(1),
                "rewards/accuracies": ((1 + torch.sign(margins)) / 2).mean(1),
                "logps/completion": logps.policy.mean(1).detach(),
            }

    return Objective(policy_and_reference, loss, metrics)


def sft_objective() -> Objective:
    """Items are (prompt ids, completion ids); the loss is -log pi(token) of completion tokens."""

    return Objective(
        logps=completion_logps,
        loss=lambda logps: -logps,
        metrics=lambda logps: {"logps/completion": logps.detach()},
        terms=lambda item: len(item[1]),
    )


# --- preference training, whole ---


def train_preferences(
    model, pairs, config, *,
    loss="dpo", beta=None, loss_options=None, identity=None, output=None, **loop,
) -> list[dict]:  # fmt: skip
    """Train `model` on tokenized pairs; as it is now it is the reference. Returns the log.

    The reference's log-probabilities are taken before the first step, so that no second model is
    kept in memory; losses without a reference take none. To resume, pass the reference again: the
    policy comes from the checkpoint. `loss` is a name in LOSSES or UNPAIRED; one in UNPAIRED also
    takes labelled completions in place of pairs. `loss_options` are its own arguments; `identity`,
    `output` and `loop` as in `train`.
    """
    options = loss_arguments(loss, **{"beta": beta, **(loss_options or {})})
    if not pairs:
        raise TrainingError("there are no pairs to train on.")
    reward_beta = options.get("beta", 1.0)
    if loss in UNPAIRED:
        if isinstance(pairs[0], TokenizedPair):
            pairs = unpaired(pairs, context_length(model))
        objective = unpaired_objective(lambda logps: UNPAIRED[loss](logps, **options), reward_beta)
    else:
        objective = preference_objective(lambda logps: LOSSES[loss](logps, **options), reward_beta)
    processes.join_processes(model.device, config.batch_size)  # one of them writes the cache
    if loss in REFERENCE_FREE:
        reference = torch.zeros(len(pairs), 2)
    else:
        cache = Path(output) / "reference_logps.safetensors" if output else None
        progress = loop.get("progress", False)
        reference = reference_logps(model, pairs, cache, bf16=config.bf16, progress=progress)
    identity = {"loss": loss, **options, "data": data_fingerprint(pairs), **(identity or {})}
    items = list(zip(pairs, reference.tolist()))
    return train(model, items, objective, config, identity=identity, output=output, **loop)


def loss_arguments(loss: str, **given) -> dict:
    """A loss's own arguments: its defaults, changed by those given that are not None.

    Raises TrainingError for a loss or an argument that does not exist, and for one out of range.
    """
    functions = {**LOSSES, **UNPAIRED}
    if loss not in functions:
        raise TrainingError(f"there is no loss {loss!r}; there are {', '.join(functions)}.")
    parameters = list(signature(functions[loss]).parameters.values())[1:]
    arguments = {p.name: p.default for p in parameters}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - arguments.keys():
        takes = ", ".join(arguments) or "nothing"
        raise TrainingError(f"the loss {loss} takes no {name}; it takes {takes}.")
    arguments |= given
    for name, value in arguments.items():
        check_loss_argument(name, value)
    return arguments


def check_loss_argument(name: str, value) -> None:
    """Raise TrainingError for a value that the argument of a loss cannot have."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "beta" and not (number and 0 < value < math.inf):
        raise TrainingError(f"beta must be above 0, got {value}: pi* is pi_ref exp(r / beta) / Z.")
    if name == "label_smoothing" and not (number and 0 <= value < 0.5):
        raise TrainingError(
            f"label_smoothing must be in [0, 0.5), got {value}: it is the chance that a label is "
            "wrong, and at one half labels say nothing."
        )
    if not (number and 0 <= value < math.inf):  # gamma, alpha and KTO's weights
        raise TrainingError(f"{name} must be a number, 0 or more, got {value!r}. Try 1.")


LARGEST_BLOCK = 8  # so that a batch of 32 has pairs of four prompts or more


def shared_prompt_block(pairs: Sequence) -> int:
    """A `block_size` that keeps neighbours of one prompt together, so that the prompt is read once.

    Pairs, or labelled completions, of one prompt stand in runs where they were sampled: six pairs
    of four samples are a run of 6. Where 9 of 10 items stand in runs of one length, that length is
    the block (above LARGEST_BLOCK its largest divisor below); otherwise 1.
    """
    runs = [len(list(run)) for _, run in groupby(pairs, key=lambda pair: pair.prompt_ids)]
    if not runs:
        return 1
    length = max(sorted(set(runs)), key=lambda n: n * runs.count(n))
    if length * runs.count(length) < 0.9 * len(pairs):
        return 1
    return max(size for size in range(1, LARGEST_BLOCK + 1) if length % size == 0)
