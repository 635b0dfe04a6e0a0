"""Reward model, PPO and REINFORCE: each part against another way to compute it, and the whole in a
world where every completion is listed and the optimum is known.
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_gpt2, random_pairs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dpo_mini import exact, rlhf
from dpo_mini.logprobs import sequence_logps
from dpo_mini.rlhf import (
    PolicyGradientConfig,
    Rollout,
    ScalarModel,
    adapted_beta,
    best_of,
    clipped_loss,
    clipped_value_loss,
    gae,
    learned_reward,
    leave_one_out,
    normalised,
    ppo,
    reinforce,
    reward_objective,
    rollout,
    sequence_rewards,
    text_reward,
    token_rewards,
    whitened,
)
from dpo_mini.settings import TrainingConfig, TrainingError
from dpo_mini.tokens import TokenizedPair, collate
from dpo_mini.training import learning_rate, train

ROWS = [([0, 5, 9], [11, 3, 0]), ([0], [7, 0]), ([0, 4], [8, 8, 8, 21, 60, 0]), ([0, 5], [90])]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def awake(scalar, seed=0):
    """The scalar model with a head that is no longer 0."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(scalar.head.weight)
    torch.nn.init.normal_(scalar.head.bias)
    return scalar


# --- a number at each position ---


def test_a_scalar_model_is_zero_at_first_and_shares_no_weight(any_model):
    scalar = ScalarModel(any_model)
    batch = collate(ROWS)
    assert (scalar(batch.input_ids, batch.attention_mask) == 0).all()
    before = [p.clone() for p in any_model.parameters()]
    with torch.no_grad():
        for p in scalar.parameters():
            p.add_(1)
    assert all(torch.equal(p, q) for p, q in zip(any_model.parameters(), before))
    assert not {p.data_ptr() for p in any_model.parameters()} & {
        p.data_ptr() for p in scalar.parameters()
    }


def test_a_scalar_model_has_the_policys_precision(any_model):
    batch = collate(ROWS)
    scalar = ScalarModel(any_model.double())
    assert scalar(batch.input_ids, batch.attention_mask).dtype == torch.float64


@torch.no_grad()
def test_a_reward_is_read_at_the_last_token_and_padding_never_matters(any_model):
    """Pads are 0 and so is EOS: only the mask tells them apart."""
    scalar = awake(ScalarModel(any_model))
    together = sequence_rewards(scalar, ROWS)
    for (prompt, completion), reward in zip(ROWS, together):
        ids = torch.tensor([prompt + completion])
        body = any_model.base_model(input_ids=ids).last_hidden_state
        by_hand = body[0, -1] @ scalar.head.weight[0] + scalar.head.bias[0]
        assert reward.item() == pytest.approx(by_hand.item(), abs=1e-5)
    without_eos = sequence_rewards(scalar, [([0, 5, 9], [11, 3]), ROWS[2]])
    assert abs(without_eos[0] - together[0]) > 1e-3


def test_a_learned_reward_is_the_same_however_it_is_cut(gpt2):
    scalar = awake(ScalarModel(gpt2))
    completions = [SimpleNamespace(prompt_ids=p, ids=c) for p, c in ROWS]
    whole = sequence_rewards(scalar, ROWS).detach()
    for size in (1, 3, 4):
        reward = learned_reward(scalar, size)(completions)
        assert torch.allclose(reward, whole, atol=1e-5) and not reward.requires_grad


def test_a_text_reward_judges_prompt_and_completion():
    completions = [SimpleNamespace(full_text="This film"), SimpleNamespace(full_text="That")]
    reward = text_reward(lambda texts: torch.tensor([float(len(t)) for t in texts]))
    assert reward(completions).tolist() == [9.0, 4.0]


# --- the reward model ---


def ruled_pairs(n, seed):
    """Pairs in which the completion with more 1s among its tokens is chosen."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, length):
        return torch.randint(low, high, (length,), generator=generator).tolist()

    pairs = []
    while len(pairs) < n:
        a, b = (draw(1, 4, draw(2, 7, 1)[0]) for _ in range(2))
        if a.count(1) != b.count(1):
            chosen, rejected = sorted((a, b), key=lambda ids: -ids.count(1))
            pairs.append(TokenizedPair([0, *draw(1, 4, 2)], [*chosen, 0], [*rejected, 0]))
    return pairs


def loss_and_metrics(model, pairs):
    """The sum of the reward model's losses, and its metrics."""
    objective = reward_objective()
    margins = objective.logps(model, pairs)
    return objective.loss(margins).sum(), objective.metrics(margins)


