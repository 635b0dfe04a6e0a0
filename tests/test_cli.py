"""The command line as a newcomer meets it: a sentence for each mistake, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from test_models import classifier_folder

from dpo_mini.cli import main
from dpo_mini.console import printable
from dpo_mini.data import DataError
from dpo_mini.hub import HubError, hub_is_reachable
from dpo_mini.models import context_length, cooled, load_model
from dpo_mini.outputs import MODEL_FILES, TRAINING_FILES, matching
from dpo_mini.rewards import load_reward
from dpo_mini.settings import SettingsError, TrainingConfig
from dpo_mini.sources import NINE_TENTHS, TENTH, in_held_out_tenth, texts_of
from dpo_mini.verbs import VERBS, Train

ROOT = Path(__file__).resolve().parents[1]

ROW = {"prompt": "This movie", "chosen": " was great.", "rejected": " was dull."}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({**ROW, "chosen": " was great" + "." * i}) + "\n" for i in range(1, 9))
    )
    return path


def train(*arguments):
    return main(["train", "--steps", "2", "--batch-size", "4", "--json", *map(str, arguments)])


def fails(capsys, status, *words):
    captured = capsys.readouterr()
    assert status != 0 and "Traceback" not in captured.err
    sentence = captured.err.strip().splitlines()[-1]
    for word in words:
        assert word in sentence, sentence


def test_train_writes_a_model_that_loads_and_a_report(tiny_folder, pairs, tmp_path, capsys):
    output = tmp_path / "run"
    assert train("--model", tiny_folder, "--pairs", pairs, "--output", output) == 0
    report = json.loads(capsys.readouterr().out)
    assert abs(report["loss_first"] - 0.693147) < 1e-4
    assert {"README.md", "model.safetensors", "report.json", "log.jsonl", "training.png"} <= {
        p.name for p in output.iterdir()
    }
    assert "beta" in (output / "README.md").read_text()
    load_model(output)


def test_kto_from_pairs_and_from_labelled_completions(tiny_folder, tmp_path, capsys):
    prompts = ["This movie", "The plot", "I"]
    paired = [{**ROW, "prompt": p} for p in prompts]
    single = [
        {"prompt": p, "completion": ROW[side], "label": side == "chosen"}
        for p in prompts
        for side in ("chosen", "rejected")
    ]
    losses = []
    for name, rows in (("paired", paired), ("single", single)):
        path, output = tmp_path / f"{name}.jsonl", tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ("--model", tiny_folder, "--pairs", path, "--output", output, "--loss", "kto")
        assert train(*given, "--beta", "0.2") == 0
        report = json.loads(capsys.readouterr().out)
        settings = report["settings"]
        assert (settings["loss"], settings["beta"], settings["undesirable_weight"]) == (
            "kto",
            0.2,
            1,
        )
        assert report["loss_first"] == pytest.approx(0.5, abs=1e-4)
        losses.append(report["loss_last"])
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        assert "kl" in log[-1] and (output / "training.png").stat().st_size > 1000
        assert "kto" in (output / "README.md").read_text()
        load_model(output)
    assert losses[0] == losses[1]


def test_a_loss_and_its_options_from_the_command_line(tiny_folder, pairs, tmp_path, capsys):
    given = ("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "run")
    assert train(*given, "--loss", "simpo", "--gamma", "0.5") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["loss"], settings["beta"], settings["gamma"]) == ("simpo", 2.0, 0.5)
    assert "label_smoothing" not in settings and "alpha" not in settings


@pytest.mark.parametrize(
    "options, words",
    [
        ("--loss ipo --gamma 1", ["the loss ipo takes no gamma; it takes beta."]),
        ("--gamma 1", ["the loss dpo takes no gamma"]),
        ("--loss preferred-ft --beta 1", ["takes no beta; it takes nothing."]),
        ("--loss robust --label-smoothing 0.5", ["label_smoothing must be in [0, 0.5), got 0.5"]),
        ("--loss simpo --beta -2", ["beta must be above 0, got -2.0"]),
        ("--beta 0", ["beta must be above 0, got 0.0"]),
    ],
)
def test_senseless_options_of_a_loss_are_told_before_anything_is_written(
    tiny_folder, pairs, tmp_path, capsys, options, words
):
    given = ("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "o")
    fails(capsys, train(*given, *options.split()), *words)
    assert not (tmp_path / "o").exists()


def test_data_that_a_loss_cannot_use(tiny_folder, pairs, tmp_path, capsys):
    given = ("--model", tiny_folder, "--output", tmp_path / "o", "--overwrite")
    one_prompt = train(*given, "--pairs", pairs, "--loss", "kto")
    fails(capsys, one_prompt, "all completions answer one prompt")
    path = tmp_path / "labelled.jsonl"
    path.write_text(json.dumps({"prompt": "I", "completion": " did", "label": True}) + "\n")
    said = "'chosen', 'rejected' is missing"
    fails(capsys, train(*given, "--pairs", path, "--loss", "dpo"), said)
    with pytest.raises(SystemExit):
        train(*given, "--pairs", path, "--loss", "sigmoid")
    assert "invalid choice: 'sigmoid'" in capsys.readouterr().err


def test_sft_sample_and_env(tiny_folder, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"A film.<br />Number {i}."}) + "\n" for i in range(8))
    )
    command = [
        "sft",
        "--model",
        tiny_folder,
        "--dataset",
        texts,
        "--output",
        tmp_path / "sft",
        "--steps",
        "2",
        "--batch-size",
        "4",
    ]
    assert main([*map(str, command), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss_first"] > 0
    assert (
        main(
            [
                "sample",
                "--model",
                str(tmp_path / "sft"),
                "--prompt",
                "The plot",
                "--samples",
                "2",
                "--json",
            ]
        )
        == 0
    )
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 2
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"].startswith("2.")


def test_pairs_then_evaluate_from_other_models(tiny_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("This movie\nThe plot\nI\n")
    path, common = (
        tmp_path / "pairs.jsonl",
        ["--prompts", str(prompts), "--max-new-tokens", "6", "--json"],
    )
    assert main(["pairs", "--model", str(tiny_folder), "--output", str(path), *common]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["pairs"] + counts["ties_dropped"] == 3 * 6
    command = [
        "evaluate",
        "--model",
        str(tiny_folder),
        "--reference",
        str(tiny_folder),
        "--pairs",
        str(path),
    ]
    assert main([*command, "--output", str(tmp_path / "e"), *common]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert (
        report["preference_accuracy"]["mean"] == 0.5
    )  # the reference against itself knows nothing
    assert (
        main(["pairs", "--model", str(tiny_folder), "--output", str(path), *common]) != 0
    )  # exists: kept


@pytest.mark.parametrize(
    "content, word",
    [
        ('{"prompt": "a", "chosen": "b"}\n', "'rejected' is missing"),
        ("not json\n", "line 1"),
        (json.dumps({**ROW, "chosen": ""}) + "\n", "empty"),
        (json.dumps({**ROW, "chosen": ROW["rejected"]}) + "\n", "equals"),
        (json.dumps({**ROW, "chosen": " great" * 200}) + "\n", "more than the model's context"),
    ],
)
def test_bad_pairs(tiny_folder, tmp_path, capsys, content, word):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    fails(capsys, train("--model", tiny_folder, "--pairs", path, "--output", tmp_path / "o"), word)
    assert path.read_text() == content


def test_an_output_that_exists_is_kept(tiny_folder, pairs, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    fails(
        capsys,
        train("--model", tiny_folder, "--pairs", pairs, "--output", output),
        "exists and is not empty",
        "--overwrite",
    )
    assert [p.name for p in output.iterdir()] == ["precious.txt"]
    file = tmp_path / "file"
    file.write_text("x")
    fails(capsys, train("--model", tiny_folder, "--pairs", pairs, "--output", file), "is a file")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions work otherwise there")
def test_an_output_that_cannot_be_written(tiny_folder, pairs, capsys):
    fails(
        capsys,
        train("--model", tiny_folder, "--pairs", pairs, "--output", "/proc/here"),
        "cannot be written",
    )


def test_unknown_names_fail_at_once_while_offline(pairs, tmp_path, capsys):
    began = time.time()
    fails(
        capsys,
        train("--model", "someone/no-such-model", "--pairs", pairs, "--output", tmp_path / "o"),
        "Hub cannot be reached",
    )
    fails(
        capsys,
        main(["sft", "--dataset", "stanfordnlp/imdb", "--output", str(tmp_path / "p")]),
        "Hub cannot be reached",
    )
    assert time.time() - began < 50  # ten on a quiet machine would do


def test_the_hub_is_asked_once_and_briefly(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    began = time.time()
    assert not hub_is_reachable()
    assert time.time() - began < 25


def test_a_model_without_weights_or_with_others_than_safetensors(
    tiny_folder, pairs, tmp_path, capsys
):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(
        capsys,
        train("--model", folder, "--pairs", pairs, "--output", tmp_path / "o"),
        "no weights in safetensors",
    )
    (tmp_path / "empty").mkdir()
    fails(
        capsys,
        train("--model", tmp_path / "empty", "--pairs", pairs, "--output", tmp_path / "o"),
        "holds no model",
    )


def test_remote_code_is_never_run(tiny_folder, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(HubError):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_pad_token_works(tiny_folder, pairs, tmp_path):
    _, tokenizer = load_model(tiny_folder)
    assert tokenizer.pad_token is None
    assert train("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "o") == 0


def test_nan_is_told(tiny_folder, pairs, tmp_path, capsys):
    status = train(
        "--model",
        tiny_folder,
        "--pairs",
        pairs,
        "--output",
        tmp_path / "o",
        "--learning-rate",
        "1e30",
    )
    fails(capsys, status, "learning rate ten times smaller", "is kept")


def test_resume_of_a_finished_run_changes_nothing(tiny_folder, pairs, tmp_path):
    arguments = ("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "o")
    assert train(*arguments) == 0
    before = (tmp_path / "o" / "model.safetensors").read_bytes()
    assert train(*arguments, "--resume") == 0
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "verb",
    ["demo", "pretrain", "sft", "pairs", "train", "evaluate", "sample", "env", "judges", "prompts",
     "cool", "lab"],
)  # fmt: skip
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--json" in said and "None" not in said


def test_a_resumed_run_keeps_the_precision_that_it_began_with(
    tiny_folder, pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("DPO_MINI_DEVICE", "cpu")
    monkeypatch.setattr("dpo_mini.models.SMALL", 0)
    arguments = ("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "o")
    for pays, more in ((True, ()), (False, ("--resume",))):  # a second timing ended otherwise
        monkeypatch.setattr("dpo_mini.models.bfloat16_pays", lambda device, pays=pays: pays)
        assert train(*arguments, *more) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["bf16"] is True
    fails(capsys, train(*arguments, "--resume", "--no-bf16"), "bf16 was True, is False")


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_a_short_run_reaches_its_learning_rate(verb, tiny_folder, pairs, texts, tmp_path):
    data = ["--pairs", pairs] if verb == "train" else ["--dataset", texts]
    command = [verb, "--model", tiny_folder, *data, "--batch-size", 4, "--learning-rate", "1e-3"]
    for steps, more, warm_up in ((4, (), 2), (1, (), 0), (4, ("--warmup-steps", "3"), 3)):
        output = tmp_path / f"{steps}_{warm_up}"
        given = [*command, "--steps", steps, *more, "--output", output, "--json"]
        assert main([*map(str, given)]) == 0
        log = [json.loads(line) for line in (output / "log.jsonl").open()]
        assert max(row.get("learning_rate", 0) for row in log) == pytest.approx(1e-3)
        assert json.loads((output / "report.json").read_text())["settings"]["warmup_steps"] == (
            warm_up
        )


# --- adapters ---


def test_lora_gives_the_same_weights_twice_and_is_in_the_card(tiny_folder, pairs, tmp_path):
    pytest.importorskip("peft", exc_type=ModuleNotFoundError)
    weights = []
    for name in ("one", "two"):
        given = ("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / name)
        assert train(*given, "--lora", "2", "--learning-rate", "1e-2") == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != (tiny_folder / "model.safetensors").read_bytes()
    assert "| lora | 2 |" in (tmp_path / "one" / "README.md").read_text()
    load_model(tmp_path / "one")


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_an_interrupted_lora_run_goes_on_to_the_same_weights(
    verb, tiny_folder, pairs, texts, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("peft", exc_type=ModuleNotFoundError)
    data = ["--pairs", pairs] if verb == "train" else ["--dataset", texts]
    common = [verb, "--model", tiny_folder, *data, "--lora", 2, "--steps", 4, "--batch-size", 4]
    common = [*map(str, common), "--learning-rate", "1e-2", "--json"]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", interrupted(at=2))
        assert main([*common, "--output", str(tmp_path / "parts")]) == 130
    assert "--resume goes on from there" in capsys.readouterr().err
    other_rank = [*common, "--output", str(tmp_path / "parts"), "--resume", "--lora", "3"]
    fails(capsys, main(other_rank), "belongs to another run", "lora")
    assert main([*common, "--output", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def interrupted(at):
    """`clip_grad_norm_`, with Ctrl-C pressed in step `at`."""
    import torch

    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def press(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return clip(*arguments, **options)

    return press


def test_a_missing_peft_is_told(tiny_folder, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    given = ("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "o", "--lora", 2)
    fails(capsys, train(*given), "pip install '.[lora]'")


# --- a policy and its reference ---


def evaluate(*arguments):
    return main(["evaluate", "--max-new-tokens", "4", "--samples", "1", *map(str, arguments)])


@pytest.fixture
def trained(tiny_folder, pairs, tmp_path):
    """A run beside the model it came from."""
    base, run = tmp_path / "runs" / "base", tmp_path / "runs" / "dpo"
    shutil.copytree(tiny_folder, base)
    assert train("--model", base, "--pairs", pairs, "--output", run, "--learning-rate", "1e-2") == 0
    return run


def test_the_reference_is_what_the_card_says(trained, tmp_path, capsys):
    card = (trained / "README.md").read_text()
    assert 'base_model: "base"' in card.split("---")[1] and str(tmp_path) not in card
    (tmp_path / "one.txt").write_text("This movie\n")
    prompts = ("--prompts", tmp_path / "one.txt")  # a single prompt will do
    capsys.readouterr()
    assert evaluate("--model", trained, *prompts, "--output", tmp_path / "e") == 0
    said = capsys.readouterr().out
    assert "prompts of one.txt" in said and "held-out" not in said and "one prompt" in said
    assert {"report.json", "samples.jsonl"} == {p.name for p in (tmp_path / "e").iterdir()}
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    given = ("--reference", trained.parent / "base", "--output", tmp_path / "f", "--json")
    assert evaluate("--model", trained, *prompts, *given) == 0
    assert report == json.loads(capsys.readouterr().out) and report["kl"]["mean"] > 0


def test_a_reference_that_is_not_the_right_one_is_refused(trained, tiny_folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    output = ("--output", tmp_path / "e")
    fails(capsys, evaluate("--model", tiny_folder, *output), "give --reference")  # it has no card
    weights = load_file(trained.parent / "base" / "model.safetensors")
    weights["transformer.ln_f.weight"] += 0.1  # the base was trained on, in its place
    save_file(weights, trained.parent / "base" / "model.safetensors", {"format": "pt"})
    fails(capsys, evaluate("--model", trained, *output), "its weights are others")
    shutil.rmtree(trained.parent / "base")
    fails(capsys, evaluate("--model", trained, *output), "'base'")
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    _, tokenizer = load_model(other)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    given = ("--model", trained, "--reference", other, *output)
    fails(capsys, evaluate(*given), "different tokenizers")
    assert not list((tmp_path / "e").glob("*"))


# --- prompts of a data set ---


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"Review {i} of film {i % 7}: {i * i} words about it."} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_held_out_prompts_of_a_file_are_none_that_pairs_takes(tiny_folder, texts, tmp_path, capsys):
    common = ["--model", tiny_folder, "--dataset", texts, "--max-new-tokens", "3", "--samples", "2"]
    common = [*map(str, common), "--n-prompts", "1000"]
    assert main(["pairs", *common, "--output", str(tmp_path / "p.jsonl"), "--seed", "1"]) == 0
    trained_on = {json.loads(line)["prompt"] for line in (tmp_path / "p.jsonl").open()}
    capsys.readouterr()
    given = [*common, "--reference", str(tiny_folder), "--output", str(tmp_path / "e")]
    assert main(["evaluate", *given]) == 0
    said = capsys.readouterr().out
    assert "texts.jsonl has no test split" in said and "held-out prompts " in said
    rows = [json.loads(line) for line in (tmp_path / "e" / "samples.jsonl").open()]
    evaluated_on = {row["prompt"] for row in rows}
    assert len(trained_on) > 100 and evaluated_on and not evaluated_on & trained_on
    sources = [json.loads(line)["text"] for line in texts.open()]
    used = [text for text in sources if not in_held_out_tenth(text)]
    assert not any(text.startswith(p) for p in evaluated_on for text in used)


def test_sft_never_reads_what_evaluates(tiny_folder, texts, tmp_path, capsys, monkeypatch):
    read = []

    def text_items(texts, *_):
        read.extend(texts)
        raise DataError("enough")

    monkeypatch.setattr("dpo_mini.tokens.text_items", text_items)
    command = ["sft", "--model", tiny_folder, "--dataset", texts, "--output", tmp_path / "o"]
    fails(capsys, main([*map(str, command)]), "enough")
    held_out, name = texts_of(texts, None, held_out=True)
    assert name == TENTH and held_out and len(read) > 100 and not set(read) & set(held_out)
    assert len(read) + len(held_out) == 200


def test_which_texts_train_and_which_evaluate(texts, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test", "validation"):
        rows = [json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(50)]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    for split, held_out, kind in ((None, False, "train"), (None, True, "test"),
                                  ("train", False, "train"), ("train", True, "train"),
                                  ("test", False, "test"), ("test", True, "test"),
                                  ("validation", False, "validation"),
                                  ("validation", True, "validation")):  # fmt: skip
        found, _ = texts_of(folder, split, held_out)
        assert found == [f"{kind} {i}" for i in range(50)], (split, held_out)
    tenth, rest = texts_of(texts, None, True)[0], texts_of(texts, None, False)[0]
    assert tenth and rest and all(map(in_held_out_tenth, tenth)) and not set(tenth) & set(rest)
    assert texts_of(texts, "train", True) == texts_of(texts, "train", False) == (rest, NINE_TENTHS)
    for alone, held_out in ((tenth[0], False), (rest[0], True)):  # one text is too few for a part
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps({"text": alone}) + "\n")
        with pytest.raises(DataError, match="evaluation"):
            texts_of(path, None, held_out)


def test_a_split_is_honoured_and_only_a_test_split_is_called_held_out(
    tiny_folder, tmp_path, capsys
):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [json.dumps({"text": f"{split} {i} and more of it"}) + "\n" for i in range(30)]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    common = ["--dataset", folder, "--model", tiny_folder, "--reference", tiny_folder]
    for split, heading in ((None, "held-out prompts "), ("test", "held-out prompts "),
                           ("train", "prompts of the split train"),
                           ("validation", "prompts of the split validation")):  # fmt: skip
        output = tmp_path / f"e_{split}"
        given = ("--split", split) if split else ()
        assert evaluate(*common, *given, "--n-prompts", 3, "--output", output) == 0
        said = capsys.readouterr().out
        assert said.split("\n")[1].startswith(heading), said
        rows = [json.loads(line) for line in (output / "samples.jsonl").open()]
        assert all(row["prompt"][:4] == (split or "test")[:4] for row in rows)
    fails(
        capsys, evaluate(*common, "--split", "nope", "--output", tmp_path / "n"), "no split 'nope'"
    )
    fails(
        capsys,
        evaluate("--dataset", folder / "test.jsonl", "--split", "test", "--model", tiny_folder,
                 "--reference", tiny_folder, "--output", tmp_path / "n"),
        "has no splits",
    )  # fmt: skip


def test_pairs_of_a_split(tiny_folder, pairs, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = pairs.read_text().splitlines(keepends=True)
    for split, some in (("train", lines), ("validation", lines[:3])):
        (folder / f"{split}.jsonl").write_text("".join(some))
    given = ("--model", tiny_folder, "--pairs", folder)
    assert train(*given, "--split", "validation", "--output", tmp_path / "o") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["pairs"] == 3
    fails(capsys, train(*given, "--split", "tset", "--output", tmp_path / "n"), "no split 'tset'")


def test_long_pairs_are_dropped_where_asked(tiny_folder, pairs, tmp_path, capsys):
    with pairs.open("a") as file:
        file.write(json.dumps({**ROW, "chosen": " great" * 200}) + "\n")
    given = ("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "o")
    fails(capsys, train(*given), "line 9", "drop")
    with pytest.warns(UserWarning, match="1 "):
        assert train(*given, "--drop-long") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["pairs"] == 8
    given = ("--model", tiny_folder, "--reference", tiny_folder, "--pairs", pairs, "--n-prompts", 2)
    assert evaluate(*given, "--drop-long", "--output", tmp_path / "e") == 0
    assert "1 pairs longer than the context of 64 are dropped" in capsys.readouterr().out
    assert json.loads((tmp_path / "e" / "report.json").read_text())["pairs"] == 8


def test_the_block_is_found_in_the_pairs_and_can_be_given(tiny_folder, tmp_path, capsys):
    rows = [{"prompt": f"Film {i}", "chosen": f" was good{k}", "rejected": " was bad"}
            for i in range(4) for k in range(3)]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more, block in (((), 3), (("--block-size", 1), 1)):
        given = ("--model", tiny_folder, "--pairs", path, "--output", tmp_path / f"o{block}")
        assert train(*given, *more) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["block_size"] == block


def test_ktos_weights(tiny_folder, tmp_path, capsys):
    rows = [{**ROW, "prompt": p} for p in ("This movie", "The plot")]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--model", tiny_folder, "--pairs", path, "--output", tmp_path / "o", "--loss", "kto")
    assert train(*given, "--desirable-weight", "3", "--undesirable-weight", "1") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss_first"] == pytest.approx(1.0, abs=1e-3)  # (3 + 1) / 2 of one half
    assert report["settings"]["desirable_weight"] == 3


def test_kto_from_pairs_keeps_within_the_context(tiny_folder, tmp_path):
    rows = [{"prompt": "word " * 50, "chosen": " good", "rejected": " bad"},
            {"prompt": "A", "chosen": " good" * 50, "rejected": " bad"}]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = load_model(tiny_folder)
    items = Train(pairs=str(path), loss="kto").tokenized(model, tokenizer)
    lengths = [len(prompt) + len(ids) for item in items for prompt, ids in item.rows]
    assert len(items) == 4 and max(lengths) == context_length(model)


@pytest.mark.parametrize("labelled_first", [True, False])
def test_rows_of_two_kinds_are_refused(labelled_first, tiny_folder, tmp_path, capsys):
    rows = [{"prompt": "I", "completion": " did", "label": True}, ROW]
    path = tmp_path / "p.jsonl"
    rows = rows if labelled_first else rows[::-1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--model", tiny_folder, "--pairs", path, "--output", tmp_path / "o", "--loss", "kto")
    fails(capsys, train(*given), "line 2", "the same columns", "files of their own")


# --- chat ---

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_chat_goes_through_the_template_and_shows_no_markup(tiny_folder, pairs, tmp_path, capsys):
    chat = tmp_path / "chat"
    shutil.copytree(tiny_folder, chat)
    fails(capsys, main(["sample", "--model", str(chat), "--chat"]), "no chat template")
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    few = ["--chat", "--model", str(chat), "--samples", "2", "--max-new-tokens", "5"]
    assert main(["sample", *few, "--prompt", "Any good?"]) == 0
    assert "<|" not in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("Any good?\nAnd the plot?\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    path = tmp_path / "chat.jsonl"
    assert main(["pairs", *few, *prompts, "--output", str(path)]) == 0
    _, tokenizer = load_model(chat)
    for row in map(json.loads, path.open()):
        shown = tokenizer.decode(row["prompt_ids"])
        assert shown in ("<|user|>Any good?<|endoftext|><|assistant|>",
                         "<|user|>And the plot?<|endoftext|><|assistant|>")  # fmt: skip
        assert row["prompt"][0]["role"] == "user" and row["chosen"][0]["role"] == "assistant"
    assert train("--model", chat, "--pairs", path, "--output", tmp_path / "o") == 0
    capsys.readouterr()
    given = ["evaluate", *few, *prompts, "--reference", str(chat), "--output", str(tmp_path / "e")]
    assert main(given) == 0
    assert "<|" not in capsys.readouterr().out


# --- outputs ---


def test_overwriting_leaves_nothing_of_the_run_before(tiny_folder, pairs, tmp_path):
    chat, output = tmp_path / "chat", tmp_path / "o"
    shutil.copytree(tiny_folder, chat)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    assert train("--model", chat, "--pairs", pairs, "--output", output) == 0
    assert (output / "chat_template.jinja").exists()
    for name in (
        "model-00001-of-00002.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ):
        (output / name).write_text("of an earlier run")
    (output / "precious.txt").write_text("mine")
    (output / "notes").mkdir()
    (output / "notes" / "config.json").write_text("mine too")
    assert train("--model", tiny_folder, "--pairs", pairs, "--output", output, "--overwrite") == 0
    names = {p.name for p in output.iterdir()}
    assert not names & {"chat_template.jinja", "model-00001-of-00002.safetensors"}
    assert not any(name.startswith("adapter") for name in names)
    assert (output / "precious.txt").read_text() == "mine"
    assert (output / "notes" / "config.json").read_text() == "mine too"
    assert load_model(output)[1].chat_template is None


def test_overwrite_knows_every_file_that_a_run_writes(tiny_folder, pairs, texts, tmp_path):
    dpo, sft = tmp_path / "dpo", tmp_path / "sft"
    assert train("--model", tiny_folder, "--pairs", pairs, "--output", dpo) == 0
    command = ["sft", "--model", tiny_folder, "--dataset", texts, "--output", sft, "--steps", 1]
    assert main([*map(str, command)]) == 0
    for folder in (dpo, sft):
        files = {path for path in folder.rglob("*") if path.is_file()}
        assert files == set(matching(folder, MODEL_FILES + TRAINING_FILES))


def test_what_is_not_ours_or_is_read_is_never_overwritten(tiny_folder, pairs, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    shutil.copytree(tiny_folder, theirs)
    before = {p.name: p.read_bytes() for p in theirs.iterdir()}
    given = ("--pairs", pairs, "--overwrite", "--output", theirs)
    fails(capsys, train("--model", tiny_folder, *given), "dpo-mini did not write")
    fails(capsys, train("--model", theirs, *given), "is the model to read")
    assert {p.name: p.read_bytes() for p in theirs.iterdir()} == before
    home = tmp_path / "home"  # holds no model, and files named as ours are
    home.mkdir()
    for name in ("pairs.jsonl", "log.jsonl", "before_after.png", "precious.txt"):
        (home / name).write_text("mine")
    command = ["cool", "--model", tiny_folder, "--overwrite", "--output", home]
    assert main([*map(str, command)]) == 0
    assert all((home / name).read_text() == "mine" for name in ("pairs.jsonl", "log.jsonl"))
    ours = tmp_path / "ours"
    assert train("--model", tiny_folder, "--pairs", pairs, "--output", ours) == 0
    before = {p.name: p.read_bytes() for p in ours.iterdir()}
    (tmp_path / "bad.jsonl").write_text("not json\n")
    bad = ("--pairs", tmp_path / "bad.jsonl", "--overwrite", "--output", ours)
    fails(capsys, train("--model", tiny_folder, *bad), "line 1")
    assert {p.name: p.read_bytes() for p in ours.iterdir()} == before  # bad input loses nothing
    inside = shutil.copy(pairs, ours / "pairs.jsonl")
    given = ("--pairs", inside, "--overwrite", "--output", ours)
    assert train("--model", tiny_folder, *given) == 0 and inside.exists()


def test_a_pairs_file_that_cannot_be_written_is_told_before_sampling(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dpo_mini.models.load_model", lambda name: pytest.fail("work was begun"))
    command = ["pairs", "--model", str(tiny_folder), "--output"]
    fails(capsys, main([*command, "/proc/here/pairs.jsonl"]), "cannot be written")
    fails(capsys, main([*command, str(tmp_path)]), "is a folder")


def test_no_absolute_path_is_kept(tiny_folder, pairs, texts, tmp_path):
    runs = tmp_path / "runs"
    assert train("--model", tiny_folder, "--pairs", pairs, "--output", runs / "dpo") == 0
    command = ["sft", "--model", tiny_folder, "--dataset", texts, "--output", runs / "sft"]
    assert main([*map(str, command), "--steps", "1", "--batch-size", "2"]) == 0
    command = ["cool", "--model", tiny_folder, "--output", runs / "cool"]
    assert main([*map(str, command)]) == 0
    for file in runs.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file
            assert str(tiny_folder.parent).encode() not in file.read_bytes(), file


def test_a_run_that_diverged_says_that_it_failed(tiny_folder, pairs, tmp_path, capsys):
    output = tmp_path / "o"
    given = ("--model", tiny_folder, "--pairs", pairs, "--output", output, "--steps", 12)
    status = train(*given, "--learning-rate", "50", "--warmup-steps", 0, "--beta", 5)
    fails(capsys, status, "the run failed", "no model was saved", "log is in")
    assert (output / "log.jsonl").exists() and not (output / "model.safetensors").exists()


# --- options out of range ---

NUMBERS = [
    (verb, field.name, field.type)
    for verb, options in VERBS.items()
    for field in fields(options)
    if field.type in (int, float, int | None, float | None)
] + [
    (verb, field.name, field.type)
    for verb in ("demo", "sft", "train")
    for field in fields(TrainingConfig)
    if field.type in (int, float, int | None) and field.name != "monitor_every"
]
ZERO_IS_FINE = {"seed", "lora", "temperature", "warmup_steps", "weight_decay",
                "label_smoothing", "gamma", "alpha", "desirable_weight",
                "undesirable_weight"}  # fmt: skip


@pytest.mark.parametrize("verb, name, kind", NUMBERS, ids=lambda value: str(value))
def test_a_number_out_of_range_is_a_sentence_and_writes_nothing(
    verb, name, kind, pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    loss = {"gamma": "simpo", "alpha": "cpo", "label_smoothing": "cdpo"}.get(name, "dpo")
    loss = "kto" if "desirable" in name else loss
    given = ["--pairs", "pairs.jsonl", "--loss", loss] if verb == "train" else []
    values = ["-1", "nan", "inf", str(2**60), "text"]
    values += (
        [] if name in ZERO_IS_FINE and not (verb == "cool" and name == "temperature") else ["0"]
    )
    values = [v for v in values if name != "strength" or v not in ("-1", "0")]  # both are right
    for value in values:
        unbounded = {"learning_rate", "beta", "gamma", "alpha", "weight_decay", "max_grad_norm",
                     "desirable_weight", "undesirable_weight"}  # fmt: skip
        if value == str(2**60) and name in unbounded:
            continue  # large, but a number like any other
        try:
            status = main([verb, *given, "--" + name.replace("_", "-"), value])
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr().err.strip()
        assert status in (1, 2) and len(said.split("\n")) == 1, (value, status, said)
        assert name in said.replace("-", "_") and value in said or "got" in said, said
        assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"], value


def test_two_sources_of_prompts_are_one_too_many(tiny_folder, capsys):
    status = main(["pairs", "--prompts", "a.txt", "--dataset", "b", "--model", str(tiny_folder)])
    fails(capsys, status, "choose one")


# --- consoles ---


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_that_is_not_utf_8_shows_what_it_can(encoding, tiny_folder, tmp_path):
    (tmp_path / "p.txt").write_text("这部电影 был naïve\n", encoding="utf-8")
    given = ["--model", tiny_folder, "--reference", tiny_folder, "--prompts", tmp_path / "p.txt"]
    given += ["--output", tmp_path / "e", "--max-new-tokens", 3]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "dpo_mini", "evaluate", *map(str, given)]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    shown = "naïve" if encoding == "latin-1" else "na?ve"
    assert shown in done.stdout.decode(encoding) and (tmp_path / "e" / "report.json").exists()


def test_results_are_written_before_anything_is_printed(tiny_folder, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("the console is gone")

    monkeypatch.setattr("dpo_mini.verbs.comparison", refuse)
    given = ("--model", tiny_folder, "--reference", tiny_folder, "--n-prompts", 2)
    fails(capsys, evaluate(*given, "--output", tmp_path / "e"), "the console is gone")
    assert {"report.json", "samples.jsonl"} == {p.name for p in (tmp_path / "e").iterdir()}


def test_no_escape_sequence_reaches_the_console(tiny_folder, tmp_path, capsys):
    prompt = "\x1b]0;owned\x07\x1b[31mred\u202e"
    assert main(["sample", "--model", str(tiny_folder), "--prompt", prompt]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[31mred" in said
    assert not any(c in said for c in "\x1b\x07\u202e")
    fails(capsys, main(["sample", "--model", prompt]), "\\x1b[31mred")
    assert printable("a\tb\nc\x7f", "ascii") == "a\\tb\nc\\x7f"


@pytest.mark.parametrize("labels, name", [(["LABEL_0"], "reward"), (["fair", "good"], "P(good)")])
def test_another_reward_is_shown_as_what_it_is_and_has_no_second_judge(
    labels, name, tiny_folder, tokenizer, tmp_path, capsys
):
    path, _ = classifier_folder(tmp_path / "classifier", tokenizer, labels)
    given = ("--model", tiny_folder, "--reference", tiny_folder, "--n-prompts", 3, "--reward", path)
    assert evaluate(*given, "--output", tmp_path / "e") == 0
    said = capsys.readouterr().out
    assert "judge" not in said and "P(positive)" not in said
    assert f"before and after, with {name}:" in said
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert report["reward_shown_as"] == name and "judge_policy" not in report
    rows = [json.loads(line) for line in (tmp_path / "e" / "samples.jsonl").open()]
    outputs = load_reward(path)([row["prompt"] + row["policy"] for row in rows])
    shown = outputs if name == "reward" else outputs.sigmoid()
    assert [row["reward_policy"] for row in rows] == pytest.approx(shown.tolist(), abs=1e-3)
    command = ["sample", "--model", tiny_folder, "--reward", path, "--prompt", "I"]
    assert main([*map(str, command)]) == 0
    assert f"In brackets: {name} by classifier." in capsys.readouterr().out
    assert main([*map(str, command), "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    values = [row["reward" if name == "reward" else "positive"] for row in samples]
    outputs = load_reward(path)(["I" + row["text"] for row in samples])
    shown = outputs if name == "reward" else outputs.sigmoid()
    assert values == pytest.approx(shown.tolist(), abs=1e-4)


# --- the other verbs ---


def test_cool_divides_the_logits(tiny_folder, tmp_path, capsys):
    import torch

    output = tmp_path / "cool"
    command = ["cool", "--model", str(tiny_folder), "--temperature", "0.5", "--output", str(output)]
    assert main(command) == 0
    (hot, _), (cold, _) = load_model(tiny_folder), load_model(output)
    ids = torch.tensor([[0, 5, 9, 400]])
    with torch.no_grad():
        assert torch.allclose(cold(ids).logits, hot(ids).logits / 0.5, atol=1e-5)
    card = (output / "README.md").read_text()
    assert "| temperature | 0.5 |" in card and 'base_model: "tiny"' in card
    fails(capsys, main(command), "--overwrite")
    fails(capsys, main([*command[:-1], str(tiny_folder), "--overwrite"]), "did not write")


def test_lab_opens_the_course_or_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, main(["lab"]), "no folder notebooks/")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_start_here.ipynb").write_text("{}")
    opened = []
    monkeypatch.setattr(subprocess, "call", lambda command: opened.append(command) or 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(capsys, main(["lab"]), "pip install '.[lab]'")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert main(["lab"]) == 0
    assert opened[0][1:3] == ["-m", "jupyterlab"] and opened[0][3].endswith("00_start_here.ipynb")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Whether bfloat16 is faster is tried by the clock, which differs from run to run."""
    monkeypatch.setattr("dpo_mini.embedded.pretraining.bfloat16_pays", lambda device: False)


