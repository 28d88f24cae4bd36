"""TWOSOME in one file: a language model learns to act, by practice.

A language model knows what people usually do, but not what works here. TWOSOME (Tan et al., ICLR
2024, arXiv 2401.14151) offers it the possible actions as endings of one sentence. The policy is a
softmax over the log-probabilities that the LM gives to these endings, each divided by its number
of words. PPO then makes actions that turned out well more likely. It trains a small adapter (LoRA)
and a small network that learns how good a state is. The LM itself stays frozen.

    python twosome.py            # half a minute on a CPU core; success rises from about 0.7 to 1.0
    python twosome.py --help     # all settings

One decision of pocket_lm, the tiny LM that is included, from an observation to a loss:

    observation  You are at the table. You hold the raw tomato.
    prompt       ... The first step to serve a salad of chopped tomato in a bowl is to
    an action    put the raw tomato on the cutting board        (one of the five that are offered)
    its tokens   put 0.58, the 1.00, raw 0.99, to-m-ato 1.00 (together), on 1.00, the 1.00,
                 cutting 0.52, board 1.00: how probable each is for the LM, after those before it
    log P        the sum of their logs is -1.20 (rounded); divided by 8, the number of words, -0.15
    policy       exp(-0.15) = 0.86, divided by 2.77, the sum over the five actions: 0.31
    advantage    +0.5: what followed was better than the critic had expected (made-up number)
    loss         -ratio * 0.5, where ratio is the new probability over the old one, at first 1

A gradient step on this loss makes the action more likely. Beyond a ratio of 1.2 the loss is flat,
and the actor's update ends where the policy has moved too far on average.

Sections 2 to 7 are the method, and section 7 is the training loop, which you see whole. The rest
is not needed to understand it: 8 keeps the LM's language, 9 computes the same numbers faster, 10
loads an LM and puts the parts together, 11 to 15 are for several processes, a run's folder, what is
printed, checks, and the command line. "Untrained" is the LM as it comes, before any of this
training.

From the paper and its code come the policy and its three normalisations, the rules for prompts,
LoRA and critic on one frozen LM, what the critic sees, macro-actions, PPO with its clipping and its
early stop, and learning rates that fall to 0. Its settings stand beside ours in section 1. The two
worlds are rewritten from their description, and section 9 is ours. We depart from the paper's code
here:

    section 2  The words that join observation and goal are ours.
    section 2  At the time limit the value of the last state still counts.
    section 4  LoRA is in the last ten blocks only, and has rank 32, not 8.
    section 4  The critic begins as V = 0, not at random.
    section 6  Advantages are normalised over the whole rollout, by their standard deviation + 0.1.
    section 6  The critic makes many passes over a rollout, and its values are not clipped.
    section 6  The entropy bonus falls to 0.
    section 7  A rollout in which all rewards are 0 is thrown away.
    section 8  The LM rehearses its language.
"""

import csv
import inspect
import io
import json
import math
import os
import random
import shlex
import signal
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the slow imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from overcooked_text import OvercookedText
from virtualhome_text import VirtualHomeText


# === 1. Settings: one set for all tasks and small LMs; only steps and gamma depend on the task. ===
# Words: a decision chooses an action, which takes one or more primitive steps, the world's moves.
# An update plays a rollout of decisions and learns from it in some gradient steps, which change
# weights. `steps` and `rollout_steps` count decisions.
# Shapes: B states with K actions each; L tokens; D hidden units; T decisions in each of N
# environments, n = T * N in all; m of them in a chunk of a minibatch. P is a probability of the LM,
# pi(a | s) the policy, s' the state after the action, V(s) a value, R a return, A an advantage.
@dataclass
class Settings:
    """Each line is a flag of the command line, such as --n_envs 8; its type parses the flag."""

    # The task
    env: str = "overcooked"  # the environment: overcooked or virtualhome
    task: str = None  # None: tomato-salad or food-preparation, by the environment
    steps: int = None  # decisions to learn from; None: by task, tomato-salad 4,096; paper: 50,000+
    gamma: float = None  # of a primitive step; None: overcooked 0.99, virtualhome 0.95, as paper
    # The LM and the policy
    model: str = "pocket_lm"  # a tiny LM in this repository, or a folder or Hub id; paper: LLaMA-7B
    norm: str = "word"  # divides log P by words or tokens: word, token or none; paper: word
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda if there is one, else cpu
    dtype: str = "float32"  # of the frozen LM; bfloat16 needs half the memory; paper: float16
    max_prompts: int = 8  # states computed at once; lower it if memory runs out; paper: 4
    # Playing
    n_envs: int = 4  # environments that each process plays at a time; paper: 4
    rollout_steps: int = 64  # decisions in each environment between two updates; paper: 32
    gae_lambda: float = 0.95  # trades bias against variance of the advantage; paper: 0.95
    # PPO
    epochs: int = 2  # the actor's passes over a rollout; with more the LM forgets more; paper: 1
    minibatches: int = 4  # gradient steps in each epoch; more take longer; paper: 4
    value_epochs: int = 10  # the critic's passes over a rollout, which are cheap; paper: 1
    policy_lr: float = 1e-3  # of LoRA; tried with up to 135M weights; paper (7B): 5e-7
    value_lr: float = 1e-3  # of the critic, a common rate for a small MLP; paper: 1e-5 or 5e-5
    clip_coef: float = 0.2  # PPO's clip range: to move a ratio past it earns nothing; paper: 0.2
    ent_coef: float = 0.01  # entropy bonus at first, against settling too early; paper: 0.01
    target_kl: float = 0.02  # the actor's update stops beyond this KL divergence; paper: 0.02
    max_grad_norm: float = 0.5  # longer gradients are shortened, against leaps; paper: 0.5
    rehearsal_coef: float = 0.3  # weight of the loss that keeps the LM's language; paper: none
    # The run
    seed: int = 1  # of everything random: LoRA, critic, sampled actions, minibatches
    out: str = None  # the run's folder; None: a new one in runs/
    test_episodes: int = 16  # played after each update, only for the log; more take longer


EVALUATION_EPISODES = 100  # in each process, before training and after it
LORA_BLOCKS = 10  # LoRA is in the last ten blocks, as section 4 explains; paper: in all
LORA_RANK = 32  # With less, pocket_lm learns slowly; paper: 8.
CACHE_SIZE = 100_000  # A lasting cache with more entries is emptied, or drops the longest unused.
# torchrun (section 11) starts several processes and tells each its rank. With one process the rank
# is 0, and all code about processes has no effect.
RANK = int(os.environ.get("RANK", 0))
N_PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


# --- Helpers ---
class UserError(ValueError):
    """A mistake of the user, which is reported in one line."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def average(tensor):
    """Replace the tensor by its mean over the processes, and return it."""
    if N_PROCESSES > 1:
        dist.all_reduce(tensor)
        tensor /= N_PROCESSES
    return tensor


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def trainable(module):
    """The parameters that training changes, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


