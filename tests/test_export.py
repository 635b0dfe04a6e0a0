"""A run handed over: the exported TRL script trains the same, step by step; what the other tools
would do otherwise is counted or refused.
"""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_gpt2
from test_trl import rows

from dpo_mini import export, publish
from dpo_mini.cli import main
from dpo_mini.data import DataError, write_jsonl
from dpo_mini.models import load_model
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import TokenizedPair
from dpo_mini.training import batch_indices

NAMES = ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/margins")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """A folder with pairs and three runs of `dpo-mini train`: dpo, cdpo in parts, with LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    write_jsonl(folder / "pairs.jsonl", rows())
    common = ["train", "--model", str(tiny_folder), "--pairs", str(folder / "pairs.jsonl"),
              "--steps", "20", "--batch-size", "4", "--json",
              "--learning-rate", "1e-3"]  # fmt: skip
    more = {
        "dpo": ["--beta", "0.3", "--warmup-steps", "5", "--schedule", "cosine",
                "--weight-decay", "0.1"],
        "cdpo": ["--loss", "cdpo", "--label-smoothing", "0.2", "--micro-batch-size", "2"],
        "lora": ["--lora", "2", "--beta", "0.5"],
    }  # fmt: skip
    for name, options in more.items():
        assert main([*common, *options, "--output", str(folder / name)]) == 0
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs the test extra: pip install '.[test]'")
@pytest.mark.parametrize("name", ["dpo", "cdpo", "lora"])
def test_the_exported_trl_script_takes_the_same_steps(runs, tiny_folder, name, tmp_path):
    command = ["export", "--of", str(runs / name), "--to", "trl",
               "--pairs", str(runs / "pairs.jsonl"), "--model", str(tiny_folder),
               "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    done = subprocess.run([sys.executable, tmp_path / "out" / "train.py"], capture_output=True,
                          text=True, timeout=300, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = read(tmp_path / "out", "log.jsonl"), read(runs / name, "log.jsonl")[1:]
    assert len(theirs) == len(ours) == 20
    for step, (a, b) in enumerate(zip(ours, theirs)):
        for key in NAMES:
            near = {"abs": 2e-4 if key == "loss" else 2e-3, "rel": 1e-4}
            assert a[key] == pytest.approx(b[key], **near), (step, key)
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-6), step
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2), step
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.02  # it learnt, so that there was a way
    assert "loss: 20 steps, at most" in done.stdout


@pytest.fixture
def run(tokenizer):
    """A run as `read_run` gives it, of four pairs of texts; the last answer was cut."""
    end = tokenizer.eos_token_id

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, good, bad = tokenizer("This movie")["input_ids"], ids(" was great."), ids(" was dull.")
    whole = TokenizedPair(prompt, [*good, end], [*bad, end])
    cut = TokenizedPair(prompt, [*good, end], bad)
    config = TrainingConfig(steps=3, batch_size=4, micro_batch_size=2, seed=5)
    pairs = [whole, whole, whole, cut]
    return export.FinishedRun(config, "dpo", {"beta": 0.2}, 0, "embedded", pairs, tokenizer, [])


def test_a_sample_that_was_cut_gets_an_eos_where_a_tool_reads_texts(run):
    assert export.same_ids(run, export.reads_joined) == [True, True, True, False]
    assert export.same_ids(run, export.reads_apart) == [True] * 4


def test_the_order_is_that_of_the_runs_steps(run):
    wanted = [i for step in range(3) for i in batch_indices(4, step, 4, 1, 5)]
    assert export.order(run) == wanted and len(set(map(tuple, [wanted[:4], wanted[4:8]]))) == 2


def test_unequal_parts_of_a_batch_are_refused(run):
    odd = run._replace(config=TrainingConfig(batch_size=4, micro_batch_size=3))
    with pytest.raises(DataError, match="unequal parts.*divides it"):
        export.trl_arguments(odd)


@pytest.mark.parametrize("loss", ["ipo", "cpo", "orpo", "simpo", "preferred-ft", "unlikelihood"])
def test_a_loss_that_trl_has_not_is_refused_and_not_replaced(run, loss):
    with pytest.raises(DataError, match=f"no loss that equals {loss}"):
        export.trl_loss(run._replace(loss=loss))


@pytest.mark.parametrize("loss", ["ipo", "robust", "dpo-norm", "cpo"])
def test_a_loss_that_llama_factory_has_not_is_refused(run, loss, tmp_path):
    with pytest.raises(DataError, match=f"no pref_loss that equals {loss}"):
        export.export(run._replace(loss=loss), "llama-factory", tmp_path, "0.9.5")


def test_smoothing_that_trl_ignores_is_written_as_two_losses(run):
    smooth = run._replace(loss="cdpo", options={"beta": 0.2, "label_smoothing": 0.1})
    found = export.trl_loss(smooth)
    assert found["loss_type"] == ["sigmoid", "robust"]
    assert found["loss_weights"] == pytest.approx([1.8, -0.8])


@pytest.mark.parametrize("tool", export.VERSIONS)
def test_an_unknown_version_is_refused_with_one_to_try(tool):
    with pytest.raises(DataError, match=f"{tool} 0.0.1 was not checked.*--tool-version"):
        export.known_version(tool, "0.0.1")


@pytest.mark.parametrize("tool", ["llama-factory", "axolotl"])
def test_a_configuration_is_yaml_with_the_settings_numbers(run, tool, tmp_path):
    report = export.export(run, tool, tmp_path, export.VERSIONS[tool][-1])
    assert yaml.safe_load((tmp_path / "train.yaml").read_text()) == report["settings"]
    assert report["other_ids"] == (1 if tool == "axolotl" else 0)
    assert ("1 of 4 pairs get other token ids" in (tmp_path / "README.md").read_text()) == (
        tool == "axolotl"
    )
    assert 0 < report["settings"]["learning_rate"] == run.config.learning_rate


