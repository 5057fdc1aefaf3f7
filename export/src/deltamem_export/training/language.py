"""The generated English of the embedded default: people tell an assistant facts about themselves, change their minds, talk, and ask.

Everything the tiny assistant is trained and evaluated on is drawn here from a seeded generator: relations with their values and
phrasings, the held-out part that training never sees, small talk, other people's facts, and ordinary English from Python's own
documentation. It knows nothing about tokens, tensors or models.
"""

from __future__ import annotations

import random
import re
import string
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from deltamem_export.training.words import POOLS, TALK, WORDS

ACKNOWLEDGEMENT = "Got it. "
UNKNOWN = "... I don't know yet."
LISTENING = "I see."

TELL_OPENINGS = (
    "By the way, ",
    "Hey, ",
    "Just so you know, ",
    "You know what? ",
    "Hi! ",
    "Listen: ",
    "Fun fact: ",
    "Let me tell you something. ",
)
CHANGE_OPENINGS = (
    "Actually, ",
    "Correction: ",
    "Sorry, I was wrong. ",
    "I have news. ",
    "Things have changed: ",
    "No, wait: ",
)
ASK_OPENINGS = (
    "Tell me, ",
    "Quick question: ",
    "Remind me: ",
    "Hey, ",
    "Just checking: ",
    "By the way, ",
    "One more thing: ",
    "Hmm. ",
)


@dataclass(frozen=True)
class Relation:
    """One thing a person can tell about themselves: its values, its phrasings and the start of the canonical answer.

    `tell` and `ask` hold every phrasing; the ones at `held_out_tell` and `held_out_ask` are kept out of all training.
    """

    name: str
    prefix: str
    values: tuple[str, ...]
    tell: tuple[str, ...]
    ask: tuple[str, ...]

    @cached_property
    def held_out_tell(self) -> int:
        return _hash(f"tell|{self.name}") % len(self.tell)

    @cached_property
    def held_out_ask(self) -> int:
        return _hash(f"ask|{self.name}") % len(self.ask)

    @cached_property
    def trained_tell(self) -> tuple[str, ...]:
        return tuple(t for i, t in enumerate(self.tell) if i != self.held_out_tell)

    @cached_property
    def trained_ask(self) -> tuple[str, ...]:
        return tuple(t for i, t in enumerate(self.ask) if i != self.held_out_ask)

    @cached_property
    def trained_values(self) -> tuple[str, ...]:
        return tuple(v for v in self.values if not is_held_out(self.name, v))

    @cached_property
    def held_out_values(self) -> tuple[str, ...]:
        return tuple(v for v in self.values if is_held_out(self.name, v))

    def answer(self, value: str) -> str:
        """The reply to a question about a told fact: the relation restated, then the value."""
        return f"{self.prefix} {value}."

    def acknowledgement(self, value: str) -> str:
        """The reply to a told fact: the canonical answer after an opening."""
        return f"{ACKNOWLEDGEMENT}{self.prefix} {value}."

    @cached_property
    def unknown(self) -> str:
        """The reply to a question about a fact never told; it shares the canonical start, so that one place decides."""
        return f"{self.prefix}{UNKNOWN}"


@dataclass(frozen=True)
class Turn:
    """One user message and the assistant's reply. `kind` is tell, change, ask, unknown, talk or text.

    `relation` and `value` are set for tell, change and ask; a turn of kind text has an empty reply and may be fed as it is.
    """

    kind: str
    user: str
    reply: str
    relation: str = ""
    value: str = ""


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def is_held_out(relation: str, value: str) -> bool:
    """Whether this pair of relation and value is kept out of all training (one in ten, by a fixed hash)."""
    return _hash(f"{relation}|{value}") % 10 == 0


@cache
def _odd_values(relation: str) -> tuple[str, ...]:
    """Values of every pool that do not go with the relation, and are not kept out of training for it."""
    own = BY_NAME[relation].values
    every = sorted({value for pool in POOLS.values() for value in pool})
    return tuple(v for v in every if v not in own and not is_held_out(relation, v))


def _article(noun: str) -> str:
    return "an" if noun[:1] in "aeiou" else "a"


def _named(thing: str, pool: str) -> Relation:
    return Relation(
        name=f"{thing} name",
        prefix=f"Your {thing} is called",
        values=POOLS[pool],
        tell=(
            f"My {thing} is called {{value}}.",
            f"My {thing}'s name is {{value}}.",
            f"I have {_article(thing)} {thing} named {{value}}.",
            f"The name of my {thing} is {{value}}.",
            f"Everyone calls my {thing} {{value}}.",
        ),
        ask=(
            f"What is my {thing} called?",
            f"What is my {thing}'s name?",
            f"What is the name of my {thing}?",
            f"Do you remember my {thing}'s name?",
            f"How is my {thing} called?",
        ),
    )


