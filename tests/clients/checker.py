"""What a durable volume must hold, checked through libnbd.

A `Load` keeps several connections busy with writes, write-zeroes, trims and reads of a region of a volume and knows,
for every 512-byte sector, the generation of the last acknowledged change and the generations of changes that were
sent but not answered when the server died. After a restart `check` reads the region back: each sector must hold the
acknowledged generation or an unanswered one, whole; and a request of at most 64 KiB must be there whole or not at all.

Requests in flight never overlap, so every sector has at most one unanswered change at a time and the rule stays exact.
What a sector must contain follows from (seed, sector, generation), so nothing but numbers is remembered.
"""

import errno
import hashlib
import random
import select
import struct

import nbd

SECTOR = 512
PAGE_SECTORS = 8
ATOMIC_SECTORS = 128
ZEROES = bytes(SECTOR)
MAGIC = b"WEFTTEST"
# What libnbd and a stopping server answer when the connection ends; any other error is the server's fault.
ENDED = {errno.ENOTCONN, errno.ESHUTDOWN, errno.EPIPE, errno.ECONNRESET}


class Wrong(Exception):
    """The volume holds something it must not hold."""


def sector_bytes(seed, sector, generation):
    """A sector's contents; generation 0 is zeroes. One in four does not compress, the others compress to a half."""
    if generation == 0:
        return ZEROES
    stamp = MAGIC + struct.pack("<QQQ", seed, sector, generation)
    if generation % 4 == 0:
        return stamp + hashlib.shake_128(stamp).digest(SECTOR - len(stamp))
    return (stamp + hashlib.shake_128(stamp).digest(SECTOR // 2 - len(stamp))) * 2


def describe(data):
    """What a sector found on the volume claims to be."""
    if data == ZEROES:
        return "zeroes"
    if data[:8] != MAGIC:
        return f"foreign bytes {data[:16].hex()}…"
    seed, sector, generation = struct.unpack("<QQQ", data[8:32])
    whole = "whole" if data == sector_bytes(seed, sector, generation) else "DAMAGED"
    return f"seed {seed} sector {sector} generation {generation}, {whole}"


class Change:
    """A write, write-zeroes or trim that was sent and not answered yet."""

    def __init__(self, kind, first, count, generation):
        self.kind, self.first, self.count, self.generation = kind, first, count, generation

    def sectors(self):
        return range(self.first, self.first + self.count)

    def __str__(self):
        return f"{self.kind} of {self.count} sectors at {self.first}, generation {self.generation}"


class Load:
    """The region [0, sectors) of one volume, what it must hold, and the requests under way."""

    def __init__(self, sectors, seed, base=0, depth=8):
        self.sectors, self.seed, self.base, self.depth = sectors, seed, base, depth
        self.random = random.Random(seed)
        self.acknowledged = [0] * sectors
        self.generation = 0
        self.in_flight = set()
        self.busy = bytearray(sectors)
        self.acknowledgements = 0
        self.wrong = None

    def _pick(self):
        """A free range, mostly whole pages and small, sometimes sectors or up to 64 KiB."""
        for _ in range(100):
            if self.random.random() < 0.8:
                count = PAGE_SECTORS * self.random.choice((1, 1, 1, 2, 2, 4, 8, 16))
                first = self.random.randrange(self.sectors // PAGE_SECTORS) * PAGE_SECTORS
            else:
                count = self.random.randrange(1, ATOMIC_SECTORS + 1)
                first = self.random.randrange(self.sectors)
            if first + count <= self.sectors and not any(self.busy[first : first + count]):
                return first, count
        return None

    def _send(self, connection):
        """Sends one request; false if there is no free range or the server is gone."""
        picked = self._pick()
        if picked is None:
            return False
        first, count = picked
        self.busy[first : first + count] = b"\1" * count
        try:
            if self.random.random() < 0.15:
                self._send_read(connection, first, count)
            else:
                self._send_change(connection, first, count)
        except nbd.Error:
            # Dead while sending: what was being sent stays in `in_flight`, for it may have arrived.
            return False
        return True

    def _send_read(self, connection, first, count):
        buffer = nbd.Buffer(count * SECTOR)

        def done(error):
            self.busy[first : first + count] = bytes(count)
            if error:
                self._refused(f"read of {count} sectors at {first}", error)
            else:
                self._compare(first, bytes(buffer.to_bytearray()), {})

        connection.aio_pread(buffer, self.base + first * SECTOR, self._completion(done))

    def _send_change(self, connection, first, count):
        offset, length = self.base + first * SECTOR, count * SECTOR
        kind = self.random.choices(("write", "write-zeroes", "trim"), (86, 8, 6))[0]
        if kind == "trim" and (first % PAGE_SECTORS or count % PAGE_SECTORS):
            # Of pages that lie only partly in it, a trim changes nothing.
            kind = "write-zeroes"
        self.generation += 1
        change = Change(kind, first, count, self.generation if kind == "write" else 0)
        self.in_flight.add(change)

        done = self._completion(lambda error: self._change_done(change, error))
        if kind == "trim":
            connection.aio_trim(length, offset, done)
        elif kind == "write-zeroes":
            flags = self.random.choice((0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA))
            connection.aio_zero(length, offset, done, flags)
        else:
            data = b"".join(sector_bytes(self.seed, sector, change.generation) for sector in change.sectors())
            flags = nbd.CMD_FLAG_FUA if self.random.random() < 0.2 else 0
            connection.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, done, flags)

    def _change_done(self, change, error):
        if error:
            # The change may or may not be there, so it stays in flight.
            self._refused(change, error)
            return
        self.in_flight.discard(change)
        for sector in change.sectors():
            self.acknowledged[sector] = change.generation
            self.busy[sector] = 0
        self.acknowledgements += 1

    def _refused(self, what, error):
        if error not in ENDED:
            self.wrong = Wrong(f"{what} was answered with {errno.errorcode.get(error, error)}")

    def _completion(self, done):
        """A libnbd callback. An exception would be swallowed in it, so it is kept, and run() raises it."""

        def callback(error):
            try:
                done(error.value)
            except Exception as exception:  # pylint: disable=broad-except
                self.wrong = exception
            return 1

        return callback

    def run(self, uris, until):
        """Keeps a connection to each URI busy until `until()` is true or the server is gone; true in the first case.

        Requests still under way when `until()` becomes true are waited for.
        """
        connections = [self._connect(uri) for uri in uris]
        stopping = False
        while True:
            stopping = stopping or until()
            for connection in connections:
                if not connection.aio_is_ready():
                    continue
                while not stopping and connection.aio_in_flight() < self.depth and self._send(connection):
                    pass
            if self.wrong:
                raise self.wrong
            alive = [c for c in connections if not (c.aio_is_dead() or c.aio_is_closed())]
            if len(alive) < len(connections):
                return False
            if stopping and not any(c.aio_in_flight() for c in connections):
                break
            self._poll(connections)
        for connection in connections:
            connection.shutdown()
        return True

    def _connect(self, uri):
        connection = nbd.NBD()
        connection.set_strict_mode(0)
        connection.connect_uri(uri)
        return connection

    def _poll(self, connections):
        poll = select.poll()
        by_descriptor = {}
        for connection in connections:
            direction = connection.aio_get_direction()
            events = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
                select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            )
            poll.register(connection.aio_get_fd(), events)
            by_descriptor[connection.aio_get_fd()] = connection
        for descriptor, events in poll.poll(50):
            connection = by_descriptor[descriptor]
            try:
                direction = connection.aio_get_direction()
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
                    connection.aio_notify_read()
                elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                    connection.aio_notify_write()
            except nbd.Error:
                # The server is gone: the connection is dead now, which run() sees.
                pass

    def _compare(self, first, data, unanswered):
        """Compares data read from sector `first` on; returns the generation found for each sector in doubt."""
        found = {}
        for index in range(len(data) // SECTOR):
            sector = first + index
            got = data[index * SECTOR : (index + 1) * SECTOR]
            allowed = [self.acknowledged[sector]]
            if sector in unanswered:
                allowed.append(unanswered[sector].generation)
            for generation in allowed:
                if got == sector_bytes(self.seed, sector, generation):
                    found[sector] = generation
                    break
            else:
                raise Wrong(
                    f"sector {sector} (byte {self.base + sector * SECTOR}): expected generation "
                    f"{' or '.join(map(str, allowed))}, found {describe(got)}"
                )
        return found

    def check(self, uri):
        """Reads the whole region back; raises Wrong. What is found is what the region must hold from then on."""
        unanswered = {}
        changes = list(self.in_flight)
        for change in changes:
            for sector in change.sectors():
                unanswered[sector] = change
        self.in_flight.clear()
        connection = self._connect(uri)
        step = 1024 * 1024 // SECTOR
        found = {}
        for first in range(0, self.sectors, step):
            count = min(step, self.sectors - first)
            data = bytes(connection.pread(count * SECTOR, self.base + first * SECTOR))
            found.update(self._compare(first, data, unanswered))
        connection.shutdown()
        for change in changes:
            self._check_atomic(change, found)
        for sector, generation in found.items():
            self.acknowledged[sector] = generation
        self.busy = bytearray(self.sectors)
        return len(changes)

    def _check_atomic(self, change, found):
        """All of an unanswered change is there, or none of it (only sectors whose two contents differ can tell)."""
        telling = [s for s in change.sectors() if self.acknowledged[s] != change.generation]
        new = sum(found[s] == change.generation for s in telling)
        if new not in (0, len(telling)):
            raise Wrong(f"torn: {new} of {len(telling)} sectors of the {change}")
