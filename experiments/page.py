"""An agent's whole world on one page, to play with: opened by a double click, without a network.

    python experiments/page.py RUN [--out page.html]
    python experiments/page.py RUN --movie movie.gif    # one episode; needs matplotlib

RUN is a folder that twosome.py left. The worlds are small and nothing in them is random, so the
page can hold every state that can be reached: its picture, what the agent is told, what it may do
and where that leads, and for each action the log-probability of each token, before training (the
adapter off) and after. Everything else (normalisation, policies, exact success and return) is
computed from these by the script in page.html, the page's other half.
"""

import argparse
import base64
import csv
import json
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import baselines  # noqa: E402
import overcooked_text  # noqa: E402
import twosome  # noqa: E402
import virtualhome_text  # noqa: E402
from overcooked_text import HOME, SERVING, VIEW, face  # noqa: E402

LIMIT = {"overcooked": overcooked_text.MAX_STEPS, "virtualhome": virtualhome_text.MAX_STEPS}

# === 1. Pictures. Page and movie draw them from these shapes, in boxes of 1 by 1, y downwards. ====
# "o": centre x, y, radius x, y, fill; "r": x, y, width, height, fill; "p": fill, x, y, x, y, ...
INK, RED, GREEN, LIGHT, VIOLET, WOOD = (
    "#333333", "#d0342c", "#3f9b45", "#8fd17f", "#b98ab5", "#a9744f")
FACE = [("o", .5, .36, .2, .19, "#e8b98a"), ("o", .43, .36, .015, .025, INK),
        ("o", .57, .36, .015, .025, INK)]
MACHINE = [("r", .05, .2, .9, .62, "#d5d8dc"), ("o", .84, .36, .05, .1, INK)]
SCREEN = [("r", .42, .7, .16, .12, INK), ("r", .25, .8, .5, .05, INK), ("r", .05, .12, .9, .6, INK)]


def slices(fill: str, inner: str) -> list:
    return [("o", x, y, r, r, colour) for x, y in ((.3, .58), (.5, .34), (.7, .58))
            for r, colour in ((.17, fill), (.09, inner))]


ICONS = {
    "floor": [("r", 0, 0, 1, 1, "#f3eee3")], "counter": [("r", 0, 0, 1, 1, "#cdbb9c")],
    "table": [("r", 0, 0, 1, 1, WOOD)], "shelf": [("r", 0, 0, 1, 1, "#9aa3ad")],
    "room": [("r", 0, 0, 4, 3, "#f0ebdf")], "name": [],
    "bed": [("r", .1, .1, .8, .8, "#ffffff"), ("r", .1, .4, .8, .5, "#7fa7c9"),
            ("o", .5, .25, .25, .1, "#f0ebdf")],
    "bath": [("o", .5, .5, .45, .3, "#ffffff"), ("o", .5, .52, .35, .2, "#bfe6ff")],
    "cook": [("o", .5, .7, .28, .25, "#f4f6f8"), *FACE, ("o", .5, .1, .24, .1, "#ffffff"),
             ("r", .34, .1, .32, .13, "#ffffff")],
    "agent": [("o", .5, .72, .25, .27, "#0072B2"), *FACE,
              ("p", "#4a3728", .3, .34, .33, .18, .5, .12, .67, .18, .7, .34, .6, .24, .4, .24)],
    "tomato": [("o", .5, .5, .3, .27, RED),
               ("p", GREEN, .5, .3, .34, .2, .46, .24, .5, .12, .54, .24, .66, .2)],
    "chopped tomato": slices(RED, "#f3a08f"),
    "lettuce": [("o", x, y, .2, .19, fill) for x, y, fill in (
        (.33, .52, GREEN), (.67, .52, GREEN), (.5, .34, GREEN), (.5, .55, LIGHT))],
    "chopped lettuce": [("p", fill, x, y, x + .24, y + .04, x + .12, y + .16) for x, y, fill in (
        (.2, .3, GREEN), (.5, .25, LIGHT), (.3, .5, GREEN), (.55, .48, GREEN), (.42, .64, LIGHT))],
    "onion": [("p", "#8a5a83", .5, .08, .4, .32, .6, .32), ("o", .5, .5, .29, .26, VIOLET),
              ("o", .5, .5, .12, .26, "#cfa9cc")],
    "chopped onion": slices(VIOLET, "#f6eef5"),
    "bowl": [("p", "#dfe6ee", .12, .45, .88, .45, .68, .78, .32, .78),
             ("o", .5, .45, .38, .13, "#f8fbff")],
    "board": [("r", .08, .2, .84, .6, "#e0b980"), ("o", .83, .3, .04, .04, WOOD)],
    "serving": [("r", .06, .2, .88, .62, "#c3ccd6"), ("o", .5, .51, .36, .24, "#ffffff")],
    "closed machine": [*MACHINE, ("r", .12, .3, .6, .42, "#4b535c")],
    "open machine": [*MACHINE, ("r", .12, .3, .6, .42, "#fff3c4"),
                     ("p", "#8d96a0", .12, .3, -.16, .2, -.16, .86, .12, .72)],
    "television off": [*SCREEN, ("r", .1, .17, .8, .5, "#50565c")],
    "television on": [*SCREEN, ("r", .1, .17, .8, .5, "#bfe6ff"),
                      ("o", .74, .3, .07, .08, "#F0E442"), ("p", GREEN, .1, .67, .3, .3, .5, .67)],
    "sofa": [("r", .05, .25, .9, .35, "#8f6d9f"), ("r", .0, .4, .18, .42, "#a584b4"),
             ("r", .82, .4, .18, .42, "#a584b4"), ("r", .18, .56, .64, .26, "#b79ac4")],
    "coffee table": [("r", .15, .5, .08, .34, WOOD), ("r", .77, .5, .08, .34, WOOD),
                     ("o", .5, .46, .47, .16, WOOD)],
    "pancake": [("o", .5, .66, .36, .13, "#b9762f"), ("o", .5, .56, .36, .13, "#d99a4e"),
                ("o", .5, .46, .36, .13, "#edbb6b")],
    "chips": [("p", "#E69F00", .25, .15, .75, .15, .7, .5, .75, .85, .25, .85, .3, .5),
              ("o", .5, .5, .17, .13, "#fff2a8")],
    "milk": [("p", "#ffffff", .3, .35, .5, .12, .7, .35, .7, .88, .3, .88),
             ("r", .3, .5, .4, .18, "#56B4E9")],
    "thing": [("o", .5, .55, .34, .26, "#e4c9a0"), ("o", .5, .5, .2, .13, "#f5e6cc")],
}


