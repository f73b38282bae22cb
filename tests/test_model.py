"""The dense model against transformers' Llama, PyTorch's own functions, and itself in other arrangements."""

import runpy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from model.attention import all_segments_at_once, attend_plainly, takes_varlen
from model.gradients import SummedCrossEntropy
from model.LMConfig import PRESETS, LMConfig
from model.model import RMSNorm, Transformer
from model.products import Linear

PARAMETERS = {
    "minimind-small-T": 26_878_464,
    "minimind-small": 56_863_360,
    "minimind": 218_399_744,
    "minimind-moe": 163_052_160,
    "minimind-v1": 108_749_568,
    "tiny": 6_065_408,
}


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed))


def half_rotated(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from neighbouring rotary pairs to Llama's order: first all first halves, then all second ones."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def llama_of(ours: Transformer, **rope: object) -> LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    c = ours.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.hidden_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta} | rope,
        )
    ).eval()
    state = {}
    for key, value in ours.state_dict().items():
        if key.endswith("wq.weight"):
            value = half_rotated(value, c.n_heads)
        if key.endswith("wk.weight"):
            value = half_rotated(value, c.n_kv_heads)
        state[llama_name(key)] = value
    llama.load_state_dict(state)
    return llama


def llama_name(key: str) -> str:
    names = {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "norm": "model.norm",
    }
    if key.startswith("layers."):
        _, index, name = key.removesuffix(".weight").split(".", 2)
        return f"model.layers.{index}.{names[name]}.weight"
    return f"{names[key.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_sizes(preset):
    with torch.device("meta"):
        assert Transformer(LMConfig.preset(preset)).num_parameters() == PARAMETERS[preset]


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_logits_and_gradients_are_llamas(flash_attn, n_kv_heads):
    ours = make_model(n_kv_heads=n_kv_heads, flash_attn=flash_attn, initializer_range=0.1)
    llama = llama_of(ours)
    ids = random_ids(3, 40)
    torch.testing.assert_close(ours(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)

    output, reference = ours(ids, labels=ids), llama(ids, labels=ids)
    torch.testing.assert_close(output.loss, reference.loss, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    reference.loss.backward()
    theirs = dict(llama.named_parameters())
    heads = {"wq": ours.config.n_heads, "wk": n_kv_heads}
    for key, parameter in ours.named_parameters():
        gradient = parameter.grad
        if key.split(".")[-2] in heads:
            gradient = half_rotated(gradient, heads[key.split(".")[-2]])
        torch.testing.assert_close(gradient, theirs[llama_name(key)].grad, atol=1e-4, rtol=1e-3, msg=key)


def test_packed_rows_are_llamas():
    """transformers reads position_ids the same way: where they restart, a segment begins, unless a mask is given."""
    ours = make_model(rope_theta=500.0)
    llama = llama_of(ours)
    ids, positions = random_ids(2, 20), torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    masked = torch.ones_like(ids)
    masked[:, :3] = 0
    logits = {}
    for name, mask in (("packed", None), ("masked", masked)):
        arguments = dict(position_ids=positions.expand(2, -1), attention_mask=mask)
        logits[name] = ours(ids, **arguments).logits
        expected = llama(ids, use_cache=False, **arguments).logits
        torch.testing.assert_close(logits[name][:, 3:], expected[:, 3:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits["packed"][:, 7:], logits["masked"][:, 7:], atol=1e-2)


def test_linear_rope_scaling_is_llamas():
    ours = make_model(rope_scaling=4.0)
    llama = llama_of(ours, rope_type="linear", factor=4.0)
    ids = random_ids(1, 100)
    torch.testing.assert_close(ours(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours(ids).logits, make_model()(ids).logits, atol=1e-2)


def test_the_loss_is_cross_entropy_of_the_logits():
    ours = make_model()
    ids = random_ids(2, 30)
    labels = ids.masked_fill(random_ids(2, 30, seed=1) < 100, -100)
    logits = ours(ids).logits
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    trained = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(ours(ids, labels=labels).loss, summed / trained)
    torch.testing.assert_close(ours(ids, labels=labels, num_items_in_batch=7).loss, summed / 7)
    assert ours(ids, labels=torch.full_like(ids, -100)).loss == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_the_chunked_loss_has_the_gradients_of_cross_entropy(monkeypatch, frozen):
    monkeypatch.setattr("model.gradients.TOKENS_PER_CHUNK", 7)
    torch.manual_seed(0)
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=not frozen)
    labels = torch.randint(50, (30,))
    labels[[0, 5, 6, 29]] = -100
    inputs = [x] if frozen else [x, weight]
    loss = SummedCrossEntropy.apply(x, weight, labels, True)
    reference = F.cross_entropy(x @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(loss, reference)
    found, expected = torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * reference, inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_without_gradients_the_chunked_loss_makes_none(monkeypatch):
    monkeypatch.setattr(Tensor, "scatter_add_", lambda *_: pytest.fail("the gradient was computed"))
    ids = random_ids(1, 5)
    with torch.no_grad():
        make_model()(ids, labels=ids)


def test_a_half_precision_loss_is_near_and_so_are_its_gradients():
    ours = make_model(initializer_range=0.1)
    ids, parameters = random_ids(2, 30), list(ours.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(ids, labels=ids).loss
    found = torch.autograd.grad(loss, parameters)
    exact = ours(ids, labels=ids).loss
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.02)
    for near, gradient in zip(found, torch.autograd.grad(exact, parameters), strict=True):
        assert F.cosine_similarity(near.flatten(), gradient.flatten(), dim=0) > 0.99
        assert near.norm().item() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradient_are_those_of_pytorch(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(8, 1e-2)
    norm.weight.data = torch.randn(8)
    norm.to(dtype)
    x = torch.randn(5, 7, 8, dtype=dtype, requires_grad=True)
    reference = F.rms_norm(x, (8,), norm.weight, 1e-2)
    torch.testing.assert_close(norm(x), reference)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), reference)
    gradient, inputs = torch.randn(5, 7, 8, dtype=dtype), (x, norm.weight)
    found = torch.autograd.grad(norm(x), inputs, gradient)
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, torch.autograd.grad(reference, inputs, gradient), atol=atol, rtol=atol)
    norm.weight.requires_grad_(False)
    (alone,) = torch.autograd.grad(norm(x), [x], gradient)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_can_be_made_anew_is_not_kept_for_the_gradient(checkpointing):
    """(With checkpointing switched on, the feed-forward leaves that to it. So the test would see a tensor kept.)"""
    feed_forward = make_model().layers[0].feed_forward
    feed_forward.gradient_checkpointing = checkpointing
    gated = []
    feed_forward.w2.register_forward_pre_hook(lambda _, args: gated.append(StorageWeakRef(args[0].untyped_storage())))
    y = feed_forward(torch.randn(2, 5, 32, requires_grad=True))
    assert gated[0].expired() is not checkpointing
    y.sum().backward()


def test_cached_logits_are_those_without_a_cache():
    ours = make_model()
    ids = random_ids(2, 20)
    cache, logits = DynamicCache(config=ours.config), []
    for piece in ids.split([9, 1, 1, 6, 3], dim=1):  # a prefix, single tokens, and several at once after a prefix
        logits.append(ours(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), ours(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_padded_batch_continues_from_its_cache():
    """The mask covers the cached tokens, too; positions follow from it."""
    ours = make_model()
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    ids[0, :4] = mask[0, :4] = 0
    first = ours(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
    rest = ours(ids[:, 8:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, ours(ids, attention_mask=mask).logits[:, 8:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rest.logits[0], ours(ids[:1, 4:]).logits[0, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_padding_changes_nothing(flash_attn):
    ours = make_model(flash_attn=flash_attn)
    rows = [random_ids(n, seed=n) for n in (5, 12, 9)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 12 - len(row) :], mask[i, 12 - len(row) :] = row, 1
    logits = ours(ids, attention_mask=mask).logits
    generated = ours.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for i, row in enumerate(rows):
        alone = ours(row[None])
        torch.testing.assert_close(logits[i, 12 - len(row) :], alone.logits[0], atol=1e-5, rtol=1e-5)
        expected = ours.generate(row[None], max_new_tokens=6, do_sample=False)[0, len(row) :].tolist()
        found = generated[i, 12:].tolist()
        assert found[: len(expected)] == expected and not any(found[len(expected) :])
    assert logits.isfinite().all()


@pytest.mark.parametrize("flash_attn", [True, False])
def test_packed_segments_are_as_if_alone(flash_attn):
    ours = make_model(flash_attn=flash_attn)
    segments = [random_ids(n, seed=n) for n in (7, 1, 12, 10)]
    lengths = [len(segment) for segment in segments]
    row = torch.cat(segments)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = row.clone()
    labels[0, [sum(lengths[:i]) for i in range(4)]] = -100
    packed = ours(row, position_ids=positions, labels=labels, num_items_in_batch=1)
    packed.loss.backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    alone = sum(ours(s[None], labels=s[None], num_items_in_batch=1).loss for s in segments)
    alone.backward()
    torch.testing.assert_close(packed.loss, alone)
    torch.testing.assert_close(gradients, [p.grad for p in ours.parameters()], atol=1e-4, rtol=1e-3)
    states = ours(row, position_ids=positions).last_hidden_state.split(lengths, 1)
    for segment, state in zip(segments, states, strict=True):
        torch.testing.assert_close(state, ours(segment[None]).last_hidden_state, atol=1e-5, rtol=1e-5)


def causal_attention_of_each(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa):
    """What torch's varlen_attn computes on a GPU: [tokens, heads, d], and window (-1, 0) means causal."""
    assert window_size == (-1, 0) and enable_gqa and max_q == max_k >= cu_seq_q.diff().max()
    parts = []
    for start, end in zip(cu_seq_q[:-1], cu_seq_k[1:], strict=True):
        one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(attend_plainly(*one, None, 0.0)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["segment by segment", "by FlashAttention"])
def test_segments_told_apart_by_where_they_begin(monkeypatch, kind):
    """As the mask's path, gradients, too; with a plain function in the place of FlashAttention."""
    if kind == "by FlashAttention":
        monkeypatch.setattr("model.attention.varlen_attn", causal_attention_of_each)
        monkeypatch.setattr("model.attention.segment_by_segment", lambda *args: all_segments_at_once(*args[:4]))
    ours = make_model()
    positions = torch.tensor([[*range(7), *range(1), *range(12)], [*range(20)]])
    batch = dict(input_ids=random_ids(2, 20), position_ids=positions, labels=random_ids(2, 20))
    results = []
    for more in ({}, {"cu_seq_lens_q": torch.tensor([0, 7, 8, 20, 40], dtype=torch.int32)}):
        ours.zero_grad()
        output = ours(**batch, **more)
        output.loss.backward()
        results.append([output.loss, output.last_hidden_state, *(p.grad.clone() for p in ours.parameters())])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_where_a_mask_is_the_better_way():
    config, cpu, cuda = make_model().config, torch.device("cpu"), torch.device("cuda")
    assert takes_varlen(config, cpu, torch.float32, 512, compiled=False)
    assert not takes_varlen(config, cpu, torch.float32, 511, compiled=False)
    assert not takes_varlen(config, cpu, torch.float32, 512, compiled=True)
    assert not takes_varlen(config, cuda, torch.float32, 512, compiled=False)  # FlashAttention takes halves only
    for differing in (dict(flash_attn=False), dict(dropout=0.1)):
        assert not takes_varlen(make_model(**differing).config, cpu, torch.float32, 512, compiled=False)


def test_two_rows_may_be_packed_differently():
    ours = make_model()
    ids = random_ids(2, 10)
    positions = torch.stack([torch.cat([torch.arange(4), torch.arange(6)]), torch.arange(10)])
    logits = ours(ids, position_ids=positions).logits
    torch.testing.assert_close(logits[1], ours(ids[1:]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[0, 4:], ours(ids[:1, 4:]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["boolean", "added to the scores"])
def test_a_mask_may_be_given_query_by_query(kind):
    """[B, 1, T, T], as transformers allows it: here each of two segments sees itself only."""
    ours = make_model()
    ids, segments = random_ids(1, 10), torch.tensor([0] * 4 + [1] * 6)
    mask = ((segments[:, None] == segments) & torch.ones(10, 10).tril().bool())[None, None]
    if kind != "boolean":
        mask = torch.zeros(1, 1, 10, 10).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    masked = ours(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(masked, ours(ids, position_ids=positions).logits)


def test_trailing_padding_changes_nothing():
    """A row of the data set: segments, then padding that counts from 0 again and has no labels."""
    ours = make_model()
    segments = [random_ids(n, seed=n) for n in (6, 3)]
    row = torch.cat([*segments, torch.zeros(5, dtype=torch.long)])[None]
    positions = torch.cat([torch.arange(n) for n in (6, 3, 5)])[None]
    labels = row.clone()
    labels[0, [0, 6]] = labels[0, 9:] = -100
    padded = ours(row, position_ids=positions, labels=labels)
    without = ours(row[:, :9], position_ids=positions[:, :9], labels=labels[:, :9])
    torch.testing.assert_close(padded.loss, without.loss)
    alone = sum(ours(s[None], labels=s[None], num_items_in_batch=7).loss for s in segments)  # 5 + 2 targets
    torch.testing.assert_close(padded.loss, alone)


@pytest.mark.parametrize("use_moe", [False, True])
def test_logits_to_keep(use_moe):
    ours = make_model(use_moe=use_moe)
    ids, mask = random_ids(2, 10), torch.ones(2, 10)
    mask[1, 6:] = 0
    everything = ours(ids, mask)
    torch.testing.assert_close(ours(ids, mask, logits_to_keep=3).logits, everything.logits[:, -3:])
    some = ours(ids, mask, logits_to_keep=torch.tensor([1, 4]))
    torch.testing.assert_close(some.logits, everything.logits[:, [1, 4]])
    torch.testing.assert_close(some.last_hidden_state, everything.last_hidden_state[:, [1, 4]])


def test_logits_to_keep_leave_out_nothing_that_is_asked_for():
    ours, ids, kept = make_model(), random_ids(2, 10), torch.tensor([1, 4])
    everything = ours(ids, output_hidden_states=True)
    some = ours(ids, output_hidden_states=True, logits_to_keep=kept)
    torch.testing.assert_close(some.logits, everything.logits[:, kept])
    torch.testing.assert_close(some.hidden_states, everything.hidden_states)
    assert torch.equal(ours(ids, labels=ids, logits_to_keep=kept).loss, ours(ids, labels=ids).loss)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_segments_may_share_what_is_in_the_cache(flash_attn):
    """Each as if it alone went on after the beginning."""
    ours = make_model(flash_attn=flash_attn)
    beginning, first, second, third = random_ids(1, 9), random_ids(1, 1), random_ids(1, 6), random_ids(1, 4)
    cache = ours(beginning, use_cache=True).past_key_values
    together = ours(
        torch.cat([first, second, third], 1),
        position_ids=torch.tensor([[9, *range(9, 15), *range(9, 13)]]),
        past_key_values=cache,
        cu_seq_lens_q=torch.tensor([0, 1, 7, 11], dtype=torch.int32),
    ).logits
    for segment, logits in zip((first, second, third), together.split([1, 6, 4], 1), strict=True):
        alone = ours(torch.cat([beginning, segment], 1)).logits[:, 9:]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_residual_outputs_begin_smaller():
    ours = Transformer(LMConfig(dim=256, n_layers=8, n_heads=4, n_kv_heads=4))
    for key, parameter in ours.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 if key.startswith("tok_") else (2 / (5 * 256)) ** 0.5
            if key.endswith(("wo.weight", "w2.weight")):
                expected /= 4  # sqrt(2 · 8)
            assert abs(parameter.std().item() / expected - 1) < 0.02, key
        else:
            assert (parameter == 1).all(), key


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("place", ["embedding", "attention", "feed-forward"])
def test_dropout_acts_everywhere_in_training_only(place, flash_attn):
    ours = make_model(dropout=0.5, flash_attn=flash_attn)
    ids = random_ids(1, 10)
    torch.testing.assert_close(ours(ids).logits, make_model()(ids).logits)
    if place != "embedding":
        ours.config.dropout = 0.0
    for layer in ours.layers:
        layer.attention.dropout *= place == "attention"
        layer.feed_forward.dropout *= place == "feed-forward"
    ours.train()
    assert not torch.allclose(ours(ids).logits, ours(ids).logits)
    ours(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_the_feed_forward_width_follows_or_is_given():
    assert LMConfig(dim=512).hidden_dim == 1408  # 8/3 · 512 = 1365.3, and the next multiple of 64
    assert LMConfig(dim=768).hidden_dim == 2048  # already one
    assert LMConfig(dim=512, multiple_of=100).hidden_dim == 1400
    assert LMConfig(dim=512, hidden_dim=1000).hidden_dim == 1000


def test_impossible_configurations_are_refused():
    for heads in (dict(dim=100, n_heads=16), dict(n_heads=16, n_kv_heads=3)):
        with pytest.raises(ValueError, match="multiple"):
            LMConfig(**heads)
    with pytest.raises(ValueError, match="unknown preset"):
        LMConfig.preset("gpt-5")
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        LMConfig(use_moe=True, num_experts_per_tok=5)
    for scaling in (0.0, {"rope_type": "yarn", "factor": 2.0}, {"factor": 2.0}):
        with pytest.raises(ValueError, match="rope_scaling"):
            LMConfig(rope_scaling=scaling)
    with pytest.raises(ValueError, match="scoring_func"):
        LMConfig(scoring_func="sigmoid")


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize(  # autocast leaves oneDNN's products out
    ("products", "halves"),
    [("oneDNN", False), ("PyTorch's own", False), ("PyTorch's own", True)],
    indirect=["products"],
)
@torch._dynamo.config.patch(capture_scalar_outputs=True)  # as the training scripts do
def test_compiles_into_one_graph_that_computes_the_same(products, halves, use_moe):
    """Packed rows with untrained tokens, forward and backward; fullgraph raises where the graph would break."""
    torch.compiler.reset()
    model = make_model(dim=64, n_layers=2, use_moe=use_moe)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(80), torch.arange(48)]).expand(2, -1)
    labels = ids.masked_fill(torch.arange(128) < 5, -100)
    losses, gradients = [], []
    for called in (compiled, model):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=halves):
            loss = called(input_ids=ids, position_ids=positions, labels=labels, num_items_in_batch=50).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.layers[0].attention.wq.weight.grad.clone())
    if halves:  # rounded in other places
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()
    else:
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_copy_of_the_products_leaves_the_first_ones_in_place():
    """As a saved folder brings one along: an operator defined a second time loses its first definition."""
    file = ROOT / "model" / "products.py"
    before = torch.ops.minimind.product.default
    copied = runpy.run_path(str(file))
    assert copied["compiled_product"].default is before
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    torch.testing.assert_close(copied["compiled_product"](x, weight), x @ weight.T)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 64), (0, 64)])
def test_linear_and_its_gradients_are_the_exact_product(shape):
    torch.manual_seed(0)
    layer = Linear(64, 48)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 48)
    layer(x).backward(grad)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    exact = torch.einsum("...i,oi->...o", exact_x, exact_weight)
    exact.backward(grad.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("products")
def test_linear_takes_what_autocast_and_layouts_bring():
    layer = Linear(64, 48)
    x = torch.randn(64, 7).t()  # not contiguous
    torch.testing.assert_close(layer(x), x @ layer.weight.t(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
