#!/bin/sh
# The kernel's NVMe/TCP initiator in the lab's guest: discover, connect, identify, xfs, ext4, discard, digests, namespaces
# that come, grow and go while connected, two paths one of which is cut and falls silent, the same volume over NBD, a
# server that is killed and comes back, two hosts that reserve the volume from each other.
#
# Runs in the guest, next to attach, detach and config.json. Variables: HOST, PORT and OTHER_PORT (NVMe), NBD_PORT, NQN,
# VOLUME (the volume of 1 GiB with blocks of 512 bytes; everything on it is lost), UUID (its own), HOSTNQN and HOSTID (of
# this host). The host's side acts on lines that begin with ASK.
set -eu

step() {
    STEP=$*
    echo "== $STEP (at $(cut -d' ' -f1 /proc/uptime) s)"
}

fail() {
    echo "FAIL: $STEP: $*"
    dmesg | grep -iE 'nvme|nbd|ext4|xfs|i/o error' | tail -n 30
    exit 1
}

expect() {
    "$@" || fail "failed: $*"
}

# Waits up to 30 s for a command to succeed.
eventually() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || fail "never came true: $*"
        sleep 0.1
    done
}

connect() {
    connect_by "$PORT" "$@"
}

connect_by() {
    address_port=$1
    shift
    nvme connect -t tcp -a "$HOST" -s "$address_port" -n "$NQN" --hostnqn "$HOSTNQN" --hostid "$HOSTID" "$@"
}

disconnect() {
    nvme disconnect -n "$NQN" >/dev/null
}

# Prints the block device of the namespace with UUID $1; not the hidden one of a path to it.
device_of() {
    for found in /sys/block/nvme*n*; do
        case $found in
        *nvme*c*n*) continue ;;
        esac
        if [ -e "$found/uuid" ] && [ "$(cat "$found/uuid")" = "$1" ]; then
            echo "/dev/${found##*/}"
            return 0
        fi
    done
    return 1
}

attached() {
    device_of "$1" >/dev/null
}

gone() {
    ! device_of "$1" >/dev/null
}

