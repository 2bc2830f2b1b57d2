"""A custom node for test_reach: keeps what the pack's own code opens, and forbids it the rest.

Put into custom_nodes, it writes a line of JSON into the file that SD35_WATCH names for each file
that the pack opens and for each event that it must never cause, which it stops as well.
"""

import json
import os
import sys
import threading

PACK = f"{os.sep}sd35-nodes{os.sep}"
FORBIDDEN = (
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.getaddrinfo",
    "socket.gethostby",
    "urllib.",
    "http.client.",
    "ftplib.",
    "smtplib.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
    "pickle.find_class",
    "webbrowser.",
)
DIRECT = ("exec", "compile", "code.__new__", "marshal.loads")
"""Of these the import system and dataclasses cause many; the pack itself may cause none."""
busy = threading.local()
record = open(os.environ["SD35_WATCH"], "a", encoding="utf-8")  # noqa: SIM115 - while it runs


def callers():
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def watch(event, args):
    forbidden = event.startswith(FORBIDDEN)
    if getattr(busy, "now", False) or not (forbidden or event == "open" or event in DIRECT):
        return
    busy.now = True
    try:
        names = callers()
        if event in DIRECT:
            names = [next(names)]
        if not any(PACK in name for name in names):
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int):
                return
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else "r" not in mode
            entry = ["write" if writes else "read", os.path.realpath(os.fsdecode(path))]
        else:
            entry = [event, repr(args)[:200]]
        record.write(json.dumps(entry) + "\n")
        record.flush()
    finally:
        busy.now = False
    if event != "open":
        raise RuntimeError(f"{event} is forbidden to the pack")


sys.addaudithook(watch)
for attempt in (
    "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "import subprocess; subprocess.run(['true'])",
    "import pickle; pickle.loads(pickle.dumps(OSError))",
    "eval('1 + 1')",
):
    try:  # as if the pack did it: the record must show that the watch sees it
        exec(compile(attempt, f"{PACK}watched.py", "exec"), {})
        raise SystemExit(f"not stopped: {attempt}")
    except RuntimeError:
        pass
NODE_CLASS_MAPPINGS = {}
