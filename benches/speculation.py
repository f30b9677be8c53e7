"""Tokens a second of one stream with guesses at next tokens and without, side by side: speculation.py BINARY MODEL.

Three servers answer each prompt in turn, five times; prints medians, ratios (least to most), and whether all answers are equal.
Python's own library only.
"""

import json
import statistics
import subprocess
import sys
import time
import urllib.request

GUESSES = (0, 3, 6)
TURNS = 5
ITEMS = " ".join(f"Item {i}: name=part{i}, price={i * 3 + 7} dollars, stock={i % 5} units." for i in range(1, 13))
ROWS = [{"name": f"part{i}", "price": i * 3, "stock": i % 5, "warehouse": "north side"} for i in range(8)]
PROMPTS = {
    "copy a list": f"Repeat the following list exactly, word for word.\nThe quick report: {ITEMS}",
    "edit JSON": f"Return this JSON with every price doubled, all else unchanged:\n{json.dumps(ROWS)}",
    "a story": "Tell me a story about a fisherman who finds an old map in a bottle.",
    "explain": "Explain why the sky is blue and what changes at sunset.",
}


def serve(binary, model, guesses):
    """(process, address) of a server that guesses so many tokens."""
    command = [binary, "serve", "--model", model, "--threads", "2", "--port", "0", "--no-prefix-cache"]
    command += ["--speculative-tokens", str(guesses)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return process, process.stdout.readline().split()[-1]


def ask(address, prompt, temperature):
    """(tokens a second after the first, text) of one answer of 200 tokens."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 200,
        "temperature": temperature,
        "seed": 7,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    text, first, last, tokens = "", None, None, 0
    for line in urllib.request.urlopen(request):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            if choice["delta"].get("content"):
                last = time.monotonic()
                first = first or last
                text += choice["delta"]["content"]
    return (tokens - 1) / (last - first), text


def main():
    binary, model = sys.argv[1:]
    servers = {guesses: serve(binary, model, guesses) for guesses in GUESSES}
    try:
        print("| prompt | temperature | " + " | ".join(f"{g} guesses" for g in GUESSES) + " | equal |")
        print("| --- | --: |" + " --: |" * len(GUESSES) + " --- |")
        for name, prompt in PROMPTS.items():
            for temperature in (0, 0.7):
                turns = [[ask(servers[g][1], prompt, temperature) for g in GUESSES] for _ in range(TURNS)]
                cells = [f"{statistics.median(turn[0][0] for turn in turns):.0f} tok/s"]
                for at in range(1, len(GUESSES)):
                    ratios = sorted(turn[at][0] / turn[0][0] for turn in turns)
                    cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
                equal = len({text for turn in turns for _, text in turn}) == 1
                print(f"| {name} | {temperature} | " + " | ".join(cells) + f" | {'yes' if equal else 'NO'} |")
    finally:
        for process, _ in servers.values():
            process.terminate()


if __name__ == "__main__":
    main()
