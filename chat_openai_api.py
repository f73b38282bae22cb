"""Chat in the terminal with any OpenAI-compatible server. Needs nothing but `pip install openai`.

    python chat_openai_api.py                                          # with my_openai_api.py on this computer
    python chat_openai_api.py --base_url http://192.168.1.5:8000/v1 --api_key secret --history 5
    python chat_openai_api.py --prompt 你是谁？ --no_stream             # one question

In the chat, Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D leaves.
"""

import argparse
import os
import sys

from openai import OpenAI, OpenAIError


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1", help="address of the server")
    parser.add_argument("--model", default="minimind", help="which of its models")
    parser.add_argument("--api_key", default=os.environ.get("OPENAI_API_KEY") or "none", help="what it wants to see")
    parser.add_argument("--prompt", nargs="+", default=[], help="questions, instead of a chat")
    parser.add_argument("--system", default="", help="what the model is told before the conversation")
    parser.add_argument("--history", type=int, default=3, help="earlier turns that the model is shown")
    parser.add_argument("--no_stream", action="store_true", help="show an answer only when it is complete")
    parser.add_argument("--temperature", type=float, help="below 1: more predictable, above: more varied")
    parser.add_argument("--top_p", type=float, help="choose among the fewest tokens that have this probability")
    parser.add_argument("--max_tokens", type=int, help="longest answer")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    return parser.parse_args()


class Conversation:
    def __init__(self, client: OpenAI, options: argparse.Namespace):
        self.client, self.options = client, options
        self.turns: list[dict[str, str]] = []  # questions and answers in turn

    def ask(self, question: str) -> None:
        """Prints the answer and remembers it; what has come before Ctrl-C, too."""
        options = self.options
        system = [{"role": "system", "content": options.system}] if options.system else []
        earlier = self.turns[-2 * options.history :] if options.history else []
        user = {"role": "user", "content": question}
        wanted = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        reply = self.client.chat.completions.create(
            model=options.model,
            messages=[*system, *earlier, user],
            stream=not options.no_stream,
            **{name: value for name, value in wanted.items() if value is not None},
        )
        pieces: list[str] = []
        try:
            for piece in [reply.choices[0].message.content] if options.no_stream else streamed(reply):
                pieces.append(piece)
                print(piece, end="", flush=True)
        finally:
            print("\n", flush=True)
            self.turns += [user, {"role": "assistant", "content": "".join(pieces)}]


def streamed(reply):
    with reply:  # leaving it early tells the server to stop
        for chunk in reply:
            if chunk.choices:
                yield chunk.choices[0].delta.content or ""


def chat(conversation: Conversation) -> None:
    print("Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D leaves.\n")
    while True:
        try:
            question = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
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
            except OpenAIError as error:
                print(f"error: {error}\n")


def main() -> None:
    options = read_options()
    sys.stdout.reconfigure(errors="replace")  # a terminal that has no Chinese shows question marks
    with OpenAI(base_url=options.base_url, api_key=options.api_key) as client:
        conversation = Conversation(client, options)
        if not options.prompt:
            chat(conversation)
        for question in options.prompt:
            conversation.ask(question)


if __name__ == "__main__":
    try:
        main()
    except OpenAIError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
