"""Making preference data: prompts, labels, noise, filters, agreement, other tools' formats."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_mini.data import DataError, PreferencePair, answer_to, as_text
from dpo_mini.sampling import sample_completions
from dpo_mini.tokens import tokenizer_fingerprint

CUT_CHARACTER = "\ufffd"  # what bytes that are no whole character are decoded as


def prefixes(
    texts: Sequence[str], tokenizer, n: int, low: int = 2, high: int = 8, seed: int = 0
) -> list[str]:
    """Prompts: the first `low` to `high` tokens of `n` texts (Rafailov et al. 2023, C.1).

    A character of several tokens is never cut: the prompt then has as many tokens as it needs.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for i in torch.randperm(len(texts), generator=generator).tolist()[:n]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        ids = tokenizer(texts[i][:200], add_special_tokens=False)["input_ids"]
        prompt = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
        while prompt.endswith(CUT_CHARACTER) and length < len(ids):
            length += 1
            prompt = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
        prompts.append(prompt)
    return prompts


def sampled_pairs(
    model, tokenizer, prompts, reward, n=4, max_new_tokens=40, labels="best", seed=0,
    progress=False, bf16=False,
):  # fmt: skip
    """Sample `n` completions of each prompt, label all their pairs: (pairs, exact ties dropped)."""
    samples = sample_completions(
        model, tokenizer, prompts, n, max_new_tokens, seed=seed, progress=progress, bf16=bf16
    )
    return labelled_pairs(samples, reward, labels, seed, tokenizer)


def labelled_pairs(samples, reward, labels="best", seed=0, tokenizer=None):
    """All pairs of each prompt's completions, labelled by `reward` (texts -> tensor [texts])."""
    rewards = reward([c.full_text for row in samples for c in row])
    return pairs_from_samples(samples, rewards, labels, seed, tokenizer)


def pairs_from_samples(
    samples, rewards: Tensor, labels: str = "best", seed: int = 0, tokenizer=None
) -> tuple[list[PreferencePair], int]:
    """All pairs of each prompt's completions, labelled by reward: (pairs, exact ties dropped).

    `samples`: for each prompt its completions (as from `sample_completions`); `rewards`: their
    logits in the same order, flat. `labels`: "best" prefers the higher reward, "bradley-terry" as
    in `draw_labels`. `tokenizer`: whose ids the samples are; the pairs then carry its name.
    """
    pairs, ties, scores = [], 0, iter(rewards.tolist())
    fingerprint = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    for completions in samples:
        scored = [(c, next(scores)) for c in completions]
        for (a, reward_a), (b, reward_b) in itertools.combinations(scored, 2):
            if reward_a == reward_b or a.ids == b.ids:
                ties += 1
                continue
            (w, reward_w), (l, reward_l) = sorted(
                [(a, reward_a), (b, reward_b)], key=lambda one: -one[1]
            )
            answers = (answer_to(a.prompt, completion.text) for completion in (w, l))
            ids, logits = (a.prompt_ids, w.ids, l.ids), (round(reward_w, 4), round(reward_l, 4))
            pairs.append(PreferencePair(a.prompt, *answers, *ids, *logits, fingerprint))
    return (draw_labels(pairs, seed) if labels == "bradley-terry" else pairs), ties


def draw_labels(pairs: Sequence[PreferencePair], seed: int = 0) -> list[PreferencePair]:
    """Each winner drawn with probability sigmoid(difference of rewards), as a person with that
    reward would choose (Bradley and Terry 1952).
    """
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.tensor([reward_gap(pair) for pair in pairs])
    stays = (torch.rand(len(pairs), generator=generator) < gaps.sigmoid()).tolist()
    return [pair if stay else swapped(pair) for pair, stay in zip(pairs, stays)]


def swapped(pair: PreferencePair) -> PreferencePair:
    """The pair with the opposite label."""
    return replace(
        pair,
        chosen=pair.rejected, rejected=pair.chosen,
        chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids,
        chosen_reward=pair.rejected_reward, rejected_reward=pair.chosen_reward,
    )  # fmt: skip


