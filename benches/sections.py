"""The sections of `scripts/bench`, one function each, named in SECTIONS.

A section takes the report and the settings (see `scripts/bench --help`), starts what it needs and
leaves nothing behind. docs/performance.md says what each figure means.
"""

import contextlib
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import time

import lab
from lab import MIB


def fill(server, span):
    """Writes the span with table pages and reads it back, so that it is in the cache."""
    client = lab.NbdClient(server)
    page = lab.table_pages(MIB)
    client.write_all((offset, page) for offset in range(0, span, MIB))
    client.read_through(span)
    client.close()


def latency_note(result):
    return f"p50 {result['p50']:.0f} us, p99 {result['p99']:.0f} us"


def compare(report, section, label, results, bounds):
    """Rows for every server, then weft against the best peer."""
    for name, result in results.items():
        report.add(section, f"{label}, {name}", result["iops"], "IOPS", note=latency_note(result))
        goal = bounds.get("cpu") if name == "weft" else None
        report.add(section, f"{label}, {name}: server CPU", result["cpu"], "us/IO", goal)
    others = [result for name, result in results.items() if name != "weft"]
    if not others:
        return
    best = max(result["iops"] for result in others)
    ratio = results["weft"]["iops"] / best
    report.add(section, f"{label}, IOPS of weft / best peer", ratio, "x", bounds.get("iops"))
    lowest = min(result["p50"] for result in others)
    ratio = results["weft"]["p50"] / lowest
    report.add(section, f"{label}, p50 of weft / best peer", ratio, "x", bounds.get("p50"))
    cheapest = min(result["cpu"] for result in others)
    report.add(section, f"{label}, CPU of weft / best peer", results["weft"]["cpu"] / cheapest, "x")


def own_load(server, depth, seconds, span, write=False):
    """Our pipelined NBD generator over the Unix socket."""
    arguments = ["--unix", server.socket, "--name", server.export, "--depth", str(depth),
                 "--span", str(span), "--poll", "--no-fill"]
    return lab.generate("nbd_load", server, arguments + (["--write"] if write else []), seconds)


def ram(report, settings):
    """4 KiB random reads from RAM over a Unix socket."""
    span = 256 * MIB
    names = ["nbdkit", "qemu-nbd", "nbd-server"]
    with (lab.directory("/dev/shm") as data, lab.directory("/dev/shm") as other,
          contextlib.ExitStack() as stack):
        servers = [stack.enter_context(lab.Weft(data))]
        servers += [stack.enter_context(peer) for peer in lab.peers(data, 2 * span, names)]
        sleeping = stack.enter_context(lab.Weft(other, polling_us=0))
        for server in [*servers, sleeping]:
            fill(server, span)
        for depth, bounds in [
            (1, {"p50": ("<=", 1.0)}),
            (32, {"iops": (">=", 1.0), "cpu": ("<=", 5.5)}),
        ]:
            cases = {
                server.name: lambda server=server, depth=depth: lab.fio_nbd(
                    server, "randread", depth, settings.seconds, span)
                for server in servers
            }
            if depth == 1:
                cases["sleeping"] = lambda: lab.fio_nbd(
                    sleeping, "randread", 1, settings.seconds, span)
            results = lab.interleave(cases, settings.rounds)
            slept = results.pop("sleeping", None)
            compare(report, "ram", f"4k read QD{depth}", results, bounds)
            if slept:
                report.add("ram", "4k read QD1, weft without polling", slept["iops"], "IOPS",
                           note=f"{latency_note(slept)}, {slept['cpu']:.1f} us of server CPU each")
        own = {server.name: server for server in servers if server.name in ("weft", "nbdkit")}
        for depth in (32, 128):
            # nbdkit aborts when a client leaves with requests under way, so it gets none deeper.
            cases = {
                f"weft QD{depth}": lambda depth=depth: own_load(
                    own["weft"], depth, settings.seconds, span)
            }
            for name, result in lab.interleave(cases, settings.rounds).items():
                per_core = result["iops"] / max(result["busy"] / 100, 0.01)
                report.add("ram", f"own generator, {name}", result["iops"], "IOPS",
                           note=f"server {result['busy']:.0f} % of its core")
                report.add("ram", f"own generator, {name}: per busy core", per_core, "IOPS",
                           (">=", 400_000))
                report.add("ram", f"own generator, {name}: server CPU", result["cpu"], "us/IO")


