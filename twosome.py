"""TWOSOME in one file: a language model learns to act, by practice.

A language model knows what people usually do. It does not know what works here. TWOSOME (Tan et
al., ICLR 2024, arXiv 2401.14151) asks it for the probability of every action that the environment
offers, as the ending of one sentence, and makes a policy of these. The rest is reinforcement
learning: nudge a small adapter (LoRA) so that what turned out well is likelier; the LM is frozen.

    python twosome.py --env overcooked        # half a minute on a CPU core; --help lists all flags

Sections 1 to 4 (prompts, scoring, the actor-critic, PPO) are the paper's algorithm. 5: the same
numbers, faster; 6: any LM, `rehearse`; 7: a run; 8: the command line, `args`, all knobs used above.
"""

import os
import random
from collections import deque
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits must not hold a core
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model


# === 1. Prompts: what the agent perceives begins a sentence, and each action is an ending of it. ==
def build_prompt(obs: str, goal: str) -> str:
    """Return the prompt, an unfinished sentence; a space and an action finish it. The environments
    phrase `obs` and the actions by the paper's four principles (section 4.4):
    1. Cohesive: "... your next step is to" + " chop the tomato" is one fluent sentence.
    2. Articles: "pick up the tomato", as people write, not "pick up tomato".
    3. Preferred words: the actions' words are the observation's: "a bowl" is never "the plate".
    4. Alternative actions: one action is worded by the situation. With empty hands it is "walk to
       the cutting board", with full hands "put the raw tomato on the cutting board".
    >>> build_prompt("You hold the raw tomato.", "make a soup")
    'You hold the raw tomato. To make a soup, your next step is to'
    """
    return f"{obs} To {goal}, your next step is to"


# === 2. Scoring: how likely is each action as the ending of the prompt, in the eyes of the LM? ====
# Shapes: B states with K_b actions; R rows of L tokens; H hidden units; V tokens to choose from.
# (In formulas V(s) is a value, R a return, L a loss, H(pi) an entropy, r a reward or a ratio.)
def encode(tokenizer, prompt: str, actions: tuple[str, ...]):
    """Return (prompt_ids, [action_ids, ...]): the tokens of a prompt and of each of its endings.

    Both are tokenised as one text, as the LM has read it: most tokenizers put the space between
    words into the next token. Offsets tell where the prompt ends: "to chop" has (0, 2) (2, 7)."""
    prompt_ids, action_ids = None, []
    batch = tokenizer([f"{prompt} {action}" for action in actions], return_offsets_mapping=True)
    for action, ids, offsets in zip(actions, batch["input_ids"], batch["offset_mapping"]):
        # The space between the two may close the prompt's last token or open the action's first.
        first = next((i for i, (start, _) in enumerate(offsets) if start >= len(prompt)), len(ids))
        across = any(start < len(prompt) and stop > len(prompt) + 1 for start, stop in offsets)
        if across or prompt_ids not in (None, ids[:first]):  # no common prompt: P is undefined
            raise ValueError(f"{tokenizer.name_or_path} has a token across the end of the prompt "
                             f"and {action!r}, or cuts the prompt otherwise there; choose another")
        prompt_ids = ids[:first]
        # Special tokens that a tokenizer appends (EOS) have the offsets (0, 0): not the action's.
        action_ids.append([i for i, (start, _) in zip(ids, offsets) if start >= len(prompt)])
    return prompt_ids, action_ids


def plain_log_probs(model, encoded) -> list[torch.Tensor]:
    """The definition: one row for each (prompt, action), R in all, each wholly through the LM.

        log P(a | s) = sum_i log P(w_i | s, w_1 ... w_{i-1}); w_i: tokens        (paper, Eq. 1)
    encoded: B pairs from `encode`. Returns B float32 tensors (K_b,)."""
    rows = [(prompt, action) for prompt, actions in encoded for action in actions]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt + action) for prompt, action in rows],
                                    batch_first=True).to(model.device)  # (R, L), padded at the end
    logits = model(input_ids=ids, use_cache=False).logits  # (R, L, V); causal: padding is not seen
    log_p = F.log_softmax(logits[:, :-1].float(), dim=-1)  # (R, L-1, V); column t predicts t + 1
    log_p = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (R, L-1)
    joint = torch.stack([log_p[r, len(prompt) - 1:len(prompt) - 1 + len(action)].sum()
                         for r, (prompt, action) in enumerate(rows)])  # (R,)
    return list(joint.split([len(actions) for _, actions in encoded]))


score = plain_log_probs  # section 5 puts a faster way to the same numbers in its place


def action_log_probs(model, tokenizer, prompts: list[str], actions: list[tuple]):
    """log P of each of the K_b actions after each of the B prompts (paper, section 4.1): B float32
    tensors (K_b,), natural logs, with gradients; and their lengths in tokens, B int tensors (K_b,).
    No end of text is scored, so P("wait") >= P("wait here"): going on never raises P."""
    encoded = [encode(tokenizer, p, tuple(a)) for p, a in zip(prompts, actions, strict=True)]
    return score(model, encoded), [torch.tensor([len(ids) for ids in a]) for _, a in encoded]


def normalize(log_probs, n_tokens, n_words, norm: str) -> list[torch.Tensor]:
    """Make actions of different length comparable; the policy is the softmax of the result.

    A product of more factors is smaller: undivided, short actions win for being short. Dividing its
    log by n takes the n-th root: the geometric mean over its tokens (Eq. 3) or words (Eq. 4).

        wait                  0.01                     likeliest by none: one factor only
        chop the egg          0.1 0.8 0.1              likeliest by word (but "the" helps it)
        chop the aub erg ine  0.1 0.8 0.05 0.99 0.99   likeliest by token: a word's end is sure
    >>> log_p = [torch.tensor([0.01, 0.1 * 0.8 * 0.1, 0.1 * 0.8 * 0.05 * 0.99 * 0.99]).log()]
    >>> n_tokens, n_words = [torch.tensor([1, 3, 5])], [torch.tensor([1, 3, 3])]
    >>> for norm in ("none", "token", "word"):
    ...     print(norm, normalize(log_p, n_tokens, n_words, norm)[0].softmax(-1).numpy().round(3))
    none [0.456 0.365 0.179]
    token [0.019 0.37  0.611]
    word [0.027 0.544 0.429]
    """
    if norm == "none":
        return log_probs
    lengths = {"token": n_tokens, "word": n_words}[norm]
    return [log_prob / n.to(log_prob.device) for log_prob, n in zip(log_probs, lengths)]


