"""Records of invented things and the sentences that say what they hold: the text that teaches a model to copy.

A record is a name and a few slots. A document shows several records of one domain, all written down in one way and put
into words in one manner, so that the way and the manner can be read from the text before. `table_rows` is the task of
the bundled table-to-text prefix: one way of writing records down and one order of telling them, every domain.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.bundled.invented import LISTS, TABLES, Names

NO = "no"


@dataclass(frozen=True)
class Slot:
    """One thing a record may say. Phrases hold `{}` where the value goes.

    `beside` follows the noun (`"near {}"`), `says` follows the subject (`"is near {}"`), `ahead` opens a sentence.
    A slot with `denied` phrases holds yes or no, and no phrase of it holds a value.
    """

    keys: tuple[str, ...]
    value: str | tuple[str, ...]
    beside: tuple[str, ...]
    says: tuple[str, ...]
    ahead: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A sort of thing: a noun for one whose kind is not told, patterns of names, nouns for its kinds, its slots."""

    thing: str
    names: str | tuple[str, ...]
    name_keys: tuple[str, ...]
    kinds: tuple[str, ...]
    slots: tuple[Slot, ...]
    pronouns: tuple[str, ...] = ("It",)


@dataclass(frozen=True)
class Record:
    """A drawn thing. `slots` pairs each chosen slot with its value; `kind` is None when the record does not tell it."""

    domain: Domain
    name: str
    kind: str | None
    slots: tuple[tuple[Slot, str], ...]

    def values(self) -> list[str]:
        """What must appear in a text about it: the name, the kind, every value that is not yes or no."""
        told = [value for slot, value in self.slots if not slot.denied]
        return [self.name, *([self.kind] if self.kind else []), *told]


Keys = dict[Slot | str, str]  # the name that each slot goes by in one document; also of "name" and "kind"


@dataclass(frozen=True)
class Notation:
    """A way of writing records down: `name : Marwick | kind : inn`, `name: Marwick, kind: inn`, `name[Marwick]; …`."""

    opening: str
    closing: str
    between: str
    case: str

    def write(self, record: Record, keys: Keys) -> str:
        """One record."""
        pairs = [(keys["name"], record.name)]
        pairs += [(keys["kind"], record.kind)] if record.kind else []
        pairs += [(keys[slot], value) for slot, value in record.slots]
        cells = (f"{getattr(key, self.case)()}{self.opening}{value}{self.closing}" for key, value in pairs)
        return self.between.join(cells)


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def _domain(table: dict[str, Any]) -> Domain:
    slots = tuple(Slot(**_frozen(slot)) for slot in table["slots"])
    kinds = tuple(LISTS["trade"]) if table["kinds"] == "{trade}" else tuple(table["kinds"])
    return Domain(**{**_frozen(table), "kinds": kinds, "slots": slots})


DOMAINS = tuple(_domain(table) for table in TABLES["domains"])
FACTS: list[dict[str, str]] = TABLES["facts"]
PLAIN = Notation(": ", "", " | ", "lower")
NOTATIONS = (
    Notation(" : ", "", " | ", "lower"),
    Notation(" : ", "", " | ", "capitalize"),
    PLAIN,
    Notation(": ", "", ", ", "lower"),
    Notation(": ", "", "\n", "capitalize"),
    Notation(" = ", "", "; ", "lower"),
    Notation("[", "]", ", ", "lower"),
    Notation(" - ", "", " / ", "upper"),
)
# What stands between a record and its text, and between two such pairs.
SEPARATORS = (("\n", "\n\n"), ("\n", "\n"), (" -> ", "\n"), (" => ", "\n\n"), ("\nText: ", "\n\n"))
KIND_KEYS = ("kind", "type", "sort", "is a")
# A list's first telling, what joins its items, and every later telling.
RETOLD = (
    ("{}", ", ", "{}"),
    ("List: {}.", ", ", "Again: {}."),
    ("{}", "\n", "{}"),
    ("The names were {}.", ", ", "Yes, the names were {}."),
    ("First came {}.", ", then ", "I say that first came {}."),
    ("She took {}.", " and ", "He too took {}."),
    ("{}", " ", "{}"),
)
LISTED = ("{word}", "{person}", "{sign}", "{town}", "{way}", "{goods}")
# A clause with a verb of its own goes last: what followed it would belong to it.
CLAUSES = ("that", "who", "where", "whose", "and")


