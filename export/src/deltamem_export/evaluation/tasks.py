"""The tasks over generated facts: who can recall how many, after how much talk, after changes, over two steps, after a merge, and with
which controls. Each fills a sheet; docs/evaluation.md says what each figure means.
"""

from __future__ import annotations

import warnings

import deltamem_rt as dm
from deltamem_export.evaluation.contest import Person
from deltamem_export.evaluation.figures import Figure
from deltamem_export.evaluation.languages import Fact
from deltamem_export.evaluation.sheet import Sheet
from deltamem_export.evaluation.work import Work, about
from deltamem_export.training.language import Relation

STRANGERS = 2
"""Questions an episode about what was never told, where a task has few."""
HELD = 8
"""Facts where a task does not vary their number."""


def controls(work: Work) -> Sheet:
    """Is it the memory that answers? The same questions to a stranger's memory, to none, and for another user's facts."""
    sheet, language, contest = Sheet(work.seed), work.language, work.contest
    chance = sum(1 / len(r.values) for r in language.relations) / len(language.relations)
    for episode in work.episodes(HELD):
        rng = work.rng("controls", episode)
        drawn = language.draw(rng, HELD * 2)
        facts, theirs = drawn[:HELD], drawn[HELD:]
        # Somebody with the same relations and values of their own: who answers by heart instead of from the state would show.
        same = [Fact(f.relation, rng.choice(f.relation.values)) for f in facts]
        with contest.person() as person, contest.person() as other, contest.person() as stranger:
            for mine, others, strange in zip(facts, theirs, same, strict=True):
                work.tell(person, rng, [mine])
                work.tell(other, rng, [others])
                work.tell(stranger, rng, [strange])
            for fact, another in zip(facts, theirs, strict=True):
                question = language.ask(rng, fact.relation)
                answers = {
                    "own memory": contest.ask("memory", person, question),
                    "shuffled: another's memory": contest.ask("memory", stranger, question),
                    "memory off": contest.ask("none", person, question),
                }
                for case, answer in answers.items():
                    sheet.mark(case, None, "memory", "recall", episode, language.right(fact, answer.text))
                leaked = contest.ask("memory", person, language.ask(rng, another.relation))
                case = "another user's facts"
                sheet.mark(case, None, "memory", "said", episode, language.right(another, leaked.text))
                good = language.invents_nothing(another.relation, leaked.text)
                sheet.mark(case, None, "memory", "never told: nothing invented", episode, good)
    sheet.notes.append(f"chance: a guess among a relation's values is right in {chance:.3f} of the cases")
    _guard(sheet, chance)
    work.say(sheet.line("shuffled: another's memory"))
    return sheet


def _guard(sheet: Sheet, chance: float) -> None:
    rows = {row["case"]: row["figures"] for row in sheet.rows()}
    for case, name in (
        ("shuffled: another's memory", "recall"),
        ("memory off", "recall"),
        ("another user's facts", "said"),
    ):
        figure = rows[case][name]
        sheet.figure(case, None, "memory", "chance", Figure(round(chance, 4), round(chance, 4), round(chance, 4), 0))
        if figure["low"] > chance:
            sheet.failures.append(
                f"control failed: {case}: {figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}] is above chance, "
                f"{chance:.3f}; recall above does not show that the memory answers"
            )


def recall(work: Work) -> Sheet:
    """1 to 64 facts, each told in a turn of its own, then asked for; beside them as many that were never told, while there are any."""
    sheet, language = Sheet(work.seed), work.language
    variants = [(n, "any", "any") for n in work.size.facts]
    if language.held_out:
        most = min(32, max(work.size.facts))
        variants += [(HELD, "held-out", "any"), (most, "held-out", "any"), (HELD, "any", "held-out")]
    for count, pairs, phrasing in dict.fromkeys(variants):
        what = {"held-out": ", pairs never trained"}.get(pairs, "")
        what += {"held-out": ", phrasings never trained"}.get(phrasing, "")
        case = f"{count} fact{'s' if count > 1 else ''}{what}"
        x = None if what else count
        for episode in work.episodes(count):
            rng = work.rng("recall", case, episode)
            drawn = language.draw(rng, count * 2, pairs)
            facts, strangers = drawn[:count], drawn[count:]
            with work.contest.person() as person:
                work.tell(person, rng, facts, phrasing=phrasing)
                work.ask(sheet, case, x, person, episode, facts, strangers, phrasing)
        work.say(sheet.line(case))
    return sheet


def distance(work: Work) -> Sheet:
    """Eight facts, then talk; the same conversation is asked after 0, 1k, 10k and 100k tokens of it."""
    sheet = Sheet(work.seed)
    sheet.notes.append(f"talk: {work.talk_source}")
    for episode in work.episodes(HELD):
        rng = work.rng("distance", episode)
        drawn = work.language.draw(rng, HELD + STRANGERS)
        facts, strangers = drawn[:HELD], drawn[HELD:]
        talk, heard = work.talk_for(rng), 0
        with work.contest.person() as person:
            work.tell(person, rng, facts)
            for tokens in work.size.distances:
                heard += work.hear(person, tokens - heard, talk)
                work.ask(sheet, _after(tokens), tokens, person, episode, facts, strangers)
        if episode % 10 == 9:
            work.say(f"episode {episode + 1}, {sheet.line(_after(work.size.distances[-1]))}")
    return sheet