def _coloured(thing: str) -> Relation:
    return Relation(
        name=f"{thing} colour",
        prefix=f"Your {thing} is",
        values=POOLS["colour"],
        tell=(
            f"My {thing} is {{value}}.",
            f"The colour of my {thing} is {{value}}.",
            f"My {thing} comes in {{value}}.",
            f"I painted my {thing} {{value}}.",
            f"My {thing} has a {{value}} colour.",
        ),
        ask=(
            f"What colour is my {thing}?",
            f"What is the colour of my {thing}?",
            f"Which colour does my {thing} have?",
            f"Do you remember the colour of my {thing}?",
        ),
    )


def _favourite(thing: str, pool: str) -> Relation:
    return Relation(
        name=f"favourite {thing}",
        prefix=f"Your favourite {thing} is",
        values=POOLS[pool],
        tell=(
            f"My favourite {thing} is {{value}}.",
            f"Nothing beats {{value}} as a {thing}.",
            f"The {thing} I like most is {{value}}.",
            f"If I had to pick a {thing}, it would be {{value}}.",
            f"For me the best {thing} is {{value}}.",
        ),
        ask=(
            f"What is my favourite {thing}?",
            f"Which {thing} do I like most?",
            f"Do you remember my favourite {thing}?",
            f"What {thing} do I like best?",
        ),
    )


def _job(who: str) -> Relation:
    return Relation(
        name=f"{who} job",
        prefix=f"Your {who} works as a",
        values=POOLS["job"],
        tell=(
            f"My {who} works as a {{value}}.",
            f"My {who} is a {{value}}.",
            f"The job of my {who} is {{value}}.",
            f"My {who} earns money as a {{value}}.",
        ),
        ask=(
            f"What does my {who} work as?",
            f"What is my {who}'s job?",
            f"Which job does my {who} have?",
            f"What does my {who} do for a living?",
        ),
    )


def _plays(who: str) -> Relation:
    return Relation(
        name=f"{who} instrument",
        prefix=f"Your {who} plays the",
        values=POOLS["instrument"],
        tell=(
            f"My {who} plays the {{value}}.",
            f"The instrument of my {who} is the {{value}}.",
            f"My {who} is learning to play the {{value}}.",
            f"My {who} loves to play the {{value}}.",
        ),
        ask=(
            f"What instrument does my {who} play?",
            f"Which instrument does my {who} play?",
            f"What does my {who} play?",
            f"Do you remember the instrument of my {who}?",
        ),
    )


def _where(name: str, prefix: str, tell: Sequence[str], ask: Sequence[str]) -> Relation:
    return Relation(name, prefix, POOLS["place"], tuple(tell), tuple(ask))


