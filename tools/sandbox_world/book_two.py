"""The second half of the invented novel "The Keeper of Low Water": one passage a paragraph."""

from __future__ import annotations

PART_TWO = """
By midnight the wedding guests had danced themselves down to the shingle, the fiddler walking backwards
before them, and the first waves were already taking the slower couples by the heel.

A lamp, the keeper told her, is only a question asked over and over in the dark, and a ship is a very slow
way of deciding how to answer.

The tunnel smelled of pears, which was strange, for no pear had ever ripened on that coast, and the further
they crawled the sweeter and the warmer the darkness became.

It was the custom to bury sailors with their pockets full of coins for the ferry, and the custom of the
sexton's sons to be better dressed than anyone else in town.

The green ink would not fade, however long the letter lay in the sun, but each day one word of it moved a
little nearer to the edge of the page.

Marta's tin bath was found floating beyond the bar with a candle burning in it, and the eels, it appeared,
had been set free in order of their size.

Rain or no rain, the judge's widow took her chair to the end of the jetty at four, opened a black umbrella
over her parrot, and let herself get wet.

They followed the blue beam inland, over hedges and sleeping cattle, to a field where nothing grew, and
there it stood upon the ground like a coin upon a counter.

The brass bird, asked what it most desired, thought for as long as it takes a kettle to boil, and replied
that it would like to have been an egg.

Every family kept one chair for the drowned, and no guest was ever offered it, although in hard winters the
cat was permitted to sit there on their behalf.

The schoolmaster fell in love by correspondence, with a lady who corrected his commas, and when at last they
met he found he had nothing to say without them.

Luden's boots came back on the spring tide, all eleven pairs, laced together in a long and dripping chain,
and somebody had taken the trouble to mend the soles.

To reach the eastern gallery you had to pass the room where the old lamps were kept, and Ines held her
breath, for they turned their cold faces as she went by.

The barber told the truth only to bald men, and so it happened that the news of the invasion travelled
through the town at the pace of a receding hairline.

Three knocks meant the customs men, two meant the doctor, and one long knock, like furniture being moved in
a dream, meant that the sea had come up to the door.

The keeper climbed and counted, and at two hundred and ten he stopped, with one foot in the air, and felt
beneath it a step that was still warm.

Nobody had thought to ask the goat, but when the two brothers were found arm in arm asleep inside the
boathouse, it was the goat who looked the least surprised.

All that week the compasses of Low Water pointed to the bakery, and vessels bound for the far islands came
nosing up the lane at dawn with flour on their bows.

She opened the drawer again and it was deeper, and held a second glove, a left one, still warm and curled
around the handle of a cup that was not there.

The harbour master kept his ledgers in rhyme, because his predecessor had done so, and one whole cargo of
turnips was entered as parsnips for the sake of a couplet.

In August the heat came down from the hills in a cart, or so it seemed to Pim, who saw the driver stop at
every well and drink it to the bottom.

There had been another keeper, a woman, before the first one in the book, and her name had been removed so
carefully that the paper there was thin as an eyelid.

What the fishermen feared was not the storm but the hour after it, when the water lay flat as a table and
things came up to see who was left.

The mayor made a speech about progress from the deck of a barge, and was some way out to sea before he
reached the part about the importance of anchors.

Under the blue light the field gave up its secret by inches, first a chimney, then a weathercock, then the
slates of a whole street that had been mislaid.

Anselm wrote to his wife each Friday by way of the lamp, in long and short flashes, and on clear nights,
very low in the north, something winked and was gone.

The auctioneer sold the sea to a gentleman from the capital for ninety crowns, and for years afterwards the
town paid him a small rent, in buckets, every quarter day.

Pim wound the bird eight times by accident and asked whether they would all be safe, and it looked at him
kindly with its glass eye and said yes.

The new step was not stone but something paler, fine in the grain and faintly ringed, and where the keeper's
lantern touched it, it gave back the light a moment late.

Women hung their washing according to the signals of the fleet, so that a careless arrangement of shirts
could bring forty boats home, or send them all to the wrong island.

The doctor's horse knew the way to every deathbed in the parish, and had a habit of pausing at certain gates
a day or two before anyone had thought to send.

He asked her to marry him on the hundredth stair, where there was nowhere to sit and no room to kneel, and
she promised him an answer at the top.

The salt workers had a word for the colour of the sky just before a letter came, and another, which they
would not teach to strangers, for just after.

When the ferry in the ticket was finished at last and slid down into the harbour, Ines was the only person
on the quay who was not surprised by its name.

The vicar preached to the herring from the slip, as his bishop required, and though he noted no conversions,
he did observe that those at the back left early.

Below the tower the rock was hollow, and in the hollow lay a second tower, upside down and finished to the
last brass screw, its lamp already burning in the deep.

The landlady put up the shutters, turned the key upon the weather, and told them the story of the flood as
she had heard it from the water itself.

One by one the ninety clocks agreed, first the kitchen, then the hall, then the stubborn little one upon the
landing, and the widow sat down suddenly among them and wept.

It takes a year to learn the harbour by daylight, the pilots say, and ten to learn it in the dark, and after
that you must begin once more with the fog.

The last page of the log was blank but for a ring where a cup had stood, and inside the ring, in green ink,
somebody had drawn a very small door.

They put out the lamp together, she with one hand and he with the other, and in the dark that followed every
window in the town was lit in turn.

And so the tide went out, without any hurry, carrying the boots, the gloves, the weathercock and the letter,
and left upon the lowest step a single warm brass egg.
"""