# === 2. Prompt and time: an action ends the sentence that the prompt begins, and takes time. ======
def build_prompt(obs, goal):
    """Return the prompt. A space and a phrase finish its last sentence.

    The environments write `obs` and the phrases by the paper's four principles:
    1. Cohesive: "... The first step to make a soup is to" + " chop the tomato" is fluent.
    2. Articles: "pick up the tomato", as people write, not "pick up tomato".
    3. Preferred words: if the observation says bowl, no phrase says plate.
    4. Alternative actions: the same action has another phrase in another situation. With empty
       hands it is "walk to the cutting board", with the tomato in them "put the raw tomato on the
       cutting board".

    We compared twenty ways to join observation and goal. With "The first step to ... is to"
    untrained LMs do best, by a rule that was fixed before the comparison (experiments/wording.py).
    >>> build_prompt("You hold the raw tomato.", "make a soup")
    'You hold the raw tomato. The first step to make a soup is to'
    """
    return f"{obs} The first step to {goal} is to"


class TextEnv:
    """Wraps an environment, so that the agent sees a prompt and phrases instead of an observation.

    An environment `env` is deterministic. It has
    - `__init__(task, gamma)`, and the constants TASKS, GAMMA and STEPS,
    - `goal`, a text,
    - Gymnasium's `reset` and `step`,
    - `get_state`, which returns all of its state as plain data, and `set_state`, which takes that
      and returns (obs, info) as `reset` does, for --resume.
    Its info has
    - "actions": a dict that maps each action that is offered now to its phrase. Actions are offered
      at the end of an episode, too: its last state gets a value, and `encode` needs phrases,
    - "primitive_steps": how many primitive steps the latest action took,
    - "success": whether the goal is reached."""

    def __init__(self, env, gamma):
        self.env = env
        self.gamma = gamma
        self.reset()

    def reset(self):
        """Begin an episode."""
        self.obs, self.info = self.env.reset()
        self.discounted_return = 0.0  # This and the length are only reported.
        self.length = 0  # in primitive steps
        self.done = False

    def state(self):
        """The prompt, and the phrases of the offered actions: what the agent perceives. Strictly it
        is an observation, as there is more to the world's state."""
        phrases = tuple(self.info["actions"].values())
        return build_prompt(self.obs, self.env.goal), phrases

    def step(self, choice):
        """Take the offered action with index `choice`. Returns its reward, and the discount of
        V(s'): 0 if the goal is reached, else gamma^k.

        An action may be a macro-action ("put the tomato on the board"), which takes k primitive
        steps (walk, walk, put). The environment discounts the rewards within it. What follows
        comes k primitive steps later, and therefore counts gamma^k."""
        action = list(self.info["actions"])[choice]
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        require(math.isfinite(reward), f"the environment gave the reward {reward}")
        k = self.info["primitive_steps"]
        self.discounted_return += self.gamma**self.length * reward
        self.length += k
        self.done = terminated or truncated
        # At the time limit the episode is done, but V(s') stands for what would follow, because no
        # prompt shows a clock. The paper's code treats it as an end, after which nothing is earned.
        discount = 0.0 if terminated else self.gamma**k
        return reward, discount


# === 3. Scoring: how probable does the LM find each phrase as the ending of the prompt? ===========
@lru_cache(CACHE_SIZE)
def encode(tokenizer, prompt, phrases):
    """Return (prompt_ids, [action_ids, ...]): the tokens of a prompt and of each of its endings.

    Prompt and ending are tokenised as one text, because that is how an LM has read text: most
    tokenizers put the space between two words into the second word's token. Each token has offsets,
    its start and end in the text. The tokens that start where the prompt ends, or later, are the
    action's. If the prompt is "to" and the action "chop", the text is "to chop", and a tokenizer
    may cut it so:

        "to", " chop"      (0, 2), (2, 7)          the space is the action's
        "to ", "chop"      (0, 3), (3, 7)          the space is the prompt's
        "to chop"          (0, 7)                  an error: whose token is it?
    """
    distinct = set(map(str.strip, phrases)) - {""}
    require(
        0 < len(phrases) == len(distinct),
        f"the environment offers no phrase, or blank or equal phrases: {phrases}",
    )
    end = len(prompt)
    prompts, action_ids = [], []
    for phrase in phrases:
        encoding = tokenizer(f"{prompt} {phrase}", return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        require(
            len(ids) <= tokenizer.model_max_length,
            f"a prompt has {len(ids)} tokens, the LM reads {tokenizer.model_max_length}",
        )
        # A special token has the offsets (0, 0). One that begins a text is the prompt's, one that
        # ends it is left out.
        own = [t for t, (start, _) in enumerate(offsets) if start >= end]
        # A straddling token starts in the prompt and goes on beyond the space, which is at `end`.
        straddling = any(start < end < stop - 1 for start, stop in offsets)
        prompts.append(ids[: min(own, default=0)])
        action_ids.append([ids[t] for t in own])
        require(
            not straddling and prompts[-1] == prompts[0],
            f"the tokenizer of {tokenizer.name_or_path} merges the end of the prompt with the "
            f"start of {phrase!r}, whose probability is then not defined; choose another LM",
        )
    return prompts[0], action_ids


def plain_log_probs(model, encoded):
    """The definition of an action's joint log-probability: each action is a row of its own.

        log P(a | s) = sum_i log P(t_i | s, t_1 ... t_{i-1}),  t_i: the tokens of a      (Eq. 1)

    (Eq. numbers are the paper's.) `encoded` has B pairs from `encode`. Returns B float32 tensors
    (K,), with gradients. There is no factor for the end of the text: what follows the action does
    not matter. For most LMs make_agent chooses a faster way to the same numbers (section 9). With
    this one a run is slower. It is the same until rounding changes a sampled action."""
    log_probs = []
    for prompt_ids, action_ids in encoded:
        rows = [torch.tensor(prompt_ids + ids) for ids in action_ids]
        targets = [torch.tensor(ids) for ids in action_ids]
        # Padding at the end of a row is harmless, because a causal LM never looks ahead.
        rows = pad_sequence(rows, batch_first=True).to(model.device)  # (K, L)
        # Targets are padded with -100, which cross_entropy leaves out.
        targets = pad_sequence(targets, batch_first=True, padding_value=-100).to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits  # (K, L, vocabulary)
        # Position t predicts token t + 1: the prompt's last token predicts the action's first.
        logits = logits[:, len(prompt_ids) - 1 : -1].float()  # (K, longest action, vocabulary)
        logits = logits.transpose(1, 2)  # cross_entropy wants the vocabulary second.
        minus_log = F.cross_entropy(logits, targets, reduction="none")
        log_probs.append(-minus_log.sum(-1))  # (K,)
    return log_probs


def normalize(log_probs, action_ids, phrases, norm):
    """Make actions of different lengths comparable; the policy is the softmax of the result (K,).

    A longer phrase has more factors below 1, and so a smaller product. Dividing its log by n takes
    the n-th root: the geometric mean over the action's tokens (Eq. 3) or words (Eq. 4). Without a
    division ("none") it is Eq. 2.

                                                             the policy with norm =
        phrase, cut into tokens  P of its tokens             none   token  word
        wait                     0.01                        0.456  0.019  0.027
        chop the egg             0.1  0.8  0.1               0.365  0.370  0.544
        chop the aub erg ine     0.1  0.8  0.05  0.99  0.99  0.179  0.611  0.429

    "none" favours the shortest phrase: "wait" has a single factor, though a small one. "token"
    favours words of many tokens, because the end of a word is nearly sure once it has begun. "word"
    divides by 3 for both of the longer phrases, and so treats a word alike into however many tokens
    it is cut. It favours phrases whose later words are easy to guess. Any division has a price: it
    makes the policy more random, as a log P of -6 becomes one of -2.

    >>> phrases = ["wait", "chop the egg", "chop the aubergine"]
    >>> action_ids = [[7], [1, 2, 3], [1, 2, 4, 5, 6]]
    >>> log_probs = torch.tensor([0.01, 0.1 * 0.8 * 0.1, 0.1 * 0.8 * 0.05 * 0.99 * 0.99]).log()
    >>> for norm in ("none", "token", "word"):
    ...     print(normalize(log_probs, action_ids, phrases, norm).softmax(0).numpy().round(3))
    [0.456 0.365 0.179]
    [0.019 0.37  0.611]
    [0.027 0.544 0.429]
    """
    if norm == "none":
        return log_probs
    parts = action_ids if norm == "token" else [phrase.split() for phrase in phrases]
    return log_probs / torch.tensor([len(part) for part in parts])


# === 4. Agent: the actor is the frozen LM with LoRA, the critic an MLP on the frozen LM. ==========
def decoder_blocks(model):
    """The transformer blocks of the text decoder. A multimodal LM has blocks in its vision tower,
    too, which get_decoder skips."""
    modules = model.get_decoder().modules()
    return next(module for module in modules if isinstance(module, nn.ModuleList))


# Where LMs compute queries and values: apart, or in one layer together with the keys. Mamba has no
# attention, but a layer in its place.
LORA_LAYERS = "q_proj", "v_proj", "query_key_value", "qkv_proj", "Wqkv", "c_attn", "mixer.in_proj"


def add_lora(model):
    """Freeze the LM and add a trainable low-rank term to some layers (LoRA; Hu et al., 2022):

        W becomes W + (alpha / rank) up @ down,  up: (out, rank), first 0; down: (rank, in), random

    so that training starts from the LM's own policy. As in the paper, the layers that compute the
    queries and values of attention get it, and alpha is twice the rank. With LoRA in all linear
    layers SmolLM2 learned as fast, but it then failed more often in tasks that it had not
    practised (experiments/results/search_settings.csv). Unlike in the paper, only the last ten
    blocks get it, or all where there are fewer. What the blocks below make of a text then never
    changes, and can be cached (section 9)."""
    adapted = set(decoder_blocks(model)[-LORA_BLOCKS:].modules())
    names = []
    for name, module in model.named_modules():
        if module in adapted and name.endswith(LORA_LAYERS):
            names.append(name)
    require(names, f"{model.name_or_path} has no layers for LoRA; choose another LM")
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names, task_type="CAUSAL_LM"
    )
    # eval() turns dropout off: a gradient step must see the policy that collected the rollout.
    return get_peft_model(model, lora).eval()


