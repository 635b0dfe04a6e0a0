"""The family against TRL's own code: one batch, one policy and another reference, in float64; the
same value and the same gradient of every weight.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import make_gpt2, random_pairs

from dpo_mini.family import LOSSES, kto_loss
from dpo_mini.logprobs import sequence_logps
from dpo_mini.tokens import TokenizedPair, collate, unpaired
from dpo_mini.training import loss_arguments, preference_objective, unpaired_objective

trl = pytest.importorskip("trl", reason="needs the test extra: pip install '.[test]'")

GIVEN = {"beta": 0.7, "label_smoothing": 0.2, "gamma": 0.6, "alpha": 0.4}
DPO_TYPES = {  # ours: TRL's
    "dpo": "sigmoid",
    "hinge": "hinge",
    "ipo-token": "ipo",
    "robust": "robust",
    "apo-zero": "apo_zero",
    "apo-down": "apo_down",
    "dpo-norm": "sigmoid_norm",
}
ONE_PROCESS = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t
)


class WithFusedHead(torch.nn.Module):
    """What TRL's trainers ask of a model, in float64 (its own fused head computes in float32)."""

    is_gradient_checkpointing = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, labels, fused_lm_head, **inputs):
        logits = self.model(**inputs).logits[:, :-1]
        wanted = labels[:, 1:]
        distribution = logits.log_softmax(-1)
        chosen = distribution.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        nothing = torch.zeros_like(chosen)
        return SimpleNamespace(
            log_probs=torch.where(wanted != -100, chosen, nothing),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


@pytest.fixture(scope="module")
def models():
    """A policy and a reference that differs from it."""
    torch.manual_seed(0)
    policy, reference = (make_gpt2(width=16, layers=1).double() for _ in range(2))
    with torch.no_grad():
        for p, q in zip(policy.parameters(), reference.parameters()):
            q.copy_(p + 0.05 * q)
    return policy, reference


def given(name):
    return loss_arguments(name, **{k: v for k, v in GIVEN.items() if k in loss_arguments(name)})


def gradient(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def reference_of(reference, items):
    with torch.no_grad():
        logps = sequence_logps(reference, *collate([row for item in items for row in item.rows]))
    return list(zip(items, logps.view(-1, 2).tolist()))


def ours(models, pairs, name):
    policy, reference = models
    objective = preference_objective(lambda logps: LOSSES[name](logps, **given(name)), 1.0)
    return objective.loss(objective.logps(policy, reference_of(reference, pairs))).mean()


def assert_same(mine, theirs, policy):
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-9)
    a, b = gradient(mine, policy), gradient(theirs, policy)
    assert b.norm() > 1e-3 and (a - b).norm() < 1e-9 * b.norm()


def made(trainer, **attributes):
    """A trainer with the attributes that its loss reads and no more."""
    made = object.__new__(trainer)
    shared = {"accelerator": ONE_PROCESS, "aux_loss_enabled": False, "is_encoder_decoder": False}
    counters = {"_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0}
    made.__dict__ |= shared | counters | {"_tp_size": 1} | attributes
    return made


def dpo_inputs(pairs):
    batch = collate([(p.prompt_ids, p.chosen_ids) for p in pairs]
                    + [(p.prompt_ids, p.rejected_ids) for p in pairs])  # fmt: skip
    return batch._asdict()


def trl_dpo(models, pairs, loss_type):
    policy, reference = map(WithFusedHead, models)
    trainer = made(
        trl.DPOTrainer, model=policy, ref_model=reference, loss_types=[loss_type],
        loss_weights=[1.0], beta=GIVEN["beta"], label_smoothing=GIVEN["label_smoothing"],
        ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl",
        use_weighting=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    return trainer._compute_loss(policy, dpo_inputs(pairs), return_outputs=False)


@pytest.mark.parametrize("name", DPO_TYPES)
def test_the_losses_of_dpo_trainer(models, name):
    pairs = random_pairs(6)
    assert_same(ours(models, pairs, name), trl_dpo(models, pairs, DPO_TYPES[name]), models[0])


def of_equal_lengths(n=5, length=7, one_token_prompt=False):
    """Chosen completions of one length: the mean over a batch's tokens is that over its pairs."""
    return [
        TokenizedPair(p.prompt_ids[:1] if one_token_prompt else p.prompt_ids,
                      [*(p.chosen_ids * length)[: length - 1], 0], p.rejected_ids)
        for p in random_pairs(n, seed=1)
    ]  # fmt: skip


def test_sft_is_preferred_ft_by_the_token(models):
    pairs = of_equal_lengths(length=7)
    assert_same(ours(models, pairs, "preferred-ft") / 7, trl_dpo(models, pairs, "sft"), models[0])


def test_rpo_is_dpo_and_sft_together_whose_mean_is_over_the_batchs_tokens_in_trl(models):
    pairs = of_equal_lengths(length=7)
    theirs = trl_dpo(models, pairs, "sigmoid") + GIVEN["alpha"] * trl_dpo(models, pairs, "sft")
    assert_same(ours(models, pairs, "rpo"), theirs, models[0])
    unequal = random_pairs(6)
    theirs = trl_dpo(models, unequal, "sigmoid") + GIVEN["alpha"] * trl_dpo(models, unequal, "sft")
    assert ours(models, unequal, "rpo").item() != pytest.approx(theirs.item(), rel=1e-4)


def side_by_side(pairs):
    """A batch as the trainers of CPO and ORPO collate it: labels -100 on the prompt and padding."""
    batch = {}
    for side in ("chosen", "rejected"):
        sequences = collate([(p.prompt_ids, getattr(p, f"{side}_ids")) for p in pairs])
        batch[f"{side}_input_ids"] = sequences.input_ids
        batch[f"{side}_attention_mask"] = sequences.attention_mask
        batch[f"{side}_labels"] = sequences.input_ids.masked_fill(
            sequences.completion_mask == 0, -100
        )
    return batch


def trl_cpo(models, pairs, loss_type, cpo_alpha):
    from trl.experimental.cpo import CPOTrainer

    trainer = made(
        CPOTrainer, loss_type=loss_type, cpo_alpha=cpo_alpha, beta=GIVEN["beta"], alpha=0.0,
        label_smoothing=0.0, simpo_gamma=GIVEN["gamma"], pad_token_id=0,
    )  # fmt: skip
    return trainer.get_batch_loss_metrics(models[0], side_by_side(pairs))[0]


def test_simpo_whose_gamma_trl_divides_by_beta_before_it_multiplies(models):
    pairs = random_pairs(6)
    assert_same(ours(models, pairs, "simpo"), trl_cpo(models, pairs, "simpo", 0), models[0])


def test_cpo_whose_likelihood_is_a_mean_over_the_batchs_tokens_in_trl(models):
    pairs = of_equal_lengths()
    assert_same(ours(models, pairs, "cpo"), trl_cpo(models, pairs, "sigmoid", 0.4), models[0])
    unequal = random_pairs(6)
    other = trl_cpo(models, unequal, "sigmoid", 0.4).item()
    assert ours(models, unequal, "cpo").item() != pytest.approx(other, rel=1e-4)


def trl_orpo(models, pairs, monkeypatch):
    from trl.experimental.orpo import ORPOTrainer

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # keep float64
    trainer = made(ORPOTrainer, beta=GIVEN["beta"], padding_value=0)
    loss = trainer.get_batch_loss_metrics(models[0], side_by_side(pairs))[0]
    monkeypatch.undo()
    return loss


def test_orpo_whose_likelihood_is_that_of_the_prompt_too_in_trl(models, monkeypatch):
    pairs = of_equal_lengths(one_token_prompt=True)
    assert_same(ours(models, pairs, "orpo"), trl_orpo(models, pairs, monkeypatch), models[0])
    prompted = of_equal_lengths()
    other = trl_orpo(models, prompted, monkeypatch).item()
    assert ours(models, prompted, "orpo").item() != pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("clamped", [False, True])
def test_kto_on_either_side_of_its_clamp(models, clamped):
    policy, reference = models[::-1] if clamped else models
    items = unpaired(random_pairs(5, seed=2))
    items = [items[i] for i in (0, 3, 4, 6, 7, 9)]
    options = {"beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    objective = unpaired_objective(lambda logps: kto_loss(logps, **options), 0.7)
    known = reference_of(reference, items)
    with torch.no_grad():
        elsewhere = objective.of_whole_batch(policy, known)
    logps = objective.logps(policy, known, elsewhere)
    total, metrics = objective.loss(logps).sum(), objective.metrics(logps)

    own, elsewhere = (collate([item.rows[start] for item in items])._asdict() for start in (0, 1))
    fused = WithFusedHead(policy)
    trainer = made(
        trl.KTOTrainer, model=fused, ref_model=WithFusedHead(reference), loss_type="kto",
        calculate_KL=True, precompute_ref_logps=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), **options,
    )  # fmt: skip
    inputs = own | {f"KL_{key}": value for key, value in elsewhere.items()}
    inputs["label"] = torch.tensor([item.desirable for item in items])
    theirs = trainer._compute_loss(fused, inputs, return_outputs=False)
    assert_same(total / len(items), theirs, policy)
    (kl,) = trainer._metrics["train" if fused.training else "eval"]["kl"]
    assert metrics["kl"][0].item() == pytest.approx(kl, rel=1e-9) and (kl == 0) == clamped
