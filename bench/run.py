#!/usr/bin/env python3
"""Measures what a proxy costs, Sheer beside its peers, in one run: CPU time of a request, latency at a fixed rate,
handshakes, memory, the start, allocations.

The proxies run on core 0; load generator, backend and control plane on core 1; everything on loopback in a network
namespace of its own. The figure is the CPU time of all proxies on the path (user and system) divided by the requests;
the others stand beside it. Contenders take turns within each round, and medians with their range are reported, so that a
noisy machine hurts all alike. Only ratios mean anything elsewhere.

usage: run.py [--cases h1,h1-mesh,h2,h2-mesh,tcp,tcp-mesh,paced,paced-mesh,handshake,handshake-resumed,held,held-mtls,
              start,allocations] [--contenders sheer,envoy,haproxy,nginx,forwarder,direct]
              [--rounds 3] [--seconds 2] [--write]
ENVOY names the Envoy binary, SHEER the sheer binary, COUNTING one that counts allocations; a contender that is
missing is left out, and so is what needs it.
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import isolated
import measure
import report
import sheer
from contenders import Case
from processes import LOAD_CORE

PLAIN, MESH = Case("h1", False), Case("h1", True)
# The path, how it is measured, how that is written, and in how many rounds at most: memory hardly varies.
CASES = {
    "h1": (PLAIN, measure.cost, report.cost, 9), "h1-mesh": (MESH, measure.cost, report.cost, 9),
    "h2": (Case("h2", False), measure.cost, report.cost, 9), "h2-mesh": (Case("h2", True), measure.cost, report.cost, 9),
    "tcp": (Case("tcp", False), measure.cost, report.cost, 9), "tcp-mesh": (Case("tcp", True), measure.cost, report.cost, 9),
    "paced": (PLAIN, measure.paced, report.paced, 9), "paced-mesh": (MESH, measure.paced, report.paced, 9),
    "handshake": (MESH, partial(measure.handshake, kind="full"), report.handshake, 9),
    "handshake-resumed": (MESH, partial(measure.handshake, kind="resumed"), report.handshake, 9),
    "held": (PLAIN, measure.held, report.held, 1), "held-mtls": (MESH, measure.held, report.held, 1),
    "start": (PLAIN, measure.from_start, report.from_start, 1),
    "allocations": (PLAIN, measure.allocations, report.allocations, 1)}
CONTENDERS = ["sheer", "envoy", "haproxy", "nginx", "forwarder", "direct"]


def versions():
    def first(argv):
        try:
            done = subprocess.run(argv, capture_output=True, text=True)
            return (done.stdout + done.stderr).strip().splitlines()[0].split("version: ")[-1]
        except (OSError, IndexError):
            return "not installed"
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return [f"- machine: {model.group(1) if model else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
            f"- TCP congestion control: {isolated.CONGESTION_CONTROL}, in a network namespace of its own (README.md says why)",
            f"- sheer: {first([sheer.BINARY, '--version'])}", f"- envoy: {first([os.environ.get('ENVOY', 'envoy'), '--version'])}",
            f"- haproxy: {first(['haproxy', '-v'])}", f"- nginx: {first(['nginx', '-v'])}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the result into bench/RESULTS.md")
    arguments = parser.parse_args()
    isolated.enter()
    os.sched_setaffinity(0, {int(LOAD_CORE)})
    names, text, verdicts, begin = arguments.contenders.split(","), [], [], time.time()
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.cases.split(","):
            path, measured, written, most = CASES[name]
            results = {}
            for turn in range(min(arguments.rounds, most)):
                for contender in names:
                    for label, result in measured(path, contender, arguments.seconds, work, turn=turn).items():
                        results.setdefault(label, []).append(result)
                        print(f"{name} round {turn + 1} {label}: {json.dumps(result)}", file=sys.stderr, flush=True)
            if not results:
                print(f"{name}: nobody takes part", file=sys.stderr)
                continue
            section, goals = written(name, results)
            text.append(section)
            verdicts += goals
            print(section, flush=True)
    goals = "\n".join(["| goal | measured | at most | |", "|---|---|---|---|", *(verdict.row() for verdict in verdicts)]) + "\n"
    print(goals)
    if arguments.write:
        head = ["# Results", "", "Written by `make bench`; see `bench/README.md` for what is measured and how.", "",
                f"{time.strftime('%Y-%m-%d', time.gmtime())}, {arguments.rounds} rounds of {arguments.seconds} s, medians; "
                f"{(time.time() - begin) / 60:.0f} minutes in all.", "", *versions(), "", "## Goals", "", goals, "## Figures", "", ""]
        Path(__file__).with_name("RESULTS.md").write_text("\n".join(head) + "\n".join(text))


if __name__ == "__main__":
    main()
