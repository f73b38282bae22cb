"""Weights on disk: what is saved comes back, what does not fit is refused in one line, nothing is half written."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from transformers import PreTrainedTokenizerBase

import model.checkpoint
from model.checkpoint import infer_config, load_model, newest_checkpoint, save_weights, weights_path
from model.cli import UserError
from model.LMConfig import PRESETS, LMConfig
from model.model import Transformer


def refused(path: Path, **options) -> str:
    """The one line that says why a checkpoint does not load."""
    with pytest.raises(UserError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same_weights(a: Transformer, b: Transformer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def saved(tmp_path, tokenizer_dir) -> Path:
    path = tmp_path / "out" / "pretrain_32.pth"
    save_weights(path, make_model(), tokenizer_dir, stage="pretrain", step=7, tokens=99)
    return path


def published_state(
    use_moe: bool = False, dim: int = 64, hidden: int = 48, vocab: int = 300
) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of published weights: 16 query heads, 8 key/value heads, 2 layers."""
    shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    for layer in ("layers.0", "layers.1"):
        shapes |= {f"{layer}.attention_norm.weight": (dim,), f"{layer}.ffn_norm.weight": (dim,)}
        shapes |= {f"{layer}.attention.{name}.weight": (dim, dim) for name in ("wq", "wo")}
        shapes |= {f"{layer}.attention.{name}.weight": (dim // 2, dim) for name in ("wk", "wv")}
        inner = f"{layer}.feed_forward"
        networks = [inner]
        if use_moe:
            networks = [*(f"{inner}.experts.{expert}" for expert in range(4)), f"{inner}.shared_experts"]
            shapes[f"{inner}.gate.weight"] = (4, dim)
        for name in networks:
            shapes |= {f"{name}.w1.weight": (hidden, dim), f"{name}.w3.weight": (hidden, dim)}
            shapes[f"{name}.w2.weight"] = (dim, hidden)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"output.weight": state["tok_embeddings.weight"]}


@pytest.mark.parametrize("use_moe", [False, True])
def test_what_is_saved_comes_back(tmp_path, tokenizer_dir, use_moe):
    network = make_model(use_moe=use_moe, rope_theta=5000.0)
    path = weights_path(tmp_path, "single_chat/full_sft", network.config)
    assert path == tmp_path / "single_chat" / ("full_sft_32_moe.pth" if use_moe else "full_sft_32.pth")
    save_weights(path, network, tokenizer_dir, stage="full_sft", step=1, tokens=2)
    loaded, tokenizer = load_model(path)
    assert same_weights(network, loaded)
    assert not loaded.training
    assert (loaded.config.rope_theta, loaded.config.n_heads, loaded.config.use_moe) == (5000.0, 4, use_moe)
    assert isinstance(tokenizer, PreTrainedTokenizerBase) and len(tokenizer) == 300


def test_the_description_says_what_the_weights_are(saved):
    description = json.loads(saved.with_suffix(".json").read_text())
    assert (description["stage"], description["step"], description["tokens"]) == ("pretrain", 7, 99)
    assert description["config"]["dim"] == 32
    assert set(os.listdir(saved.parent)) == {"pretrain_32.pth", "pretrain_32.json", "tokenizer"}


def test_one_matrix_is_stored_once(saved):
    state = torch.load(saved, weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


def test_a_folder_of_checkpoints_can_be_moved(saved, tmp_path):
    shutil.move(saved.parent, tmp_path / "elsewhere")
    loaded, tokenizer = load_model(tmp_path / "elsewhere" / saved.name)
    assert same_weights(loaded, make_model())
    assert len(tokenizer) == 300


def test_overrides_change_the_configuration(saved):
    loaded, _ = load_model(saved, rope_scaling=2.0, max_seq_len=None)
    assert (loaded.config.rope_factor, loaded.config.max_seq_len) == (2.0, 64)


# Published weights: no description beside them.


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("use_moe", [False, True])
def test_published_weights_load_strictly(tmp_path, tokenizer_dir, use_moe, prefix):
    state = published_state(use_moe)
    file = {prefix + name: tensor for name, tensor in state.items()}
    file |= {f"{prefix}layers.{layer}.attention.mask": torch.zeros(1, 1, 9, 9) for layer in (0, 1)}
    torch.save(file, tmp_path / "full_sft_64.pth")
    loaded, _ = load_model(tmp_path / "full_sft_64.pth", tokenizer=tokenizer_dir)
    weights = loaded.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert (loaded.config.n_heads, loaded.config.n_kv_heads, loaded.config.hidden_dim) == (16, 8, 48)


def test_published_weights_may_lack_the_tied_head_and_be_of_half_precision(tmp_path, tokenizer_dir):
    state = published_state()
    torch.save({k: v.half() for k, v in state.items() if k != "output.weight"}, tmp_path / "a.pth")
    loaded, _ = load_model(tmp_path / "a.pth", tokenizer=tokenizer_dir)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.output.weight, state["tok_embeddings.weight"].half().float())


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_configurations_of_published_sizes_are_seen_in_the_shapes(name):
    config = LMConfig.preset(name)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    inferred = LMConfig(**infer_config(state, {}, Path("weights.pth")))
    assert inferred.to_dict() == config.to_dict()


def test_head_counts_can_be_told(tmp_path, tokenizer_dir):
    torch.save(dict(make_model().state_dict()), tmp_path / "a.pth")
    loaded, _ = load_model(tmp_path / "a.pth", tokenizer=tokenizer_dir, n_heads=4)
    assert (loaded.config.n_heads, loaded.config.n_kv_heads) == (4, 2)


# What does not fit is refused.


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path, tokenizer_dir):
    state = published_state()
    state["layers.1.attention.wk.weight"] = torch.zeros(24, 64)
    torch.save(state, tmp_path / "a.pth")
    message = refused(tmp_path / "a.pth", tokenizer=tokenizer_dir)
    assert "layers.1.attention.wk.weight" in message and "[24, 64]" in message and "[32, 64]" in message


