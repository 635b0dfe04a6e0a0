"""Pairs a second and peak memory of `train_preferences` and of TRL's DPOTrainer.

Each trains in a process of its own, a step at a time and never both at once, on the same pairs from
the same weights; their losses must agree.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from itertools import combinations

import torch

from dpo_mini.course.speed import matmul_peak, step_work

SHAPES = {  # pairs a step, completions of a prompt, prompt tokens, completion tokens
    "IMDb, 8 + 48": (16, 2, 8, 48),
    "IMDb, six pairs of four samples": (18, 4, 8, 48),
    "dialogue, 256 + 64": (8, 2, 256, 64),
    "long, 512 + 128": (8, 2, 512, 128),
}
MODELS = {  # width, layers, heads, vocabulary
    "7M": (256, 6, 4, 8192),
    "124M": (768, 12, 12, 50257),
    "355M": (1024, 24, 16, 50257),
}
TURNS = {"7M": 15, "124M": 5, "355M": 5}  # the first warms up and is not counted
BETA, LEARNING_RATE = 0.1, 1e-5
TOLERANCE = 2e-3  # of the losses, over all steps


def build(width: int, layers: int, heads: int, vocabulary: int):
    """A GPT-2 of this size, random weights, always the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=1024,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def pairs_of(pairs: int, samples: int, prompt: int, completion: int, vocabulary: int):
    """Random token ids: time and memory do not depend on what they say."""
    from dpo_mini.tokens import TokenizedPair

    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(1, vocabulary, (n,), generator=generator).tolist()

    made = []
    while len(made) < pairs:
        x, ys = ids(prompt), [ids(completion) for _ in range(samples)]
        made += [TokenizedPair(x, *two) for two in combinations(ys, 2)]
    return made


def ours(model, pairs, steps, bf16, after_step):
    from dpo_mini.models import fused_gelu
    from dpo_mini.settings import TrainingConfig
    from dpo_mini.training import train_preferences

    config = TrainingConfig(
        steps=steps, batch_size=len(pairs), learning_rate=LEARNING_RATE, warmup_steps=0,
        schedule="constant", bf16=bf16, monitor_every=1,
    )  # fmt: skip

    def monitor(model, log):
        after_step(log[-1].get("loss"))
        return {}

    # as `load_model` gives it
    train_preferences(fused_gelu(model), pairs, config, beta=BETA, monitor=monitor)


def theirs(model, pairs, steps, bf16, after_step):
    import datasets
    import trl
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    from dpo_mini.models import EMBEDDED_FOLDER

    class AsTokenized(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    class Turnstile(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            after_step(None)

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                after_step(logs["loss"])

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER / "model")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids}
        for p in pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=len(pairs), max_steps=steps, beta=BETA,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0,
            optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
            logging_nan_inf_filter=False, report_to=[], save_strategy="no", bf16=bf16,
            use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
            precompute_ref_log_probs=True, max_length=None, disable_tqdm=True,
        )  # fmt: skip
        trainer = AsTokenized(
            model=model, args=arguments, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[Turnstile()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def worker(trainer, model, shape, steps, bf16, connection):
    """Train, but wait at the turnstile before every step; tell its seconds, loss, memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = None

    def after_step(loss):
        nonlocal started
        if loss is not None:
            torch.cuda.synchronize() if device == "cuda" else None
            connection.send((time.perf_counter() - started, loss, peak_memory(device)))
        connection.recv()
        started = time.perf_counter()

    warnings.simplefilter("ignore")  # TRL's, about settings' coming names
    pairs = pairs_of(*shape, vocabulary=model[3])
    # One step more than is asked for: what a trainer does after its last step is no step.
    trainer(build(*model).to(device), pairs, steps + 1, bf16, after_step)


def peak_memory(device: str) -> float:
    """Bytes: of this process, or of its tensors on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(model_name: str, shape: str, bf16: bool = False) -> dict:
    """Our step, their step, in turn, TURNS times."""
    steps = TURNS[model_name]
    context = multiprocessing.get_context("spawn")
    workers = []
    for trainer in (ours, theirs):
        connection, other = context.Pipe()
        args = (trainer, MODELS[model_name], SHAPES[shape], steps, bf16, other)
        process = context.Process(target=worker, args=args, daemon=True)
        process.start()
        other.close()
        workers.append((process, connection))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    turns = []
    for _ in range(steps):
        turn = [matmul_peak(dtype=dtype, device=device)]
        for _, connection in workers:
            connection.send("go")
            turn.append(connection.recv())
        turns.append(turn)
    for process, _ in workers:
        process.kill()
    apart = max(abs(a[1] - b[1]) for _, a, b in turns)
    if apart > TOLERANCE:
        raise AssertionError(f"the two losses are {apart:.2g} apart: not the same job")
    width, layers, _, vocabulary = MODELS[model_name]
    pairs = pairs_of(*SHAPES[shape], vocabulary)
    rows = [(p.prompt_ids, y) for p in pairs for y in (p.chosen_ids, p.rejected_ids)]
    work = step_work(width, layers, vocabulary, rows)
    timed = turns[1:]
    return {
        "model": model_name, "shape": shape, "dtype": "bf16" if bf16 else "fp32",
        "faster": statistics.median(b[0] / a[0] for _, a, b in timed),
        "each turn": [round(b[0] / a[0], 2) for _, a, b in timed],
        "memory": turns[-1][1][2] / turns[-1][2][2],
        "fraction of peak": statistics.median(work / (a[0] * peak) for peak, a, _ in timed),
        "peak GFLOP/s": statistics.median(peak for peak, *_ in timed) / 1e9,
        "losses apart": apart,
    }  # fmt: skip
