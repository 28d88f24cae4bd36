"""TWOSOME in one file: a language model learns to act, by practice.

A language model knows what people usually do. It does not know what works here. TWOSOME (Tan et
al., ICLR 2024, arXiv 2401.14151) asks it for the probability of every action that the
environment offers, as the ending of one sentence, and makes a policy of these probabilities. From
then on it is ordinary reinforcement learning: act, see what was rewarded, and nudge a small
adapter (LoRA) so that rewarded endings become likelier. The model itself stays frozen.

    python twosome.py --env overcooked                              # 10 s on two CPU cores
    python twosome.py --env overcooked --task tomato-lettuce-salad  # ten right decisions in a row
    python twosome.py --env virtualhome --task food-preparation
    python twosome.py --env virtualhome --task entertainment
    python twosome.py --env overcooked --model HuggingFaceTB/SmolLM2-135M --device cuda
    python twosome.py --watch runs/tomato-salad-word-seed1          # see the agent decide
    python twosome.py --evaluate runs/tomato-salad-word-seed1       # 100 more episodes of a run
    python twosome.py --resume runs/tomato-salad-word-seed1         # go on where it stopped

Sections 1 to 4 are the whole algorithm and know nothing of files; a student can stop there.
0 arguments · 1 prompts · 2 scoring · 3 the actor-critic · 4 PPO · 5 a training run ·
6 baselines · 7 evaluation · 8 watching · 9 the command line
"""

import argparse
import bisect
import csv
import difflib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import warnings
import weakref
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

try:
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object, reduce
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file
    from torch.nn.utils.rnn import pad_sequence
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging
except ImportError as error:
    raise SystemExit(f"twosome.py: {error}; pip install -r requirements.txt brings it") from None

from overcooked_text import OvercookedText
from virtualhome_text import VirtualHomeText

ENVS = {"overcooked": OvercookedText, "virtualhome": VirtualHomeText}


class UserError(Exception):
    """A mistake that its user can mend; the command line prints it as one line."""


# ==================================================================================================
# 0. Arguments: every knob, the reason for its value, and the paper's value. To look up.
# ==================================================================================================

def knob(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Args:
    env: str = knob("overcooked", "the environment", ENVS)
    task: str = knob("", "a task of the environment; without it, its first one")
    method: str = knob("twosome", "twosome, or one of the baselines of section 6",
                       ("twosome", "ppo", "saycan", "zero-shot", "random"))
    norm: str = knob("word", "divide an action's log-probability by its words (the paper's best), "
                     "by its tokens, or not at all", ("word", "token", "none"))
    model: str = knob("pocket_lm", "a folder or a Hub id of any causal LM; paper: LLaMA-7B; ours: "
                      "pocket_lm, which comes with this file and needs no download")
    steps: int = knob(0, "environment steps (decisions); without it, the task's own number; "
                      "paper: 500,000 Overcooked, 50,000 and 200,000 VirtualHome")
    seed: int = knob(1, "seed of everything random: LoRA, critic, sampled actions, minibatches")
    out: str = knob("", "the run's folder; without it, a new one under runs/")
    device: str = knob("auto", "auto takes cuda, then mps, then cpu",
                       ("auto", "cpu", "cuda", "mps"))
    dtype: str = knob("float32", "precision of the frozen LLM; LoRA and critic are always float32; "
                      "paper: float16 throughout", ("float32", "bfloat16"))
    # --- rollout
    n_envs: int = knob(8, "environments played side by side; paper: 4; the scores of a state are "
                       "remembered, so more environments are almost free")
    rollout_steps: int = knob(64, "decisions of each environment between two updates; paper: 32; "
                              "ours is longer so that a rollout holds whole episodes")
    # --- returns
    gamma: float = knob(0.95, "discount per time step of the environment; Overcooked: 0.99; paper: "
                        "the same")
    gae_lambda: float = knob(0.95, "bias against variance of the advantage; paper: the same")
    bootstrap_time_limit: bool = knob(
        True, "at the time limit add the critic's value of the state reached; paper: it is an end")
    advantage_eps: float = knob(
        1.0, "added to the standard deviation that advantages are divided by; paper: 1e-8, which "
        "blows the critic's smallest errors up to full-size steps where nothing is earned; ours is "
        "large beside a standard deviation of 0.1 to 0.3: it leaves advantages nearly as they are")
    # --- update. A small LM must move much further from its prior than LLaMA-7B, hence the rates.
    policy_lr: float = knob(2e-3, "LoRA's learning rate; paper: 5e-7 and 1e-6, for 7B parameters")
    value_lr: float = knob(1e-3, "the critic's learning rate; paper: 1e-5 and 5e-5")
    epochs: int = knob(4, "passes over a rollout; paper: 1, which wastes data at our small scale")
    minibatches: int = knob(2, "optimiser steps per pass; paper: 4. A state that occurs often in a "
                            "minibatch costs one forward pass, so large minibatches are cheap")
    max_prompts: int = knob(4, "states that go through the LLM at once: memory grows with it, the "
                            "numbers stay the same but for rounding; paper: 4")
    clip_coef: float = knob(0.2, "PPO's clipping of the ratio and of the value; paper: the same")
    ent_coef: float = knob(0.0, "weight of the entropy bonus; paper: 0.01; with --norm word a "
                           "small LM's policy explores enough, and as long as nothing is earned "
                           "the bonus alone would move it, away from what the LM knows")
    vf_coef: float = knob(0.5, "weight of the value loss; matters to max_grad_norm only, as the "
                          "critic has an Adam of its own, blind to scale; paper: the same")
    target_kl: float = knob(0.02, "stop the policy's update beyond this KL; paper: the same")
    max_grad_norm: float = knob(0.5, "gradient clipping; paper: the same")


# Decisions in which pocket_lm learns each task, chosen on seeds that no reported run uses.
TASK_STEPS = {"tomato-salad": 5_120, "tomato-lettuce-salad": 12_800,
              "food-preparation": 5_120, "entertainment": 30_720}
# What an environment or a baseline has of its own; a flag overrides it. PPO's were searched as
# TWOSOME's were, on the same seeds (all trials: experiments/results/search.csv).
OWN_KNOBS = {"overcooked": {"gamma": 0.99},
             "ppo": {"policy_lr": 1e-3, "epochs": 10, "minibatches": 4, "ent_coef": 0.01,
                     "target_kl": 0.05, "advantage_eps": 0.1},
             "saycan": {"epochs": 10, "minibatches": 4}}


# ==================================================================================================
# 1. Prompts: what the agent perceives becomes the first half of a sentence, each action ends it.
# ==================================================================================================

def build_prompt(obs: str, goal: str) -> str:
    """Return the prompt, an unfinished sentence; a space and an action finish it.

    The paper (section 4.4) gives four principles. The environments follow them when they word
    `obs` and the actions:
    1. Cohesive: "... your next step is to" + " chop the tomato" reads as one fluent sentence,
       so the LM does what it was trained for: it goes on with a text.
    2. Articles: "pick up the tomato", as people write, not "pick up tomato".
    3. Preferred words: what is in view is named in the observation by the words of the actions. If
       the text says "a bowl", the action says "the bowl", never "the plate".
    4. Alternative actions: one action is worded by the situation. Going to the board is "walk to
       the cutting board" with empty hands and "put the raw tomato on the cutting board" with full.

    >>> build_prompt("You hold the raw tomato.", "make a soup")
    'You hold the raw tomato. To make a soup, your next step is to'
    """
    return f"{obs} To {goal}, your next step is to"


# ==================================================================================================
# 2. Scoring: how likely is each action as the ending of the prompt, in the eyes of the LM?
# ==================================================================================================

# In shapes: B states with K actions each, L tokens in a row, H hidden units, V words to predict.

@functools.lru_cache(maxsize=100_000)  # the same states come back all the time
def encode(tokenizer, prompt: str, actions: tuple[str, ...]):
    """Return (prompt_ids, [action_ids, ...]): the tokens of a prompt and of each of its endings.

    Both are tokenised as one text, which is what the LM was trained on: most tokenizers put the
    space between words into the next word's token. Where the prompt ends is then read off the
    character offsets. (The authors' code counts the tokens of the action alone and takes 1 off for
    BOS: one too few where a tokenizer has no BOS.)

    Raises UserError if a token holds letters of both, or if the action changes the prompt's own
    tokens: P(action | prompt) is then not defined.
    """
    end, prompt_ids, action_ids = len(prompt), None, []
    batch = tokenizer([f"{prompt} {action}" for action in actions], return_offsets_mapping=True)
    for action, ids, offsets in zip(actions, batch["input_ids"], batch["offset_mapping"]):
        first = next((i for i, (start, _) in enumerate(offsets) if start >= end), len(ids))
        # The space at `end` may close the prompt's last token or open the action's first one.
        if (any(start < end and stop > end + 1 for start, stop in offsets)
                or prompt_ids not in (None, ids[:first])):
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} puts the end of the prompt "
                            f"and the beginning of {action!r} into one token, so the action has no "
                            "probability of its own; choose a model whose tokens end with words")
        prompt_ids = ids[:first]
        # Special tokens that a tokenizer appends (EOS) have the offsets (0, 0): not the action's.
        action_ids.append([i for i, (start, _) in zip(ids, offsets) if start >= end])
    return prompt_ids, action_ids


