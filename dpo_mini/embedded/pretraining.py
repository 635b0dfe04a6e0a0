"""The embedded model's own training: a small GPT-2 from random weights on IMDb's text.

Two phases. Most steps read random windows of the corpus at a constant rate; the last phase reads
the opening of every review once while the rate falls to zero, since openings are all that this
model is ever asked to write.
"""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpo_mini.checkpoints import TrainingInterrupted, interruption
from dpo_mini.data import DataError
from dpo_mini.models import bfloat16_pays
from dpo_mini.settings import SettingsError, TrainingError

IDENTITY = "pretraining.json"  # says which run a folder belongs to
END = "<|endoftext|>"  # id 0; begins every review and ends it, as in GPT-2


def train_tokenizer(texts, vocabulary=8192):
    """A byte-level BPE in GPT-2's manner; returns a `PreTrainedTokenizerFast` whose BOS and EOS are
    id 0, and which puts BOS before every text by itself.
    """
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, special_tokens=[END])
    bpe._tokenizer.post_processor = TemplateProcessing(f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, unk_token=END
    )


def encode_corpus(tokenizer, texts):
    """One stream of token ids, END before each text, and the position of each END: int32 [tokens],
    int64 [texts].
    """
    stream, starts = [], []
    length = 0
    for i in range(0, len(texts), 1000):
        for ids in tokenizer(texts[i : i + 1000], add_special_tokens=False)["input_ids"]:
            starts.append(length)
            stream.append(torch.tensor([tokenizer.eos_token_id, *ids], dtype=torch.int32))
            length += len(stream[-1])
    return torch.cat(stream), torch.tensor(starts)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(h W^T)[y] without ever holding all logits: the gradient is made chunk by
    chunk on the way.

    `hidden` [n, d], `weight` [vocabulary, d], `targets` [n] -> scalar. The products are taken in
    the precision of `hidden`, the softmax in float32. The logits of a whole batch do not fit a
    CPU's cache, those of a chunk do.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk=256):
        d_hidden, d_weight, total = torch.empty_like(hidden), torch.zeros_like(weight), 0.0
        columns = weight.to(hidden.dtype)
        for i in range(0, len(targets), chunk):
            h, y = hidden[i : i + chunk], targets[i : i + chunk, None]
            logps = (h @ columns.T).float().log_softmax(-1)
            total = total - logps.gather(1, y).sum()
            d_logits = logps.exp_().scatter_add_(1, y, -torch.ones(y.shape, device=y.device))
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[i : i + chunk] = d_logits @ columns
            d_weight += d_logits.T @ h
        ctx.save_for_backward(d_hidden.div_(len(targets)), d_weight.div_(len(targets)))
        return total / len(targets)

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return grad * d_hidden, grad * d_weight, None, None


def next_token_loss(model, windows, bf16=False):
    """Mean cross-entropy in nats of each token given those before it; `windows` int64 [batch,
    length]. With `bf16` the products are taken in bfloat16.
    """
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.transformer(windows[:, :-1]).last_hidden_state
    hidden = hidden.flatten(0, 1).to(torch.bfloat16 if bf16 else torch.float32)
    return ChunkedCrossEntropy.apply(hidden, model.lm_head.weight, windows[:, 1:].flatten())


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are made orthogonal by Newton-Schulz steps (Jordan et al.
    2024).

    `torch.optim.Muon` does the same in bfloat16, which CPUs without bfloat16 units emulate a
    hundred times slower.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(velocity, group["momentum"]))
                # Conv1D stores [in, out]: scale by sqrt(out / in) where the layer widens.
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[1] / p.shape[0]) ** 0.5)


