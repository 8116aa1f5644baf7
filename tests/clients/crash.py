#!/usr/bin/python3
"""Kills the server at random under load, restarts it and checks that nothing acknowledged is lost or wrong.

usage: crash.py DIR PORT ROUNDS SEED

Starts the server with tests/clients/serve. Every round: a random load for up to two seconds over four connections, two
of them TCP and two Unix; SIGKILL at a random instant (one round in eight: SIGTERM, under load); restart; everything
read back. Prints one line per ten rounds and a summary; exit status 1 with what was found, 0 if nothing.
"""

import random
import signal
import subprocess
import sys
import time

from checker import SECTOR, Load, Wrong
from server import Server

REGION_BYTES = 48 * 1024 * 1024
END_LIMIT_S = 20


def run_round(server, load, chance, number):
    """One round; returns (unanswered changes found, seconds to serve again)."""
    uris = [server.tcp, server.unix, server.tcp, server.unix]
    how = signal.SIGTERM if number % 8 == 7 else signal.SIGKILL
    deadline = time.monotonic() + chance.uniform(0.05, 1.5)

    sent = []

    def until():
        # Once: a second SIGTERM means at once.
        if time.monotonic() >= deadline and not sent:
            sent.append(server.process.send_signal(how))
        return False

    load.run(uris, until)
    try:
        server.process.wait(timeout=END_LIMIT_S)
    except subprocess.TimeoutExpired:
        why = f"the server still runs {END_LIMIT_S} s after {how.name}" if sent else "a connection broke by itself"
        raise Wrong(why) from None
    server.expect_end(how)
    seconds = server.start()
    return load.check(chance.choice((server.tcp, server.unix))), seconds


def main():
    directory, port, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    chance = random.Random(seed)
    load = Load(REGION_BYTES // SECTOR, seed)
    server = Server(directory, port)
    unanswered, slowest = 0, 0.0
    number = 0
    try:
        server.start()
        for number in range(rounds):
            found, seconds = run_round(server, load, chance, number)
            unanswered, slowest = unanswered + found, max(slowest, seconds)
            if number % 10 == 9 or number == rounds - 1:
                print(
                    f"round {number + 1}: {load.acknowledgements} changes acknowledged, {unanswered} unanswered at a "
                    f"kill, slowest start {slowest:.2f} s",
                    flush=True,
                )
        server.stop(signal.SIGTERM)
        if load.acknowledgements < rounds:
            raise Wrong(f"{load.acknowledgements} changes acknowledged in {rounds} rounds prove nothing")
    except Wrong as wrong:
        print(f"WRONG in round {number + 1} (seed {seed}): {wrong}", flush=True)
        return 1
    finally:
        server.stop(signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
