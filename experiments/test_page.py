"""The page in a real browser: what is clicked and shown there is what twosome.py computes."""

import html
import json
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, as in test_twosome.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402
from experiments import baselines, exact, page  # noqa: E402
from twosome import OvercookedText, UserError  # noqa: E402

# Put behind the page's own script: it clicks and presses as a person would, reads what is then on
# the page, and leaves all that in an element of its own.
DRIVER = """<pre id="result"></pre><script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
const number = (text) => Number(text.replace("\\u2212", "-"));
const titles = (selector) => all(selector).map((element) => number(element.title));
const press = (key) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true}));
const knob = (value) => all(`[data-value=${value}]`)[0].click();
const read = () => ({
  prompt: byId("prompt").textContent, status: byId("status").textContent, ret: here().ret,
  labels: all("#actions button").map((button) => button.getAttribute("aria-label")),
  tokens: titles("#actions li:first-child .token"),
  outlook: all("#outlook td[colspan]").map((cell) => number(cell.firstChild.textContent)),
  probabilities: Object.fromEntries(["none", "token", "word"].map((norm) => {
    knob(norm);
    return [norm, titles("#actions b")];
  })),
});

async function drive() {
  const decisions = [], episodes = [];
  const tokensAtFirst = all(".token").length;
  knob("phrases");
  const guessed = [all("#actions button")[0].getAttribute("aria-label"), all(".badge").length,
    ...[".bar", "#actions small"].map((name) => getComputedStyle(all(name)[0]).visibility)];
  knob("tokens");
  while (all(".badge.best").length) {
    decisions.push(read());
    all(".badge.best")[0].closest("button").click();
  }
  const end = read(), marked = all("mark").length, length = path.length;
  press("u");
  const undone = path.length;
  press("r");
  knob("fast");
  for (let i = 0; i < 10; i++) {
    press(" ");  // begins anew where an episode is over
    while (timer) await new Promise((resolve) => setTimeout(resolve, 20));
    episodes.push({choices: path.slice(0, -1).map((decision) => decision.chosen), ...read()});
  }
  return {tokensAtFirst, guessed, decisions, end, marked, length, undone, episodes};
}

drive().then((result) => { byId("result").textContent = JSON.stringify({...result, errors}); });
</script></body>"""

# What a projector of 1,280 x 720 shows without scrolling.
MEASURE = """<pre id="result"></pre><script>
const box = (element) => element.getBoundingClientRect();
byId("result").textContent = JSON.stringify({
  inside: all("#scene, #prompt, #actions li").filter((x) => box(x).bottom <= innerHeight).length,
  knobs: new Set(all(".knob").map((element) => box(element).top)).size,
  wide: document.documentElement.scrollWidth > innerWidth,
  hints: all("kbd").filter((element) => element.offsetWidth).length,
});
</script></body>"""


def look(path, script, *arguments):
    """Open a page with one more script. Returns what the script left, and the console."""
    path.write_text(path.read_text().replace("</body>", script))
    done = page.browser(
        "--enable-logging=stderr",
        f"--user-data-dir={path.parent / 'profile'}",
        "--virtual-time-budget=600000",
        "--dump-dom",
        *arguments,
        path.as_uri(),
    )
    (text,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(text)), console