def kitchen_room(task: str) -> list:
    """What never changes: pictures [icon, x, y, size, label], in this order."""
    cells = [(row, column) for row in range(7) for column in range(7)]
    table = [HOME[food] for food in ("tomato", "lettuce", "onion")]
    boards = overcooked_text.TASKS[task].boards.items()
    things = [*(("floor" if face(cell) == cell else "counter", cell, "") for cell in cells),
              *(("table", cell, "table") for cell in table), ("shelf", HOME["bowl"], "shelf"),
              ("serving", SERVING, "serving counter"),
              *(("board", at, name[4:].replace(" cutting", "")) for at, name in boards)]
    return [[icon, x, y, 1, label] for icon, (y, x), label in things]


def kitchen_scene(task: str, state: dict) -> tuple[list, str]:
    """Return what is drawn on top of the room and the same in words. What the agent does not see is
    under veils, ["veil", x, y, width, height]."""
    (row, column), place = state["agent"], state["place"]
    where = {SERVING: "on the serving counter", HOME["bowl"]: "on the shelf"} | {
        HOME[food]: "on the table" for food in place if food != "bowl"} | {
        cell: f"on {board}" for cell, board in overcooked_text.TASKS[task].boards.items()}
    inside = [item for item in place if place[item] == "bowl"]
    left, right = max(column - VIEW, 0), min(column + VIEW + 1, 7)
    top, bottom = max(row - VIEW, 0), min(row + VIEW + 1, 7)
    told = [f"The cook is in row {row + 1}, column {column + 1} of 7 and sees rows {top + 1} to "
            f"{bottom} in columns {left + 1} to {right}"]
    drawn = [["cook", column, row, 1, ""]]
    for item in reversed(place):  # the bowl first, and over it what is in it
        at = place[item]
        name = f"chopped {item}" if item in state["chopped"] else item
        told.append(f"{name} {where[tuple(at)] if isinstance(at, list) else f'in the {at}'}")
        at = place["bowl"] if item in inside else at
        y, x = (row, column) if at == "hand" else at
        told[-1] += "" if top <= y < bottom and left <= x < right else " (hidden)"
        x, y, size = (x + .48, y + .4, .6) if at == "hand" else (x + .1, y + .16, .8)
        if item in inside:
            x, y, size = x + size * (.12 + .3 * inside.index(item)), y + size * .12, size * .45
        drawn.append([name, x, y, size, "" if item in inside or at == "hand" else name])
    veils = [(0, 0, 7, top), (0, bottom, 7, 7 - bottom),
             (0, top, left, bottom - top), (right, top, 7 - right, bottom - top)]
    return drawn + [["veil", *veil] for veil in veils if veil[2] and veil[3]], "; ".join(told)


