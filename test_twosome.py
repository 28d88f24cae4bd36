"""Tests that teach: each says in one sentence what would go wrong if it failed.

    pytest                      # all, in less than two minutes on two CPU cores, without network
    pytest -k boundary -v       # one topic

In the order of the code: environments, pocket_lm, the boundary between prompt and action, scoring,
actor-critic, PPO, runs, command line.
"""
import ast
import copy
import csv
import dataclasses
import doctest
import functools
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may use the network

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import overcooked_text
import twosome
import virtualhome_text
from experiments import language, plot, reproduce
from overcooked_text import OvercookedText
from pocket_lm import make_pocket_lm
from twosome import Agent, Args, Episode, UserError, action_log_probs, encode
from virtualhome_text import VirtualHomeText

ROOT = Path(__file__).resolve().parent
# What the libraries tell their own authors, and peft about GPT-2's transposed matrices.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"),
              pytest.mark.filterwarnings("ignore:fan_in_fan_out")]

TASKS = [(env, task) for env in twosome.ENVS.values() for task in env.TASKS]
HOME = "This home has a kitchen, a bathroom, a bedroom and a living room. You are in the "

# The shortest way to each goal. The household's unseen tasks have the plan of food-preparation.
PLANS = {"tomato-salad": [0, 2, 4, 0, 1, 3],
         "tomato-lettuce-salad": [0, 4, 7, 1, 5, 7, 3, 0, 1, 6],
         "entertainment": [4, 9, 5, 10, 0, 6, 11, 7, 13, 8, 15]}
PLANS |= {task: [4, 6, 5, 8, 7, 9] for task in VirtualHomeText.TASKS if task not in PLANS}


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Each test in an empty folder, with the usual Ctrl-C, threads and random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)  # reproduce.py takes one, and numbers depend on it a little


def equal(a, b, tolerance=1e-4):
    """Two lists of tensors are the same numbers."""
    return len(a) == len(b) and all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b))


# --- The environments -----------------------------------------------------------------------------

@functools.cache
def reachable(env_class, task) -> dict:
    """Every symbolic observation that any actions lead to -> the (text, offered actions) told."""
    env = env_class(task=task)
    env.reset()
    todo, seen, told = [env.get_state()], set(), {}
    while todo:
        state = json.loads(json.dumps(todo.pop())) | {"steps": 0}
        if (key := json.dumps(state, sort_keys=True)) in seen:
            continue
        seen.add(key)
        obs, info = env.set_state(state)
        told.setdefault(tuple(info["vector"]), set()).add((obs, tuple(info["actions"].items())))
        for action in range(env.n_actions) if not info["success"] else ():
            env.set_state(state)
            env.step(action)
            todo.append(env.get_state())
    return told


@pytest.mark.parametrize("env_class, task", TASKS)
def test_different_observations_give_different_prompts(env_class, task):
    """Otherwise the words would lose something that the agent perceives, or two actions would
    read the same and the LM could not choose between them."""
    told = reachable(env_class, task)
    known = {"tomato-salad": 22, "tomato-lettuce-salad": 806, "entertainment": 213}
    assert len(told) == known.get(task, 19)
    assert all(len(texts) == 1 for texts in told.values())  # the same vector, the same words
    texts = [text for (text,) in told.values()]
    assert len({obs for obs, _ in texts}) == len(told)
    for _, actions in texts:
        phrases = [phrase for _, phrase in actions]
        assert actions and len(set(phrases)) == len(phrases)
        assert [index for index, _ in actions] == sorted(index for index, _ in actions)


@pytest.mark.parametrize("env_class, task", TASKS)
def test_optimum_is_reached_by_offered_actions(env_class, task):
    """Otherwise the best policy could not be learned, or the numbers of the README's tables would
    mean something else; the unseen tasks must have the plan of the trained one."""
    gamma = 0.99 if env_class is OvercookedText else 0.95
    episode = Episode(env_class(task=task), gamma)
    for action in PLANS[task]:
        assert not episode.info["success"]
        _, _, terminated, _ = episode.act(list(episode.info["actions"]).index(action))
    assert terminated and episode.info["success"]
    assert episode.ret == pytest.approx(twosome.OPTIMUM[task], abs=5e-6)


LOAD = 2_000  # random steps in each task; 100,000 were run once by hand: a million over all tasks


@pytest.mark.parametrize("env_class, task", TASKS)
def test_invariants_hold_under_random_load(env_class, task):
    """Otherwise a rare order of actions could lose a thing, double it, or make up a reward."""
    env, rng = env_class(task=task), random.Random(task)
    limit, at_most = (200, 12) if env_class is OvercookedText else (50, 1)  # 12: the longest macro
    obs, info = env.reset()
    shape, over, steps = info["vector"].shape, False, 0
    for _ in range(LOAD):
        if over:
            obs, info = env.reset()
            steps = 0
        if rng.random() < 0.05:  # outside the range: refused, and nothing happens
            before = env.get_state()
            with pytest.raises(ValueError):
                env.step(rng.choice([-1, env.n_actions, 10**9]))
            assert env.get_state() == before
        offered = rng.random() < 0.7
        action = rng.choice(list(info["actions"]) if offered else range(env.n_actions))
        obs, reward, terminated, truncated, info = env.step(action)
        over, state = terminated or truncated, env.get_state()
        steps += info["primitive_steps"]
        assert 1 <= info["primitive_steps"] <= at_most and steps == state["steps"]
        assert truncated == (not terminated and steps >= limit) and steps < limit + at_most
        assert terminated == info["success"]
        assert info["vector"].dtype.name == "float32" and info["vector"].shape == shape
        assert all(0 <= x <= limit for x in info["vector"].tolist())
        # The prompt: whole sentences, single spaces; offered actions: different, in index order.
        assert re.fullmatch(r"([A-Z][a-z0-9, -]*[a-z]\. )*[A-Z][a-z0-9, -]*[a-z]\.", obs), obs
        phrases = list(info["actions"].values())
        assert phrases and len(set(phrases)) == len(phrases)
        assert all(re.fullmatch(r"[a-z]+(,? [a-z]+)*", phrase) for phrase in phrases)
        assert list(info["actions"]) == sorted(info["actions"])
        assert set(info["actions"]) <= set(range(env.n_actions))
        if env_class is OvercookedText:
            assert -0.2 < reward < 1.21
            assert all(1 <= x <= 5 for x in state["agent"])  # on the floor
            foods = set(state["place"]) - {"bowl"}
            # Each thing is in one place: the hand, a counter's cell of its own, or (food) the bowl.
            loose = [str(place) for place in state["place"].values() if place != "bowl"]
            assert len(set(loose)) == len(loose)
            assert all(place in ("hand", "bowl") or {0, 6} & set(place)
                       for place in state["place"].values())
            assert state["place"]["bowl"] != "bowl" and set(state["chopped"]) <= foods
            assert {f for f in foods if state["place"][f] == "bowl"} <= set(state["chopped"])
        else:
            home = state["home"]
            assert reward == float(terminated)
            things = [*home["held"], *home["placed"]]
            assert len(set(things)) == len(things) <= 2  # in a hand or put down, not both
        if rng.random() < 0.02:  # saved, through JSON, and restored: the same words
            again = env_class(task=task)
            assert again.set_state(json.loads(json.dumps(state)))[0] == obs


GOLDEN = [  # (task, actions, primitive steps, rewards, text after the last action)
    ("tomato-salad", [0, 2, 4, 0, 1, 3], [2, 5, 3, 1, 10, 7],
     [-0.00199, -0.004901, 0.19305, -0.001, -0.009562, 0.934687],
     "You are at the serving counter. The cutting board is empty. The dish is on the serving "
     "counter. Your hands are empty."),
    # Serving the empty bowl and the raw tomato costs 0.1 each; full hands chop nothing.
    ("tomato-salad", [1, 3, 0, 3, 0, 2, 0, 1, 2, 4], [6, 7, 7, 7, 7, 5, 1, 9, 9, 3],
     [-0.005852, -0.100941, -0.006793, -0.100941, -0.006793, -0.004901, -0.001, -0.008648,
      -0.008648, -0.00297],
     "You are at the cutting board. The raw tomato is on the cutting board. You hold the empty "
     "bowl."),
    ("tomato-lettuce-salad", [0, 4, 7, 1, 5, 7, 3, 0, 1], [2, 5, 3, 5, 6, 3, 8, 9, 2],
     [-0.00199, -0.004901, 0.19305, -0.004901, -0.005852, 0.19305, -0.007726, -0.008648, -0.00199],
     "You are at the second cutting board. The first cutting board is empty. The second cutting "
     "board is empty. You hold the bowl with the chopped tomato and the chopped lettuce."),
    # Half a salad is refused and comes back raw; a chopped onion is no part of the recipe.
    ("tomato-lettuce-salad", [0, 4, 7, 0, 3, 6, 2, 5, 7, 2, 3, 4],
     [2, 5, 3, 1, 10, 7, 6, 5, 3, 1, 9, 9],
     [-0.00199, -0.004901, 0.19305, -0.001, -0.009562, -0.100941, -0.005852, -0.004901, -0.00297,
      -0.001, -0.008648, -0.008648],
     "You are at the first cutting board. The bowl with the chopped onion is on the first cutting "
     "board. The second cutting board is empty. Your hands are empty."),
    ("food-preparation", [4, 6, 5, 8, 7], [1] * 5, [0] * 5,
     HOME + "kitchen. You see the microwave. The microwave is open. The pancake is in the "
     "microwave. You are next to the pancake and the microwave. Your hands are empty."),
    # Closing the door on nothing earns nothing, and what lies inside can be taken out again.
    ("food-preparation", [5, 8, 4, 6, 1, 4, 7, 5, 8, 9, 8, 7, 6, 0], [1] * 14, [0] * 14,
     HOME + "living room. You see nothing useful here. You hold the pancake."),
    ("entertainment", [4, 9, 5, 10, 0, 6, 11, 7, 13, 8, 15], [1] * 11, [0] * 10 + [1],
     HOME + "living room. You see a coffee table, a television and a sofa. The chips are on the "
     "coffee table. You are next to the sofa. The television is on. You face the television. You "
     "took a seat on the sofa. You hold the milk."),
    # While seated no walk succeeds (8: to the kitchen); that one took a seat stays true.
    ("entertainment", [4, 9, 0, 8, 15, 16, 15, 1, 5, 16, 1], [1] * 11, [0] * 11,
     HOME + "kitchen. You see the milk. You hold the chips."),
]


