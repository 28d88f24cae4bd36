"""How fast is twosome.py, next to what the method's own research code does ("the plain way")?

    python experiments/benchmark.py                      # pocket_lm, all four tasks
    python experiments/benchmark.py --model llama-15m    # 15M parameters, vocabulary 32,000
    python experiments/benchmark.py --model llama-7b --device cuda --dtype bfloat16
    python experiments/benchmark.py --model FOLDER --tasks entertainment --repeats 5

Both ways run here, on one model, in turns (plain, ours, plain, ours, ...), each time from the same
weights and seed. Nothing is remembered from one repetition to the next.

iteration  4 environments x 32 decisions: rollout, value update, policy update
scoring    the rollout's distinct states, four at a time, without gradients:
           twosome.plain_log_probs against twosome.packed_log_probs
memory     CPU: resident memory, each way in a fresh process; CUDA: allocated memory
parity     the largest difference of a probability between the two ways, over all states of the
           rollout, after one update; above 1e-5 in float32 this script fails

A warm-up comes before the clock runs (of the iteration only ours, which has something to warm).
It includes may_pack's check of the model against the definition, which is therefore in no time
below; on CPU it is in the memory of our way.

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
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import geometric_mean, median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import twosome  # noqa: E402

TASKS = ["tomato-salad", "tomato-lettuce-salad", "food-preparation", "entertainment"]
SHAPES = {  # width, MLP's width, layers, heads, is the vocabulary matrix the embedding?
    "llama-15m": (288, 768, 6, 6, True),
    "llama-7b": (4096, 11_008, 32, 32, False)}
encode = twosome.encode  # its cache is emptied before each repetition; the plain way goes past it


# --- the plain way: what the reference does, on our prompts, environments and weights -------------

def to_policy(log_probs, states) -> list[torch.Tensor]:
    """Joint log-probabilities, divided by words, become log pi(. | s): B tensors (K_b,)."""
    words = [torch.tensor([len(action.split()) for action in actions]) for _, actions in states]
    return [F.log_softmax(x, -1) for x in twosome.normalize(log_probs, None, words, "word")]


def padded(rows, device) -> dict[str, torch.Tensor]:
    pad = lambda lists: pad_sequence([*map(torch.tensor, lists)], batch_first=True).to(device)
    return {"input_ids": pad(rows), "attention_mask": pad([[1] * len(row) for row in rows])}


def plain_log_policy(agent, states) -> list[torch.Tensor]:
    """log pi(. | s): one padded row for each action of each state, and nothing is remembered.

    Logits and log-softmax at every position, over the whole vocabulary. (The softmax is float32 as
    ours is. The reference has it in half precision, where the two could not be compared.)
    """
    encoded = [encode.__wrapped__(agent.tokenizer, *state) for state in states]
    rows = [prompt + action for prompt, actions in encoded for action in actions]
    batch = padded(rows, agent.model.device)
    logits = agent.model(**batch, use_cache=False).logits  # (R, L, V)
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)[:, :-1]
    log_p = log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)  # (R, L-1)
    starts = [len(prompt) - 1 for prompt, actions in encoded for _ in actions]
    sums = [row[start:len(ids) - 1].sum() for row, start, ids in zip(log_p, starts, rows)]
    return to_policy(torch.stack(sums).split([len(actions) for _, actions in encoded]), states)


def plain_value(agent, states) -> torch.Tensor:
    """V(s), (B,): every time a pass of the prompts through the whole LM, its adapter off."""
    prompts = [agent.tokenizer(prompt)["input_ids"] for prompt, _ in states]
    with torch.no_grad(), agent.model.disable_adapter():
        hidden = agent.model(**padded(prompts, agent.model.device), use_cache=False,
                             output_hidden_states=True).hidden_states[-1]  # (B, L, H)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return agent.critic(hidden[torch.arange(len(last)), last].float()).squeeze(-1)


@torch.no_grad()
def plain_collect(agent, playing, args, rng) -> twosome.Rollout:
    """At each step one pass for the policies and one for the values of all environments."""
    decisions = []
    for _ in range(args.rollout_steps):
        now = [episode.state for episode in playing]
        values, policies = plain_value(agent, now).tolist(), plain_log_policy(agent, now)
        for episode, state, value, policy in zip(playing, now, values, policies):
            action = twosome.sample(policy, rng.random())
            reward, discount, terminated, truncated = episode.act(action)
            done = terminated or truncated
            decisions.append((state, action, policy[action].item(), value, reward, discount, done))
            if done:
                episode.start()
    bootstrap = plain_value(agent, [episode.state for episode in playing]).cpu()
    states, chosen, log_prob, *columns = zip(*decisions)
    value, reward, discount, done = (
        torch.tensor(x, dtype=torch.float32).view(-1, len(playing)) for x in columns)  # (T, N)
    next_value = torch.cat([value[1:], bootstrap[None]]) * (1 - done)
    advantage = twosome.gae(reward, discount, value, next_value, done, args.gae_lambda).flatten()
    return twosome.Rollout(states, torch.tensor(chosen), torch.tensor(log_prob), value.flatten(),
                           advantage, advantage + value.flatten(), [])


def plain_update_value(agent, optimizer, rollout, args, rng):
    """4 minibatches of 32; the prompts go through the LM once more."""
    for batch in twosome.minibatches(len(rollout.states), args, rng):
        value = plain_value(agent, [rollout.states[i] for i in batch])
        old, returns = (x[batch].to(value.device) for x in (rollout.value, rollout.returns))
        clipped = old + (value - old).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max((value - returns) ** 2, (clipped - returns) ** 2)
        optimizer.zero_grad()
        (args.vf_coef * 0.5 * error.mean()).backward()
        torch.nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
        optimizer.step()


def plain_update_policy(agent, optimizer, rollout, args, rng):
    """One epoch, 4 decisions at a time; the gradients of 8 such minibatches make one step."""
    weights = [p for p in agent.model.parameters() if p.requires_grad]
    order = rng.sample(range(len(rollout.states)), len(rollout.states))
    optimizer.zero_grad()
    for start in range(0, len(order), 4):
        batch = order[start:start + 4]
        policies = plain_log_policy(agent, [rollout.states[i] for i in batch])
        new = torch.stack([policy[rollout.chosen[i]] for policy, i in zip(policies, batch)])
        entropy = torch.stack([-(policy.exp() * policy).sum() for policy in policies]).mean()
        advantage = rollout.advantage[batch].to(new.device)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        ratio = (new - rollout.log_prob[batch].to(new.device)).exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        surrogate = torch.min(ratio * advantage, clipped * advantage).mean()
        (-(surrogate + args.ent_coef * entropy) / 8).backward()
        if start % 32 == 28:
            torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()


WAYS = {"plain": (plain_collect, plain_update_value, plain_update_policy),
        "ours": (twosome.collect, twosome.update_value, twosome.update_policy)}


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
    name, dtype = options.model, options.dtype
    model, tokenizer = twosome.load_lm("pocket_lm" if name in SHAPES else name, options.device,
                                       dtype)
    if name in SHAPES:
        width, mlp, layers, heads, tied = SHAPES[name]
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, tie_word_embeddings=tied, max_position_embeddings=2048)
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    agent = twosome.Agent(model, tokenizer)
    agent.at_first = {n: p.detach().clone() for n, p in twosome.trained_parameters(agent).items()}
    agent.count = Counter()  # (tokens or logits, under gradients): how many, padding included

    def count_tokens(_, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        agent.count["tokens", torch.is_grad_enabled()] += ids.numel()

    def count_logits(_, args):
        agent.count["logits", torch.is_grad_enabled()] += args[0].shape[:-1].numel()

    agent.model.get_decoder().register_forward_pre_hook(count_tokens, with_kwargs=True)
    agent.model.get_output_embeddings().register_forward_pre_hook(count_logits)
    return agent


def iteration(way: str, agent, args):
    """One iteration, with an agent as on its first day. Return (seconds of its parts, rollout)."""
    with torch.no_grad():
        for name, parameter in twosome.trained_parameters(agent).items():
            parameter.copy_(agent.at_first[name])
            parameter.grad = None
    for memory in (agent.policy_memory, agent.features_memory, agent.count):
        memory.clear()
    encode.cache_clear()
    actor = [p for p in agent.model.parameters() if p.requires_grad]
    policy = torch.optim.Adam(actor, args.policy_lr, eps=1e-5)
    value = torch.optim.Adam(agent.critic.parameters(), args.value_lr, eps=1e-5)
    playing = [twosome.make_episode(args) for _ in range(args.n_envs)]
    rng, (collect, update_value, update_policy) = random.Random(args.seed), WAYS[way]
    a, rollout = timed(collect, agent, playing, args, rng)
    b, _ = timed(update_value, agent, value, rollout, args, rng)
    c, _ = timed(update_policy, agent, policy, rollout, args, rng)
    return {"iteration": a + b + c, "rollout": a, "value update": b, "policy update": c}, rollout


@torch.no_grad()
def scoring(agent, states, ways, repeats: int) -> tuple[dict, float]:
    """Seconds of each way for these states, and the largest difference of a probability."""
    batches = [states[i:i + 4] for i in range(0, len(states), 4)]
    encoded = [[encode(agent.tokenizer, *state) for state in batch] for batch in batches]
    score = {"plain": twosome.plain_log_probs, "ours": twosome.packed_log_probs}
    seconds, probabilities = {way: [] for way in ways}, []
    for repeat, way in itertools.product(range(repeats + 1), ways):
        took, parts = timed(lambda: [score[way](agent.model, batch) for batch in encoded])
        if repeat == 0:  # the warm-up
            probabilities.append(torch.cat(to_policy(sum(parts, []), states)).exp())
        else:
            seconds[way].append(took)
    if "plain" in ways:  # and the same in the words of this file
        policies = [plain_log_policy(agent, batch) for batch in batches]
        probabilities.append(torch.cat(sum(policies, [])).exp())
    return seconds, max((p - probabilities[-1]).abs().max().item() for p in probabilities)


def peak_memory(device) -> int:
    """The most bytes so far: of torch on the GPU, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    from resource import RUSAGE_SELF, getrusage  # not on Windows
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(way: str, agent, args) -> tuple[int, int]:
    """Bytes: as soon as the model is there, and at the peak of an iteration."""
    device = agent.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loaded = peak_memory(device)
    iteration(way, agent, args)
    return loaded, peak_memory(device)


