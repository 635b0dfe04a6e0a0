"""The training loop. SFT and preference training are the same loop with another objective."""

import math
from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.checkpoints import (
    TrainingError,
    TrainingInterrupted,
    interruption,
    load_checkpoint,
    save_checkpoint,
    saved_step,
)
from dpo_mini.family import LOSSES, REFERENCE_FREE, LabelledLogps, kto_loss
from dpo_mini.fast_logprobs import completion_logps
from dpo_mini.logprobs import token_logps
from dpo_mini.losses import PairLogps, preference_metrics
from dpo_mini.reference import fingerprint, reference_logps
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import TokenizedPair, collate, unpaired


class Objective(NamedTuple):
    """What to minimise: the mean of a batch's loss terms, however it is cut into micro-batches."""

    terms: Callable[[object], int]  # loss terms of an item: 1 for a pair, its tokens for a text
    losses: Callable  # (model, items) -> (sum of the loss terms, metrics: each a tensor [items])


def preference_objective(loss: Callable[[PairLogps], Tensor], beta: float) -> Objective:
    """Items are (TokenizedPair, (reference logp of chosen, of rejected)); `loss` as in LOSSES."""

    def losses(model, items):
        pairs, reference = zip(*items)
        logps = completion_logps(model, [row for pair in pairs for row in pair.rows]).view(-1, 2)
        reference = torch.tensor(reference, device=logps.device, dtype=logps.dtype)
        tokens = torch.tensor([(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs])
        tokens = tokens.to(logps.device)
        logps = PairLogps(*logps.unbind(1), *reference.unbind(1), *tokens.unbind(1))
        return loss(logps).sum(), preference_metrics(logps, beta)

    return Objective(terms=lambda item: 1, losses=losses)


def unpaired_objective(loss: Callable[[LabelledLogps], Tensor], beta: float) -> Objective:
    """Items are (LabelledCompletion, (reference logp of the completion, of the other)); `loss` as
    `kto_loss`, whose KL is that of what is in memory at once: cut no finer than needed.
    """

    def losses(model, items):
        labelled, reference = zip(*items)
        rows, other_rows = zip(*(item.rows for item in labelled))
        policy = completion_logps(model, rows)
        with torch.no_grad():
            elsewhere = completion_logps(model, other_rows)
        reference = torch.tensor(reference, device=policy.device, dtype=policy.dtype)
        desirable = torch.tensor([item.desirable for item in labelled], device=policy.device)
        log_ratios_elsewhere = elsewhere - reference[:, 1]
        logps = LabelledLogps(policy, reference[:, 0], desirable, log_ratios_elsewhere)
        terms = loss(logps)
        with torch.no_grad():
            signed = beta * (policy - reference[:, 0]) * torch.where(desirable, 1, -1)
            kl = log_ratios_elsewhere.mean().clamp(min=0)
        metrics = {
            "rewards/signed": signed,  # of an undesirable completion, its negative
            "rewards/accuracies": (1 + torch.sign(signed)) / 2,
            "kl": kl.expand(len(items)),
            "logps/completion": policy.detach(),
        }
        return terms.sum(), metrics

    return Objective(terms=lambda item: 1, losses=losses)


def sft_objective() -> Objective:
    """Items are (prompt ids, completion ids); the loss is -log pi(token) of completion tokens."""

    def losses(model, items):
        batch = collate(items).to(next(model.parameters()).device)
        logps = token_logps(model, batch.input_ids, batch.attention_mask)
        logps = (logps * batch.completion_mask[:, 1:]).sum(1)
        return -logps.sum(), {"logps/completion": logps.detach()}

    return Objective(terms=lambda item: len(item[1]), losses=losses)


def train_preferences(
    model, pairs, config, *, loss="dpo", beta=None, loss_options=None, output=None, **loop
) -> list[dict]:
    """Train `model` on tokenized pairs; as it is now it is the reference. Returns the log.

    The reference's log-probabilities are taken before the first step, so that no second model is
    kept in memory; losses without a reference take none. To resume, pass the reference again: the
    policy comes from the checkpoint. `loss` is a name in LOSSES, or "kto", which also takes
    labelled completions in place of pairs; `loss_options` are its own arguments, `loop` as in
    `train`.
    """
    options = loss_arguments(loss, **{"beta": beta, **(loss_options or {})})
    if not pairs:
        raise TrainingError("there are no pairs to train on.")
    reward_beta = options.get("beta", 1.0)
    if loss == "kto":
        pairs = unpaired(pairs) if isinstance(pairs[0], TokenizedPair) else pairs
        objective = unpaired_objective(lambda logps: kto_loss(logps, **options), reward_beta)
    else:
        objective = preference_objective(lambda logps: LOSSES[loss](logps, **options), reward_beta)
    if loss in REFERENCE_FREE:
        reference = torch.zeros(len(pairs), 2)
    else:
        cache = Path(output) / "reference_logps.safetensors" if output else None
        progress = loop.get("progress", False)
        reference = reference_logps(model, pairs, cache, bf16=config.bf16, progress=progress)
    identity = {"loss": loss, **options, "data": fingerprint(model, pairs)}
    items = list(zip(pairs, reference.tolist()))
    return train(model, items, objective, config, identity=identity, output=output, **loop)


def loss_arguments(loss: str, **given) -> dict:
    """A loss's own arguments: its defaults, changed by those given that are not None.

    Raises TrainingError for a loss or an argument that does not exist, and for one out of range.
    """
    functions = {**LOSSES, "kto": kto_loss}
    if loss not in functions:
        raise TrainingError(f"there is no loss {loss!r}; there are {', '.join(functions)}.")
    parameters = list(signature(functions[loss]).parameters.values())[1:]
    arguments = {p.name: p.default for p in parameters}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - arguments.keys():
        takes = ", ".join(arguments) or "nothing"
        raise TrainingError(f"the loss {loss} takes no {name}; it takes {takes}.")
    arguments |= given
    if not arguments.get("beta", 1) > 0:
        raise TrainingError(
            f"beta must be above 0, got {arguments['beta']}: pi* is pi_ref exp(r / beta) / Z."
        )
    if not 0 <= arguments.get("label_smoothing", 0) < 0.5:
        raise TrainingError(
            f"label_smoothing must be in [0, 0.5), got {arguments['label_smoothing']}: it is the "
            "chance that a label is wrong, and at one half labels say nothing."
        )
    return arguments


def train(
    model, items, objective, config, *,
    identity=None, output=None, resume=False, monitor=None, progress=False,
) -> list[dict]:  # fmt: skip
    """Minimise the objective, changing the model in place. Returns the log, a row per step.

    `output`: a folder for checkpoints; `resume`: go on from the one there, to the same weights bit
    for bit. `monitor(model) -> dict` is called before the first step, every `monitor_every` steps
    and after the last; its numbers join the log. `identity` says what run this is, so that another
    run's checkpoint is refused.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    main, processes = accelerator.is_main_process, accelerator.num_processes
    if config.batch_size % processes:
        raise TrainingError(
            f"{processes} processes cannot share {config.batch_size} items equally."
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    identity = {**asdict(config), **(identity or {}), "items": len(items)}
    checkpoint = Path(output) / "checkpoint.safetensors" if output else None
    log = load_checkpoint(checkpoint, parameters, optimizer, identity) if resume else []

    def watch():
        log[-1] |= monitor(model, log) if monitor and main else {}
        accelerator.wait_for_everyone()

    def save():
        if checkpoint and main:
            save_checkpoint(checkpoint, parameters, optimizer, identity, log)

    if not log:
        log.append({"step": 0})
        watch()
        save()
    first = log[-1]["step"]
    bar = tqdm(total=config.steps, initial=first, desc="train", disable=not (progress and main))
    with bar, interruption() as interrupted:
        for step in range(first + 1, config.steps + 1):
            order = batch_indices(len(items), step - 1, config)
            sums = accumulate(accelerator, model, [items[i] for i in order], objective, config)
            sums["stop"] = torch.tensor(float(interrupted.is_set()), device=model.device)
            row = {k: v.item() for k, v in accelerator.reduce(sums, "sum").items()}
            stop, last = row.pop("stop") > 0, step == config.steps
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm).item()
            rate = optimizer.param_groups[0]["lr"] = learning_rate(step - 1, config)
            if not math.isfinite(row["loss"] + norm + rate):
                kept = (
                    f" The checkpoint of step {saved_step(checkpoint)} is kept." if output else ""
                )
                raise TrainingError(
                    f"step {step}: the loss is {row['loss']:g}, its gradient's norm {norm:g} at "
                    f"learning rate {rate:g}.{kept} Try a learning rate ten times smaller, a "
                    "longer warm-up, or --no-bf16."
                )
            optimizer.step()
            optimizer.zero_grad()
            log.append({"step": step, **row, "grad_norm": norm, "learning_rate": rate})
            if last or step % config.monitor_every == 0:
                watch()
            if last or stop or step % config.checkpoint_every == 0:
                save()
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            if stop and not last:
                go_on = f" {output} holds it: --resume goes on from there." if output else ""
                raise TrainingInterrupted(f"Stopped after step {step} of {config.steps}.{go_on}")
    return log


def accumulate(accelerator, model, batch, objective, config) -> dict[str, Tensor]:
    """Add a batch's gradient to the parameters, micro-batch by micro-batch.

    Each loss term weighs 1 / (terms of the whole batch), so that neither micro-batches nor
    processes change the result. Returns this process's share of the batch's mean metrics.
    """
    processes = accelerator.num_processes
    total = sum(objective.terms(item) for item in batch)
    mine = batch[accelerator.process_index :: processes]
    size = config.micro_batch_size or len(mine)
    sums: dict[str, Tensor] = {}
    for start in range(0, len(mine), size):
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.bf16):
            loss, metrics = objective.losses(model, mine[start : start + size])
        (loss / total).backward()
        means = {"loss": loss.detach() / total}
        means |= {name: values.sum() / len(batch) for name, values in metrics.items()}
        sums = {name: sums.get(name, 0) + value for name, value in means.items()}
    if processes > 1:  # each has its share of the sum over the batch
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "sum")
    return sums


def batch_indices(n: int, step: int, config: TrainingConfig) -> list[int]:
    """The items of step 0, 1, ...: an endless stream of permutations of 0..n-1, cut into batches.

    A function of its arguments alone: a resumed run sees what an undisturbed one would have seen.
    """
    indices, size = [], config.block_size
    for position in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, offset = divmod(position, n)
        if not indices or offset == 0:
            generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
            blocks = torch.randperm(-(-n // size), generator=generator).tolist()
            order = [i for b in blocks for i in range(b * size, min(n, (b + 1) * size))]
        indices.append(order[offset])
    return indices


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, or to 0 linearly or by cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    fraction = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * fraction)) / 2
    shape = {"constant": 1.0, "linear": 1 - fraction, "cosine": cosine}[config.schedule]
    return config.learning_rate * shape