def documents(seed: int, count: int, *, held_out: bool = False) -> Iterator[str]:
    """So many documents of all sorts; the same seed gives the same ones."""
    names = Names(random.Random(f"records/{seed}"), held_out)
    for _ in range(count):
        chance = names.draws.random()
        yield next(make for share, make in SHARES if chance < share)(names)


def table_rows(seed: int, count: int, *, held_out: bool = False) -> Iterator[tuple[str, str, list[str]]]:
    """The table-to-text task: a record in the plain notation, a text about it, and the values that it must hold."""
    names = Names(random.Random(f"tables/{seed}"), held_out)
    for _ in range(count):
        domain = names.one(DOMAINS)
        record = draw_record(names, domain, 5)
        keys: Keys = {slot: slot.keys[0] for slot in domain.slots}
        keys |= {"name": domain.name_keys[0], "kind": KIND_KEYS[0]}
        yield PLAIN.write(record, keys), tell_in_order(names, record), record.values()


def table_document(names: Names) -> str:
    """Two to five records of one domain, each with its text, or now and then each after its text."""
    domain, notation = names.one(DOMAINS), names.one(NOTATIONS)
    keys, (inside, outside) = draw_keys(names, domain), names.one(SEPARATORS)
    most = 2 + int(names.draws.random() * 6)
    backwards = names.draws.random() < 0.15
    pairs = []
    for _ in range(2 + int(names.draws.random() * 4)):
        record = draw_record(names, domain, most)
        pair = (notation.write(record, keys), describe(names, record))
        pairs.append(inside.join(reversed(pair) if backwards else pair))
    return outside.join(pairs)


def dialogue_document(names: Names) -> str:
    """What several people did, then two speakers who ask each other about it."""
    kinds = names.draws.sample(FACTS, 1 + int(names.draws.random() * 3))
    people = names.some("{person}", 3 + int(names.draws.random() * 4))
    facts = []
    for person in people:
        fact = names.one(kinds)
        value = names.fill(fact["value"])
        facts.append([fact[part].format(person, value) for part in ("told", "asked", "answered")])
    asking, answering = names.some("{person}", 2)
    asked = names.draws.sample(facts, 1 + int(names.draws.random() * len(facts)))
    quoted = names.draws.random() < 0.5
    lines = [" ".join(told for told, _, _ in facts)]
    for _, question, answer in asked:
        if quoted:
            lines += [f'"{question}" asked {asking}.', f'"{answer[:-1]}," said {answering}.']
        else:
            lines += [f"{asking}: {question}", f"{answering}: {answer}"]
    return "\n".join(lines)


def list_document(names: Names) -> str:
    """A list of names or words, told two or three times in the same order."""
    items = names.some(names.one(LISTED), 3 + int(names.draws.random() * 9))
    first, joint, again = names.one(RETOLD)
    told, retold = first.format(joint.join(items)), again.format(joint.join(items))
    return "\n".join([told, retold] + [retold] * (names.draws.random() < 0.3))


SHARES = ((0.6, table_document), (0.8, dialogue_document), (1.0, list_document))


def draw_record(names: Names, domain: Domain, most: int) -> Record:
    """A thing with one to `most` slots, in any order."""
    count = 1 + int(names.draws.random() * min(most, len(domain.slots)))
    slots = names.draws.sample(domain.slots, count)
    kind = names.one(domain.kinds) if names.draws.random() < 0.85 else None
    return Record(domain, names.fill(domain.names), kind, tuple((slot, names.fill(slot.value)) for slot in slots))


