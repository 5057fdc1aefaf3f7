"""The evaluation behind a model card, in PyTorch and in batches: facts told in turns, talk in between, questions answered greedily. The
measurement of a bundle, by the runtime and against opponents, is `deltamem_export.evaluation`.

Everything is graded exactly: the value must stand in the reply and no other value of that relation may. Seeds are disjoint from
training by construction (evaluation seeds start at 10^6), and the held-out pairs and phrasings are never drawn in training.
Episodes run side by side in one batch; each turn is a context of its own, and the end token is not fed, as in the runtime.

    python -m deltamem_export.training.evaluate --backbone DIR --adapter DIR [--stream FILE] [--episodes 63] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from deltamem_export.adapter import Adapter
from deltamem_export.evaluation.conversations import read_talk as talk_turns
from deltamem_export.evaluation.figures import Figure
from deltamem_export.reference import MemoryHandle, attach
from deltamem_export.scan import chunked_scan
from deltamem_export.training.language import RELATIONS, Relation, Speaker, is_correct, mentions, says_unknown
from deltamem_export.training.tokenizer import Codec

FIRST_SEED = 1_000_000
MAX_NEW = 24


class Conversations:
    """A batch of conversations in lockstep over one decoder with memory. `remember=False` empties the memory before every turn."""

    def __init__(self, model: PreTrainedModel, handle: MemoryHandle, codec: Codec, count: int, remember: bool = True):
        self.model, self.handle, self.codec, self.count, self.remember = model, handle, codec, count, remember
        self.device = next(model.parameters()).device
        handle.scan = chunked_scan
        handle.record = False
        handle.reset(count)
        self.state = self._state()
        self.tokens = 0

    def _state(self) -> Tensor:
        assert self.handle.state is not None
        return self.handle.state

    @torch.no_grad()
    def _run(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden states [B, T, D] from the state at the turn's start; padding on the right neither writes nor is seen."""
        self.handle.state = self.state
        self.handle.write_mask = torch.arange(ids.shape[1], device=self.device) < lengths.unsqueeze(1)
        hidden: Tensor = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def _start(self) -> None:
        if not self.remember:
            self.state = torch.zeros_like(self.state)

    def feed(self, batch: Sequence[Sequence[int]]) -> None:
        """One turn of given ids each."""
        self._start()
        ids, lengths = self._padded(batch, 0)
        self._run(ids, lengths)
        self.state = self._state()
        self.tokens += int(lengths.sum()) // self.count

    def chat(self, messages: Sequence[str]) -> list[str]:
        """One user message each, answered greedily."""
        self._start()
        ids, lengths = self._padded([self.codec.prompt(m) for m in messages], MAX_NEW)
        start, active = lengths.clone(), torch.ones_like(lengths, dtype=torch.bool)
        rows = torch.arange(self.count, device=self.device)
        for _ in range(MAX_NEW):
            hidden = self._run(ids[:, : int(lengths.max())], lengths)
            following = self.model.lm_head(hidden[rows, lengths - 1]).argmax(-1)
            active &= following != self.codec.end
            if not bool(active.any()):
                break
            ids[rows[active], lengths[active]] = following[active]
            lengths += active.long()
        else:
            self._run(ids[:, : int(lengths.max())], lengths)
        self.state = self._state()
        self.tokens += int(lengths.sum()) // self.count
        return [
            self.codec.tokenizer.decode(ids[i, start[i] : lengths[i]].tolist(), skip_special_tokens=True)
            for i in range(self.count)
        ]

    def _padded(self, batch: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(b) for b in batch], device=self.device)
        ids = torch.full((len(batch), int(lengths.max()) + room), self.codec.pad, device=self.device)
        for i, b in enumerate(batch):
            ids[i, : len(b)] = torch.tensor(list(b), device=self.device)
        return ids, lengths


@dataclass(frozen=True)
class Case:
    """What one row of the evaluation does before it asks."""

    facts: int = 8
    pairs: str = "any"
    told: str = "trained"
    asked: str = "trained"
    changed: int = 0
    talk_tokens: int = 0
    source: str = "generated"
    form: str = "template"
    remember: bool = True


