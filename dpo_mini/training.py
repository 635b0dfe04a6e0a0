"""The training loop. SFT and preference training are the same loop with another objective."""

import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.data import TokenizedPair, collate
from dpo_mini.logprobs import sequence_logps, token_logps
from dpo_mini.losses import LOSSES, PairLogps, preference_metrics


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, what is safe, and what to try."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was written."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; what to minimise is the objective's business."""

    steps: int = 200
    batch_size: int = 32  # items (pairs or texts) per optimiser step, over all processes
    micro_batch_size: int | None = None  # items in memory at once; None: the whole batch
    learning_rate: float = 5e-5
    warmup_steps: int = 10
    schedule: str = (
        "linear"  # after the warm-up: "constant", "linear" or "cosine" (the latter two to 0)
    )
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False  # autocast; log-probabilities stay in float32
    seed: int = 0
    checkpoint_every: int = 50
    monitor_every: int = 25


class Objective(NamedTuple):
    """What to minimise: the mean of all loss terms of a batch, however the batch is cut into
    micro-batches.
    """

    terms: Callable[
        [object], int
    ]  # how many loss terms an item has: 1 for a pair, its tokens for a text
    losses: Callable  # (model, items) -> (sum of the loss terms, metrics: each a tensor [items])


def preference_objective(loss: Callable[[PairLogps], Tensor], beta: float) -> Objective:
    """Items are (TokenizedPair, (reference logp of chosen, of rejected)); `loss` as in
    `dpo_mini.losses`.
    """

    def losses(model, items):
        pairs, reference = zip(*items)
        batch = collate(
            [(p.prompt_ids, p.chosen_ids) for p in pairs]
            + [(p.prompt_ids, p.rejected_ids) for p in pairs]
        )
        device = next(model.parameters()).device
        policy = sequence_logps(model, *batch.to(device)).chunk(2)
        logps = PairLogps(*policy, *torch.tensor(reference, device=device).unbind(1))
        return loss(logps).sum(), preference_metrics(logps, beta)

    return Objective(terms=lambda item: 1, losses=losses)


def sft_objective() -> Objective:
    """Items are (prompt ids, completion ids); the loss is -log pi(token), averaged over completion
    tokens.
    """

    def losses(model, items):
        batch = collate(items).to(next(model.parameters()).device)
        logps = (
            token_logps(model, batch.input_ids, batch.attention_mask) * batch.completion_mask[:, 1:]
        )
        return -logps.sum(), {"logps/completion": logps.sum(1).detach()}

    return Objective(terms=lambda item: len(item[1]), losses=losses)


def reference_logps(
    model, pairs: Sequence[TokenizedPair], cache=None, batch_size=64, bf16=False, progress=False
) -> Tensor:
    """log pi_ref of chosen and rejected, float32 [pairs, 2] on the CPU: computed once, since pi_ref
    never changes.

    With `cache` (a file's path) the result is kept with a fingerprint of weights and tokens, and is
    used again only where both are the same.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    mark = fingerprint(model, pairs)
    if cache and Path(cache).exists():
        with safe_open(cache, "pt") as stored:
            if stored.metadata().get("fingerprint") == mark:
                return stored.get_tensor("logps")
    rows = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1])
    )  # little padding
    logps = torch.empty(len(rows))
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for i in tqdm(range(0, len(rows), batch_size), desc="reference", disable=not progress):
            chunk = order[i : i + batch_size]
            logps[chunk] = (
                sequence_logps(model, *collate([rows[j] for j in chunk]).to(model.device))
                .float()
                .cpu()
            )
    logps = logps.view(-1, 2)
    if cache:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{cache}.{os.getpid()}")  # several processes may write, each whole
        save_file({"logps": logps}, partial, metadata={"fingerprint": mark})
        partial.replace(cache)
    return logps


def fingerprint(model, pairs) -> str:
    """A hash of the model's weights and of the pairs' tokens."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    digest.update(json.dumps([list(p.__dict__.values()) for p in pairs]).encode())
    return digest.hexdigest()


def train_preferences(
    model,
    pairs,
    config,
    *,
    loss="dpo",
    beta=0.1,
    loss_options=None,
    output=None,
    resume=False,
    **loop,
):
    """Train `model` on tokenized pairs against itself as it is now, which is the reference. Returns
    the log.

    The reference's log-probabilities are taken before the first step, so that no second model is
    kept in memory. On `resume` `model` must again be the reference: the weights of the policy come
    from the checkpoint.
    """
    if beta <= 0:
        raise TrainingError(
            f"beta must be above 0, got {beta}: it divides the reward into a policy, pi_ref exp(r / beta)."
        )
    if not pairs:
        raise TrainingError("there are no pairs to train on.")
    cache = Path(output) / "reference_logps.safetensors" if output else None
    reference = reference_logps(
        model, pairs, cache, bf16=config.bf16, progress=loop.get("progress", False)
    )
    objective = preference_objective(
        lambda logps: LOSSES[loss](logps, beta, **(loss_options or {})), beta
    )
    identity = {
        "loss": loss,
        "beta": beta,
        **(loss_options or {}),
        "data": fingerprint(model, pairs),
    }
    return train(
        model,
        list(zip(pairs, reference.tolist())),
        objective,
        config,
        identity,
        output,
        resume,
        **loop,
    )


