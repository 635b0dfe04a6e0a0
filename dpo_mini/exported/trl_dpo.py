"""A run of dpo_mini, trained by TRL: the same token ids, order, loss, rates and start.

Beside this script lie pairs.jsonl (token ids and texts), order.json (which pairs each step reads)
and expected.jsonl (what dpo_mini logged). Run it with `python train.py`: it trains, saves the model
to trained/, and says how far its log is from the expected one.
"""

import json
import math
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETTINGS = {}


def check_version() -> None:
    """Stop with a sentence where the library is of a version that nobody compared."""
    try:
        found = version(SETTINGS["tool"])
    except PackageNotFoundError:
        found = "none"
    if found not in SETTINGS["versions"]:
        wanted = " or ".join(SETTINGS["versions"])
        sys.exit(f"This script was written for {SETTINGS['tool']} {wanted}, found {found}. "
                 f"Try: pip install {SETTINGS['tool']}=={SETTINGS['versions'][-1]}")  # fmt: skip


check_version()
# --- the model ---


def load_model():
    """Policy, in float32, and tokenizer. TRL takes the reference's log-probabilities from it before
    the first step.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = SETTINGS["model"]
    name = str(HERE / name) if (HERE / name).is_dir() else name
    config = AutoConfig.from_pretrained(name)
    for key, value in config.to_dict().items():
        if ("drop" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)  # some models keep it as a number, which no switch finds
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    if SETTINGS["lora"]:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SETTINGS["arguments"]["seed"])  # the same adapters as in the run
        model = get_peft_model(model, LoraConfig(**SETTINGS["lora"]))
    return model, AutoTokenizer.from_pretrained(name)


# --- the trainer ---


def rate(step: int) -> float:
    """The learning rate of step 0, 1, ... as a share of the peak. TRL's own warm-up begins at 0."""
    warmup, steps = SETTINGS["warmup_steps"], SETTINGS["arguments"]["max_steps"]
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[SETTINGS["schedule"]]


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()]


def main() -> None:
    model, tokenizer = load_model()
    import torch
    import trl
    from datasets import Dataset

    class TrainerOnIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # TRL would tokenise the texts, and end every text with EOS

        def _get_train_sampler(self, *args, **kwargs):
            return json.loads((HERE / "order.json").read_text())  # not shuffled again

        def create_optimizer(self, *args, **kwargs):
            weights = [p for p in self.model.parameters() if p.requires_grad]
            given = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            self.optimizer = torch.optim.AdamW(weights, fused=True, **given)  # one group: all decay
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return self.lr_scheduler

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: row[name] for name in columns} for row in read("pairs.jsonl")]
    arguments = trl.DPOConfig(output_dir=str(HERE / "trained"), **SETTINGS["arguments"])
    trainer = TrainerOnIds(
        model=model, args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    lines = [json.dumps(row) for row in log]
    (HERE / "log.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    trainer.save_model()
    compare(log, read("expected.jsonl"))


def compare(log: list[dict], expected: list[dict]) -> None:
    """Print the largest distance from what dpo_mini logged, over all steps."""
    for name in ("loss", "logps/chosen", "logps/rejected", "rewards/margins"):
        gaps = [abs(a[name] - b[name]) for a, b in zip(log, expected) if name in a and name in b]
        if gaps:
            print(f"{name}: {len(gaps)} steps, at most {max(gaps):.2g} from dpo_mini's log")


if __name__ == "__main__":
    main()
