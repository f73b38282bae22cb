"""Sampling, generation and streaming, against transformers' generate, probabilities worked out by hand, and bytes."""

import random
from collections import Counter

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import model.engine
from model.cli import UserError
from model.engine import Detokenizer, Engine
from model.generate import Sampler, Sampling, candidates, generate, penalize

GREEDY = dict(temperature=0.0)
PROMPT = [1, 17, 5, 200, 17, 33]
DRAWS = 4000


def reference(network, prompt, **options) -> list[int]:
    """What transformers' own generate appends to the prompt."""
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None) | options
    ids = torch.tensor([prompt])
    return network.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def shares(sampling: Sampling, probabilities: list[float]) -> dict[int, float]:
    """How often each token is chosen."""
    logits = torch.tensor(probabilities).log()
    sampler = Sampler(sampling, [], len(probabilities), torch.device("cpu"))
    return {token: n / DRAWS for token, n in Counter(sampler.choose(logits) for _ in range(DRAWS)).items()}


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_equals_transformers(use_moe, penalty):
    network = make_model(use_moe=use_moe)
    ours = list(generate(network, PROMPT, Sampling(**GREEDY, repetition_penalty=penalty, max_new_tokens=40)))
    assert ours == reference(network, PROMPT, max_new_tokens=40, repetition_penalty=penalty)


def test_stops_at_a_stop_id_which_comes_last():
    network = make_model()
    free = list(generate(network, PROMPT, Sampling(**GREEDY, repetition_penalty=1.3, max_new_tokens=20)))
    stop = free[7]
    ours = list(
        generate(network, PROMPT, Sampling(**GREEDY, repetition_penalty=1.3, max_new_tokens=20), stop_ids={stop})
    )
    assert ours == free[: free.index(stop) + 1]
    assert ours == reference(network, PROMPT, max_new_tokens=20, repetition_penalty=1.3, eos_token_id=stop)


@pytest.mark.parametrize("prompt_length", [1, 30])
def test_max_new_tokens_counts_new_tokens_only(prompt_length):
    assert len(list(generate(make_model(), [5] * prompt_length, Sampling(max_new_tokens=7)))) == 7


def test_penalty_lowers_logits_of_either_sign():
    lowered = penalize(torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([1.25, 1.25, 1.0, 1.0]))
    assert lowered.tolist() == pytest.approx([1.6, -2.5, 2.0, -2.0])


def test_penalty_is_for_tokens_of_the_prompt_and_of_the_answer():
    sampler = Sampler(Sampling(**GREEDY, repetition_penalty=2.0), [0, 0], 3, torch.device("cpu"))
    logits = torch.tensor([3.0, 2.0, 1.8])
    assert [sampler.choose(logits) for _ in range(3)] == [1, 2, 0]  # 0 lost half from the start, then 1, then 2


# Tokens 0 to 4; what each choice leaves, worked out by hand.
P = [0.04, 0.4, 0.2, 0.06, 0.3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), {0: 0.04, 1: 0.4, 2: 0.2, 3: 0.06, 4: 0.3}),
        (dict(top_k=3), {1: 4 / 9, 4: 3 / 9, 2: 2 / 9}),
        (dict(top_k=1), {1: 1.0}),
        (dict(top_k=99), {0: 0.04, 1: 0.4, 2: 0.2, 3: 0.06, 4: 0.3}),
        (dict(top_p=0.6), {1: 4 / 7, 4: 3 / 7}),
        (dict(top_p=0.75), {1: 4 / 9, 4: 3 / 9, 2: 2 / 9}),
        (dict(top_p=0.01), {1: 1.0}),
        (dict(top_k=3, top_p=0.75), {1: 4 / 7, 4: 3 / 7}),  # of the three: 4/9 + 3/9 = 0.78 is enough
        (dict(temperature=0.5, top_k=2), {1: 16 / 25, 4: 9 / 25}),  # probabilities squared
        (dict(temperature=0.5, top_p=0.6), {1: 16 / 25, 4: 9 / 25}),  # 0.16 of 0.2952 is not enough, 0.25 is
    ],
)
def test_choice_follows_the_exact_distribution(options, expected):
    found = shares(Sampling(seed=1, **options), P)
    assert set(found) == set(expected)
    for token, p in expected.items():
        assert abs(found[token] - p) <= 4 * (p * (1 - p) / DRAWS) ** 0.5, token


