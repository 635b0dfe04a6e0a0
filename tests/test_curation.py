"""Labels, noise, filters, agreement, formats."""

import json
from dataclasses import replace

import pytest
import torch

from dpo_mini import curation
from dpo_mini.data import DataError, PreferencePair, preference_pairs
from dpo_mini.sampling import Completion
from dpo_mini.tokens import tokenizer_fingerprint

PAIR = PreferencePair("A film", " that shines", " that sinks", [0], [1, 2], [3], 1.5, -0.5)


def many(n=2000):
    return [
        replace(PAIR, prompt=f"film {i // 6}", chosen=f" good {i}", rejected=f" bad {i}",
                chosen_reward=i % 7 / 2, rejected_reward=-0.25)
        for i in range(n)
    ]  # fmt: skip


def test_swapping_moves_text_ids_and_rewards_together():
    other = curation.swapped(PAIR)
    assert (other.chosen, other.chosen_ids, other.chosen_reward) == (" that sinks", [3], -0.5)
    assert curation.swapped(other) == PAIR


def test_flipped_labels_are_flipped_at_their_rate():
    pairs = many()
    for rate in (0.0, 0.25, 1.0):
        after = curation.flip_labels(pairs, rate, seed=3)
        turned = sum(a != b for a, b in zip(pairs, after)) / len(pairs)
        assert abs(turned - rate) < 4 * (rate * (1 - rate) / len(pairs)) ** 0.5 + 1e-12
        assert all(b in (a, curation.swapped(a)) for a, b in zip(pairs, after))


def test_bradley_terry_labels_turn_as_often_as_the_gaps_say():
    pairs = many(6000)
    expected = torch.tensor([-curation.reward_gap(p) for p in pairs]).sigmoid().mean().item()
    turned = sum(a != b for a, b in zip(pairs, curation.draw_labels(pairs, seed=1))) / len(pairs)
    assert abs(turned - expected) < 4 * 0.5 / len(pairs) ** 0.5


def test_another_reward_decides_again_and_ties_are_dropped():
    shorter = lambda texts: torch.tensor([-float(len(t)) for t in texts])  # noqa: E731
    (pair,) = curation.relabel([PAIR, replace(PAIR, rejected=" that charms")], shorter)
    assert pair.chosen == " that sinks" and pair.chosen_reward == -17 and pair.chosen_ids == [3]


def test_filters_keep_what_they_name():
    pairs = many(60)
    assert {curation.reward_gap(p) >= 1 for p in curation.clear_pairs(pairs, 1.0)} == {True}
    widest = curation.best_and_worst(pairs)
    assert len(widest) == len({p.prompt for p in pairs}) == 10
    for pair in widest:
        rivals = [curation.reward_gap(p) for p in pairs if p.prompt == pair.prompt]
        assert curation.reward_gap(pair) == max(rivals)
    with pytest.raises(DataError, match="without this filter"):
        curation.clear_pairs([PreferencePair("a", "b", "c")], 1.0)


def test_near_duplicates_and_repeats_are_dropped_once():
    near = replace(PAIR, rejected=" that shines brightly")
    assert curation.without_near_duplicates([near]) == [near]  # 2 of 3 words
    assert curation.without_near_duplicates([near], most=0.6) == []
    assert curation.without_near_duplicates([PAIR, curation.swapped(PAIR), PAIR]) == [PAIR]
    assert curation.similarity("A b!", "b a") == 1 and curation.similarity("a", "b") == 0


def test_kappa_is_cohens():
    # 20 both yes, 15 both no, 5 and 10 apart: p_o = 0.7, p_e = 0.5
    a = [1] * 25 + [0] * 25
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert curation.cohens_kappa(a, b) == pytest.approx(0.4)
    assert curation.cohens_kappa(a, a) == 1 and curation.cohens_kappa([1, 1], [1, 1]) == 1
    assert curation.cohens_kappa([0, 1] * 50, [0, 0, 1, 1] * 25) == pytest.approx(0)
    assert curation.cohens_kappa([0, 1], [1, 0]) == -1
    with pytest.raises(DataError, match="2 and 1"):
        curation.cohens_kappa([0, 1], [1])


def test_formats_keep_every_text():
    row = json.loads(json.dumps(curation.conversational(PAIR)))
    assert row["prompt"][0] == {"role": "user", "content": "A film"}
    assert row["rejected"][0] == {"role": "assistant", "content": " that sinks"}
    row = curation.llama_factory(PAIR)
    assert (row["instruction"], row["chosen"]) == ("A film", " that shines")


def test_trl_reads_the_conversational_format():
    pytest.importorskip("trl")
    from trl import is_conversational

    assert is_conversational(curation.conversational(PAIR))


def test_conversations_come_back_as_pairs():
    (pair,) = preference_pairs([curation.conversational(PAIR)])
    assert curation.conversational(pair) == curation.conversational(PAIR)
    (pair,) = preference_pairs([curation.llama_factory(PAIR)])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("A film", " that shines", " that sinks")


def test_filters_read_conversations_too():
    (pair,) = preference_pairs([curation.conversational(PAIR)])
    pair = replace(pair, chosen_reward=1.0, rejected_reward=0.0)
    assert curation.best_and_worst([pair]) == curation.without_near_duplicates([pair, pair])
    (again,) = curation.relabel([pair], lambda texts: torch.tensor([len(t) for t in texts]) + 0.0)
    assert again.prompt == pair.prompt and again.chosen == pair.chosen


def test_prefixes_never_cut_a_character(tokenizer):
    texts = ["这部电影很好看，我喜欢它。", "とても面白い映画でした。"]
    texts += ["👩‍👧 émigré", "a plain text"]
    for n in (1, 2, 3):
        prompts = curation.prefixes(texts, tokenizer, 4, low=n, high=n)
        for prompt in prompts:
            assert prompt and "\ufffd" not in prompt
            assert any(text.startswith(prompt) for text in texts)


def test_prefixes_of_plain_text_are_its_first_tokens(tokenizer):
    texts = [f"A film number {i} that nobody has seen but me." for i in range(40)]
    for prompt in curation.prefixes(texts, tokenizer, 40):
        (text,) = [t for t in texts if t.startswith(prompt)][:1]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        n = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert 2 <= n <= 8 and tokenizer.decode(ids[:n]) == prompt


def test_pairs_of_samples_say_whose_ids_they_are(tokenizer):
    samples = [[Completion("p", text, [0], [i]) for i, text in enumerate(("a", "b"), start=1)]]
    rewards = torch.tensor([0.0, 1.0])
    ((pair,), _) = curation.pairs_from_samples(samples, rewards, tokenizer=tokenizer)
    assert pair.tokenizer == tokenizer_fingerprint(tokenizer)
    assert curation.swapped(pair).tokenizer == pair.tokenizer
    chat = [[replace(c, prompt=[{"role": "user", "content": "p"}]) for c in samples[0]]]
    ((pair,), _) = curation.pairs_from_samples(chat, torch.tensor([0.0, 1.0]))
    assert pair.chosen == [{"role": "assistant", "content": "b"}] and pair.tokenizer is None