def make_critic(n_inputs):
    """An MLP with the paper's numbers of hidden units."""
    critic = nn.Sequential(
        nn.Linear(n_inputs, 1024),
        nn.ReLU(),
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Linear(512, 1),
    )
    # V is 0 at first. A random V would give random advantages before anything is learned. The first
    # step moves only the last layer, whose inputs are not 0. From then on all layers learn.
    for p in critic[-1].parameters():
        nn.init.zeros_(p)
    return critic


def make_optimizer(module):
    """Adam for what training changes in the module; `take_step` sets the learning rate. eps is the
    paper's: with the usual 1e-8 even tiny gradients cause full-size steps."""
    return torch.optim.Adam([{"params": trainable(module).values()}], eps=1e-5)


class Agent(nn.Module):
    """pi(a | s) and V(s), the expected discounted return. A state s is a pair: the prompt, and a
    tuple of the offered actions' phrases. `score` finds log P of the actions.

    Baselines (in experiments/) are subclasses, with another `wrapper` around the environment,
    another policy and value, and another way to `learn`."""

    wrapper = TextEnv

    def __init__(self, model, tokenizer, settings, score=plain_log_probs, extra_loss=None):
        super().__init__()
        self.model = model  # the LM with LoRA
        self.tokenizer = tokenizer
        self.score = score
        self.extra_loss = extra_loss  # another loss for LoRA: the rehearsal of section 8, or None
        self.settings = settings
        # The critic is small and stays on the CPU, to which features and log P are moved. D, the
        # size of the last hidden state, is the number of inputs of the LM's output layer.
        self.critic = make_critic(model.get_output_embeddings().weight.shape[1])
        self.actor_optimizer = make_optimizer(self.model)
        self.critic_optimizer = make_optimizer(self.critic)
        # The agent's caches: the LM's features never change, the policy changes in each update.
        self.feature_cache = {}  # prompt -> (D,)
        self.policy_cache = {}  # state -> log pi (K,)

    def log_policy(self, states):
        """log pi(. | s) for B states: B tensors (K,), with gradients."""
        encoded = [encode(self.tokenizer, *state) for state in states]
        log_probs = self.score(self.model, encoded)  # log P(a | s): B tensors (K,)
        log_pis = []
        for (_, phrases), (_, action_ids), log_p in zip(states, encoded, log_probs, strict=True):
            logits = normalize(log_p.cpu(), action_ids, phrases, self.settings.norm)
            # pi(a | s) = exp(logit of a) / sum over the K actions of exp(logit)
            log_pis.append(logits.log_softmax(-1))
        return log_pis

    @torch.no_grad()
    def cached_log_policy(self, states):
        """log_policy without gradients, for playing: a state is scored once between two updates."""
        # Sorted, so that prompts which begin alike share a chunk (section 9).
        new = sorted(set(states) - self.policy_cache.keys())
        for chunk in chunks(new, self.settings.max_prompts):
            self.policy_cache.update(zip(chunk, self.log_policy(chunk), strict=True))
        return [self.policy_cache[state] for state in states]

    @torch.no_grad()
    def features(self, states):
        """The critic's inputs (B, D): the LM's last hidden state at the last token of the prompt,
        not of the phrases. The adapter is off, because with it the inputs would shift with each
        gradient step of the actor, and could not be cached. Nor is there a gradient: the critic
        must not change the LM."""
        if len(self.feature_cache) > CACHE_SIZE:
            self.feature_cache.clear()
        with self.model.disable_adapter():
            for prompt, phrases in states:
                if prompt not in self.feature_cache:
                    prompt_ids, _ = encode(self.tokenizer, prompt, phrases)
                    ids = torch.tensor([prompt_ids], device=self.model.device)
                    output = self.model.get_decoder()(input_ids=ids, use_cache=False)
                    self.feature_cache[prompt] = output.last_hidden_state[0, -1].float().cpu()
        return torch.stack([self.feature_cache[prompt] for prompt, _ in states])

    def value(self, states):
        """V(s) for B states: (B,), with gradients for the critic only."""
        return self.critic(self.features(states)).squeeze(-1)

    def learn(self, rollout, remaining, rng):
        """Improve actor and critic (section 6). `remaining` is the part of the training that is
        left; the learning rates fall with it to 0. Returns the metrics."""
        metrics = update_actor(self, rollout, remaining, rng)
        return metrics | update_critic(self, rollout, remaining, rng)