@pytest.mark.parametrize("task, actions, steps, rewards, last_text", GOLDEN)
def test_golden_episode(task, actions, steps, rewards, last_text):
    """Otherwise the game has changed, and results can no longer be compared with the paper's."""
    env = next(env_class(task=t) for env_class, t in TASKS if t == task)
    env.reset()
    results = [env.step(action) for action in actions]
    assert [info["primitive_steps"] for *_, info in results] == steps
    assert [reward for _, reward, *_ in results] == pytest.approx(rewards, abs=1e-6)
    assert results[-1][0] == last_text
    assert any(terminated for _, _, terminated, _, _ in results) == (rewards[-1] > 0.5)


@pytest.mark.parametrize("env_class, task", TASKS)
def test_misuse_is_an_error(env_class, task):
    """Otherwise a wrong index or a forgotten reset would train on nonsense, silently."""
    env = env_class(task=task)
    with pytest.raises(RuntimeError):
        env.step(0)
    env.reset()
    for action in (-1, env.n_actions, 0.5, None):
        with pytest.raises(ValueError):
            env.step(action)
    with pytest.raises(ValueError):
        env_class(task="soup")
    while True:
        _, _, terminated, truncated, _ = env.step(env.n_actions - 1)
        if truncated:
            break
    with pytest.raises(RuntimeError):
        env.step(0)


@pytest.mark.parametrize("env_class, limit, duration", [
    (OvercookedText, 200, 6), (VirtualHomeText, 50, 1)])  # 6: to the shelf, and pick up the bowl
def test_time_limit_never_cuts_an_action_short(env_class, limit, duration):
    """Otherwise the last macro-action would have another duration and reward than everywhere."""
    episode = Episode(env_class(), 0.99)
    for steps_before, at_the_limit in ((limit - duration - 1, False), (limit - 1, True)):
        episode.start()
        episode.env.set_state(episode.env.get_state() | {"steps": steps_before})
        _, _, terminated, truncated = episode.act(1)
        assert (terminated, truncated) == (False, at_the_limit) and episode.length == duration


RANDOM_STEPS = 30_000  # over all tasks


def check_text(prompt: str, phrases: list[str]):
    """Prompt and actions are what a careful person would write."""
    assert prompt[0].isupper() and prompt.endswith(", your next step is to")
    assert len(set(phrases)) == len(phrases) > 0
    for text in (prompt, *phrases):
        assert text == " ".join(text.split())  # no double blanks, none at the ends
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(\w+) \1\b| [.,]|[.,]{2}", text)
    assert all(sentence[0].isupper() for sentence in prompt.split(". "))
    assert all(phrase[0].islower() and phrase[-1].isalpha() for phrase in phrases)


def check_overcooked(env, before, state, reward, k):
    """Each item in one place, one hand, and a reward that the rules of the kitchen allow."""
    place, foods = state["place"], env.kitchen.foods
    assert place.keys() == {*foods, "bowl"} and set(state["chopped"]) <= set(foods)
    assert list(place.values()).count("hand") <= 1
    for item, where in place.items():
        counters = [*env.kitchen.boards, overcooked_text.HOME[item]]
        if item == "bowl":
            counters.append(overcooked_text.SERVING)
        assert where in ("hand", "bowl") or tuple(where) in counters
        assert where != "bowl" or item in state["chopped"]  # nothing raw, and no bowl, in the bowl
    on_counters = [tuple(where) for where in place.values() if not isinstance(where, str)]
    assert len(set(on_counters)) == len(on_counters)
    assert 1 <= k <= 13 and all(1 <= x <= 5 for x in state["agent"])
    costs = sum(-0.001 * env.gamma ** i for i in range(k))
    event = round((reward - costs) / env.gamma ** (k - 1), 9)
    assert event in (0, 0.2, 1, -0.1) and (event == 1) == (tuple(place["bowl"]) == (3, 0))
    if event == 0.2:
        assert len(state["chopped"]) == len(before["chopped"]) + 1


def check_virtualhome(env, before, state, reward, k):
    """Each thing in one place, two hands, and nothing close that is in another room."""
    home, task = state["home"], virtualhome_text.TASKS[env.task]
    assert home["agent"] in virtualhome_text.ROOMS and len(home["held"]) <= 2 and k == 1
    carried = [*home["held"], *home["placed"]]
    assert len(set(carried)) == len(carried) and set(carried) <= set(task.things)
    for name in home["close"]:
        there = task.room if name in (*task.furniture, *home["placed"]) else task.home
        assert name not in home["held"] and home["agent"] == there
    assert len(set(home["close"])) == len(home["close"]) and reward in (0, 1)
    assert not (home["facing"] and home["agent"] != task.room)


@pytest.mark.parametrize("env_class, task", TASKS)
def test_many_random_steps(env_class, task):
    """Otherwise a rare sequence of actions could lose or double a thing, earn what the rules do not
    give, or tell it in broken English; and a wrong index could change the state."""
    env, rng, told, running = env_class(task=task), random.Random(task), set(), False
    check = check_overcooked if env_class is OvercookedText else check_virtualhome
    limit = 200 if env_class is OvercookedText else 50
    for _ in range(RANDOM_STEPS // len(TASKS)):
        if not running:
            _, info = env.reset()
        before = env.get_state()
        if rng.random() < 0.02:
            with pytest.raises(ValueError):
                env.step(rng.choice([-1, env.n_actions, 10**20, 0.0, None, "0", [0]]))
            assert env.get_state() == before
        any_action = rng.random() < 0.2  # also what is not offered; in Overcooked everything is
        action = rng.choice(range(env.n_actions) if any_action else list(info["actions"]))
        obs, reward, terminated, truncated, info = env.step(action)
        state, k = env.get_state(), info["primitive_steps"]
        check(env, before, state, reward, k)
        assert state["steps"] == before["steps"] + k
        assert terminated == info["success"] == (reward > 0.5)
        assert truncated == (not terminated and state["steps"] >= limit)
        indices = list(info["actions"])
        assert indices == sorted(set(indices)) and set(indices) <= set(range(env.n_actions))
        if (obs, *info["actions"].items()) not in told:
            told.add((obs, *info["actions"].items()))
            check_text(twosome.build_prompt(obs, env.goal), list(info["actions"].values()))
        running = not (terminated or truncated)


# --- pocket_lm ------------------------------------------------------------------------------------

@functools.cache
def pocket():
    return twosome.load_lm("pocket_lm", "cpu", "float32")


def test_pocket_lm_has_not_read_the_answers():
    """Otherwise the default LM would be a cheat sheet, and learning by practice a show."""
    texts = make_pocket_lm.write_corpus()
    corpus = "\n".join(texts).lower()
    for env_class, task in TASKS:
        assert env_class(task=task).goal.lower() not in corpus
    # A pair of observation and action holds the observation, so it is enough to look for that.
    observations = {obs.lower() for pair in TASKS for told in reachable(*pair).values()
                    for obs, _ in told}
    assert len(observations) > 1000
    # Only texts with a first and a last sentence of an observation can hold one.
    first = tuple({obs.partition(". ")[0] for obs in observations})
    last = tuple({obs.rpartition(". ")[2] for obs in observations})
    suspects = "\n".join(t for t in map(str.lower, texts)
                         if any(f in t for f in first) and any(s in t for s in last))
    assert not [obs for obs in observations if obs in suspects]


def test_pocket_lm_is_made_from_text_alone():
    """Otherwise rewards or plans of the environments could leak into the LM."""
    tree = ast.parse(Path(make_pocket_lm.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if "_text" in name or "twosome" in name}
    assert sum(f.stat().st_size for f in (ROOT / "pocket_lm").glob("*.*")) < 8e6


def test_pocket_lm_splits_action_words():
    """Otherwise words and tokens would be the same, and the normalisations could not differ."""
    model, tokenizer = pocket()
    words = {word for pair in TASKS for told in reachable(*pair).values() for _, actions in told
             for _, phrase in actions for word in phrase.split()}
    split = [word for word in words if len(tokenizer.tokenize(" " + word)) > 1]
    assert len(split) > len(words) / 4
    log_probs, n_tokens = action_log_probs(model, tokenizer, *zip(*STATES[:1]))
    n_words = [torch.tensor([len(a.split()) for a in STATES[0][1]])]
    policies = [twosome.normalize(log_probs, n_tokens, n_words, norm)[0].softmax(-1)
                for norm in ("word", "token", "none")]
    assert all((p - q).abs().max() > 0.01 for p, q in itertools.combinations(policies, 2))


# --- The boundary between prompt and action -------------------------------------------------------

def states_along_the_plans() -> list[tuple[str, tuple[str, ...]]]:
    """33 states of all sizes, (prompt, offered actions)."""
    states = []
    for env_class, task in TASKS:
        if task in twosome.TASK_STEPS:
            episode = Episode(env_class(task=task), 0.99)
            for action in PLANS[task]:
                states.append(episode.state)
                episode.act(list(episode.info["actions"]).index(action))
    return states


STATES = states_along_the_plans()
SENTENCES = [f"{prompt} {action}" for prompt, actions in STATES for action in actions]


def train_bpe(tokenizer: Tokenizer, vocab_size=400, **options) -> Tokenizer:
    tokenizer.train_from_iterator(SENTENCES, BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False, **options))
    return tokenizer


def add_special(tokenizer: Tokenizer, template: str):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)])


def make_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """A small tokenizer in the style of a well-known family, trained on the states' sentences."""
    tokenizer = Tokenizer(models.BPE())
    if style.startswith("byte-level"):  # GPT-2, Qwen, SmolLM; Llama-3 adds BOS
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        train_bpe(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        if "trimmed" in style:  # offsets without the blank
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    elif style == "blank is a token":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "isolated")
        train_bpe(tokenizer)
    elif style.startswith("sentencepiece"):  # a blank before the first word, too
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace()
        train_bpe(tokenizer)
        if "Llama-2" in style:  # the same, done by a normalizer
            tokenizer.pre_tokenizer = None
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if "BOS and EOS" in style:
        add_special(tokenizer, "<s> $A </s>")
    elif "BOS" in style:
        add_special(tokenizer, "<s> $A")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


STYLES = ["byte-level", "byte-level trimmed", "byte-level BOS", "byte-level BOS and EOS",
          "sentencepiece BOS", "sentencepiece Llama-2 BOS", "blank is a token"]


