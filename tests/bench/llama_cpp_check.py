"""Does llama.cpp tokenize and generate as we do? Dense and experts, in each GGUF type.

    pip install llama-cpp-python==0.3.36              # builds llama.cpp: some 12 minutes on two cores
    python tests/bench/llama_cpp_check.py             # random models with a tokenizer made here
    python tests/bench/llama_cpp_check.py --checkpoint out/multi_chat/full_sft_512.pth

Skipped where llama-cpp-python is not installed. Otherwise, for each file: are the ids of texts and of a chat the same,
how far do logits lie apart, and are the greedy answers the same? Ends with 1 where ids differ, or where logits of a
float32 file do by more than 1e-2, or its greedy answer does. (In products with q8_0, llama.cpp rounds activations to
8 bits, too.)
"""

import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from model.cli import run  # noqa: E402

TEXTS = [
    "你好，请介绍一下你自己。",
    "The year 2024:  naïve café, 3.14159 + 人工智能！\n\n\t«done»  ",
    "def f(x):\n    return x**2  # 平方\r\n\r\n🙂🙂 don't I'll THEY'RE",
    "</s>\n<s>assistant\n",
]
ANSWER = 24  # greedy tokens
LARGEST = 1e-2  # difference of logits that a float32 file may have


@dataclass
class Args:
    checkpoint: str = ""  # a .pth or a folder; empty: random models, dense and experts
    tokenizer: str = ""  # folder of the tokenizer; empty: the one that comes with the checkpoint


def main(args: Args) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        print("skipped: llama-cpp-python is not installed")
        return
    from model.gguf_file import TYPES, write_gguf

    failures = 0
    for name, model, tokenizer in models(args):
        for dtype in TYPES:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "a.gguf"
                write_gguf(file, model, tokenizer, dtype, name)
                ids, difference, greedy = compare(file, model, tokenizer)
            print(
                f"{name} {dtype}: {ids} of {len(TEXTS) + 1} tokenized alike, logits differ by {difference:.2e} at most"
            )
            print(f"  greedy answers {'are the same' if greedy else 'differ'}")
            failures += ids < len(TEXTS) + 1 or dtype == "f32" and (difference > LARGEST or not greedy)
    sys.exit(failures > 0)


def models(args: Args) -> list[tuple[str, Any, Any]]:
    from conftest import make_model

    from model.checkpoint import load_model
    from model.tokenizer import load_tokenizer

    if args.checkpoint:
        return [(Path(args.checkpoint).stem, *load_model(args.checkpoint, tokenizer=args.tokenizer or None))]
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), dim=64, hidden_dim=192, n_layers=3, max_seq_len=128)
    kinds = {
        "dense": {},
        "dense, stretched": {"rope_scaling": 2.0, "rope_theta": 5000.0},
        "experts": {"use_moe": True},
        "experts, stretched": {"use_moe": True, "rope_scaling": 2.0, "n_shared_experts": 2},
        "experts, none shared": {"use_moe": True, "n_shared_experts": 0},
    }
    return [(name, make_model(**sizes, **kind), tokenizer) for name, kind in kinds.items()]


def compare(file: Path, model: Any, tokenizer: Any) -> tuple[int, float, bool]:
    """How many texts have the same ids, the largest difference of a logit, whether the greedy answer is the same."""
    import llama_cpp
    import torch

    from model.chat import encode
    from model.tokenizer import encode_texts

    size = min(model.config.max_seq_len, 512)
    full = llama_cpp.GGML_TYPE_F32  # of the cache
    llama = llama_cpp.Llama(
        str(file), n_ctx=size, logits_all=True, verbose=False, type_k=full, type_v=full, flash_attn=False
    )
    ours = encode_texts(tokenizer, TEXTS)
    theirs = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
    messages = [{"role": "user", "content": TEXTS[0]}]
    prompt, _ = encode(tokenizer, messages, add_generation_prompt=True)
    laid_out = tokenizer.decode(prompt).encode()
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    same += llama.tokenize(laid_out, add_bos=False, special=True) == prompt

    prompt_1T = torch.tensor([prompt])
    settings = dict(max_new_tokens=min(ANSWER, size - len(prompt)), do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **settings)[0]
    answer = whole[len(prompt) :].tolist()
    ids = prompt + answer[:-1]
    llama.eval(ids)
    found = torch.tensor(llama.scores[: len(ids)].copy())
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    greedy = found[len(prompt) - 1 :].argmax(-1).tolist() == answer
    return same, float((found - expected).abs().max()), greedy


if __name__ == "__main__":
    run(main, Args)
