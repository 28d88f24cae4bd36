"""Tests that teach: each says in one sentence what would go wrong if it failed.

    pytest                      # all, in two minutes on one CPU core, without network
    pytest -k boundary -v       # one topic

In the order of twosome.py; then the environments, pocket_lm, the experiments and the READMEs.
"""
import ast
import builtins
import copy
import csv
import dataclasses
import doctest
import functools
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may use the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # numbers depend a little on the number of threads

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import twosome
from experiments import baselines, benchmark, exact, language, plot, real, reproduce, watch
from overcooked_text import HOME, SERVING, OvercookedText
from pocket_lm import make_pocket_lm
from twosome import Agent, Args, Episode, action_log_probs, encode
from virtualhome_text import ROOMS, VirtualHomeText

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent
EPISODES_PER_ROW = twosome.EPISODES_PER_ROW
twosome.EVALUATION_EPISODES = twosome.EPISODES_PER_ROW = 4  # small runs, except where it matters
# For the libraries' own authors; peft about GPT-2's transposed matrices.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")

TASKS = [(env, task) for env in twosome.ENVS.values() for task in env.TASKS]
# The shortest way to each goal. The household's unseen tasks have the plan of food-preparation.
PLANS = {"tomato-salad": [0, 2, 4, 0, 1, 3],
         "tomato-lettuce-salad": [0, 4, 7, 1, 5, 7, 3, 0, 1, 6],
         "entertainment": [4, 9, 5, 10, 0, 6, 11, 7, 13, 8, 15]}
PLANS |= {task: [4, 6, 5, 8, 7, 9] for task in VirtualHomeText.TASKS if task not in PLANS}
TINY_RUN = ["--steps", "96", "--n-envs", "4", "--rollout-steps", "6", "--device", "cpu",
            "--standardize", "true", "--rehearsal-coef", "1"]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Each test in an empty folder, with the same random numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["twosome.py"])
    torch.manual_seed(0)
    random.seed(0)


def equal(a, b, tolerance=1e-4):
    """Two lists of tensors are the same numbers."""
    return len(a) == len(b) and all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b))


def states_along_the_plans():
    """33 states of all sizes: (prompt, offered actions)."""
    for env_class, task in TASKS:
        if task in twosome.TASK_STEPS:
            episode = Episode(env_class(task=task), 0.99)
            for action in PLANS[task]:
                yield episode.state()
                episode.act(list(episode.info["actions"]).index(action))


STATES = list(states_along_the_plans())


# === Scoring: the boundary between prompt and action, the definition, the tree, normalisation =====

def make_tokenizer(style="byte-level") -> PreTrainedTokenizerFast:
    """A small tokenizer in the style of a well-known family, trained on the states' sentences."""
    tokenizer, options = Tokenizer(models.BPE()), {}
    if style.startswith("byte-level"):  # GPT-2, Qwen, SmolLM; Llama-3 adds BOS
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif style == "blank is a token":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "isolated")
    elif style.startswith("sentencepiece"):  # a blank before the first word, too
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:  # "across words 7": tokens of up to 7 characters, which do not stop at blanks
        options = {"max_token_length": int(style.split()[-1])}
    sentences = (f"{prompt} {action}" for prompt, actions in STATES for action in actions)
    tokenizer.train_from_iterator(sentences, BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False, **options))
    if "Llama-2" in style:  # the same, done by a normalizer
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if "trimmed" in style:  # offsets without the blank
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if "BOS" in style:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if "EOS" in style else "<s> $A",
            special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("style", [
    "byte-level", "byte-level trimmed", "byte-level BOS", "byte-level BOS and EOS",
    "sentencepiece BOS", "sentencepiece Llama-2 BOS", "blank is a token"])
def test_boundary(style):
    """Otherwise an action loses its first token, as it does on GPT-2 and Qwen in code that counts
    'the tokens of the action, less one', or gains one that belongs to the prompt."""
    tokenizer, special = make_tokenizer(style), {"<s>", "</s>"}
    for prompt, actions in STATES:
        prompt_ids, action_ids = encode(tokenizer, prompt, actions)
        tokens = tokenizer.convert_ids_to_tokens(prompt_ids)
        assert (tokens[0] == "<s>") == ("BOS" in style) and not special & set(tokens[1:])
        for action, ids in zip(actions, action_ids, strict=True):
            whole = tokenizer(f"{prompt} {action}")["input_ids"]
            assert prompt_ids + ids == (whole[:-1] if "EOS" in style else whole)
            tokens = tokenizer.convert_ids_to_tokens(ids)
            # The blank in front of the action's first word is the action's.
            assert "".join(tokens).replace("Ġ", " ").replace("▁", " ") == " " + action


@pytest.mark.parametrize("longest, action", [(7, "walk to the sofa"), (20, "walk")])
def test_boundary_inside_a_token_is_an_error(longest, action):
    """Otherwise a token of both prompt and action would be counted for one of them, silently, and
    P(action | prompt) would be wrong; also when one token swallows the whole action."""
    with pytest.raises(ValueError, match=f"'{action}'"):
        encode(make_tokenizer(f"across words {longest}"), "your next step is to", (action,))


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400,
         "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}
PACKABLE = {family: {} for family in (
    "llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "phi", "falcon", "gemma", "olmo2")} | {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},  # its output is not as wide as its layers
    "smollm3": {"no_rope_layer_interval": 2},  # every second layer knows no positions
    "gptj": {"rotary_dim": 4}, "mistral": {"sliding_window": None}}
UNPACKABLE = {  # a window over columns, ALiBi's distance in columns, a state that runs through all
    # columns, logits that are squashed behind the output matrix
    "mistral, window": {"sliding_window": 16}, "bloom": {}, "falcon, ALiBi": {"alibi": True},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mamba": {"state_size": 4}, "gemma2": {},
    "gpt_neo, window": {"num_layers": 2, "window_size": 16,
                        "attention_types": [[["global", "local"], 1]]}}
FAMILIES = PACKABLE | UNPACKABLE


def tiny(family: str, **options):
    """A small random LM. Its weights are large, so that what a token looks at matters."""
    config = AutoConfig.for_model(family.split(",")[0],
                                  **SHAPE | FAMILIES.get(family, {}) | options)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@functools.cache
def pocket():
    return twosome.load_lm("pocket_lm", "cpu", "float32")


def move_lora(agent: Agent):
    """As after training: a fresh LoRA has B = 0 and changes nothing."""
    for name, parameter in agent.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    agent.policy_memory.clear()


def an_agent(family="pocket_lm", **options) -> Agent:
    """An agent on pocket_lm, or on a small random LM, whose LoRA has moved."""
    model, tokenizer = pocket() if family == "pocket_lm" else (
        tiny(family, **options), make_tokenizer())
    agent = Agent(copy.deepcopy(model), tokenizer, max_prompts=32)
    move_lora(agent)
    return agent


@pytest.mark.parametrize("family", ["pocket_lm", *FAMILIES])
def test_joint_probability_token_by_token(family):
    """Otherwise the sum of log-probabilities would miss or repeat a token, on some architecture:
    here the definition is spelled out, one forward pass a token."""
    agent = an_agent(family)
    states = STATES[0], STATES[20 if family == "pocket_lm" else 3]
    log_probs, n_tokens = action_log_probs(agent.model, agent.tokenizer, *zip(*states))
    for (prompt, actions), got, lengths in zip(states, log_probs, n_tokens, strict=True):
        for action, log_prob, n in zip(actions, got, lengths, strict=True):
            context, total = agent.tokenizer(prompt)["input_ids"], 0.0
            ending = agent.tokenizer(f"{prompt} {action}")["input_ids"][len(context):]
            for token in ending:
                with torch.no_grad():
                    logits = agent.model(input_ids=torch.tensor([context])).logits[0, -1]
                total += logits.log_softmax(-1)[token].item()
                context = context + [token]
            assert log_prob.item() == pytest.approx(total, abs=1e-3) and n == len(ending)


def test_tree_by_hand():
    """Otherwise a token would be computed twice, or see a branch that is not its own."""
    encoded = [([7, 8], [[1, 2, 3], [1, 4], [5]]), ([7, 9], [[1, 2]])]
    ids, sees, sources, targets, of_states = twosome.as_tree(encoded)
    assert ids == [7, 8, 1, 2, 9, 1]  # 7-8-1-2 and 7-9-1; what an action ends with has no column
    assert [[i for i, seen in enumerate(row) if seen] for row in sees.tolist()] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 4], [0, 4, 5]]
    assert targets == [1, 2, 3, 1, 4, 5, 1, 2] and sources == [1, 2, 3, 1, 2, 1, 4, 5]
    assert of_states == [[0, 1, 2, 3], [0, 4, 5]]  # the second's own tree has 7-9-1


def test_policy_and_normalisation_by_hand():
    """Otherwise long actions would be punished, or words in many pieces rewarded, by mistake."""
    agent, (prompt, actions) = an_agent(), STATES[2]
    (log_p,), (n_tokens,) = action_log_probs(agent.model, agent.tokenizer, [prompt], [actions])
    for norm, lengths in (("word", [len(a.split()) for a in actions]),
                          ("token", n_tokens.tolist()), ("none", [1] * len(actions))):
        agent.norm = norm
        scores = [math.exp(x / n) for x, n in zip(log_p.tolist(), lengths)]
        (policy,) = agent.log_policy([(prompt, actions)])
        assert equal([policy.exp()], [torch.tensor(scores) / sum(scores)])


# === The actor-critic =============================================================================

