"""How fast is twosome.py, next to what the method's own research code does ("the plain way")?

    python experiments/benchmark.py                      # pocket_lm, all four tasks
    python experiments/benchmark.py --model llama-15m    # 15M parameters, vocabulary 32,000
    python experiments/benchmark.py --model llama-7b --device cuda --dtype bfloat16
    python experiments/benchmark.py --model FOLDER --repeats 1 --times-only   # a third of the time

Both ways run in turns, each time from the same weights and seed, and with nothing remembered.

iteration       the reference's own: 4 environments x 32 decisions, then one pass of the critic and
                one of the policy over these 128 decisions. Both ways are measured whole.
default update  twosome.py's own: n_envs x rollout_steps decisions (512; LMs other than pocket_lm
                256, in entertainment 512), epochs passes (4; others 2), all of them (no KL stop),
                without the episodes that only a row of the log needs. The first one, when nothing
                is remembered yet, and the second, which has met some of its states before. Ours is
                measured whole. The plain way is not run but multiplied out, from each of its
                iterations above: decisions x (rollout / 128 + epochs x (value update + policy
                update) / 128). (The tokens a decision of the two rollouts differ by 1 to 5%.)
                Where the default is to rehearse, both ways do so in each step, the plain way with
                a whole pass; that is measured and added. What rehearsal needs once a run, the
                texts, both have written by the same call: the first update counts it.
GFLOP, MiB      of an iteration, each way in a fresh process; CPU: resident memory, CUDA: allocated
parity          the largest difference of a probability between the two ways, over all states of the
                iteration, after one update; above 1e-5 in float32 this script fails

A warm-up of our way comes before the clock runs, and in it the check whether this LM may be packed,
which comes once a run. Its memory, but not its time, is measured.

llama-15m and llama-7b are made here with random weights: time and memory depend on the shape. They
use pocket_lm's tokenizer, whose 560 ids are valid in a vocabulary of 32,000; a real tokenizer of
that size would cut the prompts into fewer tokens, for both ways.
"""

import argparse
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean, median
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import twosome  # noqa: E402

TASKS = ["tomato-salad", "tomato-lettuce-salad", "food-preparation", "entertainment"]
SHAPES = {  # width, MLP's width, layers, heads, is the vocabulary matrix the embedding?
    "llama-15m": (288, 768, 6, 6, True),
    "llama-7b": (4096, 11_008, 32, 32, False)}
DEFAULT_UPDATES = ["default update, s", "first without texts, s", "the second one, s"]
encode = twosome.encode  # its cache is emptied before each repetition; the plain way goes past it


# --- the plain way: what the reference does, on our prompts, environments and weights -------------

class PlainAgent(twosome.Agent):
    """The same networks. Nothing is remembered, and no two actions or decisions share anything."""

    def __init__(self, ours: twosome.Agent):
        nn.Module.__init__(self)
        self.tokenizer, self.norm, self.optimizers = ours.tokenizer, ours.norm, ours.optimizers
        self.model, self.critic, self.values = ours.model, ours.critic, {}

    def log_policy(self, states):
        """A row for each action of each state, each time tokenised anew; log-softmax at every
        position, over the whole vocabulary (in float32; the reference: in half precision)."""
        with patch.multiple(twosome, score=twosome.plain_log_probs, encode=encode.__wrapped__):
            return super().log_policy(states)

    def features(self, states):
        """Each time a pass of all prompts through the whole LM, its adapter off."""
        rows = [torch.tensor(self.tokenizer(prompt)["input_ids"]) for prompt, _ in states]
        ids = pad_sequence(rows, batch_first=True).to(self.model.device)
        with torch.no_grad(), self.model.disable_adapter():
            hidden = self.model(input_ids=ids, use_cache=False, output_hidden_states=True
                                ).hidden_states[-1]  # (B, L, H)
        return hidden[torch.arange(len(rows)), [len(row) - 1 for row in rows]].float()

    @torch.no_grad()
    def remembered_log_policy(self, states):
        """A step of the rollout: one pass for the values of all environments, one for the policies.
        twosome.collect asks for the values at the end; they are kept until then."""
        self.values.update(zip(states, super().value(states)))
        return self.log_policy(states)

    def value(self, states):
        new = [state for state in dict.fromkeys(states) if state not in self.values]
        if new:  # the states after the last step
            self.values.update(zip(new, super().value(new)))
        return torch.stack([self.values[state] for state in states])


