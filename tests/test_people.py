"""Labels by people: the page, its file, agreement, ties and graded labels, other people's verdicts,
and a model as judge.
"""

import contextlib
import copy
import http.server
import json
import math
import random
import re
import threading
import time
from dataclasses import replace

import pytest
import torch

from dpo_mini import exact
from dpo_mini.course import human_preferences, human_training, model_judge
from dpo_mini.course import labels as people
from dpo_mini.course import people as simulated
from dpo_mini.course.labelling import KEYS, labelling_page
from dpo_mini.data import DataError, PreferencePair, preference_pairs, read_rows
from dpo_mini.family import davidson_loss, offset_loss, rao_kupper_loss, soft_label_loss
from dpo_mini.hub import HubError
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


# --- other people's verdicts ---


def made_up(folder, n=240, accuracy=0.8):
    """Comparisons of two models of which the first wins in 70 of 100, and a judge that errs."""
    draw = random.Random(0)
    rows, said = [], []
    for i in range(n):
        models = ("a_b", "c_d")[i % 2]
        winner = 1 if draw.random() < (0.7 if models == "a_b" else 0.4) else 2
        people = [winner if draw.random() < 0.95 else 3 - winner for _ in range(3)]
        lengths = (9, 3) if winner == 1 else (3, 9)
        rows.append({
            "idx": i, "instruction": f"Do {i // 6}", "input": "", "cmp_key": models,
            **{f"annotator{k + 1}": v for k, v in enumerate(people)},
            **{f"response{k + 1}": "x" * length for k, length in enumerate(lengths)},
        })  # fmt: skip
        judge = winner if draw.random() < accuracy else 3 - winner
        said.append({"idx": i, "it_result": str(judge) if i else "no idea"})
    rows[5]["response1"] = True  # such rows are there
    (folder / "testset-v1.json").write_text(json.dumps(rows))
    (folder / "it-testset-v1.json").write_text(json.dumps(said))
    return human_preferences.read_comparisons(folder)


def test_people_and_a_judge_are_compared_with_intervals_over_instructions(tmp_path):
    found = human_preferences.figures(made_up(tmp_path))
    two = found["agreement"]["person 1, person 2"]
    assert found["items"] == two["n"] == 240 and found["instructions"] == 40
    assert abs(two["share"]["mean"] - (0.95**2 + 0.05**2)) < 0.06 and 0.4 < two["chance"] < 0.6
    assert two["kappa"]["low"] < two["kappa"]["mean"] < two["kappa"]["high"]
    assert 0.7 < found["clear"]["it"]["mean"] < 0.9
    assert found["longer"]["people"]["n"] == 239 and found["longer"]["people"]["mean"] > 0.95
    assert found["verdicts"]["it"]["no verdict"] == 1
    rates = {row["models"]: row for row in found["win_rates"]["it"]}
    for row in rates.values():  # the judge's rate is drawn to one half; corrected it is not
        low, high = row["corrected"]["low"], row["corrected"]["high"]
        assert low < row["people"]["mean"] < high
        middle = abs(row["corrected"]["mean"] - 0.5) > abs(row["judged"] - 0.5)
        assert middle


def test_a_win_rate_is_corrected_by_rogan_and_gladen():
    judged = 0.7 * 0.9 + 0.3 * (1 - 0.75)
    found = human_preferences.corrected_win_rate(judged, 400, 0.9, 0.75, (300, 300))
    assert found.mean == pytest.approx(0.7)
    sure = human_preferences.corrected_win_rate(0.7, 400, 1.0, 1.0, (300, 300))
    assert sure.high - sure.low == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 400))
    assert found.high - found.low > sure.high - sure.low
    assert human_preferences.corrected_win_rate(0.01, 50, 0.8, 0.8, (99, 99)).mean == 0
    with pytest.raises(DataError, match="coin"):
        human_preferences.corrected_win_rate(0.5, 50, 0.4, 0.6, (99, 99))


def test_the_corrected_interval_covers_the_truth():
    generator, covered = torch.Generator().manual_seed(1), 0

    def draws(p, n):
        return (torch.rand(n, generator=generator) < p).double().mean().item()

    for _ in range(300):
        judged = draws(0.65 * 0.8 + 0.35 * 0.25, 200)
        found = human_preferences.corrected_win_rate(
            judged, 200, draws(0.8, 80), draws(0.75, 20), (80, 20)
        )
        covered += found.low <= 0.65 <= found.high
    assert 276 <= covered <= 297