# === 5. Playing: act by the present policy, and judge each decision by what followed. =============
def sample(log_pi, rng):
    """Draw an action from the policy in one state. Returns its index."""
    return rng.choices(range(len(log_pi)), log_pi.exp().tolist())[0]


def gae(reward, discount, value, next_value, done, gae_lambda):
    """Generalised advantage estimation (Schulman et al., 2016); all but lambda are (T, N).

        delta_t = r_t + gamma^(k_t) V(s_{t+1}) - V(s_t)              k_t: primitive steps it took
        A_t     = delta_t + gamma^(k_t) lambda A_{t+1}

    `discount` is gamma^(k_t), or 0 where the goal was reached.
    delta tells whether a decision went better than expected. A decision also gets credit for later
    surprises, which fades by gamma per primitive step and by lambda per decision.
    done is 1 where the episode ended, at the goal or at the time limit: there A has no later term.

    Example with lambda 1, from the end: the last action (V = 0.4) earns 1 and reaches the goal, so
    A = 1 - 0.4 = 0.6. The one before (V = 0.2, k = 2 with gamma 0.5, so that what follows counts
    0.25) has A = 0.25 * 0.4 - 0.2 + 0.25 * 0.6 = 0.05.
    >>> reward, discount = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.25], [0.0]])
    >>> value, next_value = torch.tensor([[0.2], [0.4]]), torch.tensor([[0.4], [0.0]])
    >>> gae(reward, discount, value, next_value, torch.tensor([[0.0], [1.0]]), 1.0).T
    tensor([[0.0500, 0.6000]])
    """
    advantage = torch.zeros_like(reward)
    next_advantage = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + discount[t] * next_value[t] - value[t]
        next_advantage = delta + discount[t] * gae_lambda * (1 - done[t]) * next_advantage
        advantage[t] = next_advantage
    return advantage


@dataclass
class Rollout:
    """n = T * N decisions, ordered by time and then by environment."""

    states: list  # n of them
    choice: Tensor  # (n,) int: which of the offered actions was taken
    old_log_pi_a: Tensor  # (n,) log pi_old(a | s) of that action
    reward: Tensor  # (n,)
    advantage: Tensor  # (n,) how much better than V_old(s) it turned out
    returns: Tensor  # (n,) the critic's target: V_old + advantage


@torch.no_grad()
def collect(agent, envs, rng):
    """Take T decisions in each of N environments. An unfinished episode goes on in the next
    rollout, and the critic's value stands for the rest of it."""
    T, N = agent.settings.rollout_steps, len(envs)
    states, next_states = [], []
    choice = torch.zeros(T, N, dtype=torch.long)
    old_log_pi_a, reward, discount, done = torch.zeros(4, T, N)
    for t in range(T):
        current = [env.state() for env in envs]
        states += current
        log_pis = agent.cached_log_policy(current)
        for i, env in enumerate(envs):
            a = sample(log_pis[i], rng)
            choice[t, i] = a
            old_log_pi_a[t, i] = log_pis[i][a]
            reward[t, i], discount[t, i] = env.step(a)
            done[t, i] = env.done
            # s_{t+1} is read before the reset, because at a time limit its value still counts.
            next_states.append(env.state())
            if env.done:
                env.reset()
    value = agent.value(states).view(T, N)
    next_value = agent.value(next_states).view(T, N)
    advantage = gae(reward, discount, value, next_value, done, agent.settings.gae_lambda)
    columns = choice, old_log_pi_a, reward, advantage, value + advantage  # each (T, N)
    return Rollout(states, *[column.flatten() for column in columns])


# === 6. PPO: make what turned out better than expected likelier, in small steps. ==================
def policy_loss(log_pi_a, old_log_pi_a, entropy, advantage, clip_coef, ent_coef):
    """PPO's loss (Schulman et al., 2017) of each of m decisions, and metrics of each, by name.

        ratio = pi(a | s) / pi_old(a | s)
        loss = -min(ratio A, clip(ratio, 1 - c, 1 + c) A) - ent_coef H(pi(. | s)),  c: clip_coef

    The tensors are (m,). In the first minibatch of an update pi is still pi_old, so the ratio is 1,
    up to rounding. Where A > 0 and ratio > 1 + c, or A < 0 and ratio < 1 - c, the first term is
    constant and its gradient is 0: this decision pushes no further.

    Example: the decision turned out well, A = 0.5, and gradient steps have raised its probability
    from 0.50 to 0.65. The ratio 1.3 is beyond 1.2, and the loss stays -1.2 * 0.5.
    >>> new, old = torch.tensor([0.65]).log(), torch.tensor([0.50]).log()
    >>> loss, _ = policy_loss(new, old, torch.zeros(1), torch.tensor([0.5]), 0.2, ent_coef=0.0)
    >>> loss
    tensor([-0.6000])
    """
    log_ratio = log_pi_a - old_log_pi_a
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    loss = -surrogate - ent_coef * entropy
    metrics = {
        "entropy": entropy,
        # This is never negative, and its mean estimates KL(pi_old || pi).
        "approx_kl": ratio - 1 - log_ratio,
        "clip_fraction": (ratio != clipped).float(),
    }
    return loss, metrics


def minibatches(n, epochs, parts, rng):
    """Yield the indices of n decisions in nearly equal parts, each epoch shuffled anew."""
    for _ in range(epochs):
        order = rng.sample(range(n), n)
        for part in range(min(parts, n)):
            yield order[part::parts]


def backward_policy_loss(agent, rollout, advantage, batch, ent_coef):
    """Add the gradient of the policy loss, averaged over the minibatch `batch`, to LoRA's. Returns
    the means of its metrics.

    Several decisions are often taken in the same state, which is scored only once. Memory may not
    suffice for all states at once. So they come in chunks, each with the decisions that were taken
    in its states, and the gradients add up."""
    metrics = defaultdict(float)
    distinct = sorted({rollout.states[i] for i in batch})
    for states in chunks(distinct, agent.settings.max_prompts):
        policies = dict(zip(states, agent.log_policy(states), strict=True))
        decisions = [i for i in batch if rollout.states[i] in policies]
        log_pis = [policies[rollout.states[i]] for i in decisions]
        log_pi_a = [log_pi[a] for log_pi, a in zip(log_pis, rollout.choice[decisions], strict=True)]
        # H(pi(. | s)) = -sum_a pi(a | s) log pi(a | s)
        entropy = [-(log_pi.exp() * log_pi).sum() for log_pi in log_pis]
        loss, chunk_metrics = policy_loss(
            torch.stack(log_pi_a),
            rollout.old_log_pi_a[decisions],
            torch.stack(entropy),
            advantage[decisions],
            agent.settings.clip_coef,
            ent_coef,
        )
        (loss.sum() / len(batch)).backward()
        for name, values in chunk_metrics.items():
            metrics[name] += values.detach().sum() / len(batch)
    return {name: average(mean).item() for name, mean in metrics.items()}


