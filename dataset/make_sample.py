"""The small world: tables of facts -> training data, and a test of what a model has learnt from it.

    python dataset/make_sample.py                            # writes out/demo/sample
    python dataset/make_sample.py --out_dir somewhere

Reads dataset/sample/world: tables (NAME.csv: a thing a row, its attributes in columns) and wordings (*.yaml: how a
relation between two columns is told, asked and answered). README.md there tells the rest. Writes

    pretrain.jsonl   every fact in many ways, alone and in short passages        {"text": …}
    sft.jsonl        dialogues of one or more turns, honest ignorance included   {"messages": […]}
    dpo.jsonl        a right answer and a wrong, evasive or rambling one    {"prompt": …, "chosen": …, "rejected": …}
    test.json        questions in wordings that none of them has, and which answers are right (model/exact_match.py)

The same tables give the same files, byte by byte.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dataset.world import Relation, World, load_world  # noqa: E402
from model.cli import UserError, run  # noqa: E402
from model.exact_match import is_right  # noqa: E402

POLITE = ("请问，", "请问", "你好，", "你知道吗，", "告诉我，", "我想问一下，", "帮我看看，", "问个问题：", "")
EVASIVE = (
    "这个问题很复杂，不同的人有不同的看法。",
    "这要看具体的情况，很难说清楚。",
    "你可以自己去查一查资料。",
    "关于这个问题，有很多种说法。",
    "这个嘛，以后再说吧。",
)
Message = dict[str, str]


@dataclass
class Args:
    """Make training data and a test from the tables of the small world."""

    out_dir: str = "out/demo/sample"  # folder to write to
    world: str = str(ROOT / "dataset/sample/world")  # folder of tables and wordings
    share: float = 1.0  # how much of each table to use: less is learnt faster
    read: int = 4  # how often each wording of each relation is in the pretraining text, with an answer
    asked: int = 10  # single questions about a fact, in the wordings of its relation; more where it has few facts
    asked_otherwise: int = 4  # ... and with the thing named first, or as a statement with a gap
    follow_ups: int = 13  # conversations in which each fact is asked for without naming the thing
    joined: float = 0.3  # share of the single questions that come again, in conversations about this and that
    unknown: int = 125  # questions of each relation about things that do not exist
    pairs: int = 300  # answers to prefer
    tested: int = 6  # questions of the test about each relation, single ones and follow-ups each
    seed: int = 42


def main(args: Args) -> None:
    if not (Path(args.world) / "outside.yaml").is_file():
        raise UserError(f"--world {args.world}: holds no tables and wordings as dataset/sample/world does")
    world = load_world(Path(args.world), args.share)
    writer = Writer(world, args)
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [{"text": text} for text in writer.texts()]
    dialogues = [{"messages": messages} for messages in writer.dialogues()]
    for name, records in {"pretrain": texts, "sft": dialogues, "dpo": list(writer.pairs())}.items():
        writer.draw.shuffle(records)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(records):,} records")
    test = Examiner(world, args).test()
    (folder / "test.json").write_text(json.dumps(test, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}/test.json: {len(test['cases']):,} questions; {world.num_facts:,} facts")


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def text_of(messages: list[Message]) -> str:
    return "".join(message["content"] for message in messages)


def fill(wording: str, thing: str, answer: str = "") -> str:
    return wording.replace("{x}", thing).replace("{y}", answer)


class Writer:
    """Fills the training wordings with facts, by lot."""

    def __init__(self, world: World, args: Args):
        self.world, self.args, self.draw = world, args, random.Random(args.seed)

    # --- pretraining text -------------------------------------------------------------------------------------------

    def texts(self) -> Iterator[str]:
        """Each wording of each fact once: some alone, others in passages about a thing, or about several of a kind."""
        for group in self.world.groups():
            for number in range(max(len(relation.tells) for relation in group)):
                things = list(dict.fromkeys(thing for relation in group for thing in relation.facts))
                self.draw.shuffle(things)
                while things:
                    size = self.draw.choice((1, 2, 3))
                    yield "".join(s for thing in things[:size] for s in self.sentences(group, thing, number))
                    del things[:size]
        for single in self.world.singles:
            yield from single.tells
            yield "".join(self.draw.sample(single.tells, min(3, len(single.tells))))
        yield from self.questions_to_read()

    def questions_to_read(self) -> Iterator[str]:
        """Every way to ask, with an answer: in fine-tuning the words of questions are seen, but not learnt."""
        for relation in self.world.relations:
            for wording in relation.asks * self.args.read:
                yield text_of(self.asked(relation, self.draw.choice(list(relation.facts)), wording))
            for wording in relation.follows * (self.args.read // 2):
                yield wording + self.reply(relation, self.draw.choice(list(relation.facts)))
        for single in self.world.singles:
            for wording in single.asks:
                yield text_of(turn(self.dressed(wording), self.draw.choice(single.replies)))

    def sentences(self, group: list[Relation], thing: str, number: int) -> list[str]:
        """What there is to say about a thing, each fact in its wording of that number."""
        found = [relation for relation in group if thing in relation.facts]
        self.draw.shuffle(found)
        return [fill(r.tells[number % len(r.tells)], thing, r.facts[thing][0]) for r in found]

    # --- dialogues --------------------------------------------------------------------------------------------------

    def dialogues(self) -> Iterator[list[Message]]:
        answers, ignorance = list(self.single_questions()), list(self.ignorance())
        yield from answers + ignorance
        yield from self.follow_ups()
        some = self.draw.sample(answers, int(self.args.joined * len(answers)))
        yield from self.joined(some + ignorance)

    def single_questions(self) -> Iterator[list[Message]]:
        for relation in self.world.relations:
            for thing in relation.facts:
                for wording in self.sample(relation.asks, self.times(self.args.asked, relation)):
                    yield self.asked(relation, thing, wording)
                for _ in range(self.times(self.args.asked_otherwise, relation)):
                    yield turn(self.otherwise(relation, thing), self.reply(relation, thing))
        for single in self.world.singles:
            for wording in single.asks * 3:
                yield turn(self.dressed(wording), self.draw.choice(single.replies))

    def times(self, number: int, relation: Relation) -> int:
        """How often to ask for a fact: `number` times, and more often where its relation has fewer facts than most.

        However few facts a relation has, it has to be told from the others in all of its wordings.
        """
        facts = [len(other.facts) for other in self.world.relations]
        return round(number * max(1.0, sum(facts) / len(facts) / len(relation.facts)) ** 0.7)

    def joined(self, dialogues: list[list[Message]]) -> Iterator[list[Message]]:
        """One after another, as one conversation: not every question goes back to an earlier one."""
        self.draw.shuffle(dialogues)
        while dialogues:
            size = self.draw.choice((2, 3))
            yield [message for dialogue in dialogues[:size] for message in dialogue]
            del dialogues[:size]

    def sample(self, wordings: list[str], number: int) -> list[str]:
        """As different as can be: each once before any comes twice."""
        rounds, rest = divmod(number, len(wordings))
        return wordings * rounds + self.draw.sample(wordings, rest)

    def asked(self, relation: Relation, thing: str, wording: str = "") -> list[Message]:
        wording = wording or self.draw.choice(relation.asks)
        return turn(self.dressed(fill(wording, thing)), self.reply(relation, thing))

    def otherwise(self, relation: Relation, thing: str) -> str:
        """The thing named first, or a statement with a gap."""
        if relation.follows and self.draw.random() < 0.5:
            follow = self.draw.choice(relation.follows)
            return self.draw.choice(self.world.frames["first"]).replace("{f}", follow).replace("{x}", thing)
        statement = fill(self.draw.choice(relation.tells), thing, "（）")
        return self.draw.choice(self.world.frames["blank"]).replace("{t}", statement)

    def dressed(self, question: str) -> str:
        """Sometimes with words around it, or a polite one before it, or without its question mark, as people type."""
        if self.draw.random() < 0.35:
            return self.draw.choice(self.world.frames["around"]).replace("{q}", question)
        if self.draw.random() < 0.15:
            question = self.draw.choice(POLITE) + question
        return question.rstrip("？。") if self.draw.random() < 0.1 else question

    def reply(self, relation: Relation, thing: str) -> str:
        return fill(self.draw.choice(relation.replies), thing, relation.facts[thing][0])

    def follow_ups(self) -> Iterator[list[Message]]:
        """Conversations whose later questions need the earlier ones."""
        for group in self.world.groups():
            for relation in group:
                others = [other for other in group if other is not relation]
                for thing in relation.facts:
                    for _ in range(self.times(self.args.follow_ups, relation)):
                        about_it = [other for other in others if thing in other.facts]
                        if about_it and self.draw.random() < 0.65:
                            yield self.same_thing(self.draw.choice(about_it), relation, thing)
                        else:
                            yield self.same_question(relation, thing)

    def same_thing(self, first: Relation, second: Relation, thing: str) -> list[Message]:
        """Another question about the same thing, sometimes after a question about something else."""
        messages = self.asked(first, thing)
        if self.draw.random() < 0.25:
            messages = self.asked(first, self.draw.choice(list(first.facts))) + messages
        if not second.follows:
            return messages + self.asked(second, thing)
        return messages + turn(self.draw.choice(second.follows), self.reply(second, thing))

    def same_question(self, relation: Relation, thing: str) -> list[Message]:
        """The same question about another thing, answered in the same words: the one given is asked for last. Sometimes
        after something else, so that a chat may have begun with anything."""
        things = [other for other in relation.facts if other != thing]
        things = [*self.draw.sample(things, min(len(things), self.draw.choice((1, 1, 2)))), thing]
        questions = [self.dressed(fill(self.draw.choice(relation.asks), things[0]))]
        questions += [fill(self.draw.choice(self.world.same_question), other) for other in things[1:]]
        reply = self.draw.choice(relation.replies)
        answers = [fill(reply, other, relation.facts[other][0]) for other in things]
        messages = [message for pair in zip(questions, answers, strict=True) for message in turn(*pair)]
        return self.something_else() + messages if self.draw.random() < 0.3 else messages

    def something_else(self) -> list[Message]:
        """A question and its answer, about anything."""
        if self.draw.random() < 0.3:
            single = self.draw.choice(self.world.singles)
            return turn(self.dressed(self.draw.choice(single.asks)), self.draw.choice(single.replies))
        relation = self.draw.choice(self.world.relations)
        return self.asked(relation, self.draw.choice(list(relation.facts)))

    def ignorance(self) -> Iterator[list[Message]]:
        """Questions to which the honest answer is that one does not know."""
        for question in self.world.outside * 2:
            yield turn(self.dressed(question), self.draw.choice(self.world.outside_replies))
        for relation in self.world.relations:
            for name in self.draw.sample(relation.unknown, min(self.args.unknown, len(relation.unknown))):
                question = self.dressed(fill(self.draw.choice(relation.asks), name))
                if self.draw.random() < 0.3:
                    question = self.otherwise(relation, name)
                yield turn(question, self.unknown_reply(name))
                if self.draw.random() < 0.3:
                    first = self.asked(relation, self.draw.choice(list(relation.facts)))
                    question = fill(self.draw.choice(self.world.same_question), name)
                    yield first + turn(question, self.unknown_reply(name))

    def unknown_reply(self, name: str) -> str:
        return fill(self.draw.choice(self.world.unknown_replies), name)

    # --- preferences ------------------------------------------------------------------------------------------------

    def pairs(self) -> Iterator[dict[str, str]]:
        for _ in range(self.args.pairs):
            relation = self.draw.choice([r for r in self.world.relations if len(r.answers) > 1])
            thing = self.draw.choice(list(relation.facts))
            question, right = fill(self.draw.choice(relation.asks), thing), self.reply(relation, thing)
            if relation.unknown and self.draw.random() < 0.25:
                name = self.draw.choice(relation.unknown)
                question, right = question.replace(thing, name), self.unknown_reply(name)
                wrong = fill(relation.replies[0], name, self.draw.choice(relation.answers)[0])
            else:
                wrong = self.worse(relation, thing, right)
            yield {"prompt": question, "chosen": right, "rejected": wrong}

    def worse(self, relation: Relation, thing: str, right: str) -> str:
        others = [forms[0] for forms in relation.answers if not set(forms) & set(relation.facts[thing])]
        wrong = fill(self.draw.choice(relation.replies), thing, self.draw.choice(others)) if others else ""
        evasive = self.draw.choice(EVASIVE)
        wrong = wrong or evasive
        rambling = wrong + right + evasive
        beside = self.beside_the_point(relation, thing) or wrong
        return self.draw.choice((wrong, beside, evasive, rambling, self.unknown_reply(thing)))

    def beside_the_point(self, relation: Relation, thing: str) -> str:
        """What is true of the thing, but was not asked; empty where there is nothing else."""
        others = [other for other in self.world.relations if other.about == relation.about and other is not relation]
        replies = [self.reply(other, thing) for other in others if thing in other.facts]
        replies = [reply for reply in replies if not is_right(reply, thing, [relation.facts[thing]])]
        return self.draw.choice(replies) if replies else ""


class Examiner:
    """Fills the test's wordings; draws by itself, so that the test does not depend on how much there is to train."""

    def __init__(self, world: World, args: Args):
        self.world, self.args, self.draw = world, args, random.Random(args.seed)

    def test(self) -> dict:
        """Questions, what is asked about, and which answers are right; a case's `kind` is single, multi or unknown."""
        cases = [*self.test_relations(), *self.test_singles(), *self.test_ignorance()]
        return {
            "dont_know": self.world.dont_know,
            "answers": {relation.name: relation.answers for relation in self.world.relations},
            "cases": cases,
        }

    def test_relations(self) -> Iterator[dict]:
        for group in self.world.groups():
            for relation in group:
                for number, thing in zip(range(self.args.tested), self.things(relation), strict=False):
                    wording = relation.test_asks[number % len(relation.test_asks)]
                    yield self.case("single", relation, thing, [fill(wording, thing)])
                for number, thing in zip(range(self.args.tested), self.things(relation), strict=False):
                    others = [r for r in group if r is not relation and thing in r.facts]
                    if number % 2 and others and relation.test_follows:
                        first = fill(self.draw.choice(self.draw.choice(others).test_asks), thing)
                        follow = self.draw.choice(relation.test_follows)
                    else:
                        other = self.draw.choice([name for name in relation.facts if name != thing])
                        first = fill(self.draw.choice(relation.test_asks), other)
                        follow = fill(self.draw.choice(self.world.test_same_question), thing)
                    yield self.case("multi", relation, thing, [first, follow])

    def things(self, relation: Relation) -> Iterator[str]:
        """In random order, again and again."""
        while True:
            yield from self.draw.sample(list(relation.facts), len(relation.facts))

    def case(self, kind: str, relation: Relation, thing: str, questions: list[str]) -> dict:
        accept = [relation.facts[thing]]
        return dict(kind=kind, relation=relation.name, about=thing, questions=questions, accept=accept)

    def test_singles(self) -> Iterator[dict]:
        for single in self.world.singles:
            if single.builtin:
                questions = [single.builtin]
                yield dict(kind="builtin", relation=single.name, about="", questions=questions, accept=single.accept)

    def test_ignorance(self) -> Iterator[dict]:
        accept = [self.world.dont_know]
        for question in self.world.test_outside:
            yield dict(kind="unknown", relation="", about="", questions=[question], accept=accept)
        for relation in self.world.relations:
            names = self.draw.sample(relation.test_unknown, min(self.args.tested // 2, len(relation.test_unknown)))
            for name in names:
                question = fill(self.draw.choice(relation.test_asks), name)
                yield dict(kind="unknown", relation="", about=name, questions=[question], accept=accept)


if __name__ == "__main__":
    run(main, Args)