ROOMS = {"kitchen": (0, 0), "bathroom": (4, 0), "bedroom": (0, 3), "living room": (4, 3)}
SPOTS = {"television": (6.75, 3.15), "coffee table": (4.9, 3.4), "sofa": (5.9, 4.6)}


def home_room(task: str) -> list:
    return [*(["room", x, y, 1, ""] for x, y in ROOMS.values()),
            *(["name", x + .2, y + .1, 1, room] for room, (x, y) in ROOMS.items()),
            ["bath", 5.8, .7, 1.6, ""], ["bed", .6, 3.9, 1.6, ""]]


def home_scene(task: str, state: dict) -> tuple[list, str]:
    """As kitchen_scene: what is where, the agent beside what it is close to, its hands full."""
    home, about = state["home"], virtualhome_text.TASKS[task]
    spot = {thing: (ROOMS[about.home][0] + .9 + 1.6 * i, ROOMS[about.home][1] + .45)
            for i, thing in enumerate(about.things)}
    spot |= SPOTS if not about.has_door else {
        about.target: (ROOMS[about.room][0] + 2.5, ROOMS[about.room][1] + .5)}
    condition = {about.target: "open" if home["open"] else "closed"} if about.has_door else {
        "television": "on" if home["tv_on"] else "off"}
    drawn, told = [], [f"The agent is in the {home['agent']}{', seated' * home['seated']}"]
    for name in about.furniture:
        told.append(f"{name} {condition.get(name, '')}".strip())
        icon = f"{condition[name]} machine" if about.has_door else told[-1]
        drawn.append([icon, *spot[name], 1.2, name])
        told[-1] += f" in the {about.room}"
    target_x, target_y = spot[about.target]
    for i, thing in enumerate(home["placed"]):
        spot[thing] = target_x + .2 + .45 * i, target_y + (.3 if about.has_door else .1)
    x, y = np.add(ROOMS[home["agent"]], (1.4, 1.6)).tolist()
    if home["close"]:
        x, y = np.add(spot[home["close"][0]], (0, 0) if home["seated"] else (-.9, .3)).tolist()
    drawn.append(["agent", x, y, 1, ""])
    for thing in about.things:
        icon, at = thing if thing in ICONS else "thing", f"in the {about.home}"
        if thing in home["held"]:
            shift, at = (.62, -.12)[list(home["held"]).index(thing)], "in the hand"
            drawn.append([icon, x + shift, y + .45, .5, ""])
        else:
            inside = thing in home["placed"]
            at = f"{'in' if about.has_door else 'on'} the {about.target}" if inside else at
            at += " (hidden)" if inside and about.has_door and not home["open"] else ""
            drawn.append([icon, *spot[thing], .55 if inside else .8, "" if inside else thing])
        told.append(f"{thing} {at}")
    if home["placed"] and about.has_door and not home["open"]:  # nobody sees into it
        drawn.append(["veil", target_x + .15, target_y + .36, .72, .5])
    drawn += [["veil", *corner, 4, 3] for room, corner in ROOMS.items() if room != home["agent"]]
    return drawn, "; ".join([*told, "the other rooms are hidden"])


# For each environment: the size of its picture, what never changes in it, and what does.
SCENES = {"overcooked": ((7, 7), kitchen_room, kitchen_scene),
          "virtualhome": ((8, 6), home_room, home_scene)}


# === 2. The data of the page. =====================================================================

