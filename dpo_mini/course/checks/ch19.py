"""19 Hand over: settings in another tool's names, traps in a configuration, the memory sum."""

import torch

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


def batch_cases(generator):
    cases = [(32, 4, 1), (64, 8, 2), (24, 24, 1), (96, 4, 3)]
    for _ in range(3):
        micro, times, processes = torch.randint(2, 7, (3,), generator=generator).tolist()
        cases.append((micro * times * processes, micro, processes))
    return [*cases, Edge("every process reads its whole share at once", (48, 12, 4))]


def batch_truth(batch_size, micro_batch_size, processes):
    """Counted: how many rounds it takes until all pairs of a step were read."""
    read = rounds = 0
    while read < batch_size:
        read += micro_batch_size * processes
        rounds += 1
    return {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": rounds,
    }


def batch_arguments(batch_size, micro_batch_size, processes):
    return {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": batch_size // (micro_batch_size * processes),
    }


BATCH = Exercise(
    "19.1", "A batch in transformers' words", "implement", difficulty=1, importance=5, minutes=5,
    truth=batch_truth, cases=batch_cases,
    right=(
        batch_arguments,
        lambda n, m, p: {"per_device_train_batch_size": m, "gradient_accumulation_steps": n // p // m},
    ),
    wrong=(
        Wrong("the processes are forgotten", "processes = 1", "Every process reads its own part at the same time: two processes need half the rounds."),
        Wrong("the whole batch as the part of one device", '"per_device_train_batch_size": micro_batch_size -> "per_device_train_batch_size": batch_size', "per_device_train_batch_size is what one device holds at once. The batch of a step is that, times the accumulation, times the devices."),
        Wrong("a device's share of the batch at once", '"per_device_train_batch_size": micro_batch_size -> "per_device_train_batch_size": batch_size // processes', "That is what a device reads in a whole step. It holds only micro_batch_size of it at once."),
        Wrong("no accumulation", "batch_size // (micro_batch_size * processes) -> 1", "Without accumulation a step sees fewer pairs, so that the same learning rate means another training."),
        Wrong("the accumulation times the processes", "batch_size // (micro_batch_size * processes) -> batch_size // micro_batch_size * processes", "More processes need fewer rounds, not more."),
    ),
)  # fmt: skip


def weights_cases(generator):
    drawn = (0.02 + 0.4 * torch.rand(4, generator=generator, dtype=torch.float64)).tolist()
    return [(0.1,), (0.25,), *((eps,) for eps in drawn), Edge("no label is wrong", (0.0,))]


def weights_truth(eps):
    """Solved as two equations, one for the loss of the label and one for that of its opposite."""
    a, b = (1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps)  # robust = a L + b L'
    if eps == 0:
        return 2.0, -1.0  # the limit: both are L, and the weights add up to 1
    robust = eps / b
    return (1 - eps) - robust * a, robust


def weights(eps):
    return 2 * (1 - eps), -(1 - 2 * eps)


WEIGHTS = Exercise(
    "19.2", "Conservative DPO from two losses", "derive", difficulty=3, importance=3, minutes=10,
    truth=weights_truth, cases=weights_cases, right=(weights, lambda e: (2.0 - 2 * e, 2 * e - 1)),
    wrong=(
        Wrong("the weight of robust has the wrong sign", "-(1 - 2 * eps) -> (1 - 2 * eps)", "In robust the loss of the opposite label has a minus. Conservative DPO has a plus there: so robust must be taken with a minus."),
        Wrong("the weights of the two labels", lambda e: (1 - e, e), "1 - eps and eps are the weights of L and L'. TRL offers L and robust, and robust holds both: match the coefficients of L and of L'."),
        Wrong("robust's own denominator is left out", lambda e: ((1 - e) + (1 - e) * 1.0, -1.0), "Robust is divided by 1 - 2 eps. Its coefficient of L' is -eps / (1 - 2 eps)."),
        Wrong("what robust brings of L is not taken off", "2 * (1 - eps) -> (1 - eps)", "Robust brings its own part of L, with a minus: the plain loss must make up for it."),
        Wrong("the two weights are swapped", lambda e: (-(1 - 2 * e), 2 * (1 - e)), "Return the weight of the plain loss (sigmoid) first."),
    ),
)  # fmt: skip

# Each differs from the run in one thing. The names of what goes wrong are the answers.
WANTED = {"max_length": None, "loss_type": ["sigmoid"], "label_smoothing": 0.0, "bf16": False,
          "packing": False, "template": "as sampled", "learning_rate": 1e-6}  # fmt: skip
FAULTS = {"max_length": "cut", "label_smoothing": "ignored", "template": "other ids",
          "loss_type": "other loss"}  # fmt: skip
CONFIGURATIONS = {
    "A": {**WANTED, "max_length": 128},
    "B": {**WANTED, "label_smoothing": 0.2},
    "C": {**WANTED, "template": "chatml"},
    "D": {**WANTED, "loss_type": ["ipo"]},
}


def traps_truth():
    """Looked up: the one setting in which each configuration differs."""
    return {
        name: next(FAULTS[key] for key, value in one.items() if value != WANTED[key])
        for name, one in CONFIGURATIONS.items()
    }


TRAPS = Exercise(
    "19.3", "Find the trap", "diagnose", difficulty=2, importance=5, minutes=10,
    truth=traps_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("A seen as another loss", {"A": "other loss"}, "The loss is the same formula in A. Ask what it is computed on, for a prompt of 100 tokens and an answer of 60."),
        Wrong("A seen as harmless", {"A": "ignored"}, "TRL does use max_length: it keeps the first tokens and drops the rest, without an error."),
        Wrong("A seen as other ids", {"A": "other ids"}, "The ids are the same ones, as far as they go. Where do they stop?"),
        Wrong("B seen as another loss", {"B": "other loss"}, "One would wish so. Look at the cheat sheet of traps: which of TRL's losses reads label_smoothing?"),
        Wrong("B seen as cut", {"B": "cut"}, "Nothing in B is about lengths."),
        Wrong("C seen as ignored", {"C": "ignored"}, "A template is used: it puts markup, and often a system message, around every prompt."),
        Wrong("C seen as another loss", {"C": "other loss"}, "The formula is the same; it is computed of other tokens."),
        Wrong("D seen as ignored", {"D": "ignored"}, "The name is used. But this library's ipo sums over tokens, and TRL's averages."),
        Wrong("D seen as cut", {"D": "cut"}, "Nothing in D is about lengths of texts. Ask what is summed and what is averaged."),
    ),
)  # fmt: skip


