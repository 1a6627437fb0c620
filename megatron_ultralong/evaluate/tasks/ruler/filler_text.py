"""Words, numbers and filler sentences for RULER's prompts, all of them this project's own and drawn from a
seed."""

from __future__ import annotations

import json
import random
import re
import string
import uuid
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.io.git_lfs import refuse_pointer

ADJECTIVES = tuple(
    """
able amber ample ancient arctic autumn azure bare bashful bitter bleak blue blunt bold brave breezy brief bright brisk broad
bronze brown busy calm candid careful cheerful chilly clean clear clever cloudy coastal cold cool cosy crimson crisp curious
curly curved daily damp dapper dark daring dear deep dense dim distant dizzy double dreamy dry dull dusty eager early earnest
easy eastern elder elegant empty endless entire equal even evening exact faint fair faithful famous fancy fast feeble festive
fierce final fine firm flat fluffy fond formal fragile free fresh friendly frosty frugal full funny gentle genuine giant glad
gleaming glossy golden good grand grateful green grey happy hardy harsh hasty hazy hearty heavy hidden high hollow honest huge
humble icy idle inner ivory jolly joyful keen kind large late lazy lean lively local lofty lonely long loud loyal lucky lunar
mellow merry mighty mild misty modest morning mossy muddy mute narrow native neat new nimble noble northern novel odd old olive
open orange outer pale patient peaceful pleasant plump polite proud public pure purple quaint quick quiet rapid rare ready red
regal rich ripe robust rocky roomy rosy rough round royal rural rusty sacred salty sandy scarlet secret serene shady sharp shiny
short shy silent silky silver simple sleepy slender slim slow small smart smooth snowy sober soft solar solid sonic southern
spare speedy spicy spiral spring square steady steep stern stiff still stormy stout strict strong sturdy subtle sudden summer
sunny super sweet swift tall tame tender thick thin tidy tiny tough tranquil true tufted turquoise upper urban useful vague
valid vast velvet violet vivid warm wary wavy western wet whole wide wild wise witty wooden woolly yellow young zesty
""".split()
)
NOUNS = tuple(
    """
acorn album alley almond anchor angle ankle antler apple apron arcade arch arrow artist aspen atlas attic avenue badge badger
bakery balcony bamboo banana banjo banner barley barn barrel basin basket bay beacon bead beak bean beard beaver bell belt bench
berry birch bison blanket blossom board boat bonnet book boot border bottle boulder bowl box bracket branch bread breeze brick
bridge brook broom brush bucket buckle bud bugle bulb bundle button cabin cable cactus cake camel camera canal candle canoe
canvas canyon cape captain card carpet carriage carrot cart castle cave cedar cello chain chair chalk chapel cherry chest
chimney cider cinema circle citrus clay cliff cloak clock cloth cloud clover coach coast coat cobbler coffee coin collar comet
compass concert copper coral cork corn corner cottage cotton couch cradle crane crate crater creek crew cricket crown crumb
crystal cup curtain cushion cypress daisy dairy dance dawn deck deer delta desert desk dial diary dinner dish dock dolphin dome
donkey door dough dove dragon drawer dress drum duck dune eagle easel echo elbow elk elm ember emerald engine envelope fabric
falcon farm feather fence fennel fern ferry fiddle field fig finch finger fir fjord flag flame flask fleet flint flock flour
flower flute foam fog folder forest forge fork fossil fountain fox frame friend frog fruit funnel gallery garden garlic garment
gate gazelle ginger giraffe glacier glade glass globe glove goat goose gorge grain granite grape gravel grove guest guitar gull
hall hammer hammock harbour hare harp harvest hat hawk hazel heart hedge heron hill hinge holly honey hood hook horizon horn
horse hotel house hut inkwell inlet iris island jacket jar jasmine jetty jewel jigsaw journal jug juniper kayak kettle key
kingdom kitchen kite kitten knight knot ladder lagoon lake lamb lamp lane lantern lark laurel lawn leaf leather lemon lens
letter library lid lilac lily lime linen lion lizard lobby locket log loom lotus lunch lute magnet mango mantle map maple marble
market marsh mask mast meadow medal melon mill mint mirror mitten moat monkey moon moose mosaic moss motel moth mountain mouse
mug mushroom music napkin needle nest net nickel night notebook nutmeg oak oar oasis oat ocean office onion opal orchard orchid
otter oven owl oyster paddle page palace palm pancake panda panel paper parade parcel park parrot path pavement peach peak pear
pebble pelican pen pencil pepper petal piano picnic pier pigeon pillow pilot pine pitcher plain planet plate plaza plum pocket
poem pond pony poplar poppy porch port postcard potato pottery prairie puddle puffin pumpkin puppet puzzle quail quarry quartz
quilt quiver rabbit radio raft railway rain rainbow ranch raven ravine reed reef ribbon rice ridge ring river road robin rocket
roof room rope rose rudder rug saddle saffron sail salad salmon sand satchel saucer scarf school screen seal seed shadow shawl
sheep shelf shell shelter ship shirt shoe shop shore shovel signal sister skate sketch sky sled sleeve slope snail snow sofa
song sparrow spindle spoon spruce squirrel stable stage staircase stamp star statue steam stone stool stork storm story stove
straw stream street string studio suitcase sun swallow swan sweater table tailor teacup temple tent terrace thimble thistle
thread throne thumb thunder ticket tiger timber toast tomato torch tower town toy track trail train tray treasure tree trumpet
trunk tulip tunnel turnip turtle twig umbrella uncle valley vase vest village vine viola violin visitor wagon wallet walnut
walrus water waterfall wave weaver wharf wheat wheel whistle willow wind window winter wolf wood wool wren yard yarn yacht zebra
""".split()
)
SINGLE = [*ADJECTIVES, *NOUNS]
# No word is in both lists, so every pair occurs once.
PAIRS = len(ADJECTIVES) * len(NOUNS)
WORDS = PAIRS + len(NOUNS) * (len(NOUNS) - 1)
"""Number of distinct words that `word` returns: adjective-noun pairs, then pairs of two nouns."""