def explore(episode, task: str, scene) -> tuple[list, list]:
    """All states that can be reached, breadth first, the clock aside. Returns the views, distinct
    pairs (prompt, phrases), and the states as the page has them. Where an action leads: the number
    of the next state, the reward, the primitive steps. From the goal nothing leads on."""
    queue = [episode.env.get_state()]  # grows while it is read
    number, views, states = {json.dumps(queue[0], sort_keys=True): 0}, {}, []
    for state in queue:
        episode.obs, episode.info = episode.env.set_state(state)
        view = views.setdefault(episode.state(), len(views))
        leads = []
        for chosen in range(0 if episode.info["success"] else len(episode.info["actions"])):
            episode.obs, episode.info = episode.env.set_state(state)
            reward, _, _, _ = episode.act(chosen)
            following = episode.env.get_state() | {"steps": 0}
            name = json.dumps(following, sort_keys=True)
            if name not in number:
                number[name] = len(queue)
                queue.append(following)
            leads.append((number[name], reward, episode.info["primitive_steps"]))
        pictures, words = scene(task, state)
        pictures = [[x if isinstance(x, str) else round(x, 2) for x in one] for one in pictures]
        states.append({"view": view, "scene": pictures, "words": words, "leads": leads})
    return list(views), states


@torch.no_grad()
def token_log_probs(agent, encoded: list, when: str) -> np.ndarray:
    """log P of each token of each action of each view, given those before it, one after another:
    the difference between two joint ones, with it and without it."""
    beginnings = [(prompt, [ids[:n] for ids in actions for n in range(1, len(ids) + 1)])
                  for prompt, actions in encoded]
    parts = twosome.in_parts(beginnings, agent.max_prompts)
    with agent.model.disable_adapter() if when == "before" else nullcontext():
        # The largest part first: whether it may be packed is compared with the definition.
        twosome.score(agent.model, max(parts, key=lambda part: len(twosome.as_tree(part)[0])))
        joint = [x for part in tqdm(parts, when, delay=2, disable=None)
                 for x in twosome.score(agent.model, part)]
    lengths = [len(ids) for _, actions in encoded for ids in actions]
    return np.concatenate([np.diff(own.cpu().numpy(), prepend=0)
                           for own in torch.cat(joint).split(lengths)])


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The piece of text that each token adds, with the space in it."""
    texts = ["", *(tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1))]
    return [text[len(before):] for before, text in zip(texts, texts[1:])]


def world(agent, args, run: Path) -> dict:
    """Everything that the page shows, as it goes into the page."""
    size, room, scene = SCENES[args.env]
    views, states = explore(twosome.make_episode(args), args.task, scene)
    encoded = [twosome.encode(agent.tokenizer, *view) for view in views]
    number = {}  # phrases come back all the time: they are stored once, with their tokens
    shown = [{"prompt": prompt, "actions": [number.setdefault((phrase, *ids), len(number))
                                            for phrase, ids in zip(phrases, actions)]}
             for (prompt, phrases), (_, actions) in zip(views, encoded)]
    log = run / "metrics.csv"  # a run of 0 steps has none
    log = [[float(row[name]) for name in ("env_steps", "success", "return")]
           for row in csv.DictReader(log.open() if log.exists() else []) if row["success"]]
    if (run / "summary.json").exists():  # the run is over
        before = json.loads((run / "summary.json").read_text())["before"]
        log.insert(0, [0, before["success"], before["return"]])
    names = "env", "task", "model", "norm", "seed", "gamma", "steps"
    return {
        "args": {name: getattr(args, name) for name in names}, "limit": LIMIT[args.env],
        "log": log, "episodes": [twosome.EVALUATION_EPISODES, twosome.EPISODES_PER_ROW],
        "views": shown, "states": states,
        "phrases": [[phrase, token_texts(agent.tokenizer, ids)] for phrase, *ids in number],
        "size": size, "room": room(args.task), "icons": ICONS,
        "log_probs": {when: base64.b64encode(token_log_probs(agent, encoded, when).astype("<f4"))
                      .decode() for when in ("before", "after")}}


def page(data: dict) -> str:
    """The page, with its data. In a script element "<" could end it, so it is written otherwise."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Path(__file__).with_suffix(".html").read_text().replace("{{data}}", text)


# === 3. The movie. ================================================================================