def _after(tokens: int) -> str:
    return f"after {tokens:,} tokens"


def overwrite(work: Work) -> Sheet:
    """Eight facts, four of them changed 1 to 5 times; all eight are asked for. Old values are those of any time before."""
    sheet, language = Sheet(work.seed), work.language
    for times in work.size.changes:
        case, kept_case = f"changed {times}x", f"not changed, beside {times}x"
        for episode in work.episodes(HELD // 2):
            rng = work.rng("overwrite", times, episode)
            facts = language.draw(rng, HELD)
            changing, kept = facts[: HELD // 2], facts[HELD // 2 :]
            old: dict[str, set[str]] = {fact.relation.name: set() for fact in changing}
            with work.contest.person() as person:
                work.tell(person, rng, facts)
                for _ in range(times):
                    for i, fact in enumerate(changing):
                        old[fact.relation.name].add(fact.value)
                        changing[i] = language.changed(rng, fact)
                    work.tell(person, rng, changing, change=True)
                for fact in changing:
                    old[fact.relation.name].discard(fact.value)
                work.ask(sheet, case, times, person, episode, changing, old=old)
                work.ask(sheet, kept_case, times, person, episode, kept)
        work.say(sheet.line(case))
    return sheet


def relations(work: Work) -> Sheet:
    """Facts that are easily mixed up, and questions that take two of them."""
    sheet, language, contest = Sheet(work.seed), work.language, work.contest
    pools: dict[tuple[str, ...], list[Relation]] = {}
    for relation in language.relations:
        pools.setdefault(relation.values, []).append(relation)
    crowded = [tuple(relations) for relations in pools.values() if len(relations) >= HELD]
    for episode in work.episodes(HELD) if crowded else ():
        rng = work.rng("relations, one pool", episode)
        facts = language.draw(rng, HELD, among=rng.choice(crowded))
        case = "8 facts with values of one kind"
        with contest.person() as person:
            work.tell(person, rng, facts)
            work.ask(sheet, case, None, person, episode, facts)
    if not crowded:
        sheet.notes.append("no eight relations of this language share their values: nothing of one kind to mix up")
    chained = HELD // 2
    for episode in work.episodes(chained):
        rng = work.rng("relations, two steps", episode)
        chains = language.chains(rng, chained)
        told = [(text, i, step) for i, chain in enumerate(chains) for step, text in enumerate(chain.told)]
        with contest.person() as person:
            for text, i, step in told:
                contest.tell(person, text, about(chains[i].answer) if step else None)
            for who in contest.opponents:
                for chain in chains[: work.asked(who, episode, chained)]:
                    case = "two steps: where does my sister live?"
                    answer = contest.ask(who, person, chain.question, about(chain.answer))
                    sheet.mark(case, None, who, "recall", episode, language.right(chain.answer, answer.text))
                    sheet.spent(case, None, who, answer, contest.kept_bytes(who, person))
    if language.name == "tiny":
        sheet.notes.append(
            "the tiny language has no question over two steps: this model never saw one in training, and the row says what it "
            "makes of it all the same"
        )
    return sheet


def merge(work: Work) -> Sheet:
    """Half of the facts on each of two branches of one memory, before and after their merge in a store. Opponents get both histories."""
    sheet, contest, model = Sheet(work.seed), work.contest, work.contest.model
    for half in (4, 8):
        for episode in work.episodes(half * 2):
            rng = work.rng("merge", half, episode)
            facts = work.language.draw(rng, half * 2)
            store = dm.Store.in_memory()
            with store, contest.person(model.session("one", store=store)) as person:
                person.session.commit("nothing yet")
                person.session.branch("other")
                for branch, part in (("other", facts[:half]), ("main", facts[half:])):
                    if branch == "main":
                        person.session.checkout("main")
                    work.tell(person, rng, part)
                    _ask_memory(work, sheet, f"{half} facts on their branch", half, person, episode, part)
                    person.session.commit(branch)
                with warnings.catch_warnings():
                    # Told apart or not, the figure says what became of the facts.
                    warnings.simplefilter("ignore", dm.MergeWarning)
                    person.session.merge("other", "both")
                work.ask(sheet, f"{half} + {half} merged", half * 2, person, episode, facts)
                person.session.close(discard=True)
        work.say(sheet.line(f"{half} + {half} merged"))
    return sheet


def _ask_memory(work: Work, sheet: Sheet, case: str, x: float, person: Person, episode: int, facts: list[Fact]) -> None:
    rng = work.rng("questions", case, episode)
    for fact in facts:
        answer = work.contest.ask("memory", person, work.language.ask(rng, fact.relation))
        sheet.mark(case, x, "memory", "recall", episode, work.language.right(fact, answer.text))