# Loopback TCP has a fast and a slow state here, for seconds at a time: a plain copy of 4 KiB at depth
# 128 costs its server 1.3 us of CPU in one and 2.6 in the other (2 vCPUs of an EPYC, 2026-11-21).
# CPU time tells them apart on a busy machine too.
COPY_FAST_US = 1.9


def nvme(report, settings):
    """NVMe over loopback TCP, by state of loopback, beside NBD, nbdkit and a plain TCP copy."""
    span = 256 * MIB
    with lab.directory("/dev/shm") as data, contextlib.ExitStack() as stack:
        plain, sleeping = (os.path.join(data, name) for name in ("plain", "sleeping"))
        os.mkdir(plain)
        os.mkdir(sleeping)
        weft = stack.enter_context(lab.Weft(plain, tcp=True))
        sleeping = stack.enter_context(lab.Weft(sleeping, tcp=True, polling_us=0))
        copy = stack.enter_context(lab.TcpCopy(data, span))
        fill(weft, span)
        fill(sleeping, span)
        kit = None
        if shutil.which("nbdkit"):
            port = lab.free_port()
            command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "memory", str(2 * span)]
            kit = stack.enter_context(lab.Server("nbdkit", command, port, f"{data}/nbdkit.log"))
            nbd_load(kit, f"127.0.0.1:{port}", 32, span, 1, fill=True)

        def state():
            return "fast" if copy.load(128, span, 1)["cpu"] < COPY_FAST_US else "slow"

        nvme_latency(report, settings, span, state, weft, sleeping)
        cases = {}
        for name, depth, more in (
            ("read QD32", 32, ()),
            ("read QD128", 128, ()),
            ("read 1 x QD512", 512, ()),
            ("read 64 x QD8", 8, ("--connections", "64")),
            ("read 1 MiB QD8", 8, ("--block", str(MIB))),
        ):
            load = (depth, span, settings.seconds, *more)
            cases[name] = lambda load=load: nvme_load(weft, *load)
            cases[f"{name}, plain copy"] = lambda load=load: copy.load(*load)
        cases["read QD128, weft over NBD"] = lambda: nbd_load(
            weft, weft.nbd_tcp, 128, span, settings.seconds)
        if kit:
            cases["read QD128, nbdkit over NBD"] = lambda: nbd_load(
                kit, f"127.0.0.1:{port}", 128, span, settings.seconds)
        results = lab.by_state(cases, state, settings.rounds)
        # After the reads: what is written keeps the background thread busy for a while.
        writes = {"write QD32": lambda: nvme_load(weft, 32, span, settings.seconds, "--write")}
        results.update(lab.by_state(writes, state, settings.rounds))
        nvme_report(report, results)


def nvme_load(server, depth, span, seconds, *more):
    """Our generator over NVMe/TCP."""
    arguments = ["--tcp", server.nvme_tcp, "--depth", str(depth), "--span", str(span), "--poll",
                 "--no-fill", *more]
    return lab.generate("nvme_load", server, arguments, seconds)


def nbd_load(server, address, depth, span, seconds, fill=False):
    """Our generator over NBD on TCP."""
    arguments = ["--tcp", address, "--name", server.export, "--depth", str(depth), "--span",
                 str(span), "--poll", *([] if fill else ["--no-fill"])]
    return lab.generate("nbd_load", server, arguments, seconds)