def take_step(optimizer, lr, max_grad_norm):
    """Take one gradient step. Gradients are averaged over the processes, and clipped to a norm."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    for p in group["params"]:
        if p.grad is not None:  # It is None where no loss reaches it, in all processes.
            average(p.grad)
    grad_norm = nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    require(
        grad_norm.isfinite(),
        "a gradient is not finite; begin anew with a lower --policy_lr or --value_lr",
    )
    optimizer.step()


def update_actor(agent, rollout, remaining, rng):
    """Move LoRA towards decisions that turned out better than expected, but not far. The loss is
    policy_loss + extra_loss (section 8). Returns the metrics of the last minibatch."""
    settings = agent.settings
    # A becomes (A - mean) / (std + 0.1), which suits rewards of about 1. Where nothing happened,
    # advantages are only the critic's errors, of say 0.01. Divided by their own std, as in the
    # paper's code, they would be as large as those of a success, and outweigh the entropy bonus
    # that keeps the policy exploring.
    advantage = rollout.advantage - rollout.advantage.mean()
    advantage /= advantage.std(correction=0) + 0.1
    # The bonus falls towards 0. At the end it would only keep the policy random.
    ent_coef = remaining * settings.ent_coef
    for batch in minibatches(len(advantage), settings.epochs, settings.minibatches, rng):
        agent.actor_optimizer.zero_grad()
        metrics = backward_policy_loss(agent, rollout, advantage, batch, ent_coef)
        if metrics["approx_kl"] > settings.target_kl:
            # The steps before have already moved the policy too far from the one that collected
            # the rollout. They are kept, and the actor's other steps are skipped.
            break
        if agent.extra_loss:
            agent.extra_loss(rng).backward()
        take_step(agent.actor_optimizer, remaining * settings.policy_lr, settings.max_grad_norm)
    agent.policy_cache.clear()
    return metrics


def update_critic(agent, rollout, remaining, rng):
    """Move V towards the returns. Its inputs are computed only once, so a pass over the rollout
    costs next to nothing, and the critic makes many. The paper's code makes one, and clips the
    change of V. Returns the metrics of V before it has learned."""
    settings = agent.settings
    features = agent.features(rollout.states)  # (n, D)
    for batch in minibatches(len(features), settings.value_epochs, settings.minibatches, rng):
        agent.critic_optimizer.zero_grad()
        value = agent.critic(features[batch]).squeeze(-1)
        # loss = mean of 1/2 (V - R)^2
        (0.5 * F.mse_loss(value, rollout.returns[batch])).backward()
        take_step(agent.critic_optimizer, remaining * settings.value_lr, settings.max_grad_norm)
    return {
        # The critic's error, R - V_old, is the advantage.
        "value_loss": 0.5 * rollout.advantage.square().mean().item(),
        # 1 - Var(R - V_old) / Var(R): how much of the returns' variance the critic foresaw
        "explained_variance": 1 - (rollout.advantage.var() / rollout.returns.var()).item(),
    }


# === 7. The training loop: play, judge, learn, log. ===============================================
def evaluate(agent, new_env, n_episodes, rng):
    """Play n episodes, all at once so that their states share passes of the LM. Actions are
    sampled, as the policy is a distribution. Returns mean success, return and length."""
    envs = playing = [new_env() for _ in range(n_episodes)]
    while playing:
        log_pis = agent.cached_log_policy([env.state() for env in playing])
        for env, log_pi in zip(playing, log_pis, strict=True):
            env.step(sample(log_pi, rng))
        playing = [env for env in playing if not env.done]
    outcomes = [(env.info["success"], env.discounted_return, env.length) for env in envs]
    means = average(torch.tensor(outcomes).mean(0)).tolist()
    return dict(zip(("success", "return", "length"), means, strict=True))


def describe(result):
    return (
        f"success {result['success']:.2f}, discounted return {result['return']:.3f}, "
        f"{result['length']:.1f} primitive steps"
    )


def train(agent, new_env, run):
    """Play, judge, learn, log. `new_env` makes a wrapped environment. `run` keeps log and
    checkpoints, and makes random numbers, seeded by what they are for (section 12)."""
    settings = agent.settings
    envs = [new_env() for _ in range(settings.n_envs)]
    run.restore(agent, envs)  # This does nothing in a new run.
    if run.before is None:
        run.before = evaluate(agent, new_env, EVALUATION_EPISODES, run.rng("before training"))
        run.save(agent, envs)
    print(f"untrained: {describe(run.before)}")
    decisions_per_update = settings.n_envs * settings.rollout_steps * N_PROCESSES
    n_updates = math.ceil(settings.steps / decisions_per_update)
    n_gradient_steps = n_updates * settings.epochs * settings.minibatches
    print(
        f"{n_updates} updates of {decisions_per_update} decisions, "
        f"at most {n_gradient_steps} gradient steps of LoRA"
    )
    # disable=None shows the bar only in a terminal.
    bar = tqdm(total=n_updates, initial=len(run.rows), unit="update", disable=RANK > 0 or None)
    while len(run.rows) < n_updates:
        # Play, and judge each decision by what followed. The seed is the count of decisions, so
        # that a resumed run draws the same numbers.
        rng = run.rng(f"decision {run.decisions}")
        rollout = collect(agent, envs, rng)
        run.decisions += decisions_per_update
        # Without any reward, advantages show only what the critic believes. We skip such a rollout
        # and play on; the paper's code learns from it. The cost of our rule is a critic that sees
        # fewer failures and expects too much. In Overcooked each primitive step costs a little, so
        # none is skipped. A skipped rollout counts in `decisions`, not as an update.
        if average(rollout.reward.abs().sum()) == 0:
            require(run.decisions < 100 * n_updates * decisions_per_update, "hardly any reward")
            continue

        # Learn: the gradient steps of PPO.
        metrics = agent.learn(rollout, 1 - len(run.rows) / n_updates, rng)

        # Log how the agent does in new, whole episodes. A rollout is cut after T decisions, so the
        # short episodes, which are the successes, would be overcounted.
        run.log(evaluate(agent, new_env, settings.test_episodes, rng) | metrics)
        run.save(agent, envs)
        bar.update()


# === 8. Not the paper's: rehearse what the LM would say, so that it forgets less of its language. =
class Rehearsal:
    """RL on a few sentences makes an LM forget some of its language. Against this the untrained LM
    first writes 32 texts. Then an extra loss holds the next-token predictions p of the trained LM
    on these texts to those of the untrained one, p_0 (pseudo-rehearsal; Robins, 1995). Each call
    returns coef * KL(p_0 || p) on four of the texts, for one gradient step."""

    def __init__(self, model, vocab_size, coef):
        self.model = model
        self.coef = coef
        first_tokens = torch.randint(vocab_size, (32, 1), device=model.device)
        # Each text has 40 tokens: a random one, and 39 that the LM samples. These settings override
        # those that an LM's folder may bring.
        sampling = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            repetition_penalty=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=39,  # No text ends early.
            max_new_tokens=39,
        )
        with model.disable_adapter():  # Without LoRA nothing has a gradient.
            self.texts = model.generate(first_tokens, generation_config=sampling)  # (32, 40)
            self.logits = model(input_ids=self.texts, use_cache=False).logits

    def __call__(self, rng):
        # The loss of a single text would be noisy, and slow down learning.
        chosen = rng.sample(range(32), 4)
        texts = self.texts[chosen]  # (4, 40)
        logits = self.model(input_ids=texts, use_cache=False).logits
        log_p_0 = self.logits[chosen].float().log_softmax(-1)  # (4, 40, vocabulary)
        log_p = logits.float().log_softmax(-1)
        # KL(p_0 || p) = sum_w p_0(w) (log p_0(w) - log p(w)), averaged over the tokens of the texts
        kl = F.kl_div(log_p, log_p_0, reduction="sum", log_target=True)
        return self.coef * kl / texts.numel()


# === 9. The same numbers, faster: compute every distinct beginning once, as branches of a tree. ===
def as_tree(encoded):
    """Merge the rows of the definition where they begin alike, into a prefix tree of L nodes.

        The first step to make a salad is to -+- chop the -+- (egg)
                                              |            +- (tomato)
                                              +- (wait)

    In the picture each word stands for its tokens. A node is a prefix of a row, a tuple of tokens,
    and predicts the tokens that may follow. The last token of an action, in brackets, needs no
    node, because nothing after it is predicted. Rows of several states share nodes, too. Returns
    - nodes: in an order in which each comes after its own prefixes,
    - mask (L, L): True where a node may look, at itself and at its own prefixes,
    - sources: for each token of each action the index of the node that predicts it,
    - targets: that token."""
    index = {}  # node, a prefix -> its index
    sources, targets = [], []
    for prompt_ids, action_ids in encoded:
        for ids in action_ids:
            row = tuple(prompt_ids + ids)
            for end in range(1, len(row)):
                i = index.setdefault(row[:end], len(index))  # a known index, or a new one
                if end >= len(prompt_ids):
                    sources.append(i)
                    targets.append(row[end])  # the token that follows
    mask = torch.eye(len(index), dtype=torch.bool)
    for prefix, i in index.items():
        if len(prefix) > 1:
            mask[i] |= mask[index[prefix[:-1]]]
    return list(index), mask, sources, targets


class FrozenBlocks(nn.Module):
    """All blocks below LoRA, as one module. They are frozen, so the hidden state of a prefix after
    them never changes, and is cached. If all prefixes of a pass are known, none of them runs.

        before  [frozen 0,                frozen 1,          frozen 2,          LoRA 3, LoRA 4]
        after   [FrozenBlocks([0, 1, 2]), FrozenBlocks([]),  FrozenBlocks([]),  LoRA 3, LoRA 4]

    The list must keep its length, because peft finds LoRA's weights by the number of their block.
    So empty ones, which pass on what they get, stand in the other places."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.cache = {}  # node -> hidden state (D,)
        # TreeScorer puts the nodes of its next pass here, as the LM's forward cannot carry them. In
        # other passes there are none: all blocks run, and nothing is cached.
        self.next_nodes = ()

    def forward(self, hidden, *args, **kwargs):
        nodes, self.next_nodes = self.next_nodes, ()
        if nodes and all(node in self.cache for node in nodes):
            return torch.stack([self.cache[node] for node in nodes])[None]  # (1, L, D)
        for block in self.blocks:
            hidden = block(hidden, *args, **kwargs)
        if len(self.cache) > CACHE_SIZE:
            self.cache.clear()
        for i, node in enumerate(nodes):
            # A copy, because a view would keep the hidden states of the whole pass alive.
            self.cache[node] = hidden[0, i].clone()
        return hidden