def plain_log_probs(model, encoded) -> list[torch.Tensor]:
    """The definition: one row for each (prompt, action), R in all, each wholly through the LM.

        log P(a | s) = sum_i log P(w_i | s, w_1 ... w_{i-1})                     (paper, Eq. 1)

    encoded: B pairs from `encode`. Returns B float32 tensors (K_b,).
    """
    pad = lambda rows: pad_sequence([*map(torch.tensor, rows)], batch_first=True).to(model.device)
    rows = [prompt + action for prompt, actions in encoded for action in actions]
    ids, real = pad(rows), pad([[1] * len(row) for row in rows])  # (R, L), filled with 0
    starts = pad([[len(prompt)] for prompt, actions in encoded for _ in actions])  # (R, 1)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits  # (R, L, V)
    # The logits at column t predict the token at column t + 1.
    log_p = F.log_softmax(logits[:, :-1].float(), dim=-1)  # (R, L-1, V)
    log_p = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (R, L-1)
    is_action = (real.cumsum(-1) > starts)[:, 1:] & (real[:, 1:] == 1)  # (R, L-1)
    return list((log_p * is_action).sum(-1).split([len(actions) for _, actions in encoded]))


def as_tree(encoded):
    """Merge the rows of the definition where they begin alike, into a tree of L columns.

        To make a salad, your next step is to -+- chop the -+- egg
                                               |            +- tomato
                                               +- wait

    Returns ids (L,), the token of each column; sees (L, L), True for the column itself and those
    before it on its branch; and for each token of each action the column that predicts it, and the
    token. (An action's last token predicts nothing, so "egg", "tomato", "wait" get no column.)
    """
    columns, sources, targets = {}, [], []  # columns: (column of the token before, token) -> column
    for prompt, actions in encoded:
        for action in actions:
            column = -1  # the root, before the first token
            for i, token in enumerate(prompt + action, start=1):
                if i > len(prompt):
                    sources.append(column)
                    targets.append(token)
                if i < len(prompt) + len(action):
                    column = columns.setdefault((column, token), len(columns))
    sees = np.eye(len(columns), dtype=bool)  # a column comes after the one that it continues
    for column, (before, _) in enumerate(columns):
        if before >= 0:
            sees[column] |= sees[before]
    return [token for _, token in columns], sees, sources, targets


def packed_log_probs(model, encoded) -> list[torch.Tensor]:
    """The efficient way: the same numbers, with each distinct beginning computed once.

    Tokens influence each other only through attention. Here a token may look only at the tokens
    before it on its own branch of the tree (the softmax of attention gives all others weight 0),
    and its position says how many these are. So it computes what it would in a row of its own; but
    the prompt, by far the longest part, is computed once instead of K times, and so is whatever
    else the B states begin with.
    """
    ids, sees, sources, targets = as_tree(encoded)
    tensor = functools.partial(torch.tensor, device=model.device)
    sees = tensor(sees)  # (L, L)
    # Added to the attention scores. finfo.min and not -inf, which some kernels turn into NaN.
    mask = torch.zeros_like(sees, dtype=model.dtype).masked_fill(
        ~sees, torch.finfo(model.dtype).min)
    # The decoder is the LM without its vocabulary matrix. LoRA sits inside its layers.
    hidden = model.get_decoder()(
        input_ids=tensor([ids]), attention_mask=mask[None, None], use_cache=False,
        position_ids=sees.sum(-1)[None] - 1).last_hidden_state[0]  # (L, H)
    # Logits only in the M columns that predict an action's token, once for all asked for there.
    columns, source = tensor(sources).unique(return_inverse=True)
    log_p = F.log_softmax(model.get_output_embeddings()(hidden[columns]).float(), dim=-1)  # (M, V)
    token_log_probs = log_p[source, tensor(targets)]  # one for each token of each action
    lengths = [len(action) for _, actions in encoded for action in actions]
    log_probs = torch.stack([part.sum() for part in token_log_probs.split(lengths)])
    return list(log_probs.split([len(actions) for _, actions in encoded]))


def action_log_probs(model, tokenizer, prompts: list[str], actions: list[list[str]],
                     max_prompts: int = 4):
    """Joint log-probability of each action's tokens after its prompt (paper, section 4.1).

    prompts: B strings; actions: B lists of K_b strings, K_b may differ. They go through the LM
    max_prompts at a time: more share more, but attention costs the square of the tree's size.
    Returns (log_probs, n_tokens): B float32 tensors (K_b,), in nats, with gradients; and B int
    tensors (K_b,), the number of tokens of each action. No end mark is scored: "wait" is never less
    likely than "wait here". Works for any Hugging Face causal LM with a fast tokenizer: where an
    architecture cannot be packed, section 5 (may_pack) finds out and the definition is used.
    """
    encoded = [encode(tokenizer, p, tuple(a)) for p, a in zip(prompts, actions, strict=True)]
    log_probs = []
    for i in range(0, len(encoded), max_prompts):
        chunk = encoded[i:i + max_prompts]
        score = packed_log_probs if may_pack(model, chunk) else plain_log_probs
        log_probs += score(model, chunk)
    return log_probs, [torch.tensor([len(action) for action in some]) for _, some in encoded]


def normalize(log_probs, n_tokens, n_words, norm: str) -> list[torch.Tensor]:
    """Make actions of different length comparable; the policy is the softmax of the result.

    A product of more factors is smaller: without normalisation a long action is punished for its
    length. Dividing a sum of logs by n takes the n-th root of the product: the probability of the
    action's average token or word. Per token (Eq. 3), a long word that is cut in pieces is
    rewarded, because all pieces but the first are nearly certain. Per word (Eq. 4) does neither.

    log_probs, n_tokens, n_words: B tensors (K_b,) each. Returns B tensors (K_b,).

    A worked example. After the prompt the LM gives "chop" 0.5, "the" after it 0.8 and "egg" after
    that 0.1, so P("chop the egg") = 0.04; and it gives "wait" 0.06. As they are, "wait" wins; per
    word it is 0.04^(1/3) = 0.34 against 0.06. (Here tokens are words.)

    >>> log_probs, lengths = [torch.tensor([0.5 * 0.8 * 0.1, 0.06]).log()], [torch.tensor([3, 1])]
    >>> [F.softmax(normalize(log_probs, lengths, lengths, n)[0], -1) for n in ("none", "word")]
    [tensor([0.4000, 0.6000]), tensor([0.8507, 0.1493])]
    """
    if norm == "none":
        return log_probs
    lengths = {"token": n_tokens, "word": n_words}[norm]
    return [log_prob / length.to(log_prob.device) for log_prob, length in zip(log_probs, lengths)]


