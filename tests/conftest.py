"""Tiny models that make every test exact and fast; the embedded tokenizer gives them a real
vocabulary.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpo_mini.models import EMBEDDED_FOLDER
from dpo_mini.tokens import TokenizedPair

SHARED_IMDB = Path(__file__).resolve().parents[2] / "shared" / "data" / "imdb"
needs_imdb = pytest.mark.skipif(
    not SHARED_IMDB.exists(), reason="IMDb's parquet files are not beside the project"
)


def make_gpt2(vocabulary=97, width=32, layers=2, context=64):
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=4,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def make_llama():
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["gpt2", "llama"])
def any_model(request):
    torch.manual_seed(0)
    return make_gpt2() if request.param == "gpt2" else make_llama()


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return make_gpt2()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_FOLDER / "model")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A model folder in the Hub's format: tiny weights, the embedded tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_gpt2(len(tokenizer), width=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_pairs(n, seed=0, vocabulary=97, longest=12):
    """Pairs of unequal lengths; completions end with EOS (id 0)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, vocabulary, (length,), generator=generator).tolist()

    return [
        TokenizedPair([0, *ids(1, 6)], [*ids(1, longest), 0], [*ids(1, longest), 0])
        for _ in range(n)
    ]
