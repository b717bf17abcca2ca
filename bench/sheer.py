"""Sheer as a contender: a real control plane and one or two real proxies, with everything on that is on by default."""
import os
import time
from pathlib import Path
import subprocess

from contenders import FRONT, MIDDLE, Process

BINARY = os.environ.get("SHEER", str(Path(__file__).parent.parent / "target" / "release" / "sheer"))


def contender(case, work):
    return None


def ready(case, work):
    """Waits until a request passes the whole path: names and endpoints are known."""
