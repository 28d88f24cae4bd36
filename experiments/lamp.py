"""An example of an environment of your own: python experiments/lamp.py [--FLAG VALUE ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402

MAX_STEPS = 5  # decisions in an episode
PLAN = ["turn on the lamp", "open the drawer", "pick up the letter"]  # what helps, in this order
PHRASES = PLAN + ["pick up the book", "walk to the window", "sit down on the sofa"]
SCENES = [  # by the number of steps of the plan that are done
    "You see a lamp and a drawer. The lamp is off. The drawer is closed.",
    "You see a lamp and a drawer. The lamp is on. The drawer is closed.",
    "You see a lamp and a drawer. The lamp is on. The drawer is open. A letter is in the drawer.",
    "You hold the letter.",
]


class Lamp:
    """In the dark nothing can be found, so the lamp comes first. The letter is in the drawer."""

    TASKS = ("letter",)
    GAMMA = 0.9  # the discount of a step
    STEPS = {"letter": 4096}  # decisions to learn from
    goal = "get the letter"
    n_actions = len(PHRASES)  # PPO from scratch asks for it

    def __init__(self, task, gamma):
        self.reset()

    def reset(self):
        return self.set_state({"done": 0, "steps": 0})

    def step(self, action):
        self.steps += 1
        if action == self.done:  # the next step of the plan; no other action has an effect
            self.done += 1
        obs, info = self.observe()
        success = info["success"]
        return obs, float(success), success, self.steps >= MAX_STEPS, info

    def observe(self):
        info = {"actions": dict(enumerate(PHRASES)), "primitive_steps": 1}
        return SCENES[self.done], info | {"success": self.done == len(PLAN)}

    def get_state(self):
        return {"done": self.done, "steps": self.steps}

    def set_state(self, state):
        self.done, self.steps = state["done"], state["steps"]
        return self.observe()

    def render(self):
        return f"After {self.steps} decisions {self.done} of the plan's {len(PLAN)} steps are done."


twosome.ENVS["lamp"] = Lamp
if __name__ == "__main__":
    twosome.main(sys.argv[1:], defaults={"env": "lamp"}, program=sys.argv[0])