def movie(agent, args, path: Path):
    """Write one episode as a GIF: scene, prompt, and the bars before and after training. Each of
    its first 30 decisions has a frame before the agent chooses and one after."""
    import matplotlib
    matplotlib.use("Agg")  # no window
    from matplotlib import patches, pyplot
    from PIL import Image  # comes with it
    (width, height), room, scene = SCENES[args.env]
    figure, frames = pyplot.figure(figsize=(8.3, 4), dpi=100), []

    def draw(axes, pictures, is_room):
        for icon, x, y, size, label in pictures:
            if icon == "veil":
                axes.add_patch(patches.Rectangle((x, y), size, label, fc="#20242a", alpha=.55))
                continue
            at = ({"y": y + .04, "s": label.replace(" ", "\n"), "va": "top"} if is_room else
                  {"y": y + .92 * size, "s": label})
            axes.text(x=x + size / 2, fontsize=6.5, ha="center", zorder=3, **at)
            for kind, *values in ICONS[icon]:
                if kind == "p":
                    points = np.reshape(values[1:], (-1, 2)) * size + (x, y)
                    shape = patches.Polygon(points, fc=values[0])
                else:
                    a, b, c, d = np.multiply(values[:4], size) + (x, y, 0, 0)
                    shape = (patches.Ellipse((a, b), 2 * c, 2 * d, fc=values[4]) if kind == "o" else
                             patches.Rectangle((a, b), c, d, fc=values[4]))
                axes.add_patch(shape).set(ec=INK, lw=.6)

    def frame(episode, policies, chosen):
        figure.clear()
        axes = figure.add_axes((.01, .1, .4, .88))
        axes.set(xlim=(-.3, width + .3), ylim=(height, 0), aspect="equal", anchor="N")
        axes.axis("off")
        draw(axes, room(args.task), is_room=True)
        draw(axes, scene(args.task, episode.env.get_state())[0], is_room=False)
        prompt, phrases = episode.state()
        figure.text(.01, .03, f"step {episode.length}, return so far {episode.ret:.3f}", size=10)
        lines = textwrap.fill(f"{prompt} ..." if policies else episode.obs, 59)
        figure.text(.43, .97, lines, va="top", size=10, family="serif")
        axes = figure.add_axes((.76, .02, .23, .62), xlim=(0, 1.15), ylim=(len(phrases) - .4, -1.1))
        axes.axis("off")
        for row, (name, p, style) in enumerate(zip(("before training", "after"), policies, (
                {"fc": "#E69F00", "hatch": "////"}, {"fc": "#0072B2"}))):
            axes.barh(-.85, .07, .3, left=.9 * row - .8, ec=INK, lw=.6, clip_on=False, **style)
            axes.text(.9 * row - .7, -.85, name, va="center", size=8)
            for k, x in enumerate(p.exp().tolist()):
                axes.barh(k + .4 * row - .2, x, .36, ec=INK, lw=.6, **style)
                axes.text(x + .02, k + .4 * row - .2, f"{x:.2f}", va="center", size=8)
        for k, phrase in enumerate(phrases if policies else ()):
            axes.text(-.03, k, textwrap.shorten(phrase, 45, placeholder=" ..."), ha="right",
                      va="center", size=8, bbox={
                          "fc": "#fde68a" if k == chosen else "none", "ec": "none", "pad": 2})
        if not policies:
            end = "The goal is reached." if episode.info["success"] else "The time is over."
            figure.text(.43, .45, end, size=16)
        figure.canvas.draw()
        frames.append(np.array(figure.canvas.buffer_rgba())[..., :3])

    for number, (episode, before, after, action) in enumerate(twosome.play(agent, args)):
        if number < 30:
            frame(episode, (before, after), None)
            frame(episode, (before, after), action)
    frame(episode, (), None)
    palette = Image.fromarray(np.concatenate(frames)).quantize(256, Image.Quantize.MAXCOVERAGE)
    first, *others = (Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE)
                      for x in frames)
    first.save(path, save_all=True, append_images=others, loop=0,
               duration=[1200] * len(others) + [4000])  # in ms


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="a folder that twosome.py left")
    parser.add_argument("--out", type=Path, help="the page (without it: RUN/page.html)")
    parser.add_argument("--movie", type=Path, metavar="GIF", help="one episode, instead of a page")
    given = parser.parse_args(argv)
    try:
        args, agent = baselines.load_run(given.run)
        if args.method != "twosome":
            raise ValueError(f"{given.run}: {args.method} chooses without an LLM's tokens")
        path = given.movie or given.out or given.run / "page.html"
        if given.movie:
            movie(agent, args, path)
        else:
            path.write_text(page(world(agent, args, given.run)))
    except ImportError as error:
        raise SystemExit(f"page.py: {error}; a movie needs it: pip install matplotlib") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"page.py: {error}") from None
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
