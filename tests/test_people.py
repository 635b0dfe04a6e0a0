"""Labels by people: the page, its file, agreement, ties and graded labels, other people's verdicts,
and a model as judge.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch

from dpo_mini import exact
from dpo_mini.course import labels as people
from dpo_mini.course.labelling import KEYS, labelling_page
from dpo_mini.data import DataError, PreferencePair, preference_pairs, read_rows
from dpo_mini.family import davidson_loss, offset_loss, rao_kupper_loss, soft_label_loss
from dpo_mini.losses import PairLogps, cdpo_loss, dpo_loss
from dpo_mini.reference import reference_logps
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import TokenizedPair
from dpo_mini.training import graded_objective, train


def tiny_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


PAIRS = [PreferencePair(f"Film {i}", f" good{i}", f" bad{i}", [1], [i + 5], [i + 99], 1.0, 0.0)
         for i in range(30)]  # fmt: skip
KEY = {verdict: key for key, verdict in KEYS.items()}


def page_of(tmp_path, pairs=PAIRS, **options):
    return labelling_page(pairs, tmp_path / "mine.jsonl", **{"least_seconds": 0, **options})


def side_of(page, word):
    """The key of the side on which the text with that word stands."""
    text = page.box.children[0].value
    return (
        KEY["left"] if text.index("<td") < text.index(word) < text.rindex("<td") else KEY["right"]
    )


def test_showings_are_shuffled_and_repeated_the_other_way_round_later():
    shown = people.showings(PAIRS, every=6, apart=8, seed=3)
    first = {s.item: (i, s) for i, s in enumerate(shown) if not s.repeat}
    again = [(i, s) for i, s in enumerate(shown) if s.repeat]
    assert len(first) == 30 and len(again) >= 4 and len({s.item for _, s in again}) == len(again)
    for i, s in again:
        place, before = first[s.item]
        assert i - place >= 8 and s.first_is_left != before.first_is_left
    sides = [s.first_is_left for _, s in first.values()]
    assert 8 <= sum(sides) <= 22 and list(first) != sorted(first)
    assert shown == people.showings(PAIRS, seed=3) != people.showings(PAIRS, seed=4)


def test_the_page_saves_after_every_key_and_goes_on_where_it_was(tmp_path):
    page = page_of(tmp_path)
    path = tmp_path / "mine.jsonl"
    for n, verdict in enumerate(("left", "tie", "right", "skip", "right"), start=1):
        page.press(KEY[verdict])
        rows = read_rows(path)
        assert len(rows) == n and rows[-1]["verdict"] == verdict
    pairs = preference_pairs(read_rows(people.pairs_file(path)))  # the one door
    assert len(pairs) == 3 and pairs == people.labelled_pairs(page.labels, PAIRS)
    again = page_of(tmp_path)  # another kernel
    assert again.labels == page.labels and "Pair 6 of" in again.box.children[0].value
    again.press(KEY["undo"])
    assert len(read_rows(path)) == 4 and "Pair 5 of" in again.box.children[0].value
    for _ in range(9):
        again.press(KEY["undo"])
    assert not path.exists() and not people.pairs_file(path).exists() and not again.labels


def test_the_preferred_text_is_chosen_wherever_it_stands(tmp_path):
    page = page_of(tmp_path)
    total = len(people.showings(PAIRS))
    while len(page.labels) < total:
        page.press(side_of(page, "bad"))
    pairs = people.labelled_pairs(page.labels, PAIRS)
    assert len(pairs) == 30 and all("bad" in p.chosen and "good" in p.rejected for p in pairs)
    assert all(p.chosen_ids[0] >= 99 > p.rejected_ids[0] and p.chosen_reward is None for p in pairs)
    first, second = people.repeated(page.labels)
    assert first == second == ["second"] * len(first) and len(first) == total - 30
    assert {label.verdict for label in page.labels} == {"left", "right"}
    page.press(KEY["left"])
    assert len(page.labels) == total and "Done" in page.box.children[0].value


def test_one_who_always_presses_left_disagrees_with_the_repeats(tmp_path):
    page = page_of(tmp_path)
    for _ in people.showings(PAIRS):
        page.press(KEY["left"])
    first, second = people.repeated(page.labels)
    assert first and all(a != b for a, b in zip(first, second))


def test_a_key_that_comes_too_fast_or_is_unknown_changes_nothing(tmp_path):
    page = page_of(tmp_path, least_seconds=60)
    page.press(KEY["left"])
    page.press("x")
    assert not page.labels and not (tmp_path / "mine.jsonl").exists()
    assert "'x'" in page.box.children[3].value.replace("&#x27;", "'")


def test_the_keyboard_s_box_counts_one_key_of_several_that_came_at_once(tmp_path):
    page = page_of(tmp_path)
    keyboard = page.box.children[1]
    keyboard.value = "1"
    keyboard.value = "1222"  # three were pressed before the next pair was drawn
    keyboard.value = "122"  # backspace is no key
    assert [label.verdict for label in page.labels] == ["left", "right"]
    keyboard.value = "1220"
    assert [label.verdict for label in page.labels] == ["left"]


def test_nothing_in_a_text_runs_as_html(tmp_path):
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)></td></table>"
    page = page_of(tmp_path, [PreferencePair(bad, bad + "a", bad + "b")], question=bad)
    shown = page.box.children[0].value
    assert "<script" not in shown and "<img" not in shown and shown.count("</td>") == 2
    page.press(bad)
    assert "<script" not in page.box.children[3].value


def test_a_file_of_other_pairs_or_of_two_pages_is_refused_and_kept(tmp_path):
    page = page_of(tmp_path)
    page.press(KEY["left"])
    page.press(KEY["right"])
    path = tmp_path / "mine.jsonl"
    before = path.read_bytes()
    for pairs, seed in ((PAIRS, 1), (PAIRS[::-1], 0), (PAIRS[:1], 0)):
        with pytest.raises(DataError, match="line 1.*another pair|another pair"):
            page_of(tmp_path, pairs, seed=seed)
    other = page_of(tmp_path)
    other.press(KEY["tie"])
    page.press(KEY["left"])  # the first page knows nothing of it
    assert len(read_rows(path)) == 3 and len(page.labels) == 2
    assert "another page" in page.box.children[3].value
    path.write_bytes(
        before.replace(b'"left"}', b'"up"}').replace(b'"verdict": "left"', b'"verdict": "up"')
    )
    with pytest.raises(DataError, match="line 1: the verdict 'up'"):
        page_of(tmp_path)


def test_a_verdict_that_cannot_be_saved_is_not_counted(tmp_path):
    page = page_of(tmp_path / "folder that is not there")
    page.press(KEY["left"])
    assert not page.labels and "Nothing was saved" in page.box.children[3].value
    assert "Pair 1 of" in page.box.children[0].value


def test_agreement_has_its_n_its_chance_and_kappa():
    a, b = ["x", "x", "x", "y"] * 10, ["x", "x", "y", "y"] * 10
    found = people.agreement(a, b)
    assert found.n == 40 and found.share.mean == 0.75 and found.chance == pytest.approx(0.5)
    assert found.kappa.mean == pytest.approx(0.5)
    assert found.share.low < 0.75 < found.share.high and found.kappa.low < 0.5 < found.kappa.high
    grouped = people.agreement(a, b, groups=[0] * 20 + [1] * 10 + [2] * 10)
    assert grouped.share.mean == 0.75


def test_the_bootstrap_of_kappa_covers_the_truth():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(60):  # two labellers who each find the truth in 85 of 100 pairs
        truth = torch.rand(150, generator=generator) < 0.5
        a, b = (truth ^ (torch.rand(150, generator=generator) < 0.15) for _ in range(2))
        low, high = people.kappa_interval(a.tolist(), b.tolist(), range(150), seed, draws=300)
        covered += low <= 2 * (0.85**2 + 0.15**2) - 1 <= high
    assert 52 <= covered <= 60


# --- ties and graded labels ---

H = torch.tensor([-800.0, -30, -3, -0.7, 0, 0.2, 2, 30, 800], dtype=torch.float64)


def logps_of(gaps, beta):
    """Pairs whose difference of implicit rewards is `gaps`."""
    zeros = torch.zeros_like(gaps)
    chosen = (gaps / beta - 7).requires_grad_()
    return PairLogps(chosen, zeros - 4, zeros - 6, zeros - 3)


def probabilities(model, h, beta=0.3):
    """P(win), P(tie), P(loss) of a loss on ties, of gaps `h`."""
    yes, no = torch.ones_like(h, dtype=torch.bool), torch.zeros_like(h, dtype=torch.bool)
    losses = (model(logps_of(h, beta), no), model(logps_of(h, beta), yes))
    losses = (*losses, model(logps_of(-h, beta), no))
    return tuple((-loss).exp().detach() for loss in losses)


MODELS = {
    "rao-kupper": lambda l, tied: rao_kupper_loss(l, tied, 0.3, 0.8),
    "davidson": lambda l, tied: davidson_loss(l, tied, 0.3, 1.7),
}


@pytest.mark.parametrize("name", MODELS)
def test_win_tie_and_loss_add_to_one_and_a_tie_has_no_order(name):
    for_h = probabilities(MODELS[name], H)
    torch.testing.assert_close(sum(for_h), torch.ones_like(H), rtol=0, atol=1e-12)
    torch.testing.assert_close(for_h[1], probabilities(MODELS[name], -H)[1], rtol=1e-12, atol=0)
    assert for_h[1].argmax() == 4


def test_ties_are_those_of_rao_and_kupper_and_of_davidson():
    w = (H[2:7] / 2).exp()  # strengths whose ratio is exp(h)
    l = 1 / w
    nu = math.exp(0.8)
    win, tie, _ = probabilities(MODELS["rao-kupper"], H[2:7])
    torch.testing.assert_close(win, w / (w + nu * l))
    torch.testing.assert_close(tie, (nu**2 - 1) * w * l / ((w + nu * l) * (l + nu * w)))
    win, tie, lose = probabilities(MODELS["davidson"], H[2:7])
    torch.testing.assert_close(win, w / (w + l + 1.7 * (w * l).sqrt()))
    torch.testing.assert_close(win / (win + lose), H[2:7].sigmoid())  # ties taken away


def test_graded_losses_are_finite_and_dpo_is_their_limit():
    logps, ones = logps_of(H, 0.3), torch.ones_like(H)
    no = ones < 0
    for loss in (
        soft_label_loss(logps, 0.7 * ones, 0.3), offset_loss(logps, ones, 0.3),
        *(model(logps, tied) for model in MODELS.values() for tied in (no, ~no)),
    ):  # fmt: skip
        (slope,) = torch.autograd.grad(loss.sum(), logps.chosen)
        assert loss.isfinite().all() and slope.isfinite().all() and loss.shape == H.shape
    plain = dpo_loss(logps, 0.3)
    torch.testing.assert_close(soft_label_loss(logps, ones, 0.3), plain)
    torch.testing.assert_close(offset_loss(logps, 0 * ones, 0.3), plain)
    torch.testing.assert_close(rao_kupper_loss(logps, no, 0.3, 1e-12), plain)
    torch.testing.assert_close(davidson_loss(logps, no, 0.3, 1e-300), plain)
    torch.testing.assert_close(soft_label_loss(logps, 0.9 * ones, 0.3), cdpo_loss(logps, 0.3, 0.1))


REWARDS = torch.tensor([-1.0, 0.4, -0.3, 1.0, 2.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64).log()
I, J = (~torch.eye(5, dtype=torch.bool)).nonzero().unbind(1)


def fitted(loss):
    """The policy [5] that minimises `loss(PairLogps of all ordered pairs)`."""
    logits = REFERENCE.clone().requires_grad_()

    def value():
        logps = logits.log_softmax(0)
        return loss(PairLogps(logps[I], logps[J], REFERENCE[I], REFERENCE[J])).sum()

    exact.minimise(value, [logits])
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_in_the_exact_world_soft_labels_and_ties_lead_to_the_optimum(beta):
    best = exact.optimal_policy(REFERENCE, REWARDS, beta)
    gap, no = (REWARDS[I] - REWARDS[J]), torch.zeros(20, dtype=torch.bool)
    soft = fitted(lambda l: soft_label_loss(l, gap.sigmoid(), beta))
    assert exact.total_variation(soft, best) < 1e-6
    for loss, option in ((rao_kupper_loss, 0.8), (davidson_loss, 1.7)):
        world = lambda l, tied: loss(l, tied, 1.0, option)  # noqa: B023, E731
        win, tie, _ = probabilities(world, gap, 1.0)

        def population(l):
            won, equal = loss(l, no, beta, option), loss(l, ~no, beta, option)  # noqa: B023
            return win * won + tie / 2 * equal  # noqa: B023

        assert exact.total_variation(fitted(population), best) < 1e-6
        without = fitted(lambda l: win * dpo_loss(l, beta))  # noqa: B023
        away = exact.total_variation(without, best)
        assert away < 1e-6 if loss is davidson_loss else away > 0.02


def test_a_graded_run_learns_the_probability_and_counts_parts_as_the_whole():
    generator = torch.Generator().manual_seed(0)
    pairs = [TokenizedPair([1, 2 + i], [9 + i, 20], [30 + i, 21]) for i in range(6)]
    model = tiny_model()
    reference = reference_logps(model, pairs)
    asked = torch.rand(6, generator=generator).mul(0.6).add(0.2).tolist()
    items = list(zip(pairs, reference.tolist(), asked))
    objective = graded_objective(lambda l, p: soft_label_loss(l, p, 0.5), 0.5)
    config = TrainingConfig(steps=1, batch_size=6, learning_rate=1e-3)
    whole = train(copy.deepcopy(model), items, objective, config)
    parted = train(copy.deepcopy(model), items, objective, replace(config, micro_batch_size=4))
    assert whole[-1]["grad_norm"] == pytest.approx(parted[-1]["grad_norm"], rel=1e-4)
    assert whole[-1]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    train(model, items, objective, replace(config, steps=300, learning_rate=3e-3))
    moved = 0.5 * (reference_logps(model, pairs) - reference)
    found = (moved[:, 0] - moved[:, 1]).sigmoid()
    torch.testing.assert_close(found, torch.tensor(asked), rtol=0, atol=0.02)