# ==================================================================================================
# 3. The actor-critic: one frozen LM carries both, LoRA turns it into the actor, an MLP reads it.
# ==================================================================================================

def add_lora(model: nn.Module) -> nn.Module:
    """Wrap the LM with LoRA on its query and value projections, as the paper does.

    LoRA replaces a frozen matrix W by W + (alpha / r) B A, with A (r, in) random and B (out, r)
    zero at first: before training the wrapped LM is the LM itself. peft freezes all but A and B.
    """
    # Rank r, alpha, dropout: the paper's. peft keeps A and B in float32, also over a bfloat16 LM:
    # in half precision a step of 5e-7, the paper's rate, would leave a weight of 0.01 as it is.
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, bias="none",
                                            task_type="CAUSAL_LM", **lora_targets(model)))


class Agent(nn.Module):
    """Policy and value of a state, both from the same frozen LM.

    Trained: LoRA (by the policy's loss) and the critic (by the value's loss). Nothing else.
    """

    def __init__(self, model: nn.Module, tokenizer, norm: str = "word", max_prompts: int = 4):
        super().__init__()
        self.model, self.tokenizer = add_lora(model).eval(), tokenizer  # eval: no dropout
        self.norm, self.max_prompts = norm, max_prompts
        self.critic = nn.Sequential(
            nn.Linear(model.get_output_embeddings().weight.shape[1], 1024), nn.ReLU(),  # from H
            nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1)).to(model.device)
        # The critic starts at V = 0. So as long as no reward was met, all advantages are exactly 0.
        # Those of a random critic would be its errors, and following them spoils what the LM knows.
        nn.init.zeros_(self.critic[-1].weight)
        nn.init.zeros_(self.critic[-1].bias)
        self.features_memory = {}  # prompt -> (H,): never changes, the LM is frozen
        self.policy_memory = {}    # (prompt, actions) -> (K,): holds until LoRA changes

    def log_policy(self, states: list[tuple[str, tuple[str, ...]]]) -> list[torch.Tensor]:
        """log pi(. | s) for B states (prompt, actions): B tensors (K_b,), with gradients."""
        prompts, actions = zip(*states)
        log_probs, n_tokens = action_log_probs(self.model, self.tokenizer, prompts, actions,
                                               self.max_prompts)
        n_words = [torch.tensor([len(a.split()) for a in offered]) for offered in actions]
        scores = normalize(log_probs, n_tokens, n_words, self.norm)
        # pi(a | s) = exp(score_a) / sum_b exp(score_b)                       (Eq. 2, 3 or 4)
        return [F.log_softmax(score, dim=-1) for score in scores]

    @torch.no_grad()
    def remembered_log_policy(self, states) -> list[torch.Tensor]:
        """The same without gradients. Between two updates the policy is fixed: each distinct
        state goes through the LM once, however often it is visited."""
        if new := sorted(set(states) - self.policy_memory.keys()):  # neighbours begin alike
            self.policy_memory |= zip(new, (policy.cpu() for policy in self.log_policy(new)))
        return [self.policy_memory[s] for s in states]

    @torch.no_grad()
    def features(self, prompts: list[str]) -> torch.Tensor:
        """What the critic sees, (B, H): the last hidden state of the prompt's last token.

        That token is the only one that has seen the whole prompt. The adapter is off: with it on,
        each policy update would change the critic's input under its feet (and what is remembered
        here would be out of date); off, a prompt's features are constants, computed only once.
        One prompt at a time: a state's value must not depend on its batch (as it does where column
        -1 of padded rows is read), not even in the last bit, or a resumed run would differ.
        """
        for prompt in dict.fromkeys(p for p in prompts if p not in self.features_memory):
            ids, _ = encode(self.tokenizer, prompt, ("wait",))  # the same ids before any action
            ids = torch.tensor([ids], device=self.model.device)
            with self.model.disable_adapter():
                hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            self.features_memory[prompt] = hidden[0, -1].float()
        return torch.stack([self.features_memory[p] for p in prompts])

    def value(self, prompts: list[str]) -> torch.Tensor:
        """V(s) for B prompts: (B,) float32, with gradients for the critic only."""
        return self.critic(self.features(prompts)).squeeze(-1)


# ==================================================================================================
# 4. PPO: play with the present policy, judge each decision by what followed, move a little.
# ==================================================================================================

# One update is: rollout = collect(...); update_policy(...), which steps LoRA's Adam; and
# update_value(...), which steps the critic's. `train` in section 5 repeats it, with learning rates
# that fall linearly.

class Episode:
    """One environment being played: its present state in words, and what it has earned.

    An environment has Gymnasium's reset and step. Its info["actions"] maps the index of each action
    that it offers now to a phrase, info["primitive_steps"] is how long the last one took.
    """

    def __init__(self, env, gamma: float):
        self.env, self.gamma = env, gamma
        self.start()

    def start(self):
        self.obs, self.info = self.env.reset()
        self.ret, self.length = 0.0, 0

    @property
    def state(self) -> tuple[str, tuple[str, ...]]:
        """What the agent is shown: the prompt, and the phrases of the offered actions."""
        return build_prompt(self.obs, self.env.goal), tuple(self.info["actions"].values())

    def act(self, chosen: int):
        """Take the chosen one of the K offered actions: reward, discount, terminated, truncated.

        An Overcooked action is a macro-action ("chop" is three strokes) of k primitive steps; the
        environment discounts its reward inside, and what comes after it is discounted by gamma^k:
        a semi-Markov decision process.
        """
        action = list(self.info["actions"])[chosen]  # its index among all actions
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        k = self.info["primitive_steps"]
        self.ret += self.gamma ** self.length * reward
        self.length += k
        return reward, self.gamma ** k, terminated, truncated


@dataclass
class Rollout:
    """T decisions of N environments; lists and tensors of length T * N, step by step."""
    states: list            # (prompt, actions)
    chosen: torch.Tensor    # index into actions
    log_prob: torch.Tensor  # of the chosen action, under the policy that chose it
    value: torch.Tensor     # V(s_t)
    advantage: torch.Tensor
    returns: torch.Tensor   # advantage + value: what the critic should have said
    episodes: list          # (success, discounted return, length) of each that ended


def gae(reward, discount, value, next_value, done, gae_lambda):
    """Generalised advantage estimation for macro-actions (Schulman et al., 2016). All (T, N).

        delta_t = r_t + gamma^k_t V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma^k_t lambda A_{t+1}, cut where an episode ends

    discount is gamma^k_t. next_value is V of the state that the step led to, 0 where the episode
    really ended. done is 1 at both kinds of end, success and time limit: nothing flows back from
    the next episode. With k_t = 1 it is the textbook's.

    A worked example, gamma 0.5, lambda 1, V = 0.2 and 0.4: a step of k = 2, then one of k = 1 that
    earns 1 and ends. The last advantage is 1 - 0.4 = 0.6; the one before it is
    0.25 * 0.4 - 0.2 + 0.25 * 1 * 0.6 = 0.05.

    >>> column = lambda *x: torch.tensor(x)[:, None]
    >>> gae(column(0., 1.), column(.25, .5), column(.2, .4), column(.4, 0.), column(0., 1.), 1.0)
    tensor([[0.0500],
            [0.6000]])
    """
    advantage, following = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + discount[t] * next_value[t] - value[t]
        following = delta + discount[t] * gae_lambda * (1 - done[t]) * following
        advantage[t] = following
    return advantage


