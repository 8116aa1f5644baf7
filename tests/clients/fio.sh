#!/usr/bin/env bash
# fio's nbd engine with verify: random sizes and offsets over both transports, and once more after a restart and a kill.
source "$(dirname "$0")/lib.sh"
requires fio nbdinfo
start_server

# Runs fio over a transport ($1) on the region at $2; the rest are fio's options.
load() {
    local uri
    # fio takes a colon in a job's option for a separator of files unless it is escaped; in --uri it is not.
    uri=$(uri "$1")
    fio --name=verify --ioengine=nbd --uri="$uri" --offset="$2" --size=96M --io_size=192M --bsrange=4k-128k \
        --rw=randwrite --iodepth=32 --verify=crc32c --verify_fatal=1 --randseed=7 --buffer_compress_percentage=50 \
        --refill_buffers --verify_state_save=0 --output="$WORK/fio" "${@:3}" || { cat "$WORK/fio" && fail 'fio, see above'; }
}

say 'write and verify over tcp and over the Unix socket, at once'
load tcp 0 --do_verify=1 &
first=$!
(WORK=$WORK/second && mkdir -p "$WORK" && load unix 1G --do_verify=1)
wait "$first"

say 'verify again after a restart'
restart_server
load unix 0 --verify_only
say 'verify again after a kill'
load tcp 2G --do_verify=0
kill_server
start_server
load unix 2G --verify_only
load tcp 1G --verify_only
stop_server
