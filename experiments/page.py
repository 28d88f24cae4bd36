"""An agent's whole world on one page, to play with: opened by a double click, without a network.

    python experiments/page.py RUN [--out page.html]
    python experiments/page.py RUN --movie movie.gif    # one episode; needs Chromium or Chrome

RUN is a folder that twosome.py left. The worlds are small and nothing in them is random, so the
page can hold every state that can be reached: its picture, what the agent is told, what it may do,
where that leads, and the log-probability of each token of each action, untrained and trained. The
page's other half, page.html, draws all this, and computes policies, success and return from it.
"""

import argparse
import base64
import json
import random
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import overcooked_text  # noqa: E402
import twosome  # noqa: E402
import virtualhome_text  # noqa: E402
from experiments import baselines, exact  # noqa: E402
from overcooked_text import HOME, SERVING, START, VIEW, face  # noqa: E402
from twosome import UserError, encode, require  # noqa: E402


# === 1. Scenes: what is drawn where. x goes to the right and y down; a cell is 1 by 1. ============
def picture(icon, x, y, size=1):
    """One of the icons in page.html, by its upper left corner."""
    return ["picture", icon, round(x, 2), round(y, 2), round(size, 2)]


def label(text, x, y, align="middle"):
    """A line of text, by its baseline."""
    return ["label", text, round(x, 2), round(y, 2), align]


def window(x, y, width, height):
    """What the agent sees. Everything else is dark."""
    return ["window", x, y, width, height]


class KitchenScene:
    """Overcooked. Everything stands on the counters along the walls, and its name outside them."""

    frame = (-2.8, -1.05, 11.3, 8.95)  # x, y, width and height of the whole drawing
    size = (7, 7)  # of what can be dark

    def __init__(self, task):
        self.places = {HOME["bowl"]: "shelf", SERVING: "serving counter"}
        for food in ("tomato", "lettuce", "onion"):
            self.places[HOME[food]] = "table"
        for cell, name in overcooked_text.TASKS[task].boards.items():
            self.places[cell] = name.removeprefix("the ")

    def background(self):
        """What never changes."""
        drawn = []
        for cell in np.ndindex(*self.size):
            row, column = cell
            drawn.append(picture("floor" if face(cell) == cell else "counter", column, row))
        for cell, name in self.places.items():
            row, column = cell
            drawn.append(picture(name.split()[-1], column, row))
            if cell not in (HOME["lettuce"], HOME["onion"]):  # The table is named once.
                drawn.append(self.outside(name.replace(" cutting", ""), cell, 0))
        # The text calls this place the middle, which nobody would guess.
        row, column = START
        drawn.append(picture("mat", column, row))
        for line, words in enumerate(("“middle of", "the kitchen”")):
            drawn.append(label(words, column + 0.95, row + 1.35 + 0.36 * line, "end"))
        return drawn

    def outside(self, text, cell, line):
        """A label outside the wall: on line 0 the place, below it the thing that is there."""
        row, column = cell
        if column == 0:
            return label(text, -0.2, row + 0.45 + 0.38 * line, "end")
        if column == 6:
            return label(text, 7.2, row + 0.45 + 0.38 * line, "start")
        return label(text, column + 0.5, (7.35 if row else -0.55) + 0.38 * line)

    def draw(self, state):
        """Return what changes, and the same in words."""
        row, column = state["agent"]
        drawn = [picture("cook", column, row)]
        told = [f"cook in row {row + 1}, column {column + 1} of 7"]
        in_bowl = [item for item, at in state["place"].items() if at == "bowl"]
        for item in reversed(state["place"]):  # the bowl first, and over it what is in it
            at = state["place"][item]
            name = f"chopped {item}" if item in state["chopped"] else item
            x, y, size = self.spot(state["place"]["bowl"] if item in in_bowl else at, row, column)
            if item in in_bowl:
                x += size * (0.12 + 0.3 * in_bowl.index(item))
                y += size * 0.12
                size *= 0.45
            drawn.append(picture(name, x, y, size))
            if isinstance(at, str):
                told.append(f"{name} in the {at}")
            else:
                told.append(f"{name} on the {self.places[tuple(at)]}")
                drawn.append(self.outside(name, at, 1))
        left, right = max(column - VIEW, 0), min(column + VIEW + 1, 7)
        top, bottom = max(row - VIEW, 0), min(row + VIEW + 1, 7)
        return [*drawn, window(left, top, right - left, bottom - top)], told

    def spot(self, at, row, column):
        """Left, top and size of something on a counter, or in the hand of the cook."""
        if at == "hand":
            return column + 0.5, row + 0.42, 0.58
        return at[1] + 0.12, at[0] + 0.1, 0.76


