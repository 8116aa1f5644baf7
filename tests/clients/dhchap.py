#!/usr/bin/env python3
"""An NVMe/TCP host that authenticates, written from the specification with Python's own hashes and powers.

usage: dhchap.py PORT NQN HOSTNQN KEYFILE [CTRLKEYFILE]

Connects an admin queue and an I/O queue, proves that it has the key on each, asks for a proof if CTRLKEYFILE is given,
then writes and reads a block of namespace 1. Prints what was agreed. Exit status 3 if the target refuses the proof or
gives a wrong one, 4 if it serves anything before.
"""

import base64
import hashlib
import hmac
import os
import struct
import sys
import zlib

from nvme_host import Queue, socket_to

HASHES = {1: "sha256", 2: "sha384", 3: "sha512"}
GROUPS = {1: (2048, 560316), 2: (3072, 2625351), 3: (4096, 5736041), 4: (6144, 15705020), 5: (8192, 10965728)}
AUTHENTICATION_REQUIRED = 0x4191


def prime(bits, constant):
    """RFC 7919, appendix A: e from its series."""
    term = 1 << (bits - 130 + 64)
    e, divisor = 0, 0
    while term:
        e += term
        divisor += 1
        term //= divisor
    return 2**bits - 2 ** (bits - 64) + ((e >> 64) + constant) * 2**64 - 1


def mac(number, key, message):
    return hmac.new(key, message, HASHES[number]).digest()


def read_key(path, nqn):
    with open(path, encoding="ascii") as file:
        prefix, number, encoded, rest = file.read().strip().split(":")
    data = base64.b64decode(encoded, validate=True)
    key, checksum = data[:-4], data[-4:]
    if prefix != "DHHC-1" or rest or zlib.crc32(key).to_bytes(4, "little") != checksum:
        sys.exit(f"{path} holds no key")
    number = int(number, 16)
    return mac(number, key, nqn.encode() + b"NVMe-over-Fabrics") if number else key


class AuthenticatedQueue(Queue):
    """One connection that proves that it has a key."""

    def send(self, message):
        status, _, _ = self.command(0x7F, [0xE9010100, len(message)], message, fabrics=5)
        if status:
            sys.exit(f"authentication send: status {status:#x}")

    def receive(self, kind):
        status, _, message = self.command(0x7F, [0xE9010100, 4096], receive=4096, fabrics=6)
        if status:
            sys.exit(f"authentication receive: status {status:#x}")
        if message[:2] == b"\0\xf1":
            print(f"refused: reason {message[6]}, explanation {message[7]}")
            sys.exit(3)
        if message[:2] != kind:
            sys.exit(f"message {message[:16].hex()}")
        return message

    def authenticate(self, transaction, nqn, host, key, ctrl_key):
        tid = struct.pack("<H", transaction)
        offer = bytes([1, 0, 3, 6, 1, 2, 3]) + bytes(27) + bytes(range(6)) + bytes(24)
        self.send(b"\0\0\0\0" + tid + b"\0\1" + offer)
        message = self.receive(b"\1\1")
        size, number, group, value_size = message[6], message[8], message[9], *struct.unpack_from("<H", message, 10)
        s1, c1 = message[12:16], message[16 : 16 + size]
        value, augment = b"", lambda challenge: challenge
        if group:
            p = prime(*GROUPS[group])
            theirs = int.from_bytes(message[16 + size : 16 + size + value_size], "big")
            y = int.from_bytes(os.urandom(56), "big")
            value = pow(2, y, p).to_bytes(value_size, "big")
            session = hashlib.new(HASHES[number], pow(theirs, y, p).to_bytes(value_size, "big")).digest()

            def augment(challenge):
                return mac(number, session, challenge)

        def response(with_key, challenge, sequence, label, one, other):
            text = augment(challenge) + sequence + tid + b"\0" + label + one.encode() + b"\0" + other.encode()
            return mac(number, with_key, text)

        c2 = os.urandom(size) if ctrl_key else bytes(size)
        s2 = os.urandom(3) + b"\1" if ctrl_key else bytes(4)
        header = b"\1\2\0\0" + tid + bytes([size, 0, 1 if ctrl_key else 0, 0]) + struct.pack("<H", len(value)) + s2
        self.send(header + response(key, c1, s1, b"HostHost", host, nqn) + c2 + value)
        success = self.receive(b"\1\3")
        if ctrl_key:
            right = response(ctrl_key, c2, s2, b"Controller", nqn, host)
            if success[8] != 1 or success[16 : 16 + size] != right:
                print("the controller's response is wrong")
                self.send(b"\0\xf0\0\0" + tid + b"\1\1" + bytes(8))
                sys.exit(3)
            self.send(b"\1\4\0\0" + tid + bytes(10))
        return f"{HASHES[number]} {f'ffdhe{GROUPS[group][0]}' if group else 'null'}"


def main():
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    port, nqn, host = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    key = read_key(sys.argv[4], host)
    ctrl_key = read_key(sys.argv[5], nqn) if len(sys.argv) == 6 else None
    admin = AuthenticatedQueue(socket_to(port))
    result = admin.connect(0, 0xFFFF, nqn, host)
    if result >> 16 != 2:
        print(f"no authentication asked for: {result:#x}")
        sys.exit(4)
    if admin.command(0x7F, [0, 8], fabrics=4)[0] != AUTHENTICATION_REQUIRED:
        print("served before it was authenticated")
        sys.exit(4)
    agreed = admin.authenticate(1, nqn, host, key, ctrl_key)
    if admin.command(0x7F, [0, 0x14, 0x00460001], fabrics=0)[0]:
        sys.exit("not enabled")
    io = AuthenticatedQueue(socket_to(port))
    io.connect(1, result & 0xFFFF, nqn, host)
    if io.command(2, [0, 0, 0], receive=512, nsid=1)[0] != AUTHENTICATION_REQUIRED:
        print("an I/O queue served before it was authenticated")
        sys.exit(4)
    io.authenticate(2, nqn, host, key, ctrl_key)
    block = os.urandom(512)
    if io.command(1, [8, 0, 0], block, nsid=1)[0]:
        sys.exit("not written")
    if io.command(2, [8, 0, 0], receive=512, nsid=1)[2] != block:
        sys.exit("other bytes")
    # Anew, while it is served.
    io.authenticate(3, nqn, host, key, ctrl_key)
    print(f"authenticated by {agreed}{', both ways' if ctrl_key else ''}")


if __name__ == "__main__":
    main()