def nvme_latency(report, settings, span, state, weft, sleeping):
    """Depth 1, with and without polling servers."""
    cases = {}
    for label, server in (("", weft), (", no polling", sleeping)):
        cases[f"NVMe QD1{label}"] = lambda server=server: nvme_load(
            server, 1, span, settings.seconds)
        cases[f"NBD QD1{label}"] = lambda server=server: nbd_load(
            server, server.nbd_tcp, 1, span, settings.seconds)
    goals = {"NVMe QD1": ("<=", 15), "NVMe QD1, no polling": ("<=", 30)}
    for name, states in lab.by_state(cases, state, settings.rounds).items():
        for where, result in sorted(states.items()):
            report.add("nvme", f"read {name}, {where}", result["p50"], "us p50", goals.get(name), (
                f"p99 {result['p99']:.0f} us, {result['cpu']:.1f} us of server CPU each, others "
                f"{result['others']:.0f} % of a processor; {result['runs']} runs"))


def nvme_report(report, results):
    """Rows by state, and the ratios that goals are set for."""
    goals = {"fast": (">=", 450_000), "slow": (">=", 300_000)}
    for name, states in results.items():
        for state, result in sorted(states.items()):
            report.add("nvme", f"{name}, {state}", result["iops"], "IOPS", note=(
                f"p50 {result['p50']:.0f} us, p99 {result['p99']:.0f} us, server "
                f"{result['busy']:.0f} % busy, client {result['own']:.2f} us each, others "
                f"{result['others']:.0f} % of a processor; {result['runs']} runs"))
            report.add("nvme", f"{name}, {state}: server CPU", result["cpu"], "us/IO")
            if name == "read QD128":
                report.add("nvme", f"{name}, {state}: per busy core", 1e6 / result["cpu"], "IOPS",
                           goals[state])
    for name, other, goal in (
        ("read 64 x QD8", "read 1 x QD512", (">=", 80)),
        ("read 64 x QD8, plain copy", "read 1 x QD512, plain copy", None),
        ("read 1 MiB QD8", "read 1 MiB QD8, plain copy", (">=", 80)),
        ("read QD128", "read QD128, plain copy", None),
        ("read QD128", "read QD128, weft over NBD", None),
        ("read QD128", "read QD128, nbdkit over NBD", None),
    ):
        for state, result in sorted(results[name].items()):
            beside = results.get(other, {}).get(state)
            if beside:
                report.add("nvme", f"{name} / {other}, {state}: per busy core",
                           beside["cpu"] / result["cpu"] * 100, "%", goal)


def timing(report, settings):
    """What timing every request costs: 4 KiB reads from a volume in RAM, with it and without."""
    span = 64 * MIB
    with lab.directory("/dev/shm") as data, lab.MemoryNode(data, span) as node:
        lab.generate("nbd_load", node, [
            "--unix", node.socket, "--depth", "32", "--span", str(span)], 1)
        alone = lab.timing_cost_ns()
        nbd = {"timed": ["--unix", node.socket], "untimed": ["--unix", node.untimed_socket]}
        nvme = {"timed": ["--tcp", node.nvme_tcp], "untimed": ["--tcp", node.untimed_nvme_tcp]}
        for depth in (1, 32):
            shape = ["--depth", str(depth), "--span", str(span), "--poll", "--no-fill"]
            for name, generator, where in (
                ("NBD", "nbd_load", nbd), ("NVMe", "nvme_load", nvme),
            ):
                cases = {
                    case: lambda generator=generator, place=place: lab.generate(
                        generator, node, place + shape, settings.seconds)
                    for case, place in where.items()
                }
                found = lab.interleave(cases, 2 * settings.rounds)
                for case, result in found.items():
                    report.add("timing", f"{name} QD{depth}, {case}", result["iops"], "IOPS",
                               note=f"server CPU {result['cpu']:.2f} us/IO")
                ratio = found["timed"]["iops"] / found["untimed"]["iops"]
                report.add("timing", f"{name} QD{depth}, IOPS of timed / untimed", ratio * 100, "%")
                # The loads are noisier than what is sought; the code alone is not.
                share = alone[depth] * found["untimed"]["iops"] / 1e9 * 100
                report.add("timing", f"{name} QD{depth}, timing alone of a request's time", share,
                           "%", ("<=", 1), f"{alone[depth]:.0f} ns each")


