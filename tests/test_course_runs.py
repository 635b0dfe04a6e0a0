"""The machinery of notebooks 06-09: studies, dashboard, recipes, notebook 08 with other models."""

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch

from dpo_mini.course import dashboard, plots, studies
from dpo_mini.course.recipes import micro_batch, recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "notebooks" / "results"


def test_a_log_survives_its_columns():
    log = [{"step": 0, "kl": 0.0}, {"step": 1, "loss": 0.69314718, "kl": None}]
    kept = studies.rows(json.loads(json.dumps(studies.columns(log))))
    assert kept == [{"step": 0, "kl": 0.0}, {"step": 1, "loss": 0.69315}]


@pytest.mark.parametrize("name", list(studies.STUDIES))
def test_a_stored_study_is_that_of_the_code(name):
    """Every run of the study is there, made with the settings that the code has now."""
    stored = studies.stored(RESULTS / f"{name}.json")
    assert stored["command"].endswith(f"studies {name}")
    settings = [studies.Setting(**run["setting"]) for run in stored["runs"]]
    assert settings == list(studies.STUDIES[name])
    for run in stored["runs"]:
        assert "error" in run or run["report"]["kl"]["low"] <= run["report"]["kl"]["high"]
        assert run["log"]["step"][0] == 0


def test_the_dashboard_shows_curves_and_samples_as_text():
    log = [{"step": 0, "kl": 0.0, "reward": 0.5}]
    metrics = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    names = ["loss", "grad_norm", "logps/chosen", "logps/rejected", *metrics]
    log += [{"step": i, **dict.fromkeys(names, 0.5)} for i in (1, 2)]
    first, last = (0, ["<b>dull"], [0.2]), (2, ["bright"], [0.9])
    page = dashboard.page(log, [first, last])
    assert "data:image/png;base64," in page and "&lt;b&gt;dull" in page and "<b>dull" not in page
    assert "step 0" in page and "step 2" in page and "<img" not in dashboard.page(log[:1], [first])


def test_colours_say_the_sign():
    assert dashboard.shade(0.5) == "rgb(255,255,255)"
    red, _, blue = (int(x) for x in dashboard.shade(0.0)[4:-1].split(","))
    assert red > blue
    page = dashboard.heat_map(["a", "<"], [0.25, -0.5], scale=0.5)
    assert "-0.25</b>" in page and "&lt;" in page


def test_the_live_monitor_adds_nothing_to_the_log(monkeypatch, tokenizer, tiny_folder):
    from dpo_mini.models import load_model

    shown = []

    class Handle:
        update = shown.append

    monkeypatch.setattr("IPython.display.display", lambda *a, **k: Handle())
    model, tokenizer = load_model(tiny_folder)
    score = lambda texts: torch.tensor([float(len(t)) for t in texts])  # noqa: E731
    watch = dashboard.live(lambda model, log: {"kl": 1.0}, tokenizer, ["A", "B"], score, 4)
    assert watch(model, [{"step": 0}]) == {"kl": 1.0} and "step 0" in shown[0].data


def test_the_figures_of_a_run_draw_what_the_log_has():
    run = studies.stored(RESULTS / "failures.json")["runs"][0]
    rows = studies.rows(run["log"])
    figures = [plots.training_figure(rows, "a title"), plots.monitor_figure(rows, "a title")]
    assert [len(figure.axes) for figure in figures] == [4, 4]
    axes = [axis for figure in figures for axis in figure.axes]
    assert all(axis.lines for axis in axes)
    labels = {text.get_text() for ax in axes if ax.get_legend() for text in ax.get_legend().texts}
    assert {"chosen", "rejected", "margin", "held out", "second judge"} <= labels


def test_memory_decides_how_many_pairs_are_read_at_once():
    sizes = [micro_batch(memory, 60, 6) or 60 for memory in (2, 4, 6, 8, 16, 80)]
    assert sizes == sorted(sizes) and sizes[0] >= 1 and sizes[-1] == 60
    assert all(60 % size == 0 for size in sizes)
    assert recipe("gpt2", memory=4, bf16=False).dpo.micro_batch_size < 60
    assert recipe().model == "embedded" and recipe().dataset is None


def test_the_readme_trains_gpt2_as_notebook_08_does():
    from dpo_mini.cli import parser
    from dpo_mini.options import options_of
    from dpo_mini.verbs import VERBS

    def options(verb):
        given = vars(parser().parse_args(lines[verb]))
        return options_of(VERBS[given.pop("verb")], given)

    text = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    lines = {line.split()[1]: line.split()[1:] for line in text.splitlines() if "runs/sft" in line}
    plan = recipe("gpt2", memory=80, bf16=True)
    for verb, config in (("sft", plan.sft), ("train", plan.dpo)):
        settings = options(verb).config()
        for name in ("steps", "batch_size", "learning_rate", "warmup_steps", "schedule"):
            assert getattr(settings, name) == getattr(config, name), (verb, name)
    assert options("train").beta == plan.beta
    pairs = options("pairs")
    assert (pairs.n_prompts, pairs.max_new_tokens) == (plan.prompts, plan.max_new_tokens)
    assert pairs.reward == plan.reward


@pytest.fixture
def imdb_folder(tmp_path):
    from datasets import Dataset

    texts = [
        f"This film number {i} was {'great fun' if i % 2 else 'a dull thing'} to see."
        for i in range(80)
    ]
    for split in ("train", "test"):
        Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(80)]}).to_parquet(
            tmp_path / f"{split}-00000-of-00001.parquet"
        )
    return tmp_path


@pytest.fixture
def classifier_folder(tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=2,
        pad_token_id=0, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    folder = tmp_path / "classifier"
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_notebook_08_trains_a_model_data_and_classifier_from_folders(
    tiny_folder, imdb_folder, classifier_folder, tmp_path
):
    """The cells that train GPT-2 on a GPU, with a model of the same kind, only tiny."""
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / "08_train_gpt2.ipynb", as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = f"""
from dpo_mini.settings import TrainingConfig
MODEL, DATASET, REWARD = {str(tiny_folder)!r}, {str(imdb_folder)!r}, {str(classifier_folder)!r}
sft = TrainingConfig(steps=6, batch_size=8, learning_rate=1e-3)
dpo = TrainingConfig(steps=4, batch_size=12, block_size=6, micro_batch_size=6, monitor_every=2)
CHANGES = dict(prompts=12, held_out=40, max_new_tokens=8, sft=sft, dpo=dpo)
"""
    NotebookClient(
        notebook, timeout=1500, kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    ).execute()  # fmt: skip
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "loss per token" in said and "72 pairs" in said and "win_rate" in said


@pytest.mark.slow
def test_a_run_repeats_itself(tmp_path):
    setting = studies.Setting(
        prompts=4, steps=2, watch_every=2, watched_prompts=4, evaluated_prompts=8, beta=0.3
    )
    one, two = (studies.run(setting, tmp_path) for _ in range(2))
    assert one == two and one["log"]["loss"][1] == pytest.approx(0.6931, abs=1e-3)
    flipped = studies.run(replace(setting, labels="opposite"), tmp_path)
    assert flipped["log"]["rewards/margins"][2] != one["log"]["rewards/margins"][2]
