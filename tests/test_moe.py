"""The mixture of experts against a loop over tokens and the paper's formulas."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from test_model import random_ids
from torch import Tensor

from model.LMConfig import LMConfig
from model.model import MoEFeedForward, routing


def naive_moe(layer: MoEFeedForward, x_D: Tensor, k: int, normalised: bool) -> Tensor:
    """One token through the layer, expert by expert."""
    scores = torch.softmax(layer.gate.weight @ x_D, 0)
    size = layer.experts[0].w1.out_features
    shared = layer.shared_experts
    best = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:k]
    total = sum(scores[i] for i in best) if normalised else 1.0
    y = sum(scores[i] / total * layer.experts[i](x_D[None])[0] for i in best)
    for first in range(0, shared.w1.out_features if shared else 0, size):
        w1, w3 = (w.weight[first : first + size] for w in (shared.w1, shared.w3))
        y = y + shared.w2.weight[:, first : first + size] @ (F.silu(w1 @ x_D) * (w3 @ x_D))
    return y


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_layer_is_a_loop_over_tokens(k, normalised, shared):
    torch.manual_seed(0)
    config = LMConfig(
        dim=32,
        n_heads=4,
        n_kv_heads=4,
        multiple_of=16,
        use_moe=True,
        num_experts_per_tok=k,
        norm_topk_prob=normalised,
        n_shared_experts=shared,
    )
    layer = MoEFeedForward(config)
    assert (layer.shared_experts.w1.out_features if shared else 0) == shared * layer.experts[0].w1.out_features
    x = torch.randn(2, 9, 32)
    y, told = layer(x)
    expected = torch.stack([naive_moe(layer, token, k, normalised) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert told.load.shape == (4,) and told.load.sum().item() == pytest.approx(1)


def naive_balance(scores: Tensor, chosen: Tensor) -> Tensor:
    """Σ f_i P_i of one sequence [T, E], as DeepSeek-V2 writes it (equations 23 to 25)."""
    T, E = scores.shape
    k = chosen.shape[1]
    total = 0.0
    for i in range(E):
        f = E / (k * T) * sum(int(i in chosen[t].tolist()) for t in range(T))
        total = total + f * sum(scores[t, i] for t in range(T)) / T
    return total


def test_the_balance_is_the_papers_by_row_and_by_batch():
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 4).softmax(-1).requires_grad_()
    chosen = scores.topk(2, -1).indices
    by_row = routing(scores, chosen, None, per_row=True).balance
    expected = torch.stack([naive_balance(scores[r], chosen[r]) for r in range(2)])
    torch.testing.assert_close(by_row, expected)
    by_batch = routing(scores, chosen, None, per_row=False).balance
    torch.testing.assert_close(by_batch, naive_balance(scores.flatten(0, 1), chosen.flatten(0, 1)).expand(2))
    assert torch.autograd.grad(by_row.sum(), scores)[0].abs().sum() > 0


def test_padding_does_not_count_in_the_balance():
    torch.manual_seed(0)
    scores = torch.randn(1, 6, 4).softmax(-1)
    chosen = scores.topk(2, -1).indices
    real = torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(
        routing(scores, chosen, real, per_row=True), routing(scores[:, 2:], chosen[:, 2:], None, per_row=True)
    )


@pytest.mark.parametrize("seq_aux", [True, False])
def test_a_padded_batch_has_the_loss_of_its_rows(seq_aux):
    """Cross-entropy and balance, padding on either side; batch-wise, it is one balance of all real tokens."""
    ours = make_model(use_moe=True, seq_aux=seq_aux, aux_loss_alpha=0.5)
    rows = [random_ids(n, seed=n) for n in (5, 12)]
    alone = [ours(row[None], labels=row[None], num_items_in_batch=15) for row in rows]  # 4 + 11 targets
    for first in (7, 0):
        ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
        ids[0, first : first + 5], mask[0, first : first + 5] = rows[0], 1
        ids[1], mask[1] = rows[1], 1
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, first] = -100  # nothing but padding stands before it
        padded = ours(ids, attention_mask=mask, labels=labels)
        if seq_aux:
            torch.testing.assert_close(padded.loss, sum(row.loss for row in alone))
        else:
            torch.testing.assert_close(padded.loss - padded.aux_loss, sum(row.loss - row.aux_loss for row in alone))
        load = (5 * alone[0].expert_load + 12 * alone[1].expert_load) / 17
        torch.testing.assert_close(padded.expert_load, load)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_a_row_of_nothing_but_padding_adds_nothing(seq_aux):
    ours = make_model(use_moe=True, seq_aux=seq_aux, aux_loss_alpha=0.5)
    row = random_ids(1, 8)
    ids = torch.cat([row, torch.zeros_like(row)])
    mask = torch.tensor([[1] * 8, [0] * 8])
    padded = ours(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(padded.loss, ours(row, labels=row).loss)
    torch.testing.assert_close(padded.expert_load, ours(row, labels=row).expert_load)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_even_routing_has_a_balance_of_one_whatever_k(k):
    scores = torch.full((1, 8, 4), 0.25)
    chosen = (torch.arange(8)[:, None] + torch.arange(k)) % 4
    told = routing(scores, chosen[None], None, per_row=True)
    assert told.balance.item() == pytest.approx(1) and told.load.tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_balance_loss_is_the_papers_summed_over_layers(seq_aux, k):
    """From the router's logits as they come by: of each row, weighted with its share of the targets, or of them all."""
    ours = make_model(use_moe=True, num_experts_per_tok=k, seq_aux=seq_aux, aux_loss_alpha=0.5, n_layers=3)
    seen = []
    for layer in ours.layers:
        layer.feed_forward.gate.register_forward_hook(lambda module, inputs, logits: seen.append(logits.softmax(-1)))
    ids = random_ids(2, 10)
    labels = ids.clone()
    labels[0, :7] = -100  # 3 targets and 9
    output = ours(ids, labels=labels)
    expected = 0.0
    for scores in seen:
        chosen = scores.topk(k, -1).indices
        if seq_aux:
            expected += 0.25 * naive_balance(scores[0], chosen[0]) + 0.75 * naive_balance(scores[1], chosen[1])
        else:
            expected += naive_balance(scores.flatten(0, 1), chosen.flatten(0, 1))
    torch.testing.assert_close(output.aux_loss, 0.5 * expected)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_balance_loss_is_part_of_the_loss(seq_aux):
    ids = random_ids(2, 20)
    plain, balanced = (
        make_model(use_moe=True, seq_aux=seq_aux, aux_loss_alpha=alpha)(ids, labels=ids) for alpha in (0.0, 0.5)
    )
    assert plain.aux_loss == 0 and balanced.aux_loss > 0.5  # two layers, each at least nearly 1
    torch.testing.assert_close(balanced.loss, plain.loss + balanced.aux_loss)
    assert balanced.expert_load.shape == (2, 4)
    torch.testing.assert_close(balanced.expert_load.sum(-1), torch.ones(2))


