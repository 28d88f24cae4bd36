"""Overcooked as a text game: one cook, one small kitchen, one salad to serve.

The kitchen has 7 x 7 cells; the cook "@" walks on the inner 5 x 5 floor. Row 0 is the top, and a
cell is (row, column). Everything of interest stands on the counters along the border:

         0  1  2  3  4  5  6
     0   #  #  #  #  #  T  #       T tomato   L lettuce   O onion      (the table)
     1  [ ] .  .  .  @  .  L       B bowl                              (the shelf)
     2  [ ] .  .  .  .  .  O       [ ] cutting board
     3  { } .  .  .  .  .  #       { } serving counter
     4   #  .  .  .  .  .  #       #   empty counter
     5   #  .  .  .  .  .  #
     6   #  #  #  #  #  B  #

"tomato-salad" has the tomato and the upper cutting board only: chop the tomato, put it in the bowl,
serve the bowl. "tomato-lettuce-salad" is the whole picture; no salad needs its onion.

The cook sees two cells in every direction (a 5 x 5 window), so a trip to the table means losing
sight of the cutting boards: the observation is less than the state.

**Macro-actions.** An action is a whole errand ("pick up the tomato", "serve the bowl ..."): walk to
the counter in question, then act there. It takes k primitive steps, one for each cell walked and
one for the act. Every primitive step costs 0.001; chopping a food of the recipe earns 0.2, serving
the right salad 1 (the episode then ends), and serving anything else costs 0.1 and sends the served
things back to where they came from, raw again.

**Why it is semi-Markov.** Actions last differently long, and time has a price: a reward that comes
i primitive steps from now counts gamma^i. Inside a macro-action the environment does this itself,

    reward = r_0 + gamma r_1 + ... + gamma^(k-1) r_(k-1),

so what follows the macro-action starts k steps later and is to be discounted by gamma^k, not gamma:
Q(s, a) = reward + gamma^k V(s'). The learner finds k in info["primitive_steps"].

    env = OvercookedText("tomato-salad")
    obs, info = env.reset()     # "You are in the middle of the kitchen. You see a tomato on ..."
    obs, reward, terminated, truncated, info = env.step(0)      # 0: see info["actions"]
"""
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Cell = tuple[int, int]

HOME: dict[str, Cell] = {"tomato": (0, 5), "lettuce": (1, 6), "onion": (2, 6), "bowl": (6, 5)}
START, SERVING = (1, 4), (3, 0)
UNSEEN = (0, 0)         # how the symbolic observation writes "out of view"; nothing is ever there
VIEW = 2                # cells that the cook sees in each direction
MAX_STEPS = 200         # primitive steps in an episode; the last macro-action may run past it
STEP_COST, CHOP_REWARD, SERVE_REWARD, WRONG_COST = -0.001, 0.2, 1.0, -0.1


class Kitchen(NamedTuple):
    goal: str                   # a clause: "To <goal>, your next step is to ..."
    foods: tuple[str, ...]      # in the order of actions and observation
    recipe: frozenset[str]
    recipe_index: int           # the recipe's place in the one-hot end of the observation
    boards: dict[Cell, str]     # cell -> what the text calls the board there


KITCHENS = {
    "tomato-salad": Kitchen(
        "serve a salad of chopped tomato in a bowl",
        ("tomato",), frozenset({"tomato"}), 0, {(1, 0): "the cutting board"}),
    "tomato-lettuce-salad": Kitchen(
        "serve a salad of chopped tomato and chopped lettuce in a bowl",
        ("tomato", "lettuce", "onion"), frozenset({"tomato", "lettuce"}), 3,
        {(1, 0): "the first cutting board", (2, 0): "the second cutting board"}),
}


def face(cell: Cell) -> Cell:
    """The floor cell from which a counter is used: the border moved one cell inwards."""
    return min(max(cell[0], 1), 5), min(max(cell[1], 1), 5)


# --- Words ----------------------------------------------------------------------------------------
# They are made from the symbolic observation alone, so they can tell nothing that the cook does not
# perceive; and as there are few observations (22 and 806), each is put into words only once.

