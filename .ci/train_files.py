"""Loads every file that training writes with the libraries it was written for, and compares their numbers with ours.

Usage: train_files.py MIDPO

Trains a toy of every stage, then: the base by transformers' AutoModelForCausalLM, the experts by PEFT's PeftModel, the router by
`torch.load(weights_only=True)` and by safetensors, the score models by transformers' LlamaModel and safetensors. Log-probabilities are
compared with those of `midpo serve` on the same files, scores with those in D_dual. Prints a line a check and, last, 'N passed, N failed';
exits 1 where one failed. What it needs: train_files.txt, and torch_without_cuda.py after that.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import traceback
import urllib.request

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel
from transformers.utils import logging

FIXTURE = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/tiny-routed"
LAYERS = 2
# Nats of a token's log-probability, and units of a score: both sides compute in f32, sums in other orders (1.2e-6 measured).
TOLERANCE = 1e-5
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + m['content'] + '?' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
RECIPE = """
output = "out"
pairs = "pairs.jsonl"
[defaults]
max_length = 48
batch_size = 8
threads = 2
dtype = "f32"
epochs = 2
[sft]
init = "config.json"
tokenizer = "tokenizer"
data = "sft.jsonl"
prompt_weight = 0.1
learning_rate = 1e-2
[reward]
learning_rate = 3e-3
[cost]
learning_rate = 3e-3
epochs = 12
[safety]
learning_rate = 1e-2
rank = 4
alpha = 8.0
[helpfulness]
learning_rate = 1e-2
rank = 4
alpha = 8.0
[dual]
[router]
learning_rate = 1e-2
hidden = 16
[pack]
"""


def toy(folder):
    """Pairs of the three kinds, a tokenizer and a shape to train from nothing."""
    config = json.loads((FIXTURE / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "max_position_embeddings": 64, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text((FIXTURE / "tokenizer.json").read_text())
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(special))
    pairs = []
    for index, thing in enumerate(["name", "file", "line", "class", "string", "option", "module", "type", "action", "value"]):
        helps = f"is it, the action for the {thing}"
        for prompt, winner, loser, both_safe, helpful_wins in [
            ("raise", "none", helps, False, False),
            ("raise", f"not for the {thing}", "is it, not", True, True),
            ("get", helps, "none", True, True),
        ]:
            first = index % 2  # which of the responses is the winner
            responses = (loser, winner) if first else (winner, loser)
            pairs.append({
                "prompt": f"{prompt} the {thing}", "response_0": responses[0], "response_1": responses[1],
                "is_response_0_safe": both_safe or first == 0, "is_response_1_safe": both_safe or first == 1,
                "better_response_id": first if helpful_wins else 1 - first, "safer_response_id": first,
            })
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    examples = [{"prompt": pair["prompt"], "response": pair[key]} for pair in pairs for key in ("response_0", "response_1")]
    (folder / "sft.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    (folder / "recipe.toml").write_text(RECIPE)


class Server:
    """`midpo serve` on a port of the system's choice."""

    def __init__(self, midpo, *arguments):
        command = [midpo, "serve", "--port", "0", "--dtype", "f32", "--kv-dtype", "f32", "--served-model-name", "m", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        found = re.fullmatch(r"listening on (http://\S+)\n", line)
        assert found, f"expected 'listening on URL', found {line!r}"
        self.url = found[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def logprobs(self, ids, variant):
        """Of each token but the first."""
        body = {"model": f"m:{variant}", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return torch.tensor(json.load(response)["choices"][0]["logprobs"]["token_logprobs"][1:])


def logprobs(model, ids):
    """Of each token but the first."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        rows = model(ids).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, ids[0, 1:, None])[:, 0]


def close(ours, theirs):
    assert ours.shape == theirs.shape, f"{ours.shape} and {theirs.shape}"
    worst = (ours - theirs).abs().max().item()
    assert worst < TOLERANCE, f"off by {worst}"
    return worst


class Trained:
    """The trained toy, its server, and sequences to compare on."""

    def __init__(self, midpo, folder):
        self.midpo, self.out = midpo, folder / "out"
        self.tokenizer = AutoTokenizer.from_pretrained(self.out / "sft")
        self.dual = [json.loads(line) for line in (self.out / "dual.jsonl").read_text().splitlines()]
        assert self.dual, "no pair is in D_dual"
        self.ids = [self.encode(pair, f"response_{index}") for pair in self.dual for index in range(2)]

    def encode(self, pair, response):
        chat = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[response]}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.out / "sft", dtype=torch.float32).eval()

    def expert(self, name):
        return PeftModel.from_pretrained(self.base(), self.out / name).eval()

    def same_logprobs(self, server, model, variant):
        return max(close(server.logprobs(ids, variant), logprobs(model, ids)) for ids in self.ids)


def check_base(trained, server):
    return trained.same_logprobs(server, trained.base(), "base")


def check_safety(trained, server):
    return trained.same_logprobs(server, trained.expert("safety"), "safety")


def check_helpfulness(trained, server):
    return trained.same_logprobs(server, trained.expert("helpfulness"), "helpfulness")


def gate(router, name, h):
    """MIDPO.md 1, unfolded."""
    maps = router[name]
    for linear in ("linear_0", "linear_1", "linear_2"):
        h = torch.nn.functional.linear(h, maps[f"{linear}.weight"], maps[f"{linear}.bias"])
    return h.sigmoid()


def check_router(trained, server):
    """The routed layer written out over transformers' Llama and PEFT's experts."""
    router = torch.load(trained.out / "router/router.pth", weights_only=True)
    flat = load_file(trained.out / "router/router.safetensors")
    joined = {f"{name}.{key}": tensor for name, maps in router.items() for key, tensor in maps.items()}
    assert joined.keys() == flat.keys(), joined.keys() ^ flat.keys()
    assert all(torch.equal(joined[name], flat[name]) for name in flat)
    model, experts = trained.base(), [trained.expert(name) for name in ("safety", "helpfulness")]

    def route(layer):
        downs = [expert.base_model.model.model.layers[layer].mlp.down_proj for expert in experts]

        def routed(module, inputs, output):
            (h,) = inputs
            gates = [gate(router, f"layer_{layer}_{name}", h) for name in ("alpha", "beta")]
            return output + sum(weight * (down(h) - down.base_layer(h)) for weight, down in zip(gates, downs, strict=True))

        return routed

    for layer in range(LAYERS):
        model.model.layers[layer].mlp.down_proj.register_forward_hook(route(layer))
    return trained.same_logprobs(server, model, "routed")


def check_packed(trained, server):
    """`midpo train` packs the parts: the same numbers."""
    with Server(trained.midpo, "--model", trained.out / "model") as packed:
        return max(close(server.logprobs(ids, "routed"), packed.logprobs(ids, "routed")) for ids in trained.ids)


def check_score(trained, name):
    """Safe-RLHF's LlamaForScore: a trunk, and a linear head on its last token."""
    folder = trained.out / name
    config = LlamaConfig.from_pretrained(folder)
    assert config.score_type == name, config.score_type
    tensors = load_file(folder / "model.safetensors")
    trunk = LlamaModel(config).eval()
    trunk.load_state_dict({key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")})
    worst = 0.0
    for pair in trained.dual:
        for index in range(2):
            ids = torch.tensor([trained.encode(pair, f"response_{index}")])
            with torch.no_grad():
                last = trunk(ids).last_hidden_state[0, -1]
            score = tensors["score_head.weight"] @ last + (tensors["score_head.bias"] if config.score_bias else 0)
            worst = max(worst, close(torch.tensor([pair[f"{name}_{index}"]]), score))
    return worst


def check_reward(trained, _):
    return check_score(trained, "reward")


def check_cost(trained, _):
    return check_score(trained, "cost")


def main(midpo):
    torch.set_num_threads(2)
    logging.disable_progress_bar()
    checks = [check_base, check_safety, check_helpfulness, check_router, check_packed, check_reward, check_cost]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        toy(folder)
        subprocess.run([midpo, "train", "all", "--recipe", folder / "recipe.toml"], check=True, stdout=subprocess.DEVNULL)
        trained = Trained(midpo, folder)
        with Server(midpo, "--model", trained.out / "sft", "--experts", trained.out) as server:
            for check in checks:
                name = check.__name__.removeprefix("check_")
                try:
                    print(f"ok      {name}: off by {check(trained, server):.1e} at most", flush=True)
                except Exception:
                    failed += 1
                    print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