def test_the_balance_loss_moves_the_gate():
    ids = random_ids(2, 20)
    gradients = []
    for alpha in (0.0, 1.0):
        ours = make_model(use_moe=True, aux_loss_alpha=alpha)
        ours(ids, labels=ids).loss.backward()
        gradients.append(ours.layers[0].feed_forward.gate.weight.grad)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-3


def test_micro_batches_add_up_to_the_batch():
    """Sequence-wise balance: rows count with their trained tokens, however they are spread."""
    ids = random_ids(4, 20)
    labels = ids.clone()
    labels[0, :15] = labels[2, 4:] = -100
    items = int((labels[:, 1:] != -100).sum())
    ours = make_model(use_moe=True, aux_loss_alpha=0.5)
    whole = ours(ids, labels=labels).loss
    whole_gradients = torch.autograd.grad(whole, list(ours.parameters()))
    parts = [ours(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    parts_gradients = torch.autograd.grad(sum(parts), list(ours.parameters()))
    torch.testing.assert_close(parts_gradients, whole_gradients, atol=1e-5, rtol=1e-3)


def test_an_expert_that_nobody_visits_gets_a_gradient_of_zero():
    ours = make_model(use_moe=True, num_experts_per_tok=1)
    ours(random_ids(1, 2), labels=random_ids(1, 2)).loss.backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_a_padded_batch_continues_from_its_cache():
    """Padding counts neither before nor after: the load of the new tokens is that of the row without padding."""
    ours = make_model(use_moe=True)
    ids, mask = random_ids(1, 14), torch.ones(1, 14, dtype=torch.long)
    ids[0, :4] = mask[0, :4] = 0
    padded, plain = (
        ours(ids[:, 8:], attention_mask=mask[:, n:], past_key_values=ours(ids[:, n:8], mask[:, n:8], use_cache=True)[1])
        for n in (0, 4)
    )
    torch.testing.assert_close(padded.logits, plain.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.expert_load, plain.expert_load)
    torch.testing.assert_close(plain.logits, ours(ids[:, 4:]).logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_generation_with_a_cache_equals_generation_without():
    ours = make_model(use_moe=True)
    ids = random_ids(1, 8)
    cached, plain = (ours.generate(ids, max_new_tokens=10, do_sample=False, use_cache=c) for c in (True, False))
    assert cached.tolist() == plain.tolist()
