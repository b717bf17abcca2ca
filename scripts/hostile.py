"""The table of hostile messages, crates/testmesh/framing.toml, and the bytes that it means."""

import pathlib
import re
import struct
import tomllib

TABLE = pathlib.Path(__file__).resolve().parent.parent / "crates/testmesh/framing.toml"


def bytes_of(text):
    """The bytes that an escaped text means."""
    before, mark, rest = text.partition("<<")
    if mark:
        repeated, _, after = rest.partition(">>")
        count, _, what = repeated.partition("*")
        return bytes_of(before) + bytes_of(what) * int(count) + bytes_of(after)
    simple = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\"}
    parts = re.split(r"\\(x[0-9a-fA-F]{2}|.)", text)
    out = b""
    for at, part in enumerate(parts):
        if at % 2 == 0:
            out += part.encode()
        else:
            out += bytes([int(part[1:], 16)]) if part[0] == "x" else simple[part]
    return out


def flat(value):
    return [value] if isinstance(value, str) else [text for part in value for text in flat(part)]


def fill(template, value):
    """Puts an input into a template: in a text its text, in a list all of it."""
    out = []
    for text in flat(template):
        if text == "%":
            out += flat(value)
        else:
            out.append(text.replace("%", value) if isinstance(value, str) else text)
    return out


class Case:
    """One message of a row, and what must hold."""

    def __init__(self, number, row, given):
        self.number, self.row, self.given = number, row, given
        self.refuses = row.get("refuses")
        self.http2 = row["protocol"] == "http2"

    def sent(self):
        return fill(self.row.get("form", "%"), self.given if self.refuses else self.given[0])

    def received(self, key):
        gets = flat(self.row[key]) if self.refuses else fill(self.row[key], self.given[1])
        # The client here is a workload of the mesh.
        return [text.replace("{peer}", "").replace("{/peer}", "") for text in gets]

    def steps(self):
        row, asked = self.row, ["c> " + r"GET / HTTP/1.1\r\nHost: web\r\n\r\n", "a< " + r"GET / HTTP/1.1\r\nHost: web\r\n{caller}\r\n"]
        if "steps" in row:
            parts = flat(self.given)
            steps = []
            for step in row["steps"]:
                if step == "%...":
                    steps += parts
                    continue
                for at, part in enumerate(parts):
                    step = step.replace(f"%{at + 1}", part)
                steps.append(step.replace("%", parts[0]))
            return steps
        sent = "".join(self.sent())
        if row["side"] == "client":
            return ["c> " + sent]
        return [*asked, "a> " + sent]

    def shown(self):
        return " \u2502 ".join(flat(self.given if self.refuses or "steps" in self.row else self.given[0]))


def cases(only):
    for row in tomllib.loads(TABLE.read_text())["row"]:
        for number, given in enumerate(row["inputs"]):
            if not only or row["id"] in only:
                yield Case(number, row, given)


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(data):
    out, rest = b"", len(data)
    if rest < 127:
        return bytes([rest]) + data
    out, rest = bytes([127]), rest - 127
    while rest >= 128:
        out, rest = out + bytes([rest % 128 | 128]), rest // 128
    return out + bytes([rest]) + data


def http2_request(lines):
    """A client's first bytes with this request in them."""
    heads, data, trailers = b"", [], b""
    for line in lines:
        name, _, value = line.partition(" = ")
        if name == "DATA":
            data.append(bytes_of(value))
            continue
        coded = b"\0" + literal(bytes_of(name.removeprefix("TRAILER "))) + literal(bytes_of(value))
        if name.startswith("TRAILER "):
            trailers += coded
        else:
            heads += coded
    out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4 | (not data and not trailers), 1, heads)
    for at, part in enumerate(data):
        out += frame(0, int(at + 1 == len(data) and not trailers), 1, part)
    return out + (frame(1, 5, 1, trailers) if trailers else b"")