def sample(log_policy: torch.Tensor, u: float) -> int:
    """Draw one of the K offered actions from log pi (K,); u is uniform in [0, 1)."""
    cumulative = list(itertools.accumulate(log_policy.exp().tolist()))  # ends near 1: rounding
    if not cumulative[-1] > 0:  # also true of NaN
        raise UserError("the probabilities of the actions are not finite numbers")
    return bisect.bisect(cumulative, u * cumulative[-1], 0, len(cumulative) - 1)


def collect(agent: Agent, playing: list[Episode], args: Args, rng: random.Random) -> Rollout:
    """Play `rollout_steps` decisions in each environment and judge them.

    Several processes (accelerate) play environments of their own, with random numbers as if one
    process played them all, and then tell each other everything.
    """
    team, steps, episodes = PartialState(), [], []  # a team of 1, mostly
    for _ in range(args.rollout_steps):
        now = [episode.state for episode in playing]
        draws = [[rng.random() for _ in playing] for _ in range(team.num_processes)]
        draws = draws[team.process_index]
        steps.append([])
        for episode, state, policy, u in zip(playing, now, agent.remembered_log_policy(now), draws):
            action = sample(policy, u)
            reward, discount, terminated, truncated = episode.act(action)
            next_prompt = episode.state[0]  # before a new episode starts
            # The time limit is not part of the state, so it is no reason for a state to be worth
            # nothing: what would have followed is estimated by the critic. A success is the end.
            end = terminated or (truncated and not args.bootstrap_time_limit)
            steps[-1].append((state, action, policy[action].item(), reward, discount,
                              terminated or truncated, end, next_prompt))
            if terminated or truncated:
                episodes.append((episode.info["success"], episode.ret, episode.length))
                episode.start()
    played, finished = zip(*gather_object([(steps, episodes)]))  # one entry a process
    decisions = sum(itertools.chain(*zip(*played)), [])  # by time, then by environment
    states, chosen, log_prob, reward, discount, done, end, next_prompts = zip(*decisions)
    with torch.no_grad():
        value = agent.value([prompt for prompt, _ in states]).cpu()
        next_value = agent.value(next_prompts).cpu() * ~torch.tensor(end)
    grid = lambda x: torch.as_tensor(x, dtype=torch.float32).view(len(steps), -1)  # (T, N)
    advantage = gae(*map(grid, (reward, discount, value, next_value, done)),
                    args.gae_lambda).flatten()
    return Rollout(states, torch.tensor(chosen), torch.tensor(log_prob), value, advantage,
                   advantage + value, sum(finished, []))


def minibatches(n: int, args: Args, rng: random.Random):
    """In each epoch the numbers 0 ... n-1, shuffled and cut into nearly equal parts."""
    for _ in range(args.epochs):
        order = rng.sample(range(n), n)
        for i in range(args.minibatches):
            yield order[i::args.minibatches]


def update_policy(agent: Agent, optimizer, rollout: Rollout, args: Args, rng) -> dict:
    """Move LoRA towards decisions that turned out better than expected, but not far.

        r = pi(a|s) / pi_old(a|s)
        L = -mean min(r A, clip(r, 1 - eps, 1 + eps) A) - c_ent * mean H(pi(. | s))

    On the first minibatch pi is pi_old and r is 1; it moves with each step, and clipping removes
    the incentive to move it further than eps.
    """
    # Normalised over the whole rollout. (The authors' code does it over 4 decisions, where the sign
    # of an advantage depends on its three neighbours.) Where nothing is earned, advantages are the
    # critic's errors: divided by their own standard deviation they would weigh like a success.
    # Adam does not undo it: it divides by the size of past gradients too, not of these alone.
    advantages = rollout.advantage - rollout.advantage.mean()  # (T * N,)
    advantages = advantages / (advantages.std() + args.advantage_eps)
    team, log = PartialState(), []
    weights = [p for p in agent.model.parameters() if p.requires_grad]
    for batch in minibatches(len(rollout.states), args, rng):
        # Each distinct state goes through the LM once; its decisions share the result.
        decisions = {}
        for i in batch:
            decisions.setdefault(rollout.states[i], []).append(i)
        # Sorted, neighbours begin alike and share most of their tree. Each process has its share.
        distinct = sorted(decisions)[team.process_index::team.num_processes]
        sums = torch.zeros(4, device=weights[0].device)
        optimizer.zero_grad()
        for j in range(0, len(distinct), agent.max_prompts):
            chunk = distinct[j:j + agent.max_prompts]
            policies = agent.log_policy(chunk)  # B tensors (K_b,)
            # The n decisions taken in these B states: which state, and which of the rollout.
            row = torch.tensor([b for b, s in enumerate(chunk) for _ in decisions[s]])  # (n,)
            index = torch.tensor([i for s in chunk for i in decisions[s]])  # (n,)
            padded = pad_sequence(policies, batch_first=True)  # (B, longest K)
            new_log_prob = padded[row, rollout.chosen[index]]  # (n,)
            entropy = torch.stack([-(p.exp() * p).sum() for p in policies])[row]  # (n,)
            log_ratio = new_log_prob - rollout.log_prob[index].to(new_log_prob.device)
            ratio, advantage = log_ratio.exp(), advantages[index].to(log_ratio.device)
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            surrogate = torch.min(ratio * advantage, clipped * advantage)
            loss = -(surrogate + args.ent_coef * entropy).sum() / len(batch)
            loss.backward()  # the gradients of the chunks add up
            kl = ratio - 1 - log_ratio  # an estimate of KL(pi_old || pi) that is never below 0
            sums += torch.stack([-surrogate.sum(), entropy.sum(), kl.sum(),
                                 (ratio != clipped).sum()]).detach()
        log.append(add_up(weights, sums) / len(batch))  # and so do those of several processes
        if log[-1][2] > args.target_kl:  # the KL
            break  # far enough; this step is not taken
        nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        optimizer.step()
    agent.policy_memory.clear()
    return dict(zip(("policy_loss", "entropy", "approx_kl", "clip_fraction"),
                    torch.stack(log).mean(0).tolist()))


def update_value(agent: Agent, optimizer, rollout: Rollout, args: Args, rng) -> dict:
    """Move the critic towards the returns; of the clipped and the plain error the larger counts,
    so that V, like the policy, has no reason to move further than eps in one update. (Of several
    processes each does the whole of this: it is little, and the same for all.)

        L = c_vf * mean 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)
    """
    losses, features = [], agent.features([prompt for prompt, _ in rollout.states])
    old, returns = rollout.value.to(features.device), rollout.returns.to(features.device)
    for batch in minibatches(len(returns), args, rng):
        value = agent.critic(features[batch]).squeeze(-1)
        clipped = old[batch] + (value - old[batch]).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max((value - returns[batch]) ** 2, (clipped - returns[batch]) ** 2)
        loss = args.vf_coef * 0.5 * error.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    # 1: the critic explains all of the returns' variance; 0: as good as their mean; below: worse.
    explained = 1 - (rollout.returns - rollout.value).var() / (rollout.returns.var() + 1e-8)
    return {"value_loss": float(np.mean(losses)), "explained_variance": explained.item()}


# ==================================================================================================
# 5. A training run: rollout, update, one row of the log; and a folder from which it can go on.
# ==================================================================================================

METRICS = ["update", "env_steps", "episodes", "success", "return", "length", "policy_loss",
           "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance",
           "steps_per_second", "seconds"]
EVALUATION_EPISODES = 100   # before training and after it


