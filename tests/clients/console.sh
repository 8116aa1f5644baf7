#!/usr/bin/env bash
# The console on a live node under load, in a terminal of tmux: every screen shows what is there, a node that is stopped
# is marked stale and comes back, and the terminal is given back on q, on SIGTERM and when the node was the console's own.
# What the node recorded is replayed, to its end. Then the same figures without a terminal: text, JSON and CSV.
# With PICTURES=docs/console the screens are written there, for docs/console.md.
source "$(dirname "$0")/lib.sh"
requires tmux fio jq nbdinfo openssl
requires_weft

# Large enough for every column that the test looks for.
COLUMNS_SHOWN=120
LINES_SHOWN=30
SEEN_LIMIT_S=30
export LC_ALL=C.UTF-8

LOAD_PID=

# tmux with a server of this test's own.
terminal() {
    tmux -S "$WORK/tmux" -f /dev/null "$@"
}

screen() {
    terminal capture-pane -p -t console
}

keys() {
    terminal send-keys -t console "$@"
}

before_cleanup() {
    [[ -z $SERVER_PID ]] || kill -CONT "$SERVER_PID" 2>/dev/null
    [[ -z $LOAD_PID ]] || kill -KILL "$LOAD_PID" 2>/dev/null
    terminal kill-server 2>/dev/null
}

# Waits until the screen has a line that an extended regular expression matches.
sees() {
    local deadline=$((SECONDS + SEEN_LIMIT_S))
    until screen | grep -qE -- "$1"; do
        if ((SECONDS >= deadline)); then
            screen >&2
            fail "the screen above has no '$1' after $SEEN_LIMIT_S s"
        fi
        sleep 0.2
    done
}

# Keeps the screen as picture $1, if pictures are wanted, once it has had time to fill.
picture() {
    [[ -n ${PICTURES:-} ]] || return 0
    sleep 3
    screen | sed "s|$WORK/||g" >"$PICTURES/$1.txt"
}

# Fails if the screen has such a line.
sees_no() {
    if screen | grep -qE -- "$1"; then
        screen >&2
        fail "the screen above has '$1'"
    fi
}

# Whether the terminal is on its first screen, with its cursor and in the mode it had: 0 or 1 each.
given_back() {
    [[ $(terminal display-message -p -t console '#{alternate_on} #{cursor_flag}') == '0 1' ]] || return 1
    [[ $(stty -a -F "$(terminal display-message -p -t console '#{pane_tty}')") == *' icanon'*' echo '* ]]
}

expect_given_back() {
    local deadline=$((SECONDS + SEEN_LIMIT_S))
    until given_back; do
        ((SECONDS < deadline)) || fail 'the terminal is not as it was'
        sleep 0.2
    done
}

start_load() {
    fio --name=load --ioengine=nbd --uri="$(uri unix)" --size=64M --rw=randrw --bs=4k --iodepth=4 --rate_iops=2000 \
        --time_based --runtime=600 --output="$WORK/fio" &
    LOAD_PID=$!
}

stop_load() {
    kill -KILL "$LOAD_PID"
    wait "$LOAD_PID" 2>/dev/null || true
    LOAD_PID=
}

# The API over TCP too, for a console from afar.
make_remote_api() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1 \
        -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE \
        -keyout "$WORK/api.key" -out "$WORK/api.pem" 2>/dev/null
    (umask 077 && openssl rand -hex 32 >"$WORK/token")
    cat >"$WORK/weft.toml" <<END
[api]
listen = ["127.0.0.1:0"]
certificate = "$WORK/api.pem"
key = "$WORK/api.key"
token_file = "$WORK/token"
END
    SERVER_ARGUMENTS=(--config "$WORK/weft.toml")
}

prepare
make_remote_api
start_server
create_volume quiet 1GiB
start_load
terminal new-session -d -s console -x "$COLUMNS_SHOWN" -y "$LINES_SHOWN" 'env PS1=prompt: sh'

say 'every screen shows the node'
keys "$WEFT top --data $DATA" Enter
sees '1 Pulse 2 Volumes 3 Latency 4 Devices 5 Hosts 6 Events'
sees 'healthy, can lose 2 more'
sees 'IOPS +[1-9]'
sees 'p99 +[0-9.]+ (us|ms)'
picture pulse
keys 2
sees '^.vol0 +[1-9]'
sees '^.quiet +0 +0'
picture volumes
keys Enter
sees 'Where the time of a read goes'
keys w
sees 'journal +[0-9.]+ %'
picture volume
keys Escape /qui Enter
sees "Volumes \(1\) with 'qui'"
sees_no '^.vol0'
keys Escape 3
sees 'Latency of writes, all volumes'
sees '█'
picture latency
keys 4
sees '^. +5 in service +[0-9]'
picture devices
keys 5
sees 'nbd +unix +vol0'
picture hosts
keys 6
sees 'node-started|serving pod'
picture events
keys '?'
sees 'any key closes this'
picture help
keys Escape 4 y
sees "weft device list --api $DATA/weft.sock"
keys Escape