def train(
    model,
    items,
    objective,
    config,
    identity=None,
    output=None,
    resume=False,
    monitor=None,
    progress=False,
):
    """Minimise the objective; the model is changed in place. Returns the log, a dictionary per
    step.

    `output`: a folder for checkpoints; `resume`: continue from the one there, to the same weights
    bit for bit. `monitor(model) -> dict` is called before the first step, every
    `config.monitor_every` steps and after the last; its numbers join the log. `identity` says what
    run this is, so that another run's checkpoint is refused.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    world, rank, main = (
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.is_main_process,
    )
    micro = config.micro_batch_size or config.batch_size
    if config.batch_size % world:
        raise TrainingError(
            f"a batch of {config.batch_size} cannot be shared equally by {world} processes."
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    identity = {**asdict(config), **(identity or {}), "items": len(items)}
    checkpoint = Path(output) / "checkpoint.safetensors" if output else None
    log = load_checkpoint(checkpoint, parameters, optimizer, identity) if resume else []
    wrapped = accelerator.prepare_model(model)

    def save():
        if checkpoint and main:
            save_checkpoint(checkpoint, parameters, optimizer, identity, log)

    def watch():
        values = monitor(model) if monitor and main else {}
        accelerator.wait_for_everyone()
        return values

    if not log:
        log.append({"step": 0, **watch()})
        save()
    bar = tqdm(
        range(log[-1]["step"], config.steps),
        initial=log[-1]["step"],
        total=config.steps,
        desc="train",
        disable=not (progress and main),
    )
    with interruption() as interrupted:
        for step in bar:
            batch = [
                items[i] for i in batch_indices(len(items), config.batch_size, config.seed, step)
            ]
            total, mine = sum(map(objective.terms, batch)), batch[rank::world]
            sums: dict[str, Tensor] = {}
            for i in range(0, len(mine), micro):
                last = i + micro >= len(mine)
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
                        loss, metrics = objective.losses(wrapped, mine[i : i + micro])
                    # Processes average their gradients, hence times world; then every term weighs 1
                    # / total.
                    accelerator.backward(loss * world / total)
                parts = {"loss": loss.detach() / total} | {
                    k: v.sum() / len(batch) for k, v in metrics.items()
                }
                sums = {k: sums.get(k, 0) + v for k, v in parts.items()}
            sums["stop"] = torch.tensor(float(interrupted.is_set()), device=model.device)
            means = {k: v.item() for k, v in accelerator.reduce(sums, "sum").items()}
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm).item()
            if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
                kept = (
                    f" The checkpoint of step {saved_step(checkpoint)} is kept."
                    if checkpoint
                    else ""
                )
                raise TrainingError(
                    f"step {step + 1}: the loss is {means['loss']:g} and its gradient's norm {norm:g}.{kept} "
                    "Try a learning rate ten times smaller, a longer warm-up, or bf16 off."
                )
            rate = learning_rate(step, config)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            stop = means.pop("stop") > 0
            log.append({"step": step + 1, **means, "grad_norm": norm, "learning_rate": rate})
            done = step + 1 == config.steps
            if done or (step + 1) % config.monitor_every == 0:
                log[-1] |= watch()
            if done or stop or (step + 1) % config.checkpoint_every == 0:
                save()
            bar.set_postfix(
                {
                    k.split("/")[-1]: f"{means[k]:.3f}"
                    for k in ("loss", "rewards/accuracies")
                    if k in means
                }
            )
            if stop and not done:
                where = (
                    f" The checkpoint is in {output}; the same command with --resume goes on from there."
                    if output
                    else ""
                )
                raise TrainingInterrupted(
                    f"Stopped after step {step + 1} of {config.steps}.{where}"
                )
    return log


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The items of a step: an endless stream of permutations of 0..n-1, one per epoch, cut into
    batches.

    A function of its arguments alone, so that a resumed run sees what an undisturbed one would have
    seen.
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n)
        if not indices or offset == 0:
            order = torch.randperm(
                n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)
            ).tolist()
        indices.append(order[offset])
    return indices


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, or falling to 0 linearly or as a
    cosine.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    fraction = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    shapes = {
        "constant": 1.0,
        "linear": 1 - fraction,
        "cosine": (1 + math.cos(math.pi * fraction)) / 2,
    }
    return config.learning_rate * shapes[config.schedule]


@contextmanager
def interruption():
    """An event that Ctrl-C sets, so that a step is never cut in half; a second Ctrl-C interrupts at
    once.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(*_):
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def save_checkpoint(path: Path, parameters, optimizer, identity, log) -> None:
    """Everything that the next step depends on, in one file that is replaced as a whole: never half
    written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in state.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            tensors, partial, metadata={"identity": json.dumps(identity), "log": json.dumps(log)}
        )
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"the checkpoint of step {log[-1]['step']} could not be written ({error}); that of step "
            f"{saved_step(path)} is whole. Free some space, then go on with --resume."
        ) from error


def load_checkpoint(path: Path, parameters, optimizer, identity) -> list[dict]:
    """Put a checkpoint's tensors into parameters and optimizer; returns its log, [] where there is
    none yet.
    """
    from safetensors import safe_open

    if not path.exists():
        return []
    with safe_open(path, "pt") as stored:
        then = json.loads(stored.metadata()["identity"])
        changed = [
            f"{k} was {then.get(k)}, is {v}" for k, v in identity.items() if then.get(k) != v
        ]
        if changed:
            raise TrainingError(
                f"{path} belongs to another run: {'; '.join(changed)}. Start afresh in another folder."
            )
        state: dict[int, dict[str, Tensor]] = {}
        for key in stored.keys():
            kind, rest = key.split(".", 1)
            if kind == "model":
                parameters[rest].data.copy_(stored.get_tensor(key))
            else:
                i, name = rest.split(".")
                state.setdefault(int(i), {})[name] = stored.get_tensor(key)
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        return json.loads(stored.metadata()["log"])


def saved_step(path: Path) -> int | None:
    """The step of a checkpoint; None where there is none."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt") as stored:
        return json.loads(stored.metadata()["log"])[-1]["step"]