class TreeScorer:
    """Equals `plain_log_probs` up to rounding, but computes a prompt once for all its actions.

    In a transformer, tokens exchange information only in attention, and only their positions tell
    their order. Here each node looks only at its own prefixes, and its position is the number of
    tokens before it, as in a row of its own. So the LM computes the same for it."""

    def __init__(self, model):
        """Replace the frozen blocks of a model that has LoRA. If it has no more than ten blocks,
        none is frozen, and nothing is replaced."""
        blocks = decoder_blocks(model)
        n_frozen = sum(not trainable(block) for block in blocks)
        self.frozen = FrozenBlocks(blocks[:n_frozen])
        for i in range(n_frozen):
            blocks[i] = self.frozen if i == 0 else FrozenBlocks([])

    def __call__(self, model, encoded):
        nodes, mask, sources, targets = as_tree(encoded)
        tensor = partial(torch.tensor, device=model.device)
        last_tokens = tensor([node[-1] for node in nodes])  # (L,)
        positions = tensor([len(node) - 1 for node in nodes])  # (L,)
        # The mask is added to attention's scores. It is finite, as some kernels make NaN of -inf.
        mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min)
        self.frozen.next_nodes = nodes
        try:
            output = model(
                input_ids=last_tokens[None],
                position_ids=positions[None],
                attention_mask=mask[None, None].to(model.device, model.dtype),  # (1, 1, L, L)
                # Logits only at these nodes. A node comes once for each token that it predicts.
                logits_to_keep=tensor(sources),
                use_cache=False,
            )
        finally:
            self.frozen.next_nodes = ()  # also where the pass was interrupted
        minus_log = F.cross_entropy(output.logits[0].float(), tensor(targets), reduction="none")
        n_tokens = []  # of each action of each state
        for _, action_ids in encoded:
            n_tokens += map(len, action_ids)
        log_probs = torch.stack([-part.sum() for part in minus_log.split(n_tokens)])
        return log_probs.split([len(action_ids) for _, action_ids in encoded])  # B tensors (K,)


# For these families test_twosome.py compares the tree with the definition. Others may measure the
# distance of two tokens by their places in the input, where other branches lie between (sliding
# windows, ALiBi), or read tokens strictly in order (state-space models).
TREE_FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2", "smollm3"]
TREE_FAMILIES += ["gpt2", "gpt_neox", "opt", "phi"]


def choose_scorer(model):
    """The tree, which changes the model, where it is known to be exact; else the rows."""
    family = model.config.model_type
    if family in TREE_FAMILIES and not getattr(model.config, "sliding_window", None):
        return TreeScorer(model)
    print(f"note: {family} is scored row by row, which is slower")
    return plain_log_probs


