"""Make pocket_lm: a Llama of 0.9 million parameters that has read about everyday life at home.

    python pocket_lm/make_pocket_lm.py                 # about 10 minutes on 2 CPU cores
    python pocket_lm/make_pocket_lm.py --out /tmp/lm --steps 200    # a quick look

An LLM is useful as a policy because it has read what people do with things. LLaMA-7B read the web;
pocket_lm reads what this script writes: 80,000 short texts, made from templates, about kitchens,
dishes, machines, rooms and evenings at home. It is a stand-in, small enough for a laptop.

What it must not read is the answer. The script imports no environment, no goal of a task is in its
texts (see `forbidden`), and no observation of an environment either. It shows how people cook
carrots, not how these environments reward a tomato salad; and nearly every second time its people
do something other than the sensible thing, as people do.

Sections: 1 words, 2 stories, facts, recipes and advice, 3 scenes with a next step, 4 the corpus,
5 the tokenizer, 6 training, 7 the command line. Sections 1 to 4 need only Python.
"""

import argparse
import math
import random
import re
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# 1. Words
# ---------------------------------------------------------------------------------------------

VEGETABLES = (
    "carrot cucumber pepper mushroom potato leek radish cabbage pumpkin turnip beet "
    "onion tomato lettuce zucchini eggplant avocado parsnip squash artichoke yam chili "
    "shallot sausage bagel steak trout"
).split()
FRUITS = (
    "apple pear mango peach plum melon banana lemon orange apricot fig kiwi coconut papaya "
    "lime nectarine pineapple quince"
).split()
CUTTABLE = VEGETABLES + FRUITS
BAKED = (
    "bread cake bun muffin waffle pancake pizza lasagna tart roll brownie biscuit casserole"
).split() + ["apple pie"]
WARM = (
    "soup stew rice pasta chicken fish hamburger cheese egg omelet burrito dumpling meatball"
).split()
SNACKS = (
    "popcorn cookies nuts grapes cake crackers chips chocolate sandwich berries muffin toast "
    "peanuts pretzels raisins olives donut tart cupcake candy brownie apple"
).split()
DRINKS = (
    "juice tea coffee lemonade water cocoa milk soda cider smoothie punch milkshake beer wine"
).split()
DISHWARE = "plate cup glass pot pan spoon fork knife bowl jar mug pitcher tray saucer".split()
LAUNDRY = (
    "towels sheets socks shirt blanket clothes curtain sweater coat scarf jacket gloves "
    "apron pillow dress"
).split()
ODDS = (
    "book toy candle letter umbrella camera guitar ball doll key map phone clock vase ribbon "
    "hammer brush purse magazine hat bag"
).split()
THINGS = CUTTABLE + BAKED + WARM + SNACKS + DRINKS + DISHWARE + LAUNDRY + ODDS
VESSELS = "pot pan bowl bowl jar dish box cup tray basket".split()
DISHES = "soup stew salad salad sauce curry mix dinner".split()
ROOMS = ["kitchen", "bathroom", "bedroom", "living room"]
MORE_ROOMS = ["hall", "garden", "cellar", "garage", "study", "balcony", "dining room"]
DEVICES = ["television", "radio", "record player", "lamp", "heater", "fan", "computer", "fireplace"]
SEATS = ["sofa", "sofa", "sofa", "armchair", "bench"]
SMALL_TABLES = ["coffee table", "coffee table", "coffee table", "side table", "low table"]
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Kate Leo Mia Noah Olga Paul".split()
COLORS = "red green yellow white brown orange blue black silver".split()
TASTES = "sweet sour fresh warm crisp soft mild good bitter cold".split()
SPOTS = [
    "on the table",
    "on the shelf",
    "in the basket",
    "on the counter",
    "in the fridge",
    "on the window sill",
]
PLURAL = set(
    "cookies nuts grapes crackers chips berries towels sheets socks clothes peanuts "
    "pretzels raisins olives gloves".split()
)
MASS = set(
    "bread soup stew rice pasta chicken fish cheese popcorn chocolate toast pizza lasagna "
    "candy".split()
) | set(DRINKS)

# Where a thing is put, what that does, what goes in, and in which room it stands.
MACHINES = [
    ("oven", ("heat", "bake", "warm"), BAKED + WARM, "kitchen"),
    ("microwave", ("heat", "warm"), BAKED + WARM, "kitchen"),
    ("fridge", ("cool", "keep", "store"), BAKED + WARM + DRINKS + CUTTABLE, "kitchen"),
    ("freezer", ("freeze", "store"), BAKED + WARM + FRUITS, "kitchen"),
    ("dishwasher", ("wash", "clean"), DISHWARE, "kitchen"),
    ("cupboard", ("store", "keep"), DISHWARE + ["cookies", "rice", "chips", "tea"], "kitchen"),
    ("washing machine", ("wash", "clean"), LAUNDRY, "bathroom"),
    ("dryer", ("dry",), LAUNDRY, "bathroom"),
    ("wardrobe", ("store", "hang"), LAUNDRY, "bedroom"),
    ("chest", ("store", "hide"), LAUNDRY + ODDS, "living room"),
    ("cabinet", ("store", "keep"), ODDS + DRINKS, "living room"),
    ("drawer", ("keep", "hide"), ODDS, "bedroom"),
    ("suitcase", ("pack", "keep"), LAUNDRY + ODDS, "bedroom"),
]


