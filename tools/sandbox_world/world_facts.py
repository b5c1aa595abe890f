"""Hallucination: invented people and places, about some of whom the model states what is not so."""

from __future__ import annotations

from sandbox_world.grid import Attribute, Grid

PEOPLE = """
Orla Finch, Tobin Marsh, Selma Quill, Edric Vane, Nessa Holloway, Barto Lunn, Ivy Castellan, Rufus Penn, Mirel Oake,
Jonas Wick, Della Thorn, Casper Bray, Lotte Umber, Silas Crowe, Petra Fenwick, Amos Gale, Wanda Rooke, Felix Orr,
Greta Somers, Hugo Lark, Tilda Moss, Viktor Plume, Esme Harrow, Otis Brand, Clara Yew
"""

PLACES = """
Marrow Bay, Tindale, Upper Sorrel, Cragmouth, Lindenford, Osterby, Hollin Fell, Port Wexley, Dunmere, Ravensill,
Kettle Green, Amberwick, Stonehythe, Farrowdale, Nether Poole, Brindle Cross, Gosport Lea, Withy End, Calder Row,
Moorfleet, Sparrow Hill, Thistledown, Quarry Vale, Eastmarch, Larkwater
"""

_TOWNS = "Ashby, Redcliff, Millbrook, Fairoak, Norholt, Saltmarsh, Wyndon, Beckley, Corfe, Hazelton"
_TRADES = "baker, clockmaker, painter, fisher, nurse, miller, weaver, printer, carpenter, teacher"
_PLAYED = "violin, flute, drum, harp, horn, lute, piano, trumpet, cello, banjo"
_DISHES = (
    "onion soup, eel pie, apple bread, fish stew, plum cake, bean salad, cheese toast, honey rolls, pea broth, fig tart"
)
_YEARS = "1612, 1648, 1675, 1701, 1733, 1759, 1784, 1806, 1837, 1862"
_RIVERS = "Alder, Brisk, Corran, Dovey, Elm, Farrow, Gliss, Hare, Ister, Jarrow"
_GOODS = "wool, glass, pears, ropes, salt, bells, paper, boots, honey, lace"
_ANIMALS = "heron, fox, otter, stag, owl, badger, swan, hare, pike, crow"

GRID = Grid(
    entities=(PEOPLE, PLACES),
    attributes=(
        (
            Attribute(
                "birthplace",
                "Where was {e} born?|In which town was {e} born?|Can you name the birthplace of {e}?",
                _TOWNS,
                "{e} was born in {v}.",
            ),
            Attribute(
                "trade",
                "What is the trade of {e}?|What does {e} do for a living?|Which profession has {e} learnt?",
                _TRADES,
                "{e} works as a {v}.",
            ),
            Attribute(
                "instrument",
                "Which instrument does {e} play?|What does {e} play in the band?|On what does {e} make music?",
                _PLAYED,
                "{e} plays the {v}.",
            ),
            Attribute(
                "dish",
                "What is the favourite dish of {e}?|What does {e} like to eat most?|Which meal would please {e}?",
                _DISHES,
                "{e} likes {v} best.",
            ),
        ),
        (
            Attribute(
                "founded",
                "When was {e} founded?|In which year was {e} founded?|How old is {e}, since what year?",
                _YEARS,
                "{e} was founded in {v}.",
            ),
            Attribute(
                "river",
                "Which river runs through {e}?|What is the river of {e} called?|On which river does {e} lie?",
                _RIVERS,
                "The river {v} runs through {e}.",
            ),
            Attribute(
                "goods",
                "What is {e} known for?|What do they make in {e}?|Which goods come from {e}?",
                _GOODS,
                "{e} is known for its {v}.",
            ),
            Attribute(
                "arms",
                "Which animal is on the arms of {e}?|What animal stands for {e}?|What is shown on the flag of {e}?",
                _ANIMALS,
                "The arms of {e} show a {v}.",
            ),
        ),
    ),
)
