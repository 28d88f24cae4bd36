"""A household in words: the two VirtualHome tasks of the TWOSOME paper, without VirtualHome.

    env = VirtualHomeText(task="food-preparation")  # VirtualHomeText.TASKS names all tasks
    obs, info = env.reset()  # "This home has a kitchen, a bathroom, a bedroom and a living ..."
    obs, reward, terminated, truncated, info = env.step(4)  # the index of an action

Heating and washing are one task in different words: bring a thing into a machine, close its door.
`food-preparation` is the paper's; six others are unseen, to test generalisation. `entertainment`:
sit on the sofa in front of the running television while chips and milk are held or on the table.

**Rules**
- One action is one step. The reward is 1 at the goal (terminated), else 0; 50 steps are the limit
  (truncated). Any action may be stepped at any time; what can not be done passes without effect.
- Walking to a room brings the agent close to nothing but what it holds; walking to something in
  view brings it close to that, and away from the rest.
- Picking up, putting, opening and switching need the agent to be close; the television also needs
  one of the two hands free. A thing goes into a machine only while its door is open.
- What lies in the open machine is close when the machine is. What lies on the coffee table can be
  picked up from there, but counts as close only after a walk to it.

**What is hidden**: the observation is less than the state. Nothing is random.
- What lies in other rooms, and whether the machine or the television there is open or on.
- Whether the agent is still seated. While it is, no walk succeeds. Standing up does not show: only
  a walk ends the facing of the television, and "took a seat" stays true for the episode.
- The recorded room of each held thing: where the agent was before its latest walk. Walking to the
  thing leads there. (An oddity of the simulator, kept, but never offered.)

**Offered actions** (info["actions"]): walking to the three other rooms, and what can have an effect
as far as the agent perceives. The reference lists them by hand; the differences are:
- Nothing that visibly fails, and no walk to a thing in hand: such choices only dilute the policy.
- What lies in the open machine or on the coffee table can be picked up again, and the second snack
  can join the first there: what is possible is not withheld.
- With one snack left in the kitchen the agent can walk to it. The reference names the absent one.
- While the agent faces the television, on or off, it may stand up; else, at the sofa, sit down.
- Walks and the uses of the furniture stay offered at the coffee table with empty hands and at the
  sofa after taking a seat. In the reference 37 reachable states are dead ends; here none is.
"""
from copy import deepcopy
from dataclasses import asdict, dataclass, field

import numpy as np

MAX_STEPS = 50  # steps in an episode
ROOMS = ("kitchen", "bathroom", "bedroom", "living room")  # in the order of the vector
ROOM_ACTIONS = ("living room", "kitchen", "bathroom", "bedroom")  # in the order of the actions


@dataclass(frozen=True)
class Task:
    """What a task is about."""
    goal: str  # a clause: "To {goal}, your next step is to ..."
    things: tuple[str, ...]  # what can be carried; nothing else can
    home: str  # the room where the things lie and where the agent starts
    furniture: tuple[str, ...]
    room: str  # the room of the furniture
    target: str  # the piece of furniture that things are put into or onto
    has_door: bool  # the target is a machine to put things into, not a table
    uses: tuple[tuple[str, str], ...]  # the actions after walking, picking up and putting


def machine_task(verb: str, thing: str, machine: str, room: str = "kitchen") -> Task:
    return Task(goal=f"{verb} the {thing} in the {machine}", things=(thing,), home=room,
                furniture=(machine,), room=room, target=machine, has_door=True,
                uses=(("open", machine), ("close", machine)))