# === 10. Loading: an LM, without running a stranger's code, and an environment. ===================
@torch.no_grad()
def is_causal(model):
    """Two texts differ only in their third token. At the second token a causal LM predicts the same
    for both, and an encoder such as BERT does not."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=model.device)
    a, b = model(input_ids=ids).logits[:, 1].float()
    return torch.allclose(a, b, rtol=0.01, atol=0.01)


def load_lm(name, device="cpu", dtype="float32"):
    """Return (model, tokenizer) from a folder or the Hub."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(__file__).with_name(name) if name == "pocket_lm" else name

    # What the libraries print while loading is for their authors.
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a", return_offsets_mapping=True)["offset_mapping"]  # It fails if it has none.
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,  # A pickle could run a stranger's program.
            trust_remote_code=False,
            output_loading_info=True,
        )
        model.to(device)
    except Exception as error:  # A damaged folder can fail in any way, in any library.
        raise UserError(
            f"cannot load the LM {name} on {device} (--model takes the folder or Hub id of an LM, "
            f"--evaluate and --resume take the folder of a run): {error}"
        ) from error

    # transformers fills missing weights with random numbers.
    require(not loading["missing_keys"], f"{name} lacks weights: {loading['missing_keys']}")
    require(is_causal(model), f"{name} is no causal LM: its logits see later words, or are NaN")

    if Path(path).is_dir():
        model.name_or_path = Path(path).name  # LoRA's files shall name the LM, but no home folder.
    tokenizer.model_max_length = getattr(
        model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length
    )
    if model.num_parameters() < 1e7:
        torch.set_num_threads(1)  # Small matrices gain nothing from a second core.
    return model, tokenizer


ENVS = {"overcooked": OvercookedText, "virtualhome": VirtualHomeText}


def make_env(agent, settings):
    """An environment, wrapped for the agent, at the start of an episode."""
    return agent.wrapper(ENVS[settings.env](settings.task, settings.gamma), settings.gamma)


def make_agent(settings, agent_class=Agent, lora=add_lora):
    """Put the parts together: the LM, LoRA and critic, the scorer, and the rehearsal."""
    model, tokenizer = load_lm(settings.model, settings.device, settings.dtype)
    model = lora(model)
    coef = settings.rehearsal_coef
    rehearsal = Rehearsal(model, tokenizer.vocab_size, coef) if coef else None
    return agent_class(model, tokenizer, settings, choose_scorer(model), rehearsal)


# === 11. Several processes: each plays its own episodes, and averages keep their weights equal. ===
def start_processes():
    """Join the processes that this command has started:

        torchrun --nproc_per_node 2 twosome.py

    They begin with equal weights, because all use the same seed, and every gradient is averaged, so
    the weights stay equal. The KL divergence is averaged, so they stop an update together. Each has
    random numbers, episodes and minibatches of its own, and normalises its own advantages. Only the
    first one prints results and writes files. N processes make 1/N as many updates."""
    if N_PROCESSES > 1:
        if torch.cuda.is_available():  # one GPU for each process of a machine
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- only the first process speaks


def gather(value):
    """Return a list of the values that all processes have, by rank."""
    values = [value] * N_PROCESSES
    if N_PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


# === 12. A run: keep in a folder what is needed to go on, and what came out. ======================
def claim_folder(settings, method):
    """Make the folder that --out names, or the first free one in runs/, for all processes. mkdir
    fails where another program was faster, so that two new runs never share a folder."""
    label = settings.norm if method == "twosome" else method
    name = f"runs/{settings.task}-{label}-seed{settings.seed}"
    names = [settings.out] if settings.out else [name] + [f"{name}-{i}" for i in range(2, 1000)]
    claimed = None
    if RANK == 0:
        for path in map(Path, names):
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                claimed = path
                break
    claimed = gather(claimed)[0]  # the one of the first process
    require(claimed, f"{names[0]} exists; choose another --out, or --resume it")
    return claimed