def write(report, settings):
    """4 KiB random writes at depth 32, devices in RAM."""
    span = 256 * MIB
    with lab.directory("/dev/shm") as data, contextlib.ExitStack() as stack:
        servers = [stack.enter_context(lab.Weft(data))]
        servers += [stack.enter_context(peer) for peer in lab.peers(data, 2 * span, ["nbdkit"])]
        node = stack.enter_context(lab.MemoryNode(data, span))
        cases = {
            server.name: lambda server=server: lab.fio_nbd(
                server, "randwrite", 32, settings.seconds, span)
            for server in [*servers, node]
        }
        results = lab.interleave(cases, settings.rounds)
        front = results.pop(node.name)
        compare(report, "write", "4k write QD32", results, {"iops": (">=", 1.0)})
        write_floor(report, data, front)
        raw = lab.fio_nbd(servers[0], "randwrite", 32, settings.seconds, span, compressible=0)
        report.add("write", "4k write QD32, weft, incompressible", raw["iops"], "IOPS",
                   note=latency_note(raw))
        report.add("write", "4k write QD32, weft, incompressible: server CPU", raw["cpu"], "us/IO")
        own = lab.interleave(
            {"weft": lambda: own_load(servers[0], 32, settings.seconds, span, write=True)}, 1)
        report.add("write", "own generator QD32, weft", own["weft"]["iops"], "IOPS",
                   note=f"{own['weft']['cpu']:.2f} us of server CPU each")


def write_floor(report, data, front):
    """What a write costs before anything is stored: our front end on a volume in RAM, and zstd."""
    sample = os.path.join(data, "sample")
    with open(sample, "wb") as file:
        for _ in range(4096):
            file.write(os.urandom(2048) + bytes(2048))
    zstd_us = 4096 / zstd_speed(sample, "4096")["MB/s"]
    report.add("write", "4k write QD32, front end alone", front["iops"], "IOPS",
               note=latency_note(front))
    report.add("write", "4k write QD32, front end alone: server CPU", front["cpu"], "us/IO")
    report.add("write", "zstd of 4 KiB alone", zstd_us, "us")
    report.add("write", "4k write QD32, front end and zstd alone", 1e6 / (front["cpu"] + zstd_us),
               "IOPS", note="the most that one core can do")


FIO_DSYNC = ["--ioengine=io_uring", "--direct=1", "--sync=dsync", "--rw=randwrite", "--bs=4k",
             "--buffer_compress_percentage=50", "--refill_buffers=0"]


def fio_dsync(data, jobs, depth, seconds):
    """fio's own O_DIRECT + O_DSYNC random writes, every write durable."""
    return lab.fio(data, [*FIO_DSYNC, f"--iodepth={depth}", "--size=256m", f"--numjobs={jobs}",
                          "--filename_format=fio.$jobnum"], seconds)


def fio_copies(data, copies, seconds):
    """fio writing to several files at once and waiting for all of them, one such round at a time."""
    files = ":".join(f"fio.{number}" for number in range(copies))
    return lab.fio(data, [*FIO_DSYNC, f"--filename={files}", f"--size={256 * copies}m",
                          "--file_service_type=roundrobin:1", f"--iodepth={copies}",
                          f"--iodepth_batch_submit={copies}",
                          f"--iodepth_batch_complete_min={copies}"], seconds)