def run_case(
    model: PreTrainedModel,
    handle: MemoryHandle,
    codec: Codec,
    case: Case,
    episodes: int,
    seed: int,
    stream: Sequence[str] = (),
    unknown: int = 2,
) -> dict[str, Any]:
    """Tells, changes, talks, then asks every fact once in random order, and `unknown` things never told."""
    speakers = [Speaker(random.Random(FIRST_SEED + seed * 10_000 + i), evaluation=True) for i in range(episodes)]
    talk = Conversations(model, handle, codec, episodes, case.remember)
    facts: list[dict[Relation, str]] = []
    strangers: list[list[Relation]] = []
    for speaker in speakers:
        drawn = speaker.draw_facts(min(case.facts + unknown, len(RELATIONS)), case.pairs)
        facts.append(dict(drawn[: case.facts]))
        strangers.append([r for r, _ in drawn[case.facts :]])
    acknowledged = 0
    for i in range(case.facts):
        pairs = [list(f.items())[i] for f in facts]
        replies = talk.chat([s.tell(r, v, phrasing=case.told).user for s, (r, v) in zip(speakers, pairs, strict=True)])
        acknowledged += sum(is_correct(r, v, reply) for (r, v), reply in zip(pairs, replies, strict=True))
    old: list[dict[Relation, str]] = [{} for _ in facts]
    for i in range(case.changed):
        messages = []
        for b, speaker in enumerate(speakers):
            relation = list(facts[b])[i]
            old[b][relation] = facts[b][relation]
            facts[b][relation] = speaker.draw_value(relation, case.pairs, unlike=old[b][relation])
            messages.append(speaker.tell(relation, facts[b][relation], change=True, phrasing=case.told).user)
        talk.chat(messages)
    _stream_talk(talk, speakers, case, stream)
    right = old_answers = old_count = kept = never = 0
    kept_count = 0
    failures: list[str] = []
    order = [speaker.rng.sample(list(f), len(f)) for speaker, f in zip(speakers, facts, strict=True)]
    for i in range(case.facts):
        replies = talk.chat(
            [
                s.ask(o[i], facts[b][o[i]], phrasing=case.asked).user
                for b, (s, o) in enumerate(zip(speakers, order, strict=True))
            ]
        )
        for b, reply in enumerate(replies):
            relation = order[b][i]
            good = is_correct(relation, facts[b][relation], reply)
            right += good
            if relation in old[b]:
                old_count += 1
                old_answers += mentions(reply, old[b][relation])
                kept += good
            kept_count += relation in old[b]
            if not good and len(failures) < 12:
                failures.append(f"{relation.name}={facts[b][relation]}: {reply}")
    for i in range(unknown if strangers[0] else 0):
        replies = talk.chat([s.ask(strangers[b][i], None, phrasing=case.asked).user for b, s in enumerate(speakers)])
        never += sum(says_unknown(r) for r in replies)
    n = episodes * case.facts
    result: dict[str, Any] = {
        "case": asdict(case),
        "recall": asdict(Figure.of(right, n)),
        "acknowledged": asdict(Figure.of(acknowledged, n)),
        "unknown": asdict(Figure.of(never, episodes * (unknown if strangers[0] else 0))),
        "tokens": talk.tokens,
        "failures": failures,
    }
    if case.changed:
        result["changed_new"] = asdict(Figure.of(kept, kept_count))
        result["changed_old"] = asdict(Figure.of(old_answers, old_count))
    return result


def _stream_talk(talk: Conversations, speakers: Sequence[Speaker], case: Case, stream: Sequence[str]) -> None:
    """At least `talk_tokens` other tokens for every conversation, each from another place of the stream."""
    if not case.talk_tokens:
        return
    starts = [speaker.rng.randrange(len(stream)) if stream else 0 for speaker in speakers]
    end = talk.tokens + case.talk_tokens
    at = 0
    while talk.tokens < end:
        messages = [
            stream[(s + at) % len(stream)] if case.source != "generated" else sp.talk().user
            for s, sp in zip(starts, speakers, strict=True)
        ]
        if case.form == "chat":
            talk.chat(messages)
        else:
            talk.feed(
                [
                    (codec_prompt(talk.codec, m) if case.form == "template" else list(talk.codec.encode(m)))[:480]
                    for m in messages
                ]
            )
        at += 1


def codec_prompt(codec: Codec, message: str) -> list[int]:
    return codec.prompt(message)