def test_missing_and_unknown_tensors_are_named(tmp_path, tokenizer_dir):
    state = published_state()
    torch.save({k: v for k, v in state.items() if k != "layers.1.ffn_norm.weight"}, tmp_path / "a.pth")
    assert "layers.1.ffn_norm.weight" in refused(tmp_path / "a.pth", tokenizer=tokenizer_dir)
    torch.save(state | {"layers.1.bias": torch.zeros(1)}, tmp_path / "a.pth")
    assert "layers.1.bias" in refused(tmp_path / "a.pth", tokenizer=tokenizer_dir)


def test_a_head_of_its_own_is_refused(tmp_path, tokenizer_dir):
    state = published_state()
    torch.save(state | {"output.weight": state["output.weight"] + 1}, tmp_path / "a.pth")
    assert "output.weight" in refused(tmp_path / "a.pth", tokenizer=tokenizer_dir)


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(2)},
        {0: torch.ones(2)},
        {"a": 1},
        [torch.ones(2)],
        {"tok_embeddings.weight": torch.ones(2)},
        {"tok_embeddings.weight": torch.ones(30, 8), "layers.0.attention.wk.weight": torch.ones(8, 8)},
    ],
    ids=["no embedding", "number as name", "no tensor", "list", "one dimension", "narrower than its heads"],
)
def test_what_is_no_model_is_refused(tmp_path, tokenizer_dir, content):
    torch.save(content, tmp_path / "a.pth")
    assert "a.pth" in refused(tmp_path / "a.pth", tokenizer=tokenizer_dir)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("damage", ["empty", "half", "text", "pickle bytes"])
def test_a_damaged_file_is_refused(saved, tokenizer_dir, damage, described):
    data = saved.read_bytes()
    name = data.index(b"data.pkl") + 40  # inside the pickle that names the tensors
    damaged = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "text": b"hello",
        "pickle bytes": data[:name] + bytes(b ^ 255 for b in data[name : name + 400]) + data[name + 400 :],
    }
    saved.write_bytes(damaged[damage])
    if not described:
        saved.with_suffix(".json").unlink()
    assert saved.name in refused(saved, tokenizer=tokenizer_dir)


def test_one_flipped_bit_is_noticed(saved):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    saved.write_bytes(data)
    assert "sha256" in refused(saved)


class Code:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("name", ["a.pth", "folder"])
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_file_is_not_run(tmp_path, tokenizer_dir, name, write):
    path, file = tmp_path / name, tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "minimind"}))
        file = path / "pytorch_model.bin"
    write({"a": Code(tmp_path / "witness")}, file)
    refused(path, tokenizer=tokenizer_dir)
    assert not (tmp_path / "witness").exists()
    pickle.loads(pickle.dumps(Code(tmp_path / "witness")))  # it would have been seen
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": 1, "tokenizer": ""}', "\udcff"])
def test_a_bad_description_is_refused(saved, text):
    saved.with_suffix(".json").write_bytes(text.encode(errors="surrogateescape"))
    assert "pretrain_32.json" in refused(saved)


@pytest.mark.parametrize("change", [{"dim": 33}, {"dim": "x"}, {"n_layers": -1}, {"n_heads": 0}, {"n_layers": 3}])
def test_a_configuration_that_makes_no_such_model_is_refused(saved, change):
    file = saved.with_suffix(".json")
    description = json.loads(file.read_text())
    description["config"] |= change
    file.write_text(json.dumps(description))
    assert saved.name in refused(saved)


def test_a_tokenizer_of_the_wrong_size_is_refused(tmp_path, tokenizer_dir):
    torch.save(published_state(vocab=200), tmp_path / "a.pth")
    message = refused(tmp_path / "a.pth", tokenizer=tokenizer_dir)
    assert "300" in message and "200" in message and "--tokenizer" in message


def test_a_tokenizer_that_was_exchanged_or_lost_is_refused(saved):
    (file,) = saved.parent.glob("tokenizer/*/tokenizer.json")
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    assert "--tokenizer" in refused(saved)
    file.unlink()
    assert "no tokenizer" in refused(saved)


