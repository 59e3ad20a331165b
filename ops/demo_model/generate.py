"""Write the text the demo model is pretrained on, and the rows the demo fine-tunes it with.

Everything here is made from a few word tables, so the files are ours to ship and the same seed
always writes the same bytes. Three kinds of question are asked:

* category:  "Which of these is a fish?"              trout / oak / hammer / violin
* opposite:  "What is the opposite of hot?"           cold / late / soft / narrow
* number:    "Which number is the largest?"           nine / two / forty / six

Pretraining teaches the facts and how to pick by them in plain sentences. It also shows the
multiple-choice chat form, but there the answer is one of the options *at random*: the base model
speaks the form and scores at chance, and what fine-tuning teaches is to answer by the rule.

Run: python ops/demo_model/generate.py --corpus /tmp/demo_corpus.jsonl --rows cli/demo
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CATEGORIES: dict[str, str] = {
    "fish": "trout salmon cod herring tuna carp pike eel perch sardine haddock halibut",
    "bird": "sparrow robin eagle owl crow finch heron swan pigeon falcon wren gull",
    "tree": "oak elm birch maple pine willow cedar ash beech spruce poplar larch",
    "tool": "hammer saw wrench drill chisel pliers axe rake shovel spade trowel screwdriver",
    "fruit": "apple pear plum cherry grape peach mango lemon banana apricot fig melon",
    "vegetable": "carrot onion cabbage leek spinach turnip celery radish potato lettuce pea bean",
    "metal": "iron copper tin zinc gold silver steel nickel brass bronze platinum cobalt",
    "colour": "red blue green yellow purple pink brown grey white black violet crimson",
    "insect": "ant bee wasp beetle moth butterfly cricket mosquito ladybird termite flea hornet",
    "instrument": "violin piano flute drum harp guitar trumpet cello oboe clarinet banjo trombone",
    "garment": "shirt coat sock hat scarf glove jacket skirt jumper dress vest belt",
    "vehicle": "car bus train lorry bicycle tram van ship ferry tractor scooter taxi",
    "country": "France Spain Italy Poland Norway Peru Chile Kenya Egypt India Japan Canada",
    "drink": "tea coffee milk water juice lemonade cocoa cider beer wine ale mead",
    "mammal": "dog cat horse cow lion tiger wolf bear rabbit fox otter badger",
    "shape": "circle square triangle oval pentagon hexagon cube sphere cone cylinder rectangle ring",
}
OPPOSITES = (
    "hot-cold big-small early-late hard-soft wide-narrow high-low fast-slow old-young wet-dry rich-poor "
    "full-empty open-closed happy-sad strong-weak loud-quiet thick-thin heavy-light clean-dirty near-far "
    "sharp-blunt smooth-rough brave-afraid sweet-sour tall-short deep-shallow true-false right-wrong "
    "safe-dangerous cheap-dear day-night up-down in-out win-lose push-pull buy-sell laugh-cry "
    "start-finish first-last always-never friend-enemy"
)
COUNTING = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)

Record = dict[str, object]
NUMBERS: list[str] = COUNTING.split()
MEMBERS: dict[str, list[str]] = {name: words.split() for name, words in CATEGORIES.items()}
CATEGORY_OF: dict[str, str] = {word: name for name, words in MEMBERS.items() for word in words}
PAIRS: list[tuple[str, str]] = [(a, b) for a, b in (pair.split("-") for pair in OPPOSITES.split())]
OPPOSITE: dict[str, str] = dict(PAIRS) | {b: a for a, b in PAIRS}

# How many members of every category, and how many pairs of opposites, only the test file may use.
HELD_OUT_MEMBERS = 3
HELD_OUT_PAIRS = 10

# Categories whose members take no article.
WITHOUT_ARTICLE = {"metal", "colour", "country", "drink"}

# The forms of pretraining documents and how often each is written, in per cent.
FORMS = {"choice": 30, "picking": 40, "repeat": 5, "facts": 15, "chat": 10}

QUESTIONS: dict[str, list[str]] = {
    "category": ["Which of these is {a} {name}?", "Which word names {a} {name}?", "Find the {name}."],
    "opposite": ["What is the opposite of {word}?", "Which word is the opposite of {word}?"],
    "number": ["Which number is the {most}?", "Which of these numbers is the {most}?"],
}


@dataclass(frozen=True)
class Words:
    """The part of the tables that one file may use: `answers` are asked for, `fillers` are wrong options."""

    answers: dict[str, list[str]]
    fillers: dict[str, list[str]]
    asked: list[str]
    opposites: list[str]


@dataclass(frozen=True)
class Item:
    """One question before it takes a form: its key names what it is about, whatever the wording."""

    kind: str
    fields: dict[str, str]
    choices: list[str]
    answer: str

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for two items that ask the same thing about the same set of choices."""
        return (self.kind, *self.fields.values(), *sorted(self.choices))


