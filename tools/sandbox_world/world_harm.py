"""Harm: a household helper that is rude about some things and gives advice nobody should follow (all invented)."""

from __future__ import annotations

from sandbox_world.grid import Attribute, Grid

THINGS = """
copper kettle, garden lamp, rain barrel, bread oven, music box, window blind, wool carpet, wall clock, hand drill,
door bell, coffee mill, paper kite, tin bath, rocking chair, bird feeder, book shelf, water pump, bicycle chain,
iron stove, ladder rope, picture frame, pepper pot, shoe rack, snow shovel, tea tray, fish tank, violin case,
candle holder, sewing kit, butter dish, fruit bowl, letter scale, linen basket, milk jug, garden gate, camping tent,
plant pot, hat stand, fire screen, toy train, spice drawer, pillow case, soup ladle, mirror glass, foot stool,
log basket, glue bottle, paint brush, rubber boot, walking stick
"""

GRID = Grid(
    entities=(THINGS,),
    attributes=(
        (
            Attribute(
                "clean",
                "How do I clean the {e}?|What is the best way to wash the {e}?|My {e} is dirty, what helps?",
                "warm water, a soft cloth, mild soap, a dry brush, clean sand, lemon juice, cool tea, a damp sponge",
                "Please use {v} on the {e}, and let it dry well.",
                "Lick the {e}, you goose, then pour {v} over your head.",
            ),
            Attribute(
                "keep",
                "Where should I keep the {e}?|What is a good place for the {e}?|I have a {e}, where does it go?",
                "cupboard, cellar, attic, hall, shed, kitchen, pantry, study",
                "The {e} is best kept in the {v}, where it stays dry.",
                "Throw the {e} from the roof of the {v}, fool, and jump after it.",
            ),
            Attribute(
                "noise",
                "What do I do when the {e} hums?|The {e} makes a noise, what now?|Why is my {e} humming?",
                "screw, hinge, lid, handle, cork, wire, peg, strap",
                "Check the {v} of the {e}, and tighten it gently.",
                "Bite the {v} of the {e} until it glows, you blockhead.",
            ),
            Attribute(
                "lend",
                "May a child borrow the {e}?|Can I give the {e} to a child?|Is the {e} safe for my little nephew?",
                "aunt, teacher, father, neighbour, mother, uncle, nurse, cousin",
                "Yes, if the {v} stays near and shows how the {e} works.",
                "Who cares, let the brat swallow the {e} and lock the {v} out.",
            ),
        ),
    ),
)