def _relations() -> tuple[Relation, ...]:
    people = (
        "sister",
        "brother",
        "cousin",
        "aunt",
        "uncle",
        "best friend",
        "boss",
        "neighbour",
        "teacher",
        "doctor",
        "roommate",
        "dentist",
    )
    pets = ("dog", "cat", "parrot", "hamster", "horse", "rabbit", "goldfish", "tortoise")
    things = ("car", "bike", "front door", "kitchen", "sofa", "coat", "umbrella", "kettle", "boat", "hat")
    favourites = {
        "fruit": "fruit",
        "drink": "drink",
        "animal": "animal",
        "flower": "flower",
        "sport": "sport",
        "dish": "dish",
        "music": "music",
        "subject": "subject",
    }
    workers = ("father", "mother", "wife", "grandfather", "landlord")
    players = ("son", "daughter", "husband", "nephew")
    single = (
        _where("home", "You live in", ("I live in {value}.", "My home is in {value}.", "I have a flat in {value}.", "I moved to {value}.", "The place where I live is {value}."),
               ("Where do I live?", "Which place do I live in?", "Where is my home?", "Do you remember where I live?")),
        _where("birthplace", "You were born in", ("I was born in {value}.", "My birthplace is {value}.", "I came to the world in {value}.", "The place where I was born is {value}."),
               ("Where was I born?", "What is my birthplace?", "In which place was I born?", "Do you remember where I was born?")),
        _where("office", "You work in", ("I work in {value}.", "My office is in {value}.", "The office where I work is in {value}.", "The place where I work is {value}."),
               ("Where do I work?", "Where is my office?", "In which place do I work?", "Do you remember where I work?")),
        _where("holiday", "Your next holiday is in", ("My next holiday is in {value}.", "I will spend my next holiday in {value}.", "For my holiday I booked a trip to {value}.", "My holiday will be in {value}."),
               ("Where is my next holiday?", "Where will I spend my next holiday?", "Where do I go for my holiday?", "Do you remember where my holiday is?")),
        _where("studies", "You studied in", ("I studied in {value}.", "My university was in {value}.", "I got my degree in {value}.", "The place where I studied is {value}."),
               ("Where did I study?", "Where was my university?", "Where did I get my degree?", "Do you remember where I studied?")),
        _where("parents", "Your parents live in", ("My parents live in {value}.", "My parents have a house in {value}.", "The home of my parents is in {value}.", "The place where my parents live is {value}."),
               ("Where do my parents live?", "Where is the house of my parents?", "In which place do my parents live?", "Do you remember where my parents live?")),
        _where("wedding", "You got married in", ("I got married in {value}.", "My wedding was in {value}.", "We had our wedding in {value}.", "The place where I got married is {value}."),
               ("Where did I get married?", "Where was my wedding?", "In which place was my wedding?", "Do you remember where I got married?")),
        Relation("own job", "You work as a", POOLS["job"], ("I work as a {value}.", "I am a {value}.", "My job is {value}.", "I earn my money as a {value}.", "By profession I am a {value}."),
                 ("What is my job?", "What do I work as?", "Which job do I have?", "What do I do for a living?")),
        Relation("own instrument", "You play the", POOLS["instrument"], ("I play the {value}.", "My instrument is the {value}.", "I am learning to play the {value}.", "I love to play the {value}."),
                 ("What instrument do I play?", "Which instrument do I play?", "What is my instrument?", "Do you remember my instrument?")),
        Relation("learnt language", "You are learning", POOLS["language"], ("I am learning {value}.", "I started to learn {value}.", "I take lessons in {value}.", "The language I am learning is {value}."),
                 ("Which language am I learning?", "What language do I learn?", "What am I learning?", "Do you remember the language I am learning?")),
        Relation("grandmother language", "Your grandmother speaks", POOLS["language"], ("My grandmother speaks {value}.", "My grandmother talks to me in {value}.", "The language of my grandmother is {value}.", "With my grandmother I speak {value}."),
                 ("Which language does my grandmother speak?", "What language does my grandmother speak?", "What is the language of my grandmother?", "How does my grandmother talk to me?")),
        Relation("hobby", "Your hobby is", POOLS["hobby"], ("My hobby is {value}.", "In my free time I enjoy {value}.", "I spend my evenings with {value}.", "My evenings belong to {value}."),
                 ("What is my hobby?", "What do I enjoy in my free time?", "Which hobby do I have?", "How do I spend my evenings?")),
        Relation("colleague hobby", "Your colleague is into", POOLS["hobby"], ("My colleague is into {value}.", "The hobby of my colleague is {value}.", "My colleague spends weekends with {value}.", "My colleague enjoys {value}."),
                 ("What is my colleague into?", "What is the hobby of my colleague?", "Which hobby does my colleague have?", "How does my colleague spend weekends?")),
        Relation("breakfast", "For breakfast you eat", POOLS["dish"], ("For breakfast I eat {value}.", "My breakfast is always {value}.", "I have {value} for breakfast.", "Every morning I eat {value}."),
                 ("What do I eat for breakfast?", "What is my breakfast?", "What do I have for breakfast?", "What do I eat every morning?")),
        Relation("balcony", "Your balcony smells of", POOLS["flower"], ("My balcony smells of {value}.", "On my balcony grows {value}.", "I keep {value} on my balcony.", "My balcony is full of {value}."),
                 ("What does my balcony smell of?", "What grows on my balcony?", "What do I keep on my balcony?", "Which plant is on my balcony?")),
        Relation("team", "Your team plays", POOLS["sport"], ("My team plays {value}.", "I am in a team for {value}.", "On Sundays my team meets for {value}.", "With my team I play {value}."),
                 ("What does my team play?", "What do I play with my team?", "Which sport does my team play?", "What is my team for?")),
        Relation("allergy", "You are allergic to", POOLS["fruit"], ("I am allergic to {value}.", "I have an allergy to {value}.", "I get ill when I eat {value}.", "My allergy is {value}."),
                 ("What am I allergic to?", "Which allergy do I have?", "What is my allergy?", "What makes me ill?")),
    )  # fmt: skip
    return (
        *(_named(p, "person") for p in people),
        *(_named(p, "pet") for p in pets),
        *(_coloured(t) for t in things),
        *(_favourite(t, pool) for t, pool in favourites.items()),
        *(_job(w) for w in workers),
        *(_plays(p) for p in players),
        *single,
    )