def write_json(path: Path, content: dict):
    """A kill at any moment leaves old or new, never half of it."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def write_metrics(run: Path, rows: list[dict]):
    with open(run / "metrics.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, METRICS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(run / "metrics.tmp", run / "metrics.csv")


def load_lm(name: str, device: str, dtype: str):
    """Return (model, tokenizer) from a folder or the Hub. Only safetensors, never remote code."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    device = next(d for d in found if found[d]) if device == "auto" else device
    if not found[device]:
        raise UserError(f"--device {device}: torch finds no {device.upper()} device here")
    name = str(Path(__file__).resolve().parent / name) if name == "pocket_lm" else name
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{name!r} is not a model folder: it has no config.json")
    if not folder.exists() and (name.count("/") != 1 or name.startswith((".", "~"))):
        raise UserError(f"no model folder {name}; give a folder or a Hub id such as owner/name")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, for their authors
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:  # a damaged folder can fail in any way, in any library
        raise UserError(f"cannot load the model {name}: {' '.join(str(error).split())[:300]}"
                        ) from error
    # transformers would fill these up with random numbers.
    if wrong := [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]:
        raise UserError(f"the model {name} is not whole: {len(wrong)} of its weights, such as "
                        f"{min(wrong)}, are missing or of another size than its config.json says")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"the model {name} has weights that are not finite numbers")
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name} reports no character offsets (it is not a fast "
                        "one), so the end of the prompt cannot be found; choose another model")
    if tokenizer.vocab_size > model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the tokenizer of {name} knows more tokens than its model; they do not "
                        "belong together")
    model = model.to(PartialState().device if device == "cuda" else device)
    # An encoder such as BERT would judge a word by the words behind it.
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]], device=model.device)
    with torch.no_grad():
        a, b = model(input_ids=ids, attention_mask=torch.ones_like(ids),
                     use_cache=False).logits[:, 1].float()
    if (a - b).abs().max() > a.abs().max() * (1e-4 if model.dtype == torch.float32 else 0.1):
        raise UserError(f"{name} is no causal LM: what it says about a word depends on later words")
    return model, tokenizer


def lora_targets(model: nn.Module) -> dict:
    """Where LoRA goes: the query and value projections, by the names of this architecture."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = ["q_proj", "v_proj"]
    if not names.issuperset(targets):  # GPT-2, BLOOM, ... name or fuse these projections otherwise
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(
            model.config.model_type, "all-linear")
    # Mamba's kernel reads out_proj directly, past any LoRA, so peft refuses to adapt it.
    return {"target_modules": targets,
            "exclude_modules": ["out_proj"] if targets == "all-linear" else None}


def add_up(weights: list[nn.Parameter], sums: torch.Tensor) -> torch.Tensor:
    """Of several processes each has the gradients and sums of its share: now all have the whole."""
    if PartialState().num_processes == 1:
        return sums
    for p in weights:
        p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
    return reduce(sums, "sum")


# Not every LM may be packed (section 2): sliding windows count columns, ALiBi ignores positions, a
# state-space model has no mask. So each model is compared with the definition at its first use, and
# again when a tree or a plain row is longer than any before.
# model -> (longest tree, longest plain row) that agreed, in tokens; None: never pack
packed_is_exact_up_to = weakref.WeakKeyDictionary()


@torch.no_grad()
def may_pack(model, encoded) -> bool:
    """Does packing give the defined numbers for this model, on a tree as large as this?

    Raises UserError if a row is longer than the model can read, packed or not."""
    row = max(len(prompt) + max(map(len, actions)) for prompt, actions in encoded)
    context = getattr(model.config, "max_position_embeddings", None) or row
    if row > context:
        raise UserError(f"a prompt with its action has {row} tokens and this model reads at most "
                        f"{context}; choose a model with a longer context")
    known = packed_is_exact_up_to.get(model, (0, 0))
    if known is None:
        return False
    size = len(as_tree(encoded)[0]), row
    if size[0] <= known[0] and size[1] <= known[1]:
        return True
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1  # bfloat16 rounds to 3 digits
    defined = [plain_log_probs(model, [one])[0] for one in encoded]
    try:
        same = all(torch.allclose(a, b, rtol=tolerance / 10, atol=tolerance)
                   for a, b in zip(packed_log_probs(model, encoded), defined))
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        same = False  # this architecture does not take a mask or positions of ours at all
    packed_is_exact_up_to[model] = tuple(map(max, size, known)) if same else None
    if not same:
        print("note: this LM cannot be packed; scoring one row for each action, "
              "which is slower and gives the same numbers", file=sys.stderr)
    return same


def make_episode(args: Args) -> Episode:
    # Overcooked discounts inside its macro-actions; a household action is a single step.
    options = {"gamma": args.gamma} if args.env == "overcooked" else {}
    kind = {"ppo": SymbolicEpisode, "saycan": SkillEpisode}.get(args.method, Episode)
    return kind(ENVS[args.env](task=args.task, **options), args.gamma)


def make_agent(args: Args) -> Agent:
    episode = make_episode(args)
    n_inputs, n_actions = len(episode.info["vector"]), episode.env.n_actions
    if args.method == "ppo":
        return SymbolicAgent(n_inputs, n_actions)
    if args.method == "random":
        return RandomAgent()
    model, tokenizer = load_lm(args.model, args.device, args.dtype)
    llm = Agent(model, tokenizer, args.norm, args.max_prompts)
    with torch.no_grad():  # what this LM cannot do is found out before a folder is made
        prompt, actions = Episode.state.fget(episode)
        llm.log_policy([(prompt, actions)]), llm.value([prompt])
    return SayCan(llm, n_inputs, n_actions) if args.method == "saycan" else llm


def trained_parameters(agent: Agent) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name: LoRA and the critic."""
    return {name: p for name, p in agent.named_parameters() if p.requires_grad}


def save_checkpoint(run: Path, agent: Agent, optimizers: dict, progress: dict):
    """Write all that a resume needs into one file; a kill at any moment leaves old or new."""
    tensors = {f"weight.{n}": p.detach().contiguous() for n, p in trained_parameters(agent).items()}
    for kind, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}.{i}.{key}": value.contiguous() for key, value in state.items()}
    save_file(tensors, run / "checkpoint.tmp", metadata={"progress": json.dumps(progress)})
    os.replace(run / "checkpoint.tmp", run / "checkpoint.safetensors")


def load_checkpoint(run: Path, agent: Agent, optimizers: dict) -> dict:
    """Put weights and optimisers back as `save_checkpoint` found them; return the progress."""
    path = run / "checkpoint.safetensors"
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        for name, parameter in trained_parameters(agent).items():
            parameter.data.copy_(tensors.pop(f"weight.{name}"))
        states = {kind: {} for kind in optimizers}
        for name, value in tensors.items():
            kind, i, key = name.split(".")
            states[kind].setdefault(int(i), {})[key] = value
        for kind, optimizer in optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states[kind]})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is missing, damaged or of another model ({error}); "
                        "start again with another --out") from error
    return progress


