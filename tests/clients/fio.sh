#!/usr/bin/env bash
# fio's nbd engine with verify: random sizes and offsets over both transports, once more after a restart and a kill, and
# then kill -9 at random under its load.
#
# KILLS (default 5, about 3 s each) and SEED may be set.
source "$(dirname "$0")/lib.sh"
requires fio nbdinfo
start_server

# Runs fio over a transport ($1) on the region at $2, with its report beside that of other regions; the rest are fio's
# options.
load() {
    local uri report=$WORK/fio-$2
    # fio takes a colon in a job's option for a separator of files unless it is escaped; in --uri it is not.
    uri=$(uri "$1")
    fio --name=verify --ioengine=nbd --uri="$uri" --offset="$2" --size=96M --io_size=192M --bsrange=4k-128k \
        --rw=randwrite --iodepth=32 --verify=crc32c --verify_fatal=1 --randseed=7 --buffer_compress_percentage=50 \
        --refill_buffers --verify_state_save=0 --output="$report" "${@:3}" || { cat "$report" && fail 'fio, see above'; }
}

say 'write and verify over tcp and over the Unix socket, at once'
load tcp 0 --do_verify=1 &
first=$!
load unix 1G --do_verify=1
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

# What fio had written completely must verify; of what was under way at the kill it does not know what was acknowledged
# (crash.py does, and checks that).
seed=${SEED:-$RANDOM}
RANDOM=$seed
say "reproduce the kills with: SEED=$seed tests/clients/fio.sh"
for ((kill = 1; kill <= ${KILLS:-5}; kill++)); do
    milliseconds=$((50 + RANDOM % 950))
    say "kill $kill, $milliseconds ms into a load beside what was written before"
    load unix 3G --do_verify=0 --randseed="$kill" --size=32M --io_size=32M
    load tcp 4G --do_verify=0 --time_based --runtime=60 >"$WORK/killed.log" 2>&1 &
    under_way=$!
    sleep "$(printf '%d.%03d' $((milliseconds / 1000)) $((milliseconds % 1000)))"
    kill -0 "$under_way" 2>/dev/null || { cat "$WORK/killed.log" && fail 'the load ended before the kill'; }
    kill_server
    ! wait "$under_way" || fail 'the load did not notice the kill'
    start_server
    load unix 3G --verify_only --randseed="$kill" --size=32M --io_size=32M
    load tcp 2G --verify_only
done
stop_server
