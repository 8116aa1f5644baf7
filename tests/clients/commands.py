#!/usr/bin/python3
"""Every NBD command and error through libnbd, with its own checks of the protocol on (strict mode).

usage: commands.py SERVER URI        SERVER weft also checks what only Weft promises
"""

import errno
import sys

import nbd

MIB = 1 << 20
REGION = 512 * MIB


def connect(uri, structured=True, context=True):
    handle = nbd.NBD()
    handle.set_request_structured_replies(structured)
    if structured and context:
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(uri)
    return handle


def expect(condition, what):
    if not condition:
        sys.exit(f"FAILED: {what}")


def refused(errors, call, *arguments):
    """The call must fail with one of the errors, and the connection must live on."""
    try:
        call(*arguments)
    except nbd.Error as error:
        expect(error.errnum in errors, f"{call.__name__}{arguments[1:]}: {error.string}")
        return
    sys.exit(f"FAILED: {call.__name__}{arguments[1:]} should have failed")


def pattern(length, salt):
    return bytes((index * 7 + salt) % 251 for index in range(4096)) * (length // 4096 + 1)


def read_write(handle, base):
    """Reads give what was written, whatever the alignment (in sectors) and length."""
    for salt, (offset, length) in enumerate(
        [(0, 512), (512, 512), (4096, 4096), (3584, 1024), (7 * 512, 33 * 512), (MIB - 512, MIB), (0, 8 * MIB)]
    ):
        data = pattern(length, salt)[:length]
        handle.pwrite(data, base + offset, nbd.CMD_FLAG_FUA if salt % 2 else 0)
        expect(handle.pread(length, base + offset) == data, f"read back {length} at {offset}")
    expect(handle.pread(4096, base - 4096) == bytes(4096), "the block before was touched")
    handle.flush()


def zero_and_trim(handle, base):
    """What is zeroed, or trimmed by whole blocks, reads as zeroes, at once, and its neighbours do not change."""
    data = pattern(4 * MIB, 9)[: 4 * MIB]
    blocks = [(4096, 4096), (MIB, 2 * MIB)]
    sectors = [(512, 512), (3 * 512, 21 * 512)]
    calls = [
        (lambda offset, length: handle.zero(length, offset), blocks + sectors),
        (lambda offset, length: handle.zero(length, offset, nbd.CMD_FLAG_NO_HOLE), blocks + sectors),
        (lambda offset, length: handle.zero(length, offset, nbd.CMD_FLAG_FUA), blocks + sectors),
        (lambda offset, length: handle.trim(length, offset), blocks),
        (lambda offset, length: handle.trim(length, offset, nbd.CMD_FLAG_FUA), blocks),
    ]
    for call, ranges in calls:
        for offset, length in ranges:
            handle.pwrite(data, base)
            call(base + offset, length)
            got = handle.pread(4 * MIB, base)
            expect(got[:offset] == data[:offset], "bytes before were touched")
            expect(got[offset + length :] == data[offset + length :], "bytes after were touched")
            expect(got[offset : offset + length] == bytes(length), f"not zeroes: {length} at {offset}")


def unaligned(handle, base):
    """Weft serves any offset and length, whatever minimum it advertises."""
    handle.set_strict_mode(0)
    data = pattern(20000, 5)[:20000]
    handle.pwrite(data, base)
    handle.pwrite(b"abc", base + 4095)
    handle.zero(777, base + 9001)
    handle.zero(5, base + 12286)
    # Of blocks that lie only partly in it, a trim changes nothing.
    handle.trim(4100, base + 1)
    handle.trim(4098, base + 16383)
    expected = bytearray(data)
    expected[4095:4098] = b"abc"
    expected[9001:9778] = bytes(777)
    expected[12286:12291] = bytes(5)
    expected[16384:] = bytes(len(expected) - 16384)
    expect(handle.pread(19990, base + 1) == expected[1:19991], "unaligned requests give other bytes")
    handle.set_strict_mode(nbd.STRICT_MASK)


def block_status(handle, base):
    """Holes, data and the whole range are told apart; a reply never covers more than was asked."""
    handle.zero(16 * MIB, base)
    handle.trim(16 * MIB, base)
    handle.pwrite(pattern(MIB, 1)[:MIB], base + 4 * MIB)
    handle.flush()
    extents = []

    def collect(_context, offset, entries, _error):
        for length, flags in zip(entries[0::2], entries[1::2]):
            extents.append((offset, length, flags))
            offset += length

    at = base
    while at < base + 16 * MIB:
        count = len(extents)
        handle.block_status(base + 16 * MIB - at, at, collect)
        expect(len(extents) > count, "an empty block status")
        at = sum(extents[-1][:2])
    data = [(offset - base, length) for offset, length, flags in extents if not flags & nbd.STATE_HOLE]
    expect(
        sum(length for _, length in data) < 2 * MIB and data[0][0] <= 4 * MIB, f"block status of data: {extents}"
    )
    extents.clear()
    handle.block_status(MIB, base, collect, nbd.CMD_FLAG_REQ_ONE)
    expect(len(extents) == 1 and extents[0][1] <= MIB, f"REQ_ONE: {extents}")


def structured_read(handle, base):
    """Chunks cover the range exactly, and DF gives one."""
    handle.zero(4 * MIB, base)
    handle.pwrite(pattern(MIB, 3)[:MIB], base + MIB)
    covered = []

    def chunk(data, offset, kind, _error):
        covered.append((offset, len(data), kind))

    handle.pread_structured(4 * MIB, base, chunk)
    covered.sort()
    at = base
    for offset, length, _ in covered:
        expect(offset == at, f"chunks leave a gap or overlap: {covered}")
        at += length
    expect(at == base + 4 * MIB, f"chunks cover {at - base} bytes")
    if handle.can_df():
        covered.clear()
        handle.pread_structured(4 * MIB, base, chunk, nbd.CMD_FLAG_DF)
        expect(len(covered) == 1, f"DF gave {len(covered)} chunks")


def errors(handle, weft):
    """Requests that must be refused, with the right error, sent although libnbd knows better."""
    size = handle.get_size()
    handle.set_strict_mode(0)
    refused((errno.EINVAL,), handle.pread, 4096, size)
    refused((errno.EINVAL,), handle.pread, 4096, size - 512)
    refused((errno.ENOSPC, errno.EINVAL), handle.pwrite, bytes(4096), size)
    refused((errno.ENOSPC, errno.EINVAL), handle.pwrite, bytes(4096), size - 512)
    refused((errno.EINVAL, errno.ENOSPC), handle.trim, 8192, size - 4096)
    refused((errno.EINVAL, errno.ENOSPC), handle.zero, 8192, size - 4096)
    if weft:
        refused((errno.ENOSPC,), handle.pwrite, bytes(4096), size)
        refused((errno.EINVAL,), handle.pread, 4096, 0, 0x80)
    handle.set_strict_mode(nbd.STRICT_MASK)
    expect(len(handle.pread(4096, size - 4096)) == 4096, "the connection does not live on")


def main():
    server, uri = sys.argv[1:3]
    weft = server == "weft"
    plain = connect(uri, structured=False)
    expect(not plain.get_structured_replies_negotiated(), "structured replies were not asked for")
    handle = connect(uri)
    expect(handle.get_structured_replies_negotiated(), "no structured replies")
    expect(handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), "no base:allocation")
    for number, one in enumerate((plain, handle)):
        base = REGION * (number + 1)
        read_write(one, base + 64 * MIB)
        zero_and_trim(one, base + 128 * MIB)
        errors(one, weft)
        if one.can_cache():
            one.cache(MIB, base)
    block_status(handle, 3 * REGION)
    structured_read(handle, 3 * REGION + 32 * MIB)
    if weft:
        unaligned(handle, 3 * REGION + 64 * MIB)
        expect(handle.can_fast_zero() and handle.can_cache() and handle.can_df(), "fast zero, cache or DF is missing")
        handle.trim(4 * REGION, 0)
        handle.zero(4 * REGION, 0, nbd.CMD_FLAG_FAST_ZERO)
        expect(handle.pread(MIB, REGION + 64 * MIB) == bytes(MIB), "a large trim left data")
    for one in (plain, handle):
        one.shutdown()


main()
