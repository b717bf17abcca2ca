#!/usr/bin/env python3
"""Whether a mesh that carries load for a long time stays as it is: memory, descriptors, time.

HTTP/1.1, HTTP/2 and byte streams go through two proxies at once, each at a third of --load per cent of what they carry
alone, at a fixed rate; connections are replaced every 2,000 requests. Every ten seconds memory, descriptors and CPU time
of both proxies are looked at. Ends with 1 when a request failed or something grew.

usage: soak.py [--minutes 30] [--load 70] [--write]        SHEER names the sheer binary
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import isolated
import loads
import sheer
from contenders import BACKEND_PROGRAMS, BACKENDS, FRONT, TOOLS, Case
from processes import LOAD_CORE, PROXY_CORE, cpu_seconds, descriptors, resident_kb, start, stop, wait_for
from run import versions

FRONTS = {"h1": FRONT, "h2": FRONT + 2, "tcp": FRONT + 3}
CONNECTIONS = {"h1": 64, "h2": 8, "tcp": 4}
NAMES = {"h1": "HTTP/1.1", "h2": "HTTP/2", "tcp": "byte streams (64 KiB)"}
EVERY, TURNOVER = 10, 2000
# Buffers and pools reach their sizes first. Then what may be added until the last third: measuring varies by so much.
FILLING, MARGIN = 0.1, {"memory_mb": (0.03, 0.5), "descriptors": (0.05, 8), "heap_mb": (0.03, 0.5)}


def heap_mb(service):
    """What a build that counts allocations holds; None of another."""
    found = sheer.counters(service)
    names = ("sheer_allocated_bytes_total", "sheer_freed_bytes_total")
    return (found[names[0]] - found[names[1]]) / 2**20 if names[0] in found else None


def look(proxies):
    """What each of the two proxies uses now."""
    return {name: {"memory_mb": sum(resident_kb(process.pid)) / 1024, "descriptors": descriptors(process.pid),
                   "heap_mb": heap_mb(name), "cpu_s": cpu_seconds(process.pid)}
            for name, process in proxies.items()}


def capacities(work):
    """What each protocol gets through alone, in requests a second; a byte stream's are 64 KiB."""
    carried = {name: load(FRONTS[name], 4, work)["rps"] for name, load in loads.FLAT_OUT.items()}
    return {**carried, "tcp": carried["tcp"] * 16}


def offer(rates, seconds):
    """Starts the load of each protocol; their outputs are a line of JSON each ten seconds."""
    return {name: start([TOOLS / "paced", name, FRONTS[name], rate, seconds, CONNECTIONS[name], EVERY, TURNOVER],
                        LOAD_CORE, stdout=subprocess.PIPE, text=True)
            for name, rate in rates.items()}


def soak(minutes, share, work):
    running, offered = [], {}
    try:
        for name, (program, *arguments) in BACKEND_PROGRAMS.items():
            running.append(start([TOOLS / program, *arguments, BACKENDS[name]], LOAD_CORE))
            wait_for(BACKENDS[name])
        client, backend, plane = sheer.all_protocols(FRONTS, work)
        proxies = {}
        for name, process in (("plane", plane), ("bench", backend), ("client", client)):
            running.append(start(process.argv, PROXY_CORE if process.measured else LOAD_CORE))
            if process.measured:
                proxies[name] = running[-1]
            wait_for(process.port)
        for name, port in FRONTS.items():
            sheer.ready(Case(name, True), port)
        capacity = capacities(work)
        rates = {name: max(1, round(carried * share / 100 / len(FRONTS))) for name, carried in capacity.items()}
        print(f"capacity {capacity}, rates {rates}", file=sys.stderr, flush=True)
        # It is ended here: one that ends by itself may keep its last line.
        offered = offer(rates, int(minutes * 60) + 3 * EVERY)
        begin, samples = time.time(), []
        while time.time() - begin < minutes * 60 - EVERY / 2:
            time.sleep(max(0, begin + EVERY * (len(samples) + 1) - time.time()))
            carried = {name: json.loads(load.stdout.readline()) for name, load in offered.items()}
            samples.append({"time_s": round(time.time() - begin), **look(proxies), "carried": carried})
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
        stop(offered.values())
        offered = {}
        time.sleep(EVERY)
        return capacity, rates, samples, look(proxies)
    finally:
        stop([*offered.values(), *running])


