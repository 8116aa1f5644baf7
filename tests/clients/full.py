#!/usr/bin/python3
"""Fills a pod smaller than its volume to ENOSPC, or makes room in one that is full.

usage: full.py fill URI      writes bytes that do not compress until ENOSPC; everything acknowledged must read back
       full.py recover URI   everything still reads back; half is discarded; then half as much is written again
"""

import errno
import hashlib
import sys
import time

import nbd

MIB = 1 << 20
# A pod of six devices of 256 MiB, 4+2, holds at most 1 GiB; metadata, journal and reserve take their part.
CAPACITY_MIB = range(400, 1024)
# What is discarded in a full pod before 4 KiB must find room.
NOTE_ROOM_MIB = 16
# How long freed space may take to be usable again.
RECOVERY_LIMIT_S = 30.0
# Where the writing stops; kept on the volume's last block, so that `recover` knows.
NOTE = 8 * 1024 * MIB - 4096


def contents(index):
    return hashlib.shake_128(index.to_bytes(8, "little")).digest(MIB)


def write_until_full(handle, first, limit):
    """Writes MiB after MiB; returns how many were acknowledged before ENOSPC."""
    for index in range(first, first + limit):
        try:
            handle.pwrite(contents(index), index * MIB)
        except nbd.Error as error:
            if error.errnum != errno.ENOSPC:
                sys.exit(f"FAILED: a full pod answers {error.string}, not ENOSPC")
            return index - first
    return limit


def check(handle, indices, what):
    for index in indices:
        if handle.pread(MIB, index * MIB) != contents(index):
            sys.exit(f"FAILED: MiB {index} is wrong {what}")


def retry_until_room(handle, index):
    """Space freed by a discard comes back after some background work."""
    deadline = time.monotonic() + RECOVERY_LIMIT_S
    while write_until_full(handle, index, 1) == 0:
        if time.monotonic() > deadline:
            sys.exit(f"FAILED: no room {RECOVERY_LIMIT_S} s after a discard")
        time.sleep(0.2)


def fill(handle):
    # One request reaches at most 4 GiB without extended headers.
    for offset in range(0, handle.get_size(), 1024 * MIB):
        handle.trim(1024 * MIB, offset)
    handle.pwrite(bytes(4096), NOTE)
    retry_until_room(handle, 0)
    written = write_until_full(handle, 0, 2048)
    print(f"{written} MiB written before ENOSPC")
    if written not in CAPACITY_MIB:
        sys.exit(f"FAILED: expected {CAPACITY_MIB.start} to {CAPACITY_MIB.stop} MiB")
    check(handle, range(written), "in a full pod")
    # Room for the note itself, as the file system of a partition makes it that begins at an odd sector.
    handle.trim(NOTE_ROOM_MIB * MIB - 1024, (written - NOTE_ROOM_MIB) * MIB + 512)
    retry_note(handle, written - NOTE_ROOM_MIB)


def retry_note(handle, written):
    deadline = time.monotonic() + RECOVERY_LIMIT_S
    while True:
        try:
            handle.pwrite(written.to_bytes(4096, "little"), NOTE)
            return
        except nbd.Error as error:
            if error.errnum != errno.ENOSPC or time.monotonic() > deadline:
                sys.exit(f"FAILED: no room for 4 KiB after a discard of {NOTE_ROOM_MIB} MiB: {error.string}")
            time.sleep(0.2)


def recover(handle):
    written = int.from_bytes(handle.pread(4096, NOTE), "little")
    check(handle, range(written), "after a kill of a full pod")
    half = written // 2
    handle.trim(half * MIB, 0)
    if handle.pread(MIB, (half - 1) * MIB) != bytes(MIB):
        sys.exit("FAILED: a discarded MiB does not read as zeroes")
    for index in range(half // 2):
        retry_until_room(handle, index)
    check(handle, list(range(half // 2)) + list(range(half, written)), "after the pod was full")
    print(f"{half} MiB discarded, {half // 2} MiB written again")


def main():
    handle = nbd.NBD()
    handle.connect_uri(sys.argv[2])
    {"fill": fill, "recover": recover}[sys.argv[1]](handle)
    handle.shutdown()


main()