class HomeScene:
    """VirtualHome. In each room things stand in a row with their names below them, and the agent
    stands below what it is next to, or near the door."""

    frame = (-0.1, -0.1, 11.4, 7.8)
    size = (11.2, 7.6)
    rooms = {"kitchen": (0, 0), "bathroom": (5.6, 0)}
    rooms |= {"bedroom": (0, 3.8), "living room": (5.6, 3.8)}

    def __init__(self, task):
        self.about = about = virtualhome_text.TASKS[task]
        stands = {about.home: [*about.things]}
        stands[about.room] = [*stands.get(about.room, ()), *about.furniture]
        self.spots = {}  # thing -> left, top
        for room, names in stands.items():
            for place, name in enumerate(names):
                self.spots[name] = self.at(room, 1.1 + 1.5 * place, 0.6)

    def at(self, room, x, y):
        left, top = self.rooms[room]
        return left + x, top + y

    def background(self):
        drawn = []
        for room in self.rooms:
            drawn.append(picture("room", *self.at(room, 0, 0)))
            drawn.append(label(room, *self.at(room, 0.2, 0.48), "start"))
        bath, bed = self.at("bathroom", 4, 0.5), self.at("bedroom", 4, 0.5)
        return [*drawn, picture("bath", *bath, 1.5), picture("bed", *bed, 1.5)]

    def draw(self, state):
        """Return what changes, and the same in words."""
        home, about = state["home"], self.about
        conditions = {"television": "on" if home["tv_on"] else "off"}
        if about.has_door:
            conditions[about.target] = "open" if home["open"] else "closed"
        agent = self.agent_spot(home)
        drawn, told = [], [f"agent in the {home['agent']}{', seated' * home['seated']}"]
        labelled = [*about.furniture]
        for name in about.furniture:
            words = f"{name} {conditions.get(name, '')}".strip()
            told.append(f"{words} in the {about.room}")
            drawn.append(picture("machine" if about.has_door else words, *self.spots[name], 1.3))
        drawn.append(picture("agent", *agent, 1.15))
        for thing in about.things:
            words, spot = self.find(thing, home, agent)
            told.append(f"{thing} {words}")
            drawn.append(picture(thing, *spot))
            if thing not in home["held"] and thing not in home["placed"]:
                labelled.append(thing)
        if about.has_door:  # in front of what is in the machine
            door = f"{conditions[about.target]} door"
            drawn.append(picture(door, *self.spots[about.target], 1.3))
        for name in labelled:
            x, y = self.spots[name]
            for line, word in enumerate(name.split()):
                drawn.append(label(word, x + 0.65, y + 1.6 + 0.34 * line))
        return [*drawn, window(*self.rooms[home["agent"]], 5.6, 3.8)], told

    def agent_spot(self, home):
        """Left and top of the agent."""
        if not home["close"]:
            return self.at(home["agent"], 0.05, 2.55)
        name = home["close"][0]
        x, y = self.spots[self.about.target if name in home["placed"] else name]
        return x + 0.08, y + (-0.1 if home["seated"] else 1.95)

    def find(self, thing, home, agent):
        """Where a thing is that can be carried: in words, and its left, top and size."""
        x, y = self.spots[thing]
        if thing in home["held"]:
            x, y = agent
            side = list(home["held"]).index(thing)
            return "in the hand", (x + (0.72, -0.17)[side], y + 0.5, 0.6)
        if thing in home["placed"]:
            target = self.about.target
            x, y = self.spots[target]
            place = home["placed"].index(thing)
            words = f"{'in' if self.about.has_door else 'on'} the {target}"
            return words, (x + 0.25 + 0.45 * place, y + 0.35, 0.5)
        return f"in the {self.about.home}", (x + 0.15, y + 0.15, 1)


SCENES = {"overcooked": KitchenScene, "virtualhome": HomeScene}