def orthogonalised(matrix, steps=5):
    """The nearest matrix with singular values of about 1, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def bits_per_byte(model, tokenizer, texts, tokens=127):
    """Bits per UTF-8 byte on the first `tokens` tokens of each text, END before them."""
    device, nats, length = model.device, 0.0, 0
    for i in range(0, len(texts), 50):
        for ids in tokenizer(texts[i : i + 50], add_special_tokens=False)["input_ids"]:
            ids = ids[:tokens]
            window = torch.tensor([[tokenizer.eos_token_id, *ids]], device=device)
            with torch.no_grad():
                nats += next_token_loss(model, window).item() * len(ids)
            length += len(tokenizer.decode(ids).encode())
    return nats / math.log(2) / length


def pretrain(
    texts, held_out, output, *,
    layers=4, width=256, heads=4, vocabulary=8192, context=128, steps=4500, batch_size=32,
    muon_lr=0.02, adam_lr=3e-3, seed=0, bf16=None, stop_after=None,
):  # fmt: skip
    """Train tokenizer and model on `texts`; write the Hub's format to `output`; continue there if
    it was interrupted.

    The last len(texts) / batch_size steps are the phase of openings. `bf16`: products in bfloat16;
    None: where they are faster. `stop_after`: end this stretch after so many seconds; the next call
    goes on. Returns the report that is written as JSON, or None where steps are left. Raises
    TrainingError for a folder of another run or of another kind, and DataError for too few texts.
    """
    if width % heads:
        raise SettingsError(f"width must be a multiple of heads, got {width} and {heads}.")
    output = Path(output)
    shape = {"layers": layers, "width": width, "heads": heads, "context": context}
    course = {"steps": steps, "batch_size": batch_size, "muon_lr": muon_lr, "adam_lr": adam_lr}
    identity = {**shape, "vocabulary": vocabulary, **course, "seed": seed}
    bf16 = claim_folder(output, identity, texts, bf16)
    tokenizer, stream, starts = corpus(texts, output, vocabulary)
    if len(stream) < context + 2:
        raise DataError(
            f"the texts are {len(stream)} tokens: expected at least {context + 2}, a window of "
            f"context {context} and the token after it."
        )

    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(len(tokenizer), **shape).to(device)
    optimizers = new_optimizers(model, muon_lr, adam_lr)
    windows = Windows(stream, starts, context, steps, batch_size, seed)

    def quality() -> float:
        return bits_per_byte(model, tokenizer, held_out, min(127, context))

    if not stretch(model, optimizers, windows, bf16, output, quality, stop_after):
        return None
    report = {
        "steps": steps, "tokens_seen": steps * batch_size * context, "corpus_tokens": len(stream),
        "parameters": model.num_parameters(), "bits_per_byte": quality(),
    }  # fmt: skip
    model.config.use_cache = True
    model.half().save_pretrained(output)
    (output / "report.json").write_text(json.dumps(report, indent=1))
    return report


def stretch(model, optimizers, windows, bf16, output, quality, stop_after) -> bool:
    """Train from the checkpoint in `output`, or from the start, for at most `stop_after` seconds;
    returns whether all steps are done. Ctrl-C ends it after a checkpoint.
    """
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    others = optimizers[1].param_groups[0]["params"]
    first, steps = load_state(output, model, optimizers), windows.steps
    losses, began = [], time.monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="pretrain", mininterval=5)
    with interruption() as stopped:
        for step in bar:
            loss = next_token_loss(model, windows(step).to(model.device), bf16)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = peak * windows.rate(step)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            done = step + 1
            if done % 50 == 0:
                recent = losses[-50:]
                bar.write(f"step {done}: {sum(recent) / len(recent):.3f} nats per token")
            time_is_up = stop_after is not None and time.monotonic() - began > stop_after
            if done % 250 == 0 or done == steps or time_is_up or stopped.is_set():
                save_state(output, done, model, optimizers)
                bar.write(f"step {done}: {quality():.4f} bits per byte, held out")
            if stopped.is_set() and done < steps:
                said = f"Stopped after step {done} of {steps}. The same command goes on from there."
                raise TrainingInterrupted(said)
            if time_is_up:
                return done == steps
    return True


def claim_folder(output: Path, identity: dict, texts, bf16: bool | None) -> bool:
    """Make the folder this run's, or see that it already is, and remove what a kill left half.
    Returns whether to use bfloat16: a trial decides it once, and later stretches keep to it.

    Raises TrainingError for a folder that holds anything else, or another run.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    identity = {**identity, "data": digest.hexdigest()[:16]}
    record, then = output / IDENTITY, {}
    if record.exists():
        try:
            then = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:  # damaged: then nobody knows whose folder it is
            pass
        changed = [
            f"{k} was {then.get(k)}, is {v}" for k, v in identity.items() if then.get(k) != v
        ]
        if changed:
            raise TrainingError(
                f"{output} belongs to another run: {'; '.join(changed)}. Choose another folder."
            )
    elif output.exists() and any(output.iterdir()):
        raise TrainingError(
            f"{output} is not empty and holds no run of pretraining. Choose another folder."
        )
    output.mkdir(parents=True, exist_ok=True)
    for half in output.glob("*.tmp"):
        half.unlink()
    if bf16 is None:
        bf16 = then.get("bf16", bfloat16_pays("cuda" if torch.cuda.is_available() else "cpu"))
    text = json.dumps({**identity, "bf16": bf16}, indent=1)
    replace_file(record, lambda path: path.write_text(text))
    return bf16


