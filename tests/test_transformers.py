"""The model inside transformers, accelerate, peft: what users of those libraries do with it."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from peft import LoraConfig, get_peft_model
from test_model import random_ids
from transformers import Trainer, TrainingArguments

from model.model import Transformer, rotary_turns

DENSE_LAYER = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
FEED_FORWARD = ["w1", "w2", "w3"]


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_keys_are_the_published_ones(use_moe):
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    for layer in range(2):
        names = list(DENSE_LAYER)
        if use_moe:
            names += [f"feed_forward.experts.{e}.{w}" for e in range(4) for w in FEED_FORWARD]
            names += [f"feed_forward.shared_experts.{w}" for w in FEED_FORWARD] + ["feed_forward.gate"]
        else:
            names += [f"feed_forward.{w}" for w in FEED_FORWARD]
        expected |= {f"layers.{layer}.{name}.weight" for name in names}
    ours = make_model(use_moe=use_moe)
    assert set(ours.state_dict()) == expected
    assert ours.output.weight is ours.tok_embeddings.weight


FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, results = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
module = sys.modules[type(model).__module__]
turns = module.rotary_turns(torch.arange(50)[None], 8, model.config.rope_theta, model.config.rope_factor)
ids = torch.load(results + ".ids", weights_only=True)
generated = model.generate(ids, max_new_tokens=5, do_sample=False)
torch.save({"logits": model(ids).logits, "turns": turns, "generated": generated}, results)
assert len(tokenizer("你好").input_ids) > 0
"""


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_saved_folder_loads_anywhere(use_moe, tokenizer, tmp_path):
    """In a fresh process, in another folder, without this repository and offline."""
    ours = make_model(use_moe=use_moe, rope_scaling=2.0)
    ours.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    ids = random_ids(1, 12)
    torch.save(ids, tmp_path / "results.ids")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS, "folder", "results"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "results", weights_only=True)
    torch.testing.assert_close(found["logits"], ours(ids).logits)
    turns = rotary_turns(torch.arange(50)[None], 8, ours.config.rope_theta, 2.0)
    assert torch.equal(found["turns"], turns)
    assert found["generated"].tolist() == ours.generate(ids, max_new_tokens=5, do_sample=False).tolist()

    again = Transformer.from_pretrained(tmp_path / "folder")
    assert again.output.weight is again.tok_embeddings.weight
    torch.testing.assert_close(again.eval()(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("use_moe", [False, True])
def test_accelerate_trains_it(use_moe):
    accelerator = Accelerator(cpu=True)
    ours = make_model(use_moe=use_moe).train()
    ours, optimizer = accelerator.prepare(ours, torch.optim.AdamW(ours.parameters(), lr=1e-2))
    ids = random_ids(4, 20)
    losses = []
    for _ in range(3):
        loss = ours(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("use_moe", [False, True])
def test_transformers_trainer_trains_it(use_moe, tmp_path):
    ours = make_model(use_moe=use_moe)
    ids = random_ids(8, 20)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    labels = ids.clone()
    labels[:, 0] = -100  # Trainer counts labels before the shift: one that nothing can predict would count, too
    rows = [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels, strict=True)]
    trainer = Trainer(ours, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[2] < losses[1] < losses[0]
    # The first loss is that of the untrained model: accumulation neither doubles nor halves it.
    assert losses[0] == pytest.approx(make_model(use_moe=use_moe)(ids, labels=ids).loss.item(), rel=1e-3)
    assert trainer.evaluate()["eval_loss"] < losses[0]


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_moe, use_reentrant):
    ids = random_ids(2, 20)
    gradients = []
    for checkpointing in (False, True):
        ours = make_model(use_moe=use_moe, aux_loss_alpha=1.0).train()
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ours(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in ours.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_peft_adapts_the_matrices_and_leaves_the_head_alone(use_moe, task_type):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type=task_type)
    adapted = get_peft_model(make_model(use_moe=use_moe), lora)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("attention.wk.lora_A" in name for name in trainable)
    assert any("w2.lora_A" in name for name in trainable)
    assert not any("output" in name or "tok_embeddings" in name for name in trainable)
    ids = random_ids(2, 20)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())


def test_outputs_may_be_tuples():
    """The loss first, or without labels the logits, as in transformers' own models."""
    ours, ids = make_model(), random_ids(1, 6)
    for labels, first in ((ids, "loss"), (None, "logits")):
        expected = ours(ids, labels=labels)
        assert torch.equal(ours(ids, labels=labels, return_dict=False)[0], expected[first])
        assert torch.equal(expected[0], expected[first])
        assert ours(ids, labels=labels, return_dict=None)[first].shape == expected[first].shape


def test_hidden_states_are_those_of_every_layer():
    ours, ids = make_model(n_layers=3), random_ids(1, 6)
    output = ours(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], ours.tok_embeddings(ids))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    torch.testing.assert_close(ours.output(output.last_hidden_state), output.logits)
    # What one block fewer gives, before the final norm, is what the last block is given.
    ours.layers = ours.layers[:2]
    torch.testing.assert_close(ours.norm(output.hidden_states[2]), ours(ids).last_hidden_state)
    assert ours(ids).hidden_states is None


def test_beams_and_sampling_run():
    ours, ids = make_model(), random_ids(2, 6)
    assert ours.generate(ids, max_new_tokens=4, num_beams=3).shape[1] <= 10
    assert ours.generate(ids, max_new_tokens=4, do_sample=True, top_k=5).shape[1] <= 10
