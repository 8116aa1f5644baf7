#!/usr/bin/python3
"""Damages or loses any two devices of a 4+2 pod and checks that every byte still reads back right.

usage: damage.py DIR PORT SCENARIO SEED

Scenarios: rot (random bytes over two device files between a stop and a start), rot-after-kill (the same after SIGKILL),
scrub (the same while the pod is open: a scrub heals all of it, then two other devices are lost),
lose-stopped:HOW and lose-running:HOW, where HOW is remove, truncate, zero or garbage. Exit status 1 with what was found.
DIR must be fresh: damage of two devices is the most a pod must bear.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

from checker import SECTOR, Load, Wrong
from server import Server

REGION_BYTES = 96 * 1024 * 1024
DEVICES = 6
DEVICES_LOST = 2
PAGE = 4096
LOAD_S = 3.0
# Share of a device's allocated pages that rot.
ROT = 0.05
STATUS_LIMIT_S = 15.0


def device(directory, index):
    return os.path.join(directory, "devices", f"dev-{index}.img")


def allocated_pages(path):
    """Offsets of the pages of a sparse file that hold data."""
    pages = []
    with open(path, "rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            pages.extend(range(at // PAGE * PAGE, hole, PAGE))
            at = hole
    return pages


def rot(path, chance):
    """Overwrites parts of random allocated pages with random bytes; returns how many."""
    pages = allocated_pages(path)
    chosen = chance.sample(pages, max(1, int(len(pages) * ROT)))
    with open(path, "r+b") as file:
        for page in chosen:
            length = chance.choice((1, 16, 512, PAGE))
            file.seek(page + chance.randrange(PAGE - length + 1))
            file.write(chance.randbytes(length))
        # Now, not when the kernel finds the time: by then the pod may have put other bytes there.
        file.flush()
        os.fsync(file.fileno())
    return len(chosen)


def lose(path, how, chance):
    if how == "remove":
        os.unlink(path)
    elif how == "truncate":
        os.truncate(path, 0)
    elif how in ("zero", "garbage"):
        with open(path, "r+b") as file:
            for page in allocated_pages(path):
                file.seek(page)
                file.write(bytes(PAGE) if how == "zero" else chance.randbytes(PAGE))
    else:
        raise SystemExit(f"damage.py: unknown way to lose a device: {how}")


def ask(directory, *command):
    """What a command of weft prints as JSON, or None while it cannot be had."""
    done = subprocess.run(
        [os.environ["WEFT"], *command, "-o", "json", "--data", directory], capture_output=True, timeout=20, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else None


def expect_status(directory, what, holds):
    """Waits until status fulfils a condition on (health, devices)."""
    deadline = time.monotonic() + STATUS_LIMIT_S
    while True:
        now, devices = ask(directory, "status"), ask(directory, "device", "list")
        if now is not None and devices is not None and holds(now["pod"]["health"], devices):
            return
        if time.monotonic() > deadline:
            raise Wrong(f"status does not show {what} within {STATUS_LIMIT_S} s: {describe(now, devices)}")
        time.sleep(0.2)


def describe(now, devices):
    """What matters here of a status: the pod's health and each device's state and counters of damage."""
    if now is None or devices is None:
        return "no status to be had"
    states = [f"{one['index']} {one['state']} {one['checksum_errors']} bad {one['healed']} healed" for one in devices]
    return f"{now['pod']['health']}; devices {', '.join(states)}"


def out_of_service(devices):
    return sorted(device["index"] for device in devices if device["state"] != "in service")


def load_for(load, server, seconds, halfway=lambda: None):
    """A verified load; `halfway` is called once in the middle of it."""
    begin = time.monotonic()
    called = []

    def until():
        elapsed = time.monotonic() - begin
        if elapsed > seconds / 2 and not called:
            called.append(halfway())
        return elapsed > seconds

    if not load.run([server.tcp, server.unix], until):
        raise Wrong("the server closed a connection or died under load")


def scenario_rot(server, load, chance, how):
    load_for(load, server, LOAD_S)
    server.stop(how)
    victims = chance.sample(range(DEVICES), DEVICES_LOST)
    pages = [rot(device(server.directory, index), chance) for index in victims]
    print(f"rot in {pages} pages of devices {victims}", flush=True)
    server.start()
    load.check(server.unix)
    expect_status(
        server.directory,
        "checksum errors on a damaged device",
        lambda _, devices: any(one["checksum_errors"] > 0 for one in devices if one["index"] in victims),
    )
    expect_status(
        server.directory, "healed damage", lambda _, devices: any(one["healed"] > 0 for one in devices)
    )
    load_for(load, server, LOAD_S)
    load.check(server.tcp)


def scrub(directory, *command):
    """What a scrub or the wait for one ended in; damage that could not be healed is wrong."""
    task = ask(directory, *command)
    if task is None or task["state"] != "done" or task["damage"]["left"] > 0:
        raise Wrong(f"a scrub did not heal everything: {task}")
    return task["damage"]


def scenario_scrub(server, load, chance):
    load_for(load, server, LOAD_S)
    # Into segments, and out of RAM.
    server.stop()
    server.start()
    victims = sorted(chance.sample(range(DEVICES), DEVICES_LOST))
    pages = [rot(device(server.directory, index), chance) for index in victims]
    damage = scrub(server.directory, "pod", "scrub", "--wait")
    print(f"rot in {pages} pages of devices {victims}; a scrub found {damage}", flush=True)
    if damage["found"] == 0:
        raise Wrong("a scrub found no damage")
    damage = scrub(server.directory, "pod", "scrub", "--wait")
    if damage["found"] > 0:
        raise Wrong(f"a scrub left damage that the next one found: {damage}")
    # Another one while hosts read and write.
    task = ask(server.directory, "pod", "scrub")
    load_for(load, server, LOAD_S)
    damage = scrub(server.directory, "task", "wait", task["id"])
    if damage["found"] > 0:
        raise Wrong(f"a scrub under load found damage where there is none: {damage}")
    load.check(server.unix)
    server.stop()
    others = sorted(chance.sample([index for index in range(DEVICES) if index not in victims], DEVICES_LOST))
    for index in others:
        lose(device(server.directory, index), "remove", chance)
    print(f"lost the other devices {others}", flush=True)
    after_loss(server, load, others)


def scenario_lose_stopped(server, load, chance, how):
    load_for(load, server, LOAD_S)
    server.stop(chance.choice((signal.SIGTERM, signal.SIGKILL)))
    victims = sorted(chance.sample(range(DEVICES), DEVICES_LOST))
    for index in victims:
        lose(device(server.directory, index), how, chance)
    print(f"lost devices {victims} ({how})", flush=True)
    after_loss(server, load, victims)


def scenario_lose_running(server, load, chance, how):
    # What is overwritten is noticed where it is read. All of this load may lie in the first segment, whose data strips are
    # on devices 1 to 4: what is parity is read by nobody until something is lost.
    among = range(1, 5) if how in ("zero", "garbage") else range(DEVICES)
    victims = sorted(chance.sample(among, DEVICES_LOST))

    def strike():
        for index in victims:
            lose(device(server.directory, index), how, chance)

    load_for(load, server, LOAD_S, strike)
    print(f"lost devices {victims} under load ({how})", flush=True)
    load.check(server.tcp)
    load_for(load, server, LOAD_S)
    expect_status(
        server.directory,
        "lost devices" if how == "remove" else "lost or damaged devices",
        lambda _, devices: all(
            one["state"] != "in service" or (how != "remove" and one["checksum_errors"] > 0)
            for one in devices
            if one["index"] in victims
        ),
    )
    server.stop(signal.SIGKILL)
    if how == "remove":
        after_loss(server, load, victims)
    else:
        # The files are still there: what is read is healed, and whether they are given up is the pod's choice.
        server.start()
        load.check(server.unix)


def after_loss(server, load, victims):
    """Two devices are gone: the pod opens, serves what it must, takes writes, says so, and survives a kill."""
    server.start()
    load.check(server.unix)
    expect_status(
        server.directory,
        f"devices {victims} out of service and a degraded pod",
        lambda health, devices: health == "degraded" and out_of_service(devices) == victims,
    )
    load_for(load, server, LOAD_S)
    server.stop(signal.SIGKILL)
    server.start()
    load.check(server.tcp)


SCENARIOS = {
    "rot": lambda *run: scenario_rot(*run, signal.SIGTERM),
    "rot-after-kill": lambda *run: scenario_rot(*run, signal.SIGKILL),
    "scrub": scenario_scrub,
}
for way in ("remove", "truncate", "zero", "garbage"):
    SCENARIOS[f"lose-stopped:{way}"] = lambda *run, way=way: scenario_lose_stopped(*run, way)
    SCENARIOS[f"lose-running:{way}"] = lambda *run, way=way: scenario_lose_running(*run, way)


def main():
    directory, port, name, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    chance = random.Random(seed)
    load = Load(REGION_BYTES // SECTOR, seed)
    server = Server(directory, port)
    try:
        server.start()
        SCENARIOS[name](server, load, chance)
        server.stop()
    except Wrong as wrong:
        print(f"WRONG in {name} (seed {seed}): {wrong}", flush=True)
        return 1
    finally:
        server.stop(signal.SIGKILL)
    print(f"{name}: {load.acknowledgements} changes acknowledged and read back right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
