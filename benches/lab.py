"""What every section of `scripts/bench` shares: servers, clients, medians and the report.

Servers run on the first processor and clients on the second, over Unix sockets, or over TCP on
loopback where a section says so. Everything started is stopped by its pid, and the directories made are removed, however a section ends.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

SERVER_CPU = "0"
CLIENT_CPU = "1"
MIB = 1 << 20
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WEFT = os.path.join(ROOT, "target", "release", "weft")
EXAMPLES = os.path.join(ROOT, "target", "release", "examples")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Report:
    """Rows as they are measured, and the goals they are held against."""

    def __init__(self):
        self.rows = []

    def add(self, section, what, value, unit, goal=None, note=""):
        """`goal` is ("<=" or ">=", bound), both in `unit`."""
        met = None
        if goal:
            met = value <= goal[1] if goal[0] == "<=" else value >= goal[1]
        row = {"section": section, "what": what, "value": value, "unit": unit, "note": note}
        if goal:
            row.update(goal=f"{goal[0]} {goal[1]:g}", met=met)
        self.rows.append(row)
        self.print_row(row)

    @staticmethod
    def print_row(row):
        value = f"{row['value']:,.0f}" if abs(row["value"]) >= 1000 else f"{row['value']:.3g}"
        goal = f"goal {row['goal']}: {'met' if row['met'] else 'MISSED'}" if "goal" in row else ""
        line = f"{row['section']:<9} {row['what']:<52} {value:>10} {row['unit']:<9} {goal:<24} {row['note']}"
        print(line.rstrip(), flush=True)

    def missed(self):
        return [row for row in self.rows if row.get("met") is False]


def say(text):
    print(f"# {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def directory(parent):
    """A directory of our own below `parent`, removed afterwards."""
    path = tempfile.mkdtemp(prefix="weft-bench.", dir=parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def pinned(cpu, command):
    return ["taskset", "-c", cpu, *command]


class Server:
    """A server process on the server's processor; `with` stops it."""

    greeting = b"NBDMAGIC"

    def __init__(self, name, command, sock, log, export="", pid_file=None):
        """`sock` is a path, or a port of 127.0.0.1; `pid_file` is of one that insists on running in
        the background."""
        self.name = name
        self.socket = sock
        self.export = export
        self.log_path = log
        self.log = open(log, "ab")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            pinned(SERVER_CPU, command), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        self.pid = self.process.pid
        self.pid_file = pid_file

    def __enter__(self):
        self.wait_serving()
        return self

    def __exit__(self, *_exc):
        self.stop()

    def connected(self):
        """A socket connected to the server."""
        if isinstance(self.socket, int):
            return socket.create_connection(("127.0.0.1", self.socket), timeout=5)
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(5)
        connected.connect(self.socket)
        return connected

    def wait_serving(self, seconds=60):
        """Waits for a greeting on the socket; returns the seconds since the start."""
        while True:
            with contextlib.suppress(OSError):
                with self.connected() as probe:
                    if probe.recv(8) == self.greeting:
                        if self.pid_file:
                            with open(self.pid_file, encoding="ascii") as file:
                                self.pid = int(file.read())
                        return time.monotonic() - self.started
            ended = self.process.poll() is not None and not self.pid_file
            if ended or time.monotonic() - self.started > seconds:
                with open(self.log_path, encoding="utf-8", errors="replace") as log:
                    raise RuntimeError(f"{self.name} does not serve: {log.read()[-2000:]}")
            time.sleep(0.005)

    def uri(self):
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    def cpu_seconds(self):
        """Processor time of the process and of children that have ended (forking servers)."""
        with open(f"/proc/{self.pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return sum(map(int, fields[11:15])) / TICKS_PER_SECOND

    def resident_bytes(self):
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def kill(self):
        if self.pid != self.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                say(f"{self.name} did not stop within 60 s; killed")
        self.kill()


class Weft(Server):
    """A node with one data-plane thread on `data`; what is there is opened again.

    With `tcp` it also serves NBD and NVMe on ports of 127.0.0.1.
    """

    def __init__(self, data, device_size="2GiB", pod="", cache="1GiB", api=True, tcp=False,
                 polling_us=None):
        self.data = data
        self.nbd_tcp, self.nvme_tcp = (f"127.0.0.1:{free_port()}" if tcp else "" for _ in range(2))
        config = os.path.join(data, "bench.toml")
        with open(config, "w", encoding="utf-8") as file:
            file.write(
                f'data_dir = "{data}/node"\n'
                f'[pod]\ndevice_size = "{device_size}"\n{pod}\n'
                f'[memory]\ncache = "{cache}"\n'
                f'[nbd]\nlisten = {json.dumps([self.nbd_tcp] if tcp else [])}\n'
                f'[nvme_tcp]\nlisten = {json.dumps([self.nvme_tcp] if tcp else [])}\n'
                'discovery = []\n'
                f'[threads]\ndata_plane = 1\n'
                f'{"" if polling_us is None else f"polling_us = {polling_us}"}\n'
                '[log]\nlevel = "warn"\n'
            )
        sock = os.path.join(data, "node", "nbd.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sock)  # of a node that was killed: a greeting must come from the new one
        self.api = api
        super().__init__("weft", [WEFT, "--config", config], sock, f"{data}/weft.log", "vol0")

    def cli(self, *arguments):
        command = [WEFT, *arguments, "--data", f"{self.data}/node", "-o", "json"]
        return json.loads(subprocess.check_output(pinned(CLIENT_CPU, command)) or "null")


class MemoryNode(Server):
    """One volume in RAM over both front ends, also without timing (examples/memory_node.rs)."""

    def __init__(self, data, span):
        self.untimed_socket = os.path.join(data, "untimed.sock")
        self.nvme_tcp, self.untimed_nvme_tcp = (f"127.0.0.1:{free_port()}" for _ in range(2))
        sock = os.path.join(data, "timed.sock")
        command = [os.path.join(EXAMPLES, "memory_node"), "--size", str(span), "--unix", sock,
                   "--untimed-unix", self.untimed_socket, "--nvme-tcp", self.nvme_tcp,
                   "--untimed-nvme-tcp", self.untimed_nvme_tcp]
        super().__init__("memory_node", command, sock, f"{data}/memory_node.log", "memory")


class TcpCopy(Server):
    """A server that does nothing but copy from its memory into TCP (examples/tcp_copy.rs)."""

    greeting = b"TCPCOPY\n"

    def __init__(self, data, span):
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        command = [os.path.join(EXAMPLES, "tcp_copy"), "serve", "--listen", self.address,
                   "--span", str(span)]
        super().__init__("tcp_copy", command, port, f"{data}/tcp_copy.log")

    def load(self, depth, span, seconds, *more):
        """What it reaches at random places."""
        arguments = ["load", "--tcp", self.address, "--depth", str(depth), "--span", str(span),
                     "--poll", *more]
        return generate("tcp_copy", self, arguments, seconds)


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def peers(data, size_bytes, names):
    """The other servers that are installed, of `names`, each on `size_bytes` of RAM."""
    image = os.path.join(data, "peer.img")
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    config = os.path.join(data, "nbd-server.conf")
    with open(config, "w", encoding="utf-8") as file:
        file.write(
            f"[generic]\nunixsock = {data}/nbd-server.sock\nuser = root\ngroup = root\n"
            f"allowlist = true\n[disk]\nexportname = {image}\n"
        )
    commands = {
        "nbdkit": ["nbdkit", "-f", "-U", f"{data}/nbdkit.sock", "memory", str(size_bytes)],
        "qemu-nbd": ["qemu-nbd", "-t", "-e", "8", "-f", "raw", "-k", f"{data}/qemu-nbd.sock", image],
        "nbd-server": ["nbd-server", "-C", config, "-p", f"{data}/nbd-server.pid"],
    }
    exports, pid_files = {"nbd-server": "disk"}, {"nbd-server": f"{data}/nbd-server.pid"}
    for name in names:
        if shutil.which(name):
            sock, log = f"{data}/{name}.sock", f"{data}/{name}.log"
            yield Server(name, commands[name], sock, log, exports.get(name, ""), pid_files.get(name))
        else:
            say(f"{name} is not installed; left out")


def fio(data, arguments, seconds):
    """Runs fio on the client's processor; the read or write side of its first report."""
    command = ["fio", "--name=bench", "--output-format=json", "--group_reporting",
               f"--runtime={seconds}", "--time_based", "--norandommap", "--randrepeat=0", *arguments]
    output = subprocess.run(pinned(CLIENT_CPU, command), cwd=data, check=True, stdout=subprocess.PIPE)
    text = output.stdout.decode()
    job = json.loads(text[text.index("{"):])["jobs"][0]
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    tail = side["clat_ns"].get("percentile", {})
    return {
        "iops": side["iops"],
        "ios": side["total_ios"],
        "p50": tail.get("50.000000", 0) / 1000,
        "p99": tail.get("99.000000", 0) / 1000,
    }


def fio_nbd(server, mode, depth, seconds, span, compressible=50):
    """fio's nbd engine against a server, with the server's processor time per request."""
    before = server.cpu_seconds()
    result = fio(os.path.dirname(server.socket), [
        "--ioengine=nbd", f"--uri={server.uri()}", f"--rw={mode}", "--bs=4k", f"--iodepth={depth}",
        f"--size={span}", f"--buffer_compress_percentage={compressible}", "--refill_buffers=0",
    ], seconds)
    time.sleep(0.1)  # a forking server has to collect its child first
    result["cpu"] = (server.cpu_seconds() - before) * 1e6 / max(result["ios"], 1)
    return result


def generate(name, server, arguments, seconds):
    """Runs one of our generators on the client's processor; its figures as a dictionary.

    `others` is what the rest of the machine used meanwhile, in per cent of one processor.
    """
    command = [os.path.join(EXAMPLES, name), *arguments, "--seconds", str(seconds),
               "--server-pid", str(server.pid)]
    before, started = machine_cpu_seconds() - cpu_seconds_of(server), time.monotonic()
    text = subprocess.check_output(pinned(CLIENT_CPU, command)).decode()
    others = machine_cpu_seconds() - cpu_seconds_of(server) - before
    elapsed = time.monotonic() - started
    figures = {
        "iops": r"([\d.]+) requests/s", "p50": r"p50 ([\d.]+) us", "p99": r"p99 ([\d.]+) us",
        "own": r"([\d.]+) us of own CPU", "cpu": r"([\d.]+) us of server CPU",
        "busy": r"server ([\d.]+) % busy",
    }
    found = {name: float(re.search(pattern, text).group(1)) for name, pattern in figures.items()}
    return {**found, "others": max(0, others / elapsed * 100)}


def timing_cost_ns():
    """Nanoseconds that timing costs a request, by requests in a batch (examples/timing_cost.rs)."""
    text = subprocess.check_output(pinned(SERVER_CPU, [os.path.join(EXAMPLES, "timing_cost")]))
    found = re.findall(r"batch of (\d+): ([\d.]+) ns", text.decode())
    return {int(requests): float(ns) for requests, ns in found}


def machine_cpu_seconds():
    """Processor time of everything since the machine started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, *interrupts = map(int, file.readline().split()[1:])
    return (user + nice + system + sum(interrupts[:2])) / TICKS_PER_SECOND


def cpu_seconds_of(server):
    """Processor time of a server and of the clients that have ended."""
    clients = resource.getrusage(resource.RUSAGE_CHILDREN)
    return server.cpu_seconds() + clients.ru_utime + clients.ru_stime


def medians(results):
    """The median of each figure of equal dictionaries."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def interleave(cases, rounds):
    """Runs each of `cases` (name → function) in turn, `rounds` times; medians by name.

    Every other round runs backwards, so that none gains by its place.
    """
    results = {name: [] for name in cases}
    for number in range(rounds):
        for name, run in list(cases.items())[::-1 if number % 2 else 1]:
            results[name].append(run())
            say(f"round {number + 1} of {rounds}, {name}: " + ", ".join(
                f"{key} {value:,.1f}" for key, value in results[name][-1].items()))
    return {name: medians(list_) for name, list_ in results.items()}


def by_state(cases, state, rounds):
    """Like `interleave`, but asks for the machine's `state` between any two runs.

    Returns the medians by name and state, with how many runs they are of as `runs`. A run on both
    sides of which the state differs is left out.
    """
    results = {name: {} for name in cases}
    before = state()
    for number in range(rounds):
        for name, run in cases.items():
            result = run()
            after = state()
            say(f"round {number + 1} of {rounds}, {name} ({before}, {after}): " + ", ".join(
                f"{key} {value:,.1f}" for key, value in result.items()))
            if before == after:
                results[name].setdefault(after, []).append(result)
            before = after
    return {
        name: {state: {**medians(list_), "runs": len(list_)} for state, list_ in found.items()}
        for name, found in results.items()
    }


class NbdClient:
    """A pipelined NBD client, enough to write and read in large pieces."""

    def __init__(self, server):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        self.socket.connect(server.socket)
        self.receive(18)
        name = server.export.encode()
        hello = b"\0\0\0\x03IHAVEOPT\0\0\0\x01" + struct.pack(">I", len(name)) + name
        self.socket.sendall(hello)
        self.receive(10)
        self.in_flight = 0

    def receive(self, length):
        data = self.socket.recv(length, socket.MSG_WAITALL)
        if len(data) != length:
            raise RuntimeError("the server closed the connection")
        return data

    def request(self, command, offset, length, data=b""):
        header = struct.pack(">IHHQQI", 0x25609513, 0, command, offset, offset, length)
        self.socket.sendall(header)
        if data:
            self.socket.sendall(data)
        self.in_flight += 1

    def reply(self, payload=0):
        error = struct.unpack(">IIQ", self.receive(16))[1]
        if error:
            raise RuntimeError(f"the server answered error {error}")
        left = payload
        while left:
            left -= len(self.socket.recv(min(left, MIB)))
        self.in_flight -= 1

    def write_all(self, pieces, depth=8):
        """Writes (offset, data) pairs with `depth` in flight."""
        for offset, data in pieces:
            if self.in_flight == depth:
                self.reply()
            self.request(1, offset, len(data), data)
        while self.in_flight:
            self.reply()

    def read_through(self, length):
        """Reads from the start, so that a cache holds it."""
        for offset in range(0, length, MIB):
            self.request(0, offset, MIB)
            self.reply(MIB)

    def close(self):
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))
        self.socket.close()


def table_pages(length, seed=1):
    """Data like pages of a table: rows of numbers, random text and padding. zstd halves it."""
    import random
    source = random.Random(seed)
    rows, made = [], 0
    number = 0
    while made < length:
        number += 1
        text = source.randbytes(44).hex()[:60].encode()
        row = struct.pack("<IIHHIIi", 731, 0, number & 0xFFFF, 4, number, number // 1000, 0) + text
        row = row.ljust(120, b" ")
        rows.append(row)
        made += len(row)
    return b"".join(rows)[:length]