def draw_keys(names: Names, domain: Domain) -> Keys:
    """The name that every slot goes by in one document."""
    keys: Keys = {slot: names.one(slot.keys) for slot in domain.slots}
    return keys | {"name": names.one(domain.name_keys), "kind": names.one(KIND_KEYS)}


def describe(names: Names, record: Record) -> str:
    """One to a few sentences that say all of a record and nothing else."""
    rest = list(record.slots)
    names.draws.shuffle(rest)
    opening = _take_opening(names, rest)
    beside = _take_beside(names, rest)
    text = _first_sentence(names, record, beside, opening, rest)
    subject = names.one(record.domain.pronouns)
    while rest:
        clause = says(names, *rest.pop())
        if rest and names.draws.random() < 0.5:
            clause += f" and {says(names, *rest.pop())}"
        text += f" {subject if names.draws.random() < 0.8 else record.name} {clause}."
    return text


def tell_in_order(names: Names, record: Record) -> str:
    """All of a record and nothing else, slot after slot as it has them: no order is to be chosen."""
    rest = list(record.slots)
    text = f"{record.name} is {with_article(record.kind or record.domain.thing)}"
    while rest and rest[0][0].beside and rest[0][1] != NO:
        slot, value = rest.pop(0)
        phrase = names.one(slot.beside).format(value)
        text += f" {phrase}"
        if phrase.split()[0] in CLAUSES:
            break
    subject = names.one(record.domain.pronouns)
    return "".join([f"{text}.", *(f" {subject} {says(names, *pair)}." for pair in rest)])


def says(names: Names, slot: Slot, value: str) -> str:
    """A predicate: `is near The Mill`, `has no garden`."""
    return names.one(slot.denied if value == NO else slot.says).format(value)


def with_article(noun: str) -> str:
    """`an inn`, `a pub`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _take_opening(names: Names, rest: list[tuple[Slot, str]]) -> str:
    """What the text opens with, a slot of `rest` that then leaves it; now and then, else nothing."""
    ahead = [pair for pair in rest if pair[0].ahead]
    if not ahead or names.draws.random() >= 0.25:
        return ""
    rest.remove(ahead[0])
    slot, value = ahead[0]
    return names.one(slot.ahead).format(value)


def _take_beside(names: Names, rest: list[tuple[Slot, str]]) -> str:
    """What follows the noun: up to three slots of `rest` that then leave it."""
    room = 1 + int(names.draws.random() * 3)
    phrases: list[str] = []
    for slot, value in list(rest):
        if slot.beside and value != NO and len(phrases) < room:
            phrases.append(names.one(slot.beside).format(value))
            rest.remove((slot, value))
    phrases.sort(key=lambda phrase: phrase.split()[0] in CLAUSES)
    return "".join(f" {phrase}" for phrase in phrases)


def _first_sentence(names: Names, record: Record, beside: str, opening: str, rest: list[tuple[Slot, str]]) -> str:
    """Names the thing; may take one more slot from `rest`."""
    name, bare = record.name, record.kind or record.domain.thing
    noun = with_article(bare)
    if opening:
        return names.one((f"{opening}, {name} is {noun}{beside}.", f"{opening} there is {noun}{beside} called {name}."))
    chance = names.draws.random()
    if rest and chance < 0.4:
        clause = says(names, *rest.pop())
        return names.one(
            (
                f"{name} is {noun}{beside} and {clause}.",
                f"{name}, {noun}{beside}, {clause}.",
                f"{noun[0].upper()}{noun[1:]}{beside}, {name} {clause}." if beside else f"The {bare} {name} {clause}.",
            )
        )
    if chance < 0.75:
        return f"{name} is {noun}{beside}."
    return names.one((f"There is {noun}{beside} called {name}.", f"There is {noun} called {name}{beside}."))