def train(args: Args, run: Path):
    """Train an agent, log each update into metrics.csv, end with the adapter and a summary.

    A folder that holds a checkpoint is a run to go on with."""
    torch.manual_seed(args.seed)
    agent = make_agent(args)
    team, old = PartialState(), run
    if not team.is_main_process:  # it does what the first process does, but nobody sees it
        sys.stdout, elsewhere = open(os.devnull, "w"), tempfile.TemporaryDirectory()
        run = Path(elsewhere.name)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {run}: {error.strerror}") from error
    write_json(run / "config.json", asdict(args))
    actor = [p for p in agent.model.parameters() if p.requires_grad]
    optimizers = {kind: torch.optim.Adam(weights, eps=1e-5) for kind, weights in (  # eps: paper's
        ("policy", actor), ("value", [*agent.critic.parameters()])) if weights}
    playing = [make_episode(args) for _ in range(args.n_envs)]
    rng, rows = random.Random(args.seed), []
    steps_per_update = args.n_envs * args.rollout_steps * team.num_processes
    n_updates = max(1, args.steps // steps_per_update)
    if args.method in ("zero-shot", "random"):
        n_updates = 0

    if (old / "checkpoint.safetensors").exists():
        progress = load_checkpoint(old, agent, optimizers)
        if changed := [name for name, x in progress["args"].items() if x != getattr(args, name)]:
            raise UserError(f"{old}/config.json and the checkpoint do not have the same "
                            f"{', '.join(changed)}; mend it, or start again with another --out")
        if len(progress["playing"]) != args.n_envs * team.num_processes:
            raise UserError(f"{old} was made by {len(progress['playing']) // args.n_envs} "
                            "processes; resume it with as many")
        rows, before, (version, internal, gauss) = (progress[x] for x in ("rows", "before", "rng"))
        write_metrics(run, rows)  # the checkpoint's log is the true one
        rng.setstate((version, tuple(internal), gauss))
        for e, saved in zip(playing, progress["playing"][team.process_index * args.n_envs:]):
            e.obs, e.info = e.env.set_state(saved["env"])
            e.ret, e.length = saved["ret"], saved["length"]
    else:
        before = evaluate(agent, args, EVALUATION_EPISODES)
    print(f"{args.task}, {args.method}: {sum(p.numel() for p in agent.parameters()):,} weights, of "
          f"which {sum(map(torch.numel, actor)):,} of the actor and "
          f"{sum(map(torch.numel, agent.critic.parameters())):,} of the critic are trained\n"
          f"before training: {describe(before)}")

    seconds = float(rows[-1]["seconds"]) if rows else 0.0
    bar = tqdm(total=n_updates * steps_per_update, initial=len(rows) * steps_per_update,
               unit="step", dynamic_ncols=True, disable=not (n_updates and team.is_main_process))
    try:
        for update in range(len(rows), n_updates):
            started = time.perf_counter()
            for kind, optimizer in optimizers.items():  # learning rates fall linearly
                rate = getattr(args, f"{kind}_lr") * (1 - update / n_updates)
                optimizer.param_groups[0]["lr"] = rate
            log = dict.fromkeys(METRICS, "")
            try:
                rollout = collect(agent, playing, args, rng)
                if args.method == "saycan":
                    log |= update_affordance(agent, optimizers["value"], rollout, args, rng)
                else:
                    log |= update_policy(agent, optimizers["policy"], rollout, args, rng)
                    log |= update_value(agent, optimizers["value"], rollout, args, rng)
                if not (np.isfinite([x for x in log.values() if x != ""]).all() and all(
                        p.isfinite().all() for p in trained_parameters(agent).values())):
                    raise UserError("a loss or a weight is not finite; try lower learning rates")
            except UserError as error:
                raise UserError(f"stopped at update {update + 1}: {error} (the last checkpoint is "
                                "kept)") from error
            took = time.perf_counter() - started
            seconds += took
            log |= {"update": update + 1, "env_steps": (update + 1) * steps_per_update,
                    "episodes": len(rollout.episodes), "steps_per_second": steps_per_update / took,
                    "seconds": seconds}
            if rollout.episodes:
                log |= zip(("success", "return", "length"), np.mean(rollout.episodes, axis=0))
            rows.append({name: f"{x:.6g}" if isinstance(x, float) else x
                         for name, x in log.items()})
            write_metrics(run, rows)
            save_checkpoint(run, agent, optimizers, {
                "args": asdict(args), "rows": rows, "before": before, "rng": rng.getstate(),
                "playing": gather_object([{"ret": e.ret, "length": e.length,
                                           "env": e.env.get_state()} for e in playing])})
            bar.set_postfix_str(", ".join(f"{name} {log[name]:.3f}" for name in (
                "success", "return", "entropy", "approx_kl") if log[name] != ""), refresh=False)
            bar.update(steps_per_update)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {len(rows)} of {n_updates} updates; go on with "
                                f"python twosome.py --resume {run}") from None
    finally:
        bar.close()
    after = None
    if n_updates:
        if args.method == "twosome":
            agent.model.save_pretrained(run / "adapter")
        elif args.method == "ppo":
            save_file(agent.model.state_dict(), run / "actor.safetensors")
        save_file(agent.critic.state_dict(), run / "critic.safetensors")
        after = evaluate(agent, args, EVALUATION_EPISODES)
    write_json(run / "summary.json", {
        "env": args.env, "task": args.task, "method": args.method, "norm": args.norm,
        "model": args.model, "seed": args.seed, "env_steps": n_updates * steps_per_update,
        "seconds": seconds, "before": before, "after": after})
    if after is None:
        return
    print("after training: ", describe(after))
    show_episode(agent, args)
    print(f"""
What was learned, in {seconds:.0f} s and {n_updates * steps_per_update:,} decisions:
  success  {before['success']:.3f} -> {after['success']:.3f}   (best: 1)
  return   {before['return']:.3f} -> {after['return']:.3f}   (discounted; best: \
{OPTIMUM[args.task]:.3f})
The run is in {run}: {", ".join(sorted(path.name for path in run.iterdir()))}.
What to do next:
  python twosome.py --watch {run}   # see it decide, step by step
  python twosome.py --evaluate {run}   # more episodes of this agent
  python twosome.py --env virtualhome   # another world""")


# ==================================================================================================
# 6. Baselines: the same PPO without a language model, and a language model without PPO.
# ==================================================================================================

