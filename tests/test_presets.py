"""Every published size, dense and as a mixture of experts, takes a training step."""

import pytest
import torch
from test_model import random_ids

from model.LMConfig import PRESETS, LMConfig
from model.model import Transformer

ROOM_FOR_A_STEP = 300_000_000  # parameters; weights and gradients of more take gigabytes


def sizes():
    for name in PRESETS:
        for use_moe in (False, True):
            config = LMConfig.preset(name, use_moe=use_moe)
            with torch.device("meta"):
                large = Transformer(config).num_parameters() > ROOM_FOR_A_STEP
            label = f"{name}-{'experts' if use_moe else 'dense'}"
            yield pytest.param(config, id=label, marks=[pytest.mark.slow] if large else [])


@pytest.mark.parametrize("config", list(sizes()))
def test_one_step_lowers_the_loss(config):
    torch.manual_seed(0)
    ours = Transformer(config)
    ids = random_ids(1, 8)
    before = ours(ids, labels=ids).loss
    # Logits of fresh weights are near 0: every token of the vocabulary is about equally probable.
    assert before.item() == pytest.approx(torch.tensor(float(config.vocab_size)).log().item(), abs=1)
    before.backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter -= 0.01 * parameter.grad
            parameter.grad = None
        assert ours(ids, labels=ids).loss < before