class TextScene:
    """Another environment shows what its render() returns, or else its observation."""

    def __init__(self, wrapper):
        self.wrapper = wrapper

    def draw(self, state):
        render = getattr(self.wrapper.env, "render", None)
        text = render() if render else self.wrapper.obs
        return text, [text]


# === 2. The data of the page. =====================================================================
def explore(wrapper, scene):
    """Find all states that can be reached, breadth first, the clock aside. Returns the views, which
    are distinct pairs of prompt and phrases, and the states as the page has them.

    Each action of a state leads to [number of the next state, reward, primitive steps]. From an end
    nothing leads on."""
    queue = [wrapper.env.get_state()]  # It grows while it is read.
    numbers = {json.dumps(queue[0], sort_keys=True): 0}
    ends = set()
    views, states = {}, []
    for number, state in enumerate(queue):
        exact.set_state(wrapper, state)
        view = wrapper.state()
        _, phrases = view
        drawn, told = scene.draw(state)
        shown = {"view": views.setdefault(view, len(views)), "scene": drawn, "told": told}
        shown |= {"success": bool(wrapper.info["success"]), "leads": []}
        states.append(shown)
        if number in ends:
            continue
        for choice in range(len(phrases)):
            exact.set_state(wrapper, state)
            reward, _ = wrapper.step(choice)
            following = wrapper.env.get_state() | {"steps": 0}
            next_number = numbers.setdefault(json.dumps(following, sort_keys=True), len(queue))
            if next_number == len(queue):
                queue.append(following)
            if wrapper.done:
                ends.add(next_number)
            shown["leads"].append([next_number, reward, wrapper.info["primitive_steps"]])
    return list(views), states


@torch.no_grad()
def token_log_probs(agent, encoded, trained):
    """log P of each token of each action of each view, given those before it, one after another: it
    is the difference between two joint ones, with the token and without it."""
    beginnings, n_tokens = [], []
    for prompt_ids, action_ids in encoded:
        parts = []
        for ids in action_ids:
            parts += [ids[:n] for n in range(1, len(ids) + 1)]
            n_tokens.append(len(ids))
        beginnings.append((prompt_ids, parts))
    joint = []
    chunks = twosome.chunks(beginnings, agent.settings.max_prompts)
    with nullcontext() if trained else agent.model.disable_adapter():
        for chunk in tqdm(chunks, "trained" if trained else "untrained", delay=2, disable=None):
            joint += agent.score(agent.model, chunk)
    actions = torch.cat(joint).cpu().split(n_tokens)
    zero = torch.zeros(1)
    return torch.cat([log_probs.diff(prepend=zero) for log_probs in actions]).numpy()


def token_texts(tokenizer, ids):
    """The piece of text that each token adds, with the space in it."""
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    return [text[len(before) :] for before, text in pairwise(texts)]


def learning_curve(agent, folder, settings):
    """Return the decisions of training, and rows (decisions, success, return) from the run's log.
    The first row is the untrained LM's."""
    saved = twosome.Run(folder, settings, "twosome").load(agent)
    rows, before, decisions = saved["log"]
    if before:
        rows = [{"decisions": 0, **before}, *rows]
    log = []
    for row in rows:
        if "success" in row:  # It is missing with --test_episodes 0.
            log.append([row["decisions"], row["success"], row["return"]])
    return decisions, log


def world(agent, settings, folder):
    """Everything that the page shows, as it goes into the page."""
    wrapper = twosome.make_env(agent, settings)
    drawing = {}
    if settings.env in SCENES:
        scene = SCENES[settings.env](settings.task)
        drawing = {"frame": scene.frame, "size": scene.size, "background": scene.background()}
    else:
        scene = TextScene(wrapper)
    views, states = explore(wrapper, scene)
    encoded = [encode(agent.tokenizer, *view) for view in views]
    numbers = {}  # The same phrases come again and again, so each is stored once.
    shown = []
    for (prompt, phrases), (_, action_ids) in zip(views, encoded, strict=True):
        keys = [(phrase, *ids) for phrase, ids in zip(phrases, action_ids, strict=True)]
        actions = [numbers.setdefault(key, len(numbers)) for key in keys]
        shown.append({"prompt": prompt, "actions": actions})
    log_probs = {}
    for name in ("untrained", "trained"):
        floats = token_log_probs(agent, encoded, name == "trained").astype("<f4")
        log_probs[name] = base64.b64encode(floats).decode()
    decisions, log = learning_curve(agent, folder, settings)
    return drawing | {
        "settings": {name: vars(settings)[name] for name in ("task", "model", "norm", "seed")},
        "gamma": settings.gamma,
        "limit": exact.time_limit(settings),
        "decisions": decisions,
        "log": log,
        "games": [twosome.EVALUATION_EPISODES, settings.test_episodes],
        "views": shown,
        "states": states,
        "phrases": [[phrase, token_texts(agent.tokenizer, ids)] for phrase, *ids in numbers],
        "log_probs": log_probs,
    }