def test_a_reward_model_begins_at_log_2_and_learns_a_rule():
    torch.manual_seed(0)
    model = ScalarModel(make_gpt2(vocabulary=4, width=16, layers=1, context=16))
    config = TrainingConfig(steps=60, batch_size=32, learning_rate=5e-3)
    log = train(model, ruled_pairs(800, 1), reward_objective(), config)
    assert log[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[1]["rewards/accuracies"] == 0.5
    with torch.no_grad():
        loss, metrics = loss_and_metrics(model, ruled_pairs(400, 2))
    # Measured with two seeds: accuracies above 0.99, losses below 0.15.
    assert metrics["rewards/accuracies"].mean() > 0.95 and loss / 400 < 0.25


def test_the_reward_loss_is_that_of_each_pair_alone(gpt2):
    scalar, pairs = awake(ScalarModel(gpt2)), random_pairs(5)
    chosen = sequence_rewards(scalar, [(p.prompt_ids, p.chosen_ids) for p in pairs])
    rejected = sequence_rewards(scalar, [(p.prompt_ids, p.rejected_ids) for p in pairs])
    loss, metrics = loss_and_metrics(scalar, pairs)
    by_hand = -(chosen.exp() / (chosen.exp() + rejected.exp())).log().sum()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert torch.equal(metrics["rewards/accuracies"], (chosen > rejected).float())


def test_a_completion_in_several_pairs_is_read_once(gpt2):
    scalar = awake(ScalarModel(gpt2.double()))
    one = random_pairs(1)[0]
    pairs = [
        one,
        TokenizedPair(one.prompt_ids, one.chosen_ids, [5, 6, 0]),
        TokenizedPair(one.prompt_ids, [5, 6, 0], one.rejected_ids),
    ]
    rows = []
    hook = scalar.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    whole, _ = loss_and_metrics(scalar, pairs)
    assert rows == [3]
    hook.remove()
    alone = sum(loss_and_metrics(scalar, [pair])[0] for pair in pairs)
    assert abs(whole - alone) < 1e-10


def test_micro_batches_train_the_same_reward_model(gpt2):
    gpt2.double()
    trained = []
    for size in (None, 3):
        model = ScalarModel(gpt2)
        config = TrainingConfig(steps=3, batch_size=8, micro_batch_size=size, learning_rate=1e-3)
        log = train(model, random_pairs(20), reward_objective(), config)
        trained.append((log, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert (trained[0][1] - trained[1][1]).abs().max() < 1e-8
    for whole, parts in zip(*(log for log, _ in trained)):
        assert whole == pytest.approx(parts, abs=1e-8)


def test_a_normalised_reward_has_mean_0_and_deviation_1_over_the_references():
    seen, new = [1.0, 2.0, 6.0, 7.0], [4.0, 9.0]
    reward = normalised(lambda completions: torch.tensor(completions), seen)
    assert reward(seen).mean().abs() < 1e-6 and abs(reward(seen).std() - 1) < 1e-6
    assert torch.allclose(reward(new), (torch.tensor(new) - 4.0) / torch.tensor(seen).std())


def test_best_of_takes_each_prompts_highest():
    samples = [[3.0, 5.0, 4.0], [9.0], [-1.0, -2.0]]
    asked = []

    def reward(completions):
        asked.append(len(completions))
        return torch.tensor(completions)

    assert best_of(samples, reward) == [5.0, 9.0, -1.0] and asked == [6]


# --- the parts of a policy gradient ---


def seen(seed=0):
    """A rollout over rows of unequal lengths, with nonsense where there is no completion token."""
    batch, (n, length) = collate(ROWS), collate(ROWS).input_ids[:, 1:].shape
    mask = batch.completion_mask[:, 1:]
    tensors = [normal(n, length, seed=seed + k) for k in (1, 2)]
    return Rollout(batch, mask, normal(n, seed=seed), *tensors)


def test_the_kl_of_a_rollout_is_the_log_ratio_of_its_completions():
    found = seen()
    for row, (prompt, completion) in enumerate(ROWS):
        own = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        expected = (found.logps - found.reference_logps)[row, own].sum()
        assert abs(found.kl[row] - expected) < 1e-12


def test_token_rewards_pay_the_score_at_the_last_token():
    found, beta = seen(), 0.3
    rewards = token_rewards(found, beta)
    assert (rewards.sum(1) - (found.scores - beta * found.kl)).abs().max() < 1e-12
    for row, (prompt, completion) in enumerate(ROWS):
        first, end = len(prompt) - 1, len(prompt) + len(completion) - 1
        penalties = -beta * (found.logps - found.reference_logps)[row, first:end]
        penalties[-1] += found.scores[row]
        assert (rewards[row, first:end] - penalties).abs().max() < 1e-12
        assert (rewards[row, :first] == 0).all() and (rewards[row, end:] == 0).all()


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (1.0, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    found = seen()
    rewards, values = normal(*found.mask.shape, seed=7), normal(*found.mask.shape, seed=8)
    advantages = gae(rewards, values, found.mask, gamma, lam)
    for row, (prompt, completion) in enumerate(ROWS):
        first, end = len(prompt) - 1, len(prompt) + len(completion) - 1
        v = [*values[row, first:end].tolist(), 0.0]
        r = rewards[row, first:end].tolist()
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [
            sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))
        ]
        assert advantages[row, first:end].tolist() == pytest.approx(expected, abs=1e-12)
        assert (advantages[row, :first] == 0).all() and (advantages[row, end:] == 0).all()


def test_gae_at_lambda_1_is_the_return_minus_the_value():
    found = seen()
    rewards, values = normal(*found.mask.shape, seed=7), normal(*found.mask.shape, seed=8)
    to_come = (rewards * found.mask).flip(1).cumsum(1).flip(1)
    expected = (to_come - values) * found.mask
    assert (gae(rewards, values, found.mask, 1.0, 1.0) - expected).abs().max() < 1e-12


def test_what_is_in_padding_and_prompt_changes_nothing():
    found = seen()
    other = found._replace(
        logps=torch.where(found.mask > 0, found.logps, 1e3),
        reference_logps=torch.where(found.mask > 0, found.reference_logps, -1e3),
    )
    values = normal(*found.mask.shape, seed=8)
    others = torch.where(found.mask > 0, values, 1e3)
    first, second = (
        whitened(gae(token_rewards(s, 0.3), v, s.mask), s.mask)
        for s, v in ((found, values), (other, others))
    )
    assert torch.equal(first, second) and torch.equal(found.kl, other.kl)


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens():
    found = seen()
    white = whitened(5 + 3 * found.logps, found.mask)
    tokens = white[found.mask > 0]
    assert abs(tokens.mean()) < 1e-12 and abs(tokens.var(unbiased=False) - 1) < 1e-6
    assert (white[found.mask == 0] == 0).all()


def test_leave_one_out_is_the_return_minus_the_others_mean():
    returns = normal(3, 4)
    advantages = leave_one_out(returns)
    for row in range(3):
        for i in range(4):
            others = [returns[row, j].item() for j in range(4) if j != i]
            expected = returns[row, i].item() - sum(others) / 3
            assert advantages[row, i].item() == pytest.approx(expected, abs=1e-12)
    assert advantages.mean(1).abs().max() < 1e-12


@pytest.mark.parametrize("n", [2, 3])
def test_leave_one_out_leaves_the_expected_gradient_as_it_is(n):
    """Every n-tuple of completions, each with its probability: no sampling error is left."""
    responses = exact.completions(3, 2)
    reference, rewards, beta = normal(len(responses), seed=1).log_softmax(-1), normal(7), 0.7
    logits = normal(len(exact.prefixes(responses)), 3, seed=2).requires_grad_()
    logps = exact.table_logps(logits, responses)
    goal = exact.objective(logps, reference, rewards, beta)
    (expected,) = torch.autograd.grad(goal, logits, retain_graph=True)
    every = torch.cartesian_prod(*[torch.arange(len(responses))] * n)
    returns = (rewards - beta * (logps - reference)).detach()
    chances = logps.detach()[every].sum(1).exp()

    def gradient(weights):
        surrogate = (chances * (weights * logps[every]).mean(1)).sum()
        return torch.autograd.grad(surrogate, logits, retain_graph=True)[0]

    assert (gradient(leave_one_out(returns[every])) - expected).abs().max() < 1e-12
    with_itself = returns[every] - returns[every].mean(1, keepdim=True)
    assert (gradient(with_itself) - expected).abs().max() > 1e-3  # shrunk by (n - 1) / n


def test_the_clipped_loss_is_ppos_case_by_case():
    clip, old = 0.2, torch.zeros(6, dtype=torch.float64)
    ratios = torch.tensor([0.5, 0.9, 1.5, 0.5, 1.1, 1.5], dtype=torch.float64)
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    logps = ratios.log().requires_grad_()
    loss = clipped_loss(logps, old, advantages, clip)
    assert loss.tolist() == pytest.approx([-1.0, -1.8, -2.4, 1.6, 2.2, 3.0])
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    # Nothing to gain: far up with a good token, far down with a bad one. Wrong moves are undone.
    assert gradient.tolist() == pytest.approx([-1.0, -1.8, 0.0, 0.0, 2.2, 3.0])


def test_the_clipped_loss_begins_as_the_policy_gradient():
    logps, advantages = normal(9).requires_grad_(), normal(9, seed=1)
    loss = clipped_loss(logps, logps.detach(), advantages, 0.2)
    assert torch.allclose(torch.autograd.grad(loss.sum(), logps)[0], -advantages)


def test_the_clipped_value_loss_is_the_worse_of_two():
    old, returns = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    values = torch.tensor([0.1, 0.5, -0.5, 3.0], dtype=torch.float64, requires_grad=True)
    loss = clipped_value_loss(values, old, returns, 0.2)
    assert loss.tolist() == pytest.approx([0.9**2 / 2, 0.8**2 / 2, 1.5**2 / 2, 2.0**2 / 2])
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == pytest.approx([-0.9, 0.0, -1.5, 2.0])


def test_beta_follows_the_kl_by_a_fifth_at_most():
    assert adapted_beta(0.5, 1.1, 1.0, 1.0) == pytest.approx(0.55)
    assert adapted_beta(0.5, 0.9, 1.0, 1.0) == pytest.approx(0.45)
    assert adapted_beta(0.5, 100.0, 1.0, 1.0) == pytest.approx(0.6)
    assert adapted_beta(0.5, -3.0, 1.0, 0.1) == pytest.approx(0.49)
    assert adapted_beta(0.5, 1.0, 1.0, 1.0) == 0.5


# --- a world of 15 completions for each of two prompts ---

PROMPTS = {"": [0], "a b": [0, 1, 2]}  # of unequal lengths: sampling pads left, training right
RESPONSES = exact.completions(3, 3)
PLACE = {y: i for i, y in enumerate(RESPONSES)}
BETA = 1.0


@pytest.fixture(scope="module")
def words():
    vocabulary = {"<eos>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>")


@torch.no_grad()
def world_logps(model):
    """log pi(y | x) of every completion, a row for each prompt."""
    rows = [(prompt, list(y)) for prompt in PROMPTS.values() for y in RESPONSES]
    return sequence_logps(model, *collate(rows)).double().view(len(PROMPTS), -1)


@pytest.fixture
def world():
    seed = 4  # of rewards within what so small a model can express, and a far optimum
    torch.manual_seed(seed)
    policy = make_gpt2(vocabulary=3, width=16, layers=1, context=8)
    reference = copy.deepcopy(policy)
    rewards = normal(len(PROMPTS), len(RESPONSES), seed=seed)
    table = dict(zip(PROMPTS, rewards))

    def reward(completions):
        return torch.stack([table[c.prompt][PLACE[tuple(c.ids)]] for c in completions])

    logps = world_logps(reference)
    optimum = torch.stack([exact.optimal_policy(row, r, BETA) for row, r in zip(logps, rewards)])
    return SimpleNamespace(
        policy=policy, reference=reference, value=ScalarModel(policy), reward=reward,
        rewards=rewards, reference_logps=logps, optimum=optimum,
    )  # fmt: skip


def distance(world):
    """The larger of the two prompts' total variations from pi*."""
    return max(map(exact.total_variation, world_logps(world.policy), world.optimum)).item()


CONFIG = PolicyGradientConfig(
    batch_size=256, samples=128, minibatch_size=128, learning_rate=1e-2, beta=BETA, max_new_tokens=3
)


def test_a_rollout_holds_what_policy_and_reference_say_of_its_completions(world, words):
    with torch.no_grad():
        world.policy.lm_head.weight.mul_(1.5)
    found = rollout(world.policy, world.reference, words, list(PROMPTS), world.reward, 50, 3, 0)
    policy, reference = world_logps(world.policy), world_logps(world.reference)
    lengths = set()
    for row in range(100):
        x = row // 50
        prompt = list(PROMPTS.values())[x]
        length = found.batch.attention_mask[row].sum()
        ids = found.batch.input_ids[row, :length].tolist()
        assert ids[: len(prompt)] == prompt
        y = PLACE[tuple(ids[len(prompt) :])]
        lengths.add(len(RESPONSES[y]))
        total = (found.logps * found.mask)[row].sum()
        assert abs(total - policy[x, y]) < 1e-5
        assert abs(found.kl[row] - (policy - reference)[x, y]) < 1e-5
        assert abs(found.scores[row] - world.rewards[x, y]) < 1e-6
    assert lengths == {1, 2, 3} and not found.logps.requires_grad


def caught_gradients(monkeypatch):
    """The policy's gradient at each update, which then does not take place."""
    caught = []

    def catch(optimizer, number, config):
        parameters = optimizer.param_groups[0]["params"]
        caught.append([p.grad.clone() for p in parameters if p.grad is not None])
        optimizer.zero_grad()

    monkeypatch.setattr(rlhf, "update", catch)
    return caught


def gradient_of(policy, weighted):
    """Of the sum of weight * log pi(y_t | x, y_<t), one unpadded token after the other."""
    total = 0.0
    for prefix, token, weight in weighted:
        logits = policy(torch.tensor([prefix])).logits[0, -1]
        total = total + weight * logits.log_softmax(-1)[token]
    return torch.autograd.grad(total, list(policy.parameters()))


def unfolded(found):
    """(row, prefix, token, entry) of every completion token of a rollout."""
    for row, entry in found.mask.nonzero().tolist():
        ids = found.batch.input_ids[row].tolist()
        yield row, ids[: entry + 1], ids[entry + 1], entry


def close(gradients, expected):
    return all(torch.allclose(g, e, atol=1e-5) for g, e in zip(gradients, expected))


def first_rollout(world, words, n_prompts, n):
    world.policy = copy.deepcopy(world.policy)
    with torch.no_grad():
        world.policy.lm_head.weight.mul_(1.5)  # away from the reference, so that the KL counts
    prompts = list(PROMPTS)[:1]
    return prompts, rollout(
        world.policy, world.reference, words, prompts * n_prompts, world.reward, n, 3, 1
    )


def test_reinforce_steps_along_advantage_times_score(world, words, monkeypatch):
    prompts, found = first_rollout(world, words, 1, 6)
    caught = caught_gradients(monkeypatch)
    config = dataclasses.replace(
        CONFIG, steps=1, batch_size=6, samples=6, beta=0.4, max_grad_norm=1e9
    )
    args = world.policy, world.reference, words, prompts, world.reward
    reinforce(*args, config)
    returns = (found.scores - 0.4 * found.kl).tolist()
    weights = [r - (sum(returns) - r) / 5 for r in returns]
    expected = gradient_of(
        world.policy, [(x, y, -weights[row] / 6) for row, x, y, _ in unfolded(found)]
    )
    assert close(caught[0], expected)
    reinforce(*args, dataclasses.replace(config, max_grad_norm=0.01))
    assert torch.cat([g.flatten() for g in caught[1]]).norm() == pytest.approx(0.01, rel=1e-3)


def test_the_first_step_of_ppo_is_a_policy_gradient_too(world, words, monkeypatch):
    """The value is 0 at first: an advantage is the discounted sum of what is still to come."""
    prompts, found = first_rollout(world, words, 6, 1)
    caught = caught_gradients(monkeypatch)
    config = dataclasses.replace(
        CONFIG, steps=1, batch_size=6, minibatch_size=6, epochs=1, beta=0.4, max_grad_norm=1e9
    )
    args = world.policy, world.reference, world.value, words, prompts, world.reward
    ppo(*args, config)
    tokens = list(unfolded(found))
    advantages = []
    for row, _, _, entry in tokens:
        end = found.mask[row].nonzero().max().item()
        ratios = (found.logps - found.reference_logps)[row]
        rewards = [-0.4 * ratios[t].item() for t in range(entry, end + 1)]
        rewards[-1] += found.scores[row].item()
        advantages.append(sum(0.95**k * r for k, r in enumerate(rewards)))
    mean = sum(advantages) / len(tokens)
    deviation = (sum((a - mean) ** 2 for a in advantages) / len(tokens)) ** 0.5
    weights = [(a - mean) / deviation / len(tokens) for a in advantages]
    expected = gradient_of(world.policy, [(x, y, -w) for w, (_, x, y, _) in zip(weights, tokens)])
    assert close(caught[0][: len(expected)], expected)


def test_the_rate_warms_up_as_in_the_training_loop():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    config = PolicyGradientConfig(warmup_steps=3, learning_rate=0.5)
    same = TrainingConfig(warmup_steps=3, learning_rate=0.5, schedule="constant")
    for number in range(1, 7):
        rlhf.update(optimizer, number, config)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(number - 1, same))


def test_the_log_says_what_was_sampled_and_calls_the_monitor(world, words):
    calls = []

    def monitor(policy, log):
        assert policy is world.policy
        calls.append(log[-1]["step"])
        return {"watched": len(calls)}

    config = dataclasses.replace(CONFIG, steps=3, batch_size=8, samples=4, monitor_every=2)
    args = world.reference, words, list(PROMPTS), world.reward, config
    log = reinforce(world.policy, *args, monitor)
    assert calls == [0, 2, 3] and [row.get("watched") for row in log] == [1, None, 2, 3]
    assert abs(log[1]["sampled_kl"]) < 1e-5 and log[1]["beta"] == BETA
    for row in log[1:]:
        expected = row["score"] - BETA * row["sampled_kl"]
        assert row["objective"] == pytest.approx(expected)
    again = reinforce(copy.deepcopy(world.reference), *args)
    assert [row.get("score") for row in again] == [row.get("score") for row in log]


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_a_loss_that_is_no_number_stops_it_before_the_step(method, world, words):
    config = dataclasses.replace(CONFIG, steps=3, batch_size=8, minibatch_size=8, samples=4)
    before = [p.clone() for p in world.policy.parameters()]

    def reward(completions):
        return torch.full((len(completions),), math.nan)

    value = (world.value,) if method == "ppo" else ()
    with pytest.raises(TrainingError, match="step 1: the loss is nan.*ten times smaller"):
        getattr(rlhf, method)(
            world.policy, world.reference, *value, words, list(PROMPTS), reward, config
        )
    assert all(torch.equal(p, q) for p, q in zip(world.policy.parameters(), before))


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_models_in_train_mode_are_put_into_evaluation_mode(method, world, words):
    config = dataclasses.replace(CONFIG, steps=2, batch_size=8, minibatch_size=8, samples=4)

    def run(noisy):
        policy, reference, value = (
            copy.deepcopy(model) for model in (world.policy, world.reference, world.value)
        )
        for model in (policy, reference, value) if noisy else ():
            for module in model.train().modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.5
        models = (policy, reference, value) if method == "ppo" else (policy, reference)
        return getattr(rlhf, method)(*models, words, list(PROMPTS), world.reward, config)

    assert run(noisy=True) == run(noisy=False)


def test_a_baseline_of_others_needs_others(world, words):
    for batch_size, samples in ((8, 1), (9, 4), (2, 4)):
        config = dataclasses.replace(CONFIG, steps=1, batch_size=batch_size, samples=samples)
        with pytest.raises(TrainingError, match="samples"):
            reinforce(world.policy, world.reference, words, [""], world.reward, config)


def run_reinforce(world, words, seed=0, beta=BETA):
    for part, (steps, rate) in enumerate(((14, 1e-2), (10, 3e-3))):
        config = dataclasses.replace(
            CONFIG, steps=steps, learning_rate=rate, seed=10 * seed + part, beta=beta
        )
        reinforce(world.policy, world.reference, words, list(PROMPTS), world.reward, config)


def run_ppo(world, words, seed=0, beta=BETA):
    for part, (steps, rate) in enumerate(((18, 1e-2), (12, 3e-3))):
        config = dataclasses.replace(
            CONFIG, steps=steps, learning_rate=rate, seed=10 * seed + part, beta=beta
        )
        models = world.policy, world.reference, world.value
        ppo(*models, words, list(PROMPTS), world.reward, config)


# Total variations measured with six seeds, from 0.41 at the start: REINFORCE 0.03 to 0.07, PPO 0.08
# to 0.11. Without the penalty or against the advantage it ends above 0.7.
NEAR = 0.15


@pytest.mark.parametrize("run", [run_reinforce, run_ppo])
def test_sampling_leads_to_the_optimum(run, world, words):
    assert distance(world) > 2 * NEAR  # 0.41
    run(world, words)
    assert distance(world) < NEAR


@pytest.mark.parametrize("run", [run_reinforce, run_ppo])
def test_without_the_penalty_it_leads_elsewhere(run, world, words):
    run(world, words, beta=0.0)
    assert distance(world) > 2 * NEAR


@pytest.mark.parametrize("run, name", [(run_reinforce, "leave_one_out"), (run_ppo, "gae")])
def test_against_the_advantage_it_leads_elsewhere(run, name, world, words, monkeypatch):
    right = getattr(rlhf, name)
    monkeypatch.setattr(rlhf, name, lambda *args: -right(*args))
    run(world, words)
    assert distance(world) > 2 * NEAR


def test_the_value_learns_what_is_still_to_come(world, words):
    """With a policy that stays the reference the KL is 0, and the value of the tokens so far is
    the mean reward of the completions that begin so.
    """
    world.policy.requires_grad_(False)
    config = dataclasses.replace(CONFIG, steps=20, clip=10.0)
    args = world.reference, world.value, words, list(PROMPTS), world.reward
    ppo(world.policy, *args, config)
    errors, spread = [], []
    for x, prompt in enumerate(PROMPTS.values()):
        for start in exact.prefixes(RESPONSES):
            under = torch.tensor([y[: len(start)] == start for y in RESPONSES])
            weights = world.reference_logps[x][under].exp()
            expected = (weights * world.rewards[x][under]).sum() / weights.sum()
            ids = torch.tensor([[*prompt, *start]])
            value = world.value(ids, torch.ones_like(ids))[0, -1].double().item()
            errors.append(weights.sum() * (value - expected) ** 2)
            spread.append(weights.sum() * expected**2)
    assert sum(errors) < 0.1 * sum(spread)  # measured: 0.03; one token off: 0.42


def test_a_target_draws_the_kl_to_it(world, words):
    config = dataclasses.replace(
        CONFIG, steps=50, batch_size=128, learning_rate=5e-3, beta=0.2, target_kl=0.3, kl_gain=0.5
    )
    models = world.policy, world.reference, world.value
    log = ppo(*models, words, list(PROMPTS), world.reward, config)
    kls = [row["sampled_kl"] for row in log[1:]]
    assert max(kls) > 0.8  # where the first, small beta had led
    # Six seeds of such a run: 0.24 to 0.34. With beta kept at 0.2 it ends near 3.
    assert 0.18 < sum(kls[-20:]) / 20 < 0.42
    assert log[-1]["beta"] > 2 * 0.2


def test_picked_samples_follow_the_exact_law_of_best_of_n(world, words):
    draws, n = 1500, 4
    samples = rlhf.sample_completions(world.reference, words, [""], draws * n, 3, seed=1)[0]
    picked = best_of([samples[i : i + n] for i in range(0, draws * n, n)], world.reward)
    observed = torch.bincount(
        torch.tensor([PLACE[tuple(c.ids)] for c in picked]), minlength=len(RESPONSES)
    )

    def chi_square(law):
        expected = law.exp() * draws
        enough = expected >= 5
        pairs = [(observed[enough], expected[enough])]
        pairs.append((observed[~enough].sum()[None], expected[~enough].sum()[None]))
        return sum(((o - e) ** 2 / e.clamp(min=1)).sum().item() for o, e in pairs)

    limit = 14 + 4 * (2 * 14) ** 0.5
    reference, rewards = world.reference_logps[0], world.rewards[0]
    assert chi_square(exact.best_of_n(reference, rewards, n)) < limit
    assert chi_square(exact.best_of_n(reference, rewards, n // 2)) > 2 * limit
    assert chi_square(exact.best_of_n(reference, -rewards, n)) > 2 * limit
