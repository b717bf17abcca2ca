"""A network of its own for what is measured.

Ports collide with nobody's, and TCP's congestion control is the same on every machine: `reno`. A machine's own may be
BBR, which paces what it sends also over loopback, so that a byte stream's figure becomes a matter of luck. `cubic`, the
kernel's usual one, is only for the first namespace. Reno loses nothing here, for loopback drops nothing.
"""
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

CONGESTION_CONTROL = "reno"
STAGE, USER = "BENCH_STAGE", "BENCH_USER"
PR_SET_PDEATHSIG = 1


def enter():
    """Starts this program again inside, unless it is there. What it starts ends with it, also when it is killed."""
    stage, again = os.environ.get(STAGE), [sys.executable, *sys.argv]
    if not stage:
        enter_anew(again)
    # The first process of a namespace ignores what it does not handle.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    user, group = os.environ[USER].split(":")
    if stage == "network":
        prepare()
        # Whoever is root here alone becomes who they were: a root that has no other users is none.
        back = [] if user == "0" else ["unshare", "--user", f"--map-user={user}", f"--map-group={group}"]
        os.execvpe([*back, *again][0], [*back, *again], {**os.environ, STAGE: "inside"})


def enter_anew(again):
    """Stays outside and ends as the inside does. `unshare` itself takes no signals, but goes when this goes."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    inside = subprocess.Popen(
        ["unshare", *user, "--net", "--pid", "--fork", "--kill-child", "--mount-proc", *again],
        env={**os.environ, STAGE: "network", USER: f"{os.geteuid()}:{os.getegid()}"},
        preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    signal.signal(signal.SIGTERM, lambda *_: inside.kill())
    try:
        sys.exit(inside.wait())
    except KeyboardInterrupt:
        # It got the same, and leaves in good order.
        sys.exit(inside.wait())


def prepare():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        get, change, up = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP
        flags = struct.unpack_from("H", fcntl.ioctl(any_socket, get, struct.pack("16sH14x", b"lo", 0)), 16)[0]
        fcntl.ioctl(any_socket, change, struct.pack("16sH14x", b"lo", flags | up))
    tcp = Path("/proc/sys/net/ipv4")
    (tcp / "tcp_congestion_control").write_text(CONGESTION_CONTROL)
    # Closed connections keep their ports for a minute, and a handshake each needs many.
    (tcp / "ip_local_port_range").write_text("20000 65000")
