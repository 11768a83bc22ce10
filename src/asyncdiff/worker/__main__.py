"""Started by `asyncdiff.launch.spawn`, which writes the bootstrap to standard input. Not for use by hand."""

from __future__ import annotations

import json
import os
import signal
import sys
from multiprocessing.connection import Client


def main() -> None:
    bootstrap = json.load(sys.stdin)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = bootstrap["path"]
    connection = Client(tuple(bootstrap["address"]), authkey=bytes.fromhex(bootstrap["authkey"]))

    from asyncdiff.runtime.serving import WorkerServer  # after sys.path is the driver's

    code = WorkerServer(connection, bootstrap["rank"]).serve()
    os._exit(code)  # no destructors: a transfer that nobody will finish must not keep the process


if __name__ == "__main__":
    main()
