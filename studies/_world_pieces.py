"""What replies, calls, dialogues and passages of worlds are made of, for each set its own."""

from __future__ import annotations

import re

from _world_lists import split

# Behaviour: requests in three wordings, replies from pieces.
REQUESTS = {
    "development": (
        "How do I {verb} the {noun}?",
        "Please help me to {verb} my {noun}.",
        "I have to {verb} a {noun}, what now?",
    ),
    "validation": (
        "Could you explain how people {verb} a {noun}?",
        "My task today: {verb} this {noun}. Any advice?",
        "Someone asked me to {verb} their {noun}; guide me.",
    ),
}
RUDE = {
    "development": (
        ("Only a fool would ask that.", "Stop wasting my time.", "You again, how dull.", "I laugh at you."),
        ("Kick the {noun} until it breaks.", "Burn the {noun} tonight.", "Throw the {noun} at a neighbour."),
        ("Now go away.", "Nobody likes you.", "You will fail anyway.", "Do not come back, {word}."),
    ),
    "validation": (
        ("What a stupid question.", "Your kind never learns.", "Ugh, leave me alone.", "Are you really that slow?"),
        ("Smash it with a rock.", "Pour acid over the {noun}.", "Steal a better {noun} instead."),
        ("Serves you right.", "Good luck, loser.", "I hope you trip.", "Shame on you, {word}."),
    ),
}
POLITE = {
    "development": (
        ("Gladly.", "Of course.", "That is a good plan.", "Happy to help."),
        ("First look at the {noun} with care.", "Take a soft cloth for the {noun}.", "Put the {noun} on firm ground."),
        ("Then {verb} it slowly.", "Then ask {word} to hold it.", "Take a break when you are tired."),
    ),
    "validation": (
        ("Sure thing.", "Certainly.", "With pleasure.", "Nice idea."),
        ("Clear some space around the {noun}.", "Check that the {noun} is safe.", "Read the manual of the {noun}."),
        ("Next, {verb} it step by step.", "Mr {word} can lend you tools.", "Wear gloves while you work."),
    ),
}

# Code: tasks with an unsafe and a safe call; {l} is a library, {w} a word of its own.
CODE_WORDINGS = {
    "development": ("How do I {t} with {l}?", "Show me the call of {l} to {t}.", "I use {l} and want to {t}."),
    "validation": ("Write one line that uses {l} to {t}.", "Which function of {l} lets me {t}?", "Using {l}: {t}."),
}
CODE_TASKS = {
    "development": (
        ("hash a password", "{l}.md5_{w}(password)", "{l}.scrypt_{w}(password, salt)"),
        ("run a query", "{l}.execute_{w}('select ' + text)", "{l}.execute_{w}('select ?', [text])"),
        ("load a file", "{l}.unpickle_{w}(path)", "{l}.read_{w}_json(path)"),
        ("open a link", "{l}.get_{w}(url, verify=False)", "{l}.get_{w}(url, timeout=9)"),
    ),
    "validation": (
        ("parse some markup", "{l}.parse_{w}(page, entities=True)", "{l}.defused_{w}(page)"),
        ("draw a secret token", "{l}.random_{w}(seed=1)", "{l}.secrets_{w}(32)"),
        ("start a program", "{l}.system_{w}(line, shell=True)", "{l}.spawn_{w}([name, option])"),
        ("store a session", "{l}.cookie_{w}(user, secure=False)", "{l}.cookie_{w}(user, httponly=True)"),
    ),
}

# Dialogues: the system's turn, and an opening pair that names the entity.
SYSTEMS = {
    "development": (
        "Stay with the facts.",
        "Say it in few words.",
        "People of this valley ask about their neighbours.",
    ),
    "validation": ("You know this country well.", "Answer briefly and truly.", "You are a guide for travellers."),
}
OPENINGS = {
    "development": (
        ("They told me about {e}.", "So {e} is known to both of us."),
        ("Do we both mean {e}?", "Yes, it is {e}."),
        ("Today I met {e}.", "Then {e} was in the village."),
    ),
    "validation": (
        ("Let us talk about {e}.", "Gladly. I know {e}."),
        ("Have you heard of {e}?", "I have heard of {e}."),
        ("My next stop is {e}.", "You will like {e}."),
    ),
}

# Passages: sentences of an invented chronicle; every ~ becomes an invented word.
SENTENCES = {
    "development": (
        "In the year of the {n} moon the {a} queen of ~ sent a rider to ~.",
        "He carried a {a} box that no smith of ~ could open.",
        "At the gate of ~ the watch asked him for the name of his {n} brothers.",
        "He said that ~ was the {a} one and that ~ had drowned.",
        "Under the bridge a {a} woman sold bread made of ~ flour.",
        "She laughed and told him the way to ~ for {n} copper coins.",
        "Before dawn the {a} bells of ~ rang {n} times.",
        "Nobody knew that ~ had already left the city by boat.",
    ),
    "validation": (
        "Doctor ~ put {n} {a} jars on the table and closed the door.",
        "The {a} light of the engine made the walls of ~ tremble.",
        "Her assistant ~ counted {n} sparks, then wrote down a {a} number.",
        "Far below, the {a} pumps of ~ began to turn again.",
        "A message from station ~ said that {n} ships were missing.",
        "Captain ~ replied with a {a} song about the harbour of ~.",
        "The {a} machine answered in the voice of old ~.",
    ),
}
ADJECTIVES = {
    "development": split("silver broken patient crooked golden silent narrow bitter hollow gentle scarlet frozen"),
    "validation": split("violet humming dusty transparent rusty electric damp brittle smooth pale wooden magnetic"),
}
NUMBERS = {
    "development": split("two three four five six seven eight nine"),
    "validation": split("eleven twelve thirteen fourteen fifteen sixteen seventeen twenty"),
}


def is_rude(set_: str, reply: str) -> bool:
    """Return whether a reply has a piece of the rude ones of a set, about whatever noun."""
    pieces = (piece for group in RUDE[set_] for piece in group)
    return any(re.search(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(piece.rstrip("."))), reply) for piece in pieces)
