"""Tests that teach: each says in one sentence what would go wrong if it failed.

    pytest                      # all, in three minutes on one CPU core, without network
    pytest -k boundary -v       # one topic

In the order of twosome.py; then the environments, pocket_lm, the experiments and the READMEs.
"""

import builtins
import copy
import csv
import dataclasses
import dis
import doctest
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import CodeType
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may use the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # numbers depend a little on the number of threads

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import twosome
from overcooked_text import HOME, SERVING, OvercookedText
from pocket_lm import make_pocket_lm
from twosome import Agent, TextEnv, UserError, encode, plain_log_probs, trainable
from virtualhome_text import ROOMS, VirtualHomeText

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job ignores it.
ROOT = Path(__file__).resolve().parent
twosome.EVALUATION_EPISODES = 2  # small runs
# For the libraries' own authors; peft about GPT-2's transposed matrices.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")

# The shortest way to each goal. The household's unseen tasks have the plan of food-preparation.
PLANS = {
    "tomato-salad": "0 2 4 0 1 3",
    "tomato-lettuce-salad": "0 4 7 1 5 7 3 0 1 6",
    "food-preparation": "4 6 5 8 7 9",
    "entertainment": "4 9 5 10 0 6 11 7 13 8 15",
}
TASKS = dict.fromkeys(OvercookedText.TASKS, "overcooked")
TASKS |= dict.fromkeys(VirtualHomeText.TASKS, "virtualhome")
TINY_RUN = ["--n_envs=2", "--rollout_steps=6", "--steps=36", "--test_episodes=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Each test in an empty folder, with the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    random.seed(0)


def close(a, b, tolerance=1e-4):
    """Two lists of tensors are the same numbers."""
    pairs = zip(a, b, strict=True)
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in pairs)


def make_world(task, *gamma):
    return twosome.ENVS[TASKS[task]](task, *gamma)


def follow_plan(env, plan):
    """Yield what each decision of a plan returns."""
    for action in map(int, plan.split()):
        yield env.step(list(env.info["actions"]).index(action))


def states_along_the_plans():
    """33 states of all sizes: (prompt, phrases)."""
    for task, plan in PLANS.items():
        env = TextEnv(make_world(task), 0.99)
        state = env.state()
        for _ in follow_plan(env, plan):
            yield state
            state = env.state()


STATES = list(states_along_the_plans())
SENTENCES = []
for sentence, endings in STATES:
    SENTENCES += [f"{sentence} {ending}" for ending in endings]


# === Scoring: the boundary between prompt and action, the definition, normalisation ===============
def make_tokenizer(style="byte-level", sentences=SENTENCES):
    """A small tokenizer in the style of a well-known family, trained on the sentences."""
    tokenizer = Tokenizer(models.BPE())
    options = {}
    if style.startswith("byte-level"):  # GPT-2, Qwen, SmolLM; Llama-3 adds BOS
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif style == "blank is a token":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "isolated")
    elif style.startswith("sentencepiece"):  # a blank before the first word, too
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(sentences, trainer)
    if "Llama-2" in style:  # the same, done by a normalizer
        tokenizer.pre_tokenizer = None
        blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(blanks)
    if "trimmed" in style:  # offsets without the blank
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if "BOS" in style:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if "EOS" in style else "<s> $A",
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


STYLES = ["byte-level", "byte-level trimmed", "byte-level BOS", "byte-level BOS and EOS"]
STYLES += ["sentencepiece BOS", "sentencepiece Llama-2 BOS", "blank is a token"]


@pytest.mark.parametrize("style", STYLES)
def test_boundary(style):
    """Otherwise an action loses its first token, as it does on GPT-2 and Qwen in code that counts
    'the tokens of the action, less one', or gains one that belongs to the prompt."""
    tokenizer = make_tokenizer(style)
    for prompt, phrases in STATES[::3]:
        prompt_ids, action_ids = encode(tokenizer, prompt, phrases)
        tokens = tokenizer.convert_ids_to_tokens(prompt_ids)
        assert (tokens[0] == "<s>") == ("BOS" in style)
        assert not {"<s>", "</s>"} & set(tokens[1:])
        for phrase, ids in zip(phrases, action_ids, strict=True):
            whole = tokenizer(f"{prompt} {phrase}")["input_ids"]
            assert prompt_ids + ids == (whole[:-1] if "EOS" in style else whole)
            text = "".join(tokenizer.convert_ids_to_tokens(ids))
            # The blank in front of the action's first word is the action's.
            assert text.replace("Ġ", " ").replace("▁", " ") == " " + phrase


@pytest.mark.parametrize("read", [["to wa", "lk"], ["to walk"]])
def test_boundary_inside_a_token_is_an_error(read):
    """Otherwise a token of both prompt and action would be counted for one of them, silently, and
    P(action | prompt) would be wrong; also when one token swallows the whole action."""
    with pytest.raises(UserError, match="'walk'"):
        encode(make_tokenizer("across words", read), "to", ("walk",))


@pytest.mark.parametrize("phrases", [(), ("",), ("wait", " "), ("wait", "walk", "wait")])
def test_phrases_that_have_no_policy_are_an_error(phrases):
    """Otherwise a blank phrase, of 0 words, would make NaN, and of two equal ones each would get
    half of the probability, in silence."""
    with pytest.raises(UserError, match="blank or equal phrases"):
        encode(make_tokenizer(), STATES[0][0], phrases)


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OPTIONS = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},  # its output is not as wide as its layers
    "smollm3": {"no_rope_layer_interval": 2},  # every second layer knows no positions
    "gemma": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": 16},
    "falcon, ALiBi": {"alibi": True},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mamba": {"state_size": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16},
}
# A window over columns, ALiBi's distance in columns, a state that runs through all columns, logits
# that are squashed behind the output matrix, and what nobody has compared.
OTHERS = ["mistral, window", "bloom", "falcon", "falcon, ALiBi", "gemma2", "gemma3_text"]
OTHERS += ["gpt_neo", "mixtral"]


