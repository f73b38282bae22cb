"""Bits per byte, against the definition followed token by token, one document at a time."""

import math

import pytest
import torch
from conftest import make_model

from model.distributed import Run
from model.evaluate import score_documents, windows
from model.LMConfig import IGNORED_LABEL

ALONE = Run(rank=0, world_size=1, device=torch.device("cpu"))
SIZE = 16
# With <s> and </s>: much shorter than the context, one below, equal, one above, several windows, and nothing at all.
TEXTS = ["ab", "x" * 13, "x" * 14, "q" * 15, "春天来了，小草绿了。" * 4, "", "Hello 😀 123", "zyx" * 9]


def naive_nats(network, tokenizer, text: str, size: int) -> tuple[float, int]:
    """Sum of -ln p over a document's tokens, each with its own forward pass, no cache, no padding, no packing.

    Windows begin at multiples of half the size; a token's context begins where the first window that reaches it does.
    """
    (content,) = tokenizer([text], add_special_tokens=False).input_ids
    ids = [tokenizer.bos_token_id, *content, tokenizer.eos_token_id]
    nats = 0.0
    for at in range(1, len(ids)):
        start = 0
        while at >= start + size:
            start += size // 2
        logits = network(torch.tensor([ids[start:at]])).logits[0, -1].double()
        nats -= logits.log_softmax(-1)[ids[at]].item()
    return nats, len(ids) - 1


@torch.no_grad()
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("size", [SIZE, 7])
def test_score_equals_the_definition(tokenizer, use_moe, size):
    # A balance loss this large would show at once if it were counted.
    network = make_model(use_moe=use_moe, vocab_size=len(tokenizer), aux_loss_alpha=10.0)
    naive = [naive_nats(network, tokenizer, text, size) for text in TEXTS]
    nats, tokens = (sum(column) for column in zip(*naive, strict=True))
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    for batch_size in (1, 3, 64):
        score = score_documents(network, tokenizer, TEXTS, size, ALONE, batch_size)
        assert (score.tokens, score.bytes) == (tokens, num_bytes)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
        assert score.loss == pytest.approx(nats / tokens, rel=1e-5)


def test_a_model_that_knows_nothing_scores_the_size_of_its_vocabulary(tokenizer):
    network = make_model(vocab_size=len(tokenizer))
    torch.nn.init.zeros_(network.tok_embeddings.weight)
    score = score_documents(network, tokenizer, ["zyx"], SIZE, ALONE)
    assert score.bits_per_byte == pytest.approx(4 * math.log2(len(tokenizer)) / 3)  # z, y, x, </s>


def test_typed_special_tokens_are_scored_as_text(tokenizer):
    score = score_documents(make_model(vocab_size=len(tokenizer)), tokenizer, ["</s>"], SIZE, ALONE)
    assert score.tokens == 5


def test_the_processes_shares_add_up(tokenizer):
    """Two processes, one after the other; what they would exchange is added by hand."""
    network = make_model(vocab_size=len(tokenizer))
    sums = []

    class OneOfTwo(Run):
        def sum(self, values):
            sums.append(values.clone())
            return values

    for rank in (0, 1):
        score_documents(network, tokenizer, TEXTS, SIZE, OneOfTwo(rank, 2, ALONE.device), batch_size=2)
    nats, tokens = (sums[0] + sums[1]).tolist()
    whole = score_documents(network, tokenizer, TEXTS, SIZE, ALONE)
    assert 0 < sums[1][1] < whole.tokens
    assert (nats / tokens, tokens) == (pytest.approx(whole.loss, rel=1e-5), whole.tokens)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_without_dropout_and_left_as_it_was(tokenizer, training):
    network = make_model(vocab_size=len(tokenizer), dropout=0.5).train(training)
    first = score_documents(network, tokenizer, TEXTS, SIZE, ALONE)
    assert first == score_documents(network, tokenizer, TEXTS, SIZE, ALONE)
    assert network.training is training


@pytest.mark.parametrize("size", [2, 3, 8, 9])
def test_windows_score_each_token_once_with_at_least_half_a_window_of_context(size):
    for length in range(2, 40):
        ids = list(range(100, 100 + length))
        scored = []
        for number, (part, labels) in enumerate(windows(ids, size)):
            assert len(part) <= size
            places = [i for i, label in enumerate(labels) if label != IGNORED_LABEL]
            assert all(labels[i] == part[i] for i in places)
            assert number == 0 or min(places) >= size // 2
            scored += part[places].tolist()
        assert scored == ids[1:]