def skip_without_browser():
    try:
        page.browser("--version")
    except UserError as error:
        pytest.skip(f"{error}: apt-get install chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    twosome.main(["--steps", "1024", "--device", "cpu", "--out", str(folder)])
    return folder, *baselines.load_run(folder)


@pytest.fixture(scope="module")
def seen(run, tmp_path_factory):
    skip_without_browser()
    path = tmp_path_factory.mktemp("browser") / "page.html"
    page.main([str(run[0]), "--out", str(path)])
    result, console = look(path, DRIVER)
    return result | {"console": console}


@pytest.fixture
def env(run):
    _, settings, agent = run
    return twosome.make_env(agent, settings)


def policies(agent, state, norm):
    """The untrained and the trained policy in one state."""
    agent.settings.norm = norm
    with torch.no_grad():
        (trained,) = agent.log_policy([state])
        with agent.model.disable_adapter():
            (untrained,) = agent.log_policy([state])
    return untrained.exp(), trained.exp()


def test_six_decisions_show_the_probabilities_of_twosome(run, env, seen):
    _, settings, agent = run
    assert seen["errors"] == seen["console"] == []
    assert len(seen["decisions"]) == 6
    for shown in seen["decisions"]:
        prompt, phrases = env.state()
        assert shown["prompt"].rstrip("\u2026 ") == prompt
        for norm, probabilities in shown["probabilities"].items():
            expected = torch.stack(policies(agent, env.state(), norm), dim=1).flatten()
            assert probabilities == pytest.approx(expected.tolist(), abs=1e-4)
        for phrase, label in zip(phrases, shown["labels"], strict=True):
            assert f": {phrase}, " in label
        (best,) = [i for i, label in enumerate(shown["labels"]) if label.endswith("best")]
        assert f"Best: {phrases[best]}, trained probability" in shown["status"]
        assert "It can still become 0.921" in shown["status"]
        env.step(best)
    assert "The goal is reached" in seen["end"]["status"]
    assert env.info["success"]
    assert seen["end"]["ret"] == pytest.approx(env.discounted_return, abs=1e-6)
    optimum = OvercookedText.OPTIMUM[settings.task]
    assert env.discounted_return == pytest.approx(optimum, abs=1e-4)
    assert seen["marked"] > 0
    assert (seen["length"], seen["undone"]) == (7, 6)


def test_tokens_are_hidden_at_first_and_then_those_of_the_definition(run, env, seen):
    _, _, agent = run
    prompt_ids, (ids, *_) = twosome.encode(agent.tokenizer, *env.state())
    expected = []
    for adapter in (agent.model.disable_adapter(), nullcontext()):
        with torch.no_grad(), adapter:
            logits = agent.model(input_ids=torch.tensor([prompt_ids + ids])).logits[0]
        log_probs = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
        expected += log_probs[range(len(ids)), ids].tolist()
    assert seen["tokensAtFirst"] == 0
    assert seen["decisions"][0]["tokens"] == pytest.approx(expected, abs=1e-4)


def test_nothing_tells_the_answers_while_a_class_guesses(env, seen):
    (phrase, *_) = env.info["actions"].values()
    assert seen["guessed"] == [f"1: {phrase}", 0, "hidden", "hidden"]


def test_success_and_return_are_those_of_exact_py(run, seen):
    _, settings, agent = run
    shown = seen["decisions"][0]["outlook"]
    expected = []
    for norm in ("none", "token", "word"):
        agent.settings.norm = norm
        agent.policy_cache.clear()
        with agent.model.disable_adapter():
            untrained = exact.exact(agent, settings)
        agent.policy_cache.clear()
        trained = exact.exact(agent, settings)
        for pair in zip(untrained, trained, strict=True):
            expected += pair
    assert shown[:12] == pytest.approx(expected, abs=1e-4)
    assert shown[12:] == pytest.approx([0.442, -0.0964, 1, 0.9205], abs=1e-3)  # random, best


def test_ten_episodes_end_as_in_the_environment(run, seen):
    _, settings, agent = run
    assert len(seen["episodes"]) == 10
    for played in seen["episodes"]:
        env = twosome.make_env(agent, settings)
        for choice in played["choices"]:
            env.step(choice)
        assert played["ret"] == pytest.approx(env.discounted_return, abs=1e-4)
        end = "The goal is reached" if env.info["success"] else "The time is over"
        assert end in played["status"]


def test_a_projector_shows_scene_prompt_and_actions_at_once(run, tmp_path):
    skip_without_browser()
    page.main([str(run[0]), "--out", str(tmp_path / "page.html")])
    shown, _ = look(tmp_path / "page.html", MEASURE, "--window-size=1280,720")
    assert shown["inside"] == 2 + 5  # scene and prompt, and all five actions of the start
    assert shown["knobs"] == 1
    assert not shown["wide"]


def test_a_phone_shows_no_keys_and_nothing_beside_the_screen(run, tmp_path):
    skip_without_browser()
    page.main([str(run[0]), "--out", str(tmp_path / "page.html")])
    shown, _ = look(tmp_path / "page.html", MEASURE, "--window-size=400,900")
    assert shown["hints"] == 0
    assert not shown["wide"]


def drawn_states(env, task):
    """All states of a task, as the page has them."""
    settings = twosome.make_settings(env=env, task=task)
    wrapper = twosome.TextEnv(twosome.ENVS[env](task, settings.gamma), settings.gamma)
    scene = page.SCENES[env](task) if env in page.SCENES else page.TextScene(wrapper)
    return page.explore(wrapper, scene)[1]


@pytest.mark.parametrize("env, actor", [("overcooked", "cook"), ("virtualhome", "agent")])
def test_every_state_of_every_task_has_a_picture(env, actor):
    icons = re.findall(r'<g id="([^"]*)"', Path(page.__file__).with_suffix(".html").read_text())
    for task in twosome.ENVS[env].TASKS:
        states = drawn_states(env, task)
        assert any(state["success"] for state in states)
        for state in states:
            names = [name for kind, name, *_ in state["scene"] if kind == "picture"]
            assert actor in names
            if task in ("tomato-lettuce-salad", "entertainment"):  # Some things have none.
                assert {name.replace(" ", "-") for name in names} <= set(icons)


def test_an_environment_without_pictures_shows_its_render():
    states = drawn_states("lamp", "letter")
    assert all(isinstance(state["scene"], str) for state in states)
    assert [state["success"] for state in states].count(True) == 1


def test_text_of_a_model_cannot_end_the_script():
    assert "</script><b>" not in page.page({"phrase": "</script><b>"})


def test_movie(run, tmp_path):
    skip_without_browser()
    image = pytest.importorskip("PIL.Image")
    page.main([str(run[0]), "--movie", str(tmp_path / "movie.gif")])
    with image.open(tmp_path / "movie.gif") as movie:
        assert movie.n_frames % 2 == 1
        assert movie.width == 900
        assert movie.height < 640
    assert (tmp_path / "movie.gif").stat().st_size < 1_000_000


def test_a_baseline_has_no_page(tmp_path, capsys):
    arguments = ["--method", "random", "--steps", "0", "--out", str(tmp_path / "random")]
    baselines.main(arguments)
    with pytest.raises(SystemExit, match="without an LM"):
        page.main([str(tmp_path / "random")])
