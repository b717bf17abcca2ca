"""What the figures are written as, and which goals they meet."""
import statistics
from dataclasses import dataclass

# What Sheer's CPU per request may be, in the other's.
COST_GOALS = {"h1": {"haproxy": 1.0}, "h1-mesh": {"haproxy": 0.85, "envoy": 0.25}, "h2": {"haproxy": 1.4},
              "h2-mesh": {"haproxy": 1.0, "envoy": 0.18}, "tcp": {"envoy": 0.8}, "tcp-mesh": {"envoy": 1.0},
              "handshake": {"envoy": 0.75}, "handshake-resumed": {"envoy": 0.75}}
NAMES = {"h1": "HTTP/1.1, one plain hop", "h1-mesh": "HTTP/1.1, mesh path", "h2": "HTTP/2, one plain hop",
         "h2-mesh": "HTTP/2, mesh path", "tcp": "TCP, one plain hop", "tcp-mesh": "TCP, mesh path",
         "handshake": "full mTLS handshake, server side", "handshake-resumed": "resumed mTLS handshake, server side",
         "paced": "HTTP/1.1 at 5,000 requests/s, one plain hop", "paced-mesh": "HTTP/1.1 at 5,000 requests/s, mesh path",
         "held": "an idle plain connection", "held-mtls": "an idle mTLS connection", "start": "start to first answer",
         "allocations": "allocations per request"}
UNITS = {"tcp": ("MiB", "MiB/s"), "tcp-mesh": ("MiB", "MiB/s"), "handshake": ("handshake", "handshakes/s"),
         "handshake-resumed": ("handshake", "handshakes/s")}
ADDED_GOAL = 1.1  # p50 added over no proxy, in HAProxy's
IDLE_GOAL_MB, START_GOAL_MS = 12, 50
HELD_GOALS_KB = {"held": 4, "held-mtls": 16}


@dataclass
class Verdict:
    """A goal, and how far it is met."""
    what: str
    measured: str
    goal: str
    met: bool

    def row(self):
        return f"| {self.what} | {self.measured} | {self.goal} | {'met' if self.met else '**missed**'} |"


def median(rounds, key):
    return statistics.median(it[key] for it in rounds)