# === 3. The actor-critic: one frozen LM carries both. LoRA makes it the actor, an MLP reads it. ===
# Stand-ins till sections 5, 6. in_parts: what memory holds; from_all, add_up: for processes.
in_parts = lambda states, size: [states[i:i + size] for i in range(0, len(states), size)]
from_all, add_up, rehearse = (lambda new: new), (lambda weights, sums: sums), None
last_hidden = lambda model, prompt, actions: model.get_decoder()(  # (L, H); actions: for section 5
    input_ids=torch.tensor([prompt], device=model.device), use_cache=False).last_hidden_state[0]


class Agent(nn.Module):
    """pi(a | s) and V(s), the expected discounted return; s: prompt, actions (V: the prompt)."""

    def __init__(self, model, tokenizer, norm="word", max_prompts=4, standardize=False, eps=1e-5):
        super().__init__()
        self.tokenizer, self.norm, self.max_prompts = tokenizer, norm, max_prompts
        # LoRA adds to a frozen matrix the product of two thin ones, at first 0. Paper: queries and
        # values of all blocks; ours: all of the last ten (section 5 runs the rest once a state).
        blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
        last = {*blocks[-10:].modules()}
        skip = [name for name, x in model.named_modules() if x not in last or "out_proj" in name]
        self.model = get_peft_model(model, LoraConfig(  # out_proj: Mamba reads its W past LoRA
            r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear",
            exclude_modules=skip)).eval()  # W + 16/8 B A: B (out, 8) is 0, A random; no dropout
        n_hidden = model.get_output_embeddings().weight.shape[1]  # H
        self.critic = nn.Sequential(nn.Linear(n_hidden, 1024), nn.ReLU(), nn.Linear(1024, 512),
                                    nn.ReLU(), nn.Linear(512, 1)).to(model.device)
        # V = 0 at first: a random critic's errors would look like good or bad actions to LoRA.
        nn.init.zeros_(self.critic[-1].weight)  # (this layer still learns: its inputs are not 0)
        nn.init.zeros_(self.critic[-1].bias)
        adam = lambda x: torch.optim.Adam([p for p in x.parameters() if p.requires_grad], eps=eps)
        self.optimizers = {"policy": adam(self.model), "value": adam(self.critic)}  # lr: `practise`
        self.features_memory = {}  # state -> (H,): the frozen LM's, so for good
        self.policy_memory = {}  # state -> log pi(. | s) (K,): until the policy moves
        self.scale = None if standardize else (0.0, 1.0)  # means (H,), deviation (); None: not yet

    def log_policy(self, states) -> list[torch.Tensor]:
        """log pi(. | s) for B states: B tensors (K_b,), with gradients."""
        prompts, actions = zip(*states)
        log_probs, n_tokens = action_log_probs(self.model, self.tokenizer, prompts, actions)
        n_words = [torch.tensor([len(a.split()) for a in offered]) for offered in actions]
        scores = normalize(log_probs, n_tokens, n_words, self.norm)
        # pi(a | s) = exp(score_a) / sum_b exp(score_b)                       (Eq. 2, 3 or 4)
        return [F.log_softmax(x.cpu(), dim=-1) for x in scores]  # what follows is cheap

    @torch.no_grad()
    def remembered_log_policy(self, states) -> list[torch.Tensor]:
        """The same without gradients, for playing: once a state, until the policy moves."""
        new = {}  # sorted: section 5 shares common beginnings, and processes need the same order
        for part in in_parts(sorted(set(states) - self.policy_memory.keys()), self.max_prompts):
            new.update(zip(part, self.log_policy(part)))
        self.policy_memory.update(from_all(new))
        return [self.policy_memory[state] for state in states]

    @torch.no_grad()
    def features(self, states) -> torch.Tensor:
        """What the critic sees, (B, H): the prompts' last hidden states, scaled. No adapter, lest
        its steps move them under the critic; a prompt a pass, lest others change its rounding."""
        for state in set(states) - self.features_memory.keys():
            with self.model.disable_adapter():
                hidden = last_hidden(self.model, *encode(self.tokenizer, *state))
            self.features_memory[state] = hidden[-1].float().cpu()
        x = torch.stack([self.features_memory[state] for state in states])
        if self.scale is None:  # by the first rollout, for good: SmolLM2's states are nearly alike
            self.scale = x.mean(0), (x - x.mean(0)).std()
        return ((x - self.scale[0]) / self.scale[1]).to(self.model.device)

    def value(self, states) -> torch.Tensor:
        """V(s) for B states: (B,) float32, with gradients for the critic only."""
        return self.critic(self.features(states)).squeeze(-1)

    def learn(self, rollout, args, rng) -> dict:
        self.policy_memory = {}  # pi is about to move
        return update_policy(self, rollout, args, rng) | update_value(self, rollout, args, rng)


# === 4. PPO: play with the present policy, judge each decision by what followed, move a little. ===
class Episode:
    """A game, then the next: `env` has a goal and Gymnasium's reset and step; info: "actions"
    (index -> phrase; the offered ones), "primitive_steps", "success" (earns about 1)."""

    def __init__(self, env, gamma: float):
        self.env, self.gamma = env, gamma
        self.start()

    def start(self):
        self.obs, self.info = self.env.reset()
        self.ret, self.length, self.over = 0.0, 0, False  # discounted return, primitive steps

    def state(self) -> tuple[str, tuple[str, ...]]:
        """What the agent is shown: the prompt, and the phrases of the offered actions."""
        return build_prompt(self.obs, self.env.goal), tuple(self.info["actions"].values())

    def act(self, chosen: int):
        """Take the chosen one of the offered actions. Returns reward, discount, terminated (at the
        goal), truncated (out of time). An action may be a macro-action, an errand of k primitive
        steps: its reward is discounted inside, and what follows, k steps later, counts gamma^k."""
        action = list(self.info["actions"])[chosen]  # its index among all actions
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        k = self.info["primitive_steps"]
        self.ret += self.gamma ** self.length * reward
        self.length += k
        self.over = terminated or truncated
        return reward, self.gamma ** k, terminated, truncated


