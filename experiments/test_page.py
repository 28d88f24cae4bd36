"""The page in a real browser: what is clicked and shown there is what twosome.py computes."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, as in test_twosome.py
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import exact  # noqa: E402
import page  # noqa: E402
import twosome  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Put behind the page's own script: it clicks and presses as a person would, reads what is then on
# the page, and leaves all that in an element of its own.
DRIVER = """<pre id="result"></pre><script>
const errors = [], all = (selector) => [...document.querySelectorAll(selector)];
addEventListener("error", (event) => errors.push(event.message));
const titles = (selector) => all(selector).map((element) => element.title.replace("\\u2212", "-"));
const press = (key) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true}));
const knob = (value) => all(`[data-value=${value}]`)[0].click();
const read = () => ({
  prompt: byId("prompt").textContent, status: byId("status").textContent, ret: here().ret,
  phrases: all("#actions button").map((button) => button.getAttribute("aria-label")),
  tokens: titles("#actions li:first-child .token"),
  outlook: all("#outlook td[colspan]").map(
    (cell) => cell.firstChild.textContent.replace("\\u2212", "-")),
  probabilities: Object.fromEntries(["none", "token", "word"].map((norm) => {
    knob(norm);
    return [norm, titles("#actions b")];
  }))});

async function drive() {
  const decisions = [], episodes = [];
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
    episodes.push({chosen: path.slice(0, -1).map((decision) => decision.chosen), ...read()});
  }
  return {decisions, end, marked, length, undone, episodes};
}

drive().then((result) => { byId("result").textContent = JSON.stringify({...result, errors}); });
</script></body>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    twosome.main(["--steps", "1024", "--device", "cpu", "--out", str(folder)])
    args = twosome.Args(**json.loads((folder / "config.json").read_text()))
    agent = twosome.make_agent(args)
    twosome.load_checkpoint(folder, agent)
    return folder, args, agent


@pytest.fixture(scope="module")
def seen(run, tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no chromium or chrome found: apt-get install chromium")
    path = tmp_path_factory.mktemp("browser") / "page.html"
    page.main([str(run[0]), "--out", str(path)])
    path.write_text(path.read_text().replace("</body>", DRIVER))
    done = subprocess.run([
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=600000", "--dump-dom",
        path.as_uri()], capture_output=True, text=True, timeout=300)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    (text,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout)
    return json.loads(html.unescape(text)) | {"console": console}


def policies(agent, state, norm):
    """Before and after training."""
    agent.norm, agent.policy_memory = norm, {}
    with torch.no_grad(), agent.model.disable_adapter():
        (before,) = agent.log_policy([state])
    return before.exp().tolist(), agent.remembered_log_policy([state])[0].exp().tolist()


def replay(args, chosen):
    episode, reward = twosome.make_episode(args), None
    for action in chosen:
        yield episode
        episode.act(action)
    yield episode


def test_six_decisions_show_the_probabilities_of_twosome(run, seen):
    _, args, agent = run
    assert seen["errors"] == seen["console"] == [] and len(seen["decisions"]) == 6
    episode = twosome.make_episode(args)
    for shown in seen["decisions"]:
        prompt, phrases = state = episode.state()
        assert shown["prompt"].rstrip("\u2026 ") == prompt
        for norm, titles in shown["probabilities"].items():
            before, after = policies(agent, state, norm)
            expected = [p for pair in zip(before, after) for p in pair]
            assert [float(p) for p in titles] == pytest.approx(expected, abs=1e-4)
        assert all(f": {phrase}, " in label
                   for phrase, label in zip(phrases, shown["phrases"], strict=True))
        (best,) = [k for k, label in enumerate(shown["phrases"]) if label.endswith("best")]
        assert f"Best: {phrases[best]}, probability after training" in shown["status"]
        episode.act(best)
    assert "The goal is reached" in seen["end"]["status"] and episode.info["success"]
    assert seen["end"]["ret"] == pytest.approx(episode.ret, abs=1e-6)
    assert episode.ret == pytest.approx(episode.env.OPTIMUM[args.task], abs=1e-4)
    assert seen["marked"] > 0 and (seen["length"], seen["undone"]) == (7, 6)


def test_tokens_are_those_of_the_definition(run, seen):
    _, args, agent = run
    prompt, phrases = twosome.make_episode(args).state()
    prompt_ids, (ids, *_) = twosome.encode(agent.tokenizer, prompt, phrases)
    expected = []
    for adapter in (agent.model.disable_adapter(), nullcontext()):
        with torch.no_grad(), adapter:
            logits = agent.model(input_ids=torch.tensor([prompt_ids + ids])).logits[0]
        own = logits.log_softmax(-1)[len(prompt_ids) - 1:-1].gather(1, torch.tensor(ids)[:, None])
        expected += own[:, 0].tolist()
    shown = [float(title) for title in seen["decisions"][0]["tokens"]]
    assert shown == pytest.approx(expected, abs=1e-4)


def test_exact_success_and_return_are_those_of_exact_py(run, seen):
    _, args, agent = run
    shown = [float(cell) for cell in seen["decisions"][0]["outlook"]]
    expected = []
    for norm in ("none", "token", "word"):
        agent.norm, agent.policy_memory = norm, {}
        with agent.model.disable_adapter():
            before = exact.exact(agent, args)
        agent.policy_memory = {}
        after = exact.exact(agent, args)
        expected += [before[0], after[0], before[1], after[1]]
    assert shown[:12] == pytest.approx(expected, abs=1e-4)
    assert shown[12:] == pytest.approx([0.442, -0.0964, 1, 0.9205], abs=1e-3)  # random, best


def test_ten_episodes_end_as_in_the_environment(run, seen):
    _, args, _ = run
    assert len(seen["episodes"]) == 10
    for played in seen["episodes"]:
        *_, episode = replay(args, played["chosen"])
        assert played["ret"] == pytest.approx(episode.ret, abs=1e-4)
        end = "The goal is reached" if episode.info["success"] else "The time is over"
        assert end in played["status"]


def test_text_of_a_model_cannot_end_the_script(run):
    assert "</script><b>" not in page.page({"phrase": "</script><b>"})


def test_movie(run, tmp_path):
    pytest.importorskip("matplotlib")
    page.main([str(run[0]), "--movie", str(tmp_path / "movie.gif")])
    assert (tmp_path / "movie.gif").read_bytes()[:4] == b"GIF8"
    assert (tmp_path / "movie.gif").stat().st_size < 1_000_000