def test_rows_without_people_are_refused_with_their_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"instruction": "a", "response1": "b", "response2": "c", "annotator1": 1, "annotator2": 2}
    for more, said in (({}, "'annotator3'"), ({"annotator3": 7}, "expected 0, 1 or 2")):
        file.write_text(json.dumps(row | more))
        with pytest.raises(DataError, match=f"line 1.*{said}"):
            human_preferences.read_comparisons(file)
    with pytest.raises(HubError, match="cannot be reached|no local folder"):
        human_preferences.read_comparisons("nobody/nothing-of-this-name")


# --- a model as judge ---


@pytest.mark.parametrize(
    "reply, verdict",
    [("1", "1"), (" 2.\n", "2"), ("0", "tie"), ("It is a tie.", "tie"), ("Answer 1", "1"),
     ("1 or 2", None), ("", None), ("The first", None), ("12", None), ("2.5", None),
     ("100%", None), ("Answer: **2**", "2"), ("1, since 1 is short", "1")],
)  # fmt: skip
def test_a_verdict_is_read_or_is_none(reply, verdict):
    assert model_judge.read_verdict(reply) == verdict


def test_both_orders_are_asked_and_a_taste_for_a_place_is_a_tie_and_counted():
    def says(rule):
        def ask(messages):
            answers = re.findall(r"Answer \d:\n(.*)\n", messages[0]["content"])
            return model_judge.Reply(rule(answers), 10, 0.5)

        return ask

    fair = says(lambda a: "1" if len(a[0]) > len(a[1]) else "2")
    found = model_judge.both_orders(fair, "Do", "short", "much longer")
    assert found.verdict == "2" and found.places == ("2", "1") and found.tokens == 20
    first = [model_judge.both_orders(says(lambda a: "1"), "Do", "a", "b")] * 3
    assert {one.verdict for one in first} == {"tie"}
    report = model_judge.place_report([*first, found])
    assert report == {"n": 4, "first twice": 0.75, "second twice": 0.0, "orders agree": 0.25}
    none = model_judge.both_orders(says(lambda a: None), "Do", "a", "b")
    assert none.verdict is None and model_judge.place_report([none])["n"] == 0


GOOD = {"choices": [{"message": {"content": "2"}}], "usage": {"total_tokens": 31}}