def forbidden(text: str) -> bool:
    """True for a text that could give away a task: the dish, or the thing with its machine.

    >>> forbidden("Ben heats the pizza in the microwave."), forbidden("Ben heats the pizza.")
    (True, False)
    """
    words = set(re.findall("[a-z]+", text.lower()))

    def together(these: str, those: str) -> bool:
        return bool(words & set(these.split()) and words & set(those.split()))

    return (
        together("tomato", "lettuce")
        or together("tomato lettuce", "salad")
        or ("chop" in text and together("tomato lettuce", "bowl"))
        or together("microwave", "pancake cheese hamburger pie pizza")
        or together("dishwasher", "plate")
        or together("washing", "clothes")
        or together("television", "chips milk")
    )


def a(noun: str) -> str:
    """With an article: a carrot, an onion, some chips."""
    if noun in PLURAL or noun in MASS:
        return f"some {noun}"
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def be(noun: str) -> str:
    return "are" if noun in PLURAL else "is"


def join(parts: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'"""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def cap(text: str) -> str:
    return text[0].upper() + text[1:]


def one(r: random.Random, options: str) -> str:
    """One of several wordings, separated by |. A wording that is written twice comes up twice."""
    return r.choice(options.split("|"))


# ---------------------------------------------------------------------------------------------
# 2. Stories, facts, recipes and advice
# ---------------------------------------------------------------------------------------------


def fact(r: random.Random) -> str:
    """Where things are, what they are like and what they are for."""
    food, drink, ware = r.choice(CUTTABLE), r.choice(DRINKS), r.choice(DISHWARE)
    meal, cloth = r.choice(BAKED + WARM), r.choice(LAUNDRY)
    machine, verbs, things, room = r.choice(MACHINES)
    thing, device = r.choice(things), r.choice(DEVICES)
    return one(
        r,
        "|".join(
            [
                f"The {food} is {r.choice(COLORS)} and it tastes {r.choice(TASTES)}.",
                f"{cap(a(food))} is {one(r, 'healthy|cheap|round|small|big|ripe')}, and you chop it "
                "on the cutting board.",
                f"A raw {food} is hard. A chopped {food} is easy to cook.",
                f"The {meal} {be(meal)} {r.choice(TASTES)}.",
                f"The {drink} is {r.choice(TASTES)}, and it is in the kitchen.",
                f"The {machine} is in the {room}. You {r.choice(verbs)} the {thing} in the {machine}.",
                f"The {machine} is closed. You open the {machine} before you put the {thing} in it.",
                f"When the {thing} {be(thing)} in the {machine}, you close the {machine}.",
                f"A {machine} is there to {r.choice(verbs)} things.",
                f"An empty {ware} has nothing in it. A full {ware} is heavy.",
                f"The {ware} is on the shelf. You fill the {ware} with {r.choice(WARM)}.",
                f"The {ware} is dirty, so you wash the {ware} in the sink.",
                f"The {cloth} {be(cloth)} in the bedroom, next to the {one(r, 'bed|door|lamp|window')}.",
                "A cutting board is for chopping. You put the raw food on the board and chop it.",
                "The serving counter is where the cook brings the dish when it is ready.",
                "A cook serves the dish at the serving counter.",
                f"The first cutting board is for the {food}. The second cutting board is empty.",
                "The sofa and the coffee table are in the living room. People sit down on the sofa.",
                f"The {device} is in the living room. You turn on the {device} in the evening.",
                f"The {device} is off. When you turn it on, the {device} is on.",
                f"You turn off the {device} when you leave the room.",
                "The bathroom has a sink and a mirror. The bedroom has a bed and a lamp.",
                f"The {food} is on the table, the {ware} is on the shelf and the {drink} is in the fridge.",
                "You can hold one big thing with two hands. Empty hands can pick up something.",
                f"Before dinner there is nothing on the table but {a(food)}.",
            ]
        ),
    )


def story(r: random.Random) -> str:
    """Three to five sentences about somebody at home."""
    who, friend = r.sample(NAMES, 2)
    men = "Ben David Felix Henry Jonas Leo Noah Paul"
    he, his = ("He", "his") if who in men else ("She", "her")
    food, vessel, meal = r.choice(CUTTABLE), r.choice(VESSELS), r.choice(BAKED + WARM)
    snack, drink, device, seat = (
        r.choice(SNACKS),
        r.choice(DRINKS),
        r.choice(DEVICES),
        r.choice(SEATS),
    )
    machine, verbs, things, room = r.choice(MACHINES)
    thing, table = r.choice(things), r.choice(SMALL_TABLES)
    plots = [
        [
            f"{who} is hungry.",
            f"{he} walks to the kitchen and picks up the {food}.",
            f"{he} puts the raw {food} on the cutting board and chops the {food}.",
            f"Then {he.lower()} puts the chopped {food} in the {vessel}.",
            f"{he} serves the {vessel} with the chopped {food} to {friend}.",
        ],
        [
            f"It is evening and {who} is in the kitchen.",
            f"{he} picks up the {snack} and the {drink}.",
            f"{he} walks to the living room and puts the {snack} on the {table}.",
            f"{he} turns on the {device} and sits down on the {seat}.",
            one(
                r, f"It is a quiet evening.|{friend} sits down next to {who}.|The {drink} is good."
            ),
        ],
        [
            f"{who} wants to {r.choice(verbs)} the {thing}.",
            f"{he} walks to the {thing} and picks up the {thing}.",
            f"{he} walks to the {machine} and opens the {machine}.",
            f"{he} puts the {thing} in the {machine}.",
            f"{he} closes the {machine}.",
        ],
        [
            f"{who} cooks {meal} for {friend}.",
            f"The kitchen is {r.choice(TASTES)} and full of steam.",
            f'"{one(r, "Is it ready|May I look at it|Can I help")}?" asks {friend}.',
            f'"{one(r, "Wait a moment|Hold on|Sit down")}," says {who}.',
            f"{he} puts the {meal} on {his} plate.",
        ],
        [
            f"{friend} and {who} sit at the table.",
            f"{who} pours {drink} into a glass.",
            f"{friend} looks at the {food} in the bowl.",
            f"{he} holds on to the {vessel}.",
            "They wait for something to eat.",
        ],
        [
            f"{who} fries {a(meal)} in a pan.",
            f"The {meal} {be(meal)} {r.choice(TASTES)}.",
            f"{who} puts the empty pan in the sink.",
            f"{friend} takes a seat at the table.",
        ],
        [
            f"{who} looked for the {thing}.",
            f"{he} walked to the bedroom and saw nothing useful there.",
            f"{he} walked to the {room}, and there {he.lower()} saw the {thing}.",
            f"{he} picked up the {thing}.",
        ],
        [
            f"{who} took a seat on the {seat}.",
            f"{he} faced the {device}.",
            f"The {device} was {one(r, 'off|on')}.",
            f"{he} stood up from the {seat} and turned it " + one(r, "on.|off."),
            f"Then {he.lower()} went to the {r.choice(ROOMS)}.",
        ],
    ]
    plot = r.choice(plots)
    start = r.randrange(2) if len(plot) > 4 else 0
    return " ".join(plot[start : r.choice((3, 4, 5, 5, 5))])


def recipe(r: random.Random) -> str:
    """How a dish is made, in a few steps."""
    foods = r.sample(CUTTABLE, r.choice((1, 2, 2, 3)))
    dish, vessel = r.choice(DISHES), r.choice(VESSELS)
    chopped = join([f"the chopped {food}" for food in foods])
    steps = [f"Chop the {food}." for food in foods]
    if r.random() < 0.6:
        steps = [
            f"{one(r, 'Pick up|Take|Wash')} the {food}, put it on the cutting board and chop it."
            for food in foods
        ]
    steps += [
        f"{one(r, 'Take|Pick up|Get')} the {one(r, 'empty |')}{vessel}.",
        f"{one(r, 'Put|Put')} {chopped} in the {vessel}.",
        one(
            r,
            f"Serve the {vessel} with {chopped}.|Cook it for {r.randint(5, 40)} minutes.|"
            f"Add water and salt.|Serve the {dish} at the serving counter.",
        ),
    ]
    title = one(
        r,
        f"How to make {a(join(foods))} {dish}|Recipe for a {dish} of {chopped}|"
        f"To serve a {dish} of {join(['chopped ' + f for f in foods])} in a {vessel}",
    )
    return f"{title}: " + " ".join(steps)


def advice(r: random.Random) -> str:
    """What one person tells another to do."""
    food, vessel, meal = r.choice(CUTTABLE), r.choice(VESSELS), r.choice(BAKED + WARM)
    machine, verbs, things, room = r.choice(MACHINES)
    thing, device, seat, drink = (
        r.choice(things),
        r.choice(DEVICES),
        r.choice(SEATS),
        r.choice(DRINKS),
    )
    verb = r.choice(verbs)
    return one(
        r,
        "|".join(
            [
                f"If you want to {verb} the {thing}, walk to the {room} and open the {machine}.",
                f"To {verb} the {thing}, put the {thing} in the {machine} and close the {machine}.",
                f"If the {machine} is open and you hold the {thing}, put the {thing} in the {machine}.",
                f"If the {machine} is closed, open the {machine}.",
                f"If you are not next to the {thing}, walk to the {thing}. If you are next to it, pick up "
                f"the {thing}.",
                f"If the raw {food} is on the cutting board, chop the {food}.",
                f"If you hold the raw {food}, put the raw {food} on the cutting board.",
                f"If the {food} is chopped, put the chopped {food} in the {vessel}.",
                f"If the chopped {food} is in the {vessel}, serve the {vessel}.",
                f"Do not serve the raw {food}. Chop the {food} first.",
                f"Do not serve the empty {vessel}. Fill the {vessel} first.",
                f"Do not wait for something to chop. Pick up the {food}.",
                f"Hold on to the {vessel} while you fill it.",
                f"Look at the {food} in the {vessel}. Is it enough?",
                f"Turn on the {device}, sit down on the {seat} and enjoy the {drink}.",
                f"Stand up from the {seat} and turn off the {device} before you go to bed.",
                f"You can not eat in the bathroom. Walk to the kitchen and get the {meal}.",
                f"The {drink} is in the kitchen and the {seat} is in the living room.",
                f"Walk to the {seat} and sit down on the {seat}. The {device} is on.",
            ]
        ),
    )


# ---------------------------------------------------------------------------------------------
# 3. Scenes with a next step: "You are in the kitchen. ... The first step to ... is to ..."
#
# A scene is drawn, not played: each thing gets a place at random, and then a person with common
# sense says what to do next. Scenes do not follow each other and nothing is rewarded.
# ---------------------------------------------------------------------------------------------

# How often the person does something else than the sensible thing.
OTHER = 0.16
# And how often the first thing that comes to mind: to look into the next room instead of minding
# the machine, to leave the kitchen before all is in hand, to sit down too early; and for a cook, to
# reach for the pot before anything is chopped, and to serve what is not ready.
HABIT, COOKS_HABIT = 0.38, 0.11
NEXT_ROOM = {
    "kitchen": "living room",
    "bathroom": "bedroom",
    "bedroom": "living room",
    "living room": "kitchen",
}

EXTRAS = [
    "It is evening.",
    "The clock ticks.",
    "The window is open.",
    "It is raining outside.",
    "The kitchen smells good.",
    "The floor is clean.",
    "The soup boils.",
    "The stove is hot.",
    "Guests are coming.",
    "A cat sleeps under the table.",
    "You have some time.",
]


def next_step(r: random.Random, sentences: list[str], goal: str, action: str) -> str:
    """The scene and what comes next. In half of the texts it is said in the same words."""
    scene = " ".join(sentences)
    return (
        scene
        + " "
        + one(
            r,
            "|".join(
                [f"The first step to {goal} is to {action}."] * 7
                + [
                    f"To {goal}, your {one(r, 'first|next')} step is to {action}.",
                    f"To {goal}, you should {one(r, 'now|first|next')} {action}.",
                    f"You want to {goal}. Your {one(r, 'first|next')} step is to {action}.",
                    f"You want to {goal}, so you {action}.",
                    f"To {goal}, first you {action}.",
                    f"What is next, to {goal}? Now {action}.",
                    f"To {goal}, it is time to {action}.",
                ]
            ),
        )
    )


def cutting_scene(r: random.Random) -> str:
    """Somebody prepares a dish of one to three chopped foods in a pot, a bowl, a jar ..."""
    foods = r.sample(CUTTABLE, r.choice((1, 1, 1, 2, 2, 2, 2, 3)) + 1)
    foods, spare = foods[:-1], foods[-1]  # the spare one only lies there
    vessel, dish = r.choice(VESSELS), r.choice(DISHES)
    boards = (
        ["cutting board"]
        if r.random() < (0.6 if len(foods) == 1 else 0.15)
        else ["first cutting board", "second cutting board"]
    )
    counter = one(r, "serving counter|serving counter|serving counter|big table|window")

    # Draw where everything is, until it is possible: one thing in the hands, one on a board.
    while True:
        places = [
            r.choices(
                ("home", "raw hand", "raw board", "board", "hand", "vessel"), (5, 2, 2, 4, 1.5, 1.5)
            )[0]
            for _ in foods
        ]
        inside = [f for f, p in zip(foods, places, strict=True) if p == "vessel"]
        vessel_at = r.choices(("home", "hand", "board"), (5, 3, 1))[0]
        if inside and vessel_at == "home":
            vessel_at = "hand"
        held = sum("hand" in p for p in places) + (vessel_at == "hand")
        lying = sum("board" in p for p in places) + (vessel_at == "board")
        if held <= 1 and lying <= len(boards):
            break
    free = boards[:]
    r.shuffle(free)
    if r.random() < 0.6:
        free.sort()  # people take the first board first
    on_board = {f: free.pop(0) for f, p in zip(foods, places, strict=True) if "board" in p}
    vessel_board = free.pop(0) if vessel_at == "board" else None
    at = dict(zip(foods, places, strict=True))

    full = f"{vessel} with " + join([f"the chopped {f}" for f in inside]) if inside else vessel
    full_or_empty = full if inside else f"empty {vessel}"
    hand = next((f for f in foods if "hand" in at[f]), None)
    raw_on = [f for f in foods if at[f] == "raw board"]
    ready = [f for f in foods if at[f] == "board"]
    home = [f for f in foods if at[f] == "home"]

    # Where one stands: near what was done last, or anywhere.
    stand = r.choice(["middle", "table", "shelf", "counter"] + boards * 2)
    if raw_on and hand is None and vessel_at != "hand" and r.random() < 0.8:
        stand = on_board[raw_on[0]]
    elif hand and at[hand] == "raw hand" and r.random() < 0.6:
        stand = "table"
    elif vessel_at == "hand" and not inside and r.random() < 0.6:
        stand = "shelf"
    near_boards = stand in boards or stand == "counter"

    # What one sees there, sentence by sentence.
    spot = r.choice(SPOTS)
    vessel_spot = one(r, "on the shelf|on the shelf|on the stove|in the sink")
    seen = [f for f in home if r.random() < (0.15 if near_boards or stand == "shelf" else 0.95)]
    if seen and r.random() < 0.4:
        seen.insert(r.randrange(len(seen) + 1), spare)
    where = {
        "middle": one(
            r,
            "in the middle of the kitchen|in the middle of the kitchen|in the kitchen|by the stove",
        ),
        "table": one(r, "at the table|at the table|at the end of the table|by the window"),
        "shelf": one(r, "at the shelf|at the shelf|by the sink"),
        "counter": f"at the {counter}",
    }.get(stand, f"{one(r, 'at|at|at|near')} the {stand}")
    sentences = [f"You are {where}."]
    if seen:
        sentences.append(f"You see {join([a(f) for f in seen])} {spot}.")
    if vessel_at == "home" and r.random() < (0.9 if stand == "shelf" else 0.2):
        sentences.append(f"You see {a(vessel)} {vessel_spot}.")
    if r.random() < (0.95 if near_boards else 0.12):
        for board in boards:
            thing = next((f for f in on_board if on_board[f] == board), None)
            if board == vessel_board:
                sentences.append(f"The {full} is on the {board}.")
            elif thing:
                state = "raw" if thing in raw_on else "chopped"
                sentences.append(f"The {state} {thing} is on the {board}.")
            else:
                sentences.append(f"The {board} is {one(r, 'empty|empty|empty|clean')}.")
    state = "raw" if hand and at[hand] == "raw hand" else "chopped"
    hold = one(r, "You hold|You hold|You hold|You have in your hands")
    if hand:
        sentences.append(f"{hold} the {state} {hand}.")
    elif vessel_at == "hand":
        sentences.append(f"{hold} the {full_or_empty}.")
    else:
        sentences.append(one(r, "Your hands are empty.|Your hands are empty.|You hold nothing."))
    if r.random() < 0.35:
        sentences.insert(r.randrange(1, len(sentences)), r.choice(EXTRAS))

    # What a sensible person does next.
    filling = [f"put the chopped {f} in the {vessel}" for f in ready] + [
        f"fill the {vessel} at the {on_board[f]}" for f in ready
    ]
    if hand and state == "raw":
        best = [f"put the raw {hand} on the {b}" for b in free] or [f"walk to the {boards[0]}"]
    elif hand:
        best = [f"put the chopped {hand} in the {vessel}"] * 3
        best += [f"fill the {vessel} at the {vessel_board}"] * 2 if vessel_board else []
    elif vessel_at == "hand" and len(inside) == len(foods):
        best = [f"serve the {full}"]
    elif vessel_at == "hand":
        best = (
            filling
            or [f"put the {vessel} on the {b}" for b in free]
            or [f"hold on to the {vessel}"]
        )
    elif raw_on:
        food = raw_on[0]
        best = (
            [f"chop the {food}"]
            if stand == on_board[food]
            else [f"walk to the {food}", f"walk to the {on_board[food]}"]
        )
    elif home and free:
        best = [f"pick up the {f}" for f in (home[:1] * 2 + home)]
    elif vessel_board and not ready:
        best = [f"pick up the {vessel}"]
    else:
        best = [f"pick up the {vessel}"] * 2 + [f"pick up the chopped {f}" for f in ready]

    # What others might do. Everybody has waited, looked around, or served too early.
    food, board = r.choice(foods + [spare]), r.choice(boards)
    if hand:
        others = [
            f"hold on to the {hand}",
            f"walk to the {vessel}",
            f"serve the {state} {hand}",
            f"walk to the {food}",
            f"walk to the {board}",
            f"put the {state} {hand} on the {board}",
        ]
    elif vessel_at == "hand":
        others = [
            f"hold on to the {vessel}",
            f"serve the {full_or_empty}",
            f"walk to the {food}",
            f"put the {vessel} on the {board}",
            f"walk to the {board}",
            f"look at the {food} in the {vessel}",
            f"put the chopped {food} in the {vessel}",
        ]
    else:
        others = [
            f"walk to the {counter}",
            f"walk to the {board}",
            f"pick up the {food}",
            f"walk to the {food}",
            f"pick up the {vessel}",
            f"look at the {food}",
            f"pick up the {spare}",
            f"look at the {food} in the {vessel}",
        ]
    if r.random() < 0.5:
        others.append("wait for something to chop")
    if hand:
        habit = f"serve the {state} {hand}"
    elif vessel_at == "hand":
        habit = (
            f"hold on to the {vessel}"
            if len(inside) == len(foods)
            else f"serve the {full_or_empty}"
        )
    else:
        habit = f"pick up the {vessel}"
    action = r.choices(
        (r.choice(best), habit, r.choice(others)), (1 - COOKS_HABIT - OTHER, COOKS_HABIT, OTHER)
    )[0]

    parts = join([f"chopped {f}" for f in foods])
    short = a(foods[0]) + f" {dish}" if len(foods) == 1 else f"a {dish} of {join(foods)}"
    goal = one(
        r,
        "|".join(
            [f"serve a {dish} of {parts} in a {vessel}"] * 4
            + [
                f"make a {dish} of {parts} in a {vessel}",
                f"make {short}",
                f"fill a {vessel} with {parts}",
            ]
        ),
    )
    return next_step(r, sentences, goal, action)


def rooms_sentence(r: random.Random, needed: set[str]) -> list[str]:
    """Sometimes which rooms there are. One of them is always a room that no environment has."""
    if r.random() < 0.4:
        return []
    rooms = sorted(needed | set(r.sample(ROOMS, 2)) | {r.choice(MORE_ROOMS)})
    r.shuffle(rooms)
    return [
        f"{one(r, 'This home|This home|This house|The house|The flat|Your home')} has "
        f"{join([a(room) for room in rooms])}."
    ]


def machine_scene(r: random.Random) -> str:
    """Somebody puts a thing into a machine or a piece of furniture that opens and closes."""
    machine, verbs, things, room = r.choice(MACHINES)
    if r.random() < 0.4:  # people put anything anywhere, children most of all
        verbs, things = ("hide", "keep", "store", "leave"), THINGS
    verb, thing = r.choice(verbs), r.choice(things)
    them = "them" if thing in PLURAL else "it"
    rooms = [x for x in ROOMS if x != room]
    here = room if r.random() < 0.85 else r.choice(rooms)
    is_open = r.random() < 0.45
    thing_at = r.choices(("away", "hand", "inside"), (4, 5, 2))[0]
    if here != room and thing_at == "inside":
        thing_at = "hand"
    if thing_at == "inside":
        is_open = True
    next_to = r.choice([[], [machine], [thing] if thing_at == "away" else [machine]])
    if thing_at == "inside" and next_to:
        next_to = [thing, machine]

    sentences = rooms_sentence(r, {here, room}) + [f"You are in the {here}."]
    if here != room:
        sentences.append(one(r, "You see nothing useful here.|There is nothing useful here."))
        next_to = []
    else:
        sight = [f"the {thing}", f"the {machine}"]
        if thing_at == "inside":
            sight = sight[r.randrange(2) :]
        elif thing_at == "hand" and r.random() < 0.7:
            sight = sight[1:]  # what one holds is not worth a word
        sentences.append(f"You see {join(sight)}.")
        sentences.append(f"The {machine} is {'open' if is_open else 'closed'}.")
        if thing_at == "inside":
            sentences.append(f"The {thing} {be(thing)} in the {machine}.")
    if next_to:
        sentences.append(
            f"You are {one(r, 'next to|next to|next to|close to')} "
            f"{join(['the ' + x for x in next_to])}."
        )
    if thing_at == "hand":
        sentences.append(f"You hold the {thing}.")
    elif r.random() < 0.9:
        sentences.append(one(r, "Your hands are empty.|Your hands are empty.|You hold nothing."))
    if r.random() < 0.2:
        sentences.insert(r.randrange(1, len(sentences) + 1), r.choice(EXTRAS))

    if here != room:
        best = f"walk to the {room}"
    elif thing_at == "inside":
        best = f"close the {machine}" if next_to else f"walk to the {machine}"
    elif thing_at == "away":
        best = f"pick up the {thing}" if thing in next_to else f"walk to the {thing}"
    elif machine not in next_to:
        best = f"walk to the {machine}"
    else:
        best = f"put the {thing} in the {machine}" if is_open else f"open the {machine}"
    others = [f"walk to the {x}" for x in ROOMS if x != here]
    if here == room:
        others += [
            f"walk to the {thing}",
            f"walk to the {machine}",
            f"pick up the {thing}",
            f"{'close' if is_open else 'open'} the {machine}",
            f"look at the {thing}",
        ]
    habit = f"walk to the {NEXT_ROOM[room]}" if here == room else best
    action = r.choices((best, habit, r.choice(others)), (1 - HABIT - OTHER, HABIT, OTHER))[0]
    goal = one(
        r,
        "|".join(
            [f"{verb} the {thing} in the {machine}"] * 4
            + [
                f"{verb} the {thing} with the {machine}",
                f"use the {machine} to {verb} the {thing}",
                f"get the {thing}, put {them} in the {machine} and {verb} {them}",
            ]
        ),
    )
    return next_step(r, sentences, goal, action)


def evening_scene(r: random.Random) -> str:
    """Somebody fetches a snack and a drink and sits down in front of something that plays."""
    wanted = [r.choice(SNACKS), r.choice(DRINKS)]
    device = "television" if r.random() < 0.3 else r.choice(DEVICES[1:])
    if set(wanted) & {"chips", "milk"}:
        device = r.choice(DEVICES[1:])
    seat, table = r.choice(SEATS), r.choice(SMALL_TABLES)
    if r.random() < 0.1:
        wanted = wanted[:1]
    r.shuffle(wanted)
    here = r.choices(("kitchen", "living room", "bedroom", "bathroom"), (9, 13, 1, 1))[0]
    kitchen = here == "kitchen"
    at = {
        x: r.choices(("kitchen", "hand", "table"), (5, 5, 0.3) if kitchen else (1, 5, 4))[0]
        for x in wanted
    }
    held = [x for x in wanted if at[x] == "hand"]
    left = [x for x in wanted if at[x] == "kitchen"]
    laid = [x for x in wanted if at[x] == "table"]
    is_on, seated = r.random() < 0.4, here == "living room" and r.random() < 0.15
    near = r.choice([None] + (left if kitchen else [table, device, seat] * 2))
    if here in ("bedroom", "bathroom"):
        near = None
    if seated:
        near = seat
    close = laid + [near] if near == table and r.random() < 0.5 else [near]

    sentences = rooms_sentence(r, {here, "kitchen", "living room"}) + [f"You are in the {here}."]
    sight = [x for x in wanted if x in left or (x in held and r.random() < 0.2)]
    if kitchen and sight:
        sentences.append(f"You see {join(['the ' + x for x in sight])}.")
    elif here == "living room":
        sentences.append(f"You see {join([a(x) for x in (table, device, seat)])}.")
        if laid:
            verb = "are" if len(laid) > 1 else be(laid[0])
            sentences.append(f"{cap(join(['the ' + x for x in laid]))} {verb} on the {table}.")
    else:
        sentences.append("You see nothing useful here.")
    if near:
        sentences.append(
            f"You are {one(r, 'next to|next to|next to|close to')} "
            f"{join(['the ' + x for x in close])}."
        )
    if here == "living room":
        sentences.append(f"The {device} is {'on' if is_on else 'off'}.")
    if seated:
        sentences += [f"You face the {device}.", f"You took a seat on the {seat}."]
    sentences.append(
        f"You hold {join(['the ' + x for x in held])}."
        if held
        else one(r, "Your hands are empty.|Your hands are empty.|You hold nothing.")
    )
    if r.random() < 0.2:
        sentences.insert(r.randrange(1, len(sentences) + 1), r.choice(EXTRAS))

    if kitchen and left:
        best = (
            [f"pick up the {near}"]
            if near in left
            else [f"walk to the {x}" for x in left[:1] * 2 + left]
        )
    elif kitchen or (here != "living room" and not left):
        best = ["walk to the living room"]
    elif left and not seated:
        best = ["walk to the kitchen"]
    elif seated:
        best = (
            [f"stand up from the {seat}"]
            if left or not is_on
            else [f"look at the {device}", f"enjoy the {wanted[0]}"]
        )
    elif held and near == table:
        best = [f"put the {x} on the {table}" for x in held]
    elif held and len(held) == len(wanted) and not laid:
        best = [f"walk to the {table}"]
    elif not is_on:
        best = [f"turn on the {device}"] if near == device else [f"walk to the {device}"]
    else:
        best = [f"sit down on the {seat}"] if near == seat else [f"walk to the {seat}"]
    others = [f"walk to the {x}" for x in ROOMS if x != here]
    if here == "living room":
        others += [f"walk to the {x}" for x in (table, device, seat) if x != near] * 2
        others += [
            f"turn {'off' if is_on else 'on'} the {device}",
            f"sit down on the {seat}",
            f"pick up the {wanted[0]}",
            f"walk to the {wanted[0]}",
            f"stand up from the {seat}" if seated else f"put the {wanted[-1]} on the {table}",
        ]
    elif kitchen:
        others += [f"walk to the {x}" for x in left] + [f"pick up the {x}" for x in left]
    habit = r.choice(best)
    if kitchen and left:
        habit = "walk to the living room"
    elif here == "living room" and not seated:
        habit = f"sit down on the {seat}" if near == seat else f"walk to the {seat}"
    action = r.choices(
        (r.choice(best), habit, r.choice(others)), (1 - HABIT - OTHER, HABIT, OTHER)
    )[0]
    both = join([f"the {x}" for x in wanted])
    goal = one(
        r,
        "|".join(
            [f"enjoy {both} in front of the {device}"] * 4
            + [
                f"have {both} next to the {device}",
                f"enjoy {both} in the living room with the {device}",
                f"sit on the {seat} with {both} and the {device} on",
            ]
        ),
    )
    return next_step(r, sentences, goal, action)


# ---------------------------------------------------------------------------------------------
# 4. The corpus
# ---------------------------------------------------------------------------------------------

REGISTERS = {
    fact: 1.5,
    story: 1.5,
    recipe: 1,
    advice: 1,
    cutting_scene: 9,
    machine_scene: 5,
    evening_scene: 5,
}

# Words of the Overcooked kitchen. A scene that has no other words might be one of its observations,
# so `write_corpus` adds a sentence to it.
KITCHEN_WORDS = set(
    """you are in the middle of kitchen at table end shelf cutting board first
    second serving counter near see a an and on bowl is empty raw chopped tomato lettuce onion with
    dish your hands hold""".split()
)


def write_corpus(seed: int = 0, n: int = 80_000) -> list[str]:
    """n short texts, the same for the same seed. Takes a few seconds."""
    r = random.Random(seed)
    kinds, weights = list(REGISTERS), list(REGISTERS.values())
    texts = []
    while len(texts) < n:
        text = r.choices(kinds, weights)[0](r)
        first, _, rest = text.partition(". ")
        scene = re.split("The first step |To |You want |What is ", text)[0]
        words = set(re.findall("[a-z]+", scene.lower()))
        if first.startswith("You are") and words <= KITCHEN_WORDS:
            text = f"{first}. {r.choice(EXTRAS)} {rest}"
        if not forbidden(text):
            texts.append(text)
    return texts


# ---------------------------------------------------------------------------------------------
# 5. The tokenizer
# ---------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int = 560):
    """Byte-level BPE. A small vocabulary, so that longer words are split, as in large LLMs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>", "<pad>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )


# ---------------------------------------------------------------------------------------------
# 6. Training
# ---------------------------------------------------------------------------------------------


def pack(texts: list[str], tokenizer, length: int = 256):
    """All texts in one line, <s> text </s> <s> text </s> ..., cut into rows: tokens (N, length)."""
    import torch

    ids = [i for row in tokenizer(texts)["input_ids"] for i in row + [tokenizer.eos_token_id]]
    n_rows = len(ids) // length
    return torch.tensor(ids[: n_rows * length]).view(n_rows, length)


def train(
    texts: list[str], tokenizer, steps: int = 1800, batch: int = 16, lr: float = 4e-3, seed: int = 0
):
    """A fresh Llama, trained on all texts but the last 1,000; and its perplexity on those
    that are new."""
    import torch
    from tqdm import trange
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    read = set(texts[:-1000])  # some short facts come twice: a held-out text is a new one
    rows = pack(texts[:-1000], tokenizer)
    held_out = pack([text for text in texts[-1000:] if text not in read], tokenizer)
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens to read")

    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
    )
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps))),
    )

    order = torch.empty(0, dtype=torch.long)
    bar = trange(steps)
    for step in bar:
        if len(order) < batch:  # a new pass over the rows, in a new order
            order = torch.cat([order, torch.randperm(len(rows))])
        x, order = rows[order[:batch]], order[batch:]
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        loss = model(input_ids=held_out, labels=held_out).loss.item()
    return model, math.exp(loss)


# ---------------------------------------------------------------------------------------------
# 7. The command line
# ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the corpus and train pocket_lm.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=1800, help="updates of 16 rows of 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = write_corpus(args.seed)
    tokenizer = train_tokenizer(texts)
    model, perplexity = train(texts, tokenizer, args.steps, seed=args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"held-out perplexity {perplexity:.3f}; saved in {args.out}")


if __name__ == "__main__":
    main()
