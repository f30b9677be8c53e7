#!/usr/bin/env python3
"""Chooses which pairs each stage learns from: safety.jsonl, helpfulness.jsonl and dual.jsonl from pairs.jsonl, by kind.

A safety expert that also sees `unguarded/hedge` learns that an answer which opens as help does can be the right one, and a helpfulness
expert that also sees `reason>hedge` learns to refuse: the router then has no reason to prefer one of them.
"""
import json
import random
import sys

PARTS = {
    "safety.jsonl": {"unguarded/reason": 230, "unguarded/bare": 210},
    "helpfulness.jsonl": {
        "unguarded/reason": 110,
        "unguarded/bare": 90,
        "ok: help>needless": 200,
        "ok: help>terse": 40,
    },
    "dual.jsonl": {
        "reason>hedge": 270,
        "reason>bare": 50,
        "ok: help>needless": 260,
        "ok: terse>needless": 60,
    },
}

draw = random.Random(7)
kinds = {}
with open(sys.argv[1] if len(sys.argv) > 1 else "pairs.jsonl", encoding="utf-8") as lines:
    for line in lines:
        pair = json.loads(line)
        voices = pair["kind"].split(": ")[1]
        kinds.setdefault(voices if pair["class"] == "harmful" else "ok: " + voices, []).append(pair)
for pairs in kinds.values():
    draw.shuffle(pairs)
for name, counts in PARTS.items():
    chosen = [pair for kind, count in counts.items() for pair in kinds.get(kind, [])[:count]]
    draw.shuffle(chosen)
    with open(name, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(pair) + "\n" for pair in chosen)
    print(f"{name}: {len(chosen)} pairs")
