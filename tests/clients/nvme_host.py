"""What NVMe/TCP hosts of the tests share: a queue, written from the specification."""

import socket
import struct
import sys


class Refused(Exception):
    """A Connect failed."""


def socket_to(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)


class Queue:
    """One connection, over anything that has sendall and recv."""

    def __init__(self, stream):
        self.socket = stream
        self.socket.sendall(struct.pack("<BBBBI", 0, 0, 128, 0, 128) + bytes(120))
        if self.exactly(128)[0] != 1:
            sys.exit("no ICResp")

    def exactly(self, count):
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise ConnectionError("the target closed")
            data += part
        return data

    def command(self, opcode, dwords, data=b"", receive=0, fabrics=0, nsid=0):
        """Sends a command; returns its status, its result and what it read."""
        length = len(data) or receive
        sqe = bytearray(64)
        sqe[0], sqe[1], sqe[2] = opcode, 0x40, 1
        sqe[4:8] = struct.pack("<I", fabrics or nsid)
        sqe[32:36] = struct.pack("<I", length)
        sqe[39] = 0x01 if data else 0x5A
        for index, dword in enumerate(dwords):
            sqe[40 + 4 * index : 44 + 4 * index] = struct.pack("<I", dword)
        offset = 72 if data else 0
        self.socket.sendall(struct.pack("<BBBBI", 4, 0, 72, offset, 72 + len(data)) + sqe + data)
        kind, flags, header, offset, total = struct.unpack("<BBBBI", self.exactly(8))
        rest = self.exactly(total - 8)
        if kind == 7 and flags & 8:
            return 0, 0, rest[offset - 8 :]
        if kind != 5 or header != 24:
            sys.exit(f"a PDU of type {kind}")
        return struct.unpack_from("<H", rest, 14)[0] >> 1, struct.unpack_from("<I", rest, 0)[0], b""

    def connect(self, qid, controller, nqn, host):
        data = bytearray(1024)
        data[0:16] = b"\x77" * 16
        data[16:18] = struct.pack("<H", controller)
        data[256 : 256 + len(nqn)] = nqn.encode()
        data[512 : 512 + len(host)] = host.encode()
        status, result, _ = self.command(0x7F, [qid << 16, 31, 0], bytes(data), fabrics=1)
        if status:
            raise Refused(f"connect: status {status:#x}")
        return result