def keywords(tree, name: str) -> set[str]:
    """The names of the arguments with which a script calls `name`."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    found = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == name]
    return {k.arg for c in found for k in c.keywords if k.arg}


def test_unsloths_script_is_whole_and_its_arguments_are_unsloths(run, tmp_path):
    export.export(run._replace(lora=4), "unsloth", tmp_path, "2026.10.9")
    tree = ast.parse((tmp_path / "train.py").read_text())
    named = keywords(tree, "from_pretrained"), keywords(tree, "get_peft_model")
    assert "load_in_4bit" in named[0] and "random_state" in named[1]
    source = os.environ.get("DPO_MINI_UNSLOTH")  # unpacked: it cannot be imported on a CPU
    if source:
        for file, wanted in (("loader.py", named[0]), ("llama.py", {*named[1], "r", "lora_alpha",
                             "lora_dropout", "target_modules"})):  # fmt: skip
            functions = ast.walk(ast.parse((Path(source) / "models" / file).read_text()))
            name = "from_pretrained" if file == "loader.py" else "get_peft_model"
            taken = [{a.arg for a in (*f.args.args, *f.args.kwonlyargs)} for f in functions
                     if isinstance(f, ast.FunctionDef) and f.name == name]  # fmt: skip
            assert wanted <= taken[0], wanted - taken[0]


def test_other_pairs_than_the_runs_are_refused(runs, tiny_folder, tmp_path):
    write_jsonl(tmp_path / "other.jsonl", rows()[1:])
    with pytest.raises(DataError, match="has not the pairs of"):
        export.read_run(runs / "dpo", str(tiny_folder), str(tmp_path / "other.jsonl"))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no checkpoint"):
        export.read_run(tmp_path, "embedded", "pairs.jsonl")


def test_a_run_says_by_itself_what_it_was_trained_on(runs, tmp_path, capsys):
    assert main(["export", "--of", str(runs / "dpo"), "--output", str(tmp_path / "out"), "--json",
                 "--model", str(runs.parent / "none")]) == 1  # fmt: skip
    assert "pairs" not in capsys.readouterr().err  # they were found; the model was not


# --- GGUF and the Hub ---


def test_a_modelfile_switches_ollamas_own_sampling_off(tokenizer):
    said = publish.modelfile(make_gpt2(), tokenizer)
    for line in ("top_k 0", "top_p 1", "repeat_penalty 1", "temperature 1", "num_ctx 64"):
        assert f"PARAMETER {line}\n" in said
    assert 'TEMPLATE """{{ .Prompt }}"""' in said


def test_rounding_keeps_vectors_and_moves_matrices_by_half_a_step_at_most():
    torch.manual_seed(0)
    model = make_gpt2(width=32)
    for (name, a), b in zip(model.named_parameters(), publish.rounded(model, "q8_0").parameters()):
        if a.ndim == 1 or "wpe" in name:
            assert torch.equal(a, b), name
            continue
        turned = ".c_" in name or "c_fc" in name  # GPT-2's own layers: [inputs, outputs]
        a, b = (a.T, b.T) if turned else (a, b)
        blocks = a.reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127  # one scale for 32 neighbours of a row
        moved = (b.reshape(-1, 32) - blocks).abs()
        assert (moved <= 0.51 * step + 1e-3 * blocks.abs()).all() and moved.max() > 0, name


def test_nothing_goes_to_the_hub_unless_it_is_asked_for(runs, tiny_folder, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, *given, **named):
            calls.append("create")

        def upload_folder(self, repo_id, folder_path, **named):
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    base = str(tiny_folder)
    report = publish.for_hub(str(runs / "dpo"), tmp_path / "a", base)
    assert calls == [] and "Nothing was sent" in report["said"]
    publish.for_hub(str(runs / "dpo"), tmp_path / "b", base, "me/mine")
    assert calls[0] == "create" and calls[1][0] == "me/mine" and "README.md" in calls[1][1]
    for name in ("mine", "a/b/c", "me/m ine"):
        with pytest.raises(DataError, match="user/name"):
            publish.for_hub(str(runs / "dpo"), tmp_path / "c", base, name)


def test_the_hubs_card_is_read_by_its_own_library_and_names_no_folder(runs, tiny_folder):
    card = huggingface_hub.ModelCard(publish.hub_card(runs / "dpo", str(tiny_folder)))
    assert card.data.tags == ["dpo", "dpo_mini"] and card.data.base_model is None
    assert str(runs) not in card.content and "| beta | 0.3 |" in card.content
    real = huggingface_hub.ModelCard(publish.hub_card(runs / "dpo", "smollm2"))
    assert real.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert real.data.license == "apache-2.0"


@pytest.mark.slow
@pytest.mark.skipif("DPO_MINI_CONVERTER" not in os.environ, reason="needs llama.cpp's converter")
def test_a_gguf_file_holds_the_model_rounded_and_nothing_else(runs, tmp_path):
    publish.for_ollama(str(runs / "dpo"), tmp_path, "f16", os.environ["DPO_MINI_CONVERTER"])
    model, _ = load_model(str(runs / "dpo"))
    read, here = publish.read_gguf(tmp_path / "model.gguf", model), publish.rounded(model, "f16")
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), here.parameters()))


def test_a_missing_converter_is_named(tmp_path):
    with pytest.raises(DataError, match="convert_hf_to_gguf.py"):
        publish.for_ollama("embedded", tmp_path, "f16", None)
