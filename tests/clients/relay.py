#!/usr/bin/python3
"""Relays TCP from one port of this machine to another: a path that can be cut by killing it.

usage: relay.py FROM_PORT TO_PORT
"""

import asyncio
import sys


async def pump(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def relay(reader, writer, port):
    try:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))


async def main():
    here, there = map(int, sys.argv[1:])
    server = await asyncio.start_server(lambda r, w: relay(r, w, there), "127.0.0.1", here)
    await server.serve_forever()


asyncio.run(main())