def replace_file(path: Path, write) -> None:
    """`write` the file aside and put it in its place, so that it is whole or not there."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    os.replace(aside, path)


def corpus(texts, output: Path, vocabulary: int):
    """Tokenizer, stream of token ids and starts of the texts; kept in `output` for the next
    stretch, and made again where what is there cannot be read.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
        return tokenizer, *torch.load(output / "corpus.pt")
    except Exception:  # missing, half or damaged: each library has its own error for it
        tokenizer = train_tokenizer(texts, vocabulary)
        tokenizer.save_pretrained(output)
        stream, starts = encode_corpus(tokenizer, texts)
        replace_file(output / "corpus.pt", lambda path: torch.save((stream, starts), path))
        return tokenizer, stream, starts


def new_model(vocabulary: int, layers: int, width: int, heads: int, context: int):
    """A GPT-2 with random weights, without dropout."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
        activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="eager",  # a quarter faster on a CPU than the fused one at this length
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def new_optimizers(model, muon_lr: float, adam_lr: float) -> list:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or ".h." not in n]
    return [
        Muon(matrices, muon_lr),
        torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


class Windows:
    """What each step reads, int64 [batch, context + 1], and at which share of the peak rate.

    A function of the step alone, so that a run that goes on sees what it would have seen.
    """

    def __init__(self, stream, starts, context, steps, batch_size, seed):
        self.stream, self.context, self.steps = stream, context, steps
        self.batch_size, self.seed = batch_size, seed
        order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))
        self.starts = starts[starts <= len(stream) - context - 1]
        self.order = order[order < len(self.starts)]
        self.last_phase = len(self.order) // batch_size  # steps that read each opening once

    def rate(self, step: int) -> float:
        falling = (self.steps - step) / self.last_phase if self.last_phase else 1.0
        return min(1.0, (step + 1) / 100, falling)

    def __call__(self, step: int):
        remaining = self.steps - step
        if remaining <= self.last_phase:
            i = (self.last_phase - remaining) * self.batch_size
            offsets = self.starts[self.order[i : i + self.batch_size]]
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            last = len(self.stream) - self.context - 1
            offsets = torch.randint(last, (self.batch_size,), generator=generator)
        return torch.stack([self.stream[o : o + self.context + 1] for o in offsets]).long()


def save_state(output: Path, step: int, model, optimizers) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }
    replace_file(output / "checkpoint.pt", lambda path: torch.save(state, path))


def load_state(output: Path, model, optimizers) -> int:
    """Put the checkpoint's state into model and optimizers; returns its step, 0 for none yet."""
    checkpoint = output / "checkpoint.pt"
    if not checkpoint.exists():
        return 0
    try:
        state = torch.load(checkpoint, map_location=model.device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        return state["step"]
    except Exception as error:  # damaged: torch's errors for it are of many kinds
        raise TrainingError(
            f"{checkpoint} cannot be read; delete it to begin again, or restore it."
        ) from error
