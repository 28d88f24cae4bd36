"""A household in words: the two VirtualHome tasks of the TWOSOME paper, without VirtualHome.

    env = VirtualHomeText(task="food-preparation")  # VirtualHomeText.TASKS names all tasks.
    obs, info = env.reset()  # "This home has a kitchen, a bathroom, a bedroom and a living ..."
    obs, reward, terminated, truncated, info = env.step(4)  # the index of an action

The home has four rooms. In them are things, which the agent can carry, and furniture, which stays
where it is. The agent starts in the room of the things.

**Tasks.** There are two kinds.
- *A machine task:* put a thing into a machine and close the door. "food-preparation" is the
  paper's. Six others have different words and the same rules. They are for testing only, to see
  whether what was learned carries over.
- *"entertainment":* sit on the sofa in front of the running television, with the chips and the milk
  in the hands or on the coffee table.

**Actions.** Each takes one step. Any action may be taken at any time. One that cannot be done has
no effect.
- *Walk to a room.* Then the agent is close to nothing but what it holds.
- *Walk to a thing or to furniture in view.* Then the agent is close to that and away from the rest.
  A walk to the machine also leads to what is in it. A walk to what is in the machine or on the
  coffee table also leads to the machine or to the table.
- *Pick up a thing.* The agent must be close to it. From the coffee table it can also pick a thing
  up when it is close to the table.
- *Put a thing into the machine or onto the coffee table.* The agent must hold the thing. It must be
  close to the machine, with the door open, or to the table. The thing stays close until it walks.
- *Open or close the machine.* The agent must be close to it.
- *Turn the television on or off.* The agent must be close to it and have one of two hands free.
- *Sit down on the sofa.* The agent must be close to it, and then faces the television. While it is
  seated, it cannot walk.
- *Stand up from the sofa.* The agent still faces the television, until it walks.

**Rewards.** The goal earns 1 and ends the episode. Everything else earns 0. The time limit is 50
steps. Nothing is random.

**What is hidden.** The observation is less than the state.
- The agent does not perceive what lies in other rooms, nor whether the machine there is open or the
  television there is on.
- It does not perceive whether it is still seated. Standing up does not show, and the text "You took
  a seat" stays true for the episode.
- A held thing has a recorded room: where the agent was before its latest walk or, if it has not
  walked since, where it picked the thing up. Walking to the held thing leads there. This oddity of
  the simulator is kept, but never offered.

**Which actions are offered.** info["actions"] has the walks to the three other rooms, and what can
have an effect as far as the agent perceives. The paper's code lists the offered actions by hand.
It differs in these points:
- It offers some actions that visibly fail, and walks to a thing in the hand. They are left out
  here, because they only make the choice harder.
- It does not offer to pick up again what lies in the open machine or on the coffee table, nor to
  put a second thing on the coffee table. Both are possible and offered here.
- When one of the two things is left in the kitchen, it offers a walk to the absent one.
- It offers to sit down only while the television is on, and then also to stand up. Here an agent
  that faces the television may stand up, and otherwise, at the sofa, it may sit down.
- It offers only the other rooms at the coffee table with empty hands, and at the sofa after taking
  a seat. So 37 states that can be reached are dead ends there, and none is here.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass, field

import numpy as np

MAX_STEPS = 50  # the time limit of an episode, in steps
ROOMS = ("kitchen", "bathroom", "bedroom", "living room")  # in the order of the vector
ROOM_ACTIONS = ("living room", "kitchen", "bathroom", "bedroom")  # in the order of the actions


@dataclass(frozen=True)
class Task:
    """What is fixed in a task."""

    goal: str  # a clause that the prompt uses
    things: tuple[str, ...]  # what can be carried
    home: str  # the room where the things are and the agent starts
    furniture: tuple[str, ...]
    room: str  # the room of the furniture
    target: str  # the piece of furniture that things are put into or onto
    has_door: bool  # whether the target is a machine with a door, not a table
    uses: tuple[tuple[str, str], ...]  # the actions after walking, picking up and putting


def machine_task(verb, thing, machine, room="kitchen"):
    """The task to put a thing into a machine and to close the door."""
    return Task(
        goal=f"{verb} the {thing} in the {machine}",
        things=(thing,),
        home=room,
        furniture=(machine,),
        room=room,
        target=machine,
        has_door=True,
        uses=(("open", machine), ("close", machine)),
    )


TASKS = {
    "food-preparation": machine_task("heat", "pancake", "microwave"),
    "entertainment": Task(
        goal="enjoy the chips and the milk in front of the television",
        things=("chips", "milk"),
        home="kitchen",
        furniture=("coffee table", "television", "sofa"),
        room="living room",
        target="coffee table",
        has_door=False,
        uses=(
            ("turn on", "television"),
            ("turn off", "television"),
            ("sit down on", "sofa"),
            ("stand up from", "sofa"),
        ),
    ),
    # These test generalisation: other words for food-preparation, never trained on.
    "cheese": machine_task("heat", "cheese", "microwave"),
    "hamburger": machine_task("heat", "hamburger", "microwave"),
    "apple-pie": machine_task("heat", "apple pie", "microwave"),
    "pizza": machine_task("heat", "pizza", "microwave"),
    "washing-plate": machine_task("wash", "plate", "dishwasher"),
    "laundry": machine_task("wash", "clothes", "washing machine", room="bathroom"),
}


@dataclass
class State:
    """All that changes in the home, in plain JSON types."""

    agent: str  # the room that the agent is in
    close: list[str] = field(default_factory=list)  # what it is close to and does not hold
    held: dict[str, str] = field(default_factory=dict)  # thing -> its recorded room
    placed: list[str] = field(default_factory=list)  # the things in or on the target
    open: bool = False  # the machine's door
    tv_on: bool = False
    facing: bool = False  # whether the agent faces the television
    took_seat: bool = False  # whether it has sat down once
    seated: bool = False  # whether it is seated now, which is hidden


class VirtualHomeText:
    """One household task, with Gymnasium's calls.

    `gamma`, the discount of a step, is only kept: an action is one step, so there is nothing to
    discount within it. Raises ValueError when `task` is none of TASKS."""

    TASKS = tuple(TASKS)
    # The best discounted return of each task with gamma 0.95, by exact search over all states.
    OPTIMUM = dict.fromkeys(TASKS, 0.77378) | {"entertainment": 0.59874}
    GAMMA = 0.95  # the discount of a step, unless told otherwise
    STEPS = dict.fromkeys(TASKS, 3_072) | {"entertainment": 16_384}  # decisions to learn from

    def __init__(self, task="food-preparation", gamma=GAMMA):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; valid tasks: {', '.join(TASKS)}")
        self.task = task
        self.gamma = gamma
        self._task = TASKS[task]
        self.goal = self._task.goal
        self._on_target = f"{'in' if self._task.has_door else 'on'} the {self._task.target}"
        things = self._task.things
        places = (*ROOM_ACTIONS, *things, *self._task.furniture)
        self._actions = [("walk to", place) for place in places]
        self._actions += [("pick up", thing) for thing in things]
        self._actions += [("put", thing) for thing in things]
        self._actions += self._task.uses
        self.n_actions = len(self._actions)
        self._text_cache = {}  # vector -> (observation text, offered phrases)
        self.reset()
        self._running = False  # The caller has not begun an episode yet.

    def reset(self, seed=0):
        """Begin an episode. Returns the observation (English text) and the info (a dict):

        - "actions" maps the index of each offered action to its phrase.
        - "vector" is the observation in numbers, a float32 array of 11 or 21 (see `_vector`).
        - "primitive_steps" counts the steps of the latest action: 0 here, 1 after `step`.
        - "success" says whether the goal is reached.

        Nothing is random, so `seed` makes no difference."""
        self._state = State(agent=self._task.home)
        self._steps = 0
        self._running = True
        return self._observe()

    def step(self, action):
        """Carry out the action with this index, whether it is offered or not.

        Returns (obs, reward, terminated, truncated, info). `terminated` is True at the goal,
        `truncated` at the time limit. `obs` and `info` are as in `reset`. Raises RuntimeError when
        no episode is running, and ValueError when `action` is no index."""
        if not self._running:
            raise RuntimeError("no episode is running: call reset()")
        if not isinstance(action, int | np.integer) or not 0 <= action < self.n_actions:
            raise ValueError(f"action {action!r} is no integer from 0 to {self.n_actions - 1}")
        if self._possible(*self._actions[action]):
            self._do(*self._actions[action])
        self._steps += 1
        obs, info = self._observe(primitive_steps=1)
        terminated = info["success"]
        truncated = not terminated and self._steps >= MAX_STEPS
        self._running = not (terminated or truncated)
        return obs, float(terminated), terminated, truncated, info

    # --- The rules, which the top of the file tells in words --------------------------------------
    def _visible(self, name):
        """Whether it is in the hands, or in the agent's room and not behind a closed door."""
        state, task = self._state, self._task
        if name in state.held:
            return True
        if name in state.placed:
            return state.agent == task.room and (state.open or not task.has_door)
        return state.agent == (task.home if name in task.things else task.room)

    def _close(self, name):
        return name in self._state.close or name in self._state.held

    def _possible(self, verb, noun):
        """Whether the action can be done. What is close is always in the agent's room."""
        state, task = self._state, self._task
        if verb == "walk to":
            return not state.seated and (noun in ROOMS or self._visible(noun))
        if verb == "pick up":  # There are two hands and at most two things, so one hand is free.
            on_target = noun in state.placed and task.target in state.close
            return noun not in state.held and (noun in state.close or on_target)
        if verb == "put":
            is_open = state.open or not task.has_door
            return noun in state.held and task.target in state.close and is_open
        if verb == "stand up from":
            return state.seated
        if noun not in state.close:  # All other actions use furniture.
            return False
        if verb == "sit down on":
            return not state.seated
        if verb in ("open", "close"):
            return state.open == (verb == "close")
        free_hand = len(state.held) < 2
        return free_hand and state.tv_on == (verb == "turn off")

    def _do(self, verb, noun):
        """Change the state by an action that is possible."""
        state = self._state
        if verb == "walk to":
            self._walk(noun)
        elif verb == "pick up":
            state.held[noun] = state.agent
            state.close = [name for name in state.close if name != noun]
            state.placed = [name for name in state.placed if name != noun]
        elif verb == "put":
            del state.held[noun]
            state.placed.append(noun)
            state.close.append(noun)  # until the next walk
        elif verb == "sit down on":
            state.seated = state.facing = state.took_seat = True
        elif verb == "stand up from":
            state.seated = False
        elif verb in ("open", "close"):
            state.open = verb == "open"
            state.close = [noun]  # A closed door hides what is inside.
        else:
            state.tv_on = verb == "turn on"

    def _walk(self, to):
        """Walk to a room, to a thing or to furniture."""
        state, task = self._state, self._task
        start = state.agent
        state.agent = to if to in ROOMS else state.held.get(to, start)
        state.held = dict.fromkeys(state.held, start)
        state.facing = False
        state.close = []
        if to not in ROOMS and to not in state.held:
            state.close.append(to)
        if to in state.placed:
            state.close.append(task.target)
        elif to == task.target and task.has_door:
            state.close += state.placed

    def _success(self):
        state, task = self._state, self._task
        if task.has_door:
            return bool(state.placed) and not state.open
        ready = all(self._close(thing) or thing in state.placed for thing in task.things)
        return state.facing and state.tv_on and ready  # Only an agent on the sofa gets to face it.

    # --- The observation in numbers and in words --------------------------------------------------
    def _observe(self, primitive_steps=0):
        vector = self._vector()
        if vector not in self._text_cache:  # Text and phrases depend on the vector alone.
            phrases = {}
            for index, action in enumerate(self._actions):
                if self._offered(*action):
                    phrases[index] = self._phrase(*action)
            self._text_cache[vector] = self._text(), phrases
        obs, phrases = self._text_cache[vector]
        return obs, {
            "actions": dict(phrases),
            "vector": np.array(vector, dtype=np.float32),
            "primitive_steps": primitive_steps,
            "success": self._success(),
        }

    def _vector(self):
        """The observation in 11 or, in entertainment, 21 numbers, each 0 or 1, in the order of the
        paper's code."""
        state, task = self._state, self._task
        here = state.agent == task.room
        vector = [state.agent == room for room in ROOMS]
        for thing in task.things:
            vector += [self._visible(thing), self._close(thing), thing in state.held]
            if not task.has_door:
                vector.append(here and thing in state.placed)
        if task.has_door:
            is_open = here and state.open
            vector += [here, task.target in state.close, is_open, is_open and bool(state.placed)]
        else:
            vector += [here, "television" in state.close, state.facing, here and state.tv_on]
            vector += [here, "sofa" in state.close, here and state.took_seat]
            vector += [here, "coffee table" in state.close]
        return tuple(vector)

    def _text(self):
        """The observation in English. Different vectors have different texts."""
        state, task = self._state, self._task
        here = state.agent == task.room
        visible = [name for name in task.things if self._visible(name)]
        placed = [f"the {name}" for name in visible if name in state.placed]
        held = [f"the {name}" for name in visible if name in state.held]
        seen = [f"the {name}" for name in visible if name not in (*state.placed, *state.held)]
        if here:
            seen += [f"{'the' if task.has_door else 'a'} {name}" for name in task.furniture]
        near = [f"the {name}" for name in (*task.things, *task.furniture) if name in state.close]
        sentences = [
            "This home has a kitchen, a bathroom, a bedroom and a living room.",
            f"You are in the {state.agent}.",
            f"You see {listed(seen) or 'nothing useful here'}.",
        ]
        if here and task.has_door:
            sentences.append(f"The {task.target} is {'open' if state.open else 'closed'}.")
        if placed:
            plural = len(placed) > 1 or placed[0] in ("the chips", "the clothes")
            verb = "are" if plural else "is"
            sentences.append(f"{listed(placed).capitalize()} {verb} {self._on_target}.")
        if near:
            sentences.append(f"You are next to {listed(near)}.")
        if here and not task.has_door:
            sentences.append(f"The television is {'on' if state.tv_on else 'off'}.")
            if state.facing:
                sentences.append("You face the television.")
            if state.took_seat:
                sentences.append("You took a seat on the sofa.")
        sentences.append(f"You hold {listed(held)}." if held else "Your hands are empty.")
        return " ".join(sentences)

    def _phrase(self, verb, noun):
        if verb == "put":
            return f"put the {noun} {self._on_target}"
        return f"{verb} the {noun}"

    def _offered(self, verb, noun):
        """Whether the action can have an effect, as far as the agent perceives."""
        if verb == "walk to":
            there_already = noun == self._state.agent or self._close(noun)
            return not there_already and (noun in ROOMS or self._visible(noun))
        # Whether the agent is seated is hidden. That it faces the television is the nearest sign.
        if verb == "sit down on":
            return self._close(noun) and not self._state.facing
        if verb == "stand up from":
            return self._state.facing
        return self._possible(verb, noun)

    # --- The state --------------------------------------------------------------------------------
    def get_state(self):
        """Returns all that is needed to go on from here, as a dict of plain JSON types."""
        return {
            "task": self.task,
            "steps": self._steps,
            "running": self._running,
            "home": asdict(self._state),
        }

    def set_state(self, state):
        """Go on from what `get_state` returned. Returns (obs, info), as `reset` does. Raises
        ValueError when it is a state of another task."""
        if state["task"] != self.task:
            raise ValueError(f"a state of task {state['task']!r}, not {self.task!r}")
        self._state = State(**deepcopy(state["home"]))
        self._steps = state["steps"]
        self._running = state["running"]
        return self._observe()

    def render(self):
        """Returns the home as text graphics: the true state, also what the agent does not see."""
        state, task = self._state, self._task
        contents = ", ".join(state.placed) or "empty"
        door = "open" if state.open else "closed"
        notes = {
            "television": "on" if state.tv_on else "off",
            "sofa": "the agent sits here" if state.seated else "free",
            task.target: f"{door}; {contents}" if task.has_door else contents,
        }
        lines = {room: [] for room in ROOMS}
        lines[state.agent].append(f"@ holds {', '.join(state.held) or 'nothing'}")
        for name in (*task.things, *task.furniture):
            if name not in (*state.held, *state.placed):
                room = task.home if name in task.things else task.room
                mark = "*" if name in state.close else "-"
                note = f" ({notes[name]})" if name in notes else ""
                lines[room].append(f"{mark} {name}{note}")
        kitchen, bathroom, bedroom, living_room = (box(room, lines[room]) for room in ROOMS)
        rows = [
            f"{self.task}, step {self._steps} of {MAX_STEPS}",
            *map("{} {}".format, kitchen, bathroom),
            *map("{} {}".format, bedroom, living_room),
            "@ the agent   * next to the agent   - further away   (state; contents)",
        ]
        return "\n".join(rows)


def box(title, lines):
    """Draw a room: six lines of 38 characters, of which four are inside."""
    inside = [*lines, "", "", "", ""][:4]
    top = f" {title} ".center(36, "-")
    return [f"+{top}+", *(f"| {line:<34} |" for line in inside), f"+{'-' * 36}+"]


def listed(phrases):
    """Join phrases: ["a", "b", "c"] becomes "a, b and c". The last comma becomes an "and"."""
    return " and ".join(", ".join(phrases).rsplit(", ", 1))
