#!/usr/bin/env bash
# The Linux kernel's own NBD client, in the lab's guest, against a server on the host (tests/lab/nbd.sh).
source "$(dirname "$0")/lib.sh"
requires qemu-system-x86_64 busybox cpio nbd-client mkfs.ext4 mkfs.xfs nbdinfo
start_server
create_volume disk 1GiB
"$ROOT/scripts/lab" --time-limit 300 --file "$ROOT/scripts/attach" --file "$ROOT/scripts/detach" \
    --env HOST=10.0.2.2 --env "PORT=$PORT" --env VOLUME=disk "$ROOT/tests/lab/nbd.sh" || fail "the lab, status $?"
stop_server
