"""The command line as a newcomer meets it: a sentence for each mistake, nothing lost."""

import json
import shutil
import sys
import time

import pytest

from dpo_mini.cli import main
from dpo_mini.hub import HubError, hub_is_reachable
from dpo_mini.models import load_model

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
    fails(
        capsys, train(*given, "--pairs", path, "--loss", "dpo"), "'chosen', 'rejected' is missing"
    )
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
    ["demo", "pretrain", "sft", "pairs", "train", "evaluate", "sample", "env", "judges", "prompts"],
)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0 and "--json" in capsys.readouterr().out


def test_lora_from_the_command_line(tiny_folder, pairs, tmp_path):
    pytest.importorskip("peft", exc_type=ModuleNotFoundError)
    assert (
        train("--model", tiny_folder, "--pairs", pairs, "--output", tmp_path / "o", "--lora", "2")
        == 0
    )
    load_model(tmp_path / "o")