@pytest.fixture
def server(monkeypatch):
    """A judge's server that plays a list of parts, one a request; `server.asked` is what came."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            stub.asked.append((self.path, dict(self.headers), json.loads(body)))
            part = stub.parts.pop(0) if len(stub.parts) > 1 else stub.parts[0]
            with contextlib.suppress(ConnectionError):
                self.play(part)

        def do_GET(self):  # a redirection was followed, and the key with it
            stub.asked.append((self.path, dict(self.headers), None))
            self.send_error(404)

        def play(self, part):
            if part == "hangs up":
                self.connection.close()
                return
            if part == "stalls":
                stub.over.wait(5)
                return
            status, sent = part if isinstance(part, tuple) else (200, part)
            sent = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{stub.address}/elsewhere")
            self.end_headers()
            if part != DRIPS:
                self.wfile.write(sent)
                return
            while not stub.over.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()

        def log_message(self, *arguments):
            pass

    stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.asked, stub.parts, stub.over = [], [GOOD], threading.Event()
    stub.address = f"http://127.0.0.1:{stub.server_port}/v1"
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield stub
    stub.over.set()
    stub.shutdown()
    stub.server_close()


DRIPS = b"drips"
ASK = model_judge.judge_messages("Do", "a", "b")


def endpoint(server, **options):
    return model_judge.Endpoint(server.address, "m", **{"timeout": 0.4, "pause": 0.01, **options})


def test_a_server_is_asked_in_openai_s_way(server, monkeypatch):
    monkeypatch.setenv("DPO_MINI_JUDGE_KEY", "secret")
    reply = endpoint(server)(ASK)
    assert reply.verdict == "2" and reply.tokens == 31 and reply.problem == ""
    (path, headers, body), *_ = server.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["messages"] == ASK and body["temperature"] == 0


@pytest.mark.parametrize(
    "part", ["hangs up", "stalls", DRIPS, (500, b"broken"), (429, b""), b"<html>no</html>", b"",
             {"choices": []}, {"choices": [{"message": {"content": None}}]}, [1], b"\xff\xfe",
             (302, b"")],
)  # fmt: skip
def test_a_server_that_fails_is_tried_again_and_then_gives_no_verdict(server, part):
    server.parts = [part, GOOD]
    assert endpoint(server)(ASK).verdict == "2"  # it came back
    server.parts, server.asked[:] = [part], []
    since = time.monotonic()
    reply = endpoint(server)(ASK)
    assert reply.verdict is None and "3 times" in reply.problem and time.monotonic() - since < 4
    assert len(server.asked) == 3 and {path for path, *_ in server.asked} == {
        "/v1/chat/completions"
    }


@pytest.mark.parametrize("status, said", [(401, "DPO_MINI_JUDGE_KEY"), (404, "/v1"), (400, "name")])
def test_a_server_that_refuses_is_a_sentence_at_once(server, status, said):
    server.parts = [(status, b"")]
    with pytest.raises(model_judge.JudgeError, match=said):
        endpoint(server)(ASK)
    assert len(server.asked) == 1


def test_rubbish_is_no_tie_and_a_dead_judge_stops_the_run(server, tmp_path):
    items = made_up(tmp_path, 24)
    server.parts = [{"choices": [{"message": {"content": "I love both, 1 and 2!"}}]}]
    with pytest.raises(model_judge.JudgeError, match="no verdict in three items.*no verdict in"):
        model_judge.judged(endpoint(server), items)
    assert len(server.asked) == 6
    nobody = model_judge.Endpoint("http://127.0.0.1:9/v1", "m", timeout=0.4, pause=0.01)
    with pytest.raises(model_judge.JudgeError, match="three items"):
        model_judge.judged(nobody, items)
    with pytest.raises(model_judge.JudgeError, match="no address"):
        model_judge.Endpoint("file:///etc", "m")(ASK)


def test_the_judge_s_command_keeps_figures_and_no_text(server, tmp_path):
    made_up(tmp_path)
    command = ["m", "--data", str(tmp_path), "--address", server.address, "--items", "7"]
    model_judge.main([*command, "--output", str(tmp_path)])
    text = (tmp_path / "human_judge.json").read_text()
    found = json.loads(text)
    assert found["items"] == 7 and "xxx" not in text
    assert found["wordings"]["S"]["places"]["second twice"] == 1
    assert len(server.asked) == 28 and found["wordings"]["C"]["tokens"] == 62


# --- simulated labellers ---


def test_a_simulated_labeller_follows_rao_and_kupper():
    gaps = torch.tensor([1.5, -1.5, 0.0]).double().repeat_interleave(4000)
    said = simulated.simulated_verdicts(gaps, threshold=0.5, seed=0)
    first = [said[i : i + 4000].count("first") / 4000 for i in (0, 4000)]
    assert first[0] == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.03)
    assert first[1] == pytest.approx(1 / (1 + math.exp(2.0)), abs=0.03)
    ties = said[:4000].count("tie") / 4000
    assert ties == pytest.approx(1 - 1 / (1 + math.exp(-1.0)) - 1 / (1 + math.exp(2.0)), abs=0.03)
    assert set(said[8000:]) == {"skip"}


def test_a_labeller_at_the_page_presses_the_side_of_its_taste(tmp_path, monkeypatch):
    by_number = {"sure": lambda texts: torch.tensor([40.0 * ("bad" in text) for text in texts])}
    monkeypatch.setattr(simulated, "TASTES", by_number)
    page = page_of(tmp_path)
    for _ in range(3):
        page.press(side_of(page, "good"))
    simulated.label_by_taste(page, PAIRS, "sure")
    pairs = people.labelled_pairs(page.labels, PAIRS)
    assert len(page.labels) == len(page.shown) and len(pairs) == 30
    assert sum("bad" in pair.chosen for pair in pairs) == 27


def test_a_model_is_compared_with_a_taste_where_it_has_one():
    margins, gaps = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 0.0, 1.0])
    found = simulated.agrees(margins.double(), gaps.double(), ["a", "b", "c", "d"])
    assert found.mean == pytest.approx(1 / 3)


def test_held_out_instructions_share_nothing_with_the_training_ones(tmp_path):
    items = human_training.usable(made_up(tmp_path), words=40)
    assert len(items) >= 230 and all(isinstance(a, str) for c in items for a in c.answers)
    known, unseen = human_training.split_by_instruction(items, 50, 60, seed=1)
    assert len(known) == 50 and len(unseen) == 60
    assert not {c.instruction for c in known} & {c.instruction for c in unseen}
    pair = human_training.chat_pair(items[0])
    assert pair.chosen[0]["content"] == items[0].answers[int(items[0].majority) - 1]


def test_a_linear_reward_learns_the_direction_of_its_pairs():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, generator=generator)
    x = torch.randn(400, 20, generator=generator)
    x = x * torch.sign(x @ truth)[:, None]
    weights = human_training.linear_reward(x)
    assert torch.cosine_similarity(weights, truth, dim=0) > 0.9