def page(data):
    """The page, with its data. In a script element "<" could end it, so it is written otherwise."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Path(__file__).with_suffix(".html").read_text().replace("{{data}}", text)


# === 3. The movie: the page plays an episode, and a browser takes one photograph of all frames. ===
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSERS += ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
FRAME = (900, 640)  # pixels; page.html knows the width, and what stays empty below is cut off
COLUMNS = 8  # A browser refuses a photograph that is very high.
LONGEST = 30  # decisions in a movie


def browser(*arguments):
    """Run a browser without a window."""
    found = [path for path in map(shutil.which, BROWSERS) if path]
    require(found, f"no browser, looked for {', '.join(BROWSERS)}")
    # A browser refuses to run as root with its sandbox. The only page that it opens is ours.
    fixed = "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"
    command = [found[0], *fixed, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


def play(agent, settings):
    """The choices of one episode, or of its beginning."""
    env = twosome.make_env(agent, settings)
    rng = random.Random(settings.seed)
    choices = []
    while not env.done and len(choices) < LONGEST:
        (log_pi,) = agent.cached_log_policy([env.state()])
        choices.append(twosome.sample(log_pi, rng))
        env.step(choices[-1])
    return choices


def movie(text, choices, path):
    """Write an episode as a GIF. Each decision has a frame before the agent chooses, and one
    after."""
    from PIL import Image, ImageChops

    n_frames = 2 * len(choices) + 1
    width, height = FRAME
    window_size = f"{width * COLUMNS},{height * -(-n_frames // COLUMNS)}"
    with tempfile.TemporaryDirectory(dir=path.resolve().parent) as folder:
        html, png = Path(folder, "page.html"), Path(folder, "page.png")
        html.write_text(text)
        browser(
            f"--user-data-dir={folder}/profile",
            f"--window-size={window_size}",
            f"--screenshot={png}",
            f"{html.as_uri()}#movie={','.join(map(str, choices))}",
        )
        sheet = Image.open(png).convert("RGB")
    empty = Image.new("RGB", sheet.size, sheet.getpixel((0, 0)))
    frames = []
    for i in range(n_frames):
        x, y = width * (i % COLUMNS), height * (i // COLUMNS)
        frames.append((x, y, x + width, y + height))
    drawn = ImageChops.difference(sheet, empty)
    used = max(drawn.crop(frame).getbbox()[3] for frame in frames) + 8
    palette = sheet.quantize(256, Image.Quantize.MEDIANCUT)
    plain = Image.Dither.NONE
    images = []
    for frame in frames:
        image = sheet.crop(frame).crop((0, 0, width, used))
        images.append(image.quantize(palette=palette, dither=plain))
    durations = [1200] * (n_frames - 1) + [4000]  # in ms
    first, *others = images
    first.save(path, save_all=True, append_images=others, loop=0, duration=durations)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="a folder that twosome.py left")
    parser.add_argument("--out", type=Path, help="the page, else RUN/page.html")
    parser.add_argument("--movie", type=Path, metavar="GIF", help="one episode, instead of a page")
    given = parser.parse_args(argv)
    try:
        settings, agent = baselines.load_run(given.run)
        require(type(agent) is twosome.Agent, f"{given.run} chooses without an LM's tokens")
        text = page(world(agent, settings, given.run))
        path = given.movie or given.out or given.run / "page.html"
        if given.movie:
            movie(text, play(agent, settings), path)
        else:
            path.write_text(text)
    except ImportError as error:
        sys.exit(f"page.py: {error}; a movie needs it: pip install pillow")
    except (UserError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"page.py: {error}")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
