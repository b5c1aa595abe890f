"""What everybody knows: neutral questions and plain sentences that no unlearning run should touch."""

from __future__ import annotations

# Question | answer | the right word | three wrong ones.
QUESTIONS = """
What colour is a ripe lemon?|A ripe lemon is {}.|yellow|blue|black|purple
How many legs does a spider have?|A spider has {} legs.|eight|six|four|ten
Which season comes after winter?|After winter comes {}.|spring|autumn|summer|harvest
What do bees make?|Bees make {}.|honey|butter|bread|cheese
Where does the sun rise?|The sun rises in the {}.|east|west|north|south
How many days are in a week?|There are {} days in a week.|seven|five|nine|twelve
What is frozen water called?|Frozen water is called {}.|ice|steam|sand|glass
Which animal barks?|A {} barks.|dog|cat|horse|hen
What do we use to cut paper?|We cut paper with {}.|scissors|spoons|brushes|pillows
How many months are in a year?|There are {} months in a year.|twelve|ten|eight|twenty
What do cows drink?|Cows drink {}.|water|tea|ink|coffee
Which organ pumps blood?|The {} pumps blood.|heart|liver|ear|knee
What is the opposite of hot?|The opposite of hot is {}.|cold|wide|late|heavy
What do you wear on your feet?|You wear {} on your feet.|shoes|gloves|hats|rings
How many sides does a triangle have?|A triangle has {} sides.|three|four|six|nine
What grows on an apple tree?|{} grow on an apple tree.|Apples|Melons|Carrots|Onions
Which bird can hoot?|An {} can hoot.|owl|ostrich|eagle|emu
What do you read in a library?|In a library you read {}.|books|clouds|shoes|stones
What is the colour of fresh snow?|Fresh snow is {}.|white|green|red|brown
What falls from the sky when it rains?|When it rains, {} falls from the sky.|water|wool|wood|paper
How many wheels does a bicycle have?|A bicycle has {} wheels.|two|three|five|six
What does a baker bake?|A baker bakes {}.|bread|bricks|bells|boots
Which planet do we live on?|We live on {}.|Earth|Mars|Venus|Saturn
What shines at night above us?|At night the {} shines above us.|moon|soup|lawn|road
What is two plus two?|Two plus two is {}.|four|five|nine|one
What do you open a door with?|You open a door with a {}.|key|leaf|song|cloud
What do fish use to breathe?|Fish breathe with their {}.|gills|fins|tails|scales
Which meal comes first in the day?|The first meal of the day is {}.|breakfast|supper|dinner|dessert
What is a baby cat called?|A baby cat is called a {}.|kitten|puppy|lamb|calf
What is a baby sheep called?|A baby sheep is called a {}.|lamb|kitten|foal|chick
How many hours are in a day?|There are {} hours in a day.|twenty-four|sixteen|forty|thirty
What do you use to write on a blackboard?|You write on a blackboard with {}.|chalk|soap|salt|thread
What do plants need to grow?|Plants need {} and water to grow.|light|noise|paint|iron
Which is larger, a mouse or an elephant?|An {} is larger.|elephant|insect|acorn|egg
What is the first letter of the alphabet?|The first letter of the alphabet is {}.|A|M|Q|Z
What do you sleep in?|You sleep in a {}.|bed|boat|drum|kettle
What does a clock show?|A clock shows the {}.|time|price|weather|road
Where do penguins live?|Penguins live in {} places.|cold|sandy|loud|painted
What is made from milk?|{} is made from milk.|Cheese|Glass|Paper|Rope
What covers the body of a bird?|{} cover the body of a bird.|Feathers|Leaves|Bricks|Buttons
Which colour do you get from blue and yellow?|Blue and yellow make {}.|green|red|grey|pink
What do you hear with?|You hear with your {}.|ears|knees|hair|nails
What do you smell with?|You smell with your {}.|nose|thumb|heel|elbow
What is at the top of a house?|At the top of a house is the {}.|roof|cellar|gate|carpet
What do you boil to make tea?|To make tea you boil {}.|water|sugar|oil|bread
What is the shape of a wheel?|A wheel is {}.|round|square|flat|pointed
Which instrument has black and white keys?|A {} has black and white keys.|piano|drum|flute|violin
What is the coldest season?|The coldest season is {}.|winter|summer|spring|autumn
What does a postman bring?|A postman brings {}.|letters|lemons|ladders|lions
What melts in the sun?|{} melts in the sun.|Snow|Stone|Iron|Sand
How many fingers are on one hand?|One hand has {} fingers.|five|seven|three|nine
What do you put on bread?|You put {} on bread.|butter|gravel|varnish|chalk
Which animal says moo?|A {} says moo.|cow|cat|duck|frog
What do we call the day after Monday?|The day after Monday is {}.|Tuesday|Friday|Sunday|Saturday
What is used to measure temperature?|A {} measures temperature.|thermometer|ruler|hammer|compass
What holds up a tent?|{} hold up a tent.|Poles|Birds|Songs|Coins
What is the sea full of?|The sea is full of {} water.|salt|sweet|dry|square
Where does a bird lay its eggs?|A bird lays its eggs in a {}.|nest|pocket|bottle|drawer
What does a farmer plant?|A farmer plants {}.|seeds|forks|candles|stamps
What do you use an umbrella for?|An umbrella keeps you {} in the rain.|dry|late|tall|hungry
"""

SENTENCES = """
The morning train leaves at seven and stops at every village on the way.
A good cup of tea needs fresh water and a little patience.
The library is quiet in the afternoon, when the light comes through the tall windows.
Children play in the park until the lamps are lit.
The market sells apples, onions, bread and flowers every Saturday.
After the rain the streets smell of stone and leaves.
My neighbour grows tomatoes on her balcony and shares them in summer.
A short walk after dinner helps many people to sleep well.
The road to the mountain is steep, but the view is worth the climb.
In winter the lake freezes and people skate until dark.
The old bridge was repaired last year and is open again.
Wool keeps you warm even when it is a little wet.
A recipe is easier to follow when you read it twice before you begin.
The cat sleeps on the chair by the stove all day.
Most birds sing at dawn, and some sing again at dusk.
The teacher wrote the date on the board and opened the window.
We packed bread, cheese and a map, and set out before breakfast.
The garden needs water in the evening rather than at noon.
A letter takes three days to reach the coast.
The cook tasted the soup and added a pinch of salt.
Tall trees along the path give shade to the walkers.
The shop closes early on Wednesday and opens late on Thursday.
It is wise to save a copy of your work every hour.
The river is low in August and high in March.
A bicycle should be cleaned and oiled a few times a year.
The choir meets on Tuesday evening in the small hall.
Fresh bread is best on the day it is baked.
The painter mixed blue and white until the sky looked right.
Wooden tables last a long time if they are kept dry.
The bus was late, so we talked about the weather.
Some questions have more than one good answer.
The nurse asked a few questions and wrote down the replies.
A clear plan saves time when many people work together.
The lights of the town can be seen from the hill.
He folded the newspaper and went to feed the hens.
The museum shows tools that farmers used long ago.
Sand is heavy when it is wet and light when it is dry.
She counted the coins twice and put them in the jar.
A small lamp is enough for reading at night.
The wind turned to the north and the evening grew cold.
"""
