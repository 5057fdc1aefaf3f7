"""The words of the generated English: pools of values, word lists for the slots of small talk, and its sentence frames.

Only data lives here. Values of one pool never contain one another as whole words, so that an answer can be graded exactly.
"""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


POOLS: dict[str, tuple[str, ...]] = {
    "person": _split(
        "Anna Ben Carla David Elena Frank Grace Henry Irene Jack Karen Liam Maria Nora Oscar Paula Quinn Rosa Simon Tina Umar Vera Walter Yusuf Zoe Aisha "
        "Clara Diego Emma Felix Hana Ivan Julia Kofi Lena Marco Nina Omar Peter Sofia"
    ),
    "pet": _split(
        "Rex Bella Max Luna Milo Daisy Rocky Coco Buddy Molly Shadow Ginger Pepper Biscuit Ziggy Nala Simba Oreo Whiskers Pickle Bruno Waffle Peanut Toffee "
        "Sparky Tiger Snowy Bandit Muffin Cookie Socks Bubbles"
    ),
    "colour": _split(
        "red blue green yellow black white grey brown purple pink orange silver gold turquoise violet beige cream navy olive maroon teal crimson ivory copper"
    ),
    "place": _split(
        "Paris London Berlin Rome Madrid Vienna Lisbon Athens Oslo Dublin Prague Warsaw Cairo Tokyo Delhi Boston Chicago Toronto Sydney Lima Nairobi Seoul "
        "Zurich Geneva Munich Hamburg Bristol Glasgow Porto Naples Denver Dallas"
    ),
    "fruit": _split(
        "apple banana cherry mango peach pear plum grape lemon lime melon papaya kiwi apricot strawberry raspberry blueberry fig date coconut pineapple "
        "grapefruit nectarine guava"
    ),
    "drink": _split(
        "coffee tea water milk beer wine cider lemonade cola juice cocoa whisky vodka rum gin champagne espresso punch kefir sherry port tonic soda smoothie"
    ),
    "animal": _split(
        "elephant lion giraffe zebra monkey bear wolf fox deer otter whale dolphin shark eagle owl penguin camel kangaroo koala panda leopard squirrel "
        "hedgehog badger"
    ),
    "flower": _split(
        "rose tulip daisy lily orchid sunflower violet iris poppy daffodil lavender jasmine carnation peony marigold snowdrop crocus begonia geranium "
        "hyacinth dahlia lotus magnolia buttercup"
    ),
    "sport": _split(
        "football tennis basketball volleyball hockey golf rugby cricket baseball badminton handball squash polo curling bowling lacrosse softball netball "
        "darts snooker rounders billiards frisbee judo"
    ),
    "dish": _split(
        "pizza pasta rice soup salad curry stew toast porridge cereal yoghurt cheese bread eggs pancakes sausages lasagne sushi noodles dumplings risotto "
        "burritos tacos falafel"
    ),
    "music": _split(
        "jazz rock pop blues folk opera techno reggae metal soul funk disco punk country gospel swing salsa tango samba ambient grunge house ska classical"
    ),
    "subject": _split(
        "maths physics chemistry biology history geography art economics law medicine philosophy religion literature grammar drama sociology politics "
        "geology astronomy statistics engineering botany logic psychology"
    ),
    "job": _split(
        "baker teacher nurse doctor lawyer farmer pilot painter plumber carpenter driver waiter cook gardener butcher tailor barber librarian journalist "
        "dentist chemist sailor soldier singer dancer banker welder miner postman mechanic surgeon judge"
    ),
    "instrument": _split(
        "piano guitar violin cello flute clarinet trumpet drums harp saxophone organ banjo trombone oboe accordion mandolin tuba viola ukulele bassoon "
        "harmonica xylophone lute fiddle"
    ),
    "language": _split(
        "French German Spanish Italian Russian Chinese Japanese Korean Arabic Hindi Turkish Greek Polish Dutch Swedish Danish Finnish Czech Hungarian "
        "Portuguese Latin Hebrew Swahili Welsh"
    ),
    "hobby": _split(
        "chess painting knitting fishing hiking cycling swimming cooking gardening reading dancing singing running sailing pottery photography climbing "
        "skiing yoga sewing baking surfing archery origami"
    ),
}