@pytest.mark.parametrize("style", STYLES)
def test_boundary(style):
    """Otherwise an action loses its first token, as it does on GPT-2 and Qwen in code that counts
    'the tokens of the action, less one', or gains one that belongs to the prompt."""
    tokenizer = make_tokenizer(style)
    special = {"<s>", "</s>"}
    for prompt, actions in STATES:
        prompt_ids, action_ids = encode(tokenizer, prompt, actions)
        tokens = tokenizer.convert_ids_to_tokens(prompt_ids)
        assert (tokens[0] == "<s>") == ("BOS" in style) and not special & set(tokens[1:])
        for action, ids in zip(actions, action_ids):
            whole = tokenizer(f"{prompt} {action}")["input_ids"]
            assert prompt_ids + ids == (whole[:-1] if "EOS" in style else whole)
            tokens = tokenizer.convert_ids_to_tokens(ids)
            # The blank in front of the action's first word is the action's.
            assert "".join(tokens).replace("Ġ", " ").replace("▁", " ") == " " + action


def test_number_of_tokens_without_bos():
    """Otherwise token normalisation would divide by one too few on tokenizers without BOS."""
    tokenizer = make_tokenizer("byte-level")
    _, n_tokens = action_log_probs(tiny("gpt2"), tokenizer, *zip(*STATES[:8]))
    for (_, actions), counts in zip(STATES, n_tokens):
        assert counts.tolist() == [len(tokenizer(" " + a)["input_ids"]) for a in actions]


@pytest.mark.parametrize("longest", [6, None])
def test_boundary_inside_a_token_is_an_error(longest):
    """Otherwise a token of both prompt and action would be counted for one of them, silently, and
    P(action | prompt) would be wrong; also when one token swallows the whole action."""
    options = {"max_token_length": longest} if longest else {}
    bpe = Tokenizer(models.BPE())
    bpe.train_from_iterator(["your next step is to chop it"] * 9 + ["zap"], BpeTrainer(
        vocab_size=200, show_progress=False, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    with pytest.raises(UserError, match="'chop it'"):
        encode(tokenizer, "your next step is to", ("chop it",))


# --- Scoring --------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 256, "vocab_size": 400,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FAMILIES = {
    "llama": {"num_key_value_heads": 2}, "gpt2": {}, "gpt_neox": {}, "gptj": {"rotary_dim": 4},
    "qwen2": {"num_key_value_heads": 2}, "phi": {}, "falcon": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},  # its output is not as wide as its layers
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8}, "olmo2": {"num_key_value_heads": 2},
    # Every second layer knows no positions.
    "smollm3": {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
    # Here packing would be wrong: a window over columns, ALiBi's distance in columns, a state
    # that runs through all columns, logits that are squashed behind the output matrix.
    "mistral, window": {"num_key_value_heads": 2, "sliding_window": 16}, "bloom": {},
    "falcon, ALiBi": {"alibi": True},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "mamba": {"state_size": 4}, "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neo, window": {"num_layers": 2, "window_size": 60,
                        "attention_types": [[["global", "local"], 1]]}}
UNPACKABLE = ["mistral, window", "bloom", "falcon, ALiBi", "mamba", "gemma2", "gemma3_text",
              "gpt_neo, window"]
PACKABLE = [family for family in FAMILIES if family not in UNPACKABLE]


def tiny(family: str, **options):
    """A small random LM. Its weights are large, so that what a token looks at matters."""
    options = SHAPE | FAMILIES.get(family, {}) | options
    config = AutoConfig.for_model(family.split(",")[0], **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def move_lora(agent: Agent):
    """As after training: a fresh LoRA has B = 0 and changes nothing."""
    for name, parameter in agent.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    agent.policy_memory.clear()


def family_agent(family: str) -> Agent:
    """An agent on a small random LM (or on pocket_lm) whose LoRA has moved."""
    if family == "pocket_lm":
        return pocket_agent()
    agent = Agent(tiny(family), make_tokenizer("byte-level"))
    move_lora(agent)
    return agent


def random_rows(prompt_lengths, n_actions):
    """Encoded prompts with actions of 1 to 6 tokens."""
    ids = lambda n: random.choices(range(2, 400), k=n)
    return [(ids(n), [ids(random.randint(1, 6)) for _ in range(k)])
            for n, k in zip(prompt_lengths, n_actions)]


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_equals_plain(family):
    """Otherwise the fast way computes something else than P(action | prompt): values and LoRA's
    gradients must agree, for prompts and actions of different length, with LoRA switched on."""
    agent = Agent(tiny(family), None)
    move_lora(agent)
    lora = [p for p in agent.model.parameters() if p.requires_grad]
    encoded = random_rows((30, 17, 8, 20, 9, 3), (5, 2, 9, 1, 4, 3))
    encoded[1][0][:12] = encoded[0][0][:12]  # beginnings in common, of prompts and of actions
    encoded[2][1][3][:1] = encoded[2][1][5][:1] = encoded[2][1][0][:1]
    assert twosome.may_pack(agent.model, encoded)
    packed = twosome.packed_log_probs(agent.model, encoded)
    plain = twosome.plain_log_probs(agent.model, encoded)
    assert [len(p) for p in packed] == [5, 2, 9, 1, 4, 3] and equal(packed, plain)
    gradients = [torch.autograd.grad(torch.cat(x).exp().sum().log(), lora) for x in (packed, plain)]
    assert equal(*gradients) and any(g.abs().max() > 0.01 for g in gradients[0])


def test_tree_by_hand():
    """Otherwise a token would be computed twice, or see a branch that is not its own."""
    encoded = [([7, 8], [[1, 2, 3], [1, 4], [5]]), ([7, 9], [[1, 2]])]
    ids, sees, sources, targets = twosome.as_tree(encoded)
    assert ids == [7, 8, 1, 2, 9, 1]  # 7-8-1-2 and 7-9-1; what an action ends with has no column
    assert [[i for i, seen in enumerate(row) if seen] for row in sees.tolist()] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 4], [0, 4, 5]]
    assert targets == [1, 2, 3, 1, 4, 5, 1, 2] and sources == [1, 2, 3, 1, 2, 1, 4, 5]


@pytest.mark.parametrize("family", UNPACKABLE)
def test_fallback_where_packing_would_be_wrong(family, capsys):
    """Otherwise LMs whose attention does not take our mask would get wrong probabilities."""
    tokenizer = make_tokenizer("byte-level")
    agent = Agent(tiny(family), tokenizer)
    move_lora(agent)
    prompts, actions = map(list, zip(*STATES[:3]))
    encoded = [encode(tokenizer, *state) for state in STATES[:3]]
    plain = twosome.plain_log_probs(agent.model, encoded)
    try:
        assert not equal(twosome.packed_log_probs(agent.model, encoded), plain)
    except (TypeError, ValueError, RuntimeError):
        pass  # it does not even take the mask
    log_probs, _ = action_log_probs(agent.model, tokenizer, prompts, actions)
    assert equal(log_probs, plain) and "cannot be packed" in capsys.readouterr().err


def test_verdict_is_remembered_and_checked_again_on_longer_rows(monkeypatch):
    """Otherwise each pass would cost two, or a sliding window would go unnoticed as long as the
    first prompts are shorter than it."""
    model = tiny("mistral, window")
    calls = []
    plain = twosome.plain_log_probs
    monkeypatch.setattr(twosome, "plain_log_probs", lambda *x: calls.append(1) or plain(*x))
    short, as_short, long = (random_rows((n,), (2,)) for n in (8, 7, 40))
    short[0][1][:] = as_short[0][1][:] = [[5, 6], [7, 8, 9]]
    assert twosome.may_pack(model, short) and (checked := len(calls))
    assert twosome.may_pack(model, as_short) and len(calls) == checked
    assert not twosome.may_pack(model, long) and len(calls) > checked
    checked = len(calls)
    assert not twosome.may_pack(model, short) and len(calls) == checked


def test_long_prompt_with_few_actions_after_short_prompt_with_many():
    """Otherwise the check would pass on a row that is long by its many actions only, and a window
    that cuts the longer prompt off would go unnoticed."""
    model = tiny("mistral, window")
    many_actions, long_prompt = random_rows((8,), (30,)), random_rows((50,), (2,))
    assert twosome.may_pack(model, many_actions)
    assert not twosome.may_pack(model, long_prompt)
    assert not twosome.may_pack(tiny("mistral, window"), many_actions + long_prompt)


@pytest.mark.parametrize("family", ["pocket_lm", *FAMILIES])
def test_joint_probability_token_by_token(family):
    """Otherwise the sum of log-probabilities would miss or repeat a token, on some architecture:
    here the definition is spelled out, one forward pass a token."""
    agent = family_agent(family)
    model, tokenizer = agent.model, agent.tokenizer
    prompts, actions = map(list, zip(STATES[0], STATES[20 if family == "pocket_lm" else 3]))
    log_probs, n_tokens = action_log_probs(model, tokenizer, prompts, actions)
    for prompt, offered, got, n in zip(prompts, actions, log_probs, n_tokens):
        for k, action in enumerate(offered):
            context, total = tokenizer(prompt)["input_ids"], 0.0
            ending = tokenizer(f"{prompt} {action}")["input_ids"][len(context):]
            for token in ending:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([context])).logits[0, -1]
                total += logits.log_softmax(-1)[token].item()
                context = context + [token]
            assert got[k].item() == pytest.approx(total, abs=1e-3) and n[k] == len(ending)


@pytest.mark.parametrize("norm, expected", [
    ("none", [[-6.0, -2.0], [-9.0]]), ("token", [[-1.5, -1.0], [-3.0]]),
    ("word", [[-2.0, -2.0], [-1.8]])])
def test_normalisation_by_hand(norm, expected):
    """Otherwise long actions would be punished, or words in many pieces rewarded, by mistake."""
    scores = twosome.normalize(
        [torch.tensor([-6.0, -2.0]), torch.tensor([-9.0])],
        [torch.tensor([4, 2]), torch.tensor([3])], [torch.tensor([3, 1]), torch.tensor([5])], norm)
    assert equal(scores, [torch.tensor(row) for row in expected])


def test_too_long_for_the_model():
    """Otherwise an LM would read beyond its context and answer with noise."""
    with pytest.raises(UserError, match="at most 16"):
        action_log_probs(tiny("gpt2", max_position_embeddings=16), make_tokenizer("byte-level"),
                         *zip(*STATES[:1]))