def gae(reward, discount, value, next_value, done, gae_lambda):
    """Generalised advantage estimation (Schulman et al., 2016); all (T decisions, N environments).

        delta_t = r_t + gamma^(k_t) V(s_{t+1}) - V(s_t)              k_t: primitive steps it took
        A_t     = delta_t + gamma^(k_t) lambda A_{t+1}, cut where an episode ends

    delta: was it better than expected? Later surprises are this action's doing too, less with time
    (gamma^k) and with each decision in between (lambda). discount: gamma^(k_t); next_value: 0 where
    nothing follows; done: 1 where an episode ends. With gamma 0.5, lambda 1: the last action (k 1,
    V 0.4) earns 1, A = 0.6; the one before (k 2, V 0.2): A = 0.25 * 0.4 - 0.2 + 0.25 * 0.6 = 0.05.
    >>> column = lambda *x: torch.tensor(x)[:, None]
    >>> gae(column(0., 1.), column(.25, .5), column(.2, .4), column(.4, 0.), column(0., 1.), 1.0).T
    tensor([[0.0500, 0.6000]])
    """
    advantage, following = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + discount[t] * next_value[t] - value[t]
        following = delta + discount[t] * gae_lambda * (1 - done[t]) * following
        advantage[t] = following
    return advantage


def collect(agent: Agent, playing: list[Episode], args, rng: random.Random):
    """Play T = `rollout_steps` decisions in each of N environments and judge them. An unfinished
    episode goes on in the next rollout; the critic's value stands for the rest of it. Where all r
    are 0 (VirtualHome), A is only the critic's errors: so play on, 1000 rollouts at most."""
    size, env_steps = args.rollout_steps * len(playing), 0  # both count decisions
    decisions = deque(maxlen=size)  # the latest T * N
    while env_steps < size or (env_steps < 1000 * size and not any(d["reward"] for d in decisions)):
        env_steps += len(playing)
        states = [episode.state() for episode in playing]
        for episode, state, policy in zip(playing, states, agent.remembered_log_policy(states)):
            (chosen,) = rng.choices(range(len(policy)), weights=policy.exp().tolist())
            reward, discount, terminated, truncated = episode.act(chosen)
            # Out of time is a cut, not an end (no prompt has a clock): V stands in for the rest.
            no_future = terminated or (truncated and not args.bootstrap_time_limit)
            decisions.append(dict(state=state, chosen=chosen, log_prob=policy[chosen].item(),
                                  next=state if no_future else episode.state(), reward=reward,
                                  discount=discount, done=episode.over, no_future=no_future))
            if episode.over:
                episode.start()
    flat = lambda name: torch.tensor([d[name] for d in decisions], dtype=torch.float32)  # (T * N,)
    with torch.no_grad():
        value = agent.value([d["state"] for d in decisions]).cpu()
        next_value = agent.value([d["next"] for d in decisions]).cpu() * (1 - flat("no_future"))
    columns = flat("reward"), flat("discount"), value, next_value, flat("done")
    advantage = gae(*(x.view(-1, len(playing)) for x in columns), args.gae_lambda).flatten()
    return SimpleNamespace(
        states=[d["state"] for d in decisions], chosen=flat("chosen").long(),  # among the offered
        reward=flat("reward"), log_prob=flat("log_prob"),  # log pi_old of the chosen action
        value=value, advantage=advantage, returns=advantage + value, env_steps=env_steps)


def policy_loss(new_log_prob, old_log_prob, advantage, entropy, clip_coef, ent_coef):
    """PPO's loss, summed over n decisions (Schulman et al., 2017); all (n,). Also what to log.

        r = pi(a | s) / pi_old(a | s)
        L = -min(r A, clip(r, 1 - eps, 1 + eps) A) - c_ent H(pi(. | s))        eps: clip_coef

    Before an update's first step pi is pi_old and r is 1, up to rounding. Past 1 + eps (A > 0) or
    1 - eps (A < 0) the gradient is 0; an r past the other end keeps it. kl: how far pi moved.
    From a state to its loss: "You hold the raw tomato. ... your next step is to" has five endings
    with these log P. The third, to put it on the board, has A = 0.5; a step later its pi is 0.45.
    >>> log_probs = [torch.tensor([-4.8626, -4.3751, -0.9627, -2.1809, -4.5880])]
    >>> (scores,) = normalize(log_probs, None, [torch.tensor([5, 4, 8, 4, 5])], "word")
    >>> F.softmax(scores, dim=-1)
    tensor([0.1466, 0.1299, 0.3438, 0.2248, 0.1549])
    >>> new, old = torch.tensor([0.45]).log(), torch.tensor([0.3438]).log()  # r = 1.31 > 1 + eps
    >>> policy_loss(new, old, 0.5, entropy=0 * new, clip_coef=0.2, ent_coef=0.0)[0]  # -1.2 * 0.5
    tensor(-0.6000)
    """
    log_ratio = new_log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    loss = -(surrogate + ent_coef * entropy).sum()
    kl = log_ratio.expm1() - log_ratio  # r - 1 - log r >= 0, whose mean estimates KL(pi_old, pi)
    terms = torch.stack([-surrogate.sum(), entropy.sum(), kl.sum(), (ratio != clipped).sum()])
    return loss, terms.detach()


