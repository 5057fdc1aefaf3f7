"""What the bundle carries for `deltamem demo`: the facts and phrasings to draw from (`demo.json`), and a small conversation to stream (`stream.txt`).

Both are made here, from the language and from lines written for this file; nothing of `stream.txt` is used in training.
"""

from __future__ import annotations

import random
from typing import Any

from deltamem_export.training.language import RELATIONS, Speaker

DEMO_SEED = 2_000_000

CHAT = """
Nora: Hey Sam, are you awake? I could not sleep because of the thunder.
Sam: Barely. The cat has been hiding under the bed since midnight and refuses to come out.
Nora: Poor thing. Did the power go out at your place as well?
Sam: For about twenty minutes. I lit a candle and finished the last chapter of that detective novel.
Nora: The one with the lighthouse keeper? How did it end?
Sam: I will not spoil it, but the letters in the drawer were a trap all along.
Nora: I knew it! Nobody keeps letters in a drawer that neatly.
Sam: What are you doing this weekend?
Nora: Helping my parents clear out the garage. There are boxes in there that nobody has opened since we were children.
Sam: That sounds like a treasure hunt. Bring gloves and something cold to drink.
Nora: Last time we found a radio from the sixties, and it still worked after we changed one fuse.
Sam: I would love to see that. My grandfather used to repair those in the evenings.
Nora: Come by on Saturday then. There will be soup, and my mother always cooks for ten people.
Sam: Deal. Should I bring bread? The bakery at the corner has a new rye loaf that is really good.
Nora: Yes please. And maybe something sweet for afterwards.
Sam: How is the new job going, by the way?
Nora: Better than I feared. The first week was chaos, nobody had a desk for me, but the people are patient.
Sam: It takes a while. I needed three months before I understood who was responsible for what.
Nora: My manager plays the trombone in a street band, so at least lunch is never boring.
Sam: Ha, that is wonderful. Do they practise in the office?
Nora: Only on Fridays after five, and only in the stairwell because of the echo.
Sam: You should record it.
Nora: I did, but all you can hear is my own laughing.
Sam: Did you hear that the old cinema might close? They put a notice on the door yesterday.
Nora: No! We saw our first film there. Is there a petition or something?
Sam: There is a meeting at the town hall on Wednesday evening. I was thinking of going.
Nora: Count me in. If they turn it into a parking lot I will chain myself to the popcorn machine.
Sam: I will bring you sandwiches.
Nora: You are a true friend.
Sam: Oh, and the doctor said my knee is fine again, so I can start running next month.
Nora: Slowly! Last year you started with ten kilometres and then you could not walk down the stairs.
Sam: I know, I know. Two kilometres, flat, with breaks. I promised.
Nora: Good. There is a nice path along the canal, and the ducks are very encouraging.
Sam: Are they still chasing the joggers?
Nora: Only the ones who carry food.
Sam: How was the train ride home on Sunday?
Nora: Long. We stood in a field for an hour because of a signal, but a little girl in our carriage read jokes to everyone.
Sam: Tell me one.
Nora: Why did the bicycle fall over? Because it was two tired.
Sam: That is terrible. I will use it tomorrow.
Nora: My sister is thinking about moving to the coast next spring.
Sam: Really? What about her studio?
Nora: She says the light is better there, and the rent is half of what she pays now.
Sam: I can see that. But who is going to water your plants when you travel?
Nora: You, obviously.
Sam: I killed a cactus once, remember?
Nora: Nobody is perfect. I will leave instructions with pictures.
Sam: Did you try the recipe with the lentils?
Nora: Yes, but I forgot the lemon, so it tasted like a wet cardboard box. The second attempt was great.
Sam: Lemon saves everything. My aunt puts it even into her coffee, which I do not recommend.
Nora: I met an old teacher of ours at the market. She asked about everyone and remembered all the names.
Sam: Mrs Whitfield? She must be eighty by now.
Nora: Eighty-three, and she is learning to paint with watercolours. She showed me photos of boats and storms.
Sam: That gives me hope. I started three courses last year and finished none.
Nora: Which ones?
Sam: Photography, bread baking, and something about bookkeeping that I would rather forget.
Nora: You do take nice photos though. The one with the fog over the bridge is still on my wall.
Sam: That was pure luck. I wanted to photograph a heron and it flew away.
Nora: Luck counts. Did you send it to the competition?
Sam: The deadline was in March and I noticed in April.
Nora: Classic.
Sam: I am thinking about getting a second-hand bicycle for the commute. The bus is late every single day.
Nora: Ask my neighbour, he repairs them in his yard and sells the good ones for almost nothing.
Sam: Perfect. I only need something with lights and brakes that work.
Nora: High standards!
Sam: By the way, the picture you gave me finally hangs in the hallway. It took two nails and a lot of swearing.
Nora: Is it straight?
Sam: If you tilt your head.
Nora: I will bring a spirit level on Saturday.
Sam: The kids next door built a rocket out of cardboard and asked me to be mission control.
Nora: Did it fly?
Sam: Down the stairs, yes. We declared it a successful landing.
Nora: I should get some sleep now. The storm is moving away at last.
Sam: Same here. The cat has just come out and is sitting on the keyboard.
Nora: Good night, Sam. Good night, cat.
Sam: Sleep well, see you on Saturday.
Nora: Morning! Guess who overslept and missed the first meeting.
Sam: The person who talked about lighthouses until two?
Nora: Exactly that person. Luckily the projector was broken, so nobody started on time.
Sam: I walked to work for once and found a glove, a five-euro note and a very friendly dog.
Nora: Did you keep any of them?
Sam: I put the glove on a fence post, bought coffee with the note, and the dog had an owner.
Nora: A balanced morning, then.
Sam: What do you need for Saturday apart from bread?
Nora: Strong arms and patience. There is a wardrobe that nobody knows how to get down the stairs.
Sam: How did it get up there in the first place?
Nora: My father says he built it in the room. He was very proud and did not think ahead.
Sam: I like him more every time you tell me something.
Nora: He has also kept every newspaper from the year I was born, in no order at all.
Sam: We could read the weather reports aloud while we carry things.
Nora: I have a feeling that we will get very little done.
Sam: As long as there is soup.
""".strip()


def demo_facts() -> dict[str, Any]:
    """The contents of demo.json: every relation with its values, the phrasings of training, and sixty messages of small talk."""
    speaker = Speaker(random.Random(DEMO_SEED))
    talk = list(dict.fromkeys(speaker.talk().user for _ in range(90)))
    return {
        "language": 1,
        "relations": [
            {
                "name": r.name,
                "values": list(r.values),
                "tell": list(r.trained_tell),
                "ask": list(r.trained_ask),
                "answer": [f"{r.prefix} {{value}}."],
            }
            for r in RELATIONS
        ],
        "unknown": ["I don't know"],
        "small_talk": [t for t in talk if len(t) < 160 and t.isprintable()][:60],
        "system": None,
    }


def stream_text(lines: int = 160) -> str:
    """The contents of stream.txt, a message a line: ordinary chat written for it, with generated chatter between its parts."""
    speaker = Speaker(random.Random(DEMO_SEED + 1))
    written = CHAT.splitlines()
    generated = [speaker.statements(speaker.rng.randint(1, 5)).replace("\n", " ") for _ in range(lines)]
    mixed: list[str] = []
    for i, line in enumerate(written):
        mixed.append(line)
        if i % 10 == 9:
            mixed.extend(generated[i // 10 * 16 : i // 10 * 16 + 16])
    return "\n".join(mixed) + "\n"