def written_file(path, mib, blank_mib=0):
    """A file of which every block was written, as after long use; thin disks are slow before."""
    with open(path, "wb") as file:
        file.write(bytes(blank_mib * MIB))
        for _ in range(mib - blank_mib):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def durable(report, settings):
    """4 KiB random writes, every acknowledgement durable, on the disk of `--disk`."""
    span = 256 * MIB
    with lab.directory(settings.disk) as data:
        for number in range(3):
            written_file(f"{data}/fio.{number}", 256)
        devices = [f"{data}/dev-{number}" for number in range(6)]
        for device in devices:
            written_file(device, 768, blank_mib=1)
        with lab.Weft(data, pod=f"devices = {json.dumps(devices)}") as weft:
            fill(weft, span)
            deep = lab.interleave({
                "weft": lambda: lab.fio_nbd(weft, "randwrite", 32, settings.seconds, span),
                "fio": lambda: fio_dsync(data, 1, 32, settings.seconds),
            }, settings.rounds)
            for name, result in deep.items():
                report.add("durable", f"4k write QD32, {name}", result["iops"], "IOPS",
                           note=latency_note(result))
            report.add("durable", "4k write QD32, IOPS of weft / fio",
                       deep["weft"]["iops"] / deep["fio"]["iops"], "x", (">=", 1.5))
            shallow = lab.interleave({
                "weft": lambda: lab.fio_nbd(weft, "randwrite", 1, settings.seconds, span),
                "fio, 3 jobs": lambda: fio_dsync(data, 3, 1, settings.seconds),
                "fio, 3 copies": lambda: fio_copies(data, 3, settings.seconds),
            }, settings.rounds)
            for name, result in shallow.items():
                report.add("durable", f"4k write QD1, {name}", result["p50"], "us p50",
                           note=f"p99 {result['p99']:.0f} us")
            # Three jobs do not wait for one another: the slowest of three is what a copy costs.
            report.add("durable", "4k write QD1, p50 of weft / fio, 3 jobs",
                       shallow["weft"]["p50"] / shallow["fio, 3 jobs"]["p50"], "x")
            report.add("durable", "4k write QD1, p50 of weft / fio, 3 copies",
                       shallow["weft"]["p50"] / shallow["fio, 3 copies"]["p50"], "x",
                       ("<=", 1.3))