say 'a picture that is frozen stays, and a stopped node is marked stale'
keys 1 Space
sees 'frozen -[1-9]'
keys Space
sees 'healthy +live'
kill -STOP "$SERVER_PID"
sees 'stale [3-9] s'
sees 'healthy, can lose 2 more'
keys 2
sees '^.vol0'
kill -CONT "$SERVER_PID"
sees 'healthy +live'

say 'a node that was killed is found again once it runs'
stop_load
kill_server
sees 'stale [3-9] s'
sees 'no node answers at'
sees '^.vol0'
start_server
start_load
sees 'healthy +live'
sees '^.vol0 +[1-9]'

say 'a smaller terminal says so, and a larger one is drawn again'
terminal resize-window -t console -x 60 -y 20
sees 'needs 80 columns'
terminal resize-window -t console -x 80 -y 24
sees '^.vol0'

say 'the terminal is given back on q and on signals'
keys q
expect_given_back
keys "$WEFT top --ascii --data $DATA" Enter
sees '^\+ Pod -+'
pkill -TERM -P "$(terminal display-message -p -t console '#{pane_pid}')" weft
expect_given_back
sees 'a signal ended the console'
keys clear Enter "$WEFT top --data $DATA" Enter
sees 'healthy +live'
pkill -HUP -P "$(terminal display-message -p -t console '#{pane_pid}')" weft
expect_given_back
sees 'a signal ended the console'

say 'from afar, over TLS, the same console'
address=$(weft status -o json | jq -r '.listeners[] | select(.protocol == "api" and .transport == "tcp").address')
keys clear Enter "$WEFT top --api https://$address --token-file $WORK/token --ca $WORK/api.pem" Enter
sees 'healthy +live'
keys 2
sees '^.vol0 +[1-9]'
kill -STOP "$SERVER_PID"
sees 'stale [3-9] s'
kill -CONT "$SERVER_PID"
sees 'healthy +live'
keys q
expect_given_back

say 'what was recorded is played to its end'
recorded_s() {
    weft top --replay -t 14s --mode csv | grep -c ',pod,' || true
}
deadline=$((SECONDS + SEEN_LIMIT_S))
until (($(recorded_s) >= 12)); do
    ((SECONDS < deadline)) || fail 'not every second is recorded'
    sleep 1
done
keys clear Enter "$WEFT top --replay -t '10s ago' --data $DATA" Enter
sees 'REPLAY .* UTC +1[0-9] s ago +playing'
sees 'healthy +replay'
sees 'IOPS +[1-9]'
keys '['
sees 'REPLAY .* s ago +frozen'
keys 5
sees 'Connections are not recorded'
keys 1 '{'
sees 'IOPS +[1-9]'
keys ':speed 30' Enter Space
sees 'REPLAY .* end of the recording'
sees_no 'healthy +live'
keys q
expect_given_back

say 'the same figures without a terminal'
weft top | head -n 4 >"$WORK/text"
grep -qE '^vol0 +[1-9]' "$WORK/text" || { cat "$WORK/text" && fail 'no figures of vol0'; }
weft top --once --mode json | jq -e '.pod.operations.write.iops > 0 and (.volumes | length) == 2' >/dev/null ||
    fail 'no writes in JSON'
weft top --once --mode csv >"$WORK/csv"
[[ $(wc -l <"$WORK/csv") -eq 4 ]] || { cat "$WORK/csv" && fail 'not a header, a pod and two volumes'; }
awk -F, 'NR == 1 { cells = NF } NF != cells { exit 1 }' "$WORK/csv" || fail 'rows are not as long as the header'

weft top --replay -t '10s ago' --mode csv >"$WORK/csv"
[[ $(grep -c ',pod,' "$WORK/csv") -ge 5 ]] || { cat "$WORK/csv" && fail 'not a row for each recorded second'; }
awk -F, 'NR == 1 { cells = NF } NF != cells { exit 1 }' "$WORK/csv" || fail 'rows are not as long as the header'
awk -F, '$3 == "pod" && $6 > 0 { found = 1 } END { exit !found }' "$WORK/csv" || fail 'no recorded writes'
weft top --replay -t '10s ago' --until '2s ago' --interval 3 | grep -qE '^vol0 +[1-9]' || fail 'no recorded text'
refuses "$WEFT" top --data "$DATA" -t 10s

say 'a node with a console logs to a file, goes on without it, and stops with it'
stop_load
stop_server
refuses "$WEFT" --data "$DATA" --tui </dev/null
terminal resize-window -t console -x "$COLUMNS_SHOWN" -y "$LINES_SHOWN"
own="$WEFT --data $DATA --nbd 127.0.0.1:$PORT --nvme-tcp 127.0.0.1:0 --tui"
keys "$own" Enter
sees '1 Pulse'
sees 'healthy +live'
keys q
sees 'keep it running'
keys k
sees 'The node goes on'
expect_given_back
server_answers || fail 'the node does not go on'
keys C-c
sees 'prompt:$'
grep -q 'stopped' "$DATA/weft.log" || fail 'the log is not in weft.log'
keys clear Enter "$own" Enter
sees 'healthy +live'
keys q
sees 'stop the node'
keys s
expect_given_back
sees 'prompt:$'
! server_answers || fail 'the node was to stop'
