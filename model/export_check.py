"""Is an export what it was made from? It is read in a fresh process, and must compute the same logits and ids."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .chat import encode
from .cli import UserError
from .export import context_of
from .model import Transformer
from .tokenizer import encode_texts

TOLERANCE = 1e-4  # of logits, relative where they are above 1: rounding in another order of sums
TEXTS = ["你好，请介绍一下你自己。", "The year 2024:  naïve café, 3.14159 + 人工智能！\n\n\t«done»"]


def check_export(kind: str, path: Path, model: Transformer, tokenizer: PreTrainedTokenizerBase) -> float:
    """Largest difference of a logit. Raises UserError where the export does not compute what `model` does."""
    prompts = fixed_prompts(model, tokenizer)
    found = read_back(kind, path, prompts)
    if "chat" in found:
        check_tokenizer(found, tokenizer, path)
    worst = 0.0
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            expected, logits = model(torch.tensor([prompt])).logits[0].float(), found[f"logits{number}"].float()
            if expected.shape != logits.shape or not torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
                raise UserError(f"{path} computes other logits than the model it was made from: nothing is exported")
            worst = max(worst, float((logits - expected).abs().max()))
    return worst


def fixed_prompts(model: Transformer, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A question, and random ids as far as the context goes, so that all positions count; always the same ones."""
    ids, _ = encode(tokenizer, [{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True)
    length = min(context_of(model.config), 256)
    generator = torch.Generator().manual_seed(0)
    return [ids[:length], torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()]


def check_tokenizer(found: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raises UserError where texts have other ids, or a chat has."""
    texts = encode_texts(tokenizer, TEXTS)
    chat, _ = encode(tokenizer, [{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True)
    same = all(found[f"ids{number}"].tolist() == ids for number, ids in enumerate(texts))
    if not same or found["chat"].tolist() != chat:
        raise UserError(f"{path} tokenizes otherwise than the tokenizer it was made from: nothing is exported")


def read_back(kind: str, path: Path, prompts: list[list[int]]) -> dict[str, Tensor]:
    """What read_back.py, in a process of its own, says of an export. Raises UserError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.safetensors"
        request.write_text(json.dumps({"prompts": prompts, "texts": TEXTS}), encoding="utf-8")
        # No cache of an earlier export's code, no way to a hub.
        environment = os.environ | {"HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_OFFLINE": "1"}
        script = Path(__file__).with_name("read_back.py")
        command = [sys.executable, "-I", str(script), kind, str(path.absolute()), str(request), str(answer)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"{path} cannot be read back ({last}): nothing is exported")
        return {name: tensor.clone() for name, tensor in load_file(answer).items()}
