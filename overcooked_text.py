"""Overcooked as a text game: one cook, one small kitchen, one salad to serve.

    env = OvercookedText(task="tomato-salad")  # OvercookedText.TASKS names all tasks.
    obs, info = env.reset()  # "You are in the middle of the kitchen. You see a tomato on ..."
    obs, reward, terminated, truncated, info = env.step(0)  # the index of an action

The kitchen has 7 x 7 cells. A cell is (row, column), and row 0 is the top. The cook "@" walks on
the inner 5 x 5 cells, where nothing is in the way. The border is made of counters, and all things
stand on them. The cook uses a counter from the floor cell beside it:

         0  1  2  3  4  5  6
     0   #  #  #  #  #  T  #       T tomato   L lettuce   O onion      (the table)
     1  [ ] .  .  .  @  .  L       B bowl                              (the shelf)
     2  [ ] .  .  .  .  .  O       [ ] cutting board
     3  { } .  .  .  .  .  #       { } serving counter
     4   #  .  .  .  .  .  #       #   empty counter
     5   #  .  .  .  .  .  #
     6   #  #  #  #  #  B  #

**Tasks.** The picture shows "tomato-lettuce-salad": chop the tomato and the lettuce, put both into
the bowl, serve the bowl. No salad needs the onion. "tomato-salad" has only the tomato, the bowl and
the upper cutting board.

**Observation.** The cook sees two cells in every direction, a window of 5 x 5. At the table it does
not see the cutting boards, so the observation is less than the state. Nothing is random.

**Actions.** Each is a macro-action, which is a whole errand: the cook walks to a counter and acts
there. All actions are always offered. One that has no effect still takes its time.
- *Fetch a food or the bowl.* Empty hands pick it up. The bowl comes with the foods that are in it.
  A raw food on a cutting board stays there. A food in the bowl stays there, too, and the cook walks
  only until it sees it.
- *Use a cutting board.* The cook puts what it holds on the board, if the board is empty.
- *Serve.* The cook puts what it holds on the serving counter. The bowl with exactly the foods of
  the recipe ends the episode. Anything else goes back to where it was at first, its foods raw.
- *Chop.* The cook chops the raw food on the board that it stands at, if its hands are empty.

The first two also fill the bowl: when the cook holds the bowl and there is a chopped food, or it
holds a chopped food and there is the bowl, then the food goes into the bowl, and the cook holds the
bowl. A raw food never goes into the bowl.

**Time.** Each cell walked takes one primitive step, and the act takes one more.
- To fetch a raw food that is on a board, to use a board with empty hands and to serve with empty
  hands is only to walk. Without a cell to walk it takes one step.
- Fetching the bowl takes two acts when it fills the bowl: put the food in, pick the bowl up.
- Chopping takes three steps, also with full hands. Where there is no raw food, it takes one.
- The time limit is 200 primitive steps, but the last action is carried out to its end.

**Rewards.** Each primitive step costs 0.001. Chopping a food of the recipe earns 0.2. Serving the
right salad earns 1. Serving anything else costs 0.1.

**Why it is semi-Markov.** Actions last differently long, and time has a price: a reward that comes
i primitive steps from now counts gamma^i. Within a macro-action of k primitive steps the
environment discounts by itself: reward = r_0 + gamma r_1 + ... + gamma^(k-1) r_(k-1). What follows
comes k primitive steps later and counts gamma^k, not gamma: Q(s, a) = reward + gamma^k V(s').
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

Cell = tuple[int, int]
MAX_STEPS = 200  # the time limit of an episode, in primitive steps
STEP_COST = -0.001  # for each primitive step
CHOP_REWARD = 0.2  # for chopping a food of the recipe
SERVE_REWARD = 1.0  # for serving the right salad
WRONG_COST = -0.1  # for serving anything else
START = (1, 4)  # where the cook stands at first
SERVING = (3, 0)  # the serving counter
# Where the items are at first:
HOME: dict[str, Cell] = {"tomato": (0, 5), "lettuce": (1, 6), "onion": (2, 6), "bowl": (6, 5)}
VIEW = 2  # how many cells the cook sees in each direction


@dataclass(frozen=True)
class Kitchen:
    """What is fixed in a task."""

    goal: str  # a clause that the prompt uses
    foods: tuple[str, ...]  # in the order of the actions and of the vector
    recipe: frozenset[str]  # the foods of the right salad
    recipe_index: int  # the place of this salad among the seven that the vector knows
    boards: dict[Cell, str]  # the cutting boards, and what the text calls them


TASKS = {
    "tomato-salad": Kitchen(
        goal="serve a salad of chopped tomato in a bowl",
        foods=("tomato",),
        recipe=frozenset({"tomato"}),
        recipe_index=0,
        boards={(1, 0): "the cutting board"},
    ),
    "tomato-lettuce-salad": Kitchen(
        goal="serve a salad of chopped tomato and chopped lettuce in a bowl",
        foods=("tomato", "lettuce", "onion"),
        recipe=frozenset({"tomato", "lettuce"}),
        recipe_index=3,
        boards={(1, 0): "the first cutting board", (2, 0): "the second cutting board"},
    ),
}


class OvercookedText:
    """One cook in one kitchen, with Gymnasium's calls.

    `gamma` is the discount of one primitive step, used within a macro-action. Raises ValueError
    when `task` is none of TASKS."""

    TASKS = tuple(TASKS)
    # The best discounted return of each task with gamma 0.99, by exact search over all states.
    OPTIMUM = {"tomato-salad": 0.92052, "tomato-lettuce-salad": 0.94766}
    GAMMA = 0.99  # the discount of a primitive step, unless told otherwise
    STEPS = {"tomato-salad": 4_096, "tomato-lettuce-salad": 16_384}  # decisions to learn from

    def __init__(self, task="tomato-salad", gamma=GAMMA):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; valid tasks: {', '.join(TASKS)}")
        self.task = task
        self.gamma = gamma
        self.kitchen = kitchen = TASKS[task]
        self.goal = kitchen.goal
        self._actions = [("fetch", item) for item in (*kitchen.foods, "bowl")]
        self._actions += [("use", board) for board in kitchen.boards]
        self._actions += [("serve", SERVING), ("chop", None)]
        self.n_actions = len(self._actions)
        self._text_cache = {}  # vector -> (observation text, phrases)
        self.reset()
        self._running = False  # The caller has not begun an episode yet.

    def reset(self, seed=0):
        """Begin an episode. Returns the observation (English text) and the info (a dict):

        - "actions" maps the index of each action to its phrase in this state.
        - "vector" is the observation in numbers, a float32 array of 18 or 26 (see `_vector`).
        - "primitive_steps" counts those of the latest action, so it is 0 here.
        - "success" says whether the right salad has been served.

        Nothing is random, so `seed` makes no difference."""
        # The state is all that changes in the kitchen. Its items are the foods and the bowl.
        self._cook = START  # the cell of the cook
        # An item is on a counter (a cell), in the "hand" or, if it is a food, in the "bowl".
        self._place = {item: HOME[item] for item in (*self.kitchen.foods, "bowl")}
        self._chopped = set()  # the foods that are chopped
        self._steps = 0
        self._running = True
        return self._observe()

    def step(self, action):
        """Carry out the macro-action with this index, to its end.

        Returns (obs, reward, terminated, truncated, info). `reward` is discounted within the
        macro-action. `terminated` is True after a success, `truncated` at the time limit. `obs` and
        `info` are as in `reset`. Raises RuntimeError when no episode is running, and ValueError
        when `action` is no index."""
        if not self._running:
            raise RuntimeError("no episode is running: call reset()")
        if not isinstance(action, int | np.integer) or not 0 <= action < self.n_actions:
            raise ValueError(f"action {action!r} is no integer from 0 to {self.n_actions - 1}")
        k, last = self._do(*self._actions[action])
        # Every primitive step has its cost. What else the action earns or costs comes in its last.
        reward = sum(STEP_COST * self.gamma**i for i in range(k)) + self.gamma ** (k - 1) * last
        self._steps += k
        obs, info = self._observe(primitive_steps=k)
        terminated = info["success"]
        truncated = not terminated and self._steps >= MAX_STEPS
        self._running = not (terminated or truncated)
        return obs, reward, terminated, truncated, info

    # --- The rules, which the top of the file tells in words --------------------------------------
    def _do(self, verb, noun):
        """Carry out a macro-action. Returns its primitive steps, and the reward or cost of what
        happens in the last of them."""
        if verb == "fetch":
            return self._fetch(noun), 0.0
        if verb == "use":
            return self._use(noun), 0.0
        if verb == "serve":
            return self._serve()
        return self._chop()

    def _fetch(self, item):
        """Returns the primitive steps."""
        cell = self._cell(item)
        if self._place[item] in ("hand", "bowl"):
            # What is in the bowl is out of view only if the bowl is on a board. It comes into view
            # in the same row.
            row, column = cell
            moves = 0 if self._visible(cell) else self._walk((row, column + VIEW))
            return moves + 1
        moves = self._walk(face(cell))
        if self._is_raw(item) and cell in self.kitchen.boards:
            return max(moves, 1)
        food = self._food_for_bowl(item)
        if self._held is None:
            self._place[item] = "hand"
        elif food:
            self._place |= {food: "bowl", "bowl": "hand"}
        return moves + (2 if food and item == "bowl" else 1)

    def _use(self, board):
        """Returns the primitive steps."""
        held, there = self._held, self._item_at(board)
        moves = self._walk(face(board))
        if held is None:
            return max(moves, 1)
        food = self._food_for_bowl(there)
        if there is None:
            self._place[held] = board
        elif food:
            self._place |= {food: "bowl", "bowl": "hand"}
        return moves + 1

    def _serve(self):
        """Returns the primitive steps, and what serving earns or costs."""
        held = self._held
        moves = self._walk(face(SERVING))
        if held is None:
            return max(moves, 1), 0.0
        served = {held, *self._in_bowl()} if held == "bowl" else {held}
        if served == {"bowl", *self.kitchen.recipe}:
            self._place["bowl"] = SERVING
            return moves + 1, SERVE_REWARD
        self._place |= {item: HOME[item] for item in served}
        self._chopped -= served
        return moves + 1, WRONG_COST

    def _chop(self):
        """Returns the primitive steps, and what chopping earns."""
        food = self._raw_food_here()
        if food is None:
            return 1, 0.0
        if self._held:
            return 3, 0.0
        self._chopped.add(food)
        return 3, CHOP_REWARD if food in self.kitchen.recipe else 0.0

    def _walk(self, to):
        """Go to a floor cell. Returns the number of moves: there are no obstacles."""
        row, column = self._cook
        self._cook = to
        return abs(row - to[0]) + abs(column - to[1])

    # --- What the rules and the words ask about the state -----------------------------------------
    def _item_at(self, where):
        """The item on a counter or in the "hand", or None."""
        return next((item for item, at in self._place.items() if at == where), None)

    @property
    def _held(self):
        return self._item_at("hand")

    def _in_bowl(self):
        return [food for food in self.kitchen.foods if self._place[food] == "bowl"]

    def _is_raw(self, item):
        return item in self.kitchen.foods and item not in self._chopped

    def _raw_food_here(self):
        """The raw food on the board that the cook stands at, or None."""
        for board in self.kitchen.boards:
            item = self._item_at(board)
            if face(board) == self._cook and self._is_raw(item):
                return item
        return None

    def _food_for_bowl(self, item):
        """The chopped food, if the cook holds it and `item` is the bowl, or the other way round.
        Else None."""
        food = item if self._held == "bowl" else self._held
        meet = "bowl" in (item, self._held) and food in self._chopped
        return food if meet else None

    def _cell(self, item):
        """The cell that an item is in. What is in the hand is where the cook is."""
        place = self._place[item]
        if place == "bowl":
            place = self._place["bowl"]
        return self._cook if place == "hand" else place

    def _visible(self, cell):
        row, column = self._cook
        return max(abs(cell[0] - row), abs(cell[1] - column)) <= VIEW

    def _success(self):
        return self._place["bowl"] == SERVING

    # --- The observation in numbers and in words --------------------------------------------------
    def _observe(self, primitive_steps=0):
        vector = self._vector()
        if vector not in self._text_cache:  # Text and phrases depend on the vector alone.
            phrases = {i: self._phrase(*action) for i, action in enumerate(self._actions)}
            self._text_cache[vector] = self._text(), phrases
        obs, phrases = self._text_cache[vector]
        return obs, {
            "actions": dict(phrases),
            "vector": np.array(vector, dtype=np.float32),
            "primitive_steps": primitive_steps,
            "success": self._success(),
        }

    def _vector(self):
        """The observation in 18 or 26 numbers, in the order of the paper's code.

        They are row, column and chops (0 or 3) of each food, then row and column of the bowl, of
        each board, of the serving counter and of the cook. All of them are 0 for what is out of
        view. Seven more have a 1 at the recipe's index."""
        vector = []
        for item in self._place:  # the foods, then the bowl
            cell = self._cell(item)
            visible = self._visible(cell)
            vector += cell if visible else (0, 0)
            if item != "bowl":
                vector.append(3 if visible and item in self._chopped else 0)
        for cell in (*self.kitchen.boards, SERVING, self._cook):
            vector += cell if self._visible(cell) else (0, 0)
        recipe = [0] * 7
        recipe[self.kitchen.recipe_index] = 1
        return (*vector, *recipe)

    def _text(self):
        """The observation in English. Different vectors have different texts."""
        held, place = self._held, self._place.items()
        sentences = [f"You are {self._spot()}."]
        at_home = [item for item, at in place if at == HOME[item] and self._visible(at)]
        on_table = [
            f"{'an' if item == 'onion' else 'a'} {item}" for item in at_home if item != "bowl"
        ]
        if on_table:
            sentences.append(f"You see {listed(on_table)} on the table.")
        if "bowl" in at_home:
            sentences.append("You see a bowl on the shelf.")
        for cell in filter(self._visible, self.kitchen.boards):
            board, item = self.kitchen.boards[cell], self._item_at(cell)
            sentence = f"{self._name(item)} is on {board}." if item else f"{board} is empty."
            sentences.append(sentence.capitalize())
        if self._success():
            sentences.append("The dish is on the serving counter.")
        sentences.append(f"You hold {self._name(held)}." if held else "Your hands are empty.")
        return " ".join(sentences)

    def _spot(self):
        """Where the cook stands, in words. There are no other cells where an action can end."""
        spots = {
            START: "in the middle of the kitchen",
            face(HOME["tomato"]): "at the table",
            face(HOME["onion"]): "at the end of the table",
            face(HOME["bowl"]): "at the shelf",
            face(SERVING): "at the serving counter",
        }
        for (row, column), board in self.kitchen.boards.items():
            spots[row, column + 1] = f"at {board}"
            spots[row, column + VIEW] = f"near {board}"
        return spots[self._cook]

    def _name(self, item):
        if item in self.kitchen.foods:
            return f"the {'raw' if self._is_raw(item) else 'chopped'} {item}"
        in_bowl = self._in_bowl()
        if in_bowl:
            return f"the bowl with {listed(map(self._name, in_bowl))}"
        return "the empty bowl" if self._place["bowl"] == "hand" else "the bowl"

    def _phrase(self, verb, noun):
        """An action, worded by what it does here, because a language model can judge that."""
        held = self._held
        if verb == "fetch":
            return self._fetch_phrase(noun)
        if verb == "use":
            return self._use_phrase(noun)
        if verb == "serve":
            return f"serve {self._name(held)}" if held else "walk to the serving counter"
        food = self._raw_food_here()
        return f"chop the {food}" if food and not held else "wait for something to chop"

    def _fetch_phrase(self, item):
        """The cook does not know of a food out of view where it is, and whether it is raw."""
        held, place = self._held, self._place[item]
        if item == held:
            return f"hold on to the {item}"
        if item == "bowl" and held in self._chopped:
            return f"put the chopped {held} in the bowl"
        if held in self.kitchen.foods:  # The hand is full.
            return f"walk to the {item}"
        seen = self._visible(self._cell(item))
        if seen and place == "bowl":
            return f"look at the {item} in the bowl"
        if seen and self._is_raw(item) and (held == "bowl" or place in self.kitchen.boards):
            return f"walk to the {item}"
        if held == "bowl":
            return f"put the chopped {item} in the bowl"
        adjective = "chopped " if seen and item in self._chopped else ""
        return f"pick up the {adjective}{item}"

    def _use_phrase(self, cell):
        """The cook takes a board out of view for empty."""
        held, board = self._held, self.kitchen.boards[cell]
        there = self._item_at(cell) if self._visible(cell) else None
        if held and there is None:
            return f"put {'the bowl' if held == 'bowl' else self._name(held)} on {board}"
        return f"{'fill the bowl at' if self._food_for_bowl(there) else 'walk to'} {board}"

    # --- The state --------------------------------------------------------------------------------
    def get_state(self):
        """Returns all that is needed to go on from here, as a dict of plain JSON types."""
        return {
            "task": self.task,
            "agent": list(self._cook),
            "steps": self._steps,
            "place": {
                item: at if isinstance(at, str) else list(at) for item, at in self._place.items()
            },
            "chopped": sorted(self._chopped),
            "over": not self._running,
        }

    def set_state(self, state):
        """Go on from what `get_state` returned. Returns (obs, info), as `reset` does. A state of
        another task raises ValueError."""
        if state["task"] != self.task:
            raise ValueError(f"a state of task {state['task']!r}, not {self.task!r}")
        self._cook = tuple(state["agent"])
        for item in self._place:
            at = state["place"][item]
            self._place[item] = at if isinstance(at, str) else tuple(at)
        self._chopped = set(state["chopped"])
        self._steps = state["steps"]
        self._running = not state["over"]
        return self._observe()

    def render(self):
        """Returns the kitchen as text graphics: the true state, also what the cook does not see."""
        held = self._held
        grid = dict.fromkeys(product(range(7), repeat=2), " # ")
        grid |= dict.fromkeys(product(range(1, 6), repeat=2), " . ")
        grid |= dict.fromkeys(self.kitchen.boards, "[ ]")
        grid[SERVING] = "{ }"
        letters = {item: item[0].upper() for item in self._place}
        letters |= {food: food[0] for food in self._chopped}
        for item, cell in self._place.items():
            if cell in grid:  # An item in the hand or in the bowl has no cell.
                left, _, right = grid[cell]
                grid[cell] = left + letters[item] + right
        grid[self._cook] = f" @{letters.get(held, ' ')}"
        lines = []
        for row in range(7):
            lines.append("".join(grid[row, column] for column in range(7)).rstrip())
        in_bowl = listed(self._in_bowl()) or "nothing"
        names = ", ".join(f"{item[0].upper()} {item}" for item in self._place)
        lines += [
            f"In hand: {held or 'nothing'}. In the bowl: {in_bowl}. "
            f"Primitive steps: {self._steps}.",
            f"@ cook, {names} (small letter: chopped)",
            "[ ] board, { } serving, # counter",
        ]
        return "\n".join(lines)


def face(cell):
    """The floor cell from which a counter is used: the border moved one cell inwards."""
    row, column = cell
    return min(max(row, 1), 5), min(max(column, 1), 5)


def listed(phrases):
    """Join phrases: ["a", "b", "c"] becomes "a, b and c". The last comma becomes an "and"."""
    return " and ".join(", ".join(phrases).rsplit(", ", 1))