def tanh_mlp(n_inputs: int, n_outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64, orthogonal initialisation: what PPO is usually run with."""
    layers = []
    for n_in, n_out, g in ((n_inputs, 64, 2**0.5), (64, 64, 2**0.5), (64, n_outputs, gain)):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, g), nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class SymbolicEpisode(Episode):
    """Shown in numbers: the symbolic observation, and the indices of the offered actions."""

    @property
    def state(self):
        return tuple(self.info["vector"].tolist()), tuple(self.info["actions"])


class SymbolicAgent(Agent):
    """PPO from scratch. Rollout, advantages and updates are those of section 4."""

    def __init__(self, n_inputs: int, n_actions: int):
        nn.Module.__init__(self)
        self.model = tanh_mlp(n_inputs, n_actions, gain=0.01)  # nearly uniform at first
        self.critic = tanh_mlp(n_inputs, 1, gain=0.0)  # V = 0 at first, as for TWOSOME
        self.max_prompts, self.policy_memory = 1024, {}

    def log_policy(self, states):
        vectors, offered = zip(*states)
        logits = self.model(torch.tensor(vectors))  # (B, all actions); a softmax over the offered
        return [F.log_softmax(row[list(indices)], -1) for row, indices in zip(logits, offered)]

    def features(self, vectors):
        return torch.tensor(vectors)


class SkillEpisode(Episode):
    """Shown in words and in numbers; an action earns 1 when it succeeds, and nothing after it
    counts. "Succeeds": it changes the state, whether that serves the goal or not."""

    @property
    def state(self):
        prompt, _ = super().state
        return (prompt, tuple(self.info["vector"].tolist())), tuple(self.info["actions"].items())

    def act(self, chosen: int):
        _, _, terminated, truncated = super().act(chosen)
        return float(self.info["changed"]), 0.0, terminated, truncated


class SayCan(Agent):
    """SayCan (Ahn et al., 2022): what is sensible, in the eyes of a frozen LLM, times what works.

        pi(a | s) ~ P_LLM(a | s) * P(a succeeds | s)

    The second factor, the affordance, is learned from the agent's own exploration.
    """

    def __init__(self, llm: Agent, n_inputs: int, n_actions: int):
        nn.Module.__init__(self)
        self.model = llm.requires_grad_(False)  # never trained: so what it says is remembered
        self.critic = tanh_mlp(n_inputs, n_actions, gain=0.01)  # logits; all affordances near 1/2
        self.policy_memory = {}

    def affordance(self, seen, offered) -> list[torch.Tensor]:
        """Logits that the offered actions succeed: B tensors (K_b,)."""
        logits = self.critic(torch.tensor([vector for _, vector in seen]))  # (B, all actions)
        return [row[[index for index, _ in actions]] for row, actions in zip(logits, offered)]

    def log_policy(self, states):
        seen, offered = zip(*states)
        says = self.model.remembered_log_policy([
            (prompt, tuple(phrase for _, phrase in actions))
            for (prompt, _), actions in zip(seen, offered)])
        can = self.affordance(seen, offered)
        return [F.log_softmax(say + F.logsigmoid(c), -1) for say, c in zip(says, can)]

    def value(self, seen):
        return torch.zeros(len(seen))


def update_affordance(agent: SayCan, optimizer, rollout: Rollout, args: Args, rng) -> dict:
    """Cross-entropy of the predicted success of each action taken.

        L = -mean [ y log p + (1 - y) log(1 - p) ],  y = 1 if the action changed the state
    """
    losses = []
    for batch in minibatches(len(rollout.states), args, rng):
        logits = agent.affordance(*zip(*(rollout.states[i] for i in batch)))
        chosen = torch.stack([row[rollout.chosen[i]] for row, i in zip(logits, batch)])
        # With V = 0 and discount 0 the return is the skill's own reward.
        loss = F.binary_cross_entropy_with_logits(chosen, rollout.returns[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    agent.policy_memory.clear()
    return {"value_loss": float(np.mean(losses))}


class RandomAgent(Agent):
    """Uniformly random choice among the offered actions, for scale."""

    def __init__(self):
        nn.Module.__init__(self)
        self.model = self.critic = nn.Identity()  # nothing to train
        self.policy_memory = {}

    def log_policy(self, states):
        return [torch.zeros(len(offered)).log_softmax(-1) for _, offered in states]


# ==================================================================================================
# 7. Evaluation: many episodes with sampled actions, because the policy is a distribution.
# ==================================================================================================

# The best discounted return that a task allows, by exact search over all of its states. (All
# household tasks but entertainment take six decisions.)
OPTIMUM = {"tomato-salad": 0.92052, "tomato-lettuce-salad": 0.94766, "entertainment": 0.59874} | {
    task: 0.77378 for task in VirtualHomeText.TASKS if task != "entertainment"}


def evaluate(agent: Agent, args: Args, n_episodes: int, stream: str = "evaluation") -> dict:
    """Play n episodes, all at once so that their prompts share the LM's batches."""
    rng = random.Random(f"{stream} {args.seed}")  # apart from training's random numbers
    episodes = [make_episode(args) for _ in range(n_episodes)]
    playing = episodes
    while playing:
        still_playing = []
        policies = agent.remembered_log_policy([episode.state for episode in playing])
        for episode, policy in zip(playing, policies):
            _, _, terminated, truncated = episode.act(sample(policy, rng.random()))
            if not (terminated or truncated):
                still_playing.append(episode)
        playing = still_playing
    agent.policy_memory.clear()  # training goes on as if nobody had looked, to the last bit
    results = np.array([(e.info["success"], e.ret, e.length) for e in episodes])
    return dict(zip(("success", "return", "length"), results.mean(axis=0).tolist()),
                return_std=results[:, 1].std().item(), episodes=n_episodes)


def describe(result: dict) -> str:
    return ("success {success:.2f}, discounted return {return:.3f} (std {return_std:.3f}), "
            "{length:.1f} primitive steps, over {episodes} sampled episodes".format(**result))


def play(agent: Agent, args: Args):
    """Play one episode; yield (episode, before, after, action) ahead of each decision: the policies
    (K,) of the LLM without its adapter (None where there is none) and of the agent, and the choice.
    """
    episode, rng, over = make_episode(args), random.Random(args.seed), False
    while not over:
        before, (after,) = None, agent.remembered_log_policy([episode.state])
        if args.method == "twosome":
            with torch.no_grad(), agent.model.disable_adapter():
                (before,) = agent.log_policy([episode.state])
        action = sample(after, rng.random())
        yield episode, before, after, action
        _, _, terminated, truncated = episode.act(action)
        over = terminated or truncated


def load_run(run: Path, given: dict) -> tuple[Args, Agent]:
    """Return the trained agent of a finished run; flags that were given override its own."""
    config = read_config(run)
    if useless := set(given) - {"task", "seed", "device", "dtype", "max_prompts"}:
        raise UserError("a trained agent keeps its flags; leave out "
                        + ", ".join(map(flag, sorted(useless))))
    if not (run / "summary.json").exists():
        raise UserError(f"{run} has not ended; end it with --resume {run}")
    args = finish(config | given)
    agent, unknown = make_agent(args), ()
    try:
        if args.method == "twosome":
            adapter = load_file(run / "adapter" / "adapter_model.safetensors")
            fit = set_peft_model_state_dict(agent.model, adapter)
            unknown = [*fit.unexpected_keys, *(key for key in fit.missing_keys if "lora_" in key)]
        elif args.method == "ppo":
            agent.model.load_state_dict(load_file(run / "actor.safetensors"))
        if args.method in ("twosome", "ppo", "saycan"):
            agent.critic.load_state_dict(load_file(run / "critic.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run} holds no whole agent for {args.task} with {args.model} ({reason})"
                        ) from error
    if unknown:
        raise UserError(f"the adapter in {run} belongs to another model than {args.model}")
    return args, agent


# ==================================================================================================
# 8. Watching: what the agent sees, what it thinks of each action, and what it does.
# ==================================================================================================

def show_episode(agent: Agent, args: Args, longest: int = 30):
    """Print one episode in short: each chosen action and its probability."""
    trained = " before training -> after" if args.method == "twosome" else ""
    print(f"\none episode (probability of the chosen action{trained}):")
    for decision, (episode, before, after, action) in enumerate(play(agent, args)):
        if decision < longest:
            past = "" if before is None else f"{before[action].exp():.2f} -> "
            phrase = list(episode.info["actions"].values())[action]
            print(f"  {past}{after[action].exp():.2f}  {phrase}")
        elif decision == longest:
            print("  ...")
    print(f"  success: {episode.info['success']}, discounted return {episode.ret:.3f}")


@torch.no_grad()
def token_lines(agent: Agent, args: Args, prompt: str, phrases):
    """For each action the log-probability of each of its tokens, and what normalisation makes of
    their sum. A token's own is the difference between two joint ones, with it and without it."""
    for phrase in phrases:
        prompt_ids, (ids,) = encode(agent.tokenizer, prompt, (phrase,))
        beginnings = [ids[:n] for n in range(1, len(ids) + 1)]
        (joint,) = plain_log_probs(agent.model, [(prompt_ids, beginnings)])
        own = torch.cat([joint[:1], joint.diff()]).tolist()
        pieces = " ".join(f"{agent.tokenizer.decode([i]).strip() or '_'} {x:.2f}"
                          for i, x in zip(ids, own))
        total, n_words = joint[-1].item(), len(phrase.split())
        yield phrase
        yield f"    {pieces}"
        yield (f"    sum {total:.2f};  / {len(ids)} tokens = {total / len(ids):.2f};  "
               f"/ {n_words} words = {total / n_words:.2f}")


def watch(agent: Agent, args: Args, tokens: bool, pace: float | None):
    """Play an episode in the terminal, step by step: on Enter, or every `pace` seconds.

    Plain characters only and no control codes, so it reads the same in a pipe or a notebook, where
    it does not wait."""
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 120))
    for number, (episode, before, after, action) in enumerate(play(agent, args), start=1):
        prompt, phrases = Episode.state.fget(episode)
        print(f"\n{f' decision {number} ':-^{width}}\n{episode.env.render()}\n")
        print(textwrap.fill(f"{prompt} ...", width))
        policies = [after.exp()] if before is None else [before.exp(), after.exp()]
        size = (width - 44) // 2 - 6  # of a bar; the phrase has at least 38 columns
        names = ["probability"] if before is None else ["before training", "after training"]
        print("\n  " + "".join(f"{name[:size + 5]:<{size + 6}}" for name in names).rstrip())
        for k, phrase in enumerate(phrases):
            bars = "".join(f"{p[k]:.2f} {'#' * round(p[k].item() * size):<{size}} "
                           for p in policies)
            mark = ">" if k == action else " "
            print(textwrap.fill(phrase, width, initial_indent=f"{mark} {bars}",
                                subsequent_indent=" " * (len(bars) + 4)))
        if tokens:
            print("\nlog-probability of each token:")
            for line in token_lines(agent, args, prompt, phrases):
                print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="      "))
        value = f"value {agent.value([episode.state[0]]).item():.3f}, " if args.method in (
            "twosome", "ppo") else ""
        print(f"\n{value}discounted return so far {episode.ret:.3f}, step {episode.length}")
        if pace is not None:
            time.sleep(pace)
        elif sys.stdin.isatty() and input("Enter: next decision, q: quit ").strip() == "q":
            return
    end = "reached the goal" if episode.info["success"] else "ran out of time"
    print(f"\n{episode.env.render()}\n\nThe agent {end} after {episode.length} primitive steps.\n"
          f"Discounted return {episode.ret:.3f} (best: {OPTIMUM[args.task]:.3f}).")


