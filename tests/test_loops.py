"""The model in plain loops against `Transformer`, which other tests hold against transformers' Llama."""

import copy
import math

import numba
import numpy as np
import pytest
import torch
from conftest import make_model

from model.engine import quantize_to_int8
from model.generate import Batch, Generation, SlotCache
from model.loops import Decoder, exp, takes_loops
from model.model import Transformer
from model.sampling import Sampling

SHAPES = {
    "dense": dict(),
    "one key/value head": dict(n_heads=4, n_kv_heads=1),
    "no groups": dict(n_heads=2, n_kv_heads=2, hidden_dim=37),
    "heads of two numbers": dict(n_heads=16, n_kv_heads=4),
    "narrow": dict(hidden_dim=3),
    "stretched": dict(rope_scaling=2.5, rope_theta=500.0, norm_eps=1e-3, vocab_size=333),
    "experts": dict(use_moe=True),
    "experts, none shared": dict(use_moe=True, n_shared_experts=0, norm_topk_prob=False, n_routed_experts=3),
}


def logits_of(network: Transformer, ids_BT: torch.Tensor) -> torch.Tensor:
    """A token of each row a call, on all cores: [B, T, V]."""
    cache = SlotCache(network, len(ids_BT) + 1, 64)
    decoder = Decoder(network, cache)
    decoder.threads = numba.config.NUMBA_NUM_THREADS
    return torch.stack([decoder(ids_B, [t] * len(ids_BT)) for t, ids_B in enumerate(ids_BT.T.tolist())], 1)


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_logits_are_those_of_the_model(shape, sequences):
    network, ids_BT = make_model(**SHAPES[shape]), random_ids(sequences, 20)
    torch.testing.assert_close(logits_of(network, ids_BT), network(input_ids=ids_BT).logits, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("sequences", [1, 3])
def test_eight_bits_are_multiplied_exactly(sequences):
    """As a model does whose weights are those whole numbers times their scale."""
    network, ids_BT = make_model(), random_ids(sequences, 20)
    rounded = copy.deepcopy(network)
    quantize_to_int8(network)
    for name, module in network.layers.named_modules():
        if hasattr(module, "scale"):
            rounded.layers.get_submodule(name).weight.copy_(module.weight().dequantize())
    expected = rounded(input_ids=ids_BT).logits
    assert not torch.allclose(expected, network(input_ids=ids_BT).logits, atol=1e-3)  # it rounds what it is given, too
    torch.testing.assert_close(logits_of(network, ids_BT), expected, atol=2e-5, rtol=2e-5)


def test_the_cache_is_shared_with_the_model():
    """Sequences whose beginnings, of different lengths, the model has read."""
    network = make_model()
    prompts = [random_ids(9).tolist(), random_ids(12).tolist()[::-1]]
    batch = Batch(network, 2, 64)
    generations = [Generation(prompt, Sampling(temperature=0, max_new_tokens=9)) for prompt in prompts]
    for generation in generations:
        batch.add(generation)
    assert batch.decoder is not None
    batch.step()
    found = batch.decoder([g.ids[-1] for g in generations], [g.cached for g in generations])
    for generation, logits_V in zip(generations, found, strict=True):
        with torch.inference_mode():
            expected = network(input_ids=torch.tensor([generation.prompt_ids + generation.ids])).logits[0, -1]
        torch.testing.assert_close(logits_V, expected, atol=2e-5, rtol=2e-5)


def test_exp():
    for x in np.linspace(-87, 87, 1001, dtype=np.float32):
        assert exp(x) == pytest.approx(math.exp(x), rel=1e-5)
    assert exp(np.float32(-1000)) == pytest.approx(0, abs=1e-37)
    assert exp(np.float32(1000)) > 1e37


def test_what_is_not_a_number_stays_so():
    network = make_model()
    with torch.no_grad():
        network.layers[0].feed_forward.w2.weight[3, 5] = math.nan
    assert logits_of(network, random_ids(1, 2)).isnan().all()


def test_it_is_for_float32():
    assert takes_loops(make_model())
    assert not takes_loops(make_model().bfloat16())
    assert Batch(make_model().bfloat16(), 1, 64).decoder is None
