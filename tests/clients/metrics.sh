#!/usr/bin/env bash
# Prometheus scrapes a live node: the metrics are well formed, the alert rules are right, and every expression of the
# dashboard finds data.
source "$(dirname "$0")/lib.sh"
requires promtool prometheus curl jq fio
requires_weft
prepare
PAGES=$ROOT/docs/prometheus
METRICS_PORT=$(free_port)
PROMETHEUS=http://127.0.0.1:$(free_port)
PROMETHEUS_PID=
SCRAPE_LIMIT_S=60

before_cleanup() {
    [[ -z $PROMETHEUS_PID ]] || { kill "$PROMETHEUS_PID" && wait "$PROMETHEUS_PID"; } 2>/dev/null
}

say 'the alert rules, by themselves'
promtool check rules "$PAGES/alerts.yml"
promtool test rules "$PAGES/alerts_test.yml"
tested=$(grep -o 'alertname: *[A-Za-z]*' "$PAGES/alerts_test.yml" | awk '{ print $2 }' | sort -u)
[[ $tested == "$(awk '/- alert:/ { print $3 }' "$PAGES/alerts.yml" | sort -u)" ]] || fail "alerts without a test, or tests without an alert"

say 'a node under load'
printf '[metrics]\nlisten = ["127.0.0.1:%s"]\n' "$METRICS_PORT" >"$WORK/weft.toml"
SERVER_ARGUMENTS=(--config "$WORK/weft.toml")
start_server
fio --name=load --ioengine=nbd --uri="$(uri tcp)" --rw=randrw --bs=4k --iodepth=8 --size=64m --time_based --runtime=300 \
    >"$WORK/fio.log" 2>&1 &
LOAD_PID=$!
# Sums of a killed load are nobody's business.
trap 'kill $LOAD_PID 2>/dev/null || true; cleanup' EXIT
sleep 2

say 'the format'
curl -fsS "http://127.0.0.1:$METRICS_PORT/metrics" >"$WORK/metrics"
promtool check metrics <"$WORK/metrics" || fail 'promtool does not like the metrics'
curl -fsS --unix-socket "$DATA/weft.sock" http://weft/metrics >"$WORK/metrics"
grep -q '^weft_request_duration_seconds_bucket' "$WORK/metrics" || fail 'no metrics on the API socket'

say 'a scraping Prometheus'
cat >"$WORK/prometheus.yml" <<END
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: ["$PAGES/alerts.yml"]
scrape_configs:
  - job_name: weft
    static_configs: [{targets: ["127.0.0.1:$METRICS_PORT"]}]
END
promtool check config "$WORK/prometheus.yml" >/dev/null
prometheus --config.file="$WORK/prometheus.yml" --storage.tsdb.path="$WORK/tsdb" \
    --web.listen-address="${PROMETHEUS#http://}" >"$WORK/prometheus.log" 2>&1 &
PROMETHEUS_PID=$!

# The number of results of an expression.
found() {
    curl -fsS --data-urlencode "query=$1" "$PROMETHEUS/api/v1/query" | jq '.data.result | length'
}

deadline=$((SECONDS + SCRAPE_LIMIT_S))
until [[ $(found 'rate(weft_request_duration_seconds_count[5s]) > 0' 2>/dev/null) -ge 2 ]]; do
    ((SECONDS < deadline)) || { tail -n 20 "$WORK/prometheus.log" >&2 && fail 'Prometheus sees no requests'; }
    sleep 0.5
done

say 'the dashboard'
pod=$(status .pod.uuid)
count=0
while IFS= read -r expression; do
    expression=${expression//\$pod/$pod}
    expression=${expression//\$volume/.*}
    expression=${expression//\$__rate_interval/5s}
    # Nothing has failed and nothing was refused: there the metric itself must be known.
    case $expression in
    *errors*) expression=$(grep -o 'weft_[a-z_]*' <<<"$expression" | head -n 1) ;;
    *cache_misses*) expression=${expression%%/*} ;;
    esac
    [[ $(found "$expression") -ge 1 ]] || fail "no data for: $expression"
    count=$((count + 1))
done < <(jq -r '.panels[].targets[].expr' "$PAGES/dashboard.json")
((count >= 20)) || fail "only $count expressions in the dashboard"
echo "$count expressions"

say 'an alert fires'
[[ $(found 'ALERTS{alertstate="firing"}') -eq 0 ]] || fail "alerts on a healthy node: $(curl -fsS "$PROMETHEUS/api/v1/alerts")"
rm "$DATA/devices/dev-0.img" "$DATA/devices/dev-1.img"
deadline=$((SECONDS + SCRAPE_LIMIT_S))
until [[ $(found 'ALERTS{alertname="WeftPodCannotLoseADevice",alertstate="firing"}') -ge 1 ]]; do
    ((SECONDS < deadline)) || fail 'two lost devices raise no alert'
    sleep 0.5
done
kill "$LOAD_PID"
wait "$LOAD_PID" 2>/dev/null || true
stop_server
