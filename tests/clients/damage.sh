#!/usr/bin/env bash
# Any two of the six devices rot, or are lost, stopped or under load: every byte reads back right, and status says so.
#
# SCENARIOS (see damage.py) and SEED may be set.
source "$(dirname "$0")/lib.sh"
requires python:nbd
requires_weft
seed=${SEED:-$RANDOM}
read -ra scenarios <<<"${SCENARIOS:-rot rot-after-kill scrub lose-stopped:remove lose-stopped:truncate lose-stopped:garbage \
    lose-running:remove lose-running:truncate lose-running:zero lose-running:garbage}"
prepare
wrong=0
for scenario in "${scenarios[@]}"; do
    say "$scenario (SCENARIOS=$scenario SEED=$seed tests/clients/damage.sh)"
    rm -rf "$DATA" && mkdir -p "$DATA" && : >"$LOG"
    if ! /usr/bin/python3 "$HERE/damage.py" "$DATA" "$PORT" "$scenario" "$seed"; then
        tail -n 20 "$LOG" >&2
        wrong=$((wrong + 1))
    fi
    seed=$((seed + 1))
done
[[ $wrong -eq 0 ]] || fail "$wrong of ${#scenarios[@]} scenarios"
