"""Overcooked as a text game: one cook, one small kitchen, one salad to serve.

    env = OvercookedText(task="tomato-salad")  # OvercookedText.TASKS names all tasks
    obs, info = env.reset()  # "You are in the middle of the kitchen. You see a tomato on ..."
    obs, reward, terminated, truncated, info = env.step(0)  # the index of an action

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
sight of the cutting boards: the observation is less than the state. Nothing is random.

**Macro-actions.** An action is a whole errand ("pick up the tomato"): walk to a counter, then act
there. It takes k primitive steps: one for each cell walked, one for the act (three to chop). Each
costs 0.001. Chopping a food of the recipe earns 0.2; serving the right salad earns 1 and ends the
episode; serving anything else costs 0.1 and sends it back to where it came from, raw again.

**Why it is semi-Markov.** Actions last differently long, and time has a price: a reward that comes
i primitive steps from now counts gamma^i. Inside a macro-action the environment does this itself:
reward = r_0 + gamma r_1 + ... + gamma^(k-1) r_(k-1). What follows it is k steps later, and to be
discounted by gamma^k, not gamma: Q(s, a) = reward + gamma^k V(s'). info["primitive_steps"] is k.
"""
from copy import deepcopy
from dataclasses import dataclass

import numpy as np

Cell = tuple[int, int]
MAX_STEPS = 200  # primitive steps in an episode; the last macro-action may run past it
STEP_COST, CHOP_REWARD, SERVE_REWARD, WRONG_COST = -0.001, 0.2, 1.0, -0.1
HOME: dict[str, Cell] = {"tomato": (0, 5), "lettuce": (1, 6), "onion": (2, 6), "bowl": (6, 5)}
START, SERVING = (1, 4), (3, 0)
VIEW = 2  # cells that the cook sees in each direction


@dataclass(frozen=True)
class Kitchen:
    """What a task is about."""
    goal: str  # a clause: "To {goal}, your next step is to ..."
    foods: tuple[str, ...]  # in the order of actions and observation
    recipe: frozenset[str]
    recipe_index: int  # the recipe's place in the one-hot end of the vector
    boards: dict[Cell, str]  # cell -> what the text calls the board there


TASKS = {
    "tomato-salad": Kitchen(
        "serve a salad of chopped tomato in a bowl",
        ("tomato",), frozenset({"tomato"}), 0, {(1, 0): "the cutting board"}),
    "tomato-lettuce-salad": Kitchen(
        "serve a salad of chopped tomato and chopped lettuce in a bowl",
        ("tomato", "lettuce", "onion"), frozenset({"tomato", "lettuce"}), 3,
        {(1, 0): "the first cutting board", (2, 0): "the second cutting board"}),
}


@dataclass
class State:
    """All that changes in the kitchen."""
    agent: Cell  # where the cook stands
    place: dict[str, Cell | str]  # item -> a counter's cell, "hand" or, of a food, "bowl"
    chopped: set[str]