def test_policy_and_value_do_not_depend_on_batch_mates():
    """Otherwise a state would be worth something else beside a longer one: the mistake of reading
    the last column of a padded batch."""
    agent = an_agent()
    torch.nn.init.normal_(agent.critic[-1].weight)  # a fresh critic says 0 to everything
    states = sorted(STATES, key=lambda state: len(state[0]))[::16]
    values, policies = agent.value(states), agent.log_policy(states)
    for state, value, policy in zip(states, values, policies, strict=True):
        agent.features_memory.clear()
        assert equal([agent.value([state])[0], *agent.log_policy([state])], [value, policy], 1e-5)
    assert len(states[0][0]) < len(states[2][0]) / 2 and values.unique().numel() == 3


def test_frozen_lm_stays_what_it_was():
    """Otherwise training would not start from what the LM knows; or the critic, which reads the
    LM's last hidden state of the whole prompt, would lose its footing with each policy update."""
    agent, (base, tokenizer) = an_agent(), pocket()
    ask = lambda model: action_log_probs(model, tokenizer, *zip(*STATES[:3]))[0]
    with agent.model.disable_adapter():
        assert equal(ask(agent.model), ask(base), 1e-6)
    assert equal(ask(Agent(copy.deepcopy(base), tokenizer).model), ask(base), 1e-6)  # fresh LoRA
    assert not equal(ask(agent.model), ask(base), 1e-2)
    before, trained = agent.features(STATES), set(twosome.trained_parameters(agent))
    ids = tokenizer(STATES[0][0], return_tensors="pt")["input_ids"]
    assert equal([before[0]], [base.get_decoder()(input_ids=ids).last_hidden_state[0, -1]], 1e-5)
    move_lora(agent)
    agent.features_memory.clear()
    assert torch.equal(agent.features(STATES), before) and len(before.unique(dim=0)) == 33
    assert set(twosome.trained_parameters(agent)) == trained  # peft switched nothing on or off
    assert all("lora_" in name or name.startswith("critic.") for name in trained)


def test_features_are_standardized_once():
    """Otherwise a critic would hardly see a real LLM's states, which differ by a tenth of their
    length; or its inputs would shift with each rollout."""
    plain, agent = (Agent(copy.deepcopy(pocket()[0]), pocket()[1], standardize=x)
                    for x in (False, True))
    x, y = plain.features(STATES), agent.features(STATES)
    assert plain.scale == (0, 1) and equal(y.mean(0), torch.zeros(128), 1e-5)
    assert y.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(agent.features(STATES[:2]), y[:2])  # by the first rollout's numbers
    assert equal(y * agent.scale[1] + agent.scale[0], x, 1e-4)


def test_policies_are_remembered_until_the_policy_moves(monkeypatch):
    """Otherwise each state would go through the LM at each of its visits, or a rollout would be
    played by the policy before the last update."""
    agent, passes = an_agent(), []
    ask = agent.log_policy
    monkeypatch.setattr(agent, "log_policy", lambda states: passes.extend(states) or ask(states))
    before = agent.remembered_log_policy([*STATES, *STATES])
    assert sorted(passes) == sorted(STATES) and equal(before[:33], before[33:], 0)
    agent.learn(a_rollout(agent), SMALL, random.Random(0))
    after = agent.remembered_log_policy(STATES)
    assert equal(after, ask(STATES)) and not equal(after, before[:33], 1e-3)


# === PPO ==========================================================================================

SMALL = Args(task="tomato-salad", n_envs=2, rollout_steps=12, target_kl=1e9, policy_lr=1e-2,
             max_grad_norm=1e9, epochs=1, minibatches=1)


def a_rollout(agent: Agent, args=SMALL):
    playing = [twosome.make_episode(args) for _ in range(args.n_envs)]
    return twosome.collect(agent, playing, args, random.Random(0))


def gradients(agent: Agent, rollout, **changes) -> list[torch.Tensor]:
    """LoRA's gradients, of one step that is not taken, over a whole rollout."""
    lora = [p for p in agent.model.parameters() if p.requires_grad]
    agent.optimizers["policy"] = torch.optim.SGD(lora, lr=0.0)
    agent.log = twosome.update_policy(agent, rollout, dataclasses.replace(SMALL, **changes),
                                      random.Random(0))
    return [p.grad.clone() for p in lora]


def moved(agent: Agent, update, *args) -> set[str]:  # names of all weights that it changes
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    update(agent, *args)
    return {name for name, p in agent.named_parameters() if not torch.equal(p, before[name])}


def test_policy_loss_by_hand():
    """Otherwise the policy would be pushed on beyond 1 +- eps, or held back on the way home; or by
    rounding, as in r - 1 - log r, it would seem to have moved by less than nothing."""
    ratio, advantage = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]), torch.tensor([1.0, 1, -1, -1, 2])
    entropy, old = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.full((5,), -2.0)
    loss, terms = twosome.policy_loss(ratio.log() + old, old, advantage, entropy, 0.2, 0.01)
    surrogate, kl = 1.2 + 0.5 - 1.5 - 0.8 + 2.2, (ratio - 1 - ratio.log()).sum()
    assert equal([terms], [torch.tensor([-surrogate, 1.5, kl, 4])], 1e-5)
    assert loss.item() == pytest.approx(-surrogate - 0.01 * 1.5, abs=1e-5)
    one, naive = torch.ones(64), []
    for scale in (1e-7, 1e-5, 1e-4, 1e-3, 0.1) * 20:
        new = torch.randn(64) * scale
        assert twosome.policy_loss(new, 0 * one, one, one, 0.2, 0.0)[1][2] >= 0
        naive.append((new.exp() - 1 - new).sum())
    assert min(naive) < 0


def test_value_loss_by_hand():
    """Otherwise the critic would be pulled further than eps from where it was, or not at all."""
    agent = SimpleNamespace(critic=torch.nn.Linear(1, 1), features=lambda prompts: torch.ones(2, 1))
    torch.nn.init.zeros_(agent.critic.weight), torch.nn.init.constant_(agent.critic.bias, 0.5)
    agent.optimizers = {"value": torch.optim.SGD(agent.critic.parameters(), 0.0)}
    rollout = SimpleNamespace(states=["ab", "cd"], value=torch.tensor([0.0, 0.4]),
                              returns=torch.tensor([1.0, 2.0]))
    log = twosome.update_value(agent, rollout, SMALL, random)
    assert log["value_loss"] == pytest.approx(0.5 * 0.5 * (0.8 ** 2 + 1.5 ** 2) / 2)  # 0.2, 0.5
    assert agent.critic.bias.grad.item() == pytest.approx(0.5 * 0.5 * -2 * 1.5 / 2)
    # The errors 1 and 1.6 have the variance 0.18, the returns 0.5.
    assert log["explained_variance"] == pytest.approx(1 - 0.18 / 0.5, abs=1e-5)