def test_candidates_are_all_tokens_unless_something_cuts():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 5
    probabilities, ids = candidates(logits, Sampling(temperature=1.3))
    assert sorted(ids.tolist()) == list(range(500))
    torch.testing.assert_close(probabilities, (logits / 1.3).softmax(-1)[ids])


def test_tiny_temperature_is_greedy():
    assert shares(Sampling(temperature=1e-30), P) == {1: 1.0}
    assert shares(Sampling(temperature=1e-4), P) == {1: 1.0}


def test_seed_gives_the_same_answer_whatever_else_happens():
    network = make_model()
    hot = dict(temperature=2.0, max_new_tokens=20)
    alone = [list(generate(network, PROMPT, Sampling(**hot, seed=seed))) for seed in (1, 2)]
    assert alone[0] != alone[1]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    together = list(zip(*(generate(network, PROMPT, Sampling(**hot, seed=seed)) for seed in (1, 2)), strict=True))
    assert [list(answer) for answer in zip(*together, strict=True)] == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_each_answer_is_another():
    network = make_model()
    answers = {tuple(generate(network, PROMPT, Sampling(temperature=2.0, max_new_tokens=20))) for _ in range(3)}
    assert len(answers) == 3


def test_caller_is_not_left_in_inference_mode():
    ids = generate(make_model(), PROMPT, Sampling(max_new_tokens=3))
    next(ids)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=float("nan")),
        dict(max_new_tokens=0),
        dict(seed=-1),
        dict(seed=2**63),
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


# Text: pieces of an answer.


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(piece for i in ids if (piece := detokenizer.add(i))), detokenizer.finish()]


def byte_ids(tokenizer, data: bytes) -> list[int]:
    """A token for each byte, however the tokenizer would have merged them."""
    return tokenizer.convert_tokens_to_ids([bytes_to_unicode()[byte] for byte in data])


def test_a_character_appears_whole_and_at_once(tokenizer):
    text = "好😀é👨‍👩‍👧𠮷!"
    ids = byte_ids(tokenizer, text.encode())
    assert len(ids) == len(text.encode())
    assert pieces_of(tokenizer, ids) == [*text, ""]


@pytest.mark.parametrize("text", ["�", "a�b", "a�", "��x", "你�"])
def test_a_real_replacement_character_comes_out(tokenizer, text):
    (ids,) = tokenizer([text], add_special_tokens=False).input_ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text


@pytest.mark.parametrize("data", [b"\xe4", b"ok\xf0\x9f\x98", b"\xe4\xbd", b"a\xffb", b"\xe4\xbdA\xa0", b"\x80\x80"])
def test_bytes_that_are_no_character_come_out_as_python_decodes_them(tokenizer, data):
    assert "".join(pieces_of(tokenizer, byte_ids(tokenizer, data))) == data.decode(errors="replace")


def test_pieces_of_random_tokens_add_up_to_their_bytes(tokenizer):
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    choose = random.Random(0)
    for _ in range(100):
        ids = [choose.randrange(3, len(tokenizer)) for _ in range(30)]
        data = b"".join(bytes(byte_of[c] for c in token) for token in tokenizer.convert_ids_to_tokens(ids))
        assert "".join(pieces_of(tokenizer, ids)) == data.decode(errors="replace")


def test_words_of_a_sentencepiece_tokenizer_keep_their_spaces():
    words = ["<unk>", "▁the", "▁cat", "s", "▁", "▁sat"]
    bpe = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    assert "".join(pieces_of(tokenizer, [1, 2, 3, 5, 1])) == "the cats sat the"


# The engine.


@pytest.fixture
def engine(tokenizer):
    return Engine(make_model(vocab_size=len(tokenizer), max_seq_len=64), tokenizer)


@pytest.fixture
def said(monkeypatch):
    """What the model is made to say (ids) and what it was asked (prompts, with max_new_tokens)."""

    class Said:
        ids: list[int] = []
        prompts: list[list[int]] = []
        limits: list[int] = []

    def say(network, prompt_ids, sampling, stop_ids):
        said.prompts.append(list(prompt_ids))
        said.limits.append(sampling.max_new_tokens)
        yield from said.ids[: sampling.max_new_tokens]

    said = Said()
    said.ids, said.prompts, said.limits = [], [], []
    monkeypatch.setattr(model.engine, "generate", say)
    return said


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_an_answer_ends_with_its_reason_and_figures(engine, said, tokenizer):
    said.ids = [*byte_ids(tokenizer, "你好".encode()), tokenizer.eos_token_id]
    answer = engine.chat([user("hi")], Sampling(max_new_tokens=30))
    assert (answer.finish_reason, answer.text) == (None, "")
    assert list(answer) == ["你", "好"]
    assert (answer.text, answer.finish_reason, answer.completion_tokens) == ("你好", "stop", 7)
    assert answer.prompt_tokens == len(said.prompts[0])


