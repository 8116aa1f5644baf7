#!/usr/bin/env bash
# PostgreSQL on a volume (nbdfuse, a loop device and ext4): kill -9 of the server under pgbench, restart, recovery; no
# committed transaction is lost, the books balance, and pg_amcheck finds nothing. In the last round the volume has a write
# cache: then it is by flushes that PostgreSQL's commits are durable.
#
# ROUNDS (default 3) kills. nbdfuse cannot reconnect, so after a kill everything above it is torn down and mounted anew,
# as after a crash of the host. Needs root, /dev/fuse and loop devices.
source "$(dirname "$0")/lib.sh"
requires nbdfuse losetup mkfs.ext4 pgbench pg_amcheck pg_ctl runuser nbdinfo
[[ $(id -u) -eq 0 ]] || skip 'needs root to mount a loop device'
[[ -w /dev/fuse && -e /dev/loop-control ]] || skip 'this host has no /dev/fuse or no loop devices'
LOAD_S=8
KILL_AFTER_S=5
LIMIT_S=30

NBDFUSE_PID=
PGBENCH_PID=
LOOP=
MOUNTED=
RUNNING=

# Waits until a command succeeds.
eventually() {
    local deadline=$((SECONDS + LIMIT_S))
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || fail "not within $LIMIT_S s: $*"
        sleep 0.1
    done
}

as_postgres() {
    (cd "$WORK/mount" && runuser -u postgres -- "$@")
}

postgres_is_gone() {
    ! kill -0 "$1"
}

mount_volume() {
    mkdir -p "$WORK/fuse" "$WORK/mount"
    nbdfuse "$WORK/fuse/volume" "$(uri unix database)" 2>>"$LOG" &
    NBDFUSE_PID=$!
    eventually test -s "$WORK/fuse/volume"
    LOOP=$(losetup --direct-io=on --find --show "$WORK/fuse/volume")
    [[ -z ${1:-} ]] || "$@" "$LOOP"
    mount -t ext4 "$LOOP" "$WORK/mount"
    MOUNTED=yes
}

# Takes everything above the server down; works whether the server lives or not.
tear_down() {
    local postmaster
    if [[ -n $PGBENCH_PID ]]; then
        kill -KILL "$PGBENCH_PID" 2>/dev/null || true
        wait "$PGBENCH_PID" 2>/dev/null || true
        PGBENCH_PID=
    fi
    if [[ -n $RUNNING ]]; then
        # The postmaster's pid file is on the volume, which may be unreadable now; its pid was noted at the start.
        postmaster=$RUNNING
        kill -QUIT "$postmaster" 2>/dev/null || true
        eventually postgres_is_gone "$postmaster"
        RUNNING=
    fi
    if [[ -n $MOUNTED ]]; then
        eventually umount "$WORK/mount"
        MOUNTED=
    fi
    if [[ -n $LOOP ]]; then
        losetup --detach "$LOOP"
        LOOP=
    fi
    if [[ -n $NBDFUSE_PID ]]; then
        # Root needs no fusermount; a dead nbdfuse leaves a mount behind all the same.
        umount "$WORK/fuse" || umount --lazy "$WORK/fuse" || true
        kill "$NBDFUSE_PID" 2>/dev/null || true
        wait "$NBDFUSE_PID" 2>/dev/null || true
        NBDFUSE_PID=
    fi
}

before_cleanup() {
    tear_down
}

start_postgres() {
    as_postgres pg_ctl --pgdata="$WORK/mount/db" --log="$WORK/postgres/log" --wait --timeout=60 start \
        >"$WORK/postgres/start" 2>&1 || { cat "$WORK/postgres/start" && tail -n 30 "$WORK/postgres/log" && fail 'PostgreSQL does not start'; }
    RUNNING=$(head -n 1 "$WORK/mount/db/postmaster.pid")
}

sql() {
    as_postgres psql --host="$WORK/postgres" --no-psqlrc --tuples-only --no-align --quiet --command="$1" bench
}

create_database() {
    mkdir "$WORK/mount/db" && chown postgres "$WORK/mount/db"
    as_postgres initdb --pgdata="$WORK/mount/db" --data-checksums --auth=trust >/dev/null
    cat >>"$WORK/mount/db/postgresql.conf" <<END
listen_addresses = ''
unix_socket_directories = '$WORK/postgres'
shared_buffers = 64MB
checkpoint_timeout = 30s
END
    # initdb has made its files durable; these lines would be lost in the crash to come.
    sync --file-system "$WORK/mount/db/postgresql.conf"
    start_postgres
    as_postgres createdb --host="$WORK/postgres" bench
    as_postgres pgbench --host="$WORK/postgres" --initialize --quiet --scale=5 bench 2>/dev/null
}

# The transactions that pgbench was told are committed, over all rounds: one line each in its logs.
committed() {
    cat "$WORK"/postgres/round-* 2>/dev/null | wc -l
}

check_database() {
    local sums history
    sums=$(sql 'SELECT (SELECT sum(delta) FROM pgbench_history) || $$ $$ || (SELECT sum(abalance) FROM pgbench_accounts)
        || $$ $$ || (SELECT sum(bbalance) FROM pgbench_branches) || $$ $$ || (SELECT sum(tbalance) FROM pgbench_tellers)')
    [[ $(tr ' ' '\n' <<<"$sums" | sort -u | wc -l) -eq 1 ]] || fail "the books do not balance: $sums"
    history=$(sql 'SELECT count(*) FROM pgbench_history')
    ((history >= $(committed))) || fail "$(committed) transactions were committed, $history are there"
    as_postgres env PGOPTIONS='-c client_min_messages=warning' pg_amcheck --host="$WORK/postgres" --all --install-missing --heapallindexed \
        --rootdescend || fail 'pg_amcheck found damage'
    echo "$(committed) transactions known to be committed, $history found; pg_amcheck clean"
}

start_server
create_volume database 3GiB
chmod 755 "$WORK"
mkdir "$WORK/postgres" && chown postgres "$WORK/postgres"
say 'a fresh database'
mount_volume mkfs.ext4 -q
create_database

acknowledged=0
ROUNDS=${ROUNDS:-3}
for ((round = 1; round <= ROUNDS; round++)); do
    if ((round == ROUNDS)) && [[ $SERVER == weft ]]; then
        weft volume write-cache database on >/dev/null
        say "round $round: the same with a write cache"
    else
        say "round $round: kill -9 of the server under pgbench"
    fi
    as_postgres pgbench --host="$WORK/postgres" --client=8 --time="$LOAD_S" --no-vacuum --log \
        --log-prefix="$WORK/postgres/round-$round" bench >"$WORK/pgbench" 2>&1 &
    PGBENCH_PID=$!
    sleep "$KILL_AFTER_S"
    kill_server
    # It fails, for its database does; what it was told before that is in its log.
    wait "$PGBENCH_PID" || true
    PGBENCH_PID=
    before=$acknowledged
    acknowledged=$(committed)
    ((acknowledged > before)) || fail "pgbench was told of no commit: $(cat "$WORK/pgbench")"
    tear_down
    start_server
    mount_volume
    start_postgres
    grep -q 'database system was not properly shut down' "$WORK/postgres/log" || fail 'PostgreSQL did not recover'
    check_database
done

say 'a clean stop, and once more'
as_postgres pg_ctl --pgdata="$WORK/mount/db" --wait --mode=fast stop >/dev/null
RUNNING=
tear_down
restart_server
mount_volume
start_postgres
check_database
tear_down
stop_server