TASKS = {
    "food-preparation": machine_task("heat", "pancake", "microwave"),
    "entertainment": Task(
        goal="enjoy the chips and the milk in front of the television", things=("chips", "milk"),
        home="kitchen", furniture=("coffee table", "television", "sofa"), room="living room",
        target="coffee table", has_door=False,
        uses=(("turn on", "television"), ("turn off", "television"),
              ("sit down on", "sofa"), ("stand up from", "sofa"))),
    # The unseen tasks: other words for food-preparation, never trained on.
    "cheese": machine_task("heat", "cheese", "microwave"),
    "hamburger": machine_task("heat", "hamburger", "microwave"),
    "apple-pie": machine_task("heat", "apple pie", "microwave"),
    "pizza": machine_task("heat", "pizza", "microwave"),
    "washing-plate": machine_task("wash", "plate", "dishwasher"),
    "laundry": machine_task("wash", "clothes", "washing machine", room="bathroom"),
}


@dataclass
class State:
    """All that changes in the home, as plain JSON types."""
    agent: str  # the room the agent is in
    close: list[str] = field(default_factory=list)  # what the latest walk led to; not: what is held
    held: dict[str, str] = field(default_factory=dict)  # thing -> its recorded room
    placed: list[str] = field(default_factory=list)  # things in or on the target
    open: bool = False  # the machine's door
    tv_on: bool = False
    facing: bool = False  # the agent faces the television
    took_seat: bool = False  # the agent has sat down once
    seated: bool = False  # hidden


