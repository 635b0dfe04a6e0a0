"""The embedded model's own training: a small GPT-2 from random weights on IMDb's text.

Two phases. Most steps read random windows of the corpus at a constant rate; the last phase reads
the opening of every review once while the rate falls to zero, since openings are all that this
model is ever asked to write.
"""

import json
import math
import os
import time
from pathlib import Path

import torch

from dpo_mini.models import bfloat16_pays

END = "<|endoftext|>"  # id 0; begins every review and ends it, as in GPT-2


def train_tokenizer(texts, vocabulary=8192):
    """A byte-level BPE in GPT-2's manner; returns a `PreTrainedTokenizerFast` whose BOS and EOS are
    id 0, and which puts BOS before every text by itself.
    """
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

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
    texts,
    held_out,
    output,
    *,
    layers=4,
    width=256,
    heads=4,
    vocabulary=8192,
    context=128,
    steps=4500,
    batch_size=32,
    muon_lr=0.02,
    adam_lr=3e-3,
    seed=0,
    bf16=None,
    stop_after=None,
):
    """Train tokenizer and model on `texts`; write the Hub's format to `output`; continue there if
    it was interrupted.

    The last len(texts) / batch_size steps are the phase of openings. `bf16`: products in bfloat16;
    None: where they are faster. `stop_after`: end this stretch after so many seconds; the next call
    goes on. Returns the report that is written as JSON, or None where steps are left.
    """
    from tqdm.auto import tqdm
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if (output / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    else:
        tokenizer = train_tokenizer(texts, vocabulary)
        tokenizer.save_pretrained(output)
    if not (output / "corpus.pt").exists():
        torch.save(encode_corpus(tokenizer, texts), output / "corpus.pt")
    stream, starts = torch.load(output / "corpus.pt")

    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = bfloat16_pays(device) if bf16 is None else bf16
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            activation_function="gelu_pytorch_tanh",
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    ).to(device)
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or ".h." not in n]
    optimizers = [
        Muon(matrices, muon_lr),
        torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]

    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))
    starts = starts[starts <= len(stream) - context - 1]
    order = order[order < len(starts)]
    last_phase = len(order) // batch_size
    checkpoint = output / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    losses, began = [], time.monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="pretrain", mininterval=5)
    for step in bar:
        remaining = steps - step
        rate = min(1.0, (step + 1) / 100, remaining / last_phase)
        for optimizer, lr in zip(optimizers, (muon_lr, adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * rate
        if remaining <= last_phase:
            i = (last_phase - remaining) * batch_size
            offsets = starts[order[i : i + batch_size]]
        else:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            offsets = torch.randint(len(stream) - context - 1, (batch_size,), generator=generator)
        windows = torch.stack([stream[o : o + context + 1] for o in offsets]).long().to(device)
        loss = next_token_loss(model, windows, bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            bar.write(
                f"step {step + 1}: {sum(losses[-50:]) / len(losses[-50:]):.3f} nats per token"
            )
        time_is_up = stop_after is not None and time.monotonic() - began > stop_after
        if (step + 1) % 250 == 0 or step + 1 == steps or time_is_up:
            saved = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
            }
            torch.save(saved, output / "checkpoint.tmp")
            os.replace(output / "checkpoint.tmp", checkpoint)
            quality = bits_per_byte(model, tokenizer, held_out)
            bar.write(f"step {step + 1}: {quality:.4f} bits per byte, held out")
        if time_is_up and step + 1 < steps:
            return None

    report = {
        "steps": steps,
        "tokens_seen": steps * batch_size * context,
        "corpus_tokens": len(stream),
        "parameters": model.num_parameters(),
        "bits_per_byte": bits_per_byte(model, tokenizer, held_out),
    }
    model.config.use_cache = True
    model.half().save_pretrained(output)
    (output / "report.json").write_text(json.dumps(report, indent=1))
    return report