def listing(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@lru_cache(maxsize=None)
def describe(task: str, vector: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    """The symbolic observation in words, and the phrase of every action in index order."""
    kitchen = KITCHENS[task]
    foods, n = kitchen.foods, 3 * len(kitchen.foods)
    cells = [vector[3 * i:3 * i + 2] for i in range(len(foods) + 1)]        # the bowl comes last
    at = {item: cell for item, cell in zip((*foods, "bowl"), cells) if cell != UNSEEN}  # in view
    agent = vector[-9:-7]
    chopped = {food for i, food in enumerate(foods) if vector[3 * i + 2]}
    in_bowl = [food for food in foods if food in at and at[food] == at.get("bowl")]
    loose = [item for item in at if item not in in_bowl]    # in view and not inside the bowl
    held = next((item for item in loose if at[item] == agent), None)
    on_board = {cell: next((item for item in loose if at[item] == cell), None)
                for i, cell in enumerate(kitchen.boards)
                if vector[n + 2 + 2 * i:n + 4 + 2 * i] != UNSEEN}           # boards in view

    def name(item: str) -> str:
        if item == "bowl":
            content = listing([name(food) for food in in_bowl])
            return f"the bowl with {content}" if content else "the bowl"
        return f"the {'chopped' if item in chopped else 'raw'} {item}"

    held_name = "the empty bowl" if held == "bowl" and not in_bowl else held and name(held)

    # 1. where the cook is
    places = {START: "in the middle of the kitchen", face(HOME["bowl"]): "at the shelf",
              face(HOME["tomato"]): "at the table", face(HOME["onion"]): "at the end of the table",
              face(SERVING): "at the serving counter"}
    for (row, column), board in kitchen.boards.items():
        places |= {(row, column + 1): f"at {board}", (row, column + 2): f"near {board}"}
    text = [f"You are {places[agent]}."]

    # 2. what stands where it belongs
    on_table = [("an " if food == "onion" else "a ") + food
                for food in foods if at.get(food) == HOME[food]]
    if on_table:
        text.append(f"You see {listing(on_table)} on the table.")
    if at.get("bowl") == HOME["bowl"]:
        text.append("You see a bowl on the shelf.")

    # 3. the cutting boards and the serving counter
    for cell, item in on_board.items():
        board = kitchen.boards[cell]
        sentence = f"{name(item)} is on {board}." if item else f"{board} is empty."
        text.append(sentence[0].upper() + sentence[1:])
    if at.get("bowl") == SERVING:
        text.append("The dish is on the serving counter.")

    # 4. the hands
    text.append(f"You hold {held_name}." if held else "Your hands are empty.")

    # The same action is worded by what it does here: that is what a language model can judge.
    def food_phrase(food: str) -> str:
        raw_in_view = food in at and food not in chopped
        if food == held:
            return f"hold on to the {food}"
        if held in foods:
            return f"walk to the {food}"
        if food in in_bowl:         # a food is never taken out of the bowl
            return f"look at the {food} in the bowl"
        if raw_in_view and (held == "bowl" or at[food] in on_board):
            return f"walk to the {food}"    # raw food stays out of the bowl, and on its board
        if held == "bowl":
            return f"put the chopped {food} in the bowl"
        return f"pick up the chopped {food}" if food in chopped else f"pick up the {food}"

    def bowl_phrase() -> str:
        if held == "bowl":
            return "hold on to the bowl"
        if held in chopped:
            return f"put the chopped {held} in the bowl"
        return "walk to the bowl" if held else "pick up the bowl"

    def board_phrase(cell: Cell) -> str:
        board, item = kitchen.boards[cell], on_board.get(cell)      # None: empty or out of view
        if held and item is None:
            return f"put {'the bowl' if held == 'bowl' else held_name} on {board}"
        if held == "bowl" and item in chopped or held in chopped and item == "bowl":
            return f"fill the bowl at {board}"
        return f"walk to {board}"

    here = next((item for cell, item in on_board.items() if face(cell) == agent), None)
    can_chop = not held and here in foods and here not in chopped
    phrases = (*map(food_phrase, foods), bowl_phrase(), *map(board_phrase, kitchen.boards),
               f"serve {held_name}" if held else "walk to the serving counter",
               f"chop the {here}" if can_chop else "wait for something to chop")
    return " ".join(text), phrases


# --- The game -------------------------------------------------------------------------------------

class OvercookedText:
    """One cook in one kitchen; see the top of this file. Nothing in it is random.

    task: one of TASKS. gamma: the discount of one primitive step, used inside a macro-action.
    """
    TASKS = tuple(KITCHENS)

    def __init__(self, task: str = "tomato-salad", gamma: float = 0.99):
        if task not in KITCHENS:
            raise ValueError(f"unknown task {task!r}: choose one of {', '.join(KITCHENS)}")
        self.task, self.gamma, self.kitchen = task, gamma, KITCHENS[task]
        self.goal = self.kitchen.goal
        self.macros = [(self._fetch_food, food) for food in self.kitchen.foods]
        self.macros += [(self._fetch_bowl, None)]
        self.macros += [(self._use_board, board) for board in self.kitchen.boards]
        self.macros += [(self._serve, SERVING), (self._chop, None)]
        self.n_actions = len(self.macros)
        self.reset()
        self.over = True            # no episode is running until the caller asks for one

    def reset(self, seed: int = 0) -> tuple[str, dict]:
        """Start an episode. The game is deterministic: seed is accepted, and ignored."""
        self.agent: Cell = START
        # Where each thing is: a counter's cell, "hand", or (foods) "bowl".
        self.place = {item: HOME[item] for item in (*self.kitchen.foods, "bowl")}
        self.chopped: set[str] = set()
        self.steps, self.over = 0, False    # primitive steps so far; True: no episode is running
        return self._observe(0)

    def step(self, action: int) -> tuple[str, float, bool, bool, dict]:
        """Carry out a macro-action to its end: obs, reward, terminated, truncated, info.

        info["changed"]: whether it changed the state, be it only where the cook stands.
        ValueError: no such action. RuntimeError: no episode is running.
        """
        if self.over:
            raise RuntimeError("no episode is running (not started, or at its end): call reset()")
        if not isinstance(action, (int, np.integer)) or not 0 <= action < self.n_actions:
            raise ValueError(f"action {action!r}: expected an integer, 0 to {self.n_actions - 1}")
        run, target = self.macros[action]
        before = self._state()
        k, event = run(target)      # the event, if any, falls on the last primitive step
        reward = sum(STEP_COST * self.gamma ** i for i in range(k)) + self.gamma ** (k - 1) * event
        self.steps += k
        obs, info = self._observe(k)
        info["changed"] = self._state() != before
        terminated = info["success"]
        truncated = not terminated and self.steps >= MAX_STEPS
        self.over = terminated or truncated
        return obs, reward, terminated, truncated, info

    # The macro-actions. Each changes the state and returns (primitive steps, reward of the event).

    def _fetch_food(self, food: str) -> tuple[int, float]:
        place, cell, held = self.place[food], self._cell(food), self._held()
        if place == "hand" or place == "bowl" and self._in_view(cell):
            return 1, 0.0               # a food is never taken out of the bowl ...
        if place == "bowl":             # ... but the cook walks until it sees that it is in there
            return self._walk((cell[0], cell[1] + VIEW)) + 1, 0.0
        moves = self._walk(face(place))
        if place in self.kitchen.boards and food not in self.chopped:
            return max(moves, 1), 0.0   # a raw food stays on its board
        if held is None:
            self.place[food] = "hand"
        elif held == "bowl" and food in self.chopped:
            self.place[food] = "bowl"
        return moves + 1, 0.0

    def _fetch_bowl(self, _) -> tuple[int, float]:
        held = self._held()
        if held == "bowl":
            return 1, 0.0
        moves = self._walk(face(self.place["bowl"]))
        if held in self.chopped:
            self._fill_bowl(held)
            return moves + 2, 0.0       # one step to put the food in, one to take the bowl
        if held is None:
            self.place["bowl"] = "hand"
        return moves + 1, 0.0

    def _use_board(self, board: Cell) -> tuple[int, float]:
        moves, held = self._walk(face(board)), self._held()
        if held is None:
            return max(moves, 1), 0.0
        there = next((item for item, place in self.place.items() if place == board), None)
        if there is None:
            self.place[held] = board
        elif held == "bowl" and there in self.chopped:
            self._fill_bowl(there)
        elif there == "bowl" and held in self.chopped:
            self._fill_bowl(held)
        return moves + 1, 0.0

    def _serve(self, counter: Cell) -> tuple[int, float]:
        moves, held = self._walk(face(counter)), self._held()
        if held is None:
            return max(moves, 1), 0.0
        served = {item for item, place in self.place.items()
                  if item == held or held == "bowl" and place == "bowl"}
        if served == self.kitchen.recipe | {"bowl"}:
            self.place["bowl"] = counter
            return moves + 1, SERVE_REWARD
        self.place.update({item: HOME[item] for item in served})
        self.chopped -= served
        return moves + 1, WRONG_COST

    def _chop(self, _) -> tuple[int, float]:
        food = next((food for food in self.kitchen.foods if food not in self.chopped
                     and self.place[food] in self.kitchen.boards
                     and face(self.place[food]) == self.agent), None)
        if food is None:
            return 1, 0.0
        if self._held() is not None:    # full hands cannot chop, but the three steps pass
            return 3, 0.0
        self.chopped.add(food)
        return 3, CHOP_REWARD if food in self.kitchen.recipe else 0.0

    # Small helpers of the macro-actions.

    def _state(self):
        return self.agent, dict(self.place), set(self.chopped)

    def _held(self) -> str | None:
        return next((item for item, place in self.place.items() if place == "hand"), None)

    def _fill_bowl(self, food: str):
        """The food goes into the bowl, and the bowl ends up in the hand."""
        self.place[food], self.place["bowl"] = "bowl", "hand"

    def _walk(self, to: Cell) -> int:
        """Go there, and return the number of moves: the floor has no obstacles."""
        moves = abs(self.agent[0] - to[0]) + abs(self.agent[1] - to[1])
        self.agent = to
        return moves

    def _cell(self, item: str) -> Cell:
        place = self._cell("bowl") if self.place[item] == "bowl" else self.place[item]
        return self.agent if place == "hand" else place

    def _in_view(self, cell: Cell) -> bool:
        return max(abs(cell[0] - self.agent[0]), abs(cell[1] - self.agent[1])) <= VIEW

    def _observe(self, primitive_steps: int) -> tuple[str, dict]:
        """obs and info. The symbolic observation: row, column and chop count (0 or 3) of each food;
        row and column of the bowl, each board, the serving counter and the cook; a one-hot recipe
        (7). 18 numbers, or 26. What is out of view is all zeros."""
        vector: list[int] = []
        for item in self.place:             # the foods, then the bowl
            cell = self._cell(item)
            seen = self._in_view(cell)
            vector += cell if seen else UNSEEN
            if item != "bowl":
                vector.append(3 if seen and item in self.chopped else 0)
        for cell in (*self.kitchen.boards, SERVING, self.agent):
            vector += cell if self._in_view(cell) else UNSEEN
        vector += [int(i == self.kitchen.recipe_index) for i in range(7)]
        obs, phrases = describe(self.task, tuple(vector))
        return obs, {"actions": dict(enumerate(phrases)),
                     "vector": np.array(vector, dtype=np.float32),
                     "primitive_steps": primitive_steps,
                     "success": self.place["bowl"] == SERVING}

    # Saving, restoring, looking.

    def get_state(self) -> dict:
        """The episode as it stands, in plain JSON types."""
        return {"task": self.task, "agent": list(self.agent), "steps": self.steps,
                "place": {item: place if isinstance(place, str) else list(place)
                          for item, place in self.place.items()},
                "chopped": sorted(self.chopped), "over": self.over}

    def set_state(self, state: dict) -> tuple[str, dict]:
        """Continue from what get_state() returned; gives obs and info as reset() does."""
        if state["task"] != self.task:
            raise ValueError(f"a state of task {state['task']!r} given to task {self.task!r}")
        self.agent, self.steps = tuple(state["agent"]), state["steps"]
        for item in self.place:     # keeps the order of items, whatever order the JSON file has
            place = state["place"][item]
            self.place[item] = place if isinstance(place, str) else tuple(place)
        self.chopped, self.over = set(state["chopped"]), state["over"]
        return self._observe(0)

    def render(self) -> str:
        """The whole kitchen as ASCII text, seen from above."""
        held, in_bowl = self._held(), [f for f in self.kitchen.foods if self.place[f] == "bowl"]
        letter = {item: item[0] if item in self.chopped else item[0].upper() for item in self.place}
        grid = {(x, y): " . " if face((x, y)) == (x, y) else " # "
                for x in range(7) for y in range(7)}
        grid |= {board: "[ ]" for board in self.kitchen.boards} | {SERVING: "{ }"}
        for item, cell in self.place.items():
            if cell in grid:
                around = grid[cell].replace("#", " ")
                grid[cell] = around[0] + letter[item] + around[2]
        grid[self.agent] = f" @{letter[held] if held else ' '}"
        rows = ["".join(grid[x, y] for y in range(7)).rstrip() for x in range(7)]
        names = ", ".join(f"{item[0].upper()} {item}" for item in self.place)
        return "\n".join([
            *rows, f"In hand: {held or 'nothing'}. In the bowl: {listing(in_bowl) or 'nothing'}. "
            f"Primitive steps: {self.steps}.",
            f"@ cook, {names} (small letter: chopped)",
            "[ ] board, { } serving, # counter"])