@pytest.mark.parametrize("whole_states", [False, True])
def test_minibatches_are_all_decisions_once_an_epoch(whole_states):
    """Otherwise some decisions would be learned from twice and others never; or whole states would
    not be whole, and cost as many passes, or always come in the same company."""
    args = SimpleNamespace(epochs=3, minibatches=4, whole_states=whole_states)
    states = [i % 7 for i in range(42)]  # seven states, six decisions in each
    batches = list(twosome.minibatches(states, args, random.Random(0)))
    assert sorted(map(len, batches[:4])) == [10, 10, 11, 11]
    epochs = [sum(batches[i:i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(42)) for epoch in epochs)
    different = [sum(len({states[i] for i in batch}) for batch in batches[i:i + 4])
                 for i in (0, 4, 8)]
    assert all(7 <= n <= 10 if whole_states else n > 15 for n in different)  # 10: at each cut one
    orders = [tuple(dict.fromkeys(states[i] for i in epoch)) for epoch in epochs]
    assert len(set(orders)) == 3


@pytest.mark.parametrize("dtype, max_prompts", [("float32", 4), ("bfloat16", 1)])
def test_first_ratio_of_an_update_is_one(dtype, max_prompts):
    """Otherwise old and new policy would be computed in different ways, and PPO clip before it has
    learned anything; or bfloat16 would swallow small steps. (How it rounds depends on the other
    states of a tree, so there each state has its own.)"""
    agent = Agent(*twosome.load_lm("pocket_lm", "cpu", dtype), max_prompts=max_prompts)
    move_lora(agent)
    assert agent.model.dtype == getattr(torch, dtype)
    assert {p.dtype for p in twosome.trained_parameters(agent).values()} == {torch.float32}
    rollout = a_rollout(agent)
    policies = agent.remembered_log_policy(rollout.states)
    now = torch.stack([policy[i] for policy, i in zip(policies, rollout.chosen)])
    assert torch.equal(now, rollout.log_prob)
    gradients(agent, rollout)
    assert agent.log["approx_kl"] < 1e-6 and agent.log["clip_fraction"] == 0
    entropy = torch.stack([-(p.exp() * p).sum() for p in policies]).mean().item()
    assert agent.log["entropy"] == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("family", ["pocket_lm", *FAMILIES])
def test_updates_move_exactly_lora_and_critic(family):
    """Otherwise the LM would forget what it has read, actor and critic would disturb each other, or
    LoRA would find nothing to adapt in some architecture."""
    agent = an_agent(family)
    rollout = a_rollout(agent, dataclasses.replace(SMALL, rollout_steps=6))
    names = {name for name, _ in agent.named_parameters()}
    args = rollout, dataclasses.replace(SMALL, epochs=2, rehearsal_coef=1.0), random.Random(0)
    for update, part in ((twosome.update_policy, "lora_"), (twosome.update_value, "critic.")):
        assert moved(agent, update, *args) == {  # Mamba's kernel reads dt_proj past any LoRA
            name for name in names if part in name and "dt_proj" not in name}


def test_gradient_is_the_policy_gradient():
    """Otherwise learning would run backwards, or give one decision's credit to another; or depend
    on how many states go through the LM at once, which a graphics card's memory decides."""
    agent, (state, other) = an_agent(), STATES[:2]
    decisions = [(state, 0), (other, 1), (state, 1), (other, 0), (state, 3)]
    advantage = torch.tensor([1.0, -2.0, -1.0, 1.0, 1.0])
    log_p = torch.stack([agent.log_policy([s])[0][a] for s, a in decisions])
    loss = -(log_p * advantage / (advantage.std() + 0.5)).mean()
    expected = torch.autograd.grad(loss, [p for p in agent.model.parameters() if p.requires_grad])
    rollout = SimpleNamespace(
        states=[s for s, _ in decisions], chosen=torch.tensor([a for _, a in decisions]),
        log_prob=log_p.detach(), advantage=advantage + 7)  # their mean, 7, plays no part
    for agent.max_prompts in (1, 2):
        got = gradients(agent, rollout, advantage_eps=0.5)
        assert equal(got, expected, 1e-5) and got[0].abs().max() > 1e-3


def test_update_stops_when_the_policy_has_moved_far(monkeypatch):
    """Otherwise one rollout could carry the policy to where its own data say nothing any more."""
    agent, steps, args = an_agent(), [], dataclasses.replace(SMALL, epochs=4)
    monkeypatch.setattr(agent.optimizers["policy"], "step", lambda: steps.append(1))
    rollout, ask = a_rollout(agent), agent.log_policy
    far = lambda states: [p - 0.5 * (len(steps) == 2) for p in ask(states)]  # as if after two steps
    monkeypatch.setattr(agent, "log_policy", far)
    twosome.update_policy(agent, rollout, dataclasses.replace(args, target_kl=0.02), random)
    assert len(steps) == 2
    twosome.update_policy(agent, rollout, args, random)
    assert len(steps) == 6


def test_nothing_earned_is_no_reason_to_move():
    """Otherwise the critic's errors would pass for advantages, also those of a thousandth that
    remain after one chance success, and wear down the prior that is to lead to a reward; or an LLM
    would be asked anew in each of the many rollouts before a first success."""
    agent, args = an_agent(), Args("virtualhome", "entertainment", n_envs=2, rollout_steps=6)
    asked, ask, earned = [], twosome.score, iter([0.0] * 51 + [1.0])
    act = lambda *_: (next(earned), 0.5, False, False)
    with patch.object(Episode, "act", act), patch.object(
            twosome, "score", lambda model, states: asked.extend(map(str, states))
            or ask(model, states)):
        rollout = a_rollout(agent, args)
    assert rollout.env_steps == 52 and len(asked) == len(set(asked))
    other, rewarded = rollout.returns.view(6, 2).T  # the latest six decisions of each
    assert not other.any() and torch.allclose(rewarded, 0.475 ** torch.arange(5.0, -1, -1))
    with patch.object(Episode, "act", lambda *_: (0.0, 0.5, False, False)):
        rollout = a_rollout(agent, args)
    assert rollout.env_steps == 12_000 and not rollout.returns.any()
    rollout.advantage = torch.randn(len(rollout.states)) * 0.001
    small, full = (torch.cat([g.flatten() for g in gradients(agent, rollout, advantage_eps=eps)])
                   for eps in (1.0, 1e-8))
    std = rollout.advantage.std().item()  # about 0.001
    assert (small.norm() / full.norm()).item() == pytest.approx(std / (std + 1), rel=1e-3)
    agent.critic[-1].bias.data.fill_(1.0)  # also of a critic that has learned to expect something
    with patch.object(Episode, "act", lambda *_: (0.0, 0.5, False, False)):
        playing = [twosome.make_episode(args) for _ in range(2)]
        ((rollout, log),) = twosome.practise(agent, playing, args, random.Random(0), 1)
    assert rollout.advantage.any() and log == {}


@pytest.mark.parametrize("env_class, task", TASKS)
def test_optimum_is_reached_by_offered_actions(env_class, task):
    """Otherwise the best policy could not be learned, the README's tables would mean something
    else, or GAE (here with lambda 1 and a critic that says 0) discount unlike the returns."""
    args = Args("overcooked" if env_class is OvercookedText else "virtualhome", task)
    for model, place in (("pocket_lm", 0), ("./pocket_lm/", 0), ("another", 1)):  # own numbers
        own = Args(args.env, task, model=model)
        assert own.steps == twosome.TASK_STEPS.get(task, (5_120, 3_840))[place]
        assert own.ent_coef == (0.01 if place and task == "tomato-lettuce-salad" else 0)
        assert own.n_envs == (4 if place and task != "entertainment" else 8)
        short = place and task not in ("tomato-lettuce-salad", "entertainment")
        assert (own.policy_lr, own.adam_eps, own.whole_states) == (
            (1.5e-3, 1e-6, True) if short else (2e-3, 1e-5, False))
        assert own.rehearsal_coef == (0.1 if place else 0)
    episode = twosome.make_episode(args)
    outcome = [episode.act(list(episode.info["actions"]).index(action)) for action in PLANS[task]]
    reward, discount, done, _ = (torch.tensor(x, dtype=torch.float32)[:, None]
                                 for x in zip(*outcome))
    advantage = twosome.gae(reward, discount, 0 * reward, 0 * reward, done, 1.0)
    assert done.flatten().tolist() == [0] * (len(done) - 1) + [1] and episode.info["success"]
    assert episode.ret == pytest.approx(env_class.OPTIMUM[task], abs=5e-6)
    assert advantage[0].item() == pytest.approx(env_class.OPTIMUM[task], abs=1e-5)
    # --gamma counts inside a macro-action (here of two steps) as it does after it.
    assert twosome.make_episode(Args(gamma=0.5)).act(0)[:2] == pytest.approx((-0.0015, 0.25))


@pytest.mark.parametrize("bootstrap, future", [(True, 1.0), (False, 0.0)])
def test_time_limit(bootstrap, future, monkeypatch):
    """Otherwise the critic would learn that states lose their worth when the clock, which is no
    part of the prompt, runs out; or an episode would flow back into the one before it."""
    agent = an_agent()  # it always takes the first action: it walks from room to room
    agent.remembered_log_policy = lambda states: [
        torch.tensor([0.0] + [-torch.inf] * (len(actions) - 1)) for _, actions in states]
    torch.nn.init.zeros_(agent.critic[-1].weight), torch.nn.init.ones_(agent.critic[-1].bias)
    act = Episode.act  # it earns next to nothing; for nothing at all a rollout would play on
    monkeypatch.setattr(Episode, "act", lambda *x: (1e-9, *act(*x)[1:]))
    rollout = a_rollout(agent, Args("virtualhome", "entertainment", n_envs=1, rollout_steps=51,
                                    bootstrap_time_limit=bootstrap))
    delta = 0.95 * future - 1
    assert rollout.advantage[49].item() == pytest.approx(delta)  # the 50th decision is the last
    assert rollout.advantage[48].item() == pytest.approx(0.95 - 1 + 0.95 * 0.95 * delta)
    assert rollout.states[50] == rollout.states[0]
    assert torch.equal(rollout.returns, rollout.advantage + rollout.value)


def test_rates_fall_to_zero(monkeypatch):
    """Otherwise the policy would not settle at the end, or a resumed run begin with large steps."""
    agent = SimpleNamespace(optimizers={name: SimpleNamespace(param_groups=[{}])
                                        for name in ("policy", "value")})
    agent.learn = lambda *_: [x.param_groups[0]["lr"] for x in agent.optimizers.values()]
    monkeypatch.setattr(twosome, "collect", lambda *_: SimpleNamespace(reward=torch.ones(2)))
    args = SimpleNamespace(policy_lr=4.0, value_lr=8.0)
    rates = [rate for done in (0, 3) for _, rate in twosome.practise(agent, [], args, 0, 4, done)]
    assert rates == [[4, 8], [3, 6], [2, 4], [1, 2], [1, 2]]


def test_the_algorithm_stands_alone():
    """Otherwise who reads or copies the first half of the file would not have the algorithm: it
    must run by itself, by the plain definition, and learn what the whole program learns."""
    text, line, _ = (ROOT / "twosome.py").read_text().partition("# === Here the paper")
    alone = {"__name__": "alone"}
    exec(compile(text, "twosome.py, the algorithm", "exec"), alone)
    torch.manual_seed(1)
    knobs = SimpleNamespace(
        rollout_steps=8, gae_lambda=0.95, bootstrap_time_limit=True, advantage_eps=1.0,
        policy_lr=2e-3, value_lr=1e-3, epochs=2, minibatches=2, clip_coef=0.2, ent_coef=0.0,
        rehearsal_coef=0.0, vf_coef=0.5, target_kl=0.02, max_grad_norm=0.5, whole_states=False)
    agent = alone["Agent"](AutoModelForCausalLM.from_pretrained(ROOT / "pocket_lm"),
                           AutoTokenizer.from_pretrained(ROOT / "pocket_lm"))
    playing = [alone["Episode"](OvercookedText("tomato-salad"), 0.99) for _ in range(3)]
    logs = [log for _, log in alone["practise"](agent, playing, knobs, random.Random(1), 3)]

    twosome.main(["--task", "tomato-salad", "--n-envs", "3", "--rollout-steps", "8", "--steps",
                  "72", "--epochs", "2", "--out", "run", "--device", "cpu"])
    for log, row in zip(logs, metrics("run"), strict=True):
        for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction",
                     "explained_variance"):
            assert log[name] == pytest.approx(float(row[name]), abs=1e-4), name
    assert logs[0]["approx_kl"] > 1e-6 and len({log["entropy"] for log in logs}) == 3  # it learns

    nodes = list(ast.walk(ast.parse(text)))  # and it uses no name that is defined below it
    of = lambda *kinds: [node for node in nodes if isinstance(node, kinds)]
    known = {*dir(builtins), *(node.id for node in of(ast.Name) if type(node.ctx) is not ast.Load),
             *(node.arg for node in of(ast.arg)),
             *(node.name for node in of(ast.FunctionDef, ast.ClassDef)),
             *((alias.asname or alias.name).split(".")[0] for alias in of(ast.alias))}
    assert line and not {node.id for node in of(ast.Name)} - known