class OvercookedText:
    """One cook in one kitchen, with Gymnasium's calls. `step` takes the index of an action.
    gamma: the discount of one primitive step, used inside a macro-action.
    Raises ValueError when `task` is none of TASKS."""
    TASKS = tuple(TASKS)
    # The best discounted return of each task with gamma 0.99, by exact search over all states.
    OPTIMUM = {"tomato-salad": 0.92052, "tomato-lettuce-salad": 0.94766}

    def __init__(self, task: str = "tomato-salad", gamma: float = 0.99):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; valid tasks: {', '.join(TASKS)}")
        self.task, self.gamma, self.kitchen = task, gamma, TASKS[task]
        self.goal = self.kitchen.goal
        self._actions = [*(("fetch", item) for item in (*self.kitchen.foods, "bowl")),
                         *(("use", board) for board in self.kitchen.boards),
                         ("serve", SERVING), ("chop", None)]
        self.n_actions = len(self._actions)
        self._told: dict[tuple, tuple] = {}  # vector -> (observation text, phrases)
        self.reset()
        self._running = False  # until the caller begins an episode

    def reset(self, seed: int = 0) -> tuple[str, dict]:
        """Begin an episode. Returns (obs, info). Nothing is random: `seed` makes no difference."""
        place = {item: HOME[item] for item in (*self.kitchen.foods, "bowl")}
        self._state, self._steps, self._running = State(START, place, set()), 0, True
        return self._observe()

    def step(self, action: int) -> tuple[str, float, bool, bool, dict]:
        """Carry out a macro-action to its end. Returns (obs, reward, terminated, truncated, info).
        info["changed"] says whether it changed the state, be it only where the cook stands.
        Raises RuntimeError when no episode is running, ValueError when `action` is no index."""
        if not self._running:
            raise RuntimeError("no episode is running: call reset()")
        if not isinstance(action, (int, np.integer)) or not 0 <= action < self.n_actions:
            raise ValueError(f"action {action!r} is no integer from 0 to {self.n_actions - 1}")
        before = deepcopy(self._state)
        k, event = self._do(*self._actions[action])  # any event falls on the last primitive step
        reward = sum(STEP_COST * self.gamma ** i for i in range(k)) + self.gamma ** (k - 1) * event
        self._steps += k
        obs, info = self._observe(primitive_steps=k)
        info["changed"] = self._state != before
        terminated = info["success"]
        truncated = not terminated and self._steps >= MAX_STEPS
        self._running = not (terminated or truncated)
        return obs, reward, terminated, truncated, info

    # --- The rules --------------------------------------------------------------------------------
    def _do(self, verb: str, noun: Cell | str | None) -> tuple[int, float]:
        """Carry out a macro-action. Returns its primitive steps, and the reward of its event."""
        state, kitchen, held = self._state, self.kitchen, self._item_at("hand")
        if verb == "chop":
            food = self._raw_food_here()
            if held or food is None:  # full hands cannot chop, but the three steps pass
                return 3 if food else 1, 0.0
            state.chopped.add(food)
            return 3, CHOP_REWARD if food in kitchen.recipe else 0.0

        cell = self._cell(noun) if verb == "fetch" else noun
        if verb == "fetch" and state.place[noun] in ("hand", "bowl"):
            # A food stays in the bowl, but the cook walks until it sees that it is in there.
            moves = 0 if self._visible(cell) else self._walk((cell[0], cell[1] + VIEW))
            return moves + 1, 0.0
        moves, there = self._walk(face(cell)), self._item_at(cell)
        raw = noun in kitchen.foods and noun not in state.chopped
        if raw and cell in kitchen.boards or held is None and verb != "fetch":
            return max(moves, 1), 0.0  # nothing to do there: a raw food stays on its board

        if verb == "serve":
            served = {held, *self._in_bowl()} if held == "bowl" else {held}
            if served == kitchen.recipe | {"bowl"}:
                state.place["bowl"] = SERVING
                return moves + 1, SERVE_REWARD
            state.place |= {item: HOME[item] for item in served}
            state.chopped -= served
            return moves + 1, WRONG_COST

        food = there if held == "bowl" else held
        if "bowl" in (held, there) and food in state.chopped:  # the bowl ends up in the hand
            state.place |= {food: "bowl", "bowl": "hand"}
            return moves + (2 if noun == "bowl" else 1), 0.0  # 2: put the food in, take the bowl
        if held is None:
            state.place[noun] = "hand"
        elif there is None:
            state.place[held] = cell
        return moves + 1, 0.0

    def _walk(self, to: Cell) -> int:
        """Go there, and return the number of moves: the floor has no obstacles."""
        agent, self._state.agent = self._state.agent, to
        return abs(agent[0] - to[0]) + abs(agent[1] - to[1])

    def _item_at(self, place: Cell | str) -> str | None:
        return next((item for item, at in self._state.place.items() if at == place), None)

    def _in_bowl(self) -> list[str]:
        return [food for food in self.kitchen.foods if self._state.place[food] == "bowl"]

    def _raw_food_here(self) -> str | None:
        """What can be chopped where the cook stands."""
        state, boards = self._state, self.kitchen.boards
        here = [self._item_at(board) for board in boards if face(board) == state.agent]
        raw = [item for item in here if item in self.kitchen.foods and item not in state.chopped]
        return raw[0] if raw else None

    def _cell(self, item: str) -> Cell:
        """Where an item is, also in the hand or in the bowl."""
        place = self._state.place
        cell = place["bowl"] if place[item] == "bowl" else place[item]
        return self._state.agent if cell == "hand" else cell

    def _visible(self, cell: Cell) -> bool:
        agent = self._state.agent
        return max(abs(cell[0] - agent[0]), abs(cell[1] - agent[1])) <= VIEW

    def _success(self) -> bool:
        return self._state.place["bowl"] == SERVING

    # --- The observation in words -----------------------------------------------------------------
    def _observe(self, primitive_steps: int = 0) -> tuple[str, dict]:
        vector = self._vector()
        if vector not in self._told:  # text and phrases depend on the vector alone
            phrases = {index: self._phrase(*pair) for index, pair in enumerate(self._actions)}
            self._told[vector] = self._text(), phrases
        obs, phrases = self._told[vector]
        return obs, {"actions": dict(phrases), "vector": np.array(vector, dtype=np.float32),
                     "primitive_steps": primitive_steps, "success": self._success()}

    def _vector(self) -> tuple[int, ...]:
        """The symbolic observation, in the reference's order: row, column and chop count (0 or 3)
        of each food; row and column of the bowl, each board, the serving counter and the cook; the
        recipe (7, one-hot). 18 numbers, or 26. Out of view: zeros."""
        state, kitchen, vector = self._state, self.kitchen, []
        for item in state.place:  # the foods, then the bowl
            visible = self._visible(self._cell(item))
            vector += self._cell(item) if visible else (0, 0)
            if item != "bowl":
                vector.append(3 if visible and item in state.chopped else 0)
        for cell in (*kitchen.boards, SERVING, state.agent):
            vector += cell if self._visible(cell) else (0, 0)
        return (*vector, *(int(i == kitchen.recipe_index) for i in range(7)))

    def _text(self) -> str:
        """The observation in English. Different vectors have different texts."""
        place, boards, held = self._state.place, self.kitchen.boards, self._item_at("hand")
        spots = {START: "in the middle of the kitchen", face(HOME["bowl"]): "at the shelf",
                 face(HOME["tomato"]): "at the table", face(SERVING): "at the serving counter",
                 face(HOME["onion"]): "at the end of the table"}
        for (row, column), board in boards.items():
            spots |= {(row, column + 1): f"at {board}", (row, column + 2): f"near {board}"}
        parts = [f"You are {spots[self._state.agent]}."]
        at_home = [i for i in place if place[i] == HOME[i] and self._visible(HOME[i])]
        on_table = ["an onion" if i == "onion" else f"a {i}" for i in at_home if i != "bowl"]
        if on_table:
            parts.append(f"You see {listed(on_table)} on the table.")
        if "bowl" in at_home:
            parts.append("You see a bowl on the shelf.")
        for cell in filter(self._visible, boards):
            item, board = self._item_at(cell), boards[cell]
            part = f"{self._name(item)} is on {board}." if item else f"{board} is empty."
            parts.append(part.capitalize())
        if self._success():
            parts.append("The dish is on the serving counter.")
        parts.append(f"You hold {self._name(held)}." if held else "Your hands are empty.")
        return " ".join(parts)

    def _name(self, item: str) -> str:
        if item != "bowl":
            return f"the {'chopped' if item in self._state.chopped else 'raw'} {item}"
        if self._in_bowl():
            return f"the bowl with {listed(self._name(food) for food in self._in_bowl())}"
        return "the empty bowl" if self._state.place["bowl"] == "hand" else "the bowl"

    def _phrase(self, verb: str, noun: Cell | str | None) -> str:
        """An action, worded by what it does here: that is what a language model can judge."""
        place, chopped = self._state.place, self._state.chopped
        held, boards = self._item_at("hand"), self.kitchen.boards
        if verb == "serve":
            return f"serve {self._name(held)}" if held else "walk to the serving counter"
        if verb == "chop":
            food = self._raw_food_here()
            return f"chop the {food}" if food and not held else "wait for something to chop"
        if verb == "use":
            there = self._item_at(noun) if self._visible(noun) else None
            if held and there is None:
                return f"put {'the bowl' if held == 'bowl' else self._name(held)} on {boards[noun]}"
            fills = held == "bowl" and there in chopped or there == "bowl" and held in chopped
            return f"fill the bowl at {boards[noun]}" if fills else f"walk to {boards[noun]}"

        if noun == held:
            return f"hold on to the {noun}"
        if noun == "bowl" and held in chopped:
            return f"put the chopped {held} in the bowl"
        if held in self.kitchen.foods:
            return f"walk to the {noun}"
        food_seen = noun != "bowl" and self._visible(self._cell(noun))
        if food_seen and place[noun] == "bowl":
            return f"look at the {noun} in the bowl"
        if food_seen and noun not in chopped and (held == "bowl" or place[noun] in boards):
            return f"walk to the {noun}"  # raw food stays out of the bowl, and on its board
        if held == "bowl":
            return f"put the chopped {noun} in the bowl"
        return f"pick up the {'chopped ' if food_seen and noun in chopped else ''}{noun}"

    # --- The state --------------------------------------------------------------------------------
    def get_state(self) -> dict:
        """Returns all that is needed to continue from here, in plain JSON types."""
        return {"task": self.task, "agent": list(self._state.agent), "steps": self._steps,
                "place": {item: at if isinstance(at, str) else list(at)
                          for item, at in self._state.place.items()},
                "chopped": sorted(self._state.chopped), "over": not self._running}

    def set_state(self, state: dict) -> tuple[str, dict]:
        """Continue from what `get_state` returned. Returns (obs, info), as `reset` does.
        Raises ValueError when it is a state of another task."""
        if state["task"] != self.task:
            raise ValueError(f"a state of task {state['task']!r}, not {self.task!r}")
        place = {item: at if isinstance(at := state["place"][item], str) else tuple(at)
                 for item in self._state.place}  # in this order, whatever order the JSON file has
        self._state = State(tuple(state["agent"]), place, set(state["chopped"]))
        self._steps, self._running = state["steps"], not state["over"]
        return self._observe()

    def render(self) -> str:
        """Returns the kitchen in ASCII: the true state, also what the cook does not see."""
        place, held = self._state.place, self._item_at("hand")
        letter = {i: i[0] if i in self._state.chopped else i[0].upper() for i in place}
        grid = {(x, y): " . " if face((x, y)) == (x, y) else " # "
                for x in range(7) for y in range(7)}
        grid |= {board: "[ ]" for board in self.kitchen.boards} | {SERVING: "{ }"}
        for item, cell in place.items():
            if cell in grid:
                grid[cell] = grid[cell][0] + letter[item] + grid[cell][2]
        grid[self._state.agent] = f" @{letter[held] if held else ' '}"
        names, in_bowl = [f"{item[0].upper()} {item}" for item in place], listed(self._in_bowl())
        return "\n".join([
            *("".join(grid[x, y] for y in range(7)).rstrip() for x in range(7)),
            f"In hand: {held or 'nothing'}. In the bowl: {in_bowl or 'nothing'}. "
            f"Primitive steps: {self._steps}.",
            f"@ cook, {', '.join(names)} (small letter: chopped)",
            "[ ] board, { } serving, # counter"])


def face(cell: Cell) -> Cell:
    """The floor cell from which a counter is used: the border moved one cell inwards."""
    return min(max(cell[0], 1), 5), min(max(cell[1], 1), 5)


def listed(phrases) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    *first, last = [*phrases] or [""]
    return f"{', '.join(first)} and {last}" if first else last