def memory_alone(way: str, task: str, options) -> tuple[int, int]:
    """The same in a fresh process. On Linux a child starts with its parent's peak, so this must be
    called while the parent is small."""
    done = subprocess.run(
        [sys.executable, __file__, "--only", way, "--tasks", task, "--model", options.model,
         "--dtype", options.dtype, "--rollout-steps", str(options.rollout_steps)],
        capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{way} ended with code {done.returncode}"]
        raise twosome.UserError(lines[-1].removeprefix("benchmark.py: "))
    return tuple(json.loads(done.stdout))


def where_our_time_goes(agent, args) -> dict:
    """Seconds of one more iteration of ours by parts, each without the parts called inside it."""
    seconds, running = Counter(), [["", 0.0]]  # of the parts now running: name, seconds inside

    def part(name, function):
        def wrapped(*args, **kwargs):
            if running[-1][0] == "critic's features":  # all in one
                return function(*args, **kwargs)
            running.append([name + ", with gradients" * (
                name == "LM forward" and torch.is_grad_enabled()), 0.0])
            took, result = timed(lambda: function(*args, **kwargs))
            own_name, inside = running.pop()
            seconds[own_name] += took - inside
            running[-1][1] += took
            return result
        return wrapped

    with ExitStack() as patches:
        for owner, function, name in (
                (agent.model.get_decoder(), "forward", "LM forward"),
                (agent.model.get_output_embeddings(), "forward", "LM forward"),
                (twosome.Agent, "features", "critic's features"), (twosome, "encode", "tokenising"),
                (twosome, "packed_log_probs", "packing, masks, log-softmax"),
                (torch.Tensor, "backward", "backward"), (twosome.Episode, "act", "environments"),
                (torch.optim.Adam, "step", "optimisers"),
                (torch.nn.utils, "clip_grad_norm_", "optimisers")):
            patches.enter_context(
                patch.object(owner, function, part(name, getattr(owner, function))))
        total = iteration("ours", agent, args)[0]["iteration"]
    return dict(seconds.most_common()) | {"the rest": total - seconds.total()}


def matmul_peak(options) -> float:
    """FLOP/s of the fastest square matrix product found: the most this machine can do."""
    best = 0.0
    for n in (8192,) if options.device == "cuda" else (512, 1024, 2048):
        a = torch.randn(n, n, device=options.device, dtype=getattr(torch, options.dtype))
        best = max([best] + [2 * n ** 3 / timed(torch.mm, a, a)[0] for _ in range(10)])
    return best


def flops(agent) -> float:
    """What the LM's matrices cost, estimated from the tokens that went through.

    Forward: a multiplication and an addition for each weight and token; the vocabulary matrix only
    where logits were computed, the embedding not at all. Backward: the weights are frozen, so only
    the gradients of the activations are needed, about as much again as the forward pass. Left out:
    attention between tokens, the critic, LoRA's gradients.
    """
    embedding, head = (layer.weight.numel() for layer in (
        agent.model.get_input_embeddings(), agent.model.get_output_embeddings()))
    body = sum(p.numel() for p in agent.model.get_decoder().parameters()) - embedding
    return sum(2 * weights * (agent.count[what, False] + 2 * agent.count[what, True])
               for weights, what in ((body, "tokens"), (head, "logits")))


def measure(agent, args, options, ways, peak: float, resident: dict) -> dict:
    """Everything about one task. resident: the memory of each way, where it was measured alone."""
    _, rollout = iteration("ours", agent, args)  # the warm-up
    states = list(dict.fromkeys(rollout.states))
    if not twosome.may_pack(agent.model, [encode(agent.tokenizer, *state) for state in states]):
        raise twosome.UserError("this model cannot be packed, so the two ways score alike")
    scored, parity = scoring(agent, states, ways, options.repeats)  # LoRA has moved by now
    runs, visited, result = {way: [] for way in ways}, [], {}
    for _, way in itertools.product(range(options.repeats), ways):
        seconds, rollout = iteration(way, agent, args)
        runs[way].append(seconds)
        visited.append((rollout.states, rollout.chosen.tolist()))
        result[way] = {"tokens, forward only": agent.count["tokens", False],
                       "tokens, with gradients": agent.count["tokens", True],
                       "GFLOP": flops(agent) / 1e9}
    for way in ways:
        loaded, most = resident.get(way) or memory(way, agent, args)
        seconds = {f"{part}, s": [run[part] for run in runs[way]] for part in runs[way][0]}
        rate = result[way]["GFLOP"] / median(seconds["iteration, s"])
        result[way] = seconds | {"scoring, s": scored[way]} | result[way] | {
            "GFLOP/s": rate, "% of the fastest product": 100e9 * rate / peak,
            "MiB above the loaded model": (most - loaded) / 2**20, "MiB in all": most / 2**20}
    return result | {"states": len(states), "rows": sum(len(actions) for _, actions in states),
                     "parity": parity, "same decisions": all(v == visited[0] for v in visited),
                     "where our time goes, s": where_our_time_goes(agent, args)}


# --- the report -----------------------------------------------------------------------------------

def machine(options) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in
             (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
             if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu"}


def cell(value) -> str:
    if isinstance(value, list):
        return f"{median(value):.3g} [{min(value):.3g}, {max(value):.3g}]"
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def report(results: dict):
    print(*(f"{name} {value}" for name, value in results["machine"].items()), sep=", ")
    print(f"fastest matrix product: {results['matmul_peak'] / 1e9:,.0f} GFLOP/s")
    for task, t in results["tasks"].items():
        print(f"\n{task}: {t['states']} distinct states with {t['rows']} actions")
        print(f"  {'median [lowest, highest]':26}{'plain':>28}{'ours':>28}{'plain/ours':>13}")
        for name, ours in t["ours"].items():
            plain = t.get("plain", {}).get(name)
            a, b = (median(x) if isinstance(x, list) else x for x in (plain, ours))
            print(f"  {name:26}{cell(plain):>28}{cell(ours):>28}{cell(a and a / b):>13}")
        if "plain" in t:
            print(f"  largest difference of a probability {t['parity']:.0e}; the same decisions in "
                  f"all iterations: {'yes' if t['same decisions'] else 'no'}")
        parts = t["where our time goes, s"]
        shares = (f"{name} {s / sum(parts.values()):.0%}" for name, s in parts.items())
        print(textwrap.fill("our time: " + " · ".join(shares), 98, initial_indent="  ",
                            subsequent_indent="            "))
    for name, mean in results["geometric mean of plain/ours"].items():
        print(f"\ngeometric mean of plain/ours, {name.removesuffix(', s')}: {mean:.3g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="pocket_lm",
                        help=f"pocket_lm (default), {', '.join(SHAPES)}, or a folder")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--skip-plain", action="store_true", help="measure only our way")
    parser.add_argument("--out", help="default: experiments/results/benchmark-MODEL-DEVICE.json")
    parser.add_argument("--rollout-steps", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=tuple(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for task in options.tasks:
        if task not in TASKS:
            raise twosome.UserError(f"no task {task}; the tasks are {', '.join(TASKS)}")
    if options.repeats < 1 or options.rollout_steps < 8 or options.rollout_steps % 8:
        raise twosome.UserError("--repeats is at least 1, --rollout-steps a multiple of 8")
    if options.model not in ("pocket_lm", *SHAPES) and not Path(options.model).is_dir():
        raise twosome.UserError(f"no model {options.model}: neither pocket_lm, "
                                f"{', '.join(SHAPES)} nor a folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise twosome.UserError("--device cuda: torch finds no CUDA device here")
    # Both ways do one epoch of 4 steps, and all of it: no early end where the policy moved far.
    all_args = {task: twosome.finish({
        "env": next(env for env, kind in twosome.ENVS.items() if task in kind.TASKS), "task": task,
        "n_envs": 4, "rollout_steps": options.rollout_steps, "epochs": 1, "minibatches": 4,
        "target_kl": 1e9}) for task in options.tasks}
    if options.only:
        return print(json.dumps(memory(options.only, make_agent(options), *all_args.values())))

    out = Path(options.out or ROOT / "experiments" / "results" /
               f"benchmark-{Path(options.model).name}-{options.device}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    ways = ["ours"] if options.skip_plain else ["plain", "ours"]
    resident = {task: {way: memory_alone(way, task, options)
                       for way in ways if options.device == "cpu"} for task in all_args}
    results = {"options": vars(options), "machine": machine(options), "tasks": {},
               "matmul_peak": matmul_peak(options), "geometric mean of plain/ours": {}}
    agent = make_agent(options)
    for task, args in all_args.items():
        results["tasks"][task] = measure(agent, args, options, ways, results["matmul_peak"],
                                         resident[task])
        typical = lambda x: median(x) if isinstance(x, list) else x
        for name in ("iteration, s", "scoring, s", "GFLOP", "MiB above the loaded model"):
            if len(ways) == 2:
                results["geometric mean of plain/ours"][name] = geometric_mean(
                    typical(t["plain"][name]) / typical(t["ours"][name])
                    for t in results["tasks"].values())
        out.write_text(json.dumps(results, indent=2) + "\n")  # a task that is done is kept
    report(results)
    print(f"\nall numbers: {out}")
    worst = max(t["parity"] for t in results["tasks"].values())
    if options.dtype == "float32" and worst > 1e-5:
        raise twosome.UserError(f"the two ways differ by {worst:.0e} in a probability")


if __name__ == "__main__":
    try:
        main()
    except (twosome.UserError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        raise SystemExit(1) from None