def minibatches(states, args, rng: random.Random):
    """Yield the indices of all n decisions, each epoch shuffled anew, in m nearly equal parts. With
    whole_states those of one state share a part (but for the cut ones): one LM pass an epoch."""
    n, m = len(states), args.minibatches
    for _ in range(args.epochs):
        order = rng.sample(range(n), n)
        if args.whole_states:
            place = {state: rng.random() for state in dict.fromkeys(states)}  # (a set has no order)
            order.sort(key=lambda i: place[states[i]])
        yield from (order[n * i // m:n * (i + 1) // m] if args.whole_states else order[i::m]
                    for i in range(m))


def update_policy(agent: Agent, rollout, args, rng) -> dict:
    """Move LoRA towards decisions that turned out better than expected, but not far."""
    # Divided by std alone, mere critic's errors would push as hard as a success would: so add 1.
    advantages = rollout.advantage - rollout.advantage.mean()  # (T * N,)
    advantages = advantages / (advantages.std() + args.advantage_eps)
    weights, log = [p for p in agent.model.parameters() if p.requires_grad], []
    for batch in minibatches(rollout.states, args, rng):
        # A state's decisions share one pass of the LM: the loss is their sum, so is its gradient.
        decisions = {}
        for i in batch:
            decisions.setdefault(rollout.states[i], []).append(i)
        agent.optimizers["policy"].zero_grad()
        sums = torch.zeros(4)
        for states in in_parts(sorted(decisions), agent.max_prompts):
            policies = agent.log_policy(states)  # B tensors (K_b,)
            # For each of n decisions: its place in the rollout (index), its state's in the table.
            index = [i for state in states for i in decisions[state]]
            row = [b for b, state in enumerate(states) for _ in decisions[state]]
            table = nn.utils.rnn.pad_sequence(policies, batch_first=True)  # (B, longest K)
            new_log_prob = table[row, rollout.chosen[index]]  # (n,)
            entropy = torch.stack([-(p.exp() * p).sum() for p in policies])[row]  # (n,)
            loss, terms = policy_loss(new_log_prob, rollout.log_prob[index], advantages[index],
                                      entropy, args.clip_coef, args.ent_coef)
            (loss / len(batch)).backward()  # the gradients of the parts add up
            sums += terms
        if args.rehearsal_coef:  # not the paper's: forget less of the language, see section 6
            rehearse(agent, args.rehearsal_coef, rng)
        log.append(add_up(weights, sums) / len(batch))  # also adds up all processes' p.grad
        if log[-1][2] > args.target_kl:  # kl: pi is far enough from the policy that played,
            break  # and this step is not taken
        nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        agent.optimizers["policy"].step()
    names = "policy_loss", "entropy", "approx_kl", "clip_fraction"
    return dict(zip(names, torch.stack(log).mean(0).tolist()))


def update_value(agent: Agent, rollout, args, rng) -> dict:
    """Move the critic towards the returns, not far: beyond V_old +- eps nothing pulls further out.

        L = c_vf * mean 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) """
    losses, features = [], agent.features(rollout.states)
    old, returns = rollout.value.to(features.device), rollout.returns.to(features.device)
    for batch in minibatches(range(len(returns)), args, rng):
        value = agent.critic(features[batch]).squeeze(-1)
        clipped = old[batch] + (value - old[batch]).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max((value - returns[batch]) ** 2, (clipped - returns[batch]) ** 2)
        loss = args.vf_coef * 0.5 * error.mean()  # Adam ignores a fixed factor, clipping does not
        agent.optimizers["value"].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
        agent.optimizers["value"].step()
        losses.append(loss.item())
    explained = 1 - (rollout.returns - rollout.value).var() / (rollout.returns.var() + 1e-8)
    return {"value_loss": sum(losses) / len(losses), "explained_variance": explained.item()}


def practise(agent: Agent, playing: list[Episode], args, rng, n_updates: int, first: int = 0):
    """Play, judge, learn, again, at falling rates. Yields rollout, log ({}: nothing was earned)."""
    for update in range(first, n_updates):
        for name, optimizer in agent.optimizers.items():
            optimizer.param_groups[0]["lr"] = getattr(args, f"{name}_lr") * (1 - update / n_updates)
        rollout = collect(agent, playing, args, rng)
        yield rollout, (agent.learn(rollout, args, rng) if rollout.reward.any() else {})


# === Here the paper's algorithm ends. Below: efficiency, comfort, and `rehearse` (section 6). =====
import functools
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, logging

from overcooked_text import OvercookedText
from virtualhome_text import VirtualHomeText

# === 5. The same numbers, faster: a tree instead of many rows, and work for several processes. ====
def as_tree(encoded):
    """Merge the rows of the definition where they begin alike, into a tree (a trie), L columns.

        To make a salad, your next step is to -+- chop the -+- (egg)
                                               |            +- (tomato)
                                               +- (wait)

    Returns ids (L,), each column's token; sees (L, L), True for the column itself and those before
    it on its branch; sources, for each token of an action the column that predicts it; targets,
    that token; of_states, each state's columns in the order of a tree of its own. (Nothing follows
    an action's last token: those in brackets get no column.) """
    columns, sources, targets = {}, [], []  # columns: (column of the token before, token) -> column
    of_states = [{} for _ in encoded]  # used as ordered sets
    for (prompt, actions), own in zip(encoded, of_states):
        for action in actions:
            column = -1  # before the first token
            for i, token in enumerate(prompt + action):
                if i >= len(prompt):
                    sources.append(column)
                    targets.append(token)
                if i + 1 < len(prompt + action):
                    column = columns.setdefault((column, token), len(columns))  # known, or next
                    own[column] = True
    sees = np.eye(len(columns), dtype=bool)  # a column comes after the one that it continues
    for column, (before, _) in enumerate(columns):
        sees[column] |= sees[before] & (before >= 0)  # -1: the first token, after none
    return [token for _, token in columns], sees, sources, targets, list(map(list, of_states))


def decode(model, ids, sees, blocks=(), instead=None):
    """The last hidden states (L, H) of a tree; `instead` takes the place of some of the blocks."""
    sees = torch.tensor(sees, device=model.device)  # (L, L)
    # Added to the attention scores. finfo.min and not -inf, which some kernels turn into NaN.
    mask = torch.where(sees, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    for block in blocks:
        block.forward = instead
    try:
        return model.get_decoder()(
            input_ids=torch.tensor([ids], device=model.device), attention_mask=mask[None, None],
            position_ids=sees.sum(-1)[None] - 1, use_cache=False).last_hidden_state[0]
    finally:
        for block in blocks:
            del block.forward  # and the class's own is back


def decode_above(model, encoded, ids, sees, of_states):
    """The same, but what the frozen blocks below LoRA make of a state is computed once, alone."""
    blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    n = next((n for n, part in enumerate(blocks) if "lora_" in str(part)), 0)  # LoRA: blocks[n:]
    if n == 0:
        return decode(model, ids, sees)
    memory = vars(model).setdefault("below_lora", {})  # for good: frozen; 0.1 MB a state (SmolLM2)
    below = torch.empty(len(ids), model.config.hidden_size, dtype=model.dtype, device=model.device)
    for state, own in zip(encoded, of_states):
        key = str(state)
        if key not in memory:  # a hook keeps block n-1's output (it returns None: no change)
            keep = lambda block, inputs, output: memory.update({key: output})
            with blocks[n - 1].register_forward_hook(keep):
                decode(model, *as_tree([state])[:2], blocks[n:], lambda *_, **__: memory[key])
        a_tuple = isinstance(memory[key], tuple)  # of some models, which begins with (1, L, H)
        below[own] = (memory[key][0][0] if a_tuple else memory[key][0])[:len(own)]  # or prompt only
    result = (below[None],) if a_tuple else below[None]
    return decode(model, ids, sees, blocks[:n], lambda *_, **__: result)


def packed_log_probs(model, encoded) -> list[torch.Tensor]:
    """The same as `plain_log_probs`, with each distinct beginning computed once.

    In a transformer tokens meet only in attention. Here a token may look only at those before it on
    its own branch, and its position says how many these are: so it computes what it would in a row
    of its own. But a prompt is computed once, not K times, and so is what several prompts share."""
    ids, sees, sources, targets, of_states = as_tree(encoded)
    hidden = decode_above(model, encoded, ids, sees, of_states)  # (L, H)
    # Logits only where an action's token is predicted: M columns, each for one token or several.
    predicting, which = torch.tensor(sources, device=model.device).unique(return_inverse=True)
    logits = model.get_output_embeddings()(hidden[predicting])  # (M, V)
    token_log_probs = F.log_softmax(logits.float(), dim=-1)[which, targets]
    lengths = [len(action) for _, actions in encoded for action in actions]
    log_probs = torch.stack([part.sum() for part in token_log_probs.split(lengths)])
    return list(log_probs.split([len(actions) for _, actions in encoded]))


class InFloat32(torch.overrides.TorchFunctionMode):
    """Within it torch computes in float32: arguments and results of functions are widened."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        widen = lambda x: x.float() if getattr(x, "dtype", None) == torch.bfloat16 else x
        kwargs = {name: widen(x) for name, x in (kwargs or {}).items()}
        return widen(function(*map(widen, args), **kwargs))


# Not every LM may be packed: sliding windows and ALiBi measure distance in columns, a state-space
# model has no mask. So each is compared with the definition, and again on longer trees or rows.
@torch.no_grad()
def may_pack(model, encoded) -> bool:
    """Does packing give the defined numbers for this model, on a tree as large as this?"""
    length = lambda state: len(state[0]) + max(map(len, state[1]))  # of its longest row
    tree, row = len(as_tree(encoded)[0]), max(map(length, encoded))
    context = getattr(model.config, "max_position_embeddings", None) or 2 * row
    if row > context:  # packed or not, the model would answer with noise
        raise ValueError(f"a prompt with its action has {row} tokens and this model reads at most "
                         f"{context}; choose a model with a longer context")
    known = getattr(model, "packs_up_to", (0, 0))  # tree and row that agreed; None: never pack
    if known is None or (tree <= known[0] and row <= known[1]):
        return known is not None
    # With each prompt doubled, so that the verdict also holds for somewhat larger ones.
    larger = sorted((((prompt * 2)[:context - max(map(len, actions))], actions)
                     for prompt, actions in encoded), key=length)
    try:
        with InFloat32():  # rounded to 16 bits, right and wrong could not be told apart
            packed = packed_log_probs(model, larger)[-1]  # the longest row has most to lose
            (plain,) = plain_log_probs(model, larger[-1:])
        same = bool((packed - plain).abs().max() < 1e-3)  # right: 2e-5 (SmolLM2); wrong: over 4e-2
    except torch.OutOfMemoryError:
        raise
    except Exception:  # this architecture does not take a mask or positions of ours at all
        same = False
    checked = len(as_tree(larger)[0]), length(larger[-1])
    model.packs_up_to = tuple(map(max, known, checked)) if same else None
    if not same:
        print("note: this LM cannot be packed; it is scored row by row, slower", file=sys.stderr)
    return same


# P processes (accelerate launch) play the same P * n_envs episodes with the same random numbers and
# all train the critic. They share the policy's passes: so new add_up, in_parts, from_all.
def add_up(weights: list[nn.Parameter], sums: torch.Tensor) -> torch.Tensor:
    for p in weights:
        p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")  # None: no part
    return reduce(sums.to(weights[0].device), "sum").cpu()


in_parts = lambda states, size, all_parts=in_parts: all_parts(states, size)[
    PartialState().process_index::PartialState().num_processes]
from_all = lambda new: {state: x for some in gather_object([new]) for state, x in some.items()}
score = lambda model, x: (packed_log_probs if may_pack(model, x) else plain_log_probs)(model, x)
# The critic's pass of a prompt, too, begins where the frozen blocks of its state have ended.
last_hidden = lambda model, prompt, actions, plain=last_hidden: decode_above(
    model, [(prompt, actions)], prompt, np.tri(len(prompt), dtype=bool), [list(range(len(prompt)))]
    ) if may_pack(model, [(prompt, actions)]) else plain(model, prompt, actions)
encode = functools.lru_cache(maxsize=100_000)(encode)  # the same states come back all the time


# === 6. Any LM: loading one without running anybody's code, and keeping what it knows. ============
def load_lm(name: str, device: str, dtype: str):
    """Return (model, tokenizer) from a folder or the Hub; refuse what would go wrong in silence."""
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():  # accelerate would take the CPU
        raise ValueError("--device cuda: torch finds no CUDA device here")
    name = str(Path(__file__).resolve().parent / name) if name == "pocket_lm" else name
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, for their authors
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        assert tokenizer.is_fast, "its tokenizer is not a fast one: it has no character offsets"
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
    except Exception as error:  # a damaged folder can fail in any way, in any library
        kind = "a folder" if Path(name).is_dir() else "no folder here, so one of the Hub"
        raise ValueError(f"cannot load the model {name} ({kind}): {error}") from error
    if loaded["missing_keys"]:  # transformers has filled them with random numbers
        raise ValueError(f"the model {name} lacks weights: {', '.join(loaded['missing_keys'])}")
    model = model.to(PartialState().device if device == "cuda" else device)
    if device == "cpu" and model.num_parameters() < 1e7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small matrices gain nothing from a second core
    # An encoder such as BERT would judge a word by the words behind it.
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]], device=model.device)
    with torch.no_grad(), InFloat32():
        a, b = model(input_ids=ids, use_cache=False).logits[:, 1]
    if (a - b).abs().max() > 1e-4 * a.abs().max():
        raise ValueError(f"{name} is no causal LM: what it says depends on later words")
    return model, tokenizer


def rehearse(agent, coef: float, rng):
    """Pseudo-rehearsal (Robins, 1995), to forget less. A step of the policy adds the gradients of
    coef * KL(p_0, p), mean over the 40 tokens of one of 32 texts by p_0, the LM, adapter off."""
    model, texts = agent.model, vars(agent).setdefault("texts", {})  # 40 ids -> log p_0 (40, V)
    log_p = lambda ids: F.log_softmax((  # if not packed, whole: its logits may be scaled
        model.get_output_embeddings()(last_hidden(model, ids, [(0,)]))  # (0,): any action
        if may_pack(model, [(ids, [(0,)])]) else
        model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]).float(), dim=-1)
    if not texts:
        with model.disable_adapter():
            texts |= dict.fromkeys(map(tuple, model.generate(
                torch.randint(agent.tokenizer.vocab_size, (32, 1)).to(model.device), do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, min_length=40, max_length=40).tolist()))
    for (ids,) in in_parts([rng.choice([*texts])], 1):  # all draw; one process computes
        if texts[ids] is None:
            with torch.no_grad(), model.disable_adapter():
                texts[ids] = log_p(ids)
        (coef * F.kl_div(log_p(ids), texts[ids], reduction="batchmean", log_target=True)).backward()


# === 7. A run: a folder with a row for each update, from which it can go on, and what came out. ===
ENVS = {"overcooked": OvercookedText, "virtualhome": VirtualHomeText}
METRICS = ("update env_steps success return length policy_loss value_loss entropy approx_kl "
           "clip_fraction explained_variance seconds").split()
EVALUATION_EPISODES, EPISODES_PER_ROW = 100, 32  # before and after training; for a row of the log


def make_agent(args) -> Agent:
    model, tokenizer = load_lm(args.model, args.device, args.dtype)
    return Agent(model, tokenizer, args.norm, args.max_prompts, args.standardize, args.adam_eps)


def make_episode(args, plays=Episode) -> Episode:
    # plays: experiments/ have other kinds. Only Overcooked has macro-actions, and discounts inside.
    options = {"gamma": args.gamma} if args.env == "overcooked" else {}
    return plays(ENVS[args.env](task=args.task, **options), args.gamma)


def evaluate(agent: Agent, args, n_episodes: int, stream: str, plays=Episode) -> dict:
    """Play n new episodes, all at once so that their states share the LM's passes. Actions are
    sampled, because the policy is a distribution; `stream` names random numbers of their own."""
    rng = random.Random(f"{stream} {args.seed}")
    playing = episodes = [make_episode(args, plays) for _ in range(n_episodes)]
    while playing:
        policies = agent.remembered_log_policy([episode.state() for episode in playing])
        for episode, policy in zip(playing, policies):
            episode.act(*rng.choices(range(len(policy)), weights=policy.exp().tolist()))
        playing = [episode for episode in playing if not episode.over]
    results = np.array([(e.info["success"], e.ret, e.length) for e in episodes])
    return dict(zip(("success", "return", "length"), results.mean(axis=0).tolist()),
                return_std=results[:, 1].std().item(), episodes=n_episodes)


def describe(result: dict) -> str:
    return ("success {success:.2f}, discounted return {return:.3f} (std {return_std:.3f}), "
            "{length:.1f} primitive steps, over {episodes} sampled episodes".format(**result))


def play(agent: Agent, args, plays=Episode):
    """Play one episode; yield (episode, before, after, action) ahead of each decision: log pi (K,)
    of the LLM without its adapter (None if it has none) and of the agent, and its choice."""
    episode, rng = make_episode(args, plays), random.Random(args.seed)
    while not episode.over:
        before, (after,) = None, agent.remembered_log_policy([episode.state()])
        if hasattr(agent.model, "disable_adapter"):
            with torch.no_grad(), agent.model.disable_adapter():
                (before,) = agent.log_policy([episode.state()])
        (action,) = rng.choices(range(len(after)), weights=after.exp().tolist())
        yield episode, before, after, action
        episode.act(action)


def show_episode(agent: Agent, args, plays=Episode):
    """Print one episode in short: each chosen action and its probability."""
    trained = " before training -> after" if hasattr(agent.model, "disable_adapter") else ""
    print(f"\none episode (probability of the chosen action{trained}):")
    for episode, before, after, action in play(agent, args, plays):
        past = "" if before is None else f"{before[action].exp():.2f} -> "
        print(f"  {past}{after[action].exp():.2f} ", [*episode.info["actions"].values()][action])
    print(f"  success: {episode.info['success']}, discounted return {episode.ret:.3f}")


def trained_parameters(agent: Agent) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name: LoRA and the critic."""
    return {name: p for name, p in agent.named_parameters() if p.requires_grad}


def save(path: Path, content: str | dict):
    """A kill at any moment leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    with open(half, "wb") as file:  # Python's open: torch's own does not say that a disk is full
        file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
    os.replace(half, path)


def load_checkpoint(run: Path, agent: Agent) -> dict:
    """Put weights and optimisers back as `train` saved them; return the rest."""
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)  # runs no code
    if saved["weights"].keys() != trained_parameters(agent).keys():
        raise ValueError(f"{run} belongs to another model, or to experiments/baselines.py")
    agent.load_state_dict(saved["weights"], strict=False)
    for name, optimizer in agent.optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
    agent.scale = saved["scale"]
    return saved


def train(args, agent: Agent, run: Path, plays=Episode):
    """Train on episodes of the kind `plays`; a folder with a checkpoint is resumed. A run repeats
    itself to the last bit (seconds aside), in one go or resumed, on one machine: torch's seed
    makes LoRA, critic, `rehearse`'s texts; `rng` draws the rest, bar evaluation; games draw none.
    Rounding depends on what goes through the LM together: so new states are sorted, an update
    forgets all policies, the critic's states go one by one. The checkpoint has the rest."""
    best, team, n = ENVS[args.env].OPTIMUM[args.task], PartialState(), EPISODES_PER_ROW
    write = save if team.is_main_process else lambda path, content: None
    playing = [make_episode(args, plays) for _ in range(args.n_envs * team.num_processes)]
    rng, rows, seconds, env_steps = random.Random(args.seed), [], 0.0, 0
    steps_per_update = len(playing) * args.rollout_steps
    n_updates = max(1, args.steps // steps_per_update) if args.steps else 0
    text = lambda: "".join(",".join(map(str, x)) + "\n" for x in [METRICS, *map(dict.values, rows)])
    if (run / "checkpoint.pt").exists():
        saved = load_checkpoint(run, agent)
        if len(saved["playing"]) != len(playing):
            raise ValueError(f"{run}: resume it with as many processes as it was begun with")
        rows, before = saved["rows"], saved["before"]
        seconds, env_steps = float(rows[-1]["seconds"]), int(rows[-1]["env_steps"])
        write(run / "metrics.csv", text())  # the checkpoint's log is the true one
        rng.setstate(saved["rng"])
        for episode, state in zip(playing, saved["playing"]):
            episode.obs, episode.info = episode.env.set_state(state)  # ret, length: unused here
    else:
        before = evaluate(agent, args, EVALUATION_EPISODES, "evaluation", plays)
        write(run / "config.json", json.dumps(asdict(args), indent=2))
    trained = lambda part: sum(p.numel() for p in part.parameters() if p.requires_grad)
    print(f"{args.task}, {args.method}: {sum(p.numel() for p in agent.parameters()):,} weights, of "
          f"which {trained(agent.model):,} of the actor and {trained(agent.critic):,} of the "
          f"critic are trained\nbefore training: {describe(before)}")
    bar = tqdm(total=n_updates * steps_per_update, initial=len(rows) * steps_per_update,
               unit="step", dynamic_ncols=True, disable=not (n_updates and team.is_main_process))
    updates = practise(agent, playing, args, rng, n_updates, len(rows))
    try:
        while len(rows) < n_updates and not (rows and rows[-1]["value_loss"] == ""):  # it stopped
            started, update = time.perf_counter(), len(rows) + 1
            # New episodes tell: of a rollout's own the short, successful ones end first.
            tested = evaluate(agent, args, n, f"row {update}", plays) if args.log_success else {}
            rollout, learned = next(updates)
            env_steps += rollout.env_steps
            seconds += time.perf_counter() - started
            new = tested | learned | {"update": update, "env_steps": env_steps, "seconds": seconds}
            log = {name: new.get(name, "") for name in METRICS}
            if not (np.isfinite([x for x in log.values() if x != ""]).all()
                    and all(p.isfinite().all() for p in trained_parameters(agent).values())):
                raise ValueError(f"update {update}: a number is not finite; if that comes again, "
                                 "begin anew with lower rates;")
            rows.append({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in log.items()})
            write(run / "metrics.csv", text())
            write(run / "checkpoint.pt", {
                "weights": trained_parameters(agent), "rows": rows, "before": before,
                "scale": agent.scale,
                "optimizers": {name: x.state_dict() for name, x in agent.optimizers.items()},
                "rng": rng.getstate(), "playing": [episode.env.get_state() for episode in playing]})
            bar.set_postfix_str(", ".join(f"{name} {log[name]:.3f}" for name in (
                "success", "return", "entropy", "approx_kl") if log[name] != ""), refresh=False)
            bar.update(steps_per_update)
            if not learned:
                bar.write(f"nothing was earned in {rollout.env_steps:,} decisions: stopped")
    except (Exception, KeyboardInterrupt) as error:  # a full disk, Ctrl-C, ...
        error.add_note(f"stopped in update {update} of {n_updates}; go on with "
                       f"python {sys.argv[0]} --resume {run}")
        raise
    finally:
        bar.close()
    after = evaluate(agent, args, EVALUATION_EPISODES, "evaluation", plays) if n_updates else None
    if n_updates and team.is_main_process and hasattr(agent.model, "save_pretrained"):
        agent.model.save_pretrained(run / "adapter")  # for peft, and whoever loads its adapters
    write(run / "summary.json", json.dumps(asdict(args) | {
        "env_steps": env_steps, "seconds": seconds, "before": before, "after": after}, indent=2))
    if after is None:
        return print(f"Nothing was trained. The run is in {run}.")
    print("after training: ", describe(after))
    show_episode(agent, args, plays)
    print(f"""
What was learned, in {seconds:.0f} s and {env_steps:,} decisions:
  success  {before['success']:.3f} -> {after['success']:.3f}   (best: 1)
  return   {before['return']:.3f} -> {after['return']:.3f}   (discounted; best: {best:.3f})
The run is in {run}: {", ".join(sorted(path.name for path in run.glob("*")))}.
More episodes of this agent: python {sys.argv[0]} --evaluate {run}""")


# === 8. Arguments and command line. For each knob its reason, and the paper's value. ==============
def knob(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Args:
    env: str = knob("overcooked", "the environment", choices=ENVS)
    task: str = knob("", "a task; else the first one (long: tomato-lettuce-salad, entertainment)")
    norm: str = knob("word", "what an action's log-probability is divided by: its words (the "
                     "paper's best), its tokens, or nothing", choices=["word", "token", "none"])
    model: str = knob("pocket_lm", "a tiny one of ours, or a folder or Hub id; paper: LLaMA-7B")
    steps: int | None = knob(None, "decisions to learn from, 0: none; paper: 50,000 to 500,000")
    seed: int = knob(1, "of everything random: LoRA, critic, sampled actions, minibatches")
    out: str = knob("", "the run's folder; without it, a new one under runs/")
    device: str = knob("auto", "auto: cuda, mps or cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = knob("float32", "frozen LLM's; paper: float16", choices=["float32", "bfloat16"])
    n_envs: int | None = knob(None, "games a process: 8; other LMs 4 (entertainment 8); paper: 4")
    rollout_steps: int = knob(64, "decisions of each environment between updates; paper: 32")
    gamma: float | None = knob(None, "of a primitive step: 0.99, VirtualHome 0.95; paper: the same")
    gae_lambda: float = knob(0.95, "bias against variance of the advantage; paper: the same")
    bootstrap_time_limit: bool = knob(True, "whether V stands in at the time limit; paper: no")
    advantage_eps: float = knob(1.0, "added to the advantages' standard deviation; paper: 1e-8")
    policy_lr: float | None = knob(None, "LoRA's: 2e-3; other LMs, short tasks 1.5e-3; paper: 5e-7")
    standardize: bool | None = knob(None, "critic's inputs: pocket_lm no, others yes; paper: no")
    adam_eps: float | None = knob(None, "Adam's eps: 1e-5, as paper; other LMs, short tasks 1e-6")
    value_lr: float = knob(1e-3, "the critic's learning rate; paper: 1e-5 and 5e-5")
    epochs: int | None = knob(None, "passes over a rollout: pocket_lm 4, others 2; paper: 1")
    minibatches: int = knob(2, "steps per epoch; paper: 4; a state goes through the LM once a step")
    whole_states: bool | None = knob(None, "a state in one step: other LMs, short tasks; paper: no")
    max_prompts: int | None = knob(None, "states a pass (memory): pocket_lm 4, others 8; paper: 4")
    clip_coef: float = knob(0.2, "PPO's clipping of the ratio and of the value; paper: the same")
    ent_coef: float | None = knob(None, "entropy bonus: 0; other LMs on lettuce 0.01; paper: 0.01")
    rehearsal_coef: float | None = knob(None, "rehearsal: pocket_lm 0, others 0.1; paper: none")
    vf_coef: float = knob(0.5, "weight of the value loss, for max_grad_norm; paper: the same")
    target_kl: float = knob(0.02, "stop the policy's update beyond this KL; paper: the same")
    max_grad_norm: float = knob(0.5, "gradient clipping; paper: the same")
    log_success: bool = knob(True, "32 test games an update, up to 1/4 of the time; paper: no")
    method: str = knob("twosome", "experiments/baselines.py has others", choices=["twosome"])

    def __post_init__(self):
        self.task = self.task or next(iter(ENVS[self.env].TASKS))
        if self.task not in getattr(ENVS.get(self.env), "TASKS", ()):
            known = "; ".join(f"{env} has {', '.join(ENVS[env].TASKS)}" for env in ENVS)
            raise ValueError(f"--env {self.env} has no --task {self.task} here; {known}")
        gamma = 0.99 if self.env == "overcooked" else 0.95
        bonus, n_envs, rate, eps, short = {  # of other LMs; short: all tasks but these two
            "tomato-lettuce-salad": (0.01, 4, 2e-3, 1e-5, False),  # a bonus lest it learn to wait
            "entertainment": (0., 8, 2e-3, 1e-5, False)}.get(self.task, (0., 4, 1.5e-3, 1e-6, True))
        for name, (pocket, others) in {
                "gamma": (gamma, gamma), "steps": TASK_STEPS.get(self.task, (5_120, 3_840)),
                "n_envs": (8, n_envs), "epochs": (4, 2), "max_prompts": (4, 8),
                "policy_lr": (2e-3, rate), "adam_eps": (1e-5, eps),
                "standardize": (False, True), "whole_states": (False, short),
                "ent_coef": (0.0, bonus), "rehearsal_coef": (0.0, 0.1)}.items():
            if getattr(self, name) is None:
                setattr(self, name, pocket if Path(self.model).name == "pocket_lm" else others)
        numbers = [x for x in vars(self).values() if type(x) in (int, float)]
        if not all(0 <= x < float("inf") for x in numbers) or max(self.gamma, self.gae_lambda) > 1:
            raise ValueError("no number may be negative, --gamma and --gae-lambda are at most 1")


# --steps for (pocket_lm, others), not counting play that earned nothing; searched on seeds 101 on.
TASK_STEPS = {"tomato-salad": (7_680, 3_072), "tomato-lettuce-salad": (12_800, 10_240),
              "food-preparation": (5_120, 3_840), "entertainment": (12_800, 20_480)}


def command(argv, own, make_agent, plays):
    parser = HfArgumentParser(Args, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN", type=Path, help="go on with an interrupted run")
    modes.add_argument("--evaluate", metavar="RUN", type=Path,
                       help="play another 100 episodes with a run's agent, and these flags on top")
    given = parser.parse_args(argv)
    old = given.resume or given.evaluate
    config = json.loads((old / "config.json").read_text()) if old else own
    parser.set_defaults(**config)  # of the run that the first parse named; now flags over them
    given = vars(parser.parse_args(argv))
    resumed, evaluated = given.pop("resume"), given.pop("evaluate")
    args = Args(**given)
    if resumed and asdict(args) != config:
        raise ValueError("a resumed run keeps its flags; leave them out")
    lm, label = Path(args.model).name, args.norm if args.method == "twosome" else args.method
    name = f"runs/{args.task}-{label}-seed{args.seed}" + f"-{lm}" * (lm != "pocket_lm")
    names = [args.out] if args.out else [name, *(f"{name}-{again}" for again in range(2, 1000))]
    free = [x for x in map(Path, names) if not x.exists() or x.is_dir() and not any(x.iterdir())]
    if not (free or old):
        raise ValueError(f"{names[0]} exists already; choose another --out, or --resume it")
    PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    (run,) = broadcast_object_list(free[:1] or [old])  # as the first process sees it
    if not PartialState().is_main_process:  # it does what the first one does, but nobody sees it
        sys.stdout = open(os.devnull, "w")
    torch.manual_seed(args.seed)
    agent = make_agent(args)
    if not evaluated:
        return train(args, agent, old if resumed else run, plays)
    load_checkpoint(old, agent)
    print(f"{args.task}:", describe(evaluate(agent, args, EVALUATION_EPISODES, "another", plays)))
    show_episode(agent, args, plays)


def main(argv=None, own={}, make_agent=make_agent, plays=Episode):
    """The command line. experiments/ call it with other defaults (own), agents, and episodes that
    show or reward otherwise. An error is one line (-X dev: where); torch.save hides a Ctrl-C."""
    try:
        command(argv, own, make_agent, plays)
    except (Exception, KeyboardInterrupt) as error:
        if sys.flags.dev_mode:
            raise
        cause = error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error
        text = " ".join([str(cause), *getattr(error, "__notes__", ())]).split()
        name = [] if isinstance(cause, (ValueError, OSError)) else [type(cause).__name__]
        print("twosome.py:", *name, *text, file=sys.stderr)
        raise SystemExit(130 if isinstance(cause, KeyboardInterrupt) else 1) from None


if __name__ == "__main__":
    main()