def zstd_speed(path, piece="32768"):
    """MB/s of zstd's own benchmark at level -1 in pieces of so many bytes, as weft compresses."""
    command = ["zstd", "-b", "--fast=1", "-i2", f"-B{piece}", path]
    output = subprocess.run(lab.pinned(lab.SERVER_CPU, command), check=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode()
    ratio, speed = re.findall(r"\(x?([\d.]+)\),\s*([\d.]+) MB/s", output)[-1]
    return {"MB/s": float(speed), "ratio": float(ratio)}


def seq(report, settings):
    """1 MiB sequential writes, one data-plane thread, devices in RAM."""
    with lab.directory("/dev/shm") as data, lab.Weft(data) as weft:
        pages = lab.table_pages(64 * MIB)
        corpus = os.path.join(data, "corpus")
        with open(corpus, "wb") as file:
            file.write(pages)
        view = memoryview(pages)
        total = settings.seconds * 256 * MIB
        os.sched_setaffinity(0, {int(lab.CLIENT_CPU)})

        def run():
            client = lab.NbdClient(weft)
            before, started = weft.cpu_seconds(), time.monotonic()
            client.write_all(
                (at, view[at % len(pages):at % len(pages) + MIB]) for at in range(0, total, MIB))
            elapsed, used = time.monotonic() - started, weft.cpu_seconds() - before
            client.close()
            return {"MB/s": total / elapsed / 1e6, "busy": used / elapsed * 100}

        results = lab.interleave({"weft": run, "zstd": lambda: zstd_speed(corpus)}, settings.rounds)
        os.sched_setaffinity(0, range(os.cpu_count()))
        own, zstd = results["weft"], results["zstd"]
        report.add("seq", "1 MiB sequential write, weft", own["MB/s"], "MB/s",
                   note=f"all its threads {own['busy']:.0f} % of one core")
        report.add("seq", "zstd -1 alone", zstd["MB/s"], "MB/s", note=f"ratio {zstd['ratio']:.2f}")
        report.add("seq", "weft / zstd", own["MB/s"] / zstd["MB/s"] * 100, "%", (">=", 60))


def write_pattern(weft, length):
    """Writes `length` bytes that compress to almost nothing but are not zero."""
    client = lab.NbdClient(weft)
    client.write_all(
        (offset, struct.pack(">Q", offset + 1) * (MIB // 8)) for offset in range(0, length, MIB))
    client.close()


def fill_journal(weft):
    """Random writes until the journal is as full as it gets; returns the share of it in use."""
    highest = 0.0
    with subprocess.Popen(lab.pinned(lab.CLIENT_CPU, [
            "fio", "--name=fill", "--ioengine=nbd", f"--uri={weft.uri()}", "--rw=randwrite",
            "--bs=4k", "--iodepth=64", "--size=64m", "--time_based", "--runtime=120",
            "--norandommap", "--buffer_compress_percentage=0", "--refill_buffers=0"]),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        started = time.monotonic()
        while time.monotonic() - started < 100:
            pod = weft.cli("pod", "show")
            used = pod["journal_used_bytes"] / pod["journal_bytes"]
            highest = max(highest, used)
            # A checkpoint begins at half of it.
            if used >= 0.48:
                break
            time.sleep(0.02)
        weft.kill()
        load.terminate()
    return used


def restart_seconds(data, length, settings):
    """Seconds from start to serving after `kill -9` with a full journal; medians."""
    times, used = [], 0.0
    weft = lab.Weft(data, device_size="4GiB")
    try:
        weft.wait_serving()
        write_pattern(weft, length)
        for _ in range(settings.rounds):
            used = fill_journal(weft)
            weft = lab.Weft(data, device_size="4GiB")
            times.append(weft.wait_serving())
            lab.say(f"{length // MIB} MiB: serving after {times[-1]:.2f} s, journal {used:.0%} full")
    finally:
        weft.kill()
    return statistics.median(times), used


def recovery(report, settings):
    """Start to serving after `kill -9` with a full journal, and with 100 times the data."""
    small = 10 * MIB if settings.quick else 64 * MIB
    for label, length in (("small pod", small), ("100 times the data", 100 * small)):
        with lab.directory(settings.disk) as data:
            seconds, used = restart_seconds(data, length, settings)
            report.add("recovery", f"start after kill -9, {label}", seconds, "s", ("<=", 2.0),
                       f"{length // MIB} MiB, journal {used:.0%} full")


def idle(report, settings):
    """Processor time and memory of a node that does nothing."""
    with lab.directory(settings.disk) as data, lab.Weft(data) as weft:
        time.sleep(3)
        resident = weft.resident_bytes()
        before, seconds = weft.cpu_seconds(), 5 if settings.quick else 20
        time.sleep(seconds)
        used = (weft.cpu_seconds() - before) / seconds * 100
        report.add("idle", f"CPU over {seconds} s", used, "%", ("<=", 1.0))
        report.add("idle", "resident memory, one volume", resident / MIB, "MiB")
        first, more = 100, 400
        # The first ones make the allocator give back what the start took.
        for number in range(first + more):
            if number == first:
                time.sleep(1)
                resident = weft.resident_bytes()
            weft.cli("volume", "create", f"more{number}", "--size", "1GiB")
        time.sleep(1)
        grown = (weft.resident_bytes() - resident) / more / 1024
        report.add("idle", f"resident memory, {first} volumes", resident / MIB, "MiB")
        report.add("idle", "resident memory per further volume", grown, "KiB")


SECTIONS = {function.__name__: function for function in (
    ram, nvme, timing, write, durable, seq, recovery, idle)}
