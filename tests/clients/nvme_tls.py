#!/usr/bin/env python3
"""An NVMe/TCP host that encrypts: the TLS is that of `openssl s_client`, the keys are derived here.

usage: nvme_tls.py [OPTION...] PORT NQN HOSTNQN KEYFILE

Connects an admin queue and an I/O queue to NQN, each by a TLS session of its own, under the name and by the TLS key of
HOSTNQN, then writes and reads a MiB of namespace 1, and identifies the controller in between.
  --identity 0|1    the version of the identity (1)
  --libnvme         derive keys as libnvme did until 1.15: differently from the standard
  --as HOSTNQN      the name that Connect says, if another
  --to NQN          the subsystem that Connect says, if another
  --groups LIST     groups of the key exchange, as openssl names them; a share of the first is sent
  --suites LIST     cipher suites offered, instead of the one that fits the key
  --dhchap KEYFILE  authenticate by that key, inside the sessions
  --hold            say when connected, and go on when a line comes
  --prefix HEX      sent in front of the first PDU, inside the session
Exit status: 3 if there is no TLS session, 4 if Connect is refused, 6 if it has to authenticate as well.
"""

import argparse
import base64
import hashlib
import hmac
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
import zlib

import dhchap
from nvme_host import Refused

SUITES = {1: "TLS_AES_128_GCM_SHA256", 2: "TLS_AES_256_GCM_SHA384"}
HASHES = {1: "sha256", 2: "sha384"}


def read_key(path):
    with open(path, encoding="ascii") as file:
        prefix, number, encoded, rest = file.read().strip().split(":")
    data = base64.b64decode(encoded, validate=True)
    key, checksum = data[:-4], data[-4:]
    if prefix != "NVMeTLSkey-1" or rest or zlib.crc32(key).to_bytes(4, "little") != checksum:
        sys.exit(f"{path} holds no key")
    return int(number, 16), key


def expand(number, secret, label, context, libnvme):
    name, size = HASHES[number], {1: 32, 2: 48}[number]
    prk = hmac.new(bytes(size), secret, name).digest()
    label = b"tls13 " + label
    if libnvme:
        text = struct.pack("<H", size) + label + context
    else:
        text = struct.pack(">HB", size, len(label)) + label + bytes([len(context)]) + context
    return hmac.new(prk, text + b"\1", name).digest()


def derive(key_hash, key, host, nqn, version, libnvme):
    """The number of the hash, the identity and the key of TLS."""
    number = {32: 1, 48: 2}[len(key)]
    retained = expand(number, key, b"HostNQN", host.encode(), libnvme) if key_hash else key
    identity = f"NVMe{version}R{number:02} {host} {nqn}"
    context = identity
    if version == 1:
        text = f"{host} {nqn} NVMe-over-Fabrics".encode()
        digest = base64.b64encode(hmac.new(retained, text, HASHES[number]).digest()).decode()
        identity += f" {digest}"
        context = f"{number:02} {digest}"
    return number, identity, expand(number, retained, b"nvme-tls-psk", context.encode(), libnvme)


def der(tag, content):
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x82]) + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def integer(value):
    return der(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def session(number, key):
    """A PEM file of SSL_SESSION: s_client's own -psk can do SHA-256 only."""
    now, timeout = der(0xA1, integer(int(time.time()))), der(0xA2, integer(7200))
    parts = [integer(1), integer(0x0304), der(4, bytes([0x13, number])), der(4, b""), der(4, key), now, timeout]
    body = base64.encodebytes(der(0x30, b"".join(parts))).decode()
    return f"-----BEGIN SSL SESSION PARAMETERS-----\n{body}-----END SSL SESSION PARAMETERS-----\n"


class Openssl:
    """A TLS session."""

    def __init__(self, port, number, identity, key, options):
        self.session = tempfile.NamedTemporaryFile("w", suffix=".pem")
        self.session.write(session(number, key))
        self.session.flush()
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-quiet", "-nocommands"]
        command += ["-psk_identity", identity, "-ciphersuites", options.suites or SUITES[number]]
        command += ["-psk", key.hex()] if number == 1 else ["-psk_session", self.session.name]
        command += ["-groups", options.groups] if options.groups else []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)

    def sendall(self, data):
        view = memoryview(data)
        while view:
            try:
                view = view[self.process.stdin.write(view) :]
            except BrokenPipeError:
                raise ConnectionError("the session ended") from None

    def recv(self, count):
        ready, _, _ = select.select([self.process.stdout], [], [], 30)
        if not ready:
            sys.exit("no answer")
        return self.process.stdout.read(count)

    def close(self):
        self.process.kill()
        return self.process.communicate()[1].decode(errors="replace")


def parse():
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    for option in ("--as", "--to", "--groups", "--suites", "--dhchap"):
        parser.add_argument(option, dest=option.strip("-") + ("_" if option == "--as" else ""))
    parser.add_argument("--identity", type=int, default=1)
    parser.add_argument("--hold", action="store_true")
    parser.add_argument("--libnvme", action="store_true")
    parser.add_argument("--prefix", type=bytes.fromhex, default=b"")
    parser.add_argument("port", type=int)
    for argument in ("nqn", "host", "keyfile"):
        parser.add_argument(argument)
    return parser.parse_args()


def move(options, keys):
    """Everything that a host does; what it wrote and read."""
    streams = []

    def queue():
        streams.append(Openssl(options.port, *keys, options))
        streams[-1].sendall(options.prefix)
        return dhchap.AuthenticatedQueue(streams[-1])

    def prove(queue, transaction, result):
        """Authenticates if the result of a Connect asks for it."""
        if not result >> 16:
            return
        if not options.dhchap:
            print("authentication is asked for")
            sys.exit(6)
        queue.authenticate(transaction, nqn, host, dhchap.read_key(options.dhchap, host), None)

    host, nqn = options.as_ or options.host, options.to or options.nqn
    try:
        admin = queue()
        controller = admin.connect(0, 0xFFFF, nqn, host)
        prove(admin, 1, controller)
        if nqn.endswith(".discovery"):
            return "discovery"
        if admin.command(0x7F, [0, 0x14, 0x00460001], fabrics=0)[0]:
            sys.exit("not enabled")
        status, _, identified = admin.command(6, [1], receive=4096)
        if status or identified[768 : 768 + len(nqn)] != nqn.encode():
            sys.exit(f"not identified: status {status:#x}")
        io = queue()
        prove(io, 2, io.connect(1, controller & 0xFFFF, nqn, host))
        if options.hold:
            print("connected", flush=True)
            sys.stdin.readline()
        # Eight KiB in a capsule, and a MiB read in one command.
        data = os.urandom(1 << 20)
        for at in range(0, len(data), 8192):
            if io.command(1, [at // 512, 0, 15], data[at : at + 8192], nsid=1)[0]:
                sys.exit("not written")
        if io.command(2, [0, 0, len(data) // 512 - 1], receive=len(data), nsid=1)[2] != data:
            sys.exit("other bytes")
        return "a MiB written and read"
    finally:
        said = "".join(stream.close() for stream in streams)
        if "alert" in said or ":error:" in said.lower():
            print(said.strip())


def main():
    options = parse()
    key_hash, key = read_key(options.keyfile)
    keys = derive(key_hash, key, options.host, options.nqn, options.identity, options.libnvme)
    try:
        print(f"{SUITES[keys[0]]}, identity version {options.identity}: {move(options, keys)}")
    except Refused as refused:
        print(refused)
        sys.exit(4)
    except ConnectionError as error:
        print(error)
        sys.exit(3)


main()