WORDS: dict[str, tuple[str, ...]] = {
    "kin": _split("sister brother cousin aunt uncle boss neighbour teacher doctor dog cat horse car bike father mother wife son daughter husband garden team hobby job kitchen"),
    "owner": (
        "my colleague", "the woman next door", "a man at the station", "the president", "a friend of a friend", "the new student", "our old landlady", "my friend Tom", "the girl upstairs",
        "the singer", "that actor", "the mayor", "someone at work", "the postman", "her brother", "his cousin", "their teacher", "Anna", "David", "Maria", "Simon", "Emma", "Peter", "Julia",
        "the king", "a famous writer", "my dentist", "the man on television", "Mrs Miller", "Mr Brown", "the captain", "my sister", "my neighbour", "Karen", "Oscar",
    ),
    "noun": _split(
        "house street window table chair book letter river mountain forest village market shop bridge road train bus ship plane phone computer camera clock lamp key bottle cup plate knife "
        "box bag shirt shoe ring picture song film game party dinner lunch meeting lesson exam project report plan idea problem question answer story dream holiday weekend morning evening "
        "night summer winter storm rain snow sun moon star sea beach island field tree leaf bird fish insect child baby student artist doctor police king queen church school hospital bank "
        "hotel restaurant museum library theatre station airport garden park money price ticket passport newspaper magazine website message email photo video account password wall floor roof "
        "door bed bath kitchen oven fridge sugar salt butter egg meat onion potato tomato carrot engine wheel battery machine robot"
    ),
    "adjective": _split(
        "good bad big small new old long short high low hot cold warm cool happy sad angry tired hungry busy free quiet loud clean dirty easy hard cheap expensive early late fast slow strong "
        "weak rich poor young nice lovely awful strange funny boring exciting beautiful ugly dark bright heavy light soft empty full safe dangerous famous important simple difficult great amazing "
        "terrible wonderful perfect wet dry sweet bitter fresh broken ready proud nervous excited calm kind rude lazy"
    ),
    "verb": _split(
        "went came saw made took gave found told asked called bought sold opened closed started finished cleaned fixed broke lost kept moved cooked ate drank read wrote heard played watched "
        "visited met helped left stayed waited walked drove painted built dropped carried pushed pulled washed learned forgot remembered thought felt liked hated wanted needed tried"
    ),
    "did": (
        "found", "lost", "bought", "sold", "opened", "cleaned", "fixed", "broke", "moved", "painted", "dropped", "carried", "watched", "visited", "saw", "forgot", "remembered", "photographed", "borrowed",
        "returned", "looked at", "talked about", "thought about", "laughed about", "complained about", "dreamed about", "waited for", "paid for", "argued about", "got rid of", "took care of",
    ),
    "place": _split(
        "park station office kitchen garden school market beach library museum cinema gym airport hospital church village forest lake river city restaurant shop bakery theatre pool stadium "
        "harbour castle farm zoo hotel basement attic bathroom"
    ),
    "time": (
        "today", "yesterday", "this morning", "last night", "last week", "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday", "on Saturday", "on Sunday", "two days ago",
        "an hour ago", "last summer", "in the evening", "after lunch", "before work", "a while ago", "last year", "in spring", "last month", "around noon", "over the weekend", "the other day",
    ),
    "future": (
        "tomorrow", "next week", "tonight", "on Sunday", "this afternoon", "in the summer", "next month", "one day", "soon", "after work", "at the weekend", "next year", "in a few minutes", "later",
    ),
    "person": (
        "my sister", "my brother", "my friend", "my boss", "a colleague", "the neighbour", "my mother", "my father", "the kids", "my wife", "my husband", "my cousin", "an old man", "a woman",
        "some people", "the teacher", "the doctor", "everyone", "nobody", "someone", "my uncle", "my aunt", "my son", "my daughter", "the whole family", "Anna", "Tom", "Maria", "Sam", "Lucy", "Mike",
        "a stranger", "our guests", "the driver", "the manager", "my roommate", "the dog", "the cat",
    ),
    "number": _split("two three four five six seven eight nine ten twelve fifteen twenty thirty fifty hundred"),
    "amount": ("a lot of", "a little", "too much", "hardly any", "so much", "some", "plenty of", "no", "enough", "a bit of"),
    "thing": _split("work fun time energy noise traffic music food help hope luck trouble news stress money sleep pain joy patience support"),
    "adverb": _split("really quite very so rather pretty too fairly extremely surprisingly truly"),
    "feel": _split("happy sad tired angry nervous excited proud lonely grateful bored calm worried relieved confused hopeful inspired overwhelmed lucky"),
    "activity": (
        "go for a walk", "go to the cinema", "stay at home", "read a book", "call my friends", "learn something new", "clean the house", "cook dinner", "watch a film", "take a break", "visit the museum",
        "go to bed early", "write a letter", "see the doctor", "buy new shoes", "plan a trip", "start a new project", "join a class", "volunteer at the shelter", "go camping", "paint again", "listen to music",
        "make a list", "change my life", "move the furniture", "sell the old things", "bake a cake", "meet new people", "save money", "fix the roof", "work less", "exercise more", "take some photos",
    ),
    "exclaim": (
        "Wow!", "Oh no!", "Great!", "That's awesome!", "Amazing!", "Well,", "Yeah,", "Thanks!", "Haha,", "Hmm,", "Oh,", "Sure,", "Right,", "Exactly!", "Really?", "So,", "OK,", "Honestly,", "You know,",
        "I agree.", "Good point.", "That's so cool!", "Congrats!", "No way!", "Sounds good.", "Absolutely!", "Of course.", "I guess so.", "Not really.", "Thank you so much!", "That means a lot.", "Good luck!",
    ),
    "friend": _split("Anna Tom Maria Sam Lucy Mike Nick Laura Kate Chris Alex Jenny Steve Helen Paul Susan Mark Ellen Tim Sarah"),
}  # fmt: skip

