"""Sampling, generation and streaming, against transformers' generate, probabilities worked out by hand, and bytes."""

import asyncio
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import model.engine
import model.generate
from model.answer import Detokenizer
from model.cli import UserError
from model.engine import Busy, Closed, Engine
from model.generate import Batch, Generation
from model.sampling import Sampler, Sampling, Token, candidates, penalize

GREEDY = dict(temperature=0.0)
PROMPT = [1, 17, 5, 200, 17, 33]
DRAWS = 4000


def generate(network, prompt, sampling: Sampling, stop_ids=()) -> list[int]:
    """What the batch appends to one prompt, alone."""
    return generate_all(network, [(prompt, sampling)], size=1, stop_ids=stop_ids)[0]


def generate_all(network, prompts, size: int, stop_ids=()) -> list[list[int]]:
    """Several prompts, so many at a time: new ones come in as soon as there is room."""
    batch = Batch(network, size, network.config.max_seq_len)
    generations = [Generation(prompt, sampling, stop_ids) for prompt, sampling in prompts]
    waiting = list(generations)
    while waiting or batch.generations:
        while waiting and batch.has_room:
            batch.add(waiting.pop(0))
        batch.step()
        batch.remove_those_over()
    return [generation.ids for generation in generations]


def reference(network, prompt, **options) -> list[int]:
    """What transformers' own generate appends to the prompt."""
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None) | options
    ids = torch.tensor([prompt])
    return network.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def shares(sampling: Sampling, probabilities: list[float]) -> dict[int, float]:
    """How often each token is chosen."""
    logits = torch.tensor(probabilities).log()
    sampler = Sampler(sampling, [], len(probabilities), torch.device("cpu"))
    return {token: n / DRAWS for token, n in Counter(sampler.choose(logits).id for _ in range(DRAWS)).items()}


