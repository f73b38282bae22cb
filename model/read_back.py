"""Reads an export in a fresh process and says what it computes, so that the exporter can compare it with the source.

    python -I model/read_back.py FORMAT PATH REQUEST.json ANSWER.safetensors

A transformers folder is read with nothing but transformers, without this repository, as its users do. The request
holds prompts (lists of ids) and texts, the answer the logits of each prompt and, where the export has a tokenizer of
its own, the ids of each text.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(kind: str, path: str, request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    answer: dict[str, torch.Tensor] = {}
    if kind in ("transformers", "llama"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=kind == "transformers").eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        for number, text in enumerate(request["texts"]):
            answer[f"ids{number}"] = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        chat = [{"role": "user", "content": request["texts"][0]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer["chat"] = torch.tensor(ids)
    else:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from model.export import read_llama2c
        from model.gguf_file import read_gguf

        model = {"gguf": read_gguf, "llama2c": read_llama2c}[kind](Path(path)).eval()
    with torch.inference_mode():
        for number, prompt in enumerate(request["prompts"]):
            answer[f"logits{number}"] = model(torch.tensor([prompt])).logits[0].contiguous().clone()
    save_file(answer, answer_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