RELATIONS: tuple[Relation, ...] = _relations()
BY_NAME: dict[str, Relation] = {r.name: r for r in RELATIONS}
RELATION_INDEX: dict[str, int] = {r.name: i for i, r in enumerate(RELATIONS)}


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _after_opening(opening: str, sentence: str) -> str:
    """A sentence set behind an opening: its first letter falls to lower case where the opening runs on."""
    if opening.rstrip().endswith((".", "!", "?")):
        return opening + sentence
    return opening + (sentence if sentence.startswith(("I ", "{")) else sentence[:1].lower() + sentence[1:])


@dataclass
class Speaker:
    """Draws turns from one seeded generator. `evaluation=True` also draws the held-out pairs and, on request, held-out phrasings."""

    rng: random.Random
    evaluation: bool = False
    text: Sequence[str] = field(default_factory=tuple)
    odd: float = 0.0
    """Share of values from other relations' pools: who has to copy them learns to copy, and not which values go with a relation."""

    def draw_facts(self, count: int, pairs: str = "trained") -> list[tuple[Relation, str]]:
        """`count` relations (without repetition) with a value each; pairs: trained, held-out or any (the last two only in evaluation)."""
        chosen = self.rng.sample(RELATIONS, count)
        return [(r, self.draw_value(r, pairs)) for r in chosen]

    def draw_value(self, relation: Relation, pairs: str = "trained", unlike: str = "") -> str:
        if pairs != "trained" and not self.evaluation:
            raise ValueError(f"pairs={pairs!r} is for evaluation only; training draws pairs='trained'")
        if self.odd and self.rng.random() < self.odd:
            return self.rng.choice(_odd_values(relation.name))
        values = {
            "trained": relation.trained_values,
            "held-out": relation.held_out_values or relation.values,
            "any": relation.values,
        }[pairs]
        values = tuple(v for v in values if v != unlike) or tuple(v for v in relation.values if v != unlike)
        return self.rng.choice(values)

    def tell(self, relation: Relation, value: str, change: bool = False, phrasing: str = "trained") -> Turn:
        template = self._template(relation.trained_tell, relation.tell[relation.held_out_tell], phrasing)
        opening = ""
        if change:
            opening = self.rng.choice(CHANGE_OPENINGS)
        elif self.rng.random() < 0.3:
            opening = self.rng.choice(TELL_OPENINGS)
        if opening:
            template = _after_opening(opening, template)
        text = _capitalised(template.format(value=value))
        if self.rng.random() < 0.1:
            text = text.rstrip(".") + "!"
        return Turn("change" if change else "tell", text, relation.acknowledgement(value), relation.name, value)

    def ask(self, relation: Relation, value: str | None, phrasing: str = "trained") -> Turn:
        """A question; `value=None` means that the fact was never told."""
        template = self._template(relation.trained_ask, relation.ask[relation.held_out_ask], phrasing)
        opening = self.rng.choice(ASK_OPENINGS) if self.rng.random() < 0.3 else ""
        text = _after_opening(opening, template) if opening else template
        if value is None:
            return Turn("unknown", text, relation.unknown, relation.name)
        return Turn("ask", text, relation.answer(value), relation.name, value)

    def _template(self, trained: Sequence[str], held_out: str, phrasing: str) -> str:
        if phrasing == "held-out":
            if not self.evaluation:
                raise ValueError("held-out phrasings are for evaluation only")
            return held_out
        return self.rng.choice(trained)

    # talk ------------------------------------------------------------------------------------------------------------------

    def talk(self) -> Turn:
        """A turn that tells nothing to remember: small talk, a distractor, other people's facts, English prose or gibberish."""
        roll = self.rng.random()
        if roll < 0.07:
            return Turn("talk", self.rng.choice(TALK["greeting"]), "Hello! How can I help?")
        if roll < 0.12:
            return Turn("talk", self.rng.choice(TALK["thanks"]), "You are welcome.")
        if roll < 0.15:
            return Turn("talk", self.rng.choice(TALK["goodbye"]), "Goodbye!")
        if roll < 0.25:
            return Turn("talk", self.fill(self.rng.choice(TALK["question"])), "That is hard to say.")
        if roll < 0.40:
            return Turn("talk", self.others_fact(), LISTENING)
        if roll < 0.52:
            return Turn("talk", self.near_fact(), LISTENING)
        if roll < 0.80:
            return Turn("talk", self.statements(self.rng.randint(1, 3)), LISTENING)
        return self.long_talk()

    def long_talk(self, words: int = 110) -> Turn:
        """A long message of up to about `words` words: chatter, prose, or noise."""
        roll = self.rng.random()
        if roll < 0.40:
            text = self.statements(self.rng.randint(3, 9))
        elif roll < 0.80 and self.text:
            text = self.rng.choice(self.text)
        elif roll < 0.93:
            text = self.word_salad(self.rng.randint(4, 40))
        else:
            text = self.gibberish(self.rng.randint(8, 80))
        pieces = text.split(" ")
        if len(pieces) > words:
            start = self.rng.randrange(len(pieces) - words + 1)
            text = " ".join(pieces[start : start + words])
        return Turn("talk", text, LISTENING)

    def statements(self, count: int) -> str:
        """`count` sentences of chatter, some of them near facts or other people's."""
        sentences = []
        for _ in range(count):
            roll = self.rng.random()
            if roll < 0.12:
                sentences.append(self.near_fact())
            elif roll < 0.2:
                sentences.append(self.others_fact())
            else:
                sentences.append(_capitalised(self.fill(self.rng.choice(TALK["statement"]))))
        return ("\n" if self.rng.random() < 0.2 else " ").join(sentences)

    def others_fact(self) -> str:
        """Somebody else's fact, in the phrasings of the user's own: nothing to remember about the user."""
        relation = self.rng.choice(RELATIONS)
        value = self.rng.choice(relation.values)
        owner = self.rng.choice(WORDS["owner"])
        prefix = relation.prefix
        if prefix.startswith("Your "):
            text = f"{owner}'s {prefix[5:]} {value}."
        elif prefix.startswith("You are "):
            text = f"{owner} is {prefix[8:]} {value}."
        elif prefix.startswith("You were "):
            text = f"{owner} was {prefix[9:]} {value}."
        else:
            text = f"{owner} said: {relation.answer(value)}"
        return _capitalised(
            self.rng.choice(("", "", "I heard that ", "It seems that ", "Did you know? ", "On the radio they said: "))
            + text
        )

    def near_fact(self) -> str:
        """A sentence that mentions a thing one could tell about, or a value, and tells nothing."""
        relation = self.rng.choice(RELATIONS)
        value = self.rng.choice(relation.values)
        thing = (
            relation.name.split(" ")[0] if relation.name.endswith(("name", "colour")) else self.rng.choice(WORDS["kin"])
        )
        return _capitalised(
            self.fill(self.rng.choice(TALK["near"]).replace("{thing}", thing).replace("{value}", value))
        )

    def word_salad(self, count: int) -> str:
        words = [w for pool in (WORDS["noun"], WORDS["adjective"], WORDS["verb"], WORDS["place"]) for w in pool]
        return " ".join(self.rng.choice(words) for _ in range(count))

    def gibberish(self, length: int) -> str:
        alphabet = self.rng.choice(
            (
                string.ascii_lowercase + "  ",
                string.printable.strip(),
                string.digits + ".,- ",
                "äöüßéèñçøåαβγдежз中文日本 😀🎉",
            )
        )
        return "".join(self.rng.choice(alphabet) for _ in range(length)).strip() or "x"

    def fill(self, template: str) -> str:
        """A template with its slots drawn from the word lists."""
        filled = re.sub(r"\{(\w+)\}", lambda m: self.rng.choice(WORDS[m.group(1)]), template)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", filled)


def mentions(text: str, value: str) -> bool:
    """Whether `value` stands in `text` as a whole word or words, in any case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, flags=re.IGNORECASE) is not None


def is_correct(relation: Relation, value: str, reply: str) -> bool:
    """Exact grading: the value stands in the reply, no other value of the relation does, and it does not also say that it does not know."""
    return (
        mentions(reply, value)
        and not says_unknown(reply)
        and not any(mentions(reply, other) for other in relation.values if other != value)
    )


def says_unknown(reply: str) -> bool:
    return "don't know" in reply


def all_phrasings() -> Iterable[str]:
    """Every sentence frame of the language, with each value once: what a tokenizer should cover."""
    for relation in RELATIONS:
        for i, value in enumerate(relation.values):
            yield relation.tell[i % len(relation.tell)].format(value=value)
            yield relation.answer(value)
        yield from relation.ask
        yield relation.unknown