# === 5. The same numbers, faster ==================================================================

def random_rows(prompt_lengths, n_actions):  # encoded prompts with actions of 1 to 6 tokens
    ids = lambda n: random.choices(range(2, 400), k=n)
    return [(ids(n), [ids(random.randint(1, 6)) for _ in range(k)])
            for n, k in zip(prompt_lengths, n_actions)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_plain_or_is_not_used(family, capsys):
    """Otherwise the fast way computes something else than P(action | prompt): values and LoRA's
    gradients must agree; LMs whose attention does not take our mask go row by row."""
    agent = an_agent(family)
    lora = [p for p in agent.model.parameters() if p.requires_grad]
    encoded = random_rows((30, 17, 8, 20, 9, 3), (5, 2, 9, 1, 4, 3))
    encoded[1][0][:12] = encoded[0][0][:12]  # beginnings in common, of prompts and of actions
    encoded[2][1][3][:1] = encoded[2][1][5][:1] = encoded[2][1][0][:1]
    plain = twosome.plain_log_probs(agent.model, encoded)
    scored = twosome.score(agent.model, encoded)
    assert [len(p) for p in scored] == [5, 2, 9, 1, 4, 3] and equal(scored, plain)
    grad = functools.partial(torch.autograd.grad, inputs=lora, allow_unused=True)
    a, b = ([g for g in grad(torch.cat(x).exp().sum().log()) if g is not None]
            for x in (scored, plain))
    assert equal(a, b) and any(g.abs().max() > 0.01 for g in a)
    assert ("cannot be packed" in capsys.readouterr().err) == (family in UNPACKABLE)


@pytest.mark.parametrize("family", PACKABLE)
def test_what_lies_below_lora_is_computed_once(family):
    """Otherwise an LM of more than ten blocks would be trained in the wrong ones; or what its
    frozen blocks made of one state would be taken for another's, in values or in gradients."""
    agent, passes = an_agent(family, num_hidden_layers=12), []
    blocks = next(x for x in agent.model.modules() if isinstance(x, torch.nn.ModuleList))
    assert ["lora_" in str(block) for block in blocks] == [False] * 2 + [True] * 10
    a, b, c, d = random_rows((30, 17, 8, 20), (5, 2, 9, 1))
    b[0][:12] = a[0][:12]  # a beginning in common
    lora = [p for p in agent.model.parameters() if p.requires_grad]
    grad = functools.partial(torch.autograd.grad, inputs=lora, allow_unused=True)
    twosome.score(agent.model, [a, b, c, d])  # checked, and all remembered
    next(blocks[0].children()).register_forward_hook(lambda *_: passes.append(1))
    for states in ([a, c], [d, b, a], [b]):
        move_lora(agent)
        plain, scored = (f(agent.model, states) for f in (
            twosome.plain_log_probs, twosome.score))
        assert equal(scored, plain)
        assert equal(*([g for g in grad(torch.cat(x).exp().sum().log()) if g is not None]
                       for x in (scored, plain)))
    read = [twosome.last_hidden(agent.model, *state) for state in (a, b, c, d)]
    assert len(passes) == 3  # of the plain way alone
    expected = [agent.model.get_decoder()(input_ids=torch.tensor([prompt])).last_hidden_state[0]
                for prompt, _ in (a, b, c, d)]
    assert equal(read, expected, 1e-5)


def test_verdict_is_remembered_and_checked_again_on_longer_rows(monkeypatch):
    """Otherwise each pass would cost two; a sliding window would go unnoticed while prompts are
    shorter than it, or behind 16-bit rounding; or a full memory would pass for an LM like that."""
    model, calls, plain = tiny("mistral, window"), [], twosome.plain_log_probs
    monkeypatch.setattr(twosome, "plain_log_probs", lambda *x: calls.append(1) or plain(*x))
    many, long = random_rows((4,), (30,)), random_rows((50,), (2,))
    few = [(many[0][0], many[0][1][:2])]
    for rows, packs, checks in ((many, True, True), (few, True, False), (long, False, True),
                                (few, False, False)):
        calls.clear()
        assert twosome.may_pack(model, rows) == packs and bool(calls) == checks
    assert twosome.may_pack(tiny("llama").bfloat16(), long)
    assert not twosome.may_pack(tiny("mistral, window").bfloat16(), long)
    full = patch.object(twosome, "packed_log_probs", side_effect=torch.OutOfMemoryError)
    with full, pytest.raises(torch.OutOfMemoryError):
        twosome.may_pack(tiny("llama"), few)


def test_two_processes_make_the_updates_of_one():
    """Otherwise several GPUs would train something else than one: all processes play the same
    episodes, and divide the passes through the LM."""
    run = ["--steps", "72", "--rollout-steps", "6", "--device", "cpu", "--rehearsal-coef", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         str(ROOT / "twosome.py"), *run, "--n-envs", "2", "--out", "two"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with patch.object(twosome, "EPISODES_PER_ROW", EPISODES_PER_ROW):
        twosome.main([*run, "--n-envs", "4", "--out", "one"])
    one, two = (checkpoint(name)["weights"] for name in ("one", "two"))
    assert equal(list(one.values()), list(two.values()), 1e-5)
    one, two = ([[row[x] for x in ("env_steps", "success", "return", "length")]
                 for row in metrics(name)] for name in ("one", "two"))
    assert one == two and len(one) == 3
    assert done.stdout.count("What was learned") == 1  # only the first process speaks


# === 6. Loading LMs ===============================================================================

def save_lm(folder: str, change=None, style="byte-level", family="llama", **options):
    """A small model in a folder. change: what is done to its weights."""
    tiny(family, **options).save_pretrained(folder)
    make_tokenizer(style).save_pretrained(folder)
    if change:
        tensors = load_file(f"{folder}/model.safetensors")
        change(tensors)
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"
BAD_MODELS = {  # what is wrong -> (how to make it, a word of the message)
    "a weight missing": (lambda lm: save_lm(lm, lambda tensors: tensors.pop(NORM)), NORM),
    "a weight not a number": (lambda lm: save_lm(lm, lambda x: x[NORM].fill_(math.nan)), "finite"),
    "slow tokenizer": (lambda lm: (tiny("llama").save_pretrained(lm), Path(
        lm, "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')),
        "character offsets"),
    "encoder": (lambda lm: save_lm(lm, family="bert"), "no causal LM"),
    "tokens across words": (lambda lm: save_lm(lm, style="across words 20"), "has a token across"),
    "short context": (lambda lm: save_lm(lm, max_position_embeddings=16), "at most 16")}


def test_rehearsal_pulls_towards_the_untrained_lm():
    """Otherwise it would pull elsewhere, and the language be lost unnoticed; or the texts would be
    those of an agent that has learned, and a resumed run rehearse others."""
    agent, untrained = an_agent(), an_agent()
    for name, p in untrained.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    for x in agent, untrained:
        torch.manual_seed(3)
        twosome.rehearse(x, 1.0, random.Random(0))
    own = [*untrained.texts]
    assert [*agent.texts] == own and len(own) == 32 and {*map(len, own)} == {40}
    ids = torch.tensor(own[7:8])
    with torch.no_grad():
        p_0 = untrained.model(input_ids=ids).logits[0].softmax(-1)
    log_p = agent.model(input_ids=ids).logits[0].log_softmax(-1)
    kl = (p_0 * (p_0.log() - log_p)).sum(-1).mean()
    expected = torch.autograd.grad(0.5 * kl, [
        p for p in agent.model.parameters() if p.requires_grad])
    agent.texts, rollout = {own[7]: None}, a_rollout(agent)
    rollout.advantage = 0 * rollout.advantage  # nothing else pulls
    got = gradients(agent, rollout, rehearsal_coef=0.5)
    assert equal(got, expected, 1e-5) and got[0].abs().max() > 1e-4


@pytest.mark.parametrize("make, hint", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model_folder(capsys, make, hint):
    """Otherwise an LM that is not whole, cannot be asked for probabilities, or sees the words that
    it is to predict, would play on and look merely stupid; or leave a folder in the way."""
    make("lm")
    capsys.readouterr()
    assert hint in fails(capsys, "--model", "lm", "--out", "run")
    assert os.listdir() == ["lm"]


BOMB = b"cos\nmkdir\n(S'exploded'\ntR."  # a pickle; who loads it makes a folder


@pytest.mark.parametrize("mode", ["--model", "--evaluate", "--resume"])
def test_no_pickle_is_ever_loaded(finished, capsys, mode):
    """Otherwise a model or a run from a stranger could run a stranger's program."""
    shutil.copytree(ROOT / "pocket_lm" if mode == "--model" else finished, "folder")
    gone, there = (("model.safetensors", "pytorch_model.bin") if mode == "--model" else
                   ("summary.json", "checkpoint.pt"))
    Path("folder", gone).unlink()
    Path("folder", there).write_bytes(BOMB)
    fails(capsys, mode, "folder")
    assert not Path("exploded").exists()
    pickle.loads(BOMB)  # it is a real one
    assert Path("exploded").exists()


def test_no_code_from_a_model_folder_is_ever_run(capsys):
    """Otherwise a model from a stranger could run a stranger's program: its config names Python
    code that comes with it. Where the library knows the architecture, it is used without."""
    save_lm("lm")
    Path("lm/evil.py").write_text("open('exploded', 'w')\n")
    edit("lm/tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit("lm/config.json", auto_map=evil)
    assert type(twosome.load_lm("lm", "cpu", "float32")[0]).__name__ == "LlamaForCausalLM"
    edit("lm/config.json", model_type="evil")
    assert "lm" in fails(capsys, "--model", "lm", "--out", "run") and os.listdir() == ["lm"]
    exec(Path("lm/evil.py").read_text())
    assert Path("exploded").exists()  # it would have left this trace


# === 7. Runs ======================================================================================

@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of four updates."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    twosome.main([*TINY_RUN, "--out", str(run)])
    return run


def metrics(run) -> list[dict]:
    """The log, but for what a clock says."""
    with open(Path(run) / "metrics.csv", newline="") as file:
        return [{name: x for name, x in row.items() if name != "seconds"}
                for row in csv.DictReader(file)]


checkpoint = lambda run: torch.load(Path(run) / "checkpoint.pt", weights_only=True)
summary = lambda run: json.loads((Path(run) / "summary.json").read_text())


def edit(path, **changes):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def load(run):
    args = Args(**json.loads((Path(run) / "config.json").read_text()))
    agent = baselines.make_agent(args)
    twosome.load_checkpoint(Path(run), agent)
    return args, agent


def same_run(a, b) -> bool:
    adapters = [(Path(run) / "adapter/adapter_model.safetensors").read_bytes() for run in (a, b)]
    first, second = (checkpoint(run)["weights"] for run in (a, b))
    return (metrics(a) == metrics(b) and summary(a)["after"] == summary(b)["after"]
            and first.keys() == second.keys() and adapters[0] == adapters[1]
            and all(torch.equal(first[name], second[name]) for name in first))


def test_same_seed_same_run(finished):
    """Otherwise no result could be repeated; and plots, comparisons and peft need what is there."""
    twosome.main([*TINY_RUN, "--out", "again"])
    assert same_run("again", finished) and len(metrics(finished)) == 4
    twosome.main([*TINY_RUN, "--out", "other", "--seed", "2"])
    assert metrics("other") != metrics(finished)
    assert all(math.isfinite(float(x)) for row in metrics(finished) for x in row.values())
    assert summary(finished)["task"] == "tomato-salad" and summary(finished)["env_steps"] == 96
    trained = checkpoint(finished)["weights"]  # the adapter in peft's format is the trained one
    stored = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert stored and all(torch.equal(x, trained["model." + name.replace(
        ".weight", ".default.weight")]) for name, x in stored.items())


def test_the_log_measures_the_policy_that_plays():
    """Otherwise the first rows would flatter, as they do where the episodes that ended in a rollout
    are counted: the short ones end first, and these are successes."""
    agent, rows = baselines.RandomAgent(), []
    assert exact.exact(agent, Args()) == pytest.approx((0.442, -0.096), abs=5e-4)
    agent.value, agent.learn = lambda prompts: torch.zeros(len(prompts)), lambda *_: {}
    run = ["--n-envs", "2", "--rollout-steps", "12", "--steps", "24"]
    with patch.object(twosome, "EPISODES_PER_ROW", EPISODES_PER_ROW):
        for seed in map(str, range(40)):
            twosome.main([*run, "--seed", seed, "--out", seed], make_agent=lambda args: agent)
            rows.append(float(metrics(seed)[0]["success"]))
    error = (0.442 * (1 - 0.442) / (40 * EPISODES_PER_ROW)) ** 0.5
    assert 3 * error < 0.05 and abs(sum(rows) / 40 - 0.442) < 3 * error
    assert len(set(rows)) > 5  # other episodes with every seed


def test_a_log_without_success_trains_the_same(finished):
    """Otherwise who leaves the test games out to save time would get another agent."""
    twosome.main([*TINY_RUN, "--log-success", "no", "--out", "untested"])
    assert len(metrics("untested")) == len(metrics(finished))
    for row, tested in zip(metrics("untested"), metrics(finished)):
        empty = {name for name, x in row.items() if x == ""}
        assert empty == {"success", "return", "length"}
        assert all(float(x) == pytest.approx(float(tested[name]), rel=1e-3, abs=1e-5)
                   for name, x in row.items() if name not in empty)
    with pytest.raises(ValueError, match="no row with a success"):
        plot.read_runs([Path("untested")])


ctrl_c = lambda *_: os.kill(os.getpid(), signal.SIGINT)
half_a_file = lambda _, file: (file.write(b"half a file"), ctrl_c())
# Within torch.save, which makes an error of its own of it.
half_saved = lambda content, _: torch.serialization.save(content, SimpleNamespace(
    write=lambda part, count=itertools.count(): ctrl_c() if next(count) == 5 else len(part)))
broken_lm = lambda agent, *_: agent.model.get_output_embeddings().register_forward_hook(
    lambda *x: x[-1] * math.nan)
broken_weight = lambda agent: agent.critic[0].weight.data[0].fill_(math.inf)


def full_disk(*_, limit=20_000):  # from now on no file may become larger than this
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("function, call, happens, rows, says", [
    (twosome.collect, 1, ctrl_c, 0, "1 of 4"), (twosome.evaluate, 3, ctrl_c, 1, "2 of 4"),
    (twosome.update_policy, 3, ctrl_c, 2, "3 of 4"), (torch.save, 2, half_a_file, 2, "2 of 4"),
    (torch.save, 2, half_saved, 2, "2 of 4"),
    (twosome.evaluate, 6, ctrl_c, 4, ""), (torch.save, 2, full_disk, 2, "2 of 4"),
    (twosome.collect, 3, broken_lm, 2, "finite"),
    # The loss was finite, a weight is not after it. Each update asks for these twice.
    (twosome.trained_parameters, 5, broken_weight, 2, "not finite")])
def test_resumed_run_equals_uninterrupted_run(finished, capsys, function, call, happens, rows,
                                              says):
    """Otherwise an interruption, anywhere, or a full disk would change the result; or training
    would go on with NaN and overwrite its last good checkpoint: hours would be lost."""
    count = itertools.count(1)
    stopped = lambda *args: (next(count) == call and happens(*args), function(*args))[1]
    owner = torch if function is torch.save else twosome
    with patch.object(owner, function.__name__, stopped), pytest.raises(SystemExit) as end:
        try:
            twosome.main([*TINY_RUN, "--out", "run"])
        finally:
            full_disk(limit=-1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == (130 if happens in (ctrl_c, half_a_file, half_saved) else 1)
    assert line.startswith("twosome.py: ") and says in line and ("--resume" in line or rows == 4)
    assert len(metrics("run") if rows else list(Path("run").glob("*.csv"))) == rows
    # A spreadsheet saves the log in its own way; the checkpoint has the true one.
    Path("run/metrics.csv").write_bytes(b"\xff\xfe\0")
    twosome.main(["--resume", "run"])
    assert same_run("run", finished)


class Unlucky(Episode):
    """Nothing is ever earned."""
    def act(self, chosen):
        return 0.0, *super().act(chosen)[1:]


def test_nothing_is_ever_earned(capsys):
    """Otherwise a hopeless run would never end, or leave a folder that cannot be evaluated."""
    twosome.main(["--env", "virtualhome", *TINY_RUN, "--rollout-steps", "2", "--out", "run"],
                 plays=Unlucky)
    assert "nothing was earned in 8,000 decisions: stopped" in capsys.readouterr().out
    (row,) = metrics("run")
    assert row["env_steps"] == "8000" and row["policy_loss"] == row["value_loss"] == ""
    assert json.loads(Path("run/summary.json").read_text())["env_steps"] == 8000
    assert all((p == 0).all() for name, p in checkpoint("run")["weights"].items() if "_B" in name)
    twosome.main(["--resume", "run"], plays=Unlucky)  # nor go on where it had stopped
    assert metrics("run") == [row]
    twosome.main(["--evaluate", "run"], plays=Unlucky)


def attempt(operation=None, seconds=None) -> int:
    """Start or resume the run in a process of its own, kill that, and return its exit status."""
    begun, pid = os.path.exists("run/config.json"), os.fork()
    if pid == 0:
        sys.addaudithook(lambda event, details: operation and operation == f"{event} {details[0]}"
                         and os.kill(os.getpid(), signal.SIGKILL))
        try:
            twosome.main(["--resume", "run"] if begun else [*TINY_RUN, "--out", "run"])
            os._exit(0)
        finally:
            os._exit(1)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_run_equals_uninterrupted_run(finished):
    """Otherwise a power cut, or a full memory, would change the result or leave a folder with which
    one can neither go on nor begin again: here a kill comes at any moment, five times."""
    assert attempt("open run/config.tmp") and os.listdir("run") == []  # after mkdir
    started = time.time()
    assert attempt("os.rename run/checkpoint.tmp") and not Path("run/checkpoint.pt").exists()
    took, kills = time.time() - started, 0
    while kills < 2 and not os.path.exists("run/summary.json"):
        kills += bool(attempt(seconds=took * random.uniform(0.5, 2)))
    if not os.path.exists("run/summary.json"):  # ready, but before it says so
        assert attempt("os.rename run/summary.tmp") and not attempt()
    assert same_run("run", finished)


def test_evaluate_loads_what_was_trained(finished, capsys):
    """Otherwise --evaluate would show another agent, or not the task that is asked for."""
    args, agent = load(finished)
    assert twosome.evaluate(agent, args, 4, "evaluation") == summary(finished)["after"]
    other = dataclasses.replace(args, task="tomato-lettuce-salad")
    expected = twosome.evaluate(agent, other, 4, "another")
    twosome.main(["--evaluate", str(finished), "--task", "tomato-lettuce-salad"])
    assert f"tomato-lettuce-salad: {twosome.describe(expected)}" in capsys.readouterr().out


def test_no_steps_is_the_untrained_llm():
    """Otherwise there would be nothing to compare with, or a run would overwrite an older one."""
    Path("runs/food-preparation-word-seed1/old").mkdir(parents=True)
    twosome.main(["--steps", "0", "--env", "virtualhome"])
    result = summary("runs/food-preparation-word-seed1-2")
    agent = Agent(*copy.deepcopy(pocket()))
    untrained = twosome.evaluate(agent, Args(env="virtualhome"), 4, "evaluation")
    assert (result["before"], result["after"], result["env_steps"]) == (untrained, None, 0)
    shutil.copytree(ROOT / "pocket_lm", "another")  # its run says so, and is not taken for that
    twosome.main(["--steps", "0", "--env", "virtualhome", "--model", "another"])
    assert Path("runs/food-preparation-word-seed1-another/summary.json").exists()


# === 8. The command line, and mistakes ============================================================

def fails(capsys, *argv, main=twosome.main) -> str:
    """Return the one line that a mistake ends with; bars, a note or flags may be above it."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv)])
    *above, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("twosome.py: ") and end.value.code in (1, 2)
    assert end.value.code == 2 or all("%|" in x or x[:5] in ("", "note:") for x in above)
    return line


@pytest.mark.parametrize("argv, hint", [
    ("--setps 5", "--setps"), ("--env kitchen", "virtualhome"), ("--steps many", "--steps"),
    ("--env virtualhome --task tomato-salad", "food-preparation"), ("--steps -1", "negative"),
    ("--gamma 2", "--gamma"), ("--policy-lr nan", "number"), ("--device cuda", "CUDA"),
    ("--resume a --evaluate b", "--resume"), ("--evaluate nowhere", "nowhere"),
    ("--model nobody/nothing", "nobody/nothing"), ("--out /dev/null", "exists already")])
def test_mistakes_get_one_line(capsys, monkeypatch, argv, hint):
    """Otherwise a newcomer's typing error would end in a page of traceback, or in a run of
    something else than was meant; or the corrected command would find a folder in its way."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hint in fails(capsys, *argv.split())
    assert not os.listdir()


def test_mistakes_in_python(capsys, monkeypatch):
    """Otherwise who calls main() from a notebook would get something else than at the command line;
    or a programmer who asks for it, by -X dev, would not see where an error comes from."""
    line = fails(capsys, "--task", "soup")
    assert line.startswith("twosome.py: --env overcooked has no --task soup here; overcooked has")
    broken = functools.partial(twosome.main, make_agent=lambda args: {}["no"])
    assert "KeyError 'no'" in fails(capsys, main=broken)
    flags = SimpleNamespace(dev_mode=True)
    monkeypatch.setattr(twosome, "sys", SimpleNamespace(**vars(sys) | {"flags": flags}))
    with pytest.raises(KeyError):
        broken([])


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", ["config.json", "checkpoint.pt", "another model"])
def test_damaged_run_folder(finished, capsys, damage, mode):
    """Otherwise half an agent would go on, a traceback be shown, or what is still whole be lost."""
    shutil.copytree(finished, "run")
    Path("run/summary.json").unlink()  # as if it had been interrupted
    if damage == "another model":
        save_lm("lm")
        edit("run/config.json", model=str(Path("lm").resolve()))
    else:
        path = Path("run", damage)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    files = {path: path.read_bytes() for path in Path("run").rglob("*.*")}
    capsys.readouterr()
    fails(capsys, mode, "run")
    assert files == {path: path.read_bytes() for path in Path("run").rglob("*.*")}


def test_resume_keeps_its_flags(finished, capsys):
    """Otherwise a resumed run would be half one experiment and half another, or overwrite one."""
    shutil.copytree(finished, "run")
    twosome.main(["--resume", "run"])  # it is finished
    assert same_run("run", finished)
    capsys.readouterr()
    assert "keeps its flags" in fails(capsys, "--resume", "run", "--seed", 7)
    assert "exists already" in fails(capsys, "--out", "run")
    assert "overcooked has" in fails(capsys, "--evaluate", "run", "--task", "entertainment")
    shutil.copytree(ROOT / "pocket_lm", "folder")  # it has a config.json, too
    names = sorted(os.listdir("folder"))
    assert fails(capsys, "--resume", "folder") and fails(capsys, "--evaluate", "folder")
    assert sorted(os.listdir("folder")) == names


# === The environments, and pocket_lm ==============================================================

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
def test_prompts_tell_everything_in_good_english(env_class, task):
    """Otherwise the words would lose something that the agent perceives, two actions would read the
    same and the LM could not choose between them, or it would read what nobody writes."""
    told = reachable(env_class, task)
    known = {"tomato-salad": 22, "tomato-lettuce-salad": 806, "entertainment": 213}
    assert len(told) == known.get(task, 19)
    assert all(len(texts) == 1 for texts in told.values())  # the same vector, the same words
    assert len({obs for ((obs, _),) in told.values()}) == len(told)
    for ((obs, actions),) in told.values():
        indices, phrases = zip(*actions)
        assert len(set(phrases)) == len(phrases) and list(indices) == sorted(indices)
        prompt = twosome.build_prompt(obs, env_class(task=task).goal)
        for text in (prompt, *phrases):
            assert text == " ".join(text.split())  # no double blanks, none at the ends
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(\w+) \1\b| [.,]|[.,]{2}",
                                 text)
        assert all(sentence[0].isupper() for sentence in prompt.split(". "))
        assert all(re.fullmatch(r"[a-z]+(,? [a-z]+)*", phrase) for phrase in phrases)


def check_overcooked(env, before, state, reward, k):  # each item in one place, one hand, and ...
    place, foods = state["place"], env.kitchen.foods
    assert place.keys() == {*foods, "bowl"} and set(state["chopped"]) <= set(foods)
    assert list(place.values()).count("hand") <= 1
    for item, where in place.items():
        counters = [*env.kitchen.boards, HOME[item], *([SERVING] if item == "bowl" else [])]
        assert where in ("hand", "bowl") or tuple(where) in counters
        assert where != "bowl" or item in state["chopped"]  # nothing raw, and no bowl, in the bowl
    on_counters = [tuple(where) for where in place.values() if not isinstance(where, str)]
    assert len(set(on_counters)) == len(on_counters)
    assert 1 <= k <= 13 and all(1 <= x <= 5 for x in state["agent"])
    # ... a reward that the rules of the kitchen allow.
    costs = sum(-0.001 * env.gamma ** i for i in range(k))
    event = round((reward - costs) / env.gamma ** (k - 1), 9)
    assert event in (0, 0.2, 1, -0.1) and (event == 1) == (tuple(place["bowl"]) == SERVING)
    assert event != 0.2 or len(state["chopped"]) == len(before["chopped"]) + 1


def check_virtualhome(env, before, state, reward, k):  # nothing close that is in another room
    home, task = state["home"], env._task
    assert home["agent"] in ROOMS and len(home["held"]) <= 2 and k == 1 and reward in (0, 1)
    carried = [*home["held"], *home["placed"]]
    assert len(set(carried)) == len(carried) and set(carried) <= set(task.things)
    for name in home["close"]:
        there = task.room if name in (*task.furniture, *home["placed"]) else task.home
        assert name not in home["held"] and home["agent"] == there
    assert len(set(home["close"])) == len(home["close"])
    assert not (home["facing"] and home["agent"] != task.room)


@pytest.mark.parametrize("env_class, task", TASKS)
def test_invariants_hold_in_3000_random_steps(env_class, task):
    """Otherwise a rare order of actions could lose a thing, double it or make up a reward; a wrong
    index, or a forgotten reset, could train on nonsense; and a saved game go on differently."""
    env, rng, running = env_class(task=task), random.Random(task), False
    check, limit = {OvercookedText: (check_overcooked, 200),
                    VirtualHomeText: (check_virtualhome, 50)}[env_class]
    with pytest.raises(ValueError):
        env_class(task="soup")
    for _ in range(3_000):
        if not running:
            with pytest.raises(RuntimeError):
                env.step(0)
            _, info = env.reset()
        before = env.get_state()
        if rng.random() < 0.02:
            with pytest.raises(ValueError):
                env.step(rng.choice([-1, env.n_actions, 10**20, 0.0, None, "0", [0]]))
            assert env.get_state() == before
        any_action = rng.random() < 0.3  # also what is not offered; in Overcooked everything is
        action = rng.choice(range(env.n_actions) if any_action else list(info["actions"]))
        obs, reward, terminated, truncated, info = env.step(action)
        state, k = env.get_state(), info["primitive_steps"]
        check(env, before, state, reward, k)
        assert state["steps"] == before["steps"] + k
        assert terminated == info["success"] == (reward > 0.5)
        assert truncated == (not terminated and state["steps"] >= limit)
        clocks = {"steps": 0, "over": 0, "running": 0}
        assert info["changed"] == (before | clocks != state | clocks)  # SayCan learns from it
        assert info["vector"].dtype.name == "float32" and 0 <= min(info["vector"])
        if rng.random() < 0.02:  # saved as JSON and restored: the same; and at the time limit no
            again = env_class(task=task)  # action is cut short
            assert again.set_state(json.loads(json.dumps(state)))[0] == obs
            assert again.get_state() == state
            again.set_state(before | {"steps": limit - 1})
            assert again.step(action)[1] == reward and again.get_state()["steps"] == limit - 1 + k
        running = not (terminated or truncated)


HOME_TEXT = "This home has a kitchen, a bathroom, a bedroom and a living room. You are in the "
GOLDEN = [  # (task, actions, rewards, text after the last action)
    # Serving the empty bowl and the raw tomato costs 0.1 each; full hands chop nothing.
    ("tomato-salad", [1, 3, 0, 3, 0, 2, 0, 1, 2, 4],
     [-0.005852, -0.100941, -0.006793, -0.100941, -0.006793, -0.004901, -0.001, -0.008648,
      -0.008648, -0.00297],
     "You are at the cutting board. The raw tomato is on the cutting board. You hold the empty "
     "bowl."),
    # Half a salad is refused and comes back raw; a chopped onion is no part of the recipe.
    ("tomato-lettuce-salad", [0, 4, 7, 0, 3, 6, 2, 5, 7, 2, 3, 4],
     [-0.00199, -0.004901, 0.19305, -0.001, -0.009562, -0.100941, -0.005852, -0.004901, -0.00297,
      -0.001, -0.008648, -0.008648],
     "You are at the first cutting board. The bowl with the chopped onion is on the first cutting "
     "board. The second cutting board is empty. Your hands are empty."),
    # Closing the door on nothing earns nothing, and what lies inside can be taken out again.
    ("food-preparation", [5, 8, 4, 6, 1, 4, 7, 5, 8, 9, 8, 7, 6, 0], [0] * 14,
     HOME_TEXT + "living room. You see nothing useful here. You hold the pancake."),
    # While seated no walk succeeds (8: to the kitchen); that one took a seat stays true.
    ("entertainment", [4, 9, 0, 8, 15, 16, 15, 1, 5, 16, 1], [0] * 11,
     HOME_TEXT + "kitchen. You see the milk. You hold the chips.")]


@pytest.mark.parametrize("task, actions, rewards, last_text", GOLDEN)
def test_golden_episode(task, actions, rewards, last_text):
    """Otherwise the game has changed, and results can no longer be compared with the paper's."""
    env = (OvercookedText if "salad" in task else VirtualHomeText)(task)
    results = env.reset() and [env.step(action) for action in actions]
    assert [reward for _, reward, *_ in results] == pytest.approx(rewards, abs=1e-6)
    assert results[-1][0] == last_text


def test_pocket_lm_has_not_read_the_answers():
    """Otherwise the default LM would be a cheat sheet, and learning by practice a show."""
    corpus = "\n".join(make_pocket_lm.write_corpus()).lower()  # a text is a line
    assert not [task for env, task in TASKS if env(task=task).goal.lower() in corpus]
    # No observation, so no pair with an action: a text with one has its first and last sentence.
    observations = {obs.lower() for pair in TASKS for told in reachable(*pair).values()
                    for obs, _ in told}
    first = tuple({obs.partition(". ")[0] for obs in observations})
    last = tuple({obs.rpartition(". ")[2] for obs in observations})
    suspects = "\n".join(text for text in corpus.splitlines() if any(f in text for f in first)
                         and any(s in text for s in last))
    assert len(observations) > 1000 and not [obs for obs in observations if obs in suspects]
    source = Path(make_pocket_lm.__file__).read_text()
    assert "import re\n" in source and not re.search(r"import.*(twosome|_text)", source)


def test_pocket_lm_splits_action_words():
    """Otherwise words and tokens would be the same, and the normalisations could not differ."""
    (_, tokenizer), agent = pocket(), an_agent()
    words = {word for pair in TASKS for told in reachable(*pair).values() for _, actions in told
             for _, phrase in actions for word in phrase.split()}
    split = [word for word in words if len(tokenizer.tokenize(" " + word)) > 1]
    assert len(split) > len(words) / 4
    policies = [agent.log_policy(STATES[:1])[0].exp() for agent.norm in ("word", "token", "none")]
    assert all((p - q).abs().max() > 0.01 for p, q in itertools.combinations(policies, 2))
    assert sum(f.stat().st_size for f in (ROOT / "pocket_lm").glob("*.*")) < 8e6


# === Experiments ==================================================================================

def baseline(method: str, **options):
    args = Args(**{"method": method} | baselines.OWN[method] | options)
    return baselines.make_agent(args), args, twosome.make_episode(args, baselines.PLAYS[method])


def test_ppo_sees_numbers_and_only_offered_actions():
    """Otherwise the baseline would be handicapped, or learn from actions that nobody offers."""
    agent, _, episode = baseline("ppo", env="virtualhome")
    (vector, offered), other = episode.state(), tuple(torch.rand(11).tolist())
    assert vector == tuple(episode.info["vector"]) and offered == tuple(episode.info["actions"])
    policies = agent.log_policy([(vector, (0, 3)), (other, (1, 2, 9))])
    logits = agent.model(torch.tensor([vector, other]))
    for policy, row, indices in zip(policies, logits, [[0, 3], [1, 2, 9]], strict=True):
        assert equal([policy], [row[indices] - row[indices].logsumexp(0)], 1e-6)
    first = agent.model[0].weight / 2**0.5  # orthogonal: (64, 11), its columns are
    assert equal([first.T @ first], [torch.eye(11)]) and len(agent.model) == 5


def test_saycan_is_sensible_times_possible():
    """Otherwise SayCan would be something else, its affordance a constant, or its LLM trained."""
    agent, args, episode = baseline("saycan", rollout_steps=200, epochs=30)
    with torch.no_grad():
        agent.critic[-1].bias.copy_(torch.tensor([0.0, 3.0, -3.0, 1.0, -1.0]))
    (prompt, vector), offered = episode.state()
    (says,) = agent.model.log_policy([(prompt, tuple(phrase for _, phrase in offered))])
    (logits,) = agent.affordance([(prompt, vector)], [offered])
    product = says.exp() * torch.sigmoid(logits)
    (policy,) = agent.log_policy([((prompt, vector), offered)])
    assert equal([policy.exp()], [product / product.sum()], 1e-5)
    assert (policy.exp() - says.exp()).abs().max() > 0.05
    rollout = twosome.collect(agent, [episode], args, random.Random(0))
    assert set(rollout.returns.tolist()) == {0.0, 1.0}  # what the agent learns from: did it work?
    # A toy in the same form: the first action works in the first state, the second in the other.
    seen = [(prompt, (x,) + vector[1:-1] + (1 - x,)) for x in (1.0, 0.0)]
    rollout.states = [(seen[i % 2], offered[:2]) for i in range(200)]
    rollout.chosen = torch.tensor([i // 2 % 2 for i in range(200)])
    rollout.returns = (rollout.chosen == torch.arange(200) % 2).float()
    names = moved(agent, lambda agent: agent.learn(rollout, args, random.Random(0)))
    assert names and all(name.startswith("critic.") for name in names)
    can = torch.stack(agent.affordance(seen, [offered[:2]] * 2)).sigmoid()
    assert equal([can], [torch.eye(2)], 0.2)


@pytest.mark.parametrize("method", ["ppo", "saycan"])
def test_baselines_run_resume_and_load(method, capsys):
    """Otherwise comparisons would break off, or not be repeatable."""
    run = ["--method", method, *TINY_RUN, "--rehearsal-coef", "0"]  # they rehearse nothing
    baselines.main([*run, "--out", "whole"])
    assert re.search(r"^  \d\.\d\d  [a-z ]+$", capsys.readouterr().out, re.M)  # an action in words
    collect, calls = twosome.collect, iter([None] * 3)
    with patch.object(twosome, "collect", lambda *x: next(calls) or collect(*x)):
        assert "4 of 4" in fails(capsys, *run, "--out", "cut", main=baselines.main)
    baselines.main(["--resume", "cut"])
    assert metrics("cut") == metrics("whole")
    args, agent = load("cut")
    assert twosome.evaluate(agent, args, 4, "evaluation", baselines.PLAYS[method]) == (
        summary("whole")["after"])
    capsys.readouterr()
    fails(capsys, "--evaluate", "cut", "--task", "tomato-lettuce-salad", main=baselines.main)


def test_watch_random_choice(capsys, monkeypatch):
    """Otherwise a pipe, a notebook or an old terminal would show something else, or wait."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delattr(signal, "SIGPIPE", raising=False)  # pytest keeps its own
    watch.main(["--method", "random", "--seed", "1"])
    text = capsys.readouterr().out
    for part in (f"\n{' decision 1 ':-^80}\n #  #  #  #  #  T  #\n[ ] .  .  .  @  .  #\n",
                 " Your hands\nare empty. To serve a salad of chopped tomato in a bowl, your next ",
                 " 0.20 ##           pick up the tomato\n"):
        assert part in text
    assert text.isascii() and text.replace("\n", "").isprintable()  # no control codes
    assert re.search(r"The agent (reached the goal|ran out of time) after \d+ primitive", text)


def test_watch_shows_before_and_after(finished, capsys, monkeypatch):
    """Otherwise one could not see what training has changed, or the episode would rush past."""
    asked = iter(["", "q"])  # at a terminal: Enter, then q
    monkeypatch.delattr(signal, "SIGPIPE", raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    monkeypatch.setenv("COLUMNS", "100")
    watch.main([str(finished), "--tokens"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and sum(" decision " in line for line in lines) == 2
    args, agent = load(finished)
    prompt, phrases = twosome.make_episode(args).state()
    (after,) = agent.log_policy([(prompt, phrases)])
    with agent.model.disable_adapter():
        (before,) = agent.log_policy([(prompt, phrases)])
    bars = [line for line in lines if line[:4] in ("  0.", "> 0.")][:len(phrases)]
    for line, p, q, phrase in zip(bars, before.exp(), after.exp(), phrases, strict=True):
        assert re.findall(r"\d\.\d\d", line) == [f"{p:.2f}", f"{q:.2f}"] and line.endswith(phrase)
    (log_probs,), (n_tokens,) = action_log_probs(agent.model, agent.tokenizer, [prompt], [phrases])
    sums = [line for line in lines if " sum " in line][1:2 * len(phrases):2]  # those of "after"
    for line, log_prob, n in zip(sums, log_probs, n_tokens, strict=True):
        assert f"sum {log_prob:.2f};  / {n} tokens" in line
    shutil.copytree(ROOT / "pocket_lm", "another")  # LM, so the critic's inputs are standardized
    watch.main(["--model", "another", "--pace", "0"])
    text = capsys.readouterr().out
    assert "probability" in text and "after training" not in text and "value" not in text


def test_reproduce_goes_on_where_it_stopped():
    """Otherwise hours of runs would be lost with one Ctrl-C."""
    plan = [job | {"run": str(Path(job["name"]).resolve())}
            for job in reproduce.jobs("quick", "") if job["label"] == "random"][:2]
    plan[0]["given"] |= {"method": "ppo", "steps": 600}
    runs, curves = (Path(name).resolve() for name in ("runs.csv", "curves.csv"))
    reproduce.run_all(plan[:1], runs.parent, 1)
    first, curve = runs.read_text(), curves.read_text()
    # An interruption between a curve and its row leaves a curve that is to be made anew.
    reproduce.append_csv(curves, reproduce.CURVE, [{"name": plan[1]["name"]}])
    reproduce.run_all(plan[1:], runs.parent, 1)
    assert runs.read_text().startswith(first) and plan[0]["name"] in curve == curves.read_text()
    assert [row["name"] for row in reproduce.read_csv(runs)] == [job["name"] for job in plan]


def test_steps_until_90_percent_by_hand():
    """Otherwise the main comparison of the results would count something else."""
    for success, expected in (([0.8, 0.9, 1.0], 150), ([1, 0.8, 0.8, 1, 1], 250), ([1, 1], "")):
        curve = [{"env_steps": str(50 * (i + 1)), "success": x} for i, x in enumerate(success)]
        assert reproduce.steps_to_90(curve) == expected


@pytest.mark.parametrize("change", [*reproduce.PRINCIPLES, "all-actions", *(
    x for x in real.WORDINGS if x != "chat-template" or real.FOLDER.exists())])
def test_changes_are_made_and_undone(change):
    """Otherwise an experiment would measure nothing, or leak into the runs after it."""
    state = lambda: twosome.make_episode(
        Args("virtualhome" if change == "all-actions" else "overcooked")).state()
    as_it_is = state()
    with reproduce.changed(change):
        prompt, phrases = state()
    assert (prompt, phrases) != as_it_is == state() and len(set(phrases)) == len(phrases)
    assert len(phrases) == (10 if change == "all-actions" else len(as_it_is[1]))


def test_perplexity_by_hand(monkeypatch):
    """Otherwise "no loss of language" would rest on a wrong sum."""
    (model, tokenizer), nats, n = pocket(), 0.0, 0
    texts = ["The oven is closed.", "You are in the kitchen. You hold the cup. Open it."]
    monkeypatch.setattr(language, "held_out", lambda: texts)
    monkeypatch.setattr(language, "cloze", lambda: (["You are in the"], [["kitchen.", "closed."]]))
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(log_p[i, token].item() for i, token in enumerate(ids[1:]))
        n += len(ids) - 1
    assert language.language(model, tokenizer) == pytest.approx((math.exp(nats / n), 1), rel=1e-5)


def test_real_language_by_hand(tmp_path):
    """Otherwise the loss of a real LLM's language would be measured on other text than is said."""
    model, tokenizer = pocket()
    log_p = lambda ids: model(torch.tensor([ids])).logits[0].log_softmax(-1)[
        range(len(ids) - 1), ids[1:]]
    text = "You are in the kitchen. You hold the cup. " * 80
    (tmp_path / "wiki.txt").write_text(text)
    (tmp_path / "data").mkdir()
    pairs = [("You hold the cup.", "You hold cup the."), ("The the oven.", "The oven is closed.")]
    begin = [tokenizer.bos_token_id]
    score = lambda sentence: log_p(
        begin + tokenizer(sentence, add_special_tokens=False)["input_ids"]).sum().item()
    assert [score(good) > score(bad) for good, bad in pairs] == [True, False]
    for i in range(67):  # every third file has the second pair, too
        (tmp_path / "data" / f"{i}.jsonl").write_text("".join(
            json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n"
            for good, bad in pairs[:1 + (i % 3 == 0)] * 20))
    ids = tokenizer(text)["input_ids"]
    windows = [-log_p(ids[i:i + 512]).mean().item() for i in range(0, len(ids), 512)]
    expected = math.exp(sum(windows) / len(windows)), (44 * 20 + 23 * 10) / (67 * 20)
    assert len(windows) > 1
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in (tmp_path / "data").iterdir():
            archive.write(path, f"data/{path.name}")
        archive.writestr("__MACOSX/data/._0.jsonl", b"\xb0")
    for blimp in tmp_path, tmp_path / "all.zip":
        assert language.real_language(model, tokenizer, tmp_path / "wiki.txt", blimp) == (
            pytest.approx(expected, rel=1e-5))
    (tmp_path / "data" / "0.jsonl").unlink()
    with pytest.raises(ValueError, match="66 of BLiMP's 67"):
        language.read_blimp(tmp_path)


def test_plots(finished, monkeypatch):
    """Otherwise a course would have numbers and no pictures."""
    pytest.importorskip("matplotlib")
    shutil.copytree(finished, "seed2")
    edit("seed2/config.json", seed=2)
    assert [len(curves) for curves in plot.read_runs([finished, Path("seed2")])[
        "tomato-salad"].values()] == [2]  # two seeds are one line
    for argv, name in ((["seed2", finished], "curves.png"), (["--states", "seed2"],
                                                            "seed2/states.png")):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv)])
        plot.main()
        assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_benchmark_compares_two_ways_to_the_same():
    """Otherwise the claim of speed would be about two different things."""
    agent = benchmark.make_agent(SimpleNamespace(model="pocket_lm", device="cpu", dtype="float32"))
    plain, ours = (benchmark.run_updates(way, agent, SMALL)[1] for way in ("plain", "ours"))
    assert plain.states == ours.states and torch.equal(plain.chosen, ours.chosen)
    assert equal([plain.advantage], [ours.advantage], 1e-4)
    assert 0 < benchmark.parity(agent, STATES) < 1e-5  # after ours has moved LoRA


@pytest.mark.parametrize("readme", [*ROOT.glob("README.md"), *ROOT.glob("experiments/README.md")])
def test_readme_commands_are_understood(readme):
    """Otherwise a README would teach flags or files that do not exist."""
    text = readme.read_text().replace("\\\n", " ").replace("\\|", "|")
    commands = re.findall(r"python (?:-X dev )?(\S+\.py)([^`\n#|;&]*)", text)
    assert len(commands) > 5
    for script, rest in commands:
        if script != "lamp.py":  # the README's own example
            source = (ROOT / script).read_text()
            known = {"help", *re.findall(r"\"--([a-z-]+)\"", source)}
            if "twosome.main(" in source or script == "twosome.py":
                known |= {name.replace("_", "-") for name in vars(Args())}
            assert {x.removeprefix("no-") for x in re.findall(r"--([a-z-]+)", rest)} <= known


def test_readme_environment(monkeypatch):
    """Otherwise the lines that a teacher copies for an environment of their own would not run."""
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    for flags in (["--out", "run", "--steps", "1536"], ["--resume", "run"]):
        with patch.dict(twosome.ENVS):
            monkeypatch.setattr(sys, "argv", ["lamp.py", *flags])
            exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert summary("run")["after"]["success"] > 0.9


def test_worked_examples():
    """Otherwise the examples in the docstrings would teach something that is not so."""
    modules = ["twosome", "overcooked_text", "virtualhome_text", "pocket_lm.make_pocket_lm",
               *(f"experiments.{path.stem}" for path in ROOT.glob("experiments/[!t]*.py"))]
    results = [doctest.testmod(importlib.import_module(module)) for module in modules]
    assert sum(x.failed for x in results) == 0 and sum(x.attempted for x in results) >= 10