def plain_update_value(agent, rollout, args, rng):
    """4 minibatches of 32; each goes through the LM once more."""
    for batch in twosome.minibatches(rollout.states, args, rng):
        part = SimpleNamespace(states=[rollout.states[i] for i in batch],
                               value=rollout.value[batch], returns=rollout.returns[batch])
        twosome.update_value(agent, part, replace(args, minibatches=1), rng)


def plain_update_policy(agent, rollout, args, rng):
    """One epoch, 4 decisions at a time; the gradients of 8 such minibatches make one step."""
    weights = [p for p in agent.model.parameters() if p.requires_grad]
    order = rng.sample(range(len(rollout.states)), len(rollout.states))
    agent.optimizers["policy"].zero_grad()
    for start in range(0, len(order), 4):
        batch = order[start:start + 4]
        policies = agent.log_policy([rollout.states[i] for i in batch])
        new = torch.stack([policy[rollout.chosen[i]] for policy, i in zip(policies, batch)])
        entropy = torch.stack([-(policy.exp() * policy).sum() for policy in policies])
        advantage = rollout.advantage[batch]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        loss, _ = twosome.policy_loss(new, rollout.log_prob[batch], advantage, entropy,
                                      args.clip_coef, args.ent_coef)
        (loss / 4 / 8).backward()
        if start % 32 == 28:
            nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            agent.optimizers["policy"].step()
            agent.optimizers["policy"].zero_grad()


UPDATES = {"plain": (plain_update_value, plain_update_policy),
           "ours": (twosome.update_value, twosome.update_policy)}


# --- measuring ------------------------------------------------------------------------------------

def timed(function, *args):
    """Return (seconds, result)."""
    sync = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    sync()
    start = time.perf_counter()
    result = function(*args)
    sync()
    return time.perf_counter() - start, result


def make_agent(options) -> twosome.Agent:
    torch.manual_seed(1)
    shape, device, dtype = SHAPES.get(options.model), options.device, options.dtype
    model, tokenizer = twosome.load_lm("pocket_lm" if shape else options.model, device, dtype)
    if shape:
        width, mlp, layers, heads, tied = shape
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, tie_word_embeddings=tied, max_position_embeddings=2048)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    agent = twosome.Agent(model, tokenizer, max_prompts=twosome.Args(
        model=options.model).max_prompts)
    agent.at_first = {n: p.detach().clone() for n, p in twosome.trained_parameters(agent).items()}
    return agent


class Costly(twosome.Episode):
    """In the household, too, each decision costs: without any reward a rollout would play on."""
    def act(self, chosen):
        reward, *rest = super().act(chosen)
        return reward - 0.001, *rest


def run_updates(way: str, agent, args, n: int = 1):
    """The first n rollouts and what is learned from each: the seconds of each one's parts, and the
    last rollout. As on the first day: nothing is trained or remembered before."""
    seconds = []
    for name, parameter in twosome.trained_parameters(agent).items():
        parameter.data.copy_(agent.at_first[name])
        parameter.grad = None
    for name, rate in (("policy", args.policy_lr), ("value", args.value_lr)):
        agent.optimizers[name].state.clear()
        agent.optimizers[name].param_groups[0]["lr"] = rate
    agent.policy_memory, agent.features_memory = {}, {}
    agent.texts = dict.fromkeys(getattr(agent, "texts", ()))  # rehearsal's, without their p_0
    vars(agent.model).pop("below_lora", None)
    encode.cache_clear()
    playing = [twosome.make_episode(args, Costly) for _ in range(args.n_envs)]
    rng, player = random.Random(args.seed), PlainAgent(agent) if way == "plain" else agent
    for _ in range(n):
        a, rollout = timed(twosome.collect, player, playing, args, rng)
        agent.policy_memory = {}
        b, c = (timed(update, player, rollout, args, rng)[0] for update in UPDATES[way])
        seconds.append({"iteration, s": a + b + c, "rollout, s": a, "value update, s": b,
                        "policy update, s": c})
    return seconds, rollout


