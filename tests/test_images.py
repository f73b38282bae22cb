"""The drawings tell the truth: their parameter counts are those of real models, and the files are of today's sizes."""

import pytest
import torch
from conftest import ROOT, load_script
from PIL import Image

from model.LMConfig import PRESETS, LMConfig
from model.model import FeedForward, Transformer

draw = load_script("images/draw.py")

# which parameters of a real model belong to a part, by a piece of their names
NAMES = {
    "embedding": "tok_embeddings",
    "attention": ".attention.",
    "feed-forward": ".feed_forward.w",
    "routed experts": ".experts.",
    "shared experts": ".shared_experts.",
    "routers": ".gate.",
    "norms": "norm.",
}
SMALL_MOE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, use_moe=True)
CONFIGS = {
    "tiny": LMConfig.preset("tiny"),
    "moe": LMConfig(**SMALL_MOE),
    "moe-2-shared-3-of-5": LMConfig(**SMALL_MOE, n_shared_experts=2, n_routed_experts=5, num_experts_per_tok=3),
    "moe-none-shared": LMConfig(**SMALL_MOE, n_shared_experts=0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_part_is_counted_as_in_a_real_model(config):
    real = {name: parameter.numel() for name, parameter in Transformer(config).named_parameters()}
    counts = draw.count_parameters(config)
    assert sum(counts.values()) == sum(real.values())
    for part, number in counts.items():
        assert number == sum(size for name, size in real.items() if NAMES[part] in name), part


def test_what_a_token_uses_is_what_runs_for_it():
    config = CONFIGS["moe-2-shared-3-of-5"]
    model = Transformer(config)
    idle = []

    def note(expert, inputs, _):
        if not len(inputs[0]):
            idle.append(sum(parameter.numel() for parameter in expert.parameters()))

    for module in model.modules():
        if isinstance(module, FeedForward):
            module.register_forward_hook(note)
    model(torch.tensor([[3]]))
    assert len(idle) == config.n_layers * 2
    used = sum(parameter.numel() for parameter in model.parameters()) - sum(idle)
    assert sum(draw.count_parameters(config, config.num_experts_per_tok).values()) == used


@pytest.mark.parametrize(
    ("picture", "preset"), [("structure_dense.png", "minimind-small-T"), ("structure_moe.png", "minimind-moe")]
)
def test_the_drawn_structures_are_of_the_sizes_of_today(picture, preset):
    config = LMConfig.preset(preset)
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in Transformer(config).parameters())
    with Image.open(ROOT / "images" / picture) as file:
        description = file.text["Description"]
    assert f"{total:,} parameters" in description
    assert description == draw.describe(preset, config), "run python images/draw.py"


def test_the_command_draws_all_pictures(tmp_path):
    draw.main(draw.Args(folder=str(tmp_path)))
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"logo.png", "structure_dense.png", "structure_moe.png", "gpt3_sizes.png", "fastgpt.png"}
    for name in drawn:
        assert (tmp_path / name).stat().st_size < 150_000
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "images" / name) as old:
            assert new.text == old.text
            assert new.size == old.size


@pytest.mark.parametrize("shared", [0, 2])
def test_other_numbers_of_experts_and_heads_can_be_drawn(tmp_path, monkeypatch, shared):
    other = dict(dim=96, n_heads=6, n_kv_heads=6, use_moe=True, n_routed_experts=7, n_shared_experts=shared)
    monkeypatch.setitem(PRESETS, "other", other)
    draw.draw_structure(tmp_path / "other.png", "other")
    with Image.open(tmp_path / "other.png") as file:
        assert file.text["Description"].startswith("other: ")