@torch.no_grad()
def harm(
    model: PreTrainedModel, handle: MemoryHandle, codec: Codec, facts: int, texts: Sequence[str], seed: int
) -> dict[str, float]:
    """Perplexity of each text as a turn of its own, with `facts` held over without memory."""
    speakers = [Speaker(random.Random(FIRST_SEED + seed * 10_000 + i), evaluation=True) for i in range(len(texts))]
    talk = Conversations(model, handle, codec, len(texts))
    drawn = [s.draw_facts(facts, "any") for s in speakers]
    for i in range(facts):
        talk.chat([s.tell(*d[i]).user for s, d in zip(speakers, drawn, strict=True)])
    ids, lengths = talk._padded([codec.prompt(t)[:256] for t in texts], 0)
    losses = []
    for remember in (True, False):
        talk.remember = remember
        talk._start()
        hidden = talk._run(ids, lengths)
        logits = model.lm_head(hidden[:, :-1])
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(texts), -1)
        where = torch.arange(1, ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        losses.append(float((each * where).sum() / where.sum()))
    return {
        "ratio": math.exp(losses[0] - losses[1]),
        "perplexity_without": math.exp(losses[1]),
        "tokens": int(lengths.sum()),
    }


def standard_cases(conversation: bool) -> dict[str, Case]:
    """The rows of the model card. `conversation`: also the rows that stream a given conversation."""
    cases = {
        "8 facts": Case(),
        "8 facts, pairs never trained": Case(pairs="held-out"),
        "8 facts, phrasings never trained": Case(told="held-out", asked="held-out"),
        "16 facts": Case(facts=16),
        "32 facts": Case(facts=32),
        "8 facts, 4 changed": Case(changed=4),
        "8 facts, 2k tokens of generated talk": Case(talk_tokens=2_000),
        "8 facts, no memory": Case(remember=False),
    }
    if conversation:
        cases |= {
            "8 facts, 2k tokens of real conversation": Case(talk_tokens=2_000, source="conversation"),
            "8 facts, 10k tokens of real conversation": Case(talk_tokens=10_000, source="conversation"),
            "8 facts, 2k tokens of real conversation, answered": Case(
                talk_tokens=2_000, source="conversation", form="chat"
            ),
            "8 facts, 2k tokens of real conversation, no template": Case(
                talk_tokens=2_000, source="conversation", form="raw"
            ),
        }
    return cases


def evaluate(
    model: PreTrainedModel,
    handle: MemoryHandle,
    codec: Codec,
    episodes: int = 63,
    seed: int = 0,
    stream: Sequence[str] = (),
    cases: dict[str, Case] | None = None,
    report: Callable[[str, dict[str, Any]], None] = lambda *_: None,
) -> dict[str, dict[str, Any]]:
    """Every case, each with its own seed. `episodes` conversations a case; a case with more facts asks more questions."""
    results = {}
    for i, (name, case) in enumerate((cases or standard_cases(bool(stream))).items()):
        results[name] = run_case(model, handle, codec, case, episodes, seed * 100 + i, stream)
        report(name, results[name])
    return results


def load(backbone: Path, adapter: Path, device: str = "cpu") -> tuple[PreTrainedModel, MemoryHandle, Codec]:
    """A trained decoder with its memory, and the codec of its tokenizer."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).to(device).eval().requires_grad_(False)
    return model, attach(model, Adapter.load(adapter)), Codec(Tokenizer.from_file(str(backbone / "tokenizer.json")))


def line(name: str, result: dict[str, Any]) -> str:
    """One row for a person."""
    parts = [f"{name}: {_shown(result['recall'])}"]
    parts += [
        f"{key} {_shown(result[key])}"
        for key in ("acknowledged", "unknown", "changed_new", "changed_old")
        if result.get(key, {}).get("n")
    ]
    return ", ".join(parts) + f", {result['tokens']} tokens"


def _shown(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}] n={figure['n']}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Honest recall of a tiny assistant, by greedy generation.")
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument(
        "--stream", type=Path, help="a conversation (LoCoMo JSON or text) to read between telling and asking"
    )
    parser.add_argument("--episodes", type=int, default=63)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="only cases whose name holds this text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--failures", action="store_true", help="print wrong answers")
    args = parser.parse_args(arguments)
    model, handle, codec = load(args.backbone, args.adapter)
    stream = talk_turns(args.stream) if args.stream else []
    cases = {n: c for n, c in standard_cases(bool(stream)).items() if not args.only or args.only in n}

    def report(name: str, result: dict[str, Any]) -> None:
        print(line(name, result), flush=True)
        if args.failures:
            print("   " + "\n   ".join(result["failures"]))

    results = evaluate(model, handle, codec, args.episodes, args.seed, stream, cases, report)
    if stream and not args.only:
        texts = random.Random(0).sample(list(stream), min(64, len(stream)))
        results["harm"] = {str(n): harm(model, handle, codec, n, texts, 900 + n) for n in (8, 32)}
        print("harm", results["harm"])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