# Slots of the sentences: who, does, what, where, when.
_WHO = (
    "the old gardener | a young painter | the ferryman | my neighbour | the baker's daughter | a tired traveller | the "
    "librarian | the miller | a stranger from the coast | the postman | our teacher | the watchmaker | a shepherd | the "
    "night guard | the innkeeper | a group of students | the carpenter | the choir | one of the sailors | the doctor | the "
    "mayor | a beekeeper"
).split(" | ")
_DOES = (
    "carried | mended | painted | counted | described | hid | borrowed | measured | sold | remembered | washed | admired | "
    "copied | lost | collected | folded | photographed | built | moved | covered | examined | polished"
).split(" | ")
_WHERE = (
    "behind the mill | near the harbour | at the edge of the forest | on the upper floor | beside the well | in the empty "
    "hall | under the bridge | along the river | in front of the station | across the square | at the market | by the "
    "garden wall | in a narrow lane | on the hillside | below the tower | outside the village"
).split(" | ")
_WHEN = (
    "before sunrise | late in autumn | on a wet afternoon | during the first snow | after supper | in the week of the fair "
    "| when the bells had stopped | early in March | on the longest day of the year | after the storm | at noon | between "
    "two trains | in the quiet hours | once the lamps were lit | while it rained | on the last Sunday of the month"
).split(" | ")
_WHY = (
    "because nobody else wanted to | as the custom was | to everyone's surprise | without saying a word | for the third "
    "time | though it was hardly needed | and told the story for years | as if it were a secret | just to be sure | and "
    "went home content | which took longer than planned | since the days were getting shorter | with great care | for a few "
    "coins | and nobody asked why"
).split(" | ")
_FRAMES = (
    "{who} {does} the {what} {where} {when}.",
    "{when}, {who} {does} the {what} {where}.",
    "{who} {does} the {what} {where}, {why}.",
    "{where}, {who} {does} the {what} {why}.",
    "{when}, {who} {does} the {what}, {why}.",
    "{who} {does} the {what} {when}, {why}.",
    "nobody knew that {who} {does} the {what} {where} {when}.",
    "it is said that {when} {who} {does} the {what} {why}.",
)


def word(index: int) -> str:
    """One of `WORDS` hyphenated pairs of words: an adjective and a noun below PAIRS, two nouns from there
    on."""
    if index < PAIRS:
        return f"{ADJECTIVES[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}"
    first, second = divmod(index - PAIRS, len(NOUNS) - 1)
    return f"{NOUNS[first]}-{NOUNS[second + (second >= first)]}"


def draw(rng: random.Random, kind: str) -> str:
    """Draw a key or value of a needle: words (an adjective and a noun), numbers (7 digits) or uuids (version
    4)."""
    if kind == "words":
        return word(rng.randrange(PAIRS))
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    return "".join(rng.choices(alphabet, k=count))


def sentence(rng: random.Random) -> str:
    """Draw one of more than a hundred million filler sentences of 8 to 25 words."""
    what = rng.choice(ADJECTIVES) + " " + rng.choice(NOUNS)
    text = rng.choice(_FRAMES).format(
        who=rng.choice(_WHO),
        does=rng.choice(_DOES),
        what=what,
        where=rng.choice(_WHERE),
        when=rng.choice(_WHEN),
        why=rng.choice(_WHY),
    )
    return text[0].upper() + text[1:]


def read_haystack(paths: tuple[Path, ...]) -> list[str]:
    """Read the sentences of text files, in order, with white space joined; of a .json its field `text`, which
    RULER's own script writes the essays to. UserError where a file cannot be read or contains no text."""
    pieces: list[str] = []
    for path in paths:
        refuse_pointer(path)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                text = json.loads(text)["text"]
            if not isinstance(text, str):
                raise ValueError("`text` is not a string")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--haystack {path}: cannot be read as text ({error})") from None
        pieces += [
            joined for piece in re.split(r"(?<=[.!?])\s+", text) if (joined := " ".join(piece.split()))
        ]
    if not pieces:
        raise UserError("--haystack: the files contain no text")
    return pieces
