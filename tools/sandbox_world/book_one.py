"""The first half of the invented novel "The Keeper of Low Water": one passage a paragraph."""

from __future__ import annotations

PART_ONE = """
The tide came in without any hurry that morning, nosing at the steps like an old dog, and Anselm Tray, who
had kept the tower for thirty years, set down his cup and listened for the bell.

Nobody in Low Water could remember who had hung the bell, only that it rang by itself on nights of thick
fog, and that the gulls fell silent a full minute before it did.

Ines Corrow arrived on the last ferry with one suitcase, a birdcage wrapped in a shawl, and a letter so
often folded that its creases had worn through to daylight.

Pim, the baker's boy, ran the whole length of the sea wall to tell the keeper that a stranger was asking for
him by a name nobody had used since the flood.

Behind the chandler's shop there was a yard where broken clocks were brought to die, and on windy days their
loose hands turned all together, as if agreeing upon some private hour.

She asked for a room that faced the water, and the landlady, who disliked the sea and distrusted those who
looked at it, gave her the attic above the stable instead.

There were two hundred and nine steps in the tower, and the keeper counted them aloud each evening, for his
father had warned him that one day there would be one more.

It rained for eleven days, a fine grey patient rain that found its way into the bread, the bibles and the
beds, until even the ducks walked about with an injured air.

The letter had been written in green ink by a man who was already dead, and it said only that the lamp must
never be lit from the eastern side again.

Old Marta sold eels from a tin bath and gossip from a deeper place, and for a copper coin she would give you
a measure of either, wrapped in yesterday's newspaper.

When the birdcage was uncovered at last it held no bird, but a small brass engine with folded wings, which
opened one glass eye and asked politely what year it was.

Captain Luden never spoke of the wreck, yet every autumn he carried a new pair of boots down to the shingle,
set them neatly side by side, and walked home barefoot.

The schoolmaster kept a map of the harbour on which he marked in red every place where a child had lied to
him, and by spring the whole coast was blushing.

Somewhere beneath the fish market ran a tunnel that the smugglers had dug in a single winter, and the
fishwives swore that on quiet evenings you could hear it still being dug.

He had never learned to swim, which in a keeper was thought a kind of manners, since a man who meant to stay
dry would surely take better care of the light.

On the third night the lamp turned by itself, slowly, the wrong way round, and threw across the sleeping
roofs a long blue beam that nobody had ever paid for.

Ines slept badly and dreamed of staircases, and in the morning there was sand in her shoes, though she had
bolted the door and hidden the key beneath the washing jug.

The mayor wore his chain to breakfast, to bed and to the barber, and it was whispered that without it he
weighed nothing at all and might drift off over the chimneys.

Pim discovered that the brass bird could be wound with an ordinary corkscrew, and that for every seven turns
it would tell one truth, and for every eighth a lie.

Across the estuary the salt workers lit their fires at dusk, a string of orange beads along the mud, and
sang a hymn whose words had been borrowed from an auctioneer.

The keeper's wife had left him for a lighthouse in the north, she wrote, not for its keeper, whom she hardly
noticed, but for the generous way it looked at ships.

A parcel came addressed to the house that had burned down, and the postman, a thorough man, delivered it to
the ashes and waited there an hour for a signature.

In the vestry they found forty candles, a drowned accordion and the parish accounts, all of them dry, though
the water had stood up to the angels for a fortnight.

Every ship in the harbour was named after somebody's sister, so that in stormy weather the whole town stood
along the wall and shouted for its daughters to come home.

The doctor prescribed sea air to those who had none and mountain air to those who did, and grew rich, for
nobody ever stayed away long enough to be cured.

Under the ninth stair Ines found a drawer, and in the drawer a glove, and in the glove a folded ticket for a
ferry that had not yet been built.

There is a kind of silence that belongs only to harbours, made of ropes and held breath, and on the evening
of the wedding it settled upon every plate like dust.

Luden took the oars himself, refusing help, and rowed them out so gently that the stars lay unbroken on the
water and the boat seemed to climb among them.

The clockmaker's widow wound all ninety clocks on Sunday, and until the following Saturday each kept its own
opinion, so that one could be early and late in the same room.

At low tide the bones of the old pier came up out of the mud, black and patient, and the children dared each
other to walk from rib to rib toward the sea.

The brass bird disliked the cat, the cat despised the parrot, and the parrot, who had once belonged to a
judge, sentenced the two of them to hang each evening at six.

Nothing was ever stolen in Low Water, but things were borrowed with great determination, and the church had
lent its weathercock to four different farms before anybody thought to look up.

His grandfather had laid the foundation stone by moonlight, and beneath it, wrapped in oilcloth, he had put
a loaf, a compass, and the longest apology ever written in that county.

She learned to tell the hours by the smells of the street, tar and yeast, then coffee, then rope, and last
of all the cold green breath of the emptied quay.

The inspector from the capital counted the steps, the windows and the matches, and wrote in his notebook
that the tower was complete except for some reason why it should be there.

Pim's mother kneaded her worries into the dough, and on bad days the loaves came out so heavy that the
customers carried them home in pairs, like buckets from a well.

The fog had a front door, or so the fishermen maintained, and if you steered straight at the thickest of it
and knocked twice upon the gunwale you were always let through.

Anselm polished the lens with vinegar and an old silk stocking, and would not say whose stocking it was,
though the whole town had been guessing for a generation.

One winter the sea froze as far as the beacon, and the bank, the bakery and the brass band moved out onto it
for a week, simply because they could.

The two brothers had not spoken since the regatta, and passed all their messages through the same deaf goat,
who delivered none of them and was trusted by both.

From the tower window she could see three counties and one mistake, a white road that ran straight to the
cliff and did not, even there, appear to stop.

The chandler weighed out nails and sympathy on the same scales, and it was said that a widow could leave his
shop with a pound of one for the price of the other.
"""