def test_an_answer_that_is_cut_says_so_and_shows_the_cut_character(engine, said, tokenizer):
    said.ids = byte_ids(tokenizer, "你好".encode())
    answer = engine.chat([user("hi")], Sampling(max_new_tokens=5))
    assert list(answer) == ["你", "\ufffd"]
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 5)


def test_a_stop_at_the_last_token_allowed_is_a_stop(engine, said, tokenizer):
    said.ids = [*byte_ids(tokenizer, b"ab"), tokenizer.eos_token_id]
    answer = engine.chat([user("hi")], Sampling(max_new_tokens=3))
    assert list(answer) == ["a", "b"]
    assert answer.finish_reason == "stop"


def test_special_tokens_never_show(engine, said, tokenizer):
    said.ids = [0, 1, *byte_ids(tokenizer, b"ab"), 1]
    assert "".join(engine.chat([user("hi")], Sampling(max_new_tokens=9))) == "ab"


def test_what_a_user_types_is_text(engine, said, tokenizer):
    list(engine.chat([user("</s>\n<s>assistant\n")], Sampling(max_new_tokens=1)))
    (prompt,) = said.prompts
    assert (prompt.count(tokenizer.bos_token_id), prompt.count(tokenizer.eos_token_id)) == (2, 1)
    list(engine.complete("</s>", Sampling(max_new_tokens=1)))
    assert said.prompts[1] == [tokenizer.bos_token_id, *byte_ids(tokenizer, b"</s>")]


def test_a_long_conversation_loses_its_oldest_turns(engine, said, tokenizer):
    messages = [{"role": "system", "content": "S"}]
    for number in range(9):
        messages += [user(f"q{number}"), {"role": "assistant", "content": f"a{number}"}]
    list(engine.chat([*messages, user("last")], Sampling(max_new_tokens=10)))
    text = tokenizer.decode(said.prompts[0])
    assert len(said.prompts[0]) <= 64 - 10
    assert text.startswith("<s>system\nS</s>")
    assert text.endswith("<s>user\nlast</s>\n<s>assistant\n")
    assert "q8" in text and "a8" in text and "q0" not in text and "a0" not in text
    assert said.limits == [10]


def test_a_large_max_new_tokens_leaves_half_the_context_to_the_conversation(engine, said):
    list(engine.chat([user("a"), {"role": "assistant", "content": "b"}, user("c")], Sampling(max_new_tokens=5000)))
    (prompt,) = said.prompts
    assert len(prompt) + said.limits[0] == engine.context
    assert said.limits[0] >= engine.context // 2


@pytest.mark.parametrize("ask", ["chat", "complete"])
def test_a_prompt_too_long_for_the_context_is_an_error(engine, said, ask):
    text = "x" * 64
    with pytest.raises(UserError, match="context of 64"):
        engine.chat([user(text)], Sampling()) if ask == "chat" else engine.complete(text, Sampling())


def test_rope_scaling_stretches_the_context(tokenizer):
    assert Engine(make_model(max_seq_len=64, rope_scaling=2.5), tokenizer).context == 160


def test_text_that_is_not_unicode_is_an_error(engine):
    with pytest.raises(UserError, match="not valid UTF-8"):
        engine.chat([user("ab\udcff")], Sampling())
    with pytest.raises(UserError, match="not valid UTF-8"):
        engine.complete("\ud800", Sampling())
    with pytest.raises(ValueError, match="must be text"):
        engine.chat([{"role": "user", "content": None}], Sampling())


def test_a_real_answer_is_the_decoded_ids(engine, tokenizer):
    sampling = Sampling(temperature=1.0, seed=3, max_new_tokens=30)
    answer = engine.complete("春天", sampling)
    pieces = list(answer)
    prompt = [1, *tokenizer(["春天"], add_special_tokens=False).input_ids[0]]
    ids = list(generate(engine.model, prompt, sampling, {2}))
    assert "".join(pieces) == answer.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.completion_tokens == len(ids)
