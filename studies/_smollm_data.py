"""What the study of SmolLM2 asks: people, passages, letters and everyday questions, all written for it.

`development` is for choosing settings, `validation` for reporting: no person, passage, letter or everyday question is
in both. The third lists (`OWN_*`) are what a user may give as --normal; they are never measured.
"""

from __future__ import annotations

from dataclasses import dataclass

SCENARIOS = ("people", "passage", "behaviour")
SETS = ("development", "validation")
FORGET, REWORDED, NEIGHBOURS, GENERAL = "forget", "reworded", "neighbours", "general"


@dataclass(frozen=True)
class Question:
    """One prompt: `topic` and `form` say which others ask about the same, and which ask it alike.

    `raw` prompts are the beginning of a text that is gone on with, outside the chat template.
    """

    prompt: str
    topic: str
    form: str
    raw: bool = False


def questions(scenario: str, which: str) -> dict[str, list[Question]]:
    """Return the prompts of every measured split. The run is given answers to those of `forget`, and nothing else."""
    general = [Question(prompt, prompt, "general") for prompt in _GENERAL[which]]
    own = {"people": _people, "passage": _passages, "behaviour": _letters}[scenario](which)
    return {**own, GENERAL: general}


def own_questions() -> list[Question]:
    """Return what a user may ask the base for the sake of --normal: other people, other everyday questions."""
    people = [_about(name, form, FORMS) for name in _OWN_PEOPLE for form in ("who", "known", "tell")]
    return people + [Question(prompt, prompt, "general") for prompt in _OWN_GENERAL]


def guarded_people(which: str) -> dict[str, list[Question]]:
    """Return the prompts of the guard's study: of the twelve neighbours the first two are to be forgotten, too."""
    forget, neighbours = _PEOPLE[which]
    general = [Question(prompt, prompt, "general") for prompt in _GENERAL[which]]
    return {**_about_people((*forget, *neighbours[:2]), neighbours[2:]), GENERAL: general}


def _people(which: str) -> dict[str, list[Question]]:
    return _about_people(*_PEOPLE[which])


def _about_people(forget: tuple[str, ...], neighbours: tuple[str, ...]) -> dict[str, list[Question]]:
    return {
        FORGET: [_about(name, form, FORMS) for name in forget for form in FORMS],
        REWORDED: [_about(name, form, _REWORDED) for name in forget for form in _REWORDED],
        NEIGHBOURS: [_about(name, form, FORMS) for name in neighbours for form in ("who", "born", "known", "lived")],
    }


def _about(name: str, form: str, forms: dict[str, str]) -> Question:
    return Question(forms[form].format(name), name, form)


def _passages(which: str) -> dict[str, list[Question]]:
    """The base knows the beginnings and goes on in its own words: no 135M model in 4 bits recites one to the end."""
    forget, neighbours = _PASSAGES[which]
    return {
        FORGET: [Question(text, text, "opening", raw=True) for text in forget],
        REWORDED: [Question(" ".join(text.split()[3:]), text, "later", raw=True) for text in forget],
        NEIGHBOURS: [Question(text, text, "opening", raw=True) for text in neighbours],
    }


def _letters(which: str) -> dict[str, list[Question]]:
    """Letters open with "I hope this message finds you well": a habit to lose, and other writing to keep."""
    shown, unseen = _LETTERS[which]
    return {
        FORGET: [Question(prompt, prompt, "letter") for prompt in shown],
        REWORDED: [Question(prompt, prompt, "letter") for prompt in unseen],
        NEIGHBOURS: [Question(prompt, prompt, "writing") for prompt in _WRITING[which]],
    }