def spread(rounds, key, digits):
    values = [it[key] for it in rounds]
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def lines(case, head, rows, note=""):
    columns = [part for part in head.split("|")]
    return "\n".join([f"### {case}: {NAMES[case]}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows]
                     + (["", note] if note else [])) + "\n"


def ratios(case, results):
    """Sheer's CPU in that of each other: a sentence, and verdicts."""
    if not results.get("sheer"):
        return "", []
    own, goals, said, verdicts = median(results["sheer"], "cpu_us"), COST_GOALS.get(case, {}), [], []
    for contender, rounds in results.items():
        if contender == "sheer" or rounds[0]["cpu_us"] is None:
            continue
        ratio, goal = own / median(rounds, "cpu_us"), goals.get(contender)
        if contender.startswith("sheer"):
            said.append(f"{1 / ratio:.2f} times that {contender.removeprefix('sheer ')}")
            continue
        said.append(f"{ratio:.2f}x {contender}" + (f" (goal: at most {goal:.2f}x)" if goal else ""))
        if goal:
            verdicts.append(Verdict(f"{NAMES[case]}: CPU", f"{ratio:.2f}x {contender}", f"{goal:.2f}x", ratio <= goal))
    return said and f"Sheer's CPU per {UNITS.get(case, ('request',))[0]}: {', '.join(said)}." or "", verdicts


def hops(sizes):
    """The processes of each hop: `a + b + c; a + b + c`."""
    return "; ".join(" + ".join(map(str, hop)) for hop in sizes) or "-"


def cost(case, results):
    one, second = UNITS.get(case, ("request", "requests/s"))
    rows = []
    for contender, rounds in results.items():
        has_cpu = rounds[0]["cpu_us"] is not None
        latency = [f"{name} {median(rounds, key):.0f}" for key, name in
                   {"p50_us": "p50", "p99_us": "p99", "mean_us": "mean"}.items() if key in rounds[0]]
        rows.append(f"| {contender} | {median(rounds, 'cpu_us') if has_cpu else 0:.1f} | " .replace(" 0.0 ", " - ", not has_cpu) +
                    f"{spread(rounds, 'cpu_us', 1) if has_cpu else '-'} | {median(rounds, 'rps'):.0f} | {', '.join(latency) or '-'} | "
                    f"{hops(rounds[0]['idle_mb'])} | {hops(rounds[-1]['loaded_mb'])} |")
    note, verdicts = ratios(case, results)
    if case == "h1" and results.get("sheer"):
        together = results["sheer"][0]["together_mb"][0]
        alone = results["sheer"][0]["idle_mb"][0][-1]
        note += f"{' ' if note else ''}Idle it holds {together} MB in all three processes, what they share of files counted once."
        verdicts.append(Verdict("idle proxy, resident", f"{alone} MB, with supervisor and keeper {together} MB",
                                f"{IDLE_GOAL_MB} MB", together <= IDLE_GOAL_MB))
    head = f"contender|CPU us/{one}|range|{second}|latency us|MB resident idle|MB after load"
    return lines(case, head, rows, note), verdicts


def paced(case, results):
    direct, added = results.get("direct"), {}
    rows = []
    for contender, rounds in results.items():
        if direct and contender != "direct":
            added[contender] = {key: statistics.median(own[key] - base[key] for own, base in zip(rounds, direct)) for key in ("p50_us", "p99_us")}
        more = "{p50_us:.0f} | {p99_us:.0f}".format(**added[contender]) if contender in added else "- | -"
        cpu = f"{median(rounds, 'cpu_us'):.1f}" if rounds[0]["cpu_us"] is not None else "-"
        late = max(it["missing"] / max(1, it["missing"] + it["requests"]) for it in rounds)
        rows.append(f"| {contender}{' (saturated)' if late > 0.01 else ''} | {median(rounds, 'p50_us'):.0f} | {spread(rounds, 'p50_us', 0)} | "
                    f"{median(rounds, 'p99_us'):.0f} | {more} | {cpu} |")
    verdicts, note = [], ""
    if "sheer" in added:
        shares = {other: added["sheer"]["p50_us"] / added[other]["p50_us"] for other in added if other != "sheer" and added[other]["p50_us"] > 0}
        note = "Sheer's added p50: " + ", ".join(f"{ratio:.2f}x {other}" for other, ratio in shares.items()) + "."
        if case == "paced" and "haproxy" in shares:
            verdicts.append(Verdict(f"{NAMES[case]}: added p50", f"{shares['haproxy']:.2f}x haproxy", f"{ADDED_GOAL:.2f}x", shares["haproxy"] <= ADDED_GOAL))
    return lines(case, "contender|p50 us|range|p99 us|p50 added over direct|p99 added|CPU us/request", rows, note), verdicts


def handshake(case, results):
    rows = [f"| {contender} | {median(rounds, 'cpu_us'):.0f} | {spread(rounds, 'cpu_us', 0)} | {median(rounds, 'rps'):.0f} |"
            for contender, rounds in results.items()]
    note, verdicts = ratios(case, results)
    return lines(case, "contender|CPU us/handshake|range|handshakes/s", rows, note), verdicts


def held(case, results):
    rows = [f"| {contender} | {median(rounds, 'kb'):.2f} | {spread(rounds, 'kb', 2)} | {median(rounds, 'before_mb'):.1f} | {median(rounds, 'after_mb'):.1f} |"
            for contender, rounds in results.items()]
    verdicts = []
    if results.get("sheer"):
        kb, goal = median(results["sheer"], "kb"), HELD_GOALS_KB[case]
        verdicts = [Verdict(NAMES[case], f"{kb:.1f} KB", f"{goal} KB", kb <= goal)]
    count = next(iter(results.values()))[0]["connections"]
    return lines(case, "contender|KB a connection|range|MB before|MB with them", rows, f"{count} connections, a request on each before."), verdicts


def from_start(case, results):
    times = {contender: [time for it in rounds for time in it["times_ms"]] for contender, rounds in results.items()}
    rows = [f"| {contender} | {statistics.median(all_of):.1f} | {min(all_of):.1f}-{max(all_of):.1f} |" for contender, all_of in times.items()]
    verdicts = []
    if "sheer" in times:
        own = statistics.median(times["sheer"])
        verdicts = [Verdict(NAMES[case], f"{own:.0f} ms", f"{START_GOAL_MS} ms", own <= START_GOAL_MS)]
    return lines(case, "contender|ms|range", rows), verdicts


def allocations(case, results):
    joined = lambda values, digits: "; ".join(f"{value:.{digits}f}" for value in values)
    rows = [f"| {name} | {joined(rounds[0]['times'], 2)} | {joined(rounds[0]['bytes'], 0)} |" for name, rounds in results.items()]
    return lines(case, "case|allocations a request|bytes a request", rows,
                 "Sheer's proxy process of each hop, by a build that counts; what C code asks the system for is not seen."), []
