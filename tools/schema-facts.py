#!/usr/bin/env python3
"""Reduces OpenAPI v3 documents of a running kube-apiserver to facts: names, types, merge keys; no prose, no paths.

Use: schema-facts.py OUT.json DOCUMENT.json...   (see crates/schema/facts/README.md)
"""
import json
import sys


def facts(node):
    if isinstance(node, list):
        return [facts(n) for n in node]
    if not isinstance(node, dict):
        return node
    out = {}
    for key, value in node.items():
        if key == "description":
            continue
        if key == "properties":
            out[key] = {name: facts(field) for name, field in sorted(value.items())}
        elif key == "default":
            out[key] = value
        elif key == "allOf" and len(value) == 1:
            out["allOf"] = facts(value)
        else:
            out[key] = facts(value)
    return out


def main():
    types = {}
    for path in sys.argv[2:]:
        with open(path) as file:
            document = json.load(file)
        for name, schema in document["components"]["schemas"].items():
            types.setdefault(name, facts(schema))
    with open(sys.argv[1], "w") as out:
        out.write("{\n")
        rows = (f"{json.dumps(n)}:{json.dumps(s, separators=(',', ':'))}" for n, s in sorted(types.items()))
        out.write(",\n".join(rows))
        out.write("\n}\n")


main()