def thirds(samples):
    """The first and the last third of the samples after filling."""
    kept = samples[int(len(samples) * FILLING):]
    third = max(1, len(kept) // 3)
    return kept[:third], kept[-third:]


def growth(samples, proxy, what):
    """Medians of both thirds, the slope an hour by least squares, and whether that is flat. None where nothing was seen."""
    values = [(sample["time_s"] / 3600, sample[proxy][what]) for sample in samples[int(len(samples) * FILLING):]]
    if values[0][1] is None:
        return None
    first, last = (statistics.median(sample[proxy][what] for sample in third) for third in thirds(samples))
    slope = statistics.linear_regression(*zip(*values)).slope if len(values) > 1 else 0.0
    part, more = MARGIN[what]
    return {"first": first, "last": last, "slope": slope, "flat": last <= first * (1 + part) + more}


def report(minutes, share, capacity, rates, samples, after):
    """The page, and whether everything held."""
    units = {"memory_mb": "memory, MB", "descriptors": "descriptors", "heap_mb": "heap, MB"}
    rows, held = [], True
    for proxy, side in (("client", "the caller's proxy"), ("bench", "the service's proxy")):
        for what, unit in units.items():
            grown = growth(samples, proxy, what)
            if grown:
                held &= grown["flat"]
                rows.append(f"| {side}: {unit} | {grown['first']:.1f} | {grown['last']:.1f} | {grown['slope']:+.2f} | "
                            f"{after[proxy][what]:.1f} | {'flat' if grown['flat'] else '**grows**'} |")
    traffic = []
    first, last = thirds(samples)
    for name in FRONTS:
        of = lambda part, key: statistics.median(sample["carried"][name][key] for sample in part)
        total, failed = (sum(sample["carried"][name][key] for sample in samples) for key in ("requests", "failed"))
        held &= failed == 0 and total > 0
        traffic.append(f"| {NAMES[name]} | {capacity[name]:.0f} | {rates[name]} | {total} | {failed} | {samples[-1]['carried'][name]['missing']} | "
                       f"{of(first, 'p50_us'):.0f}, {of(first, 'p99_us'):.0f} | {of(last, 'p50_us'):.0f}, {of(last, 'p99_us'):.0f} |")
    spent = lambda sample: sum(sample[proxy]["cpu_s"] for proxy in ("client", "bench"))
    used = [(spent(part[-1]) - spent(part[0])) / max(1, part[-1]["time_s"] - part[0]["time_s"]) * 100 for part in (first, last)]
    points = samples[::max(1, len(samples) // 15)]
    course = [f"| {sample['time_s'] / 60:.1f} | " + " | ".join(
        f"{sample[proxy][what]:.{digits}f}" for what, digits in (("memory_mb", 1), ("descriptors", 0)) for proxy in ("client", "bench"))
        + " | " + " | ".join(f"{sample['carried'][name]['rps']:.0f}" for name in FRONTS) + " |" for sample in points]
    return held, "\n".join([
        "# Under load for long", "", "Written by `make soak`; `bench/soak.py` says what is done.", "",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}: {minutes:g} minutes at {share} % of what one core for both proxies carried "
        "when it began, a third of it for each protocol, over the mesh path (two proxies, mutual TLS). "
        f"Connections were replaced every {TURNOVER} requests.", "",
        *versions()[:3],
        f"- load of the machine at the end, this run's included (1, 5, 15 minutes): {', '.join(f'{it:.1f}' for it in os.getloadavg())}", "",
        f"**{'Flat: nothing grew and nothing failed.' if held else 'NOT flat, or something failed.'}**", "",
        f"The first {FILLING:.0%} of the time are left out: buffers and pools reach their sizes. First and last third of the rest, medians:", "",
        "| what | first third | last third | slope an hour | 10 s after the load | |", "|---|---|---|---|---|---|", *rows, "",
        f"CPU of both proxies together: {used[0]:.0f} % of a core in the first third, {used[1]:.0f} % in the last.", "",
        "| load | alone, a second | offered a second | carried | failed | late at the end | p50, p99 us, first third | last third |",
        "|---|---|---|---|---|---|---|---|", *traffic, "",
        "Latencies count from when a request was to be sent. The course:", "",
        "| minute | MB, caller's | MB, service's | descriptors, caller's | service's | HTTP/1.1 a second | HTTP/2 | 64 KiB |",
        "|---|---|---|---|---|---|---|---|", *course, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--load", type=int, default=70, help="per cent of the capacity")
    parser.add_argument("--write", action="store_true", help="put the result into bench/SOAK.md")
    arguments = parser.parse_args()
    isolated.enter()
    with tempfile.TemporaryDirectory() as work:
        held, text = report(arguments.minutes, arguments.load, *soak(arguments.minutes, arguments.load, work))
    print(text)
    if arguments.write:
        Path(__file__).with_name("SOAK.md").write_text(text)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