# --- The actor-critic -----------------------------------------------------------------------------

def pocket_agent(norm="word", max_prompts=32) -> Agent:
    """An agent on pocket_lm whose LoRA has moved."""
    model, tokenizer = pocket()
    agent = Agent(copy.deepcopy(model), tokenizer, norm, max_prompts)
    move_lora(agent)
    return agent


def test_policy_and_value_do_not_depend_on_batch_mates():
    """Otherwise a state would be worth something else beside a longer one: the mistake of reading
    the last column of a padded batch."""
    agent = pocket_agent()
    torch.nn.init.normal_(agent.critic[-1].weight)  # a fresh critic says 0 to everything
    by_length = sorted(STATES, key=lambda state: len(state[0]))
    states = [by_length[0], by_length[-1], by_length[9]]
    assert len(states[0][0]) < len(states[1][0]) / 2
    together = agent.value([prompt for prompt, _ in states]), agent.log_policy(states)
    for i, (prompt, actions) in enumerate(states):
        agent.features_memory.clear()
        assert agent.value([prompt]).item() == pytest.approx(together[0][i].item(), abs=1e-5)
        assert equal(agent.log_policy([(prompt, actions)]), [together[1][i]])
    assert together[0].unique().numel() == 3


def test_adapter_off_equals_the_base_model():
    """Otherwise the frozen LM would not be frozen, and 'before training' would mean nothing."""
    agent, (base, tokenizer) = pocket_agent(), pocket()
    prompts, actions = map(list, zip(*STATES[:3]))
    with torch.no_grad():
        original, _ = action_log_probs(base, tokenizer, prompts, actions)
        with agent.model.disable_adapter():
            off, _ = action_log_probs(agent.model, tokenizer, prompts, actions)
        on, _ = action_log_probs(agent.model, tokenizer, prompts, actions)
    assert equal(off, original, 1e-6) and not equal(on, original, 1e-2)


def test_fresh_lora_changes_nothing():
    """Otherwise training would not start from what the LM knows."""
    base, tokenizer = pocket()
    agent = Agent(copy.deepcopy(base), tokenizer)
    prompts, actions = map(list, zip(*STATES[:3]))
    assert equal(action_log_probs(agent.model, tokenizer, prompts, actions)[0],
                 action_log_probs(base, tokenizer, prompts, actions)[0], 1e-6)


def test_critic_features_do_not_change_with_lora():
    """Otherwise each policy update would change the critic's input under its feet, and remembered
    features would be out of date."""
    agent = pocket_agent()
    prompts = [prompt for prompt, _ in STATES]
    before = agent.features(prompts)
    trained = set(twosome.trained_parameters(agent))
    move_lora(agent)
    agent.features_memory.clear()
    assert torch.equal(agent.features(prompts), before)
    # Leaving peft's disable_adapter() must not have switched anything else on or off.
    assert set(twosome.trained_parameters(agent)) == trained
    assert all("lora_" in name or name.startswith("critic.") for name in trained)


def test_trained_weights_are_float32_over_a_bfloat16_lm():
    """Otherwise small learning rates would be rounded away, and LoRA would never move."""
    agent = Agent(*twosome.load_lm("pocket_lm", "cpu", "bfloat16"))
    assert agent.model.dtype == torch.bfloat16
    assert {p.dtype for p in twosome.trained_parameters(agent).values()} == {torch.float32}
    assert agent.log_policy(STATES[:2])[0].dtype == torch.float32


# --- PPO ------------------------------------------------------------------------------------------

SMALL = Args(task="tomato-salad", gamma=0.99, n_envs=4, rollout_steps=12, target_kl=1e9,
             policy_lr=1e-2, max_grad_norm=1e9)


def a_rollout(agent: Agent, args=SMALL):
    playing = [twosome.make_episode(args) for _ in range(args.n_envs)]
    return twosome.collect(agent, playing, args, random.Random(0))


def optimizer_of(agent: Agent, part: str, kind=torch.optim.SGD, lr=0.1):
    parameters = twosome.trained_parameters(agent).items()
    return kind([p for name, p in parameters if name.startswith(part)], lr)