def rehearsal(way: str, agent, args) -> tuple[float, float]:
    """Seconds of the first step, in which the texts are written, and of an update's steps then."""
    if not args.rehearsal_coef:
        return 0.0, 0.0
    vars(agent).pop("texts", None)
    may_pack = twosome.may_pack if way == "ours" else lambda model, encoded: False
    rng = random.Random(args.seed)
    with patch.object(twosome, "may_pack", may_pack):
        first, *steps = (timed(twosome.rehearse, agent, args.rehearsal_coef, rng)[0]
                         for _ in range(1 + args.epochs * args.minibatches))
    return first, sum(steps)


@torch.no_grad()
def parity(agent, states) -> float:
    """The largest difference of a probability between the two ways."""
    batches, plain = [states[i:i + 4] for i in range(0, len(states), 4)], PlainAgent(agent)
    return max((x.exp() - y.exp()).abs().max().item() for batch in batches
               for x, y in zip(agent.log_policy(batch), plain.log_policy(batch)))


def peak_memory(device) -> int:
    """The most bytes so far: of torch on the GPU, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    from resource import RUSAGE_SELF, getrusage  # not on Windows
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cost(way: str, agent, args) -> dict:
    """What an iteration costs besides time: memory, and the operations of all matrix products,
    forward and backward, as torch counts them."""
    device = agent.model.device
    loaded, _, most = peak_memory(device), run_updates(way, agent, args), peak_memory(device)
    with FlopCounterMode(display=False) as counter:  # it takes memory itself
        run_updates(way, agent, args)
    return {"GFLOP": [counter.get_total_flops() / 1e9],
            "MiB above the loaded model": [(most - loaded) / 2**20], "MiB in all": [most / 2**20]}


def cost_alone(way: str, task: str, options) -> dict:
    """The same in a fresh process. On Linux a child starts with its parent's peak, so this must be
    called while the parent is small."""
    done = subprocess.run(
        [sys.executable, __file__, "--only", way, "--tasks", task, "--model", options.model,
         "--device", options.device, "--dtype", options.dtype,
         "--rollout-steps", str(options.rollout_steps)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{way} ended with {done.returncode}"]
        raise ValueError(lines[-1].removeprefix("benchmark.py: "))
    return json.loads(done.stdout)


def measure(agent, args, default, repeats: int, costs: dict) -> dict:
    """Everything about one task; of each measure a list, the repetitions. costs: way -> cost."""
    run_updates("ours", agent, default)  # the warm-up
    _, rollout = run_updates("ours", agent, args)
    states = list(dict.fromkeys(rollout.states))
    if not twosome.may_pack(agent.model, [encode(agent.tokenizer, *state) for state in states]):
        raise ValueError("this model cannot be packed, so the two ways score alike")
    result = {"states": len(states), "rows": sum(len(actions) for _, actions in states),
              "parity": parity(agent, states)}  # LoRA has moved by now
    runs, visited = {way: [] for way in UPDATES}, []
    for _, way in itertools.product(range(repeats), UPDATES):
        (seconds,), rollout = run_updates(way, agent, args)
        runs[way].append(seconds)
        visited.append((rollout.states, rollout.chosen.tolist()))
        result[way] = {part: [run[part] for run in runs[way]] for part in seconds} | costs[way]
    times = default.n_envs * default.rollout_steps / (args.n_envs * args.rollout_steps)
    for run in range(repeats):
        texts, steps = rehearsal("plain", agent, default)
        plain = steps + times * (runs["plain"][run]["rollout, s"] + default.epochs * (
            runs["plain"][run]["value update, s"] + runs["plain"][run]["policy update, s"]))
        our_texts, _ = rehearsal("ours", agent, default)  # they are there in the updates below
        first, second = (x["iteration, s"] for x in run_updates("ours", agent, default, 2)[0])
        for way, seconds in (("plain", (texts + plain, plain, plain)),
                             ("ours", (our_texts + first, first, second))):
            for name, x in zip(DEFAULT_UPDATES, seconds):
                result[way].setdefault(name, []).append(x)
    return result | {"same decisions": all(v == visited[0] for v in visited)}


# --- the report -----------------------------------------------------------------------------------

def machine(device: str) -> dict:
    path = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}


def cell(x: list[float]) -> str:
    text = f"{median(x):,.0f}" if median(x) >= 1000 else f"{median(x):.3g}"
    return f"{text} [{min(x):.3g}, {max(x):.3g}]" if len(x) > 1 else text


def report(results: dict):
    print(*(f"{name} {value}" for name, value in results["machine"].items()), sep=", ")
    for task, t in results["tasks"].items():
        print(f"\n{task}: {t['states']} distinct states with {t['rows']} actions\n"
              f"  {'median [lowest, highest]':26}{'plain':>28}{'ours':>28}{'plain/ours':>13}")
        for name, ours in t["ours"].items():
            plain = t["plain"][name]
            print(f"  {name:26}{cell(plain):>28}{cell(ours):>28}"
                  f"{median(plain) / median(ours):>13.3g}")
        print(f"  largest difference of a probability {t['parity']:.0e}; the same decisions in "
              f"all iterations: {'yes' if t['same decisions'] else 'no'}")
    for name, mean in results["geometric mean of plain/ours"].items():
        print(f"\ngeometric mean of plain/ours, {name.removesuffix(', s')}: {mean:.3g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="pocket_lm",
                        help=f"pocket_lm (default), {', '.join(SHAPES)}, or a folder")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--times-only", action="store_true", help="without GFLOP and MiB")
    parser.add_argument("--out", help="default: experiments/results/benchmark-MODEL-DEVICE.json")
    parser.add_argument("--rollout-steps", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=tuple(UPDATES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    # All of an update: no early end where the policy has moved far.
    env_of = lambda task: "overcooked" if task.endswith("salad") else "virtualhome"
    defaults = {task: twosome.Args(env=env_of(task), task=task, model=options.model,
                                   policy_lr=1e-3, target_kl=1e9)
                for task in options.tasks}
    iterations = {task: replace(args, n_envs=4, rollout_steps=options.rollout_steps, epochs=1,
                                minibatches=4, whole_states=False, rehearsal_coef=0.0)
                  for task, args in defaults.items()}
    if options.only:
        return print(json.dumps(cost(options.only, make_agent(options), *iterations.values())))

    out = Path(options.out or ROOT / "experiments" / "results" /
               f"benchmark-{Path(options.model).name}-{options.device}.json")
    compared = ["iteration, s", *DEFAULT_UPDATES]
    compared += [] if options.times_only else ["GFLOP", "MiB above the loaded model"]
    costs = {task: {way: {} if options.times_only else cost_alone(way, task, options)
                    for way in UPDATES} for task in options.tasks}
    agent, means = make_agent(options), {}
    results = {"options": vars(options), "machine": machine(options.device), "tasks": {},
               "geometric mean of plain/ours": means}
    for task, args in iterations.items():
        results["tasks"][task] = measure(agent, args, defaults[task], options.repeats, costs[task])
        for name in compared:
            means[name] = geometric_mean(median(t["plain"][name]) / median(t["ours"][name])
                                         for t in results["tasks"].values())
        out.write_text(json.dumps(results, indent=2) + "\n")  # a task that is done is kept
    report(results)
    print(f"\nall numbers: {out}")
    worst = max(t["parity"] for t in results["tasks"].values())
    if options.dtype == "float32" and worst > 1e-5:
        raise ValueError(f"the two ways differ by {worst:.0e} in a probability")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmark.py: {error}") from None