@pytest.fixture(params=["loops", "model"])
def ways_to_decode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to decode: that of CPUs, and by the model itself, as on a GPU."""
    if request.param == "model":
        monkeypatch.setattr(model.generate, "takes_loops", lambda _: False)


@pytest.mark.usefixtures("ways_to_decode")
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_equals_transformers(use_moe, penalty):
    network = make_model(use_moe=use_moe)
    ours = generate(network, PROMPT, Sampling(**GREEDY, repetition_penalty=penalty, max_new_tokens=40))
    assert ours == reference(network, PROMPT, max_new_tokens=40, repetition_penalty=penalty)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])  # the latter: 30 s
def test_compiled_into_one_graph_it_chooses_the_same_tokens(backend, monkeypatch):
    monkeypatch.setattr(model.generate, "takes_loops", lambda _: False)
    network = make_model()
    prompts = [(PROMPT[:length], Sampling(**GREEDY, max_new_tokens=12)) for length in (6, 3, 1, 5)]
    expected = [reference(network, prompt, max_new_tokens=12) for prompt, _ in prompts]
    torch.compiler.reset()  # the limit on programs of one function counts those of other tests too
    network.compile(dynamic=True, fullgraph=True, backend=backend)
    assert generate_all(network, prompts, size=3) == expected


def test_stops_at_a_stop_id_which_comes_last():
    network = make_model()
    free = generate(network, PROMPT, Sampling(**GREEDY, repetition_penalty=1.3, max_new_tokens=20))
    stop = free[7]
    ours = list(
        generate(network, PROMPT, Sampling(**GREEDY, repetition_penalty=1.3, max_new_tokens=20), stop_ids={stop})
    )
    assert ours == free[: free.index(stop) + 1]
    assert ours == reference(network, PROMPT, max_new_tokens=20, repetition_penalty=1.3, eos_token_id=stop)


@pytest.mark.parametrize("prompt_length", [1, 30])
def test_max_new_tokens_counts_new_tokens_only(prompt_length):
    assert len(generate(make_model(), [5] * prompt_length, Sampling(max_new_tokens=7))) == 7


def test_penalty_lowers_logits_of_either_sign():
    lowered = penalize(torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([1.25, 1.25, 1.0, 1.0]))
    assert lowered.tolist() == pytest.approx([1.6, -2.5, 2.0, -2.0])


def test_penalty_is_for_tokens_of_the_prompt_and_of_the_answer():
    sampler = Sampler(Sampling(**GREEDY, repetition_penalty=2.0), [0, 0], 3, torch.device("cpu"))
    logits = torch.tensor([3.0, 2.0, 1.8])
    assert [sampler.choose(logits).id for _ in range(3)] == [1, 2, 0]  # 0 lost half from the start, then 1, then 2


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
        (dict(min_p=0.45), {1: 4 / 9, 4: 3 / 9, 2: 2 / 9}),
        (dict(min_p=1.0), {1: 1.0}),
        (dict(min_p=0.6, top_p=0.75), {1: 4 / 7, 4: 3 / 7}),
        (dict(min_p=0.4, top_k=2, temperature=2.0), {1: 0.4**0.5, 4: 0.3**0.5}),
        (dict(temperature=0.5, top_p=0.6), {1: 16 / 25, 4: 9 / 25}),  # 0.16 of 0.2952 is not enough, 0.25 is
    ],
)
def test_choice_follows_the_exact_distribution(options, expected):
    found = shares(Sampling(seed=1, **options), P)
    expected = {token: p / sum(expected.values()) for token, p in expected.items()}
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
    alone = [generate(network, PROMPT, Sampling(**hot, seed=seed)) for seed in (1, 2)]
    assert alone[0] != alone[1]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate_all(network, [(PROMPT, Sampling(**hot, seed=seed)) for seed in (1, 2)], size=2) == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_each_answer_is_another():
    network = make_model()
    answers = {tuple(generate(network, PROMPT, Sampling(temperature=2.0, max_new_tokens=20))) for _ in range(3)}
    assert len(answers) == 3


def test_caller_is_not_left_in_inference_mode():
    generate(make_model(), PROMPT, Sampling(max_new_tokens=3))
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("ways_to_decode")
@pytest.mark.parametrize(("use_moe", "size", "read"), [(False, 17, 8), (False, 5, 100), (True, 5, 8), (True, 17, 100)])
def test_each_of_a_batch_gets_what_transformers_gives_it_alone(use_moe, size, read, monkeypatch):
    """17 prompts and answers of many lengths, all at once or 5 at a time; prompts are read 8 or 100 tokens at a time,
    so that some are read together and others in pieces."""
    monkeypatch.setattr(model.generate, "PROMPT_TOKENS_PER_STEP", read)
    network = make_model(use_moe=use_moe)
    lengths = [(1 + 7 * i % 40, 3 + 5 * i % 21) for i in range(17)]
    prompts = [[(11 * i + j * j) % 300 for j in range(prompt)] for i, (prompt, _) in enumerate(lengths)]
    wanted = [Sampling(**GREEDY, repetition_penalty=1.1, max_new_tokens=new) for _, new in lengths]
    for prompt, new, ours in zip(
        prompts, lengths, generate_all(network, list(zip(prompts, wanted, strict=True)), size), strict=True
    ):
        assert ours == reference(network, prompt, max_new_tokens=new[1], repetition_penalty=1.1)


def test_prompt_and_answer_may_fill_the_context_to_the_last_token():
    network = make_model(max_seq_len=16)
    assert generate(network, PROMPT, Sampling(**GREEDY, max_new_tokens=10)) == reference(
        network, PROMPT, max_new_tokens=10
    )


def test_a_cancelled_sequence_leaves_its_slot_to_another():
    network = make_model()
    batch = Batch(network, 2, 64)
    first, second = (Generation(PROMPT, Sampling(**GREEDY, max_new_tokens=30)) for _ in range(2))
    batch.add(first), batch.add(second)
    for _ in range(3):
        batch.step()
    assert not batch.has_room
    first.cancelled = True
    assert [generation for generation, _ in batch.step()] == [second]
    assert batch.has_room and len(first.ids) == 3
    third = Generation([9, 9, 9], Sampling(**GREEDY, max_new_tokens=30))
    batch.add(third)
    while batch.generations:
        batch.step()
    assert second.ids == reference(network, PROMPT, max_new_tokens=30)
    assert third.ids == reference(network, [9, 9, 9], max_new_tokens=30)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(presence_penalty=1.5), [0, 1, 2, 0, 0]),
        (dict(frequency_penalty=0.7), [0, 1, 0, 2, 1]),  # 3.0, 2.5, 2.0 and 0.7 less each time
        (dict(presence_penalty=-1.5), [0, 0, 0, 0, 0]),
        (dict(logit_bias={2: 1.5}), [2, 2, 2, 2, 2]),
        (dict(logit_bias={0: -100, 1: -100}), [2, 2, 2, 2, 2]),
    ],
)
def test_penalties_of_the_answer_and_bias(options, expected):
    sampler = Sampler(Sampling(**GREEDY, **options), [0, 0, 0], 3, torch.device("cpu"))
    assert [sampler.choose(torch.tensor([3.0, 2.5, 2.0])).id for _ in range(5)] == expected


def test_logprobs_are_the_models_own():
    network = make_model()
    batch = Batch(network, 1, 64)
    batch.add(Generation(PROMPT, Sampling(seed=0, temperature=3.0, presence_penalty=2.0, logprobs=3, max_new_tokens=9)))
    tokens = []
    while batch.generations:
        tokens += [token for _, token in batch.step()]
    ids = [*PROMPT, *(token.id for token in tokens)]
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    assert [token.logprob for token in tokens] == pytest.approx(
        [float(row[token.id]) for row, token in zip(expected, tokens, strict=True)], abs=1e-4
    )
    for row, token in zip(expected, tokens, strict=True):
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=-0.1),
        dict(min_p=1.1),
        dict(presence_penalty=float("nan")),
        dict(frequency_penalty=float("inf")),
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
    with Engine(make_model(vocab_size=len(tokenizer), max_seq_len=64), tokenizer) as engine:
        yield engine


@pytest.fixture
def said(monkeypatch):
    """What the model is made to say (ids) and what it was asked (prompts, with max_new_tokens)."""

    class Said:
        ids: list[int]
        prompts: list[list[int]]
        limits: list[int]

    class Parrot:
        def __init__(self, sampling, prompt_ids, vocab_size, device):
            said.prompts.append(list(prompt_ids))
            said.limits.append(sampling.max_new_tokens)
            self.ids = iter(said.ids)

        def choose(self, logits):
            return Token(next(self.ids, 2))

    said = Said()
    said.ids, said.prompts, said.limits = [2], [], []
    monkeypatch.setattr(model.generate, "Sampler", Parrot)
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


def test_an_answer_that_is_cut_says_so_and_shows_whole_characters_only(engine, said, tokenizer):
    said.ids = byte_ids(tokenizer, "你好".encode())
    answer = engine.chat([user("hi")], Sampling(max_new_tokens=5))
    assert list(answer) == ["你"]
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 5)


@pytest.mark.parametrize(
    ("stop", "pieces", "reason"),
    [
        (["cd"], ["a", "b"], "stop"),
        (["d"], ["a", "b", "c"], "stop"),
        (["你"], ["a", "b", "c", "d"], "stop"),
        (["bcx", "cde"], ["a", "b", "cd你", "e"], "length"),  # neither comes, though each of them begins
        (["de", "b"], ["a"], "stop"),
        (["", "zz"], [*"abcd你e"], "length"),
        (["abcd你e"], [], "stop"),
        (["ex"], [*"abcd你", "e"], "length"),  # held back until it was clear that nothing follows
    ],
)
def test_stop_strings_across_tokens(engine, said, tokenizer, stop, pieces, reason):
    said.ids = byte_ids(tokenizer, "abcd你e".encode())
    answer = engine.chat([user("hi")], Sampling(max_new_tokens=len(said.ids)), stop)
    assert list(answer) == pieces
    assert (answer.finish_reason, answer.text) == (reason, "".join(pieces))


def test_tokens_behind_a_stop_string_are_not_shown(engine, said, tokenizer):
    said.ids = byte_ids(tokenizer, b"abcdef")
    answer = engine.chat([user("hi")], Sampling(max_new_tokens=6), ["de"])
    assert list(answer) == ["a", "b", "c"]
    assert answer.shown_tokens == 3


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
    ids = generate(engine.model, prompt, sampling, {2})
    detokenizer = Detokenizer(tokenizer)
    assert "".join(pieces) == answer.text == "".join(map(detokenizer.add, ids))
    assert answer.completion_tokens == len(ids)


def test_megabytes_are_refused_without_counting_their_tokens(engine, monkeypatch):
    monkeypatch.setattr(model.engine, "encode", None)
    monkeypatch.setattr(model.engine, "encode_texts", None)
    with pytest.raises(UserError, match="context of 64"):
        engine.chat([user("x" * 10**7)], Sampling())
    with pytest.raises(UserError, match="context of 64"):
        engine.complete("x" * 10**7, Sampling())


def test_old_turns_of_megabytes_are_left_out(engine, said, tokenizer):
    old = [user("x" * 10**6), {"role": "assistant", "content": "y" * 10**6}]
    list(engine.chat([{"role": "system", "content": "S"}, *old * 3, user("q")], Sampling(max_new_tokens=10)))
    assert tokenizer.decode(said.prompts[0]).startswith("<s>system\nS</s>\n<s>user\nq</s>")


# Many callers at once.


@pytest.fixture
def crowd(tokenizer):
    """An engine for 4 answers at a time; answers end early only if the bias lets them."""
    network = make_model(vocab_size=len(tokenizer), max_seq_len=50_000)
    with Engine(network, tokenizer, max_batch=4, max_queue=20) as engine:
        yield engine


ENDLESS = dict(logit_bias={2: -1000.0}, max_new_tokens=40_000)  # minutes


def idle(engine: Engine) -> None:
    """Returns when nothing runs and nothing waits."""
    with engine.changed:
        done = engine.changed.wait_for(lambda: not (engine.answers or engine.waiting), timeout=20)
    assert done


def test_threads_get_what_each_would_get_alone(crowd):
    texts = [f"{number} 你好" * (1 + number % 3) for number in range(17)]
    wanted = Sampling(**GREEDY, repetition_penalty=2.0, max_new_tokens=25)
    expected = ["".join(crowd.complete(text, wanted)) for text in texts]  # one after the other
    with ThreadPoolExecutor(17) as pool:
        together = list(pool.map(lambda text: "".join(crowd.complete(text, wanted)), texts))
    assert together == expected
    assert len(set(expected)) > 10


def test_coroutines_get_their_answers(crowd):
    async def ask(seed: int) -> str:
        sampling = Sampling(temperature=1.5, seed=seed, max_new_tokens=20)
        return "".join([piece async for piece in crowd.chat([user("hi")], sampling)])

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(seed) for seed in range(9)))

    expected = [
        "".join(crowd.chat([user("hi")], Sampling(temperature=1.5, seed=i, max_new_tokens=20))) for i in range(9)
    ]
    assert asyncio.run(ask_all()) == expected


def test_leaving_early_or_cancelling_makes_room(crowd):
    answers = [crowd.complete("a", Sampling(**ENDLESS)) for _ in range(8)]
    pieces = [iter(answer) for answer in answers]
    for piece in pieces[:4]:
        next(piece)
    assert len(crowd.answers) == 4  # the others wait
    for piece in pieces[:4]:
        piece.close()
    for piece in pieces[4:]:
        next(piece)
    for answer in answers[4:]:
        answer.cancel()
    idle(crowd)
    assert all(answer.finish_reason is None and answer.completion_tokens < 40_000 for answer in answers)


def test_a_cancelled_coroutine_makes_room(crowd):
    async def main() -> None:
        answer = crowd.complete("a", Sampling(**ENDLESS))
        started = asyncio.Event()

        async def read() -> None:
            async for _ in answer:
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    idle(crowd)


def test_an_abandoned_answer_ends_by_itself(crowd):
    crowd.complete("a", Sampling(max_new_tokens=5))
    idle(crowd)


def test_no_more_wait_than_may(crowd):
    answers = crowd.submit([([1], Sampling(**ENDLESS))] * 23)
    with pytest.raises(Busy):
        crowd.submit([([1], Sampling())] * 2)  # both or none
    answers += crowd.submit([([1], Sampling(**ENDLESS))])
    with pytest.raises(Busy):
        crowd.complete("a", Sampling())
    for answer in answers:
        answer.cancel()
    assert crowd.complete("a", Sampling(max_new_tokens=1)).prompt_tokens == 2
    idle(crowd)


def test_what_goes_wrong_in_a_step_is_told_and_the_engine_goes_on(crowd, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no memory, say")

    good = "".join(crowd.complete("a", Sampling(**GREEDY, max_new_tokens=5)))
    with monkeypatch.context() as patch:
        patch.setattr(crowd.batch, "logits", fail)
        answers = crowd.submit([([1], Sampling())] * 3)
        for answer in answers:
            with pytest.raises(RuntimeError, match="no memory, say"):
                list(answer)
        idle(crowd)
    assert "a step of the engine failed" in caplog.text
    assert "".join(crowd.complete("a", Sampling(**GREEDY, max_new_tokens=5))) == good


def test_an_answer_that_cannot_begin_holds_up_no_other(crowd, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no memory, say")

    with monkeypatch.context() as patch:
        patch.setattr("model.generate.Sampler", fail)
        (answer,) = crowd.submit([([1], Sampling())])
        with pytest.raises(RuntimeError, match="no memory, say"):
            list(answer)
    assert "an answer could not begin" in caplog.text
    assert crowd.complete("a", Sampling(**GREEDY, max_new_tokens=5))


def test_closing_ends_answers_and_refuses_new_ones(crowd):
    answers = crowd.submit([([1], Sampling(**ENDLESS))] * 6)
    pieces = iter(answers[0])
    next(pieces)
    crowd.close()
    assert len(list(pieces)) < 39_999
    assert answers[0].finish_reason is None
    assert list(answers[5]) == []
    with pytest.raises(Closed):
        crowd.complete("a", Sampling())
    with pytest.raises(Closed):
        crowd.embed([1])


def test_embedding_is_the_mean_of_the_last_hidden_states(crowd):
    ids = [1, 30, 40, 50]
    states = crowd.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    assert crowd.embed(ids).result() == pytest.approx((states / states.norm()).tolist(), abs=1e-6)
    with pytest.raises(IndexError):
        crowd.embed([10**6]).result()
