"""Labels by people: the page, its file, agreement, ties and graded labels, other people's verdicts,
and a model as judge.
"""


import pytest
import torch

from dpo_mini.course import labels as people
from dpo_mini.course.labelling import KEYS, labelling_page
from dpo_mini.data import DataError, PreferencePair, preference_pairs, read_rows

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