def flip_labels(
    pairs: Sequence[PreferencePair], rate: float, seed: int = 0
) -> list[PreferencePair]:
    """Each label is turned round with probability `rate`, independently of the others."""
    generator = torch.Generator().manual_seed(seed)
    flips = (torch.rand(len(pairs), generator=generator) < rate).tolist()
    return [swapped(pair) if flip else pair for pair, flip in zip(pairs, flips)]


def relabel(
    pairs: Sequence[PreferencePair], reward: Callable[[list[str]], Tensor]
) -> list[PreferencePair]:
    """The same comparisons decided by another `reward` (texts -> tensor [texts]); ties dropped."""
    wholes = [[as_text(p.prompt + y) for y in (p.chosen, p.rejected)] for p in pairs]
    texts = sorted({text for whole in wholes for text in whole})
    scores = {text: round(score, 4) for text, score in zip(texts, reward(texts).tolist())}
    scored = [
        replace(pair, chosen_reward=scores[chosen], rejected_reward=scores[rejected])
        for pair, (chosen, rejected) in zip(pairs, wholes)
    ]
    decided = [pair for pair in scored if pair.chosen_reward != pair.rejected_reward]
    return [
        pair if pair.chosen_reward > pair.rejected_reward else swapped(pair) for pair in decided
    ]


def reward_gap(pair: PreferencePair) -> float:
    """By how much the chosen completion's reward is the higher one, in logits.

    Raises DataError for a pair without rewards: nobody knows how clear its label is.
    """
    if pair.chosen_reward is None or pair.rejected_reward is None:
        raise DataError(
            "the pair has no chosen_reward and rejected_reward, so its gap is unknown: label with "
            "a reward (dpo-mini pairs does), or do without this filter."
        )
    return pair.chosen_reward - pair.rejected_reward


def clear_pairs(pairs: Sequence[PreferencePair], gap: float) -> list[PreferencePair]:
    """The pairs whose rewards differ by at least `gap` logits."""
    return [pair for pair in pairs if reward_gap(pair) >= gap]


def best_and_worst(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """One pair of each prompt: the one with the widest gap."""
    widest: dict[str, PreferencePair] = {}
    for pair in pairs:
        prompt = as_text(pair.prompt)
        if prompt not in widest or reward_gap(pair) > reward_gap(widest[prompt]):
            widest[prompt] = pair
    return list(widest.values())


def similarity(a: str, b: str) -> float:
    """Shared over all different words of two texts (Jaccard 1901): 1 for the same words."""
    one, other = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return len(one & other) / len(one | other) if one | other else 1.0


def without_near_duplicates(
    pairs: Sequence[PreferencePair], most: float = 0.7
) -> list[PreferencePair]:
    """Without pairs whose two completions share more than `most` of their words, and without a
    comparison that came before: both teach little, and a repeated one is learned by heart.
    """
    seen, kept = set(), []
    for pair in pairs:
        chosen, rejected = as_text(pair.chosen), as_text(pair.rejected)
        comparison = (as_text(pair.prompt), frozenset((chosen, rejected)))
        if comparison not in seen and similarity(chosen, rejected) <= most:
            kept.append(pair)
        seen.add(comparison)
    return kept


def cohens_kappa(a: Sequence, b: Sequence) -> float:
    """Agreement of two labellers beyond chance: 1 always, 0 as often as chance would (Cohen 1960).

    (p_o - p_e) / (1 - p_e), with p_o how often they agree and p_e how often two labellers with
    these frequencies of labels would agree by chance. Raises DataError for unequal lengths.
    """
    if len(a) != len(b) or not len(a):
        raise DataError(f"kappa compares labels one by one; got {len(a)} and {len(b)} of them.")
    observed = sum(x == y for x, y in zip(a, b)) / len(a)
    frequency = [{x: list(labels).count(x) / len(labels) for x in set(labels)} for labels in (a, b)]
    chance = sum(p * frequency[1].get(x, 0.0) for x, p in frequency[0].items())
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def conversational(pair: PreferencePair) -> dict:
    """The pair as lists of messages, TRL's conversational preference format."""
    if not isinstance(pair.prompt, str):
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def llama_factory(pair: PreferencePair) -> dict:
    """The pair as a row of LLaMA-Factory's Alpaca preference format (`"ranking": true`)."""
    return {
        "instruction": as_text(pair.prompt),
        "input": "",
        "chosen": as_text(pair.chosen),
        "rejected": as_text(pair.rejected),
    }