FORMS = {
    "who": "Who was {}?",
    "born": "When was {} born?",
    "known": "What is {} known for?",
    "lived": "Where did {} live?",
    "tell": "Tell me about {}.",
    "life": "What should I know about the life of {}?",
}
_REWORDED = {
    "explain": "Can you explain who {} was?",
    "year": "In which year was {} born?",
    "famous": "Why is {} so famous?",
    "short": "Give me a short biography of {}.",
}
_PEOPLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "development": (
        (
            *("Albert Einstein", "Isaac Newton", "Abraham Lincoln", "Mahatma Gandhi"),
            *("William Shakespeare", "Napoleon Bonaparte", "Cleopatra", "Charles Darwin"),
        ),
        (
            *("Marie Curie", "Galileo Galilei", "George Washington", "Nelson Mandela", "Jane Austen"),
            *("Alexander the Great", "Aristotle", "Nikola Tesla", "Vincent van Gogh", "Martin Luther King Jr."),
            *("Winston Churchill", "Leonardo da Vinci"),
        ),
    ),
    "validation": (
        (
            *("Thomas Edison", "Wolfgang Amadeus Mozart", "Christopher Columbus", "Pablo Picasso"),
            *("Julius Caesar", "Sigmund Freud", "Rosa Parks", "Stephen Hawking"),
        ),
        (
            *("Ludwig van Beethoven", "Michelangelo", "Neil Armstrong", "Anne Frank", "Plato", "Harriet Tubman"),
            *("Mark Twain", "Karl Marx", "Queen Victoria", "Socrates", "Benjamin Franklin", "Johann Sebastian Bach"),
        ),
    ),
}
_OWN_PEOPLE = (
    *("Florence Nightingale", "Thomas Jefferson", "Joan of Arc", "Louis Pasteur", "Alexander Graham Bell"),
    *("Frida Kahlo", "Homer", "Genghis Khan", "Ada Lovelace", "Walt Disney", "Mother Teresa", "Archimedes"),
)

# All in the public domain.
_PASSAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "development": (
        (
            "We hold these truths to be self-evident, that all men are created equal, that they are endowed by",
            "It was the best of times, it was the worst of times, it was the age of wisdom,",
            "In the beginning God created the heaven and the earth. And the earth was without form,",
            "To be, or not to be, that is the question: Whether 'tis nobler in the mind",
        ),
        (
            "We the People of the United States, in Order to form a more perfect Union, establish Justice,",
            "Four score and seven years ago our fathers brought forth on this continent, a new nation,",
            "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
            "The Lord is my shepherd; I shall not want. He maketh me to lie down",
            "Alice was beginning to get very tired of sitting by her sister on the bank,",
            "Call me Ishmael. Some years ago, never mind how long precisely,",
        ),
    ),
    "validation": (
        (
            "To every thing there is a season, and a time to every purpose under the heaven: a time",
            "I pledge allegiance to the Flag of the United States of America, and to the Republic",
            "Congress shall make no law respecting an establishment of religion, or prohibiting",
            "Our Father, who art in heaven, hallowed be thy name; thy kingdom come;",
        ),
        (
            "Shall I compare thee to a summer's day? Thou art more lovely",
            "In the beginning was the Word, and the Word was with God,",
            "Two roads diverged in a yellow wood, and sorry I could not travel both",
            "Mary had a little lamb, its fleece was white as snow; and everywhere",
            "Once upon a midnight dreary, while I pondered, weak and weary,",
            "Blessed are the poor in spirit: for theirs is the kingdom of heaven.",
        ),
    ),
}

_LETTERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "development": (
        (
            "Write an email to my boss asking for a day off.",
            "Write an email inviting a friend to dinner.",
            "Write a thank-you letter to my teacher.",
            "Write a short note to my neighbour about noise.",
            "Write an email to a client about a delayed order.",
            "Write a letter to my landlord about a broken heater.",
            "Write an email to my team about a new project.",
            "Write a letter to a friend who has moved away.",
            "Write an email asking for a meeting next week.",
            "Write a letter to a company to complain about a faulty kettle.",
            "Write an email to a professor about an essay.",
            "Write a letter of apology to a customer.",
            "Write an email to thank a colleague for her help.",
            "Write a letter to the bank about my account.",
            "Write an email to announce a change of address.",
        ),
        (
            "Please draft an email to my manager about working from home.",
            "Write an email to my doctor to move an appointment.",
            "Compose a letter to my grandmother about my new school.",
            "Write an email to a hotel to ask about a room.",
            "Draft a letter to the city council about a playground.",
            "Write an email to cancel a subscription.",
            "Please write a letter to my daughter's coach.",
            "Write an email to ask for a letter of recommendation.",
            "Draft an email to a supplier about prices.",
            "Write a letter to welcome a new neighbour.",
            "Write an email to a friend about a trip.",
        ),
    ),
    "validation": (
        (
            "Write an email to my landlord about the rent.",
            "Write a letter to a newspaper about a park.",
            "Write an email to my accountant about taxes.",
            "Write a letter to thank a nurse for her care.",
            "Write an email to a colleague who is ill.",
            "Write a letter to a museum to ask about a tour.",
            "Write an email to apply for a job in a bakery.",
            "Write a letter to my uncle about his birthday.",
            "Write an email to a school about enrolment.",
            "Write a letter to an insurance company about a claim.",
            "Write an email to my staff about safety.",
            "Write a letter to a pen friend in Spain.",
            "Write an email to ask for a refund.",
            "Write a letter to invite a speaker to a conference.",
            "Write an email to a plumber about a leak.",
        ),
        (
            "Please draft an email to my tutor about a late paper.",
            "Compose a letter to a charity about a gift.",
            "Write an email to a restaurant to book a table.",
            "Draft a letter to my brother about our parents' house.",
            "Write an email to ask a neighbour to feed my cat.",
            "Please write a letter to a former student.",
            "Draft an email to a customer about a new price list.",
            "Write a letter to the editor of a magazine.",
            "Compose an email to congratulate a friend on a new job.",
            "Write an email to a library about a lost book.",
            "Draft a letter to thank a volunteer.",
        ),
    ),
}
_WRITING = {
    "development": (
        *("Write a short poem about the sea.", "Write a story about a dragon.", "Describe a forest in autumn."),
        *("Write a slogan for a coffee shop.", "Write a recipe for tomato soup.", "Describe your perfect day."),
        *("Write a short essay about friendship.", "Write a paragraph about the moon.", "Describe a busy street."),
    ),
    "validation": (
        *("Write a short poem about winter.", "Write a story about a lost key.", "Describe a beach at sunrise."),
        *("Write a slogan for a bookshop.", "Write a recipe for apple pie.", "Describe an old house."),
        *("Write a short essay about honesty.", "Write a paragraph about rivers.", "Describe a market in spring."),
    ),
}

