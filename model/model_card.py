"""README.md of an exported folder: what the model is, how to use it, and what was measured of it."""

import json
from pathlib import Path
from typing import Any

from .checkpoint import read_description, weights_hash
from .export import context_of
from .model import Transformer

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
model = AutoModelForCausalLM.from_pretrained(folder{trust})
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{{"role": "user", "content": "你好"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, do_sample=True, temperature=0.7, top_p=0.9)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def model_card(name: str, kind: str, model: Transformer, source: Path, lora: str, result_dir: Path) -> str:
    """Markdown with the head that model hubs read. Figures come from files beside the checkpoint and C-Eval's results;
    what was not measured is left out, as are the base model's figures where an adapter is merged into it."""
    config = model.config
    experts = f"，混合专家 {config.n_shared_experts}+{config.n_routed_experts}，top-{config.num_experts_per_tok}"
    heads = f"{config.n_layers} 层，宽 {config.dim}，{config.n_heads} 个查询头，{config.n_kv_heads} 个键值头"
    rows = {
        "参数量": f"{model.num_parameters():,}",
        "结构": heads + experts * config.use_moe,
        "词表 / 上下文": f"{config.vocab_size:,} / {context_of(config)}",
        **({"适配器": Path(lora).name} if lora else training_rows(source)),
        **ceval_rows(source, lora, result_dir),
    }
    trust = ", trust_remote_code=True" if kind == "transformers" else ""
    return "\n".join(
        [
            "---",
            "language: zh",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [minimind]",
            "---",
            "",
            f"# {name}",
            "",
            "用 MiniMind 从零训练的中文小语言模型。A small Chinese language model, trained from zero with MiniMind.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {title} | {value} |" for title, value in rows.items()),
            "",
            USE.format(name=name, trust=trust),
            "",
        ]
    )


def training_rows(source: Path) -> dict[str, str]:
    """What NAME.json and NAME.metrics.jsonl beside the weights tell."""
    if not source.is_file():
        return {}
    rows = {}
    description = read_description(source)
    if "tokens" in description:
        rows["训练（最后一个阶段）"] = (
            f"{description['stage']}：{description['step']:,} 步，{description['tokens']:,} 个词元"
        )
    last = last_validation(source.with_suffix(".metrics.jsonl"))
    if last.get("step") == description.get("step") and "val_loss" in last:
        rows["留出数据上的损失"] = f"{last['val_loss']:.4f} nats/词元"
        if "bits_per_byte" in last:
            rows["留出文本"] = f"{last['bits_per_byte']:.4f} 比特/字节"
    return rows


def last_validation(metrics: Path) -> dict[str, Any]:
    if not metrics.is_file():
        return {}
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return next((line for line in reversed(lines) if "val_loss" in line), {})


def ceval_rows(source: Path, lora: str, result_dir: Path) -> dict[str, str]:
    """Results of eval_ceval.py for exactly these weights, whatever they were called, and this adapter."""
    files = sorted(result_dir.glob("*/summary.json"))
    if not files:
        return {}
    weights = weights_hash(source)
    rows = {}
    for file in files:
        summary = json.loads(file.read_text(encoding="utf-8"))
        as_it_is = summary.get("lora_scale", 1.0) == 1.0 and summary.get("quantize", "none") == "none"
        if as_it_is and (summary["weights_sha256"], summary["lora"]) == (weights, lora):
            total = summary["total"]
            low, high = (100 * bound for bound in total["interval_95"])
            rows[f"{Path(summary['data_dir']).name}（{summary['prompt_style']}，{summary['shots']}-shot）"] = (
                f"{total['correct']}/{total['questions']} = {100 * total['accuracy']:.2f} %"
                f"（95 % 区间 {low:.1f} – {high:.1f}；随机 25 %）"
            )
    return rows