class VirtualHomeText:
    """One household task, with Gymnasium's calls. `step` takes the index of an action.
    Raises ValueError when `task` is none of TASKS."""
    TASKS = tuple(TASKS)
    # The best discounted return of each task with gamma 0.95, by exact search over all states.
    OPTIMUM = {task: 0.59874 if task == "entertainment" else 0.77378 for task in TASKS}

    def __init__(self, task: str = "food-preparation"):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; valid tasks: {', '.join(TASKS)}")
        self.task, self._task = task, TASKS[task]
        self.goal = self._task.goal
        self._on_target = f"{'in' if self._task.has_door else 'on'} the {self._task.target}"
        places = (*ROOM_ACTIONS, *self._task.things, *self._task.furniture)
        self._actions = [*(("walk to", place) for place in places),
                         *(("pick up", thing) for thing in self._task.things),
                         *(("put", thing) for thing in self._task.things), *self._task.uses]
        self.n_actions = len(self._actions)
        self._told: dict[tuple, tuple] = {}  # vector -> (observation text, offered phrases)
        self.reset()
        self._running = False  # until the caller begins an episode

    def reset(self, seed: int = 0) -> tuple[str, dict]:
        """Begin an episode. Returns (obs, info). Nothing is random: `seed` makes no difference."""
        self._state, self._steps, self._running = State(agent=self._task.home), 0, True
        return self._observe()

    def step(self, action: int) -> tuple[str, float, bool, bool, dict]:
        """Carry out an action. Returns (obs, reward, terminated, truncated, info).
        info["changed"] says whether it changed the state.
        Raises RuntimeError when no episode is running, ValueError when `action` is no index."""
        if not self._running:
            raise RuntimeError("no episode is running: call reset()")
        if not isinstance(action, (int, np.integer)) or not 0 <= action < self.n_actions:
            raise ValueError(f"action {action!r} is no integer from 0 to {self.n_actions - 1}")
        before = deepcopy(self._state)
        if self._possible(*self._actions[action]):
            self._do(*self._actions[action])
        self._steps += 1
        obs, info = self._observe(primitive_steps=1)
        info["changed"] = self._state != before
        terminated = info["success"]
        truncated = not terminated and self._steps >= MAX_STEPS
        self._running = not (terminated or truncated)
        return obs, float(terminated), terminated, truncated, info

    # --- The rules --------------------------------------------------------------------------------
    def _visible(self, name: str) -> bool:
        """In the agent's hands, or in its room and not behind a closed door."""
        state, task = self._state, self._task
        if name in state.held:
            return True
        if name in state.placed:
            return state.agent == task.room and (state.open or not task.has_door)
        return state.agent == (task.home if name in task.things else task.room)

    def _close(self, name: str) -> bool:
        return name in self._state.close or name in self._state.held

    def _possible(self, verb: str, noun: str) -> bool:
        """Whether the action can be done. What is close is also in the agent's room."""
        state, task = self._state, self._task
        if verb == "walk to":
            return not state.seated and (noun in ROOMS or self._visible(noun))
        if verb == "pick up":  # there are two things at most: a hand is always free for the second
            on_target = noun in state.placed and task.target in state.close
            return noun not in state.held and (noun in state.close or on_target)
        if verb == "put":
            accepts = task.target in state.close and (state.open or not task.has_door)
            return noun in state.held and accepts
        if verb == "sit down on":
            return self._close(noun) and not state.seated
        if verb == "stand up from":
            return state.seated
        is_on = state.open if task.has_door else state.tv_on
        free_hand = len(state.held) < 2  # the television needs one; a machine's task has one thing
        return self._close(noun) and free_hand and is_on == (verb in ("close", "turn off"))

    def _do(self, verb: str, noun: str) -> None:
        """Change the state by an action that is possible."""
        state, task = self._state, self._task
        if verb == "walk to":
            before = state.agent
            state.agent = noun if noun in ROOMS else state.held.get(noun, before)
            state.held = {thing: before for thing in state.held}
            state.facing = False
            state.close = [] if noun in ROOMS or noun in state.held else [noun]
            if noun in state.placed:
                state.close.append(task.target)
            elif noun == task.target and task.has_door:
                state.close += state.placed
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
            state.seated = False  # still facing, and the seat still counts
        elif task.has_door:
            state.open = verb == "open"
            state.close = [task.target]  # a closed door hides what is inside
        else:
            state.tv_on = verb == "turn on"

    def _success(self) -> bool:
        state, task = self._state, self._task
        if task.has_door:
            return bool(state.placed) and not state.open
        ready = all(self._close(thing) or thing in state.placed for thing in task.things)
        return state.facing and state.tv_on and ready  # who faces the television has taken a seat

    # --- The observation in words -----------------------------------------------------------------
    def _observe(self, primitive_steps: int = 0) -> tuple[str, dict]:
        vector = self._vector()
        if vector not in self._told:  # text and offered phrases depend on the vector alone
            phrases = {index: self._phrase(*pair) for index, pair in enumerate(self._actions)
                       if self._offered(*pair)}
            self._told[vector] = self._text(), phrases
        obs, phrases = self._told[vector]
        return obs, {"actions": dict(phrases), "vector": np.array(vector, dtype=np.float32),
                     "primitive_steps": primitive_steps, "success": self._success()}

    def _vector(self) -> tuple[bool, ...]:
        """The symbolic observation, in the reference's order: 11 bits, in entertainment 21."""
        state, task = self._state, self._task
        here = state.agent == task.room
        vector = [state.agent == room for room in ROOMS]
        for thing in task.things:
            vector += [self._visible(thing), self._close(thing), thing in state.held]
            if not task.has_door:
                vector.append(here and thing in state.placed)
        if task.has_door:
            thing_inside = here and state.open and bool(state.placed)
            vector += [here, task.target in state.close, here and state.open, thing_inside]
        else:
            vector += [here, "television" in state.close, state.facing, here and state.tv_on,
                       here, "sofa" in state.close, here and state.took_seat,
                       here, "coffee table" in state.close]
        return tuple(vector)

    def _text(self) -> str:
        """The observation in English. Different vectors have different texts."""
        state, task = self._state, self._task
        here = state.agent == task.room
        things = [x for x in task.things if self._visible(x)]  # also those in the hands
        placed = [f"the {x}" for x in things if x in state.placed]
        held = [f"the {x}" for x in things if x in state.held]
        seen = [f"the {x}" for x in things if x not in (*state.placed, *state.held)]
        seen += [f"{'the' if task.has_door else 'a'} {x}" for x in task.furniture if here]
        near = [f"the {x}" for x in (*task.things, *task.furniture) if x in state.close]
        parts = [f"This home has {listed(f'a {room}' for room in ROOMS)}.",
                 f"You are in the {state.agent}.",
                 f"You see {listed(seen) or 'nothing useful here'}."]
        if here and task.has_door:
            parts.append(f"The {task.target} is {'open' if state.open else 'closed'}.")
        if placed:
            verb = "are" if len(placed) > 1 or placed[0] in ("the chips", "the clothes") else "is"
            parts.append(f"{listed(placed).capitalize()} {verb} {self._on_target}.")
        if near:
            parts.append(f"You are next to {listed(near)}.")
        if here and not task.has_door:
            parts.append(f"The television is {'on' if state.tv_on else 'off'}.")
            if state.facing:
                parts.append("You face the television.")
            if state.took_seat:
                parts.append("You took a seat on the sofa.")
        parts.append(f"You hold {listed(held)}." if held else "Your hands are empty.")
        return " ".join(parts)

    def _phrase(self, verb: str, noun: str) -> str:
        return f"{verb} the {noun}" + (f" {self._on_target}" if verb == "put" else "")

    def _offered(self, verb: str, noun: str) -> bool:
        """Whether the action can have an effect, as far as the agent perceives."""
        state = self._state
        if verb == "walk to":
            there_already = noun == state.agent or self._close(noun)
            return not there_already and (noun in ROOMS or self._visible(noun))
        # Being seated is hidden. Facing the television is the best that the agent can go by.
        if verb == "sit down on":
            return self._close(noun) and not state.facing
        if verb == "stand up from":
            return state.facing
        return self._possible(verb, noun)

    # --- The state --------------------------------------------------------------------------------
    def get_state(self) -> dict:
        """Returns all that is needed to continue from here, in plain JSON types."""
        return {"task": self.task, "steps": self._steps, "running": self._running,
                "home": asdict(self._state)}

    def set_state(self, state: dict) -> tuple[str, dict]:
        """Continue from what `get_state` returned. Returns (obs, info), as `reset` does.
        Raises ValueError when it is a state of another task."""
        if state["task"] != self.task:
            raise ValueError(f"a state of task {state['task']!r}, not {self.task!r}")
        self._state = State(**deepcopy(state["home"]))
        self._steps, self._running = state["steps"], state["running"]
        return self._observe()

    def render(self) -> str:
        """Returns the home in ASCII: the true state, also what the agent can not perceive."""
        state, task = self._state, self._task
        door = f"{'open' if state.open else 'closed'}; " if task.has_door else ""
        notes = {task.target: door + (", ".join(state.placed) or "empty"),
                 "television": "on" if state.tv_on else "off",
                 "sofa": "the agent sits here" if state.seated else "free"}
        lines = {room: [] for room in ROOMS}
        lines[state.agent].append(f"@ holds {', '.join(state.held) or 'nothing'}")
        for name in (*task.things, *task.furniture):
            if name not in state.held and name not in state.placed:
                note = f" ({notes[name]})" if name in notes else ""
                room = task.home if name in task.things else task.room
                lines[room].append(f"{'*' if name in state.close else '-'} {name}{note}")
        boxes = [[f"+{f' {room} '.center(36, '-')}+",
                  *(f"| {line:<34} |" for line in (lines[room] + [""] * 4)[:4]),
                  f"+{'-' * 36}+"] for room in ROOMS]
        rows = [" ".join(pair) for left in (0, 2) for pair in zip(*boxes[left:left + 2])]
        return "\n".join([f"{self.task}, step {self._steps} of {MAX_STEPS}", *rows,
                          "@ the agent   * next to the agent   - further away   (state; contents)"])


def listed(phrases) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    *first, last = [*phrases] or [""]
    return f"{', '.join(first)} and {last}" if first else last