class Run:
    """A folder with these files. All but the adapter's are written aside and then renamed, so that
    a kill leaves the old one or the new one, whole:

        config.json     the settings and the method
        metrics.csv     the log, a row for each update
        checkpoint.pt   all that is needed to go on
        adapter/        LoRA, in the format of peft
        summary.json    the settings, and the results before and after training"""

    def __init__(self, path, settings, method):
        self.path = Path(path)
        self.config = asdict(settings) | {"method": method}
        self.rows = []  # the log: the metrics of each update
        self.before = None  # the evaluation before training
        self.decisions = 0
        self.started = time.perf_counter()

    def rng(self, purpose):
        """Random numbers for one purpose. Each process has its own."""
        return random.Random(f"{purpose}, seed {self.config['seed']}, process {RANK}")

    def write(self, name, content):
        if RANK == 0:
            unfinished = self.path / f"{name}.tmp"
            unfinished.write_bytes(content)
            unfinished.replace(self.path / name)

    def log(self, metrics):
        clock = {"seconds": time.perf_counter() - self.started}
        self.rows.append({"decisions": self.decisions} | metrics | clock)
        table = io.StringIO()
        writer = csv.DictWriter(table, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self.write("metrics.csv", table.getvalue().encode())
        tqdm.write(f"update {len(self.rows)}: {describe(metrics)}")

    def save(self, agent, envs):
        """Save all that is needed to go on."""
        checkpoint = {
            "weights": trainable(agent),
            "actor_optimizer": agent.actor_optimizer.state_dict(),
            "critic_optimizer": agent.critic_optimizer.state_dict(),
            "envs": gather([env.env.get_state() for env in envs]),
            "log": (self.rows, self.before, self.decisions),
        }
        content = io.BytesIO()
        torch.save(checkpoint, content)
        self.write("config.json", json.dumps(self.config, indent=2).encode())
        self.write("checkpoint.pt", content.getvalue())

    def load(self, agent):
        """Put weights and optimisers back, and return the checkpoint."""
        path = self.path / "checkpoint.pt"
        try:
            # weights_only refuses a pickle that would run a program.
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, weight in trainable(agent).items():
                # view_as fails on another size; copy_ alone would stretch a smaller weight.
                weight.data.copy_(saved["weights"][name].view_as(weight))
            agent.actor_optimizer.load_state_dict(saved["actor_optimizer"])
            agent.critic_optimizer.load_state_dict(saved["critic_optimizer"])
        except Exception as error:  # A damaged file can fail in any way.
            raise UserError(
                f"{path} is missing, damaged, or of another LM or method: {error}"
            ) from error
        return saved

    def restore(self, agent, envs):
        """Go on from the checkpoint, if there is one. With the same --steps, on the same device,
        the results are those of an unbroken run, up to rounding. More --steps stretch the
        schedule."""
        if (self.path / "checkpoint.pt").exists():
            saved = self.load(agent)
            n = len(saved["envs"])
            require(n == N_PROCESSES, f"{self.path} was begun with {n} processes; use as many")
            for env, state in zip(envs, saved["envs"][RANK], strict=True):
                env.obs, env.info = env.env.set_state(state)
            self.rows, self.before, self.decisions = saved["log"]
            if self.rows:
                self.started -= self.rows[-1]["seconds"]  # The clock goes on.

    def save_adapter(self, agent):
        """Keep LoRA in the format of peft. A baseline has none."""
        if RANK == 0 and hasattr(agent.model, "save_pretrained"):
            agent.model.save_pretrained(self.path / "adapter", save_embedding_layers=False)

    def finish(self, after):
        """Write summary.json."""
        results = {"decisions": self.decisions, "before": self.before, "after": after}
        self.write("summary.json", json.dumps(self.config | results, indent=2).encode())


# === 13. What one sees at the end: one episode in full, and the means of a hundred. ===============
def show_episode(agent, new_env, rng):
    """Print one episode: each action that was taken, with its probability untrained and now."""
    env = new_env()
    print("\none episode (how probable each action was untrained, and now):")
    while not env.done:
        state = env.state()
        (log_pi,) = agent.cached_log_policy([state])
        with agent.model.disable_adapter():
            (untrained,) = agent.log_policy([state])
        a = sample(log_pi, rng)
        print(f"  {untrained[a].exp():.2f}  {log_pi[a].exp():.2f}  {state[1][a]}")
        env.step(a)
    print(f"  success: {env.info['success']}, discounted return {env.discounted_return:.3f}")


def report(agent, new_env, rng, title):
    """Play 100 episodes, print one more in full, then the means of the 100, and return them."""
    result = evaluate(agent, new_env, EVALUATION_EPISODES, rng)
    if hasattr(agent.model, "disable_adapter"):  # A baseline has no adapter.
        show_episode(agent, new_env, rng)
    print(f"\n{title}: {describe(result)}")
    return result


# === 14. Checks: most settings and the environment, before an LM is loaded. =======================
def make_settings(**values):
    """The settings, checked, and with those that depend on the task filled in."""
    settings = Settings(**values)
    require(settings.env in ENVS, f"--env {settings.env} is unknown: {', '.join(ENVS)}")
    env = ENVS[settings.env]
    settings.task = settings.task or env.TASKS[0]
    require(
        settings.task in env.TASKS,
        f"--task {settings.task} is none of {settings.env}'s: {', '.join(env.TASKS)}",
    )
    settings.gamma = env.GAMMA if settings.gamma is None else settings.gamma
    settings.steps = env.STEPS[settings.task] if settings.steps is None else settings.steps
    settings.model = settings.model.rstrip("/")
    if settings.model != "pocket_lm" and Path(settings.model).is_dir():
        settings.model = str(Path(settings.model).resolve())  # for --resume from elsewhere

    require(settings.norm in ("word", "token", "none"), f"--norm {settings.norm} is unknown")
    # Whole numbers are at least 1; steps, seed and fractions are at least 0.
    for name, kind in Settings.__annotations__.items():
        value = getattr(settings, name)
        if kind is not str:
            low = 1 if kind is int and name not in ("steps", "seed") else 0
            high = 1 if name in ("gamma", "gae_lambda") else 1e12  # 1e12 keeps infinity out.
            require(low <= value <= high, f"--{name} {value} is not between {low} and {high:g}")
    return settings


def try_env(settings):
    """Use each call of an environment once, before the LM is loaded."""
    try:
        env = make_env(Agent, settings)
        state = env.env.get_state()
        env.state()
        env.step(0)
        env.info["success"]  # a KeyError if it is missing
        env.env.set_state(state)
    except Exception as error:
        raise UserError(f"the environment {settings.env} does not work: {error!r}") from error


# === 15. The command line: train, go on with a run, or evaluate it. ===============================
def parse(argv, defaults):
    """Return (settings, resumed, evaluated).

        python twosome.py                  a new run: the defaults, and the flags that were typed
        python twosome.py --resume RUN     the settings of RUN; three flags may change
        python twosome.py --evaluate RUN   the settings of RUN, and the flags that were typed

    `resumed` and `evaluated` are the folders of these runs, or None."""
    parser = ArgumentParser(
        epilog="The other flags, with default and reason:\n" + inspect.getsource(Settings),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in fields(Settings):
        # SUPPRESS: --help shows the lines of Settings instead, and `given` holds what was typed.
        parser.add_argument(f"--{field.name}", type=field.type, default=SUPPRESS, help=SUPPRESS)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--resume", metavar="RUN", help="go on; with more --steps, further than planned"
    )
    modes.add_argument("--evaluate", metavar="RUN", help="play 100 other episodes")
    given = vars(parser.parse_args(argv))  # only what was typed
    resumed, evaluated = given.pop("resume"), given.pop("evaluate")
    if resumed:
        require(
            given.keys() <= {"steps", "device", "max_prompts"},
            "--resume goes only with --steps, --device and --max_prompts",
        )
    folder = resumed or evaluated
    values = read_config(folder, **given) if folder else defaults | given
    if evaluated:
        values["rehearsal_coef"] = 0.0  # No texts are written, because nothing is learned.
    return make_settings(**values), resumed, evaluated


def read_config(path, **changes):
    """The settings of a run, by name, with changes."""
    try:
        config = json.loads(Path(path, "config.json").read_text())
        del config["method"]
        Settings(**config)
        if changes.get("env", config["env"]) != config["env"]:  # It has other defaults.
            config |= {"task": None, "gamma": None, "steps": None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the folder of a run: {error!r}") from error
    return config | changes


# main reports these in one line. Any other error shows its traceback.
USER_ERRORS = UserError, OSError, KeyboardInterrupt, SafetensorError, torch.OutOfMemoryError


def main(argv=(), method="twosome", defaults=None, make_agent=make_agent, program="twosome.py"):
    """Train, or evaluate what was trained. From Python, agent = main(["--env", "virtualhome"]).
    The other arguments let experiments/ train other agents with the same command line."""
    run = evaluated = None
    try:
        # Find mistakes while they cost nothing, and claim a folder.
        settings, resumed, evaluated = parse(argv, defaults or {})
        try_env(settings)
        start_processes()
        path = resumed or evaluated or claim_folder(settings, method)
        run = Run(path, settings, method)

        torch.manual_seed(settings.seed)
        agent = make_agent(settings)
        new_env = partial(make_env, agent, settings)
        if evaluated:
            run.load(agent)
            report(agent, new_env, run.rng("other episodes"), f"other episodes of {settings.task}")
            return agent

        print(
            f"{settings.task} with {settings.model}, norm {settings.norm}, gamma {settings.gamma}, "
            f"seed {settings.seed}; all settings and results are in {path}"
        )
        train(agent, new_env, run)
        run.save_adapter(agent)
        run.finish(report(agent, new_env, run.rng("after training"), "after training"))
        print(f"More episodes: python {program} --evaluate {shlex.quote(str(path))}")
        return agent

    except USER_ERRORS as error:
        message = " ".join(str(error).split()) or "interrupted"
        if run and not evaluated:
            with suppress(OSError):
                run.path.rmdir()  # This removes only an empty folder: nothing was saved.
            if run.path.exists():
                start = "python" if N_PROCESSES == 1 else f"torchrun --nproc_per_node {N_PROCESSES}"
                message += f"; to go on: {start} {program} --resume {shlex.quote(str(run.path))}"
        sys.exit(f"{program}: {message}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(AttributeError):  # Windows has no SIGPIPE.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may leave early.
    main(sys.argv[1:], program=sys.argv[0])
