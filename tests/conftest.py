"""What tests share: a small tokenizer and small models, made here, so that no test needs data or downloads."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Before torch is imported: the same precision on every machine, also where --dtype auto would take bfloat16.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from model.LMConfig import LMConfig  # noqa: E402
from model.model import Transformer  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402

torch.set_num_threads(1)  # models of this size only lose by waiting for a second thread, most of all on a busy machine

LINES = ["你好，世界！", "春天来了，小草绿了。", "user\n", "assistant\n", "Hello, world 123", "你好，你是谁？"]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of some 300 tokens: rare characters and emojis are several tokens each."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    specials = dict(unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=bpe, **specials).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(params=["oneDNN", "PyTorch's own"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of products, whichever this machine's processor would take."""
    onednn = request.param == "oneDNN" and torch.backends.mkldnn.is_available()
    monkeypatch.setattr("model.products.ONEDNN", onednn)


def make_model(seed: int = 0, **overrides) -> Transformer:
    """Random weights, larger than fresh ones, so that the next token's distribution is far from even."""
    fields = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=64, multiple_of=16)
    torch.manual_seed(seed)
    return Transformer(LMConfig(**(fields | dict(initializer_range=0.3) | overrides))).eval()


def load_script(name: str) -> ModuleType:
    """A script as a module; names that begin with a digit cannot be imported."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
