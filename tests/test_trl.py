"""Step by step against TRL's DPOTrainer: the same pairs in the same order, the same losses, rewards
and gradients.
"""

import pytest

from dpo_mini.data import preference_pairs
from dpo_mini.models import load_model
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import batch_indices, train_preferences

STEPS, BATCH, BETA = 20, 4, 0.3
NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def rows():
    openings = ["This movie", "I saw it", "The plot of this film", "My friend said", "It"]
    good = [
        " was great and moving.",
        " is a joy.",
        " made me laugh a lot!",
        " has wonderful acting by all.",
    ]
    bad = [" was dull.", " is a waste of time and money.", " made me leave early.", " bored us"]
    return [
        {"prompt": "<|endoftext|>" + o, "chosen": g, "rejected": b}
        for i, o in enumerate(openings)
        for j, (g, b) in enumerate(zip(good, bad[i % 4 :] + bad[: i % 4]))
    ]


@pytest.mark.slow
def test_dpo_equals_trl_step_by_step(tiny_folder, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the test extra: pip install '.[test]'")
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    config = TrainingConfig(
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=0,
        schedule="constant",
        max_grad_norm=1.0,
    )
    steps = [batch_indices(len(rows()), step, BATCH, 1, config.seed) for step in range(STEPS)]
    order = [i for step in steps for i in step]

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    model, tokenizer = load_model(tiny_folder)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=BATCH, max_steps=STEPS, beta=BETA,
        learning_rate=1e-3, lr_scheduler_type="constant", optim="adamw_torch_fused",
        weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        report_to=[], save_strategy="no", bf16=False, use_cpu=True, gradient_checkpointing=False,
        precompute_ref_log_probs=True, max_length=None, disable_tqdm=True,
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.eos_token
    trainer = InOrder(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([rows()[i] for i in order]),
    )
    trainer.train()
    theirs = [r for r in trainer.state.log_history if "loss" in r]

    ours, tokenizer = load_model(tiny_folder)
    pairs = tokenize_pairs(preference_pairs(rows()), tokenizer, 64)
    log = train_preferences(ours, pairs, config, beta=BETA)[1:]
    assert len(log) == len(theirs) == STEPS
    for step, (a, b) in enumerate(zip(log, theirs)):
        for name in NAMES:
            assert a[name] == pytest.approx(
                b[name], abs=2e-3 if name != "loss" else 2e-4, rel=1e-4
            ), (step, name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2), step
    # AdamW turns rounding into steps where a gradient is zero but for rounding: compare the whole
    # movement.
    start = load_model(tiny_folder)[0].parameters()
    moved = sum((p - q).square().sum() for p, q in zip(ours.parameters(), start)).sqrt()
    apart = sum(
        (p - q).square().sum() for p, q in zip(ours.parameters(), trainer.model.parameters())
    ).sqrt()
    assert apart < 0.05 * moved, (apart, moved)