PRETRAIN = (
    "pretrain --layers 1 --width 8 --heads 2 --vocabulary 300 --context 16 --steps 6 --batch-size 4"
).split()


def test_pretraining_goes_on_to_the_same_weights_and_only_where_it_belongs(
    texts, tmp_path, capsys, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = [*PRETRAIN, "--dataset", str(texts), "--output"]
    assert main([*command, str(whole)]) == 0
    for first in range(5):  # a stretch of no time ends after one step
        if first:  # a later stretch keeps to what the first one found
            monkeypatch.setattr("dpo_mini.embedded.pretraining.bfloat16_pays", lambda device: True)
        capsys.readouterr()
        assert main([*command, str(parts), "--minutes", "1e-9"]) == 0
        assert "goes on from here" in capsys.readouterr().out
    assert main([*command, str(parts)]) == 0
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()

    fails(capsys, main([*command, str(whole), "--layers", "2"]), "layers was 1, is 2")
    other = tmp_path / "other.jsonl"
    other.write_text(texts.read_text().replace("Review", "Report"))
    changed = [*PRETRAIN, "--dataset", str(other), "--output", str(whole)]
    fails(capsys, main(changed), "belongs to another run: data was")
    assert main([*changed, "--overwrite"]) == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    fails(capsys, main([*command, str(foreign)]), "holds no run of pretraining")
    assert [p.name for p in foreign.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("name", ["tokenizer.json", "corpus.pt", "checkpoint.pt"])
def test_half_files_of_pretraining_are_remade_or_told(name, texts, tmp_path, capsys):
    command = [*PRETRAIN, "--dataset", str(texts), "--output", str(tmp_path / "o")]
    assert main(command) == 0
    before = (tmp_path / "o" / "model.safetensors").read_bytes()
    file = tmp_path / "o" / name
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "o" / "checkpoint.pt.tmp").write_bytes(b"half")
    if name == "checkpoint.pt":
        fails(capsys, main(command), "checkpoint.pt cannot be read")
        file.unlink()
    assert main(command) == 0
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == before
    assert not list((tmp_path / "o").glob("*.tmp"))


def test_prompts_end_where_the_model_has_none_to_give(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dpo_mini.embedded.prompts.beginning", lambda *_: "The only one")
    command = ["prompts", "--model", str(tiny_folder), "--output", str(tmp_path / "o")]
    fails(capsys, main(command), "only 1 different beginnings")


def test_judges_need_labelled_texts_and_a_gpt2(texts, tmp_path, capsys):
    command = ["judges", "--dataset", str(texts), "--output", str(tmp_path / "o")]
    fails(capsys, main(command), "0 or 1 in 'label'")


# --- a model's temperature ---


def tiny_model(kind):
    """A random model whose logits are far from 0, and whose norms and biases are not trivial."""
    import torch
    import transformers

    torch.manual_seed(0)
    shared = dict(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    config, model = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),  # 1 + weight, softly capped logits
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "cohere": ("CohereConfig", "CohereForCausalLM"),  # scaled logits
        "phi": ("PhiConfig", "PhiForCausalLM"),  # a head with a bias
        "olmo": ("OlmoConfig", "OlmoForCausalLM"),  # a norm without weights
    }[kind]
    if kind in ("qwen2", "cohere", "phi", "olmo"):
        shared.pop("head_dim")
    model = getattr(transformers, model)(getattr(transformers, config)(**shared)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "gemma3", "qwen2", "cohere", "phi"])
@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_a_cooled_model_is_the_model_at_that_temperature(kind, temperature, tmp_path):
    import torch

    model = tiny_model(kind)
    ids = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        cold = cooled(model, temperature)
        cold.save_pretrained(tmp_path)
        for one in (cold, type(model).from_pretrained(tmp_path)):
            logps = one(input_ids=ids).logits.log_softmax(-1)
            assert torch.allclose(logps, (before / temperature).log_softmax(-1), atol=1e-5)
        assert torch.equal(model(input_ids=ids).logits, before)  # the model itself is untouched


def test_what_cannot_be_cooled_is_refused():
    with pytest.raises(HubError, match="--temperature"):
        cooled(tiny_model("olmo"), 0.5)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError):
            cooled(tiny_model("gpt2"), temperature)