# ==================================================================================================
# 9. The command line: flags to arguments, mistakes to one line.
# ==================================================================================================

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv) -> tuple[dict, dict]:
    """Return (flags that were given and are Args' fields, the mode's own flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,
        allow_abbrev=False, exit_on_error=False)
    titles = {"env": "the run", "n_envs": "rollout", "gamma": "returns", "policy_lr": "update"}
    for f in fields(Args):
        if f.name in titles:
            group = parser.add_argument_group(titles[f.name])
        kind = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                {"type": f.type, "choices": f.metadata["choices"]})
        default = f" (default: {f.default})" if f.default != "" and f.name != "steps" else ""
        group.add_argument(flag(f.name), help=f.metadata["help"] + default, **kind)
    group = parser.add_argument_group("instead of a new run")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    modes.add_argument("--evaluate", metavar="RUN", help="play episodes with a run's agent")
    modes.add_argument("--watch", metavar="RUN", nargs="?", const="", help="see a run's agent "
                       "decide, step by step; without RUN the untrained LLM, or --method random")
    group.add_argument("--episodes", type=int, help="episodes of --evaluate (default: 100)")
    group.add_argument("--tokens", action="store_true", help="--watch: the tokens of each action")
    group.add_argument("--pace", type=float, help="--watch: seconds for each decision, instead of "
                       "waiting for Enter")
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(error) from None
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        flags = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(word.split("=")[0], flags, 1)
        raise UserError(f"unknown flag {word}; " + (f"did you mean {near[0]}?" if near else
                                                    "python twosome.py --help lists all flags"))
    given = vars(given)
    mode = {name: given.pop(name) for name in
            ("resume", "evaluate", "watch", "episodes", "tokens", "pace") if name in given}
    return given, mode


def finish(given: dict) -> Args:
    """Fill in what was not given or depends on other arguments; refuse what cannot work."""
    own = OWN_KNOBS.get(given.get("env", Args.env), {}) | OWN_KNOBS.get(given.get("method"), {})
    args = Args(**(own | given))
    for f in fields(Args):
        name, value, choices = flag(f.name), getattr(args, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{name} {value}: choose one of {', '.join(choices)}")
        if f.type is float and not 0 <= value < float("inf"):
            raise UserError(f"{name} must be a number, 0 or larger")
        if f.type is int and f.name != "seed" and f.name in given and value < 1:
            raise UserError(f"{name} must be at least 1")
    tasks = list(ENVS[args.env].TASKS)
    args.task = args.task or tasks[0]
    if args.task not in tasks:
        raise UserError(f"--task {args.task}: {args.env} has the tasks {', '.join(tasks)}")
    if "steps" not in given:
        args.steps = TASK_STEPS.get(args.task, TASK_STEPS["food-preparation"])
    if not -2**63 <= args.seed < 2**63:
        raise UserError("--seed must be a number of 64 bits")
    if args.n_envs * args.rollout_steps < max(2, args.minibatches):
        raise UserError("--minibatches is larger than the number of decisions in a rollout")
    if args.gamma > 1 or args.gae_lambda > 1:
        raise UserError("--gamma and --gae-lambda are at most 1")
    return args


def read_config(run: Path) -> dict:
    try:
        config = asdict(finish(json.loads((run / "config.json").read_text())))
        if not all(type(config[f.name]) is f.type for f in fields(Args)):
            raise ValueError
    except UserError as error:
        raise UserError(f"{run}/config.json: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{run} is not a run's folder: no readable config.json of ours") from error
    return config


def main(argv=None):
    given, mode = parse(argv)
    PartialState(cpu=given.get("device") == "cpu" or not torch.cuda.is_available())
    if "episodes" in mode and ("evaluate" not in mode or mode["episodes"] < 1):
        raise UserError("--episodes belongs to --evaluate RUN and must be at least 1")
    if ("tokens" in mode or "pace" in mode) and "watch" not in mode:
        raise UserError("--tokens and --pace belong to --watch")
    if not 0 <= mode.get("pace", 0) <= 3600:
        raise UserError("--pace is a number of seconds, 0 to 3600")
    if "resume" in mode:
        run = Path(mode["resume"])
        config = read_config(run)
        changed = [flag(name) for name, value in given.items() if config[name] != value]
        if changed:
            raise UserError(f"a resumed run keeps its flags; leave out {', '.join(changed)}")
        if (run / "summary.json").exists():
            raise UserError(f"{run} is finished; evaluate it with --evaluate {run}")
        return train(Args(**config), run)
    if mode and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" may leave early
    if "evaluate" in mode:
        args, agent = load_run(Path(mode["evaluate"]), given)
        result = evaluate(agent, args, mode.get("episodes", EVALUATION_EPISODES), "another")
        print(f"{args.task}: {describe(result)}")
        return show_episode(agent, args)
    if "watch" in mode:
        if mode["watch"]:
            args, agent = load_run(Path(mode["watch"]), given)
        else:
            args = finish({"method": "zero-shot"} | given)
            if args.method not in ("zero-shot", "random"):
                raise UserError(f"--watch RUN shows a trained agent; --method {args.method} has to "
                                "be trained first")
            agent = make_agent(args)
        if "tokens" in mode and args.method not in ("twosome", "zero-shot"):
            raise UserError(f"--tokens: {args.method} has no tokens to show")
        return watch(agent, args, "tokens" in mode, mode.get("pace"))
    args = finish(given)
    kind = {"twosome": args.norm, "ppo": "ppo", "random": "random"}
    name = f"runs/{args.task}-{kind.get(args.method, f'{args.method}-{args.norm}')}-seed{args.seed}"
    run = Path(args.out) if args.out else next(path for path in map(Path, (
        name, *(f"{name}-{again}" for again in range(2, 1000)))) if not path.exists())
    (run,) = broadcast_object_list([run])  # the first process has chosen the name
    # A kill before config.json was written leaves an empty folder; or config.tmp, half of it.
    free = not run.exists() or run.is_dir() and {x.name for x in run.iterdir()} <= {"config.tmp"}
    if not free and PartialState().is_main_process:
        raise UserError(f"{run} exists already; choose another --out, or --resume {run}")
    return train(args, run)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        message, code = error, 1
    except KeyboardInterrupt as stop:
        message, code = str(stop) or "stopped; what was saved is kept", 130
    except (OSError, SafetensorError) as error:  # disk full, folder not writable, ...
        message, code = f"{error}; what was saved last is kept, and --resume goes on from it", 1
    except (torch.OutOfMemoryError, MemoryError):
        message, code = ("out of memory; lower --max-prompts, or take --dtype bfloat16 or a "
                         "smaller model"), 1
    print(f"twosome.py: {message}", file=sys.stderr)
    raise SystemExit(code)
