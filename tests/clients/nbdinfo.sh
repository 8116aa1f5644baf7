#!/usr/bin/env bash
# nbdinfo: what the server says of itself and of a volume, over both transports.
source "$(dirname "$0")/lib.sh"
requires nbdinfo nbdsh jq
start_server

for transport in tcp unix; do
    say "features over $transport"
    nbdinfo --json "$(uri $transport)" >"$WORK/info"
    jq -e '.protocol == "newstyle-fixed" and (.exports | length) == 1' "$WORK/info" >/dev/null || fail "$(cat "$WORK/info")"
    for feature in can_flush can_fua can_trim can_zero can_multi_conn; do
        jq -e ".exports[0].$feature" "$WORK/info" >/dev/null || fail "$feature is not offered"
    done
    jq -e '.structured and (.exports[0]["export-size"] == 8589934592) and (.exports[0].is_read_only | not)' \
        "$WORK/info" >/dev/null || fail "$(cat "$WORK/info")"
    jq -e '.exports[0].contexts | index("base:allocation") != null' "$WORK/info" >/dev/null || fail 'no base:allocation'
done
if [[ $SERVER == weft ]]; then
    jq -e '.exports[0].block_size_minimum <= 512 and .exports[0].block_size_preferred == 4096' \
        "$WORK/info" >/dev/null || fail "block sizes: $(cat "$WORK/info")"
    jq -e '.exports[0] | .can_cache and .can_fast_zero and .can_df' "$WORK/info" >/dev/null || fail "$(cat "$WORK/info")"
fi

say 'list'
nbdinfo --list --json "$TCP" >"$WORK/list"
jq -e '[.exports[]["export-name"]] == ["vol0"]' "$WORK/list" >/dev/null || fail "$(cat "$WORK/list")"
create_volume second 1GiB
[[ $(nbdinfo --list --json "$TCP" | jq -r '[.exports[]["export-name"]] | sort | join(" ")') == 'second vol0' ]] ||
    fail 'a new volume is not listed'
[[ $(nbdinfo --size "$(uri unix second)") -eq 1073741824 ]] || fail 'a new volume is not served'
refuses nbdinfo --size "$(uri tcp no-such-volume)"

say 'map: holes, data, zeroes'
[[ $(nbdinfo --map --json "$(uri tcp)" | jq -c '[.[] | [.offset, .length, .type]]') == '[[0,8589934592,3]]' ]] ||
    fail "an empty volume's map: $(nbdinfo --map "$(uri tcp)")"
nbdsh -u "$(uri tcp)" -c 'h.pwrite(b"x" * 1048576, 1048576)' -c 'h.flush()'
nbdinfo --map --json "$(uri unix)" |
    jq -e 'any(.[]; .type == 0 and .offset <= 1048576 and .offset + .length >= 2097152)
        and (map(.length) | add) == 8589934592 and .[0].type == 3 and .[-1].type == 3' >/dev/null ||
    fail "the map after a write: $(nbdinfo --map "$(uri tcp)")"
nbdinfo --map --totals "$(uri tcp)"
stop_server