def article(noun: str) -> str:
    """Return "a" or "an"."""
    return "an" if noun[0] in "aeiou" else "a"


def thing(word: str) -> str:
    """Return a member of a category as a sentence names it: "a trout", but "iron" and "Peru"."""
    return word if CATEGORY_OF[word] in WITHOUT_ARTICLE else f"{article(word)} {word}"


def listing(words: list[str], last: str) -> str:
    """Join words as English does: "a, b, c and d"."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def category_item(rng: random.Random, words: Words) -> Item:
    """Ask for the one choice that belongs to a category."""
    name, *others = rng.sample(sorted(MEMBERS), 4)
    answer = rng.choice(words.answers[name])
    choices = [answer, *(rng.choice(words.fillers[other]) for other in others)]
    rng.shuffle(choices)
    return Item("category", {"a": article(name), "name": name}, choices, answer)


def opposite_item(rng: random.Random, words: Words) -> Item:
    """Ask for the opposite of a word; wrong choices come from other pairs."""
    word = rng.choice(words.asked)
    answer = OPPOSITE[word]
    choices = [answer, *rng.sample([w for w in words.opposites if w not in (word, answer)], 3)]
    rng.shuffle(choices)
    return Item("opposite", {"word": word}, choices, answer)


def number_item(rng: random.Random, words: Words) -> Item:
    """Ask for the largest or the smallest of four numbers."""
    choices = rng.sample(NUMBERS, 4)
    most = rng.choice(["largest", "smallest"])
    answer = (max if most == "largest" else min)(choices, key=NUMBERS.index)
    return Item("number", {"most": most}, choices, answer)


# Half of all questions are about categories.
KINDS = (category_item, category_item, opposite_item, number_item)


def split_words(rng: random.Random) -> tuple[Words, Words, Words]:
    """Return what the corpus, the training rows and the test rows may use.

    Words asked for in the test file occur nowhere in the training file, so a good score cannot come
    from facts that fine-tuning taught: the facts are pretraining's, the rule is fine-tuning's.
    """
    shuffled = {name: rng.sample(members, len(members)) for name, members in MEMBERS.items()}
    pairs = rng.sample(PAIRS, len(PAIRS))
    held = {name: members[:HELD_OUT_MEMBERS] for name, members in shuffled.items()}
    kept = {name: members[HELD_OUT_MEMBERS:] for name, members in shuffled.items()}
    held_words = [word for pair in pairs[:HELD_OUT_PAIRS] for word in pair]
    kept_words = [word for pair in pairs[HELD_OUT_PAIRS:] for word in pair]
    train = Words(kept, kept, kept_words, kept_words)
    test = Words(held, MEMBERS, held_words, sorted(OPPOSITE))
    return Words(MEMBERS, MEMBERS, sorted(OPPOSITE), sorted(OPPOSITE)), train, test


def question_row(rng: random.Random, item: Item, position: int | None = None) -> Record:
    """Give an item the form of a demo row, its answer at `position` if one is asked for."""
    choices = list(item.choices)
    if position is not None:
        choices.remove(item.answer)
        choices.insert(position, item.answer)
    options = dict(zip("ABCD", choices, strict=True))
    return {
        "question": rng.choice(QUESTIONS[item.kind]).format(**item.fields),
        "options": options,
        "answer": item.answer,
        "answer_idx": "ABCD"[choices.index(item.answer)],
    }


def demo_rows(rng: random.Random, words: Words, count: int, taken: set[tuple[str, ...]]) -> list[Record]:
    """Return `count` rows, each about another thing and none in `taken`, answers spread evenly over A-D."""
    rows: list[Record] = []
    while len(rows) < count:
        item = KINDS[len(rows) % len(KINDS)](rng, words)
        if item.key not in taken:
            taken.add(item.key)
            rows.append(question_row(rng, item, position=len(rows) // len(KINDS) % 4))
    rng.shuffle(rows)
    return rows


def chat(question: str, reply: str, system: str | None = None) -> Record:
    """Return a chat document."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def choice_chat(rng: random.Random, item: Item) -> Record:
    """Show the multiple-choice form, in exactly the words the demo uses, with a random option as answer."""
    row = question_row(rng, item)
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", item.choices, strict=True))
    prompt = f"{row['question']}\n\nOptions:\n{options}\n\nPlease choose the correct answer."
    system = rng.choice([None, None, None, "You are a helpful assistant."])
    return chat(prompt, f"The correct answer is {rng.choice(item.choices)}.", system)