def moved(agent: Agent, update, *args) -> set[str]:
    """The names of all weights, frozen ones included, that an update changes."""
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    update(agent, *args)
    return {name for name, p in agent.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_ratio_of_an_update_is_one(dtype):
    """Otherwise old and new log-probabilities would come from different computations, and PPO
    would clip before it has learned anything. (bfloat16 has 3 digits, and how it rounds depends on
    the other states of a tree: the ratio is 1 where each state has a tree of its own.)"""
    agent = pocket_agent()
    if dtype == "bfloat16":
        agent = Agent(*twosome.load_lm("pocket_lm", "cpu", dtype), max_prompts=1)
        move_lora(agent)
    rollout = a_rollout(agent)
    policies = agent.log_policy(rollout.states)
    now = torch.stack([policy[i] for policy, i in zip(policies, rollout.chosen)])
    assert torch.allclose(now, rollout.log_prob, atol=1e-5)
    args = Args(**vars(SMALL) | {"epochs": 1, "minibatches": 1})
    log = twosome.update_policy(agent, optimizer_of(agent, "model", lr=0), rollout, args, random)
    assert abs(log["approx_kl"]) < 1e-6 and log["clip_fraction"] == 0


@pytest.mark.parametrize("family", ["pocket_lm", *FAMILIES])
def test_updates_move_exactly_lora_and_critic(family):
    """Otherwise the LM would forget what it has read, actor and critic would disturb each other, or
    LoRA would find nothing to adapt in some architecture."""
    agent = family_agent(family)
    rollout = a_rollout(agent, Args(**vars(SMALL) | {"n_envs": 2, "rollout_steps": 6}))
    names = {name for name, _ in agent.named_parameters()}
    for update, part in ((twosome.update_policy, "lora_"), (twosome.update_value, "critic.")):
        optimizer = optimizer_of(agent, "model" if part == "lora_" else part, torch.optim.Adam)
        args = optimizer, rollout, SMALL, random.Random(0)
        # Mamba's kernel reads dt_proj directly, past any LoRA.
        assert moved(agent, update, *args) == {
            name for name in names if part in name and "dt_proj" not in name}


def test_no_reward_no_reason_to_move():
    """Otherwise the errors of a random critic would pass for advantages until the first success,
    and wear down the prior that is to lead there."""
    agent = pocket_agent()
    args = Args(**vars(SMALL) | {"env": "virtualhome", "task": "entertainment", "ent_coef": 0.0})
    rollout = a_rollout(agent, args)
    assert not rollout.episodes and (rollout.advantage == 0).all()
    update = optimizer_of(agent, "model"), rollout, args, random.Random(0)
    assert not moved(agent, twosome.update_policy, *update)


def test_small_advantages_make_small_steps():
    """Otherwise, after one chance success, the critic's errors of a thousandth would be blown up to
    full-size steps in every rollout that earns nothing, and wear down the prior."""
    agent, norms = pocket_agent(), []
    rollout = a_rollout(agent)
    rollout.advantage = torch.randn(len(rollout.states)) * 0.001
    for eps in (1.0, 1e-8):
        args = Args(**vars(SMALL) | {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9,
                                     "ent_coef": 0.0, "advantage_eps": eps})
        twosome.update_policy(agent, optimizer_of(agent, "model", lr=0), rollout, args, random)
        norms.append(sum((p.grad ** 2).sum() for p in agent.model.parameters()
                         if p.requires_grad).sqrt().item())
    assert norms[0] / norms[1] == pytest.approx(0.001, rel=0.2)


@pytest.mark.parametrize("max_prompts", [1, 3])
def test_max_prompts_changes_memory_not_gradients(max_prompts):
    """Otherwise a smaller graphics card would learn something else."""
    results = []
    for size in (100, max_prompts):
        torch.manual_seed(0)
        agent = pocket_agent(max_prompts=size)
        rollout = a_rollout(agent)
        args = Args(**vars(SMALL) | {"epochs": 1, "minibatches": 1})
        twosome.update_policy(agent, optimizer_of(agent, "model"), rollout, args, random.Random(0))
        results.append([p.detach() for p in twosome.trained_parameters(agent).values()])
    assert equal(*results, 1e-5)


def test_gae_with_macro_actions_by_hand():
    """Otherwise a walk of ten steps would be discounted like a single step."""
    column = lambda *x: torch.tensor(x)[:, None]
    # Two episodes in a row: steps of k = 3 and 1 at gamma 0.5, an end, then a step of k = 2.
    got = twosome.gae(column(1.0, 2.0, 3.0), column(0.125, 0.5, 0.25), column(0.8, 0.4, 0.2),
                      column(0.4, 0.0, 0.6), column(0.0, 1.0, 0.0), 0.5)
    last = 3 + 0.25 * 0.6 - 0.2
    second = 2 + 0.0 - 0.4  # nothing flows back over the end of an episode
    first = 1 + 0.125 * 0.4 - 0.8 + 0.125 * 0.5 * second
    assert equal(list(got), [torch.tensor([x]) for x in (first, second, last)], 1e-6)


@pytest.mark.parametrize("env, task", [("overcooked", "tomato-salad"),
                                       ("virtualhome", "entertainment")])
def test_gae_of_the_best_episode_is_the_optimum(env, task):
    """Otherwise GAE and the reported returns would discount differently: with lambda 1 and a critic
    that says 0, the first advantage is the discounted return of the episode."""
    episode = twosome.make_episode(twosome.finish({"env": env, "task": task}))
    outcome = [episode.act(list(episode.info["actions"]).index(action)) for action in PLANS[task]]
    reward, discount, done, _ = (torch.tensor(x, dtype=torch.float32)[:, None]
                                 for x in zip(*outcome))
    zero = torch.zeros_like(reward)
    advantage = twosome.gae(reward, discount, zero, zero, done, 1.0)
    assert advantage[0].item() == pytest.approx(twosome.OPTIMUM[task], abs=1e-5)


def test_gamma_reaches_into_macro_actions():
    """Otherwise --gamma would discount between macro-actions but not inside them."""
    episode = twosome.make_episode(Args(task="tomato-salad", gamma=0.5))
    reward, discount, *_ = episode.act(0)  # two steps
    assert (reward, discount) == pytest.approx((-0.001 - 0.5 * 0.001, 0.25))


@pytest.mark.parametrize("bootstrap, future", [(True, 1.0), (False, 0.0)])
def test_time_limit(bootstrap, future):
    """Otherwise the critic would learn that states lose their worth when the clock, which is no
    part of the prompt, runs out."""
    agent = pocket_agent()  # it always takes the first action: it walks from room to room
    agent.remembered_log_policy = lambda states: [
        torch.tensor([0.0] + [-torch.inf] * (len(actions) - 1)) for _, actions in states]
    torch.nn.init.zeros_(agent.critic[-1].weight), torch.nn.init.ones_(agent.critic[-1].bias)
    args = Args(env="virtualhome", task="entertainment", gamma=0.95, n_envs=1, rollout_steps=50,
                bootstrap_time_limit=bootstrap)
    rollout = a_rollout(agent, args)
    assert rollout.episodes == [(False, 0.0, 50)]
    assert rollout.advantage[-1].item() == pytest.approx(0.95 * future - 1)


# --- Runs -----------------------------------------------------------------------------------------

TINY_RUN = ["--steps", "96", "--n-envs", "4", "--rollout-steps", "6", "--device", "cpu"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of four updates."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twosome, "EVALUATION_EPISODES", 4)
        twosome.main([*TINY_RUN, "--out", str(run)])
    return run


def metrics(run: Path) -> list[dict]:
    """The log without what a clock says."""
    with open(run / "metrics.csv", newline="") as file:
        return [{name: x for name, x in row.items() if name not in ("steps_per_second", "seconds")}
                for row in csv.DictReader(file)]


def same_run(a: Path, b: Path) -> bool:
    weights = ("adapter/adapter_model.safetensors", "critic.safetensors")
    results = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    return (metrics(a) == metrics(b) and results[0]["after"] == results[1]["after"]
            and all((a / name).read_bytes() == (b / name).read_bytes() for name in weights))


def test_a_run_leaves_what_others_need(finished):
    """Otherwise plots, comparisons and --evaluate would miss something."""
    assert [row["update"] for row in metrics(finished)] == list("1234")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["task"] == "tomato-salad" and summary["env_steps"] == 96
    for when in ("before", "after"):
        assert {"success", "return", "length"} <= summary[when].keys()
    assert (finished / "adapter" / "adapter_config.json").exists()
    assert not list(finished.rglob("*.bin")) and not list(finished.rglob("*.pt"))


def test_same_seed_same_run(finished, monkeypatch):
    """Otherwise no result could be repeated."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 4)
    twosome.main([*TINY_RUN, "--out", "again"])
    assert same_run(Path("again"), finished)
    twosome.main([*TINY_RUN, "--out", "other", "--seed", "2"])
    assert metrics(Path("other")) != metrics(finished)


@pytest.mark.parametrize("function, call, rows", [
    ("evaluate", 1, 0), ("collect", 1, 0), ("collect", 2, 1), ("update_policy", 3, 2),
    ("save_file", 2, 2), ("save_file", 5, 4), ("evaluate", 2, 4)])
def test_resumed_run_equals_uninterrupted_run(finished, monkeypatch, function, call, rows):
    """Otherwise an interruption would change the result: something was not saved. Ctrl-C comes
    before anything is saved, in a rollout, in an update, while a checkpoint or (the fifth file)
    the critic is being written, and in the last evaluation."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 4)
    original, count = getattr(twosome, function), itertools.count(1)

    def interrupted(*args, **options):
        if next(count) == call:
            if function == "save_file":
                Path(args[1]).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(twosome, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        twosome.main([*TINY_RUN, "--out", "run"])
    monkeypatch.setattr(twosome, function, original)
    assert len(metrics(Path("run")) if rows else list(Path("run").glob("*.csv"))) == rows
    twosome.main(["--resume", "run"])
    assert same_run(Path("run"), finished)


KILLS = """
import os, random, signal, sys, time, torch, twosome

TINY_RUN = sys.argv[2:]
torch.set_num_threads(int(sys.argv[1]))
twosome.EVALUATION_EPISODES = 4


def attempt(operation=None, seconds=None):
    'Start or resume the run in a process of its own, and kill that; return its exit status.'
    pid = os.fork()
    if pid == 0:
        def watch(event, details):
            if operation and f"{event} {details[0]}" == operation:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        begun = os.path.exists("run/config.json")
        twosome.main(["--resume", "run"] if begun else [*TINY_RUN, "--out", "run"])
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


assert attempt("open run/config.tmp") and os.listdir("run") == []  # between mkdir and config.json
started = time.time()
assert attempt("os.rename run/config.tmp") and os.listdir("run") == ["config.tmp"]
took, rng, kills = time.time() - started, random.Random(0), 2
while kills < 6 and not os.path.exists("run/summary.json"):
    kills += bool(attempt(seconds=took * rng.uniform(0.5, 3)))
if not os.path.exists("run/summary.json"):  # ready, but before it says so
    kills += bool(attempt("os.rename run/summary.tmp"))
    assert attempt() == 0
print(kills, "kills")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_run_equals_uninterrupted_run(finished):
    """Otherwise a power cut, or a full memory, would change the result or leave a folder with which
    one can neither go on nor begin again. The child processes are forked from one that has
    imported everything: so a kill costs a second, and comes at any moment of the run itself."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(torch.get_num_threads()), *TINY_RUN],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert same_run(Path("run"), finished)


def test_two_processes_make_the_update_of_one(tmp_path):
    """Otherwise several GPUs would train something else than one."""
    run = ["--steps", "144", "--rollout-steps", "6", "--device", "cpu"]
    script = str(ROOT / "twosome.py")
    twosome.main([*run, "--n-envs", "4", "--out", "one"])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                           script, *run, "--n-envs", "2", "--out", "two"], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for name in ("adapter/adapter_model.safetensors", "critic.safetensors"):
        one, two = (load_file(Path(folder) / name) for folder in ("one", "two"))
        assert equal(list(one.values()), list(two.values()), 1e-5)
    assert [(row["env_steps"], row["episodes"], row["return"]) for row in metrics(Path("one"))] == [
        (row["env_steps"], row["episodes"], row["return"]) for row in metrics(Path("two"))]
    assert done.stdout.count("What was learned") == 1  # only the first process speaks


def test_evaluate_loads_what_was_trained(finished, capsys):
    """Otherwise --evaluate would show another agent than the one that was trained."""
    args, agent = twosome.load_run(finished, {"device": "cpu"})
    after = twosome.evaluate(agent, args, 4)
    assert after == json.loads((finished / "summary.json").read_text())["after"]
    twosome.main(["--evaluate", str(finished), "--episodes", "3"])
    assert "over 3 sampled episodes" in capsys.readouterr().out


def test_zero_shot_run():
    """Otherwise there would be nothing to compare training with."""
    twosome.main(["--method", "zero-shot", "--env", "virtualhome", "--out", "zero"])
    summary = json.loads(Path("zero/summary.json").read_text())
    assert summary["env_steps"] == 0 and 0 <= summary["before"]["success"] <= 1


# --- Baselines ------------------------------------------------------------------------------------

@pytest.mark.parametrize("env_class, task", TASKS)
def test_changed_is_what_changed(env_class, task):
    """Otherwise SayCan's affordance would be learned from wrong labels."""
    env, rng = env_class(task=task), random.Random(0)
    for _ in range(20):
        env.reset()
        over = False
        while not over:
            before = env.get_state()
            _, _, terminated, truncated, info = env.step(rng.randrange(env.n_actions))
            over = terminated or truncated
            clocks = {"steps": 0, "over": 0, "running": 0}
            assert info["changed"] == (before | clocks != env.get_state() | clocks)


def baseline(method: str, **options):
    torch.manual_seed(0)
    args = twosome.finish({"method": method, "n_envs": 2, "rollout_steps": 12} | options)
    return twosome.make_agent(args), args


def test_ppo_sees_numbers_and_only_offered_actions():
    """Otherwise the baseline would be handicapped, or learn from actions that nobody offers."""
    agent, args = baseline("ppo", env="virtualhome")
    vectors, offered = torch.rand(2, 11).tolist(), [(0, 3), (1, 2, 9)]
    policies = agent.log_policy(list(zip(vectors, offered)))
    logits = agent.model(torch.tensor(vectors))
    for policy, row, indices in zip(policies, logits, offered):
        kept = torch.stack([row[i] for i in indices])
        assert equal([policy.exp()], [kept.exp() / kept.exp().sum()], 1e-6)
    policies[0].exp()[0].backward()
    moved = agent.model[-1].bias.grad != 0
    assert moved.tolist() == [i in offered[0] for i in range(10)]
    assert len(list(agent.model)) == 5 and agent.model[0].out_features == 64
    first = agent.model[0].weight / 2**0.5  # orthogonal: (64, 11), its columns are
    assert equal([first.T @ first], [torch.eye(11)])


def test_saycan_is_the_product():
    """Otherwise "sensible times possible" would be something else."""
    agent, args = baseline("saycan")
    episode = twosome.make_episode(args)
    with torch.no_grad():
        agent.critic[-1].bias.copy_(torch.tensor([0.0, 3.0, -3.0, 1.0, -1.0]))
    seen, offered = episode.state
    phrases = tuple(episode.info["actions"].values())
    (says,) = agent.model.remembered_log_policy([(seen[0], phrases)])
    (logits,) = agent.affordance([seen], [offered])
    product = says.exp() * torch.sigmoid(logits)
    (policy,) = agent.log_policy([(seen, offered)])
    assert equal([policy.exp()], [product / product.sum()], 1e-6)
    assert (policy.exp() - says.exp()).abs().max() > 0.05


def test_saycan_learns_what_works_and_leaves_the_llm_alone():
    """Otherwise the affordance would be a constant, or SayCan a second TWOSOME."""
    agent, args = baseline("saycan", rollout_steps=100, epochs=30)
    rollout = twosome.collect(agent, [twosome.make_episode(args) for _ in range(2)], args,
                              random.Random(0))
    assert set(rollout.returns.tolist()) == {0.0, 1.0}  # what the agent learns from: did it work?
    # A toy in the same form: the first action works in the first state, the second in the other.
    n = len(rollout.states[0][0][1])
    seen = [("a", (1.0,) + (0.0,) * (n - 1)), ("b", (0.0,) * (n - 1) + (1.0,))]
    offered = ((0, "one"), (2, "two"))
    rollout.states = [(seen[i % 2], offered) for i in range(200)]
    rollout.chosen = torch.tensor([i // 2 % 2 for i in range(200)])
    rollout.returns = torch.tensor([float(i % 2 == i // 2 % 2) for i in range(200)])
    optimizer = torch.optim.Adam(agent.critic.parameters(), args.value_lr)
    names = moved(agent, twosome.update_affordance, optimizer, rollout, args, random.Random(0))
    assert names and all(name.startswith("critic.") for name in names)
    can = torch.stack(agent.affordance(seen, [offered] * 2)).sigmoid()
    assert equal([can], [torch.eye(2)], 0.1)


@pytest.mark.parametrize("method", ["ppo", "saycan", "random"])
def test_baselines_run_resume_and_load(method, monkeypatch, capsys):
    """Otherwise comparisons would break off, or not be repeatable."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 4)
    run = ["--method", method, *TINY_RUN]
    twosome.main([*run, "--out", "whole"])
    summary = json.loads(Path("whole/summary.json").read_text())
    if method == "random":
        return
    assert re.search(r"^  \d\.\d\d  [a-z ]+$", capsys.readouterr().out, re.M)  # an action in words
    collect, count = twosome.collect, itertools.count(1)

    def interrupted(*args):
        if next(count) == 4:
            raise KeyboardInterrupt
        return collect(*args)

    monkeypatch.setattr(twosome, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after 3 of 4 updates; .*--resume cut"):
        twosome.main([*run, "--out", "cut"])
    monkeypatch.setattr(twosome, "collect", collect)
    twosome.main(["--resume", "cut"])
    assert metrics(Path("cut")) == metrics(Path("whole"))
    args, agent = twosome.load_run(Path("cut"), {})
    assert twosome.evaluate(agent, args, 4) == summary["after"]
    if method == "ppo":
        capsys.readouterr()
        line = fails(capsys, "--evaluate", "cut", "--task", "tomato-lettuce-salad")
        assert "size mismatch" in line


# --- Watching -------------------------------------------------------------------------------------

FIRST_DECISION = """
---------------------------------- decision 1 ----------------------------------
 #  #  #  #  #  T  #
[ ] .  .  .  @  .  #
 #  .  .  .  .  .  #
{ } .  .  .  .  .  #
 #  .  .  .  .  .  #
 #  .  .  .  .  .  #
 #  #  #  #  #  B  #
In hand: nothing. In the bowl: nothing. Primitive steps: 0.
@ cook, T tomato, B bowl (small letter: chopped)
[ ] board, { } serving, # counter

You are in the middle of the kitchen. You see a tomato on the table. Your hands
are empty. To serve a salad of chopped tomato in a bowl, your next step is to
...

  probability
> 0.20 ##           pick up the tomato
  0.20 ##           pick up the bowl
  0.20 ##           walk to the cutting board
  0.20 ##           walk to the serving counter
  0.20 ##           wait for something to chop

discounted return so far 0.000, step 0
"""


def test_watch_random_choice(capsys, monkeypatch):
    """Otherwise a pipe, a notebook or an old terminal would show something else, or wait."""
    monkeypatch.setenv("COLUMNS", "80")
    twosome.main(["--watch", "--method", "random", "--seed", "1"])
    text = capsys.readouterr().out
    unmarked = text[:len(FIRST_DECISION)].replace("> ", "  ")
    assert unmarked == FIRST_DECISION.replace("> ", "  ")
    assert text.isascii() and text.replace("\n", "").isprintable()  # no control codes
    assert "The agent reached the goal after" in text or "The agent ran out of time after" in text


def test_watch_shows_before_and_after(finished, capsys, monkeypatch):
    """Otherwise one could not see what training has changed, or why the normalisations differ."""
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        twosome.main(["--watch", str(finished), "--tokens", "--pace", "0"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= int(columns)
    args, agent = twosome.load_run(finished, {})
    prompt, phrases = twosome.make_episode(args).state
    (after,) = agent.remembered_log_policy([(prompt, phrases)])
    with agent.model.disable_adapter():
        (before,) = agent.log_policy([(prompt, phrases)])
    first = [line for line in lines if line[:4] in ("  0.", "> 0.")][:len(phrases)]
    for line, p, q, phrase in zip(first, before.exp(), after.exp(), phrases):
        numbers = re.findall(r"\d\.\d\d", line)
        assert numbers == [f"{p:.2f}", f"{q:.2f}"] and line.endswith(phrase)
    assert sum(line.startswith("> ") for line in first) == 1
    log_probs, n_tokens = action_log_probs(agent.model, agent.tokenizer, [prompt], [phrases])
    start = lines.index("log-probability of each token:")
    sums = [line for line in lines[start:] if " sum " in line][:len(phrases)]
    for line, log_prob, n in zip(sums, log_probs[0], n_tokens[0]):
        assert f"sum {log_prob:.2f};  / {n} tokens" in line
    assert any(line.startswith("value ") for line in lines)


def test_watch_steps_on_enter(finished, capsys, monkeypatch):
    """Otherwise the episode would rush past."""
    asked = iter(["", "q"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    twosome.main(["--watch", str(finished)])
    text = capsys.readouterr().out
    assert "decision 2" in text and "decision 3" not in text


# --- Experiments ----------------------------------------------------------------------------------

def test_reproduce_goes_on_where_it_stopped():
    """Otherwise four hours of runs would be lost with one Ctrl-C."""
    folder = Path("results").resolve()
    folder.mkdir()
    plan = [job for job in reproduce.jobs("quick", "nowhere") if job["label"] == "random"][:2]
    plan = [job | {"run": str(Path(job["name"]).resolve())} for job in plan]
    plan[0]["given"] |= {"method": "ppo", "steps": 600}
    names = [job["name"] for job in plan]
    reproduce.run_all(plan[:1], folder, 1)
    first = (folder / "runs.csv").read_text()
    curve = (folder / "curves.csv").read_text()
    assert names[0] in first and names[1] not in first and names[0] in curve
    # An interruption between a curve and its row leaves a curve that is to be made anew.
    reproduce.append_csv(folder / "curves.csv", reproduce.CURVE, [{"name": names[1]}])
    done = {row["name"] for row in reproduce.read_csv(folder / "runs.csv")}
    reproduce.run_all([job for job in plan if job["name"] not in done], folder, 1)
    assert (folder / "runs.csv").read_text().startswith(first)
    assert [row["name"] for row in reproduce.read_csv(folder / "runs.csv")] == names
    assert (folder / "curves.csv").read_text() == curve


def test_a_job_that_was_cut_goes_on_from_its_checkpoint(monkeypatch):
    """Otherwise a long run would begin anew each time."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 4)
    (job, *_) = (job for job in reproduce.jobs("quick", "") if job["label"] == "ppo")
    job |= {"run": "run", "given": job["given"] | {"steps": 2000}}
    collect, calls = twosome.collect, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return collect(*args)

    monkeypatch.setattr(twosome, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_job(job)
    _, row, curve = reproduce.run_job(job)
    assert row["env_steps"] == 1536 and len(curve) == 3
    assert len(calls) == 4  # the two finished updates were not played again


@pytest.mark.parametrize("counts, successes, expected", [
    ([50, 50, 50], [0.8, 1.0, 1.0], 100), ([50, 50, 50], [0.0, 0.89, 0.9], ""),
    ([100, 0, 60], [0.5, 0, 1.0], ""), ([200, 10], [0.9, 0.0], 50)])
def test_steps_until_90_percent_by_hand(counts, successes, expected):
    """Otherwise the main comparison of the results would count something else."""
    curve = [{"env_steps": 50 * (i + 1), "episodes": n, "success": x if n else ""}
             for i, (n, x) in enumerate(zip(counts, successes))]
    assert reproduce.steps_to_90(curve) == expected


@pytest.mark.parametrize("principle", list(reproduce.PRINCIPLES))
def test_principles_are_switched_off_and_on_again(principle):
    """Otherwise E4 would measure nothing, or leak into the runs after it."""
    args = twosome.finish({})
    as_it_is = twosome.make_episode(args).state
    with reproduce.changed(principle):
        prompt, phrases = twosome.make_episode(args).state
    assert (prompt, phrases) != as_it_is and len(phrases) == len(as_it_is[1])
    assert len(set(phrases)) == len(phrases)
    assert twosome.make_episode(args).state == as_it_is


def test_all_actions_of_virtualhome_are_offered():
    """Otherwise E5 would compare the mask with itself."""
    args = twosome.finish({"env": "virtualhome"})
    with reproduce.changed("all-actions"):
        episode = twosome.make_episode(args)
        assert list(episode.info["actions"]) == list(range(10))
    assert len(twosome.make_episode(args).info["actions"]) < 10


def test_perplexity_by_hand():
    """Otherwise "no loss of language" would rest on a wrong sum."""
    model, tokenizer = pocket()
    with pytest.MonkeyPatch.context() as patch:
        texts = ["The oven is closed.", "You are in the kitchen. You hold the cup. Open it."]
        patch.setattr(language, "held_out", lambda: texts)
        patch.setattr(language, "cloze", lambda: (["You are in the"], [["kitchen.", "closed."]]))
        perplexity, accuracy = language.language(model, tokenizer)
    nats, n = 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(log_p[i, token].item() for i, token in enumerate(ids[1:]))
        n += len(ids) - 1
    assert perplexity == pytest.approx(math.exp(nats / n), rel=1e-5) and accuracy == 1


def test_plots(finished, monkeypatch, capsys):
    """Otherwise a course would have numbers and no pictures."""
    pytest.importorskip("matplotlib")
    other = Path("tomato-salad-word-seed2")
    shutil.copytree(finished, other)
    for argv, picture in (([finished, other], "curves.png"),
                          (["--states", finished, "--out", "x.png"], "x.png")):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv)])
        plot.main()
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    steps, success = plot.smooth([{"env_steps": "8", "episodes": "30", "success": "0.5"},
                                  {"env_steps": "16", "episodes": "0", "success": ""},
                                  {"env_steps": "24", "episodes": "30", "success": "1.0"}],
                                 "success", episodes=50)
    assert steps.tolist() == [8, 24] and success.tolist() == [0.5, 0.75]
    monkeypatch.setattr(sys, "argv", ["plot.py", "nowhere"])
    with pytest.raises(SystemExit, match="nowhere is not a run's folder"):
        plot.main()


def test_benchmark():
    """Otherwise the claim of speed could no longer be checked, or the two ways would differ."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "benchmark.py"), "--tasks", "tomato-salad",
         "--repeats", "1", "--rollout-steps", "8", "--out", "b.json"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    task = json.loads(Path("b.json").read_text())["tasks"]["tomato-salad"]
    assert task["parity"] < 1e-5 and task["same decisions"]
    assert task["plain"]["tokens, with gradients"] > 5 * task["ours"]["tokens, with gradients"]


def test_missing_matplotlib_is_one_line(monkeypatch):
    """Otherwise a package that is optional would end in a traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plot.pyplot()


# --- The command line -----------------------------------------------------------------------------

def test_readme_command():
    """Otherwise the first thing that a newcomer types would fail."""
    assert "python twosome.py --env overcooked" in (ROOT / "README.md").read_text()
    done = subprocess.run([sys.executable, str(ROOT / "twosome.py"), "--env", "overcooked",
                           "--steps", "600", "--out", "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "before training" in done.stdout and "--evaluate run" in done.stdout
    assert len(metrics(Path("run"))) == 1


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_commands_are_understood():
    """Otherwise the README would teach flags or files that do not exist."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"python (\S+\.py)([^`\n#|;&]*)", "\n".join(
        readme_blocks("bash")).replace("\\\n", " "))
    commands += re.findall(r"`python (\S+\.py)([^`]*)`", text.replace("\\|", "|"))
    assert len(commands) > 10
    for script, flags in commands:
        assert (ROOT / script).is_file(), script
        if script == "twosome.py" and "--help" not in flags and not set(flags) & set("[|."):
            twosome.parse(flags.split())


def test_readme_map():
    """Otherwise the map of the file would lead astray after the next edit."""
    lines = (ROOT / "twosome.py").read_text().splitlines()
    starts = {int(line[2]): i for i, line in enumerate(lines) if re.match(r"# \d\. ", line)}
    ends = {number: starts.get(number + 1, len(lines) + 2) - 2 for number in starts}
    _, _, text = (ROOT / "README.md").read_text().partition("## How to read")
    for number, start in starts.items():
        assert re.search(rf"^\| {number} [^|]+ \| {start}-{ends[number]} \|", text, re.M), (
            f"section {number} is in lines {start} to {ends[number]}")


def test_readme_environment(monkeypatch, capsys):
    """Otherwise the thirty lines that a teacher copies would not run."""
    monkeypatch.setattr(twosome, "ENVS", dict(twosome.ENVS))
    field = next(f for f in dataclasses.fields(Args) if f.name == "env")
    monkeypatch.setattr(field, "metadata", {**field.metadata, "choices": twosome.ENVS})
    monkeypatch.setattr(twosome, "OPTIMUM", dict(twosome.OPTIMUM))
    (code,) = readme_blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert json.loads(Path("runs/lamp/summary.json").read_text())["after"]["success"] > 0.9


def fails(capsys, *argv, bar=False) -> str:
    """Run the command line; it must say one line on stderr and exit with an error. bar: the line
    comes below a progress bar."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["twosome.py", *map(str, argv)])
        runpy.run_path(str(ROOT / "twosome.py"), run_name="__main__")
    error = capsys.readouterr().err.strip()
    if bar:
        *above, error = error.splitlines()
        assert all("%|" in line or not line.strip() for line in above)
    assert end.value.code not in (0, None)
    assert error.startswith("twosome.py: ") and "\n" not in error and "Traceback" not in error
    return error


@pytest.mark.parametrize("argv, hint", [
    ("--setps 5", "--steps"), ("--learning-rate 1", "--"), ("--env kitchen", "virtualhome"),
    ("--task soup", "tomato-lettuce-salad"), ("--norm letters", "token"),
    ("--env virtualhome --task tomato-salad", "food-preparation"), ("--steps many", "--steps"),
    ("--steps -1", "--steps"), ("--steps 0", "--steps"), ("--minibatches 0", "--minibatches"),
    ("--gamma 2", "--gamma"),
    ("--policy-lr nan", "--policy-lr"), ("--policy-lr -1", "--policy-lr"),
    ("--device cuda", "CUDA"),
    ("--n-envs 1 --rollout-steps 1", "--minibatches"), ("--out /dev/null", "exists already"),
    ("--out /dev/null/run", "/dev/null/run"), ("--env overcoked", "overcooked"), ("--env", "--env"),
    ("--method two-some", "saycan"), ("--device gpu", "cuda"), ("--device mps", "MPS"),
    ("--dtype float16", "bfloat16"), ("--steps 1e5", "--steps"), ("--n-envs 0", "--n-envs"),
    ("--rollout-steps -3", "--rollout-steps"), ("--max-prompts 0", "--max-prompts"),
    ("--gamma nan", "--gamma"), ("--ent-coef inf", "--ent-coef"), ("--clip-coef -0.1", "--clip"),
    ("--seed 99999999999999999999", "--seed"),
    ("--n_envs 4", "--n-envs"), ("overcooked", "--help"), ("--model owner/na|me", "owner/na|me"),
    ("--resume a --evaluate b", "--resume"), ("--resume /dev/null", "no readable config.json"),
    ("--episodes 0", "--evaluate"), ("--evaluate nowhere --episodes many", "--episodes"),
    ("--pace 1", "--watch"), ("--watch --pace nan", "--pace"), ("--watch nowhere", "nowhere"),
    ("--watch --method ppo", "trained first"),
    ("--model no/such/folder", "no/such/folder"), ("--model nothing", "nothing"),
    ("--model nobody/nothing", "nobody/nothing"), ("--model .", "config.json"),
    ("--model nothing --method zero-shot", "nothing"), ("--resume nowhere", "nowhere"),
    ("--evaluate nowhere", "nowhere"), ("--episodes 5", "--evaluate"),
    ("--evaluate .", "config.json")])
def test_mistakes_get_one_line(capsys, monkeypatch, argv, hint):
    """Otherwise a newcomer's typing error would end in a page of traceback, or in a run of
    something else than was meant. Nothing may be left behind: the corrected command must not
    find a folder that exists already."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert hint in fails(capsys, *argv.split())
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("package", ["accelerate", "peft"])
def test_missing_package_is_one_line(monkeypatch, package):
    """Otherwise who forgot the first command would meet a traceback."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="pip install -r requirements.txt"):
        runpy.run_path(str(ROOT / "twosome.py"))


def test_without_steps_the_tasks_own_number():
    """Otherwise a task would stop before it is learned."""
    for task, steps in twosome.TASK_STEPS.items():
        env = "overcooked" if task in OvercookedText.TASKS else "virtualhome"
        assert twosome.finish({"env": env, "task": task}).steps == steps


def test_help_names_every_flag(capsys):
    """Otherwise a knob could only be found by reading the code."""
    with pytest.raises(SystemExit) as end:
        twosome.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all("--" + name.replace("_", "-") in text for name in vars(Args()))


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def put(**changes):
    """Edits config.json."""
    def how(run):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))
    return how


def rename_weights(old: str, new: str | None):
    """In the adapter; None: they are lost."""
    def how(run):
        path = run / "adapter" / "adapter_model.safetensors"
        save_file({name.replace(old, new or ""): x for name, x in load_file(path).items()
                   if new or old not in name}, path)
    return how


DAMAGE = {  # what happened to the folder -> (how, the mode that meets it)
    "config cut": (lambda run: (run / "config.json").write_text("{"), "--evaluate"),
    "config a list": (lambda run: (run / "config.json").write_text("[]"), "--resume"),
    "config of a stranger": (lambda run: (run / "config.json").write_text('{"env": "garden"}'),
                             "--evaluate"),
    "config of wrong type": (lambda run: (run / "config.json").write_text('{"steps": "many"}'),
                             "--resume"),
    "config without numbers": (put(policy_lr=None), "--resume"),
    "config with too large a seed": (put(seed=10**30), "--resume"),
    "config of another norm": (put(norm="letters"), "--evaluate"),
    "config of no method": (put(method="magic"), "--evaluate"),
    "config of no device": (put(device="tpu"), "--resume"),
    "config of no precision": (put(dtype="half"), "--evaluate"),
    "config of another environment": (put(env="virtualhome"), "--resume"),
    "config changed since": (put(n_envs=8), "--resume"),
    "config of a lost model": (put(model="lost/for/good"), "--resume"),
    "adapter of a smaller model": (rename_weights("layers.1", None), "--evaluate"),
    "adapter of another model": (rename_weights("q_proj", "c_attn"), "--evaluate"),
    "critic cut": (lambda run: cut(run / "critic.safetensors"), "--evaluate"),
    "adapter cut": (lambda run: cut(run / "adapter" / "adapter_model.safetensors"), "--evaluate"),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "--evaluate"),
    "checkpoint cut": (lambda run: cut(run / "checkpoint.safetensors"), "--resume"),
    "checkpoint empty": (lambda run: (run / "checkpoint.safetensors").write_bytes(b""), "--resume"),
    "checkpoint of nobody": (lambda run: save_file({}, run / "checkpoint.safetensors"),
                             "--resume")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_run_folder(finished, capsys, damage):
    """Otherwise half an agent would be evaluated or trained on, a traceback shown, or what is
    still whole be lost."""
    run = Path("run")
    shutil.copytree(finished, run)
    how, mode = DAMAGE[damage]
    how(run)
    if mode == "--resume":
        (run / "summary.json").unlink()  # as if it had been interrupted
    files = {path: path.read_bytes() for path in run.rglob("*.*s*v*")}  # .csv, .safetensors
    error = fails(capsys, mode, run)
    assert "run" in error or "lost/for/good" in error
    assert all(path.read_bytes() == content for path, content in files.items())


def test_damaged_log_is_mended(finished):
    """Otherwise a spreadsheet that saved the log in its own way would cost the run."""
    shutil.copytree(finished, "run")
    Path("run/summary.json").unlink()
    Path("run/metrics.csv").write_bytes(b"\xff\xfe\0")
    twosome.main(["--resume", "run"])
    assert Path("run/metrics.csv").read_text() == (finished / "metrics.csv").read_text()


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_foreign_folder(capsys, mode):
    """Otherwise a slip of the hand would write into a folder that is no run."""
    shutil.copytree(ROOT / "pocket_lm", "folder")  # it has a config.json, too
    Path("empty").mkdir()
    names = sorted(os.listdir("folder"))
    assert all("no readable config.json" in fails(capsys, mode, x) for x in ("folder", "empty"))
    assert sorted(os.listdir("folder")) == names and not os.listdir("empty")


def test_resume_keeps_its_flags(finished, capsys):
    """Otherwise a resumed run would be half one experiment and half another."""
    shutil.copytree(finished, "run")
    assert "finished" in fails(capsys, "--resume", "run")
    Path("run/summary.json").unlink()
    assert "--seed" in fails(capsys, "--resume", "run", "--seed", 7)
    assert "not ended" in fails(capsys, "--evaluate", "run")
    assert "exists already" in fails(capsys, "--out", "run")
    assert "--episodes" in fails(capsys, "--evaluate", "run", "--episodes", 0)
    assert "--norm" in fails(capsys, "--evaluate", finished, "--norm", "token")
    assert "overcooked has" in fails(capsys, "--evaluate", finished, "--task", "entertainment")
    assert "--env" in fails(capsys, "--evaluate", finished, "--env", "virtualhome")


def save_lm(folder: str, model=None, tokenizer=None):
    (model or tiny("llama")).save_pretrained(folder)
    (tokenizer or make_tokenizer("byte-level")).save_pretrained(folder)


def across_words():
    bpe = Tokenizer(models.BPE())
    bpe.train_from_iterator(["your next step is to pick up the tomato"] * 9, BpeTrainer(
        vocab_size=200, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def change_weights(change):
    """A change of the file model.safetensors of a good model."""
    def make(folder):
        save_lm(folder)
        tensors = load_file(f"{folder}/model.safetensors")
        change(tensors)
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
    return make


def change_file(name, change):
    """change: a function of the path, or the new content."""
    def make(folder):
        save_lm(folder)
        path = Path(folder, name)
        path.write_text(change) if isinstance(change, str) else change(path)
    return make


NORM = "model.layers.1.input_layernorm.weight"
BAD_MODELS = {  # what is wrong -> (how to make it, a word of the message)
    "empty folder": (os.mkdir, "config.json"),
    "no tokenizer": (lambda folder: tiny("llama").save_pretrained(folder), "tokenizer"),
    "tokenizer cut": (change_file("tokenizer.json", cut), "cannot load"),
    "tokenizer nonsense": (change_file("tokenizer.json", "{}"), "cannot load"),
    "slow tokenizer": (lambda folder: (tiny("llama").save_pretrained(folder), Path(
        folder, "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')),
        "character offsets"),
    "tokenizer of another model": (lambda f: save_lm(f, tiny("llama", vocab_size=99)), "together"),
    "tokens across words": (lambda f: save_lm(f, tokenizer=across_words()), "one token"),
    "short context": (lambda f: save_lm(f, tiny("llama", max_position_embeddings=16)), "most 16"),
    "encoder": (lambda f: save_lm(f, tiny("bert")), "no causal LM"),
    "encoder and decoder": (change_file("config.json", '{"model_type": "t5"}'), "AutoModel"),
    "unknown architecture": (change_file("config.json", '{"model_type": "xyz"}'), "xyz"),
    "config cut": (change_file("config.json", cut), "JSON"),
    "config a list": (change_file("config.json", "[]"), "cannot load"),
    "weights cut": (change_file("model.safetensors", cut), "cannot load"),
    "weights empty": (change_file("model.safetensors", ""), "cannot load"),
    "weights gone": (change_file("model.safetensors", os.unlink), "cannot load"),
    "a weight missing": (change_weights(lambda tensors: tensors.pop(NORM)), NORM),
    "a weight of another size": (change_weights(
        lambda tensors: tensors.update({NORM: torch.ones(7)})), NORM),
    "a weight not a number": (change_weights(
        lambda tensors: tensors[NORM].fill_(math.nan)), "not finite")}


@pytest.mark.parametrize("bad", BAD_MODELS)
def test_bad_model_folder(capsys, bad):
    """Otherwise an LM that is not whole, cannot be asked for probabilities, or sees the words that
    it is to predict, would play on and look merely stupid; or leave a folder in the way."""
    make, hint = BAD_MODELS[bad]
    make("lm")
    capsys.readouterr()
    assert hint in fails(capsys, "--model", "lm", "--out", "run")
    assert os.listdir() == ["lm"]


def test_tokenizer_without_special_tokens(monkeypatch):
    """Otherwise many LMs could not be used: neither padding nor a beginning needs a token."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 2)
    tokenizer = make_tokenizer("byte-level")
    assert tokenizer.pad_token is None and tokenizer.bos_token is None
    save_lm("lm", tokenizer=tokenizer)
    twosome.main(["--model", "lm", "--out", "run", *TINY_RUN])
    assert len(metrics(Path("run"))) == 4


@pytest.mark.parametrize("full", ["at a checkpoint", "at the log"])
def test_full_disk(capsys, monkeypatch, full):
    """Otherwise hours of training would be lost to a full disk: the line must say so, and the run
    must go on from its last checkpoint when there is room again."""
    resource = pytest.importorskip("resource")  # a file may not become larger: a disk full for it
    run = ["--method", "ppo", "--steps", "240", "--n-envs", "4", "--rollout-steps", "6"]
    twosome.main([*run, "--out", "whole"])
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), safetensors.torch.save_file

    def filling(tensors, path, **options):
        if (path.parent / "checkpoint.safetensors").exists():  # the second one fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(tensors, path, **options)
        if full == "at the log":
            size = (path.parent / "metrics.csv").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1, limits[1]))

    monkeypatch.setattr(safetensors.torch, "save_file", filling)
    try:
        error = fails(capsys, *run, "--out", "run", bar=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    assert "too large" in error and "--resume" in error
    twosome.main(["--resume", "run"])
    assert metrics(Path("run")) == metrics(Path("whole")) and len(metrics(Path("run"))) == 10
    assert Path("run/actor.safetensors").read_bytes() == Path(
        "whole/actor.safetensors").read_bytes()


def test_memory_is_short(capsys, monkeypatch):
    """Otherwise the most frequent failure on a graphics card would be a page of traceback."""
    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.nn.functional, "log_softmax", full)
    assert "--max-prompts" in fails(capsys, "--method", "ppo")


@pytest.mark.parametrize("part, function", [
    ("logits", "collect"), ("logits", "update_policy"), ("a weight", "update_value")])
def test_numbers_that_break_during_training(finished, monkeypatch, part, function):
    """Otherwise a run would go on with NaN, and its last good checkpoint would be overwritten: a
    loss that is still finite says nothing about the weights after the step."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 4)
    original, count = getattr(twosome, function), itertools.count(1)

    def breaking(agent, *args):
        third = next(count) == 3
        if third and part == "logits":
            agent.model.get_output_embeddings().register_forward_hook(lambda *x: x[-1] * math.nan)
        result = original(agent, *args)
        if third and part == "a weight":
            agent.critic[0].weight.data[0, 0] = math.inf
        return result

    monkeypatch.setattr(twosome, function, breaking)
    with pytest.raises(UserError, match="update 3: .*not finite"):
        twosome.main([*TINY_RUN, "--out", "run"])
    with safe_open("run/checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["progress"])["rows"][-1]["update"] == 2
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())
    monkeypatch.setattr(twosome, function, original)
    twosome.main(["--resume", "run"])
    assert same_run(Path("run"), finished)


def test_numbers_that_are_not_finite():
    """Otherwise a run with absurd rates would go on for hours with a broken LM and overwrite its
    last good checkpoint, and a broken model would be noticed only by its results."""
    small = ["--n-envs", "2", "--rollout-steps", "16"]
    with pytest.raises(UserError, match="not finite"):
        twosome.main(["--policy-lr", "1e30", "--steps", "64", "--out", "run", *small])
    assert not Path("run/summary.json").exists()
    model, tokenizer = twosome.load_lm("pocket_lm", "cpu", "float32")
    next(model.parameters()).data[0, 0] = float("nan")
    model.save_pretrained("broken")
    tokenizer.save_pretrained("broken")
    with pytest.raises(UserError, match="not finite"):
        twosome.load_lm("broken", "cpu", "float32")


class Bomb:
    """Whoever unpickles it runs its command."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["model", "adapter", "critic", "checkpoint"])
def test_no_pickle_is_ever_loaded(finished, capsys, kind):
    """Otherwise a model or a run from a stranger could run a stranger's program."""
    shutil.copytree(ROOT / "pocket_lm" if kind == "model" else finished, "folder")
    weights = Path("folder/adapter" if kind == "adapter" else "folder")
    bomb = pickle.dumps(Bomb())
    if kind in ("model", "adapter"):
        for file in weights.glob("*.safetensors"):
            file.unlink()
        for name in ("pytorch_model.bin", "adapter_model.bin"):
            (weights / name).write_bytes(bomb)
    else:  # also not under the name of a safe file
        (weights / f"{kind}.safetensors").write_bytes(bomb)
    if kind == "checkpoint":
        Path("folder/summary.json").unlink()
    fails(capsys, {"model": "--model", "checkpoint": "--resume"}.get(kind, "--evaluate"), "folder")
    assert not Path("exploded").exists()
    with pytest.raises(FileExistsError):  # the bomb is a real one
        Path("exploded").mkdir()
        pickle.loads(bomb)


@pytest.mark.parametrize("architecture", ["llama", "evil"])
def test_no_code_from_a_model_folder_is_ever_run(architecture, capsys):
    """Otherwise a model from a stranger could run a stranger's program: its config names Python
    code that comes with it. Where the library knows the architecture, it is used without."""
    save_lm("lm")
    Path("lm/evil.py").write_text(f"open({str(Path('exploded').resolve())!r}, 'w')\n")
    for name, classes in (("config", ("AutoConfig", "AutoModelForCausalLM")),
                          ("tokenizer_config", ("AutoTokenizer",))):
        path = Path(f"lm/{name}.json")
        content = json.loads(path.read_text())
        content["auto_map"] = {x: "evil.Evil" if x != "AutoTokenizer" else [None, "evil.Evil"]
                               for x in classes}
        if name == "config":
            content["model_type"] = architecture
        path.write_text(json.dumps(content))
    capsys.readouterr()
    if architecture == "llama":
        assert type(twosome.load_lm("lm", "cpu", "float32")[0]).__name__ == "LlamaForCausalLM"
    else:
        assert "lm" in fails(capsys, "--model", "lm", "--out", "run")
    assert not Path("exploded").exists() and not Path("run").exists()
    exec(Path("lm/evil.py").read_text())
    assert Path("exploded").exists()  # it would have left this trace


def test_worked_examples():
    """Otherwise the examples in the docstrings would teach something that is not so."""
    for module in (twosome, overcooked_text, virtualhome_text, make_pocket_lm):
        assert doctest.testmod(module).failed == 0
