#!/usr/bin/python3
"""Writes through one connection and reads through another right after each answer, then a load over four.

usage: coherent.py URI URI
"""

import random
import sys
import time

import nbd

from checker import SECTOR, Load, Wrong

TURNS = 2000
BLOCK = 4096
REGION_BYTES = 32 * 1024 * 1024
LOAD_S = 4.0


def in_turns(handles, chance):
    for turn in range(TURNS):
        writer, reader = chance.sample(handles, 2)
        length = SECTOR * chance.randrange(1, 200)
        offset = REGION_BYTES + SECTOR * chance.randrange(4096)
        kind = chance.choice(("write", "write", "write", "zero", "trim"))
        if kind == "trim":
            # By whole blocks: of others a trim changes nothing.
            offset, length = offset // BLOCK * BLOCK, -(-length // BLOCK) * BLOCK
        if kind == "write":
            data = chance.randbytes(length)
            writer.pwrite(data, offset)
        else:
            data = bytes(length)
            (writer.zero if kind == "zero" else writer.trim)(length, offset)
        if bytes(reader.pread(length, offset)) != data:
            raise Wrong(f"turn {turn}: {kind} of {length} bytes at {offset} is not seen by another connection")


def main():
    uris = sys.argv[1:3] * 2
    handles = []
    for uri in uris:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        if not handle.can_multi_conn():
            raise Wrong("multi-conn is not offered")
        handles.append(handle)
    in_turns(handles, random.Random(1))
    load = Load(REGION_BYTES // SECTOR, seed=1)
    end = time.monotonic() + LOAD_S
    if not load.run(uris, lambda: time.monotonic() > end):
        raise Wrong("the server closed a connection under load")
    load.check(uris[0])
    print(f"{TURNS} turns and {load.acknowledgements} changes under load")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"WRONG: {wrong}")