def test_no_such_file(tmp_path):
    assert "nowhere.pth" in refused(tmp_path / "nowhere.pth")
    assert str(tmp_path) in refused(tmp_path)


# Whatever moment a save is killed at.


class Killed(BaseException):
    """What a signal is to a running function: no `except` for errors catches it."""


def test_killed_at_any_moment_a_save_leaves_what_can_be_loaded(tmp_path, tokenizer_dir, monkeypatch):
    """Save A, then B and C killed at their n-th step (two in a row, so that a leftover of the first is there too)."""
    first, second, third = (make_model(seed) for seed in range(3))
    steps_left = 0

    def stumble(function):
        def step(*args, **kwargs):
            nonlocal steps_left
            if steps_left == 0:
                raise Killed
            steps_left -= 1
            return function(*args, **kwargs)

        return step

    for module, name in ((os, "replace"), (torch, "save"), (model.checkpoint, "flush"), (shutil, "copy2")):
        monkeypatch.setattr(module, name, stumble(getattr(module, name)))

    def save(network: Transformer, steps: int) -> bool:
        nonlocal steps_left
        steps_left = steps
        try:
            save_weights(path, network, tokenizer_dir, step=1)
        except Killed:
            return False
        finally:
            steps_left = 10**9
        return True

    outcomes = set()
    for steps in range(20):
        path = tmp_path / str(steps) / "pretrain_32.pth"
        assert save(first, 10**9)
        finished = [save(second, steps), save(third, steps)]
        loaded, _ = load_model(path)
        assert same_weights(loaded, third if finished[1] else second if finished[0] else first)
        assert save(second, 10**9)
        assert same_weights(load_model(path)[0], second)
        outcomes.add(tuple(finished))
        if all(finished):
            break
    assert outcomes == {(False, False), (True, True)}  # every moment was tried


def test_killed_in_the_first_save_there_is_no_checkpoint_yet(tmp_path, tokenizer_dir, monkeypatch):
    path = tmp_path / "pretrain_32.pth"
    real_replace = os.replace

    def replace(source, target):
        if Path(target) == path:
            raise Killed
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        save_weights(path, make_model(), tokenizer_dir, step=1)
    with pytest.raises(UserError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)


def test_a_spoilt_description_does_not_stop_a_save(saved, tokenizer_dir):
    saved.with_suffix(".json").write_text("{")
    save_weights(saved, make_model(1), tokenizer_dir, step=1)
    assert same_weights(load_model(saved)[0], make_model(1))


# transformers folders.


@pytest.fixture
def folder(tmp_path, tokenizer_dir) -> Path:
    make_model().save_pretrained(tmp_path / "folder")
    shutil.copytree(tokenizer_dir, tmp_path / "folder", dirs_exist_ok=True)
    return tmp_path / "folder"


@pytest.mark.filterwarnings("error")
def test_a_transformers_folder_loads(folder):
    loaded, tokenizer = load_model(folder, rope_scaling=2.0)
    assert same_weights(loaded, make_model())
    assert (loaded.config.rope_factor, loaded.config.n_heads, len(tokenizer)) == (2.0, 4, 300)


def test_a_transformers_folder_of_several_files_loads(folder):
    (folder / "model.safetensors").unlink()
    make_model().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert same_weights(load_model(folder)[0], make_model())
    next(folder.glob("model-*.safetensors")).unlink()
    assert "missing" in refused(folder)


def test_an_older_transformers_folder_loads(folder):
    (folder / "model.safetensors").unlink()
    torch.save(dict(make_model().state_dict()), folder / "pytorch_model.bin")
    assert same_weights(load_model(folder)[0], make_model())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"vocab_size": 400}, "[300, 32]"),
        ({"n_layers": 3}, "layers.2"),
        ({"n_layers": 1}, "layers.1"),
        ({"n_layers": "x"}, "folder"),
        ({"n_heads": 5}, "n_heads"),
    ],
)
def test_a_folder_that_does_not_fit_its_configuration_is_refused(folder, change, reason):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert reason in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]"])
def test_a_damaged_folder_is_refused(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert "folder" in refused(folder)


# The newest.


def test_newest_checkpoint_prefers_its_stages(tmp_path):
    names = ["pretrain_64.pth", "single_chat/full_sft_64.pth", "dpo_64.pth", "multi_chat/full_sft_64.pth", "x.pth"]
    for age, name in enumerate(reversed(names)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    newest = {stages: newest_checkpoint(tmp_path, stages) for stages in [(), ("dpo",), ("full_sft", "dpo"), ("lora",)]}
    assert {stages: str(path.relative_to(tmp_path)) for stages, path in newest.items()} == {
        (): "pretrain_64.pth",
        ("dpo",): "dpo_64.pth",
        ("full_sft", "dpo"): "single_chat/full_sft_64.pth",
        ("lora",): "pretrain_64.pth",
    }


@pytest.mark.parametrize("folder_name", ["empty", "absent"])
def test_no_checkpoint_at_all_says_what_to_do(tmp_path, folder_name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="1-pretrain.py"):
        newest_checkpoint(tmp_path / folder_name)