has_sectors() {
    [ "$(cat "/sys/block/${1#/dev/}/size")" = "$2" ]
}

live() {
    [ "$(cat /sys/class/nvme/nvme*/state)" = live ]
}

drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

STEP='start'
trap '[ $? -eq 0 ] || dmesg | grep -iE "nvme|ext4|xfs|error" | tail -n 30' EXIT

step 'discover'
nvme discover -t tcp -a "$HOST" -s "$PORT" --hostnqn "$HOSTNQN" --hostid "$HOSTID" >/tmp/discovery ||
    fail 'discover'
expect grep -q "subnqn: *$NQN" /tmp/discovery
expect grep -q "trsvcid: *$PORT" /tmp/discovery

step 'connect, list, identify'
expect connect
eventually attached "$UUID"
device=$(device_of "$UUID")
set -- /sys/class/nvme/nvme*
control=/dev/${1##*/}
expect nvme list
expect nvme id-ctrl "$control" >/tmp/id-ctrl
expect grep -q "^subnqn *: *$NQN" /tmp/id-ctrl
grep -E '^(mn|mdts|cntlid|ver|nn|oncs|vwc|awupf|ioccsz) ' /tmp/id-ctrl
expect nvme id-ns "$device" >/tmp/id-ns
grep -E '^(nsze|nsfeat|nawupf|npwg|dlfeat|nguid|lbaf)' /tmp/id-ns
expect nvme ns-descs "$device" >/tmp/descriptors
expect grep -q "$UUID" /tmp/descriptors
for log in smart-log error-log fw-log effects-log ana-log changed-ns-list-log; do
    expect nvme "$log" "$control" >/tmp/log
done
for feature in 7 0xb 0xf; do
    expect nvme get-feature "$control" -f "$feature" >/tmp/feature
done
expect nvme get-property "$control" -o 0x1c >/tmp/property
name=${device#/dev/}
queue=/sys/block/$name/queue
echo "$device: $(cat "/sys/block/$name/size") sectors, logical $(cat "$queue/logical_block_size")," \
    "physical $(cat "$queue/physical_block_size"), at most $(cat "$queue/max_hw_sectors_kb") KiB," \
    "discard $(cat "$queue/discard_max_bytes"), zeroes $(cat "$queue/write_zeroes_max_bytes")"
[ "$(cat "$queue/logical_block_size")" = 512 ] || fail 'not 512 bytes'
[ "$(cat "$queue/physical_block_size")" = 4096 ] || fail 'not 4096 bytes'
[ "$(cat "$queue/max_hw_sectors_kb")" = 1024 ] || fail 'MDTS is not 1 MiB'
[ "$(cat "$queue/discard_max_bytes")" -gt 0 ] || fail 'no discard'
[ "$(cat "$queue/write_zeroes_max_bytes")" -gt 0 ] || fail 'no write zeroes'
[ "$(cat "$queue/write_cache")" = 'write through' ] || fail 'a volatile cache'

step 'xfs, write, fsync, compare'
expect blkdiscard "$device"
expect mkfs.xfs -q -f -K -d size=400m "$device"
mkdir -p /mnt/a
expect mount -t xfs "$device" /mnt/a
expect dd if=/dev/urandom of=/mnt/a/random bs=1M count=48 conv=fsync status=none
i=0
while [ "$i" -lt 30 ]; do
    expect dd if=/dev/urandom of=/mnt/a/small-$i bs=512 count=9 conv=fsync status=none
    i=$((i + 1))
done
(cd /mnt/a && find . -type f | sort | xargs sha256sum) >/tmp/sums
expect umount /mnt/a
expect disconnect

for digests in '' '--hdr-digest' '--data-digest' '--hdr-digest --data-digest'; do
    step "compare over a new connection ${digests:-without digests}"
    # shellcheck disable=SC2086 # options are words
    expect connect $digests --nr-io-queues 2
    eventually attached "$UUID"
    device=$(device_of "$UUID")
    expect mount -t xfs "$device" /mnt/a
    (cd /mnt/a && expect sha256sum -c -s /tmp/sums)
    expect dd if=/mnt/a/random of=/mnt/a/copy bs=1M conv=fsync status=none
    drop_caches
    expect cmp /mnt/a/random /mnt/a/copy
    rm /mnt/a/copy
    expect umount /mnt/a
    [ "$digests" != '--hdr-digest --data-digest' ] || break
    expect disconnect
done

step 'check the file system, fstrim, compare'
expect xfs_repair -n "$device" >/tmp/xfs 2>&1
expect mount -t xfs "$device" /mnt/a
rm /mnt/a/small-1*
expect fstrim -v /mnt/a
drop_caches
grep -v 'small-1' /tmp/sums >/tmp/sums-left
(cd /mnt/a && expect sha256sum -c -s /tmp/sums-left)
expect umount /mnt/a

step 'reads and writes of odd sizes with O_DIRECT, zeroes, compare'
expect dd if=/dev/urandom of=/tmp/sample bs=512 count=4099 status=none
expect dd if=/tmp/sample of="$device" bs=512 count=4099 seek=1000001 oflag=direct status=none
dd if="$device" bs=512 skip=1000001 count=4099 iflag=direct status=none | expect cmp - /tmp/sample
for size in 3584 64k 1M; do
    expect dd if=/tmp/sample of="$device" bs=$size count=1 seek=300 oflag=direct status=none
    dd if=/tmp/sample bs=$size count=1 status=none >/tmp/part
    dd if="$device" bs=$size count=1 skip=300 iflag=direct status=none | expect cmp - /tmp/part
done
bytes=$(stat -c %s /tmp/part)
expect nvme compare "$device" --start-block=614400 --block-count=7 --data-size=4096 --data=/tmp/part
! nvme compare "$device" --start-block=614401 --block-count=7 --data-size=4096 --data=/tmp/part \
    >/tmp/compare 2>&1 || fail 'other data compares equal'
expect nvme write-zeroes "$device" --start-block=614400 --block-count=7
! dd if="$device" bs=4096 skip=76800 count=1 iflag=direct status=none | tr -d '\0' | grep -q . ||
    fail 'not zero'
expect nvme verify "$device" --start-block=0 --block-count=65535
expect nvme dsm "$device" --ad --slbs=614408 --blocks=8
expect nvme flush "$device"
[ "$bytes" -gt 0 ]

step 'the same bytes over NBD, both ways'
nbd=$(./attach "$VOLUME" --host "$HOST" --port "$NBD_PORT" --block-size 512 --connections 1) ||
    fail 'attach'
expect dd if=/tmp/sample of="$device" bs=64k count=16 seek=900 oflag=direct status=none
dd if="$nbd" bs=64k skip=900 count=16 iflag=direct status=none >/tmp/over-nbd
dd if=/tmp/sample bs=64k count=16 status=none | expect cmp - /tmp/over-nbd
expect dd if=/tmp/over-nbd of="$nbd" bs=64k count=16 seek=1200 oflag=direct status=none
dd if="$device" bs=64k skip=1200 count=16 iflag=direct status=none | expect cmp - /tmp/over-nbd
expect ./detach "$VOLUME"

step 'the volume grows while it is mounted'
expect mkfs.ext4 -q -F "$device" 200M
expect mount -t ext4 "$device" /mnt/a
echo 'ASK GROW'
eventually has_sectors "$device" 4194304
expect dd if=/dev/urandom of=/mnt/a/after bs=1M count=8 conv=fsync status=none
expect umount /mnt/a
expect e2fsck -fn "$device" >/tmp/e2fsck 2>&1

step 'a volume comes and goes'
count() {
    set -- /sys/block/nvme*n*
    echo $#
}
before=$(count)
echo 'ASK CREATE'
more() {
    [ "$(count)" -gt "$before" ]
}
fewer() {
    [ "$(count)" = "$before" ]
}
eventually more
echo 'ASK DELETE'
eventually fewer

step 'the volume is for another host, and then for all'
echo 'ASK MASK'
eventually gone "$UUID"
echo 'ASK UNMASK'
eventually attached "$UUID"
device=$(device_of "$UUID")

step 'two paths, one cut under I/O and mended'
expect connect_by "$OTHER_PORT" --reconnect-delay 1 --keep-alive-tmo 3
live_paths() {
    [ "$(cat /sys/class/nvme/nvme*/state | grep -c '^live$')" = "$1" ]
}
eventually live_paths 2
# The two volumes, each with two paths.
has_blocks() {
    [ "$(count)" = "$1" ]
}
eventually has_blocks 6
dd if=/tmp/sample of="$device" bs=64k count=16 seek=3000 oflag=direct status=none
dd if=/dev/zero of="$device" bs=64k count=3000 seek=4000 oflag=direct status=none &
writer=$!
sleep 0.5
echo 'ASK CUT'
expect wait "$writer"
eventually live_paths 1
dd if="$device" bs=64k skip=3000 count=16 iflag=direct status=none >/tmp/over-one
dd if=/tmp/sample bs=64k count=16 status=none | expect cmp - /tmp/over-one
echo 'ASK MEND'
eventually live_paths 2

step 'a path falls silent under I/O: both ends miss their keep-alives, and find each other again'
dd if=/dev/zero of="$device" bs=64k count=2000 seek=4000 oflag=direct status=none &
writer=$!
sleep 0.5
echo 'ASK SILENCE'
expect wait "$writer"
eventually live_paths 1
dd if="$device" bs=64k skip=3000 count=16 iflag=direct status=none >/tmp/over-one
dd if=/tmp/sample bs=64k count=16 status=none | expect cmp - /tmp/over-one
echo 'ASK SPEECH'
eventually live_paths 2
for path in /sys/class/nvme/nvme*; do
    if [ "$path" != "/sys/class/nvme/${control#/dev/}" ]; then
        expect nvme disconnect -d "${path##*/}" >/dev/null
    fi
done
eventually live_paths 1

step 'controller reset under I/O'
dd if=/dev/zero of="$device" bs=64k count=1500 seek=2000 oflag=direct status=none &
writer=$!
sleep 0.5
expect nvme reset "$control"
expect wait "$writer"
eventually live

step 'the server is killed under I/O and comes back'
expect dd if=/tmp/sample of="$device" bs=64k count=16 seek=900 oflag=direct status=none
dd if=/dev/zero of="$device" bs=64k count=2000 seek=4000 oflag=direct status=none &
writer=$!
sleep 0.5
echo 'ASK KILL AND RESTART'
# The writer waits as long as it takes: nothing may fail.
expect wait "$writer"
eventually live
dd if="$device" bs=64k skip=900 count=16 iflag=direct status=none >/tmp/after-kill
dd if=/tmp/sample bs=64k count=16 status=none | expect cmp - /tmp/after-kill

step 'disconnect, connect by what weft export show prints'
expect disconnect
expect gone "$UUID"
expect nvme connect-all --config="$PWD/config.json" --hostnqn "$HOSTNQN" --hostid "$HOSTID" >/dev/null
eventually attached "$UUID"

step 'disconnect, connect-all by the discovery log'
expect disconnect
expect gone "$UUID"
expect nvme connect-all -t tcp -a "$HOST" -s "$PORT" --hostnqn "$HOSTNQN" --hostid "$HOSTID"
eventually attached "$UUID"
expect disconnect

step 'two hosts: one reserves the volume'
# Without multipathing each host has a block device of its own.
expect modprobe -r nvme-tcp
! grep -q '^nvme_core ' /proc/modules || expect rmmod nvme-fabrics nvme-core
expect modprobe nvme-core multipath=N
expect modprobe nvme-tcp
OTHERID=6a3f6f0c-1d2e-4c57-9f0a-0e5a5d0e2f6b
# Prints the controller of the host with identifier $1.
control_of() {
    for found in /sys/class/nvme/nvme*; do
        if [ "$(cat "$found/hostid" 2>/dev/null)" = "$1" ]; then
            echo "$found"
            return 0
        fi
    done
    return 1
}
# Prints that host's block device of the volume.
disk_of() {
    control=$(control_of "$1") || return 1
    for found in "$control"/nvme*n*; do
        if [ "$(cat "$found/uuid" 2>/dev/null)" = "$UUID" ]; then
            echo "/dev/${found##*/}"
            return 0
        fi
    done
    return 1
}
both_live() {
    [ "$(cat "$(control_of "$HOSTID")/state")" = live ] && [ "$(cat "$(control_of $OTHERID)/state")" = live ]
}
writes() {
    dd if=/tmp/sample of="$1" bs=4096 count=8 seek=100 oflag=direct status=none 2>/dev/null
}
reads() {
    dd if="$1" of=/dev/null bs=4096 count=8 skip=100 iflag=direct status=none 2>/dev/null
}
refused() {
    ! "$@" || fail "not refused: $*"
}
# Says whether the report as the other host gets it has all these lines.
reports() {
    nvme resv-report "$theirs" --eds >/tmp/report
    for line in "$@"; do
        grep -qE "^ *$line$" /tmp/report || { cat /tmp/report && fail "no line '$line' in the report"; }
    done
}
# As nvme-cli does it, which takes a second host of one machine for a connection that is there already.
connect_as() {
    echo "transport=tcp,traddr=$HOST,trsvcid=$PORT,nqn=$NQN,reconnect_delay=1,hostid=$1,hostnqn=nqn.2014-08.org.nvmexpress:uuid:$1" \
        >/dev/nvme-fabrics
}
expect connect_as "$HOSTID"
expect connect_as $OTHERID
eventually disk_of "$HOSTID"
eventually disk_of $OTHERID
ours=$(disk_of "$HOSTID")
theirs=$(disk_of $OTHERID)
echo "one host has $ours, the other $theirs"
nvme id-ns "$ours" | grep '^rescap' >/tmp/rescap
expect grep -q 0xff /tmp/rescap
expect nvme resv-register "$ours" --nrkey=0xa --rrega=0 --cptpl=3 >/dev/null
expect nvme resv-acquire "$ours" --crkey=0xa --rtype=1 --racqa=0 >/dev/null
expect writes "$ours"
refused writes "$theirs"
expect reads "$theirs"
refused nvme resv-acquire "$theirs" --crkey=0xb --rtype=1 --racqa=0 >/dev/null 2>&1
reports 'gen *: 1' 'rtype *: 1' 'regctl *: 1' 'ptpls *: 1' 'rkey *: a' 'rcsts *: 1'
# NBD clients are hosts that have not registered.
nbd=$(./attach "$VOLUME" --host "$HOST" --port "$NBD_PORT" --block-size 512 --connections 1) ||
    fail 'attach'
refused writes "$nbd"
expect reads "$nbd"
expect ./detach "$VOLUME"

step 'the server is killed: the reservation stays'
echo 'ASK KILL WHILE RESERVED'
eventually grep -q connecting /sys/class/nvme/nvme*/state
eventually both_live
reports 'gen *: 1' 'rtype *: 1' 'regctl *: 1' 'ptpls *: 1' 'rkey *: a' 'rcsts *: 1'
expect writes "$ours"
refused writes "$theirs"

step 'the other host preempts it'
expect nvme resv-register "$theirs" --nrkey=0xb --rrega=0 --cptpl=0 >/dev/null
expect nvme resv-acquire "$theirs" --crkey=0xb --prkey=0xa --rtype=2 --racqa=2 >/dev/null
expect writes "$theirs"
refused writes "$ours"
refused reads "$ours"
reports 'gen *: 3' 'rtype *: 2' 'regctl *: 1' 'rkey *: b'
control=$(control_of "$HOSTID")
nvme get-log "/dev/${control##*/}" --log-id=0x80 --log-len=64 --raw-binary >/tmp/notice || fail 'get-log'
[ "$(head -c 9 /tmp/notice | tail -c 1 | od -An -tu1 | tr -d ' ')" = 1 ] || fail 'no notice of the preemption'
expect nvme resv-release "$theirs" --crkey=0xb --rtype=2 --rrela=0 >/dev/null
expect writes "$ours"
expect nvme resv-release "$theirs" --crkey=0xb --rrela=1 >/dev/null
reports 'gen *: 4' 'rtype *: 0' 'regctl *: 0'

step 'an administrator takes it off both'
expect nvme resv-register "$ours" --nrkey=0xa --rrega=0 --cptpl=3 >/dev/null
expect nvme resv-acquire "$ours" --crkey=0xa --rtype=1 --racqa=0 >/dev/null
refused writes "$theirs"
echo 'ASK RELEASE'
eventually writes "$theirs"
reports 'gen *: 6' 'rtype *: 0' 'regctl *: 0'
expect disconnect

if dmesg | grep -iE 'nvme.*(bad|invalid|unexpected|duplicate|inconsistent|digest|truncated|failed to (identify|get))' |
    grep -viE 'queue_size|resetting'; then
    fail 'the kernel complained'
fi
echo "== done (at $(cut -d' ' -f1 /proc/uptime) s)"