TALK: dict[str, tuple[str, ...]] = {
    "greeting": (
        "Hello!", "Hi!", "Hi there!", "Hello, how are you?", "Good morning!", "Good evening!", "Hey, how is it going?", "Hi, are you there?", "Good afternoon!", "Hello again.", "Hey!", "Hi, nice to meet you.",
        "Hey, long time no see!", "Hi, what's up?",
    ),
    "thanks": ("Thanks!", "Thank you.", "Thank you very much.", "Thanks a lot!", "That was helpful, thanks.", "Great, thank you!", "Many thanks.", "Cheers!", "I appreciate it."),
    "goodbye": ("Bye!", "Goodbye.", "See you later.", "Good night!", "See you tomorrow!", "I have to go now.", "Talk to you soon.", "That is all for today."),
    "question": _lines(
        """
        Do you like {adjective} weather?
        What do you think about the {noun}?
        Is it {adverb} {adjective} at the {place}?
        Why is the {noun} so {adjective}?
        Should I {activity} {future}?
        Can you help me with the {noun}?
        How far is it to the {place}?
        When does the {place} open?
        Would you rather {activity} or {activity}?
        Do you know how to fix a {noun}?
        What is the best way to {activity}?
        How much does a {adjective} {noun} cost?
        Who invented the {noun}?
        Is a {noun} bigger than a {noun}?
        Where can I buy a {adjective} {noun}?
        Have you ever seen a {adjective} {noun}?
        How was your weekend?
        What did you do {time}?
        Did {person} call {time}?
        Can a {noun} be {adjective}?
        What is the meaning of life?
        What should I cook tonight?
        Will it rain {future}?
        What time is it?
        How do you feel about {thing}?
        Any plans for {future}?
        Have you been to the {place} {time}?
        What makes you {feel}?
        """
    ),
    "statement": _lines(
        """
        The {noun} is {adverb} {adjective}.
        The {noun} in the {place} was {adjective} {time}.
        I {did} the {noun} {time}.
        I {did} a {adjective} {noun} at the {place}.
        {time} I {did} the {adjective} {noun}.
        {time} {person} {did} the {noun} in the {place}.
        We went to the {place} {time} and it was {adverb} {adjective}.
        I want to {activity} {future}.
        I am going to {activity} {future}.
        Maybe I will {activity} {future}.
        I feel {feel} because of the {noun}.
        I was {adverb} {feel} {time}.
        There is {amount} {thing} at the {place}.
        It takes {amount} {thing} to {activity}.
        My day was {adjective} and {adjective}.
        The weather is {adjective} {time}.
        It was raining {time}.
        {person} told me to {activity}.
        {person} and I {did} the {noun} together.
        {person} has {number} {adjective} books.
        You should {activity} too.
        I never {did} such a {adjective} {noun}.
        I need {amount} {thing}.
        I have been {feel} since the {noun} broke.
        I can't find the {noun}.
        The {place} is closed {future}.
        There were {number} people at the {place}.
        It costs {number} dollars to visit the {place}.
        I have to {activity} before I {activity}.
        If the {noun} is {adjective}, I will {activity}.
        {exclaim} I think we should {activity}.
        {exclaim} that {noun} looks {adverb} {adjective}.
        {exclaim} it's been {adverb} {adjective} lately.
        {exclaim} I'm so {feel} for you!
        {exclaim} how's the {noun} going?
        {exclaim} what do you like most about the {noun}?
        {exclaim} I've been trying to {activity} since {time}.
        {exclaim} it was great to {activity} with {person}.
        Hey {friend}! Good to see you!
        Hey {friend}, guess what happened {time}!
        {friend}, that's so {adjective}! I'm {feel} to hear that.
        {friend}: I {did} the {noun} {time}. It was {adjective}.
        {friend} said: It's {adverb} {adjective}, I couldn't believe it.
        {friend}: {exclaim} I hope you {activity} {future}!
        {friend}: Thanks, {friend}! It means the world to me.
        {friend} said that the {noun} is {adjective}.
        I'm glad that {person} could {activity}.
        It reminds me of the {noun} we saw {time}.
        Life is {adjective}, but we'll {activity}.
        I can't wait to {activity}!
        The kids loved the {place}, they were so {feel}.
        We had {amount} {thing} {time}.
        It's important to {activity} when you're {feel}.
        Nothing {adjective} happened {time}.
        In the {place} there is a {adjective} {noun} with a {adjective} {noun}.
        They {did} the {noun}, but it was too {adjective}.
        She said the {noun} was {adjective} and the {noun} was {adjective}.
        He {did} his {noun} at the {place} {time}.
        Once there was a {adjective} {noun} near the {place}.
        The price of the {noun} went up {time}.
        Let me know if you want to {activity}.
        I don't know what to do about the {noun}.
        I don't like the {noun} at all.
        I wonder who {did} the {noun}.
        Here is a photo of the {adjective} {noun} I {did} {time}.
        """
    ),
    "near": _lines(
        """
        My {thing} was {adverb} {adjective} {time}.
        I love my {thing}.
        I talked about my {thing} {time}.
        My {thing} makes me {feel}.
        I read something about {value} {time}.
        {value} is a {adjective} word.
        I heard the word {value} {time}.
        Somebody mentioned {value} at the {place}.
        I was thinking about my {thing} and felt {feel}.
        I don't want to talk about my {thing}.
        Is {value} a good choice?
        What do you know about {value}?
        Some people like {value}, some do not.
        My {thing} needs {amount} {thing}.
        I took a photo of my {thing} at the {place}.
        I used to have a {thing} a long time ago.
        A {thing} can be {adverb} {adjective}.
        {person} asked about my {thing} {time}.
        My {thing} is {adverb} {adjective} {time}.
        Have you seen my {thing}?
        Say {value}.
        The story is about a {thing} and {value}.
        """
    ),
}  # fmt: skip
