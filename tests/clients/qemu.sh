#!/usr/bin/env bash
# qemu's block driver: convert, compare and map by qemu-img; patterns, discard, misaligned and FUA writes by qemu-io.
source "$(dirname "$0")/lib.sh"
requires qemu-img qemu-io nbdinfo
start_server

# Runs qemu-io commands on vol0 and fails on any complaint.
io() {
    local arguments=() command
    for command in "${@:2}"; do
        arguments+=(-c "$command")
    done
    qemu-io -f raw "${arguments[@]}" "$(uri "$1")" >"$WORK/io" 2>&1 || fail "qemu-io: $(cat "$WORK/io")"
    ! grep -qiE 'fail|error|mismatch|verification' "$WORK/io" || fail "qemu-io: $(cat "$WORK/io")"
}

for transport in tcp unix; do
    say "qemu-io over $transport"
    io $transport 'write -P 0x11 0 1M' 'write -P 0x22 1M 64k' 'write -P 0x33 4096 512' 'read -P 0x11 0 4096' \
        'read -P 0x33 4096 512' 'read -P 0x11 4608 1043968' 'read -P 0x22 1M 64k'
    io $transport 'write -P 0x44 1000 3000' 'read -P 0x44 1000 3000' 'read -P 0x11 0 1000' 'read -P 0x11 4000 96'
    io $transport 'write -z 64k 64k' 'read -P 0 64k 64k' 'write -z -u 128k 64k' 'read -P 0 128k 64k' \
        'discard 192k 64k' 'read -P 0 192k 64k' 'read -P 0x11 256k 64k'
    io $transport 'write -f -P 0x55 3M 12k' 'flush' 'read -P 0x55 3M 12k' 'aio_write -P 0x66 8M 1M' \
        'aio_write -P 0x77 9M 1M' 'aio_flush' 'read -P 0x66 8M 1M' 'read -P 0x77 9M 1M'
done
restart_server
io tcp 'read -P 0x44 1000 3000' 'read -P 0x55 3M 12k' 'read -P 0x66 8M 1M' 'read -P 0 192k 64k'

say 'qemu-img: an image in, compared, out again'
head -c 48M /dev/urandom >"$WORK/raw" && truncate -s 192M "$WORK/raw" && seq 1 2000000 >>"$WORK/raw"
truncate -s 256M "$WORK/raw"
qemu-img convert -q -f raw -O qcow2 "$WORK/raw" "$WORK/image.qcow2"
create_volume image 256MiB
qemu-img convert -q -n -W -m 8 -f qcow2 -O raw "$WORK/image.qcow2" "$(uri tcp image)"
qemu-img compare -q -f qcow2 -F raw "$WORK/image.qcow2" "$(uri unix image)" || fail 'qemu-img compare: different'
qemu-img convert -q -f raw -O raw "$(uri unix image)" "$WORK/back"
cmp "$WORK/raw" "$WORK/back" || fail 'other bytes came back'
qemu-img info -f raw "$(uri tcp image)" | grep -q '256 MiB' || fail 'qemu-img info'
qemu-img map --output=json -f raw "$(uri tcp image)" | grep -q '"zero": true' || fail 'qemu-img map shows no hole'
qemu-img bench -q -w -f raw -c 2000 -d 16 -s 4096 "$(uri tcp image)" >/dev/null || fail 'qemu-img bench'
stop_server