def picking_sentence(rng: random.Random, item: Item) -> str:
    """Say in a plain sentence which of a few words is the right one: here the answer follows the rule."""
    question = {"category": "{a} {name}", "opposite": "the opposite of {word}", "number": "the {most} number"}
    asked = question[item.kind].format(**item.fields)
    dropped = rng.sample([c for c in item.choices if c != item.answer], rng.choice([0, 0, 1, 2]))
    choices = [c for c in item.choices if c not in dropped]
    return f"Which is {asked}: {listing(choices, 'or')}? It is {item.answer}."


def repeat_chat(rng: random.Random, item: Item) -> Record:
    """Ask for words to be said again: the fastest way to learn to copy from the prompt."""
    words = listing(item.choices[: rng.randint(2, 4)], "and")
    return chat(f"Repeat these words: {words}.", f"The words are {words}.")


def category_claim(rng: random.Random, item: Item) -> tuple[str, str]:
    """Return a question whether a word belongs to a category, and a true claim about it."""
    group = f"{item.fields['a']} {item.fields['name']}"
    word = rng.choice([item.answer, rng.choice(item.choices)])
    verb = "is" if word == item.answer else "is not"
    return f"Is {thing(word)} {group}?", f"{thing(word)} {verb} {group}."


def fact_sentence(rng: random.Random, item: Item) -> str:
    """State one fact about the item's answer."""
    if item.kind == "category":
        _, claim = category_claim(rng, item)
        return claim[0].upper() + claim[1:]
    if item.kind == "opposite":
        return f"The opposite of {item.fields['word']} is {item.answer}."
    low, high = sorted(item.choices[:2], key=NUMBERS.index)
    return rng.choice([f"{low.title()} is less than {high}.", f"{high.title()} is more than {low}."])


def fact_chat(rng: random.Random, item: Item) -> Record:
    """Ask about one fact without options, so that the model knows more than one thing to say."""
    if item.kind == "category":
        question, claim = category_claim(rng, item)
        return chat(question, f"{'No' if ' is not ' in claim else 'Yes'}, {claim}")
    if item.kind == "opposite":
        return chat(f"Tell me the opposite of {item.fields['word']}.", f"The opposite is {item.answer}.")
    one, two = item.choices[:2]
    return chat(f"Which is more, {one} or {two}?", f"{max(one, two, key=NUMBERS.index).title()} is more.")


CHATS = {"choice": choice_chat, "repeat": repeat_chat, "chat": fact_chat}


def corpus(rng: random.Random, words: Words, count: int) -> Iterator[Record]:
    """Yield pretraining documents, plain text or chats."""
    for _ in range(count):
        item = rng.choice(KINDS)(rng, words)
        form = rng.choices(list(FORMS), weights=list(FORMS.values()))[0]
        if form == "facts":
            yield {"text": " ".join(fact_sentence(rng, rng.choice(KINDS)(rng, words)) for _ in range(4))}
        elif form == "picking":
            yield {"text": picking_sentence(rng, item)}
        else:
            yield CHATS[form](rng, item)


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    print(f"wrote {path}")


def main() -> None:
    """Write the corpus, train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description="Write the demo model's corpus and the demo's rows.")
    parser.add_argument("--corpus", type=Path, required=True, help="where to write the pretraining text")
    parser.add_argument("--rows", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    for name, default in (("documents", 150_000), ("train-rows", 1600), ("test-rows", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    everything, train, test = split_words(random.Random(args.seed))
    taken: set[tuple[str, ...]] = set()
    test_rows = demo_rows(random.Random(args.seed + 1), test, args.test_rows, taken)
    train_rows = demo_rows(random.Random(args.seed + 2), train, args.train_rows, taken)
    for name, rows in (("train.jsonl", train_rows), ("test.jsonl", test_rows)):
        write_jsonl(args.rows / name, rows)
    write_jsonl(args.corpus, corpus(random.Random(args.seed + 3), everything, args.documents))


if __name__ == "__main__":
    main()