def memory_cases(generator):
    cases = [(1000, 1000, 1, False), (1000, 1000, 4, True), (1000, 1000, 4, False), (1000, 16, 1, False)]
    for processes, sharded in ((2, True), (8, False)):
        whole = 96 * int(torch.randint(50, 500, (), generator=generator))
        cases.append((whole, whole // 12, processes, sharded))
    return [*cases, Edge("adapters, and sharded", (4800, 240, 8, True))]


def memory_truth(parameters, trained, processes, sharded):
    """Added up over the tensors that a step needs, each with its four bytes a number."""
    tensors = {"weights": parameters, "gradients": trained, "mean": trained, "square": trained}
    total = sum(torch.empty(n, device="meta").nbytes for n in tensors.values())
    return total / (processes if sharded else 1)


def memory(parameters, trained, processes, sharded):
    total = 4 * parameters + 12 * trained
    return total / processes if sharded else total


MEMORY = Exercise(
    "19.4", "The memory sum", "implement", difficulty=2, importance=5, minutes=10,
    truth=memory_truth, cases=memory_cases,
    right=(memory, lambda p, t, n, s: 4 * (p + 3 * t) / (n if s else 1)),
    wrong=(
        Wrong("all processes share although nothing is sharded", "sharded = True", "Without sharding every process holds everything: more processes make a step faster, not smaller."),
        Wrong("frozen weights with gradients and moments", "trained = parameters", "LoRA trains the adapters alone. A frozen weight has no gradient and no moments."),
        Wrong("a gradient or a moment is left out", "12 * trained -> 8 * trained", "Beside its gradient, a trained weight has two running means in AdamW: of the gradient and of its square."),
        Wrong("AdamW is left out", "12 * trained -> 4 * trained", "AdamW keeps two numbers for every trained weight, as large as the weight."),
        Wrong("only the weights are sharded", "total / processes if sharded else total -> 4 * parameters / processes + 12 * trained if sharded else total", "FSDP cuts gradients and the optimiser's moments as well."),
        Wrong("two bytes a number", lambda p, t, n, s: (2 * p + 6 * t) / (n if s else 1), "float32 has four bytes. Autocast to bfloat16 changes the arithmetic, not what is kept."),
        Wrong("the weights are left out", "4 * parameters -> 0 * parameters", "The model itself must be there."),
    ),
)  # fmt: skip

EXERCISES = (BATCH, WEIGHTS, TRAPS, MEMORY)
