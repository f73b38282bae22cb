"""Chat with a model in the terminal.

    python 2-eval.py                                                   # the newest chat model
    python 2-eval.py --prompt 你是谁？ 天空为什么是蓝色的？            # single questions
    python 2-eval.py --auto --output answers.json                      # the 24 built-in questions
    python 2-eval.py --checkpoint out/multi_chat/full_sft_512.pth --history 5 --system 你是一位诗人。
    python 2-eval.py --lora out/lora/identity_512 --lora_scale 0.8     # with an adapter, or some of it
    python 2-eval.py < questions.txt                                   # a question a line
    python 2-eval.py --test test.json --temperature 0                  # questions with known answers: how many right

In the chat, Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D leaves.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.cli import UserError, run
from model.options import InferenceOptions

if TYPE_CHECKING:
    from model.chat import Message
    from model.engine import Answer, Engine
    from model.sampling import Sampling

QUESTIONS = [
    "你叫什么名字？",
    "请问我该怎么称呼你？",
    "中国有哪些知名的大学？",
    "世界上最好的大学是哪一所？",
    "光的传播速度是多少？",
    "你了解长江吗？",
    "人的血液由哪些成分组成？",
    "第一颗人造卫星是哪个国家发射的？",
    "杭州有什么特色美食？",
    "泰山位于哪个省？",
    "地球上体型最大的动物是什么？",
    "地球自转一圈要多长时间？",
    "人类最先使用的金属是哪一种？",
    "水的化学式怎么写？",
    "大气里含量最高的气体是什么？",
    "世界最高峰叫什么名字？",
    "海洋中最深的海沟是哪一条？",
    "印刷术最早由谁发明？",
    "万有引力是谁提出来的？",
    "光合作用的原理是什么？",
    "大熊猫主要吃什么？",
    "海水为什么是咸的？",
    "牛奶里含有哪些营养物质？",
    "一个星期有几天？",
]
CHAT_HISTORY = 3  # turns
TEST_BATCH = 32  # questions of a test that are answered at the same time


@dataclass
class Args(InferenceOptions):
    """Chat with a model: in the terminal, or with given questions."""

    prompt: list[str] = field(default_factory=list)  # questions, instead of a chat
    auto: bool = False  # ask the built-in questions
    history: int | None = None  # earlier turns that the model is shown; none: 3 in the chat, 0 for single questions
    system: str = ""  # what the model is told before the conversation
    test: str = ""  # ask the questions of this file, whose right answers are known (dataset/make_sample.py writes one)
    compare: str = ""  # with --test: the --output of an earlier test, to show both results
    floor: float = 0.0  # with --test: it is an error if a smaller share of the single questions is answered right
    output: str = ""  # JSON file for the questions and answers


class Conversation:
    """Asks the engine, shows its answers while they come, and remembers both."""

    def __init__(self, engine: "Engine", sampling: "Sampling", system: str, history: int):
        self.engine, self.sampling, self.history = engine, sampling, history
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []  # questions and answers in turn
        self.record: list[dict[str, Any]] = []  # all that was asked, for --output

    def ask(self, question: str, heading: str = "") -> None:
        """Prints the answer. Ctrl-C goes through, after what has come so far is remembered."""
        user = {"role": "user", "content": question}
        earlier = self.turns[-2 * self.history :] if self.history else []
        answer = self.engine.chat([*self.opening, *earlier, user], self.sampling)
        print(heading, end="", flush=True)  # only now: a text that the engine refuses may be one that cannot be printed
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        finally:
            print(f"\n[{answer}]\n", flush=True)
            self.remember(user, answer)

    def remember(self, user: "Message", answer: "Answer") -> None:
        self.turns += [user, {"role": "assistant", "content": answer.text}]
        self.record.append(
            {
                "prompt": user["content"],
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "tokens_per_s": round(answer.tokens_per_s, 1),
            }
        )


def main(args: Args) -> None:
    from model.engine import load_engine, sampling_of

    if args.history is not None and args.history < 0:
        raise UserError(f"history is {args.history}, but must be 0 or more")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {Path(args.output).parent}")
    sampling = sampling_of(args)
    if args.test:
        return examine(args, sampling)
    with load_engine(args, stages=("full_sft", "dpo")) as engine:
        questions = args.prompt or (QUESTIONS if args.auto else [])
        chatting = not questions and sys.stdin.isatty()
        args.history = args.history if args.history is not None else CHAT_HISTORY * chatting
        conversation = Conversation(engine, sampling, args.system, args.history)
        try:
            if chatting:
                chat(conversation)
            else:
                ask_all(conversation, questions or lines_of_stdin())
        finally:
            if args.output:
                save(args, str(conversation.engine.path), conversation.record)


def chat(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing; not on Windows
    sys.stdin.reconfigure(errors="surrogateescape")
    print("Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D leaves.\n")
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if question == "/exit":
            return
        if question == "/clear":
            conversation.turns.clear()
            print("(forgotten)\n")
        elif question:
            try:
                conversation.ask(question)
            except KeyboardInterrupt:
                continue
            except UserError as error:  # too long: the conversation goes on without it
                print(f"error: {error}\n")


def lines_of_stdin() -> Iterator[str]:
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # the engine refuses what is not UTF-8
    return (line.strip() for line in sys.stdin if line.strip())


def ask_all(conversation: Conversation, questions: Iterable[str]) -> None:
    """Questions that cannot be asked are reported and passed over; UserError where that is so with every one."""
    errors = []
    for number, question in enumerate(questions, 1):
        try:
            conversation.ask(question, heading=f"{number}. {question}\n")
        except UserError as error:
            errors.append(error)
            print(f"{number}. {question[:40]}…\nerror: {error}\n", flush=True)
    if errors and not conversation.record:
        raise errors[0]
    if errors:
        print(f"not asked: {len(errors)} of {number} questions")


def examine(args: Args, sampling: "Sampling") -> None:
    """Asks the questions of a test, many at a time, and says how many answers are right."""
    from model.engine import load_engine
    from model.exact_match import KINDS, as_json, read_results, report, run_test, scores

    before = read_results(args.compare) if args.compare else []
    with load_engine(args, stages=("full_sft", "dpo"), max_batch=TEST_BATCH) as engine:
        cases = run_test(engine, sampling, args.test)
        if args.output:
            save(args, str(engine.path), as_json(cases))
        print(report(cases, before))
    right, asked = scores(cases).get(KINDS["single"], (0, 0))
    if right < args.floor * asked:
        raise UserError(f"{right} of {asked} single questions are answered right, less than {args.floor:.0%}")


def save(args: Args, checkpoint: str, answers: list[dict[str, Any]]) -> None:
    from model.checkpoint import write_json

    try:
        write_json(Path(args.output), {"settings": asdict(args) | {"checkpoint": checkpoint}, "answers": answers})
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from error


if __name__ == "__main__":
    run(main, Args)
