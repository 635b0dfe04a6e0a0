"""Several processes at one run. Each holds the whole model and reads its share of every batch.

One process alone is a group of one: it is the main one, its share is the whole batch, and nothing
is sent.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from dpo_mini.settings import TrainingError

# Launchers turn these on by an environment variable. Each would cut the parameters into pieces.
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def join_processes(device: torch.device, batch_size: int) -> None:
    """Join the processes that a launcher started, if it started more than this one.

    Raises TrainingError where the launcher asks for sharded parameters, which this loop does not
    do, and where the processes cannot share `batch_size` items equally. A second call changes
    nothing.
    """
    from accelerate import Accelerator

    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise TrainingError(
                f"the launcher's configuration asks for {name}, which shards parameters. Here "
                "every process holds the whole model, so it would be ignored. Launch with "
                "--multi_gpu and no such configuration; for a larger model use --lora, or TRL."
            )
    Accelerator(cpu=device.type == "cpu")  # it makes the process group, of the right backend
    if batch_size % count():
        raise TrainingError(
            f"{count()} processes cannot share {batch_size} items equally. Try a --batch-size "
            f"that {count()} divides."
        )


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes a run's files and draws its progress bar.

    True in every process before `join_processes`. `outputs.is_main_process` asks the launcher, so
    that it can be used before they join.
    """
    return rank() == 0


def share(batch: list) -> list:
    """The items of a batch that this process reads; all processes have equally many.

    They are neighbours, so that the pairs of one prompt stay in one process, which reads the prompt
    once for them.
    """
    size = len(batch) // count()
    return batch[rank() * size : (rank() + 1) * size]


def equal_start(parameters: Iterable[Tensor]) -> None:
    """Give every process the main one's parameters.

    Gradients can be added only if all processes have the same weights.
    """
    if count() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def summed(values: dict[str, Tensor]) -> dict[str, float]:
    """The sums of numbers over all processes."""
    if count() > 1:
        for value in values.values():
            dist.all_reduce(value)
    return {name: value.item() for name, value in values.items()}


def gathered(values: Tensor) -> Tensor:
    """The values [n] of all processes, one after the other: [processes * n]."""
    if count() == 1:
        return values
    everyone = [torch.empty_like(values) for _ in range(count())]
    dist.all_gather(everyone, values.contiguous())
    return torch.cat(everyone)


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Give every process the sum of all processes' gradients.

    A parameter that one process's share did not reach (an expert of a mixture) counts as 0 there.
    """
    if count() == 1:
        return
    parameters = list(parameters)
    device = parameters[0].device
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    dist.all_reduce(reached)
    for parameter, times in zip(parameters, reached.tolist()):
        if times:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process: Ctrl-C may reach only one."""
    if count() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0


def wait_for_everyone() -> None:
    if count() > 1:
        dist.barrier()