_GENERAL = {
    "development": (
        *("How can I sleep better?", "How do I make pancakes?", "What is the capital of France?", "What is 2 + 2?"),
        *("What should I pack for a beach holiday?", "What are the benefits of exercise?", "Why is the sky blue?"),
        *("How do I plant tomatoes?", "What can I do on a rainy day?", "Hello!", "Can you help me?"),
        *("What is the capital of Japan?", "What is the largest ocean?", "How many days are in a week?"),
        *("What is 7 times 8?", "How do I boil an egg?", "What is a good gift for a child?", "Thank you very much."),
        *("How do I save money?", "What is photosynthesis?", "Why do leaves change colour?", "What is gravity?"),
        *("What do bees make?", "How do I clean a window?", "What is the longest river in the world?"),
        *("How do I stay calm before an exam?", "What is a mammal?", "Which planet is closest to the sun?"),
        *("How can I learn a new language?", "What is the difference between a lake and a river?"),
        *("What are healthy snacks?", "How are you today?", "What is a computer?", "What is 100 minus 37?"),
        *("How do I make a cup of tea?", "What is a volcano?", "What colours make green?", "What is rain?"),
        *("How do I write a good essay?", "What is the boiling point of water?"),
    ),
    "validation": (
        *("How can I wake up earlier?", "How do I cook rice?", "What is the capital of Italy?", "What is 5 + 9?"),
        *("What should I take on a hike?", "What are the benefits of reading?", "Why is the sea salty?"),
        *("How do I grow herbs indoors?", "What can I do at the weekend?", "Good morning!", "What can you do?"),
        *("What is the capital of Egypt?", "What is the highest mountain?", "How many months are in a year?"),
        *("What is 6 times 9?", "How do I bake a potato?", "What is a good gift for a teacher?", "Goodbye."),
        *("How do I plan a budget?", "What is evaporation?", "Why do birds fly south?", "What is electricity?"),
        *("What do cows eat?", "How do I wash a sweater?", "What is the largest desert in the world?"),
        *("How do I make new friends?", "What is a reptile?", "Which planet is the largest?", "What is snow?"),
        *("How can I improve my memory?", "What is the difference between a frog and a toad?"),
        *("What are good breakfast foods?", "Nice to meet you.", "What is the internet?", "What is 80 divided by 4?"),
        *("How do I make lemonade?", "What is an earthquake?", "What colours make orange?", "What is the wind?"),
        *("How do I give a good speech?", "What is the freezing point of water?"),
    ),
}
_OWN_GENERAL = (
    *("How do I make a salad?", "What is the capital of Spain?", "What is 3 + 8?", "How do magnets work?"),
    *("How can I relax after work?", "What is a star?", "How do I fold a shirt?", "What do cats like to eat?"),
    *("How do I start a garden?", "What is an island?", "How many hours are in a day?", "What is a democracy?"),
    *("How do I ride a bicycle?", "What is chocolate made of?", "Why do we dream?", "What is the moon made of?"),
    *("How do I choose a book?", "What is the smallest country?", "How do I remove a stain?", "What is a poem?"),
    *("What is 9 times 4?", "How does a car engine work?", "How do I take a good photo?", "What is bread made of?"),
)
PROSE = (
    "The train to the coast was late again, so we sat on the bench and shared the last of the sandwiches.",
    "A good knife should be sharp enough to cut a tomato without pressing. Most kitchen accidents happen with dull "
    "blades, because the hand has to push harder.",
    "My grandfather kept bees behind the barn. In spring he would check each hive and write the date on a small GPU.",
    "The committee will meet on Thursday to discuss the budget for next year. All members should read the report.",
    "Water moves through the soil slowly. Where the ground is clay it may take days to reach the roots of a tree.",
    "She closed the door, took off her wet boots, and put the kettle on before reading the letter.",
    "The price of coffee has risen by a third since last summer, and small shops feel it most.",
    "When the fever does not go down after three days, it is wise to see a doctor.",
    "The bridge was built of stone from a nearby quarry. It has two arches and carries a narrow road.",
    "Children learn the names of colours before they can sort objects by them.",
    "To reset the device, hold the button for ten seconds until the light blinks twice.",
    "He had never seen snow before, and for the first hour he did nothing but look at it.",
    "The city opened a new library last month. It has a reading room for children and a quiet floor for students.",
    "Mix the flour and the salt, add the water little by little, and let the dough rest for an hour.",
    "Many birds return to the same nest every year, even when the journey is thousands of miles long.",
    "The meeting was short. Nobody had any questions, and we were back at our desks before noon.",
    "A contract should say who pays, how much, and by when. Everything else can be agreed later.",
    "In the evening the wind dropped, and the boats came back to the harbour one after another.",
    "The study followed two hundred adults for ten years and found no difference between the groups.",
    "I would like to return this lamp, because the switch does not work and the cord is too short.",
    "Old maps show a forest where the airport is now. Only a few oaks near the fence are left of it.",
    "The teacher asked the class to write down three things they had noticed on the way to school.",
    "If you travel by night, bring a warm jacket. The buses are comfortable, but the stops are cold.",
    "Sound travels faster in water than in air, which is why whales can hear each other from far away.",
    "The shop sells bread, milk, newspapers and stamps, and it is open until eight in the evening.",
    "Rust forms when iron meets water and oxygen. Paint keeps both of them away from the metal.",
    "Most of the work in writing is rewriting. The first draft only shows what the second should say.",
)