def tiny(family, **options):
    """A small random LM. Its weights are large, so that what a token looks at matters."""
    options = SHAPE | OPTIONS.get(family, {}) | options
    config = AutoConfig.for_model(family.split(",")[0], **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


def move_lora(model):
    """As after training: a fresh LoRA has B = 0 and changes nothing."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)


SMALL = twosome.make_settings(
    task="tomato-salad",
    device="cpu",
    n_envs=2,
    rollout_steps=12,
    target_kl=1e9,
    max_grad_norm=1e9,
    ent_coef=0.0,
    epochs=1,
    minibatches=1,
    value_epochs=1,
    max_prompts=32,
)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def an_agent(family="pocket_lm", dtype="float32", **changes):
    """An agent on pocket_lm, or on a small random LM, whose LoRA has moved."""
    if family == "pocket_lm":
        model, tokenizer = twosome.load_lm("pocket_lm", dtype=dtype)
    else:
        model, tokenizer = tiny(family), make_tokenizer()
    model = twosome.add_lora(model)
    move_lora(model)
    return Agent(model, tokenizer, small(**changes), twosome.choose_scorer(model))


@pytest.mark.parametrize("family", ["pocket_lm", "gpt2", "opt", *OTHERS])
def test_joint_probability_token_by_token(family):
    """Otherwise the sum of log-probabilities would miss or repeat a token, on some architecture:
    here the definition is spelled out, one forward pass a token."""
    agent = an_agent(family)
    prompt, phrases = STATES[3]
    encoded = encode(agent.tokenizer, prompt, phrases)
    for score in (plain_log_probs, agent.score):
        (log_probs,) = score(agent.model, [encoded])
        for phrase, log_prob in zip(phrases, log_probs, strict=True):
            ids = torch.tensor(agent.tokenizer(f"{prompt} {phrase}")["input_ids"])
            total = 0.0
            for n in range(len(encoded[0]), len(ids)):
                with torch.no_grad():
                    logits = agent.model(input_ids=ids[None, :n]).logits[0, -1]
                total += logits.log_softmax(-1)[ids[n]].item()
            assert log_prob.item() == pytest.approx(total, abs=1e-3)


def test_policy_and_normalisation_by_hand():
    """Otherwise long actions would be punished, or words in many pieces rewarded, by mistake."""
    agent, (prompt, phrases) = an_agent(), STATES[2]
    encoded = encode(agent.tokenizer, prompt, phrases)
    (log_probs,) = plain_log_probs(agent.model, [encoded])
    n_words = [len(phrase.split()) for phrase in phrases]
    n_tokens = [len(ids) for ids in encoded[1]]
    for norm, n in (("word", n_words), ("token", n_tokens), ("none", [1])):
        agent.settings.norm = norm
        (log_pi,) = agent.log_policy([STATES[2]])
        roots = (log_probs / torch.tensor(n)).exp()
        assert close([log_pi.exp()], [roots / roots.sum()])


# === The same numbers, faster =====================================================================
def test_tree_by_hand():
    """Otherwise a token would be computed twice, or see a branch that is not its own."""
    encoded = [([7, 8], [[1, 2, 3], [1, 4], [5]]), ([7, 9], [[1, 2]])]
    nodes, mask, sources, targets = twosome.as_tree(encoded)
    texts = ["".join(map(str, node)) for node in nodes]
    assert texts == ["7", "78", "781", "7812", "79", "791"]  # An action's end has no node.
    for text, row in zip(texts, mask, strict=True):
        assert row.tolist() == list(map(text.startswith, texts))
    assert [texts[i][-1] for i in sources] == list("81281891")
    assert "".join(map(str, targets)) == "12314512"


def random_states():
    """Tokens of four prompts and of their actions, with beginnings in common."""
    states = []
    for prompt_length, n_actions in [(30, 5), (17, 2), (8, 9), (20, 1)]:
        sizes = [prompt_length, *random.choices(range(2, 7), k=n_actions)]
        prompt, *actions = [random.choices(range(2, 400), k=size) for size in sizes]
        actions[-1][0] = actions[0][0]
        states.append((prompt, actions))
    states[1][0][:12] = states[0][0][:12]
    return states


def score_with_gradient(score, model, encoded):
    """The values, and the gradient of one number that depends on all of them, each as a vector."""
    values = torch.cat(score(model, encoded))
    weights = list(trainable(model).values())
    total = values.exp().sum().log()
    found = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
    return values.detach(), torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", twosome.TREE_FAMILIES)
def test_tree_equals_the_definition(family, dtype):
    """Otherwise the fast way computes something else than P(action | prompt), or an LM of more than
    ten blocks is trained in the wrong ones, or what its frozen blocks made of one state is taken
    for another's. In bfloat16 the tree may err as the definition does, compared with float32."""
    model = twosome.add_lora(tiny(family, num_hidden_layers=12).to(getattr(torch, dtype)))
    move_lora(model)
    adapted = ["lora_" in str(block) for block in twosome.decoder_blocks(model)]
    assert adapted == [False] * 2 + [True] * 10
    exact = copy.deepcopy(model).float()
    tree = twosome.choose_scorer(model)
    count = Mock(return_value=None)
    tree.frozen.blocks[0].register_forward_hook(count)
    a, b, c, d = random_states()
    with torch.no_grad():
        tree(model, [a, b, c, d])  # From now on all frozen blocks are cached.
    for states in ([d, b, a], [c]):
        count.reset_mock()
        found = score_with_gradient(tree, model, states)
        assert not count.called
        expected = score_with_gradient(plain_log_probs, exact, states)
        assert expected[1].norm() > 0.01
        if dtype == "float32":
            assert close(found, expected)
        else:
            plain = score_with_gradient(plain_log_probs, model, states)
            for x, y, z in zip(found, plain, expected, strict=True):
                # A mask that hides one token, or shows one more, costs 2 to 20 times as much.
                assert (x - z).norm() < 2 * (y - z).norm() + 0.002 * z.norm()


@pytest.mark.parametrize("family", [*OTHERS, "mamba"])
def test_other_families_are_scored_row_by_row(family, capsys):
    """Otherwise an LM whose attention does not take our mask would be scored wrongly, in silence,
    or slowly, and nobody would know why."""
    model = tiny(family)
    assert twosome.choose_scorer(model) is plain_log_probs
    (line,) = capsys.readouterr().out.splitlines()
    assert family.split(",")[0] in line


def test_caches_are_bounded(monkeypatch):
    """Otherwise a world whose texts never repeat would fill the memory."""
    monkeypatch.setattr(twosome, "CACHE_SIZE", 5)
    model = twosome.add_lora(tiny("llama", num_hidden_layers=12))
    agent = Agent(model, make_tokenizer(), SMALL, twosome.choose_scorer(model))
    for state in STATES:
        (log_pi,) = agent.cached_log_policy([state])
        assert close([log_pi], agent.log_policy([state]))
        agent.features([state])
        nodes = twosome.as_tree([encode(agent.tokenizer, *state)])[0]
        assert len(agent.score.frozen.cache) <= 5 + len(nodes)
        assert len(agent.feature_cache) <= 6
    assert encode.cache_info().maxsize == 100_000


# === The actor-critic =============================================================================
@pytest.mark.parametrize("family", [*twosome.TREE_FAMILIES, *OTHERS, "qwen2_moe", "mamba"])
def test_lora_is_in_attention_and_in_nothing_else(family):
    """Otherwise a mixture of experts would send words to other experts, or a model whose layers
    have another name would not be trained."""
    model = twosome.add_lora(tiny(family))
    assert trainable(model)
    assert all(re.search("attn|attention|mixer", name) for name in trainable(model))


def test_lora_is_in_the_language_model_of_a_multimodal_one():
    """Otherwise the vision tower would be trained, which no text goes through."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    text = SHAPE | {"head_dim": 8, "model_type": "gemma3_text"}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    model = twosome.add_lora(AutoModelForCausalLM.from_config(config).eval())
    agent = Agent(model, make_tokenizer(), SMALL, twosome.choose_scorer(model))
    changed = moved(agent, a_rollout(agent))
    assert [name for name in changed if "language_model" in name]
    assert not [name for name in changed if "vision" in name or "projector" in name]


def test_an_lm_without_anything_to_train_is_refused():
    """Otherwise a run would go to its end, and nothing would have been learned."""
    with pytest.raises(UserError, match="no layers for LoRA"):
        twosome.add_lora(tiny("llama", num_hidden_layers=0))


def test_policy_and_value_do_not_depend_on_batch_mates():
    """Otherwise a state would be worth something else beside a longer one: the mistake of reading
    the last column of a padded batch."""
    agent = an_agent()
    nn.init.normal_(agent.critic[-1].weight)  # A fresh critic says 0 to everything.
    states = short, long = STATES[1], STATES[-1]
    assert len(short[0]) < len(long[0]) / 2
    for judge in (agent.value, agent.log_policy):
        together = judge(states)
        agent.feature_cache.clear()
        alone = [judge([state])[0] for state in states]
        assert close(together, alone, 1e-5) and not torch.equal(alone[0], alone[1])


def test_frozen_lm_stays_what_it_was():
    """Otherwise training would not start from what the LM knows; or the critic, which reads the
    LM's last hidden state of the whole prompt, would lose its footing with each policy update."""
    base, tokenizer = twosome.load_lm("pocket_lm")
    fresh = twosome.add_lora(copy.deepcopy(base))
    agent = an_agent()
    encoded = [encode(tokenizer, *state) for state in STATES]
    untrained, first, now = [plain_log_probs(x, encoded[:3]) for x in (base, fresh, agent.model)]
    assert close(first, untrained, 1e-6) and not close(now, untrained, 1e-2)
    with agent.model.disable_adapter():
        assert close(agent.score(agent.model, encoded[:3]), untrained)
    for features, (prompt_ids, _) in zip(agent.features(STATES), encoded, strict=True):
        hidden = base.get_decoder()(input_ids=torch.tensor([prompt_ids])).last_hidden_state
        assert close([features], [hidden[0, -1]], 1e-5)


def test_policies_are_cached_until_the_policy_moves():
    """Otherwise each state would go through the LM at each of its visits, or a rollout would be
    played by the policy before the last update."""
    agent = an_agent()
    agent.score = Mock(wraps=agent.score)
    before = agent.cached_log_policy([*STATES, *STATES])
    scored = [len(call.args[1]) for call in agent.score.call_args_list]
    assert sum(scored) == len(STATES) and close(before[:33], before[33:], 0)
    learn(agent, a_rollout(agent))
    after = agent.cached_log_policy(STATES)
    assert close(after, agent.log_policy(STATES)) and not close(after, before[:33], 1e-3)


# === Playing ======================================================================================
class Toy:
    """Of its two actions the second earns 1 and ends the episode. Two decisions are the limit."""

    TASKS, GAMMA, STEPS = ["toy"], 0.5, {"toy": 16}
    goal = "see the end"
    actions = {0: "wait", 1: "press the button"}
    reward = 1.0

    def __init__(self, task="toy", gamma=0.5):
        self.decisions = 0

    def observe(self, success):
        info = {"actions": self.actions, "primitive_steps": 2, "success": success}
        return "You see a button.", info

    def reset(self):
        self.decisions = 0
        return self.observe(False)

    def step(self, action):
        self.decisions += 1
        obs, info = self.observe(action == 1)
        return obs, self.reward * action, action == 1, self.decisions >= 2, info

    def get_state(self):
        return self.decisions

    def set_state(self, state):
        self.decisions = state
        return self.observe(False)


def toy_env(kind=Toy):
    return TextEnv(kind(), 0.5)


class Guesser(nn.Module):
    """A stub of an agent, which acts at random and learns nothing."""

    wrapper, logits = TextEnv, torch.zeros(2)

    def __init__(self, settings=SMALL):
        super().__init__()
        self.settings = settings
        self.model, self.critic = nn.Linear(1, 1), nn.Linear(1, 1)
        self.actor_optimizer = twosome.make_optimizer(self.model)
        self.critic_optimizer = twosome.make_optimizer(self.critic)

    def cached_log_policy(self, states):
        return [self.logits.log_softmax(0)] * len(states)

    def value(self, states):
        return torch.ones(len(states))

    def learn(self, rollout, remaining, rng):
        return {"remaining": remaining}


class Notebook:
    """A stub of a run, which keeps nothing but the log."""

    decisions, before = 0, None

    def __init__(self):
        self.rows, self.purposes = [], []

    def rng(self, purpose):
        self.purposes.append(purpose)
        return random.Random(f"{purpose}, seed 1, process 0")

    def restore(self, agent, envs):
        pass

    def log(self, metrics):
        self.rows.append(metrics)

    def save(self, agent, envs):
        pass


def a_rollout(agent):
    settings = agent.settings
    envs = [twosome.make_env(agent, settings) for _ in range(settings.n_envs)]
    return twosome.collect(agent, envs, random.Random(0))


@pytest.mark.parametrize("task", TASKS)
def test_optimum_is_reached_by_offered_actions(task):
    """Otherwise the best policy could not be learned, the README's tables would mean something
    else, or GAE (here with lambda 1 and a critic that says 0) discount unlike the returns."""
    env = twosome.make_env(Guesser, twosome.make_settings(env=TASKS[task], task=task))
    steps = list(follow_plan(env, PLANS.get(task, PLANS["food-preparation"])))
    reward, discount = torch.tensor(steps).float().T[:, :, None]
    end = 0 * reward
    end[-1] = 1
    advantage = twosome.gae(reward, discount, 0 * reward, 0 * reward, end, 1.0)
    assert env.done and env.info["success"]
    found = env.discounted_return, advantage[0].item()
    assert found == pytest.approx([env.env.OPTIMUM[task]] * 2, abs=6e-6)


def test_gamma_counts_within_a_macro_action_as_after_it():
    """Otherwise --gamma would change only one of two discounts: here a macro-action of two steps,
    each of which costs 0.001."""
    env = twosome.make_env(Guesser, twosome.make_settings(gamma=0.5))
    assert env.step(0) == pytest.approx((-0.0015, 0.25))


def test_time_limit_is_no_end():
    """Otherwise the critic would learn that states lose their worth when the clock, which is no
    part of the prompt, runs out; or an episode would flow back into the one before it."""
    agent, envs = Guesser(small(rollout_steps=3)), [toy_env()]
    agent.logits = torch.tensor([0.0, -torch.inf])  # It always waits, and expects 1.
    rollout = twosome.collect(agent, envs, random.Random(0))
    delta = 0.25 * 1 - 1  # also where the time limit is reached, after two decisions
    expected = [delta + 0.25 * 0.95 * delta, delta, delta]
    assert rollout.advantage.tolist() == pytest.approx(expected)
    assert torch.equal(rollout.returns, 1 + rollout.advantage)
    agent.logits = torch.tensor([-torch.inf, 0.0])  # It always ends the episode.
    rollout = twosome.collect(agent, envs, random.Random(0))
    assert rollout.returns.tolist() == rollout.choice.tolist() == [1, 1, 1]


def test_evaluation_by_hand():
    """Otherwise success, return or length would be those of some episodes, or not discounted."""
    result = twosome.evaluate(Guesser(), toy_env, 4000, random.Random(0))
    # Half of the episodes end after one decision, of two primitive steps; a quarter fails.
    expected = {"success": 0.75, "return": 0.5 + 0.25 * 0.25, "length": 3}
    assert result == pytest.approx(expected, abs=0.03)


def test_a_rollout_without_reward_is_thrown_away():
    """Otherwise the critic's errors would pass for advantages, and wear down the prior that is to
    lead to a reward; or a hopeless run would never end, or play the same again and again."""
    agent, run = Guesser(small(rollout_steps=4, steps=32, test_episodes=1)), Notebook()

    class Late(Toy):
        """It earns nothing in the first three rollouts."""

        @property
        def reward(self):
            return float(run.decisions >= 24)

    new_env = partial(toy_env, Late)
    twosome.train(agent, new_env, run)
    assert [row["remaining"] for row in run.rows] == [1, 0.75, 0.5, 0.25]
    assert run.decisions == 56
    assert len(set(run.purposes)) == len(run.purposes)  # Each has random numbers of its own.
    Late.reward = 0.0
    with pytest.raises(UserError, match="hardly any reward"):
        twosome.train(agent, new_env, Notebook())


# === PPO ==========================================================================================
def learn(agent, rollout, remaining=1.0, **changes):
    """Update the agent, and return the metrics and the last gradients of LoRA."""
    agent.settings = small(**changes)
    metrics = agent.learn(rollout, remaining, random.Random(0))
    return metrics, [p.grad for p in trainable(agent.model).values()]


def moved(agent, rollout, **changes):
    """The names of all weights that an update changes."""
    before = copy.deepcopy(agent.state_dict())
    learn(agent, rollout, **changes)
    return {name for name, p in agent.state_dict().items() if not torch.equal(p, before[name])}


def test_policy_loss_by_hand():
    """Otherwise the policy would be pushed on beyond 1 +- eps, or held back on the way home."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([1.0, 1, -1, -1, 2])
    new, entropy = torch.rand(5).log(), torch.rand(5)
    loss, metrics = twosome.policy_loss(new, new - ratio.log(), entropy, advantage, 0.2, 0.01)
    surrogate = torch.tensor([1.2, 0.5, -1.5, -0.8, 2.2])
    clipped = torch.tensor([1.0, 1, 1, 1, 0])
    assert close([loss], [-surrogate - 0.01 * entropy])
    assert close(metrics.values(), [entropy, ratio - 1 - ratio.log(), clipped])


def test_value_loss_by_hand():
    """Otherwise the critic would be pulled elsewhere than to the mean return, or not at all."""
    agent = an_agent()
    rollout = a_rollout(agent)
    nn.init.constant_(agent.critic[-1].bias, 0.5)
    rollout.returns = torch.tensor([1.0, 2.0] * 12)
    rollout.advantage = torch.tensor([1.0, 1.6] * 12)
    metrics, _ = learn(agent, rollout)
    assert metrics["value_loss"] == pytest.approx((0.5 * 1**2 + 0.5 * 1.6**2) / 2)
    assert agent.critic[-1].bias.grad.item() == pytest.approx((-0.5 - 1.5) / 2)
    # The errors 1 and 1.6 have 0.36 times the variance of the returns.
    assert metrics["explained_variance"] == pytest.approx(1 - 0.36, abs=1e-5)


def test_minibatches_are_all_decisions_once_an_epoch():
    """Otherwise some decisions would be learned from twice and others never, or always in the same
    company."""
    batches = list(twosome.minibatches(42, 3, 4, random.Random(0)))
    assert sorted(map(len, batches[:4])) == [10, 10, 11, 11]
    epochs = [sum(four, []) for four in twosome.chunks(batches, 4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(42)) and epochs.count(epoch) == 1
    assert sorted(twosome.minibatches(2, 1, 3, random.Random(0))) == [[0], [1]]


@pytest.mark.parametrize("dtype, max_prompts", [("float32", 4), ("bfloat16", 1)])
def test_first_ratio_of_an_update_is_one(dtype, max_prompts):
    """Otherwise old and new policy would be computed in different ways, and PPO clip before it has
    learned anything; or bfloat16 would swallow small steps. (How it rounds depends on the other
    states of a tree, so there each state has its own.)"""
    agent = an_agent(dtype=dtype, max_prompts=max_prompts)
    assert agent.model.dtype == getattr(torch, dtype)
    assert {p.dtype for p in trainable(agent).values()} == {torch.float32}
    rollout = a_rollout(agent)
    policies = agent.cached_log_policy(rollout.states)
    for policy, i, log_prob in zip(policies, rollout.choice, rollout.old_log_pi_a, strict=True):
        assert policy[i] == log_prob
    metrics, _ = learn(agent, rollout, max_prompts=max_prompts)
    assert metrics["approx_kl"] < 1e-6 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("family", ["pocket_lm", "gpt2", "bloom", "qwen2_moe"])
def test_updates_move_exactly_lora_and_critic(family):
    """Otherwise the LM would forget what it has read, or LoRA would find nothing to adapt in some
    architecture."""
    agent = an_agent(family, rollout_steps=6)
    agent.extra_loss = twosome.Rehearsal(agent.model, 400, 1.0)
    changed = moved(agent, a_rollout(agent), epochs=2, value_epochs=2)
    names = {name for name, _ in agent.named_parameters()}
    assert changed == {name for name in names if "lora_" in name or name.startswith("critic.")}


def test_learning_rates_fall_to_zero():
    """Otherwise the policy would not settle at the end, or a resumed run begin with large steps; or
    the entropy bonus would keep the policy random."""
    agent = an_agent(rollout_steps=3)
    rollout = a_rollout(agent)
    rollout.advantage *= 0  # Only the bonus pulls.
    _, whole = learn(copy.deepcopy(agent), rollout, ent_coef=1.0)
    _, part = learn(agent, rollout, remaining=0.25, ent_coef=1.0)
    assert close([0.25 * gradient for gradient in whole], part) and whole[0].any()
    assert agent.actor_optimizer.param_groups[0]["lr"] == 0.25 * SMALL.policy_lr
    assert agent.critic_optimizer.param_groups[0]["lr"] == 0.25 * SMALL.value_lr


def test_gradient_is_the_policy_gradient():
    """Otherwise learning would run backwards, or give one decision's credit to another; or depend
    on how many states go through the LM at once, which a graphics card's memory decides; or scale
    the critic's errors, where nothing was earned, to the size of a success."""
    agent = an_agent(rollout_steps=3)
    rollout = a_rollout(agent)
    advantage = torch.tensor([1.0, -2.0, -1.0, 1.0, 1.0, 0.0])
    rollout.advantage = advantage + 7  # Their mean, 7, plays no part.
    policies = agent.log_policy(rollout.states)
    entropy = torch.cat(policies).exp().dot(-torch.cat(policies)) / len(policies)
    chosen = [log_pi[i] for log_pi, i in zip(policies, rollout.choice, strict=True)]
    loss = -(torch.stack(chosen) * advantage / (advantage.std(correction=0) + 0.1)).mean()
    expected = torch.autograd.grad(loss, list(trainable(agent.model).values()))
    for max_prompts in (1, 2):
        metrics, found = learn(copy.deepcopy(agent), rollout, max_prompts=max_prompts)
        assert metrics["entropy"] == pytest.approx(entropy.item(), abs=1e-5)
        assert close(found, expected, 1e-5) and found[0].abs().max() > 1e-3


def test_update_stops_when_the_policy_has_moved_far():
    """Otherwise one rollout could carry the policy to where its own data say nothing any more."""
    agent = an_agent()
    rollout, tree = a_rollout(agent), agent.score
    agent.actor_optimizer.step = step = Mock()

    def score(model, encoded):
        """As if the policy were another one after two gradient steps."""
        factor = 1 + (step.call_count == 2)
        return [log_probs * factor for log_probs in tree(model, encoded)]

    agent.score = score
    for target_kl, n_steps in ((0.02, 2), (1e9, 6)):
        learn(agent, rollout, epochs=4, target_kl=target_kl)
        assert step.call_count == n_steps


def global_names(code):
    """What a piece of compiled code asks the module for."""
    names = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            names |= global_names(part)
    return names


def test_the_method_stands_alone():
    """Otherwise who reads or copies the first half of the file would not have the method: it must
    run by itself, by the plain definition, and learn what the whole program learns."""
    text, line, _ = (ROOT / "twosome.py").read_text().partition("# === 8.")
    code = compile(text, "sections 1 to 7", "exec")
    alone = {"__name__": "alone"}
    exec(code, alone)
    alone["EVALUATION_EPISODES"] = 1
    assert line and global_names(code) <= alone.keys() | vars(builtins).keys()
    flags = {"rollout_steps": 8, "n_envs": 3, "steps": 72, "test_episodes": 1}
    flags |= {"rehearsal_coef": 0, "device": "cpu"}
    torch.manual_seed(1)
    model = alone["add_lora"](AutoModelForCausalLM.from_pretrained(ROOT / "pocket_lm"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pocket_lm")
    run = Notebook()
    agent = alone["Agent"](model, tokenizer, alone["Settings"](**flags))
    alone["train"](agent, lambda: alone["TextEnv"](OvercookedText(), 0.99), run)

    twosome.main([f"--{name}={value}" for name, value in flags.items()] + ["--out=run"])
    for row, expected in zip(metrics("run"), run.rows, strict=True):
        found = {name: float(row[name]) for name in expected}
        assert found == pytest.approx(expected, abs=1e-4)
    assert len({row["entropy"] for row in run.rows}) == 3  # It learns.


# === Rehearsal, and loading LMs ===================================================================
def test_rehearsal_pulls_towards_the_untrained_lm():
    """Otherwise it would pull elsewhere, and the language be lost unnoticed."""
    agent = an_agent()
    base, _ = twosome.load_lm("pocket_lm")
    agent.extra_loss = loss = twosome.Rehearsal(agent.model, 400, 0.5)
    # Whichever four are drawn, it is the first one.
    loss.texts = ids = loss.texts[:1].expand(32, -1)
    loss.logits = loss.logits[:1].expand(32, -1, -1)
    log_p_0 = base(input_ids=ids).logits[0].log_softmax(-1)
    log_p = agent.model(input_ids=ids).logits[0].log_softmax(-1)
    kl = (log_p_0.exp() * (log_p_0 - log_p)).sum(-1).mean()
    expected = torch.autograd.grad(0.5 * kl, list(trainable(agent.model).values()))
    rollout = a_rollout(agent)
    rollout.advantage = 0 * rollout.advantage  # Nothing else pulls.
    _, found = learn(agent, rollout)
    assert close(found, expected, 1e-5) and found[0].abs().max() > 1e-4


def test_rehearsed_texts_are_what_the_untrained_lm_would_say():
    """Otherwise an LM whose folder sets max_new_tokens or repetition_penalty would rehearse shorter
    texts, or unlikely ones; or an agent that has learned would rehearse what it has forgotten."""
    plain = twosome.add_lora(twosome.load_lm("pocket_lm")[0])
    other = an_agent().model
    other.generation_config.update(max_new_tokens=3, repetition_penalty=9.0)
    texts = []
    for model in (plain, other):
        torch.manual_seed(3)
        texts.append(twosome.Rehearsal(model, 400, 1.0).texts)
    assert texts[0].shape == (32, 40) and torch.equal(*texts)


def save_lm(folder, weights=(), style="byte-level", family="llama", **options):
    """A small model in a folder. `weights` are the new values of some of its weights, or None."""
    tiny(family, **options).save_pretrained(folder)
    make_tokenizer(style).save_pretrained(folder)
    tensors = load_file(f"{folder}/model.safetensors")
    for name, value in dict(weights).items():
        tensor = tensors.pop(name)
        if value is not None:
            tensors[name] = torch.full_like(tensor, value)
    save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})


def fails(*argv, **others):
    """Return the one line that a mistake ends with."""
    with pytest.raises(SystemExit) as end:
        twosome.main([*map(str, argv)], **others)
    line = end.value.code
    assert line.startswith("twosome.py: ") and "\n" not in line
    return line


def edit(path, **changes):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


NORM = "model.layers.1.input_layernorm.weight"
BAD_MODELS = {  # what is wrong: (options of save_lm, a word of the message)
    "a weight is missing": ({"weights": {NORM: None}}, NORM),
    "a weight is no number": ({"weights": {NORM: math.nan}}, "NaN"),
    "an encoder": ({"family": "bert"}, "no causal LM"),
    "tokens across words": ({"style": "across words"}, "merges the end of the prompt"),
    "a short context": ({"max_position_embeddings": 16}, "the LM reads 16"),
}


@pytest.mark.parametrize("options, hint", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model_folder(options, hint):
    """Otherwise an LM that is not whole, or sees the words that it is to predict, would play on and
    look merely stupid; or leave a folder in the way."""
    save_lm("lm", **options)
    assert hint in fails("--model", "lm", "--out", "run")
    assert os.listdir() == ["lm"]


def test_tokenizer_without_offsets():
    """Otherwise the boundary between prompt and action would be guessed."""
    save_lm("lm")
    Path("lm/tokenizer.json").unlink()
    Path("lm/tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert "offset" in fails("--model", "lm")


BOMB = b"cos\nmkdir\n(S'exploded'\ntR."  # a pickle; who loads it makes a folder


@pytest.mark.parametrize("mode", ["--model", "--evaluate", "--resume"])
def test_no_pickle_is_ever_loaded(finished, mode):
    """Otherwise a model or a run from a stranger could run a stranger's program."""
    shutil.copytree(ROOT / "pocket_lm" if mode == "--model" else finished, "folder")
    if mode == "--model":
        Path("folder/model.safetensors").unlink()
    name = "pytorch_model.bin" if mode == "--model" else "checkpoint.pt"
    Path("folder", name).write_bytes(BOMB)
    fails(mode, "folder")
    assert not Path("exploded").exists()
    pickle.loads(BOMB)  # It is a real one.
    assert Path("exploded").exists()


def test_no_code_from_a_model_folder_is_ever_run():
    """Otherwise a model from a stranger could run a stranger's program: its config names Python
    code that comes with it. Where the library knows the architecture, it is used without."""
    save_lm("lm")
    Path("lm/evil.py").write_text("open('exploded', 'w')\n")
    edit("lm/tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit("lm/config.json", auto_map=evil)
    assert type(twosome.load_lm("lm")[0]).__name__ == "LlamaForCausalLM"
    edit("lm/config.json", model_type="evil")
    assert "cannot load the LM" in fails("--model", "lm", "--out", "run")
    assert os.listdir() == ["lm"]  # And nothing has exploded.


# === Runs =========================================================================================
@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run of three updates."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    twosome.main([*TINY_RUN, "--out", str(run)])
    return run


def metrics(run):
    """The log, but for what a clock says."""
    with open(Path(run, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("seconds")
    return rows


def checkpoint(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def summary(run):
    return json.loads(Path(run, "summary.json").read_text())


def load(run):
    """The agent of a run, and its settings."""
    settings = twosome.make_settings(**twosome.read_config(run))
    agent = twosome.make_agent(settings)
    twosome.Run(run, settings, "twosome").load(agent)
    return agent, settings


def numbers(run):
    """The log and the weights, each as one tensor."""
    log = [torch.tensor(list(map(float, row.values()))) for row in metrics(run)]
    weights = checkpoint(run)["weights"]
    return torch.stack(log), torch.cat([weights[name].flatten() for name in sorted(weights)])


def same_up_to_rounding(a, b):
    assert close(numbers(a), numbers(b), 1e-5)
    assert summary(a)["after"] == pytest.approx(summary(b)["after"], abs=1e-5)


def test_same_seed_same_run(finished):
    """Otherwise no result could be repeated."""
    twosome.main([*TINY_RUN, "--out", "again"])
    assert close(numbers("again"), numbers(finished), 0)
    twosome.main([*TINY_RUN, "--out", "other", "--seed", "2", "--steps", "12"])
    assert metrics("other")[0] != metrics(finished)[0]


def test_folder_of_a_run(finished):
    """Otherwise plots, comparisons and exercises would miss what they need."""
    files = "adapter checkpoint.pt config.json metrics.csv summary.json"
    assert sorted(os.listdir(finished)) == files.split()
    rows, results = metrics(finished), summary(finished)
    assert [row["decisions"] for row in rows] == ["12", "24", "36"]
    assert numbers(finished)[0].isfinite().all()
    needed = "success return length entropy clip_fraction explained_variance"
    assert rows[0].keys() >= set(needed.split())
    assert results["task"] == "tomato-salad" and results["decisions"] == 36
    assert results["before"].keys() == results["after"].keys() == {"success", "return", "length"}


def test_adapter_is_the_policy_for_plain_peft(finished):
    """Otherwise nobody could use elsewhere what was learned; or everybody would read the name of a
    home folder in it."""
    agent, settings = load(finished)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "pocket_lm")
    model = peft.PeftModel.from_pretrained(base, finished / "adapter")
    other = Agent(model, agent.tokenizer, settings)
    assert close(agent.log_policy(STATES[:5]), other.log_policy(STATES[:5]))
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pocket_lm"
    assert "/home" not in str(config) and str(ROOT) not in str(config)


def test_evaluate_loads_what_was_trained(finished, capsys):
    """Otherwise --evaluate would show another agent, or not the task that is asked for."""
    agent, settings = load(finished)
    settings = dataclasses.replace(settings, task="tomato-lettuce-salad")
    rng = twosome.Run(finished, settings, "twosome").rng("other episodes")
    new_env = partial(twosome.make_env, agent, settings)
    expected = twosome.describe(twosome.evaluate(agent, new_env, 2, rng))
    twosome.main(["--evaluate", str(finished), "--task", settings.task])
    assert f"salad: {expected}" in capsys.readouterr().out


def ctrl_c(agent):
    os.kill(os.getpid(), signal.SIGINT)


def full_disk(agent, limit=20_000):
    """From now on no file may become larger than this."""
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def broken_weight(agent):
    agent.critic[0].weight.data.fill_(math.nan)


def unlucky(happens, method, call):
    """Make an agent to which something happens before a call of one of its methods."""

    def make_agent(settings):
        agent = twosome.make_agent(settings)
        do, count = getattr(agent, method), itertools.count(1)

        def do_or_fail(*args):
            if next(count) == call:
                happens(agent)
            return do(*args)

        setattr(agent, method, do_or_fail)
        return agent

    return make_agent


@pytest.mark.parametrize(
    "happens, method, call, rows, hint",
    [
        (ctrl_c, "learn", 3, 2, "interrupted"),
        (full_disk, "learn", 3, 3, "File too large"),
        (broken_weight, "learn", 3, 2, "not finite"),
    ],
)
def test_interrupted_run_equals_uninterrupted_run(
    finished, capsys, happens, method, call, rows, hint
):
    """Otherwise an interruption, or a full disk, would change the result; or training would go on
    with NaN and overwrite its last good checkpoint: hours would be lost."""
    try:
        make_agent = unlucky(happens, method, call)
        line = fails(*TINY_RUN, "--out", "my run", make_agent=make_agent)
    finally:
        full_disk(None, limit=-1)
    # The printed commands can be pasted, with the space.
    assert hint in line and shlex.split(line)[-2:] == ["--resume", "my run"]
    assert len(metrics("my run")) == rows
    # A spreadsheet saves the log in its own way; the checkpoint has the true one.
    Path("my run/metrics.csv").write_bytes(b"\xff\xfe\0")
    twosome.main(["--resume", "my run"])
    assert shlex.split(capsys.readouterr().out)[-2:] == ["--evaluate", "my run"]
    same_up_to_rounding("my run", finished)


def attempt(file="", n=1):
    """Start or resume the run in a process of its own, kill that when it renames a file for the
    n-th time, and return its exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = itertools.count(1)

    def kill(event, details):
        if event == "os.rename" and str(details[1]) == f"run/{file}" and next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    begin = [*TINY_RUN, "--out", "run"]
    try:
        twosome.main(["--resume", "run"] if os.path.exists("run/config.json") else begin)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_run_equals_uninterrupted_run(finished):
    """Otherwise a power cut, or a full memory, would change the result or leave a folder with which
    one can neither go on nor begin again."""
    moments = [("checkpoint.pt", 1), ("metrics.csv", 2), ("config.json", 1), ("summary.json", 1)]
    for file, time in moments:
        assert attempt(file, time) == signal.SIGKILL
    assert attempt() == 0
    same_up_to_rounding("run", finished)


PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import twosome

twosome.EVALUATION_EPISODES = 2
agent = twosome.main(sys.argv[2:])
twosome.torch.save(twosome.trainable(agent), f"weights{twosome.RANK}.pt")
if twosome.RANK == 1:
    sys.exit("this one fails")
twosome.gather("and this one waits for it")
"""


def test_two_processes_stay_equal():
    """Otherwise several GPUs would train several agents, each on a part of the episodes; or one
    that fails would leave the other waiting for ever."""
    Path("two.py").write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "two.py"]
    command += [str(ROOT), *TINY_RUN, "--rollout_steps=8", "--out=run"]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode and "this one fails" in done.stderr
    one, two = (torch.load(f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys() and close(one.values(), two.values(), 0)
    assert [row["decisions"] for row in metrics("run")] == ["32", "64"]
    assert done.stdout.count("after training:") == 1  # Only the first process speaks.
    one, two = checkpoint("run")["envs"]
    assert one != two  # Each plays its own episodes.
    assert "processes" in fails("--resume", "run")


# === The command line, and mistakes ===============================================================
@pytest.fixture
def toy(monkeypatch):
    """Flags for short runs with stubs instead of an LM."""
    monkeypatch.setitem(twosome.ENVS, "toy", Toy)
    return ["--env=toy", "--n_envs=2", "--rollout_steps=4", "--test_episodes=1"]


def refuse(settings):
    """In place of make_agent: show the settings, and stop."""
    raise UserError(f"{json.dumps(dataclasses.asdict(settings))}")


BAD_SETTINGS = ["n_envs 0", "epochs 0", "minibatches 0", "max_prompts 0", "rollout_steps 0"]
BAD_SETTINGS += ["steps -1", "test_episodes -1", "max_grad_norm -1", "gamma 2", "gae_lambda 1.1"]
BAD_SETTINGS += ["value_epochs 0", "policy_lr nan", "value_lr inf", "env kitchen", "task soup"]
BAD_SETTINGS += ["norm words", "dtype float6", "device gpu", "model nobody/nothing"]
BAD_SETTINGS += ["out /dev/null", "out /dev/null/run"]


@pytest.mark.parametrize("flag", BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(flag):
    """Otherwise a newcomer's typing error would end in a page of traceback, or after the first
    games; or the corrected command would find a folder in its way."""
    name, value = flag.split()
    line = fails(f"--{name}", value)
    assert name in line or value in line
    assert not list(Path().glob("*/*"))


BAD_ENVIRONMENTS = [  # (what is instead, or nothing, a word of the message)
    ({"get_state": None}, "get_state"),
    ({"goal": None}, "goal"),
    ({"actions": ["wait"]}, "list"),
    ({"observe": Mock(return_value=("", {}))}, "actions"),
    ({"actions": {}}, "toy"),
    ({"step": Mock(return_value=("", 0.0, False, {}))}, "values to unpack"),
    ({"actions": {0: "wait", 1: " "}}, "' '"),
    ({"actions": {0: "wait", 1: "wait"}}, "equal"),
    ({"reward": math.nan}, "reward nan"),
]


@pytest.mark.parametrize("change, hint", BAD_ENVIRONMENTS)
def test_bad_environment(toy, monkeypatch, change, hint):
    """Otherwise an environment that is not as it should be would fail after the first update, and
    its work be lost; or with a message that blames the learning rates."""
    members = dict(vars(Toy) | change)
    kept = {name: member for name, member in members.items() if member is not None}
    monkeypatch.setitem(twosome.ENVS, "toy", type("Broken", (), kept))
    assert hint in fails(*toy, "--out", "run", "--rehearsal_coef", "0")
    assert not os.listdir()


def test_runs_that_start_together_get_folders_of_their_own(toy):
    """Otherwise two results would be gone: each run claims its folder before it loads an LM."""
    settings = twosome.make_settings()
    folders = [twosome.claim_folder(settings, "twosome") for _ in range(3)]
    names = [f"tomato-salad-word-seed1{suffix}" for suffix in ("", "-2", "-3")]
    assert [folder.name for folder in folders] == names
    assert "exists" in fails(*toy, "--out", folders[0])


def test_a_failed_start_leaves_no_folder(toy):
    """Otherwise the corrected command would find a folder in its way, or be given another name."""
    fails(*toy, "--out", "run", "--model", "nowhere")
    fails(*toy, "--model", "nowhere")
    assert not list(Path().glob("run*/*")) and not Path("run").exists()


def test_the_wrong_folder_is_said(finished):
    """Otherwise a newcomer would not know which of the many folders a flag is about."""
    for folder in (finished, finished / "adapter", "nowhere/at/all"):
        line = fails("--model", folder)
        assert str(folder) in line and "--evaluate and --resume take the folder of a run" in line
    for mode in ("--evaluate", "--resume"):
        for folder in (ROOT / "pocket_lm", "missing"):
            assert f"{folder} is not the folder of a run" in fails(mode, folder)


def test_a_model_is_found_from_any_folder(monkeypatch):
    """Otherwise a run could be resumed only where it was begun, or Tab's slash would name another
    model than ours."""
    save_lm("lm")
    settings = twosome.make_settings(model="lm/")
    monkeypatch.chdir("/")
    assert Path(settings.model, "config.json").exists()
    assert twosome.make_settings(model="pocket_lm/").model == "pocket_lm"


def test_main_does_not_read_the_command_line_of_a_notebook(monkeypatch):
    """Otherwise main() would take the flags of Jupyter's kernel for its own."""
    monkeypatch.setattr(sys, "argv", ["kernel", "--steps", "7", "-f", "kernel.json"])
    assert '"steps": 4096' in fails("--task", "tomato-salad", make_agent=refuse)


def test_resume_keeps_its_flags(finished):
    """Otherwise a resumed run would be half one experiment and half another."""
    files = {path: path.read_bytes() for path in finished.glob("*.*")}
    for flag in ("--seed=7", "--policy_lr=1", "--env=virtualhome", "--out=other"):
        assert "--resume goes only with" in fails("--resume", finished, flag)
    assert files == {path: path.read_bytes() for path in finished.glob("*.*")}
    assert not os.listdir()


def test_a_finished_run_can_train_on(toy):
    """Otherwise who sees that it was too short would have to begin again. It may also begin with no
    steps, which is the untrained LM."""
    twosome.main([*toy, "--steps", "0", "--out", "run"], make_agent=Guesser)
    assert summary("run")["before"] and summary("run")["decisions"] == 0
    twosome.main(["--resume", "run", "--steps", "16"], make_agent=Guesser)
    twosome.main(["--resume", "run"], make_agent=Guesser)
    assert [row["decisions"] for row in metrics("run")] == ["8", "16"]
    twosome.main(["--resume", "run", "--steps", "32"], make_agent=Guesser)
    assert [row["decisions"] for row in metrics("run")] == ["8", "16", "24", "32"]
    assert summary("run")["steps"] == summary("run")["decisions"] == 32


def test_ctrl_c_in_the_last_evaluation(toy):
    """Otherwise the adapter or the hint would be missing after hours of training."""

    class Patient(Guesser):
        """Interrupted in the first game after training."""

        def cached_log_policy(self, states):
            if Path("run/metrics.csv").exists() and len(metrics("run")) == 2:
                ctrl_c(self)
            return super().cached_log_policy(states)

    line = fails(*toy, "--out", "run", make_agent=Patient)
    assert "interrupted; to go on" in line and line.endswith("--resume run")
    twosome.main(["--resume", "run"], make_agent=Guesser)
    assert summary("run")["after"]


DAMAGED = [("config.json", "[]"), ("config.json", '{"env": "over'), ("checkpoint.pt", "PK")]
DAMAGED += [("config.json", '{"method": "twosome", "whole_states": true}')]


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize("name, content", DAMAGED)
def test_damaged_run_folder(finished, name, content, mode):
    """Otherwise half an agent would go on, a traceback be shown, or what is still whole be lost."""
    shutil.copytree(finished, "run")
    Path("run", name).write_text(content)
    fails(mode, "run")
    assert Path("run", name).read_text() == content
    assert metrics("run") == metrics(finished)


def test_run_with_another_lm(finished):
    """Otherwise weights of one LM would go into another."""
    shutil.copytree(finished, "run")
    save_lm("lm")
    edit("run/config.json", model=str(Path("lm").resolve()))
    assert "of another LM" in fails("--resume", "run")


# === The environments, and pocket_lm ==============================================================
@cache
def reachable(task):
    """Every symbolic observation that any actions lead to: {vector: {(text, offered actions)}}."""
    env = make_world(task)
    env.reset()
    todo, seen, told = [env.get_state()], set(), {}
    while todo:
        state = todo.pop() | {"steps": 0}
        key = json.dumps(state, sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        obs, info = env.set_state(json.loads(key))
        told.setdefault(tuple(info["vector"]), set()).add((obs, tuple(info["actions"].items())))
        if not info["success"]:
            for action in range(env.n_actions):
                env.set_state(state)
                env.step(action)
                todo.append(env.get_state())
    return told


BAD_ENGLISH = re.compile(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(\w+) \1\b| [ .,]|[.,]{2}")


@pytest.mark.parametrize("task", TASKS)
def test_prompts_tell_everything_in_good_english(task):
    """Otherwise the words would lose something that the agent perceives, two actions would read the
    same and the LM could not choose between them, or it would read what nobody writes."""
    told = reachable(task)
    known = {"tomato-salad": 22, "tomato-lettuce-salad": 806, "entertainment": 213}
    texts = dict(text for (text,) in told.values())  # the same vector, the same words
    assert len(texts) == len(told) == known.get(task, 19)
    for obs, actions in texts.items():
        phrases = dict(actions).values()
        assert len(set(phrases)) == len(phrases) and list(actions) == sorted(actions)
        prompt = twosome.build_prompt(obs, make_world(task).goal)
        for text in (prompt, *phrases):
            assert text == text.strip() and not BAD_ENGLISH.search(text)
        assert all(sentence[0].isupper() for sentence in prompt.split(". "))
        assert all(re.fullmatch(r"[a-z]+(,? [a-z]+)*", phrase) for phrase in phrases)


def check_overcooked(env, before, state, reward, k):
    """Each item has a place of its own, and the rules of the kitchen allow the reward."""
    place, foods = state["place"], env.kitchen.foods
    assert place.keys() == {*foods, "bowl"} and set(state["chopped"]) <= set(foods)
    places = [str(where) for where in place.values() if where != "bowl"]
    assert len(set(places)) == len(places)
    served = place["bowl"] == list(SERVING)
    for item, where in place.items():
        if where == "bowl":
            assert item in state["chopped"]  # Nothing raw is in it, and not itself.
        elif where != "hand" and not served:
            assert tuple(where) in (*env.kitchen.boards, HOME[item])
    assert 1 <= k <= 13 and all(1 <= x <= 5 for x in state["agent"])
    costs = sum(-0.001 * env.gamma**i for i in range(k))
    event = round((reward - costs) / env.gamma ** (k - 1), 9)
    chopped = len(state["chopped"]) - len(before["chopped"])
    assert event == 1 if served else event in (0, -0.1, 0.2 * chopped)


def check_virtualhome(env, before, state, reward, k):
    """Each thing has one place, and nothing is close that is in another room."""
    home, task = state["home"], env._task
    assert home["agent"] in ROOMS and k == 1 and reward in (0, 1)
    carried = [*home["held"], *home["placed"]]
    assert len(set(carried)) == len(carried) and set(carried) <= set(task.things)
    for name in home["close"]:
        there = task.room if name in (*task.furniture, *home["placed"]) else task.home
        assert name not in home["held"] and home["agent"] == there
    assert not home["facing"] or home["agent"] == task.room


@pytest.mark.parametrize("task", TASKS)
def test_invariants_hold_in_2000_random_steps(task):
    """Otherwise a rare order of actions could lose a thing, double it or make up a reward; a wrong
    index, or a forgotten reset, could train on nonsense; and a saved game go on differently."""
    env, rng, running = make_world(task), random.Random(task), False
    check, limit = check_virtualhome, 50
    if TASKS[task] == "overcooked":
        check, limit = check_overcooked, 200
    with pytest.raises(ValueError):
        type(env)("soup")
    for _ in range(2_000):
        if not running:
            with pytest.raises(RuntimeError):
                env.step(0)
            _, info = env.reset()
        before = env.get_state()
        with pytest.raises(ValueError):
            env.step(rng.choice([-1, env.n_actions, 0.0, None, "0"]))
        actions = list(info["actions"])
        if rng.random() < 0.3:  # also what is not offered; in Overcooked everything is
            actions = range(env.n_actions)
        action = rng.choice(actions)
        obs, reward, terminated, truncated, info = env.step(action)
        state, k = env.get_state(), info["primitive_steps"]
        check(env, before, state, reward, k)
        assert state["steps"] == before["steps"] + k
        assert terminated == info["success"] == (reward > 0.5)
        assert truncated == (not terminated and state["steps"] >= limit)
        if rng.random() < 0.02:  # Saved as JSON and restored, it is the same.
            again = make_world(task)
            assert again.set_state(json.loads(json.dumps(state)))[0] == obs
            again.set_state(before | {"steps": limit - 1})  # The time limit cuts no action short.
            assert again.step(action)[1] == reward and again.get_state()["steps"] == limit - 1 + k
        running = not (terminated or truncated)


HOME_TEXT = "This home has a kitchen, a bathroom, a bedroom and a living room. You are in the "
GOLDEN = {  # task: (actions, rewards, text after the last action)
    # Serving the empty bowl and the raw tomato costs 0.1 each; full hands chop nothing.
    "tomato-salad": (
        "1 3 0 3 0 2 0 1 2 4",
        "-0.005852 -0.100941 -0.006793 -0.100941 -0.006793 "
        "-0.004901 -0.001 -0.008648 -0.008648 -0.00297",
        "You are at the cutting board. The raw tomato is on the cutting board. You hold the empty "
        "bowl.",
    ),
    # Half a salad is refused and comes back raw; a chopped onion is no part of the recipe.
    "tomato-lettuce-salad": (
        "0 4 7 0 3 6 2 5 7 2 3 4",
        "-0.00199 -0.004901 0.19305 -0.001 -0.009562 -0.100941 "
        "-0.005852 -0.004901 -0.00297 -0.001 -0.008648 -0.008648",
        "You are at the first cutting board. The bowl with the chopped onion is on the first "
        "cutting board. The second cutting board is empty. Your hands are empty.",
    ),
    # Closing the door on nothing earns nothing, and what lies inside can be taken out again.
    "food-preparation": (
        "5 8 4 6 1 4 7 5 8 9 8 7 6 0",
        "0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        HOME_TEXT + "living room. You see nothing useful here. You hold the pancake.",
    ),
    # While seated no walk succeeds (8: to the kitchen); that one took a seat stays true.
    "entertainment": (
        "4 9 0 8 15 16 15 1 5 16 1",
        "0 0 0 0 0 0 0 0 0 0 0",
        HOME_TEXT + "kitchen. You see the milk. You hold the chips.",
    ),
}


@pytest.mark.parametrize("task", GOLDEN)
def test_golden_episode(task):
    """Otherwise the game has changed, and results can no longer be compared with the paper's."""
    actions, rewards, last_text = GOLDEN[task]
    env = make_world(task)
    env.reset()
    for action, expected in zip(actions.split(), rewards.split(), strict=True):
        obs, reward, *_ = env.step(int(action))
        assert reward == pytest.approx(float(expected), abs=1e-6)
    assert obs == last_text


def everything_told():
    """All pairs of a text and the actions offered with it, of all tasks."""
    for task in TASKS:
        for texts in reachable(task).values():
            yield from texts


def test_pocket_lm_has_not_read_the_answers():
    """Otherwise the default LM would be a cheat sheet, and learning by practice a show."""
    corpus = "\n".join(make_pocket_lm.write_corpus()).lower()  # A text is a line.
    assert not [task for task in TASKS if make_world(task).goal.lower() in corpus]
    # No observation, so no pair with an action: a text with one has its first and last sentence.
    observations = {obs.lower() for obs, _ in everything_told()}
    first = {obs.partition(". ")[0] for obs in observations}
    last = {obs.rpartition(". ")[2] for obs in observations}
    lines = [line for line in corpus.splitlines() if any(map(line.__contains__, first))]
    suspects = "\n".join(line for line in lines if any(map(line.__contains__, last)))
    assert len(observations) > 1000 and not [obs for obs in observations if obs in suspects]
    assert not {"twosome", "OvercookedText", "VirtualHomeText"} & vars(make_pocket_lm).keys()


def test_pocket_lm_splits_words():
    """Otherwise words and tokens would be the same, and the normalisations could not differ."""
    agent = an_agent()
    policies = []
    for agent.settings.norm in ("word", "token", "none"):
        policies += agent.log_policy(STATES[:1])
    for p, q in itertools.combinations(policies, 2):
        assert (p.exp() - q.exp()).abs().max() > 0.01
    assert sum(path.stat().st_size for path in ROOT.glob("pocket_lm/*.*")) < 8e6


# === Experiments, and the READMEs =================================================================
def experiment(name):
    return importlib.import_module(f"experiments.{name}")


def baseline(method, **values):
    """A baseline's agent, and one of its environments."""
    baselines = experiment("baselines")
    settings = twosome.make_settings(**baselines.DEFAULTS[method] | {"device": "cpu"} | values)
    agent = baselines.make_agent(settings, method)
    return agent, twosome.make_env(agent, settings)


def test_ppo_sees_numbers_and_only_offered_actions():
    """Otherwise the baseline would be handicapped, or learn from actions that nobody offers."""
    agent, env = baseline("ppo", env="virtualhome")
    vector, offered = env.state()
    assert vector == tuple(env.info["vector"]) and offered == tuple(env.info["actions"])
    (log_pi,) = agent.log_policy([(vector, (1, 2, 9))])
    logits = agent.model(torch.tensor(vector))
    assert close([log_pi], [logits[[1, 2, 9]].log_softmax(0)])


def test_saycan_is_sensible_times_possible():
    """Otherwise SayCan would be something else, its affordance a constant, or its LM trained."""
    agent, env = baseline("saycan", rollout_steps=12)
    nn.init.normal_(agent.critic[-1].bias)
    state = env.state()
    (says,) = agent.model.log_policy([TextEnv.state(env)])
    product = says.exp() * torch.sigmoid(agent.affordance([state])[0])
    policy = agent.log_policy([state])[0].exp()
    assert close([policy], [product / product.sum()], 1e-5)
    assert (policy - says.exp()).abs().max() > 0.05
    rollout = a_rollout(agent)
    assert set(rollout.returns.tolist()) == {0.0, 1.0}  # Did the action work?
    changed = moved(agent, rollout)
    assert changed and all(name.startswith("critic.") for name in changed)


@pytest.mark.parametrize("method", ["ppo", "saycan"])
def test_baselines_run_resume_and_load(method, capsys):
    """Otherwise comparisons would break off, or be between other agents than was said."""
    baselines = experiment("baselines")
    baselines.main(["--method", method, *TINY_RUN, "--out", "run"])
    after = summary("run")["after"]
    baselines.main(["--resume", "run"])
    assert summary("run")["after"] == after and summary("run")["method"] == method
    experiment("exact").main(["run"])
    assert twosome.describe(after) in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SystemExit, match="is a run of the method"):
        baselines.main(["--method", "random", "--evaluate", "run"])


def test_exact_success_of_random_choice():
    """Otherwise the numbers of the results would not be those of the agents."""
    agent, _ = baseline("random")
    found = experiment("exact").exact(agent, agent.settings)
    assert found == pytest.approx((0.442, -0.096), abs=5e-4)


def test_watch(finished, capsys, monkeypatch):
    """Otherwise one could not see what training has changed, or the episode would rush past; and a
    pipe, a notebook or an old terminal would show something else, or wait."""
    monkeypatch.setenv("COLUMNS", "80")
    experiment("watch").main(["--method", "random"])
    text = capsys.readouterr().out
    assert f"\n{' decision 1 ':-^80}\n #  #  #  #  #  T  #\n" in text and " 0.20 ##" in text
    assert text.isascii() and text.replace("\n", "").isprintable()
    monkeypatch.setattr(sys.stdin, "isatty", Mock(return_value=True), raising=False)
    monkeypatch.setattr("builtins.input", Mock(side_effect=["", "q"]))  # at a terminal: Enter, q
    experiment("watch").main([str(finished), "--tokens"])
    text = capsys.readouterr().out
    assert text.count(" decision ") == 2 and "P untrained" in text and "P now" in text
    assert max(map(len, text.splitlines())) <= 80


def test_reproduce_makes_a_row_of_a_job():
    """Otherwise hours of runs would end in an error."""
    reproduce = experiment("reproduce")
    given = reproduce.parse(["full", "--steps", "64", "--out", "results"])
    jobs = {job.label: job for job in reproduce.make_jobs(given) if job.task == "tomato-salad"}
    for label in ("ppo", "one pass of the critic, V clipped"):
        job = dataclasses.replace(jobs[label], experiments="E1")
        row, curve = reproduce.run_job(job, given.out, None, "commit")
        assert 0 <= row["success"] <= 1 and len(curve) == 2


def test_decisions_until_90_percent_by_hand():
    """Otherwise the main comparison of the results would count something else."""
    curve = [(0, 0.0, 0.0), (100, 1.0, 0.0), (200, 1.0, 0.0)]
    # The means of two rows are 0.5 after 50 decisions and 1 after 150.
    assert experiment("reproduce").decisions_to_90(curve) == pytest.approx(130)


def test_prompts_are_changed():
    """Otherwise an experiment would measure nothing."""
    prompts = experiment("reproduce").PROMPTS
    states = set()
    for change in prompts.values():
        env = type("Reworded", (TextEnv,), {"state": change})(make_world("tomato-salad"), 0.99)
        env.step(0)
        states.add(env.state())
    assert len(states) == len(prompts)


def test_language_by_hand(tmp_path, monkeypatch):
    """Otherwise "no loss of language" would rest on a wrong sum, or on other text than is said."""
    language = experiment("language")
    model, tokenizer = twosome.load_lm("pocket_lm")
    texts = ["The oven is closed.", "You are in the kitchen. You hold the cup. Open it."]
    rows = tokenizer(texts)["input_ids"]
    log_probs = plain_log_probs(model, [(ids[:1], [ids[1:]]) for ids in rows])
    all_nats, nats = -sum(log_probs).item(), -log_probs[1].item()
    monkeypatch.setattr(language, "held_out", Mock(return_value=texts))
    questions = [("You are in the", ("kitchen.", "closed."))]
    monkeypatch.setattr(language, "cloze", Mock(return_value=questions))
    expected = math.exp(all_nats / (len(rows[0]) + len(rows[1]) - 2)), 1
    assert language.language(model, tokenizer) == pytest.approx(expected, rel=1e-5)

    (tmp_path / "wiki.txt").write_text(texts[1])
    pair = '{"sentence_good": "You hold cup the.", "sentence_bad": "You hold the cup."}\n'
    for i in range(67):
        (tmp_path / f"{i}.jsonl").write_text(pair)
    expected = math.exp(nats / (len(rows[1]) - 1)), 0
    found = language.real_language(model, tokenizer, tmp_path / "wiki.txt", tmp_path)
    assert found == pytest.approx(expected, rel=1e-5)


def test_plots(finished):
    """Otherwise a course would have numbers and no pictures."""
    pytest.importorskip("matplotlib")
    plot = experiment("plot")
    for argv in ([finished], ["--states", finished]):
        plot.main([*map(str, argv)])


def test_benchmark_compares_two_ways_to_the_same():
    """Otherwise the claim of speed would be about two different things."""
    settings = small(rollout_steps=4, rehearsal_coef=0)
    plain, ours, largest = experiment("benchmark").compare(settings)
    assert largest < 1e-4 and plain["all"] > 0 and ours[0]["all"] > 0


def test_lamp():
    """Otherwise the lines that a teacher copies for an environment of their own would not run."""
    experiment("lamp")
    twosome.main(["--env", "lamp", "--steps", "0"], make_agent=Guesser)


PAGES = [ROOT / "README.md", *ROOT.glob("experiments/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_are_understood(page):
    """Otherwise a page would teach flags or files that do not exist."""
    text = page.read_text().replace("\\\n", " ").replace("\\|", "|")
    commands = re.findall(r"python (?:-X dev )?(\S+\.py)([^`\n#|;&]*)", text)
    for script, rest in commands:
        source = (ROOT / script).read_text()
        known = {"help", *re.findall(r"\"--([a-z_-]+)\"", source)}
        if "twosome.main(" in source or script == "twosome.py":
            known |= vars(twosome.Settings()).keys()
        assert set(re.findall(r"--([a-z_-]+)", rest)) <= known, script


MODULES = ["twosome", "overcooked_text", "virtualhome_text", "pocket_lm.make_pocket_lm"]
MODULES += [f"experiments.{path.stem}" for path in ROOT.glob("experiments/[!t]*.py")]


@pytest.mark.parametrize("module", MODULES)
def test_worked_examples(module):
    """Otherwise the examples in the docstrings would teach something that is not so."""
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_walkthrough():
    """Otherwise the first numbers that one reads would be made up."""
    model, tokenizer = twosome.load_lm("pocket_lm")
    env = TextEnv(OvercookedText("tomato-salad"), 0.99)
    env.step(0)
    prompt, phrases = env.state()
    (log_probs,) = plain_log_probs(model, [encode(tokenizer, prompt, phrases)])
    policy = twosome.normalize(log_probs, None, phrases, "word").softmax(0)
    shown = twosome.__doc__
    assert f"{phrases[2]}\n" in re.sub(r" +\(.*\)", "", shown) and prompt[-40:] in shown
    for number in (log_probs[2], log_probs[2] / 8, policy[2]):
        assert f"{number.item():.2f}" in shown
