#!/usr/bin/env bash
# Requests the restart of what runs an image, and follows the rollout to its end.
# It needs bash 4.4, curl 7.68, jq 1.6, and a job with the permission id-token: write.
#
# ROLLOUT_URL        address of web
# AUDIENCE           audience of the token (default: ROLLOUT_URL)
# IMAGE              the image with its tag, or without one if TAGS is given
# TAGS               tags, or references with them, separated by commas, spaces or lines
# WAIT               how long to follow, such as 300s or 5m (default); 0 ends when the request is accepted
# FAIL_ON_UNMATCHED  true (default) or false: whether it is an error that nothing is restarted
set -euo pipefail
LC_ALL=C # [:print:] is ASCII

attempts=12 pause=5 # to post the request, and the seconds between them
token_age=240       # seconds after which a token is replaced; it is valid for 300
poll=20             # seconds that web waits for a change; some proxies end requests after 30

# plain sets text to one harmless line. A runner takes :: at the beginning of a line
# and ##[ anywhere for a command, and decodes %0A.
plain() { text=${1:0:16384} text=${text//[^[:print:]]/ } text=${text//[#%]/ }; }
say() { plain "$1" && printf '%s\n' "$text"; }
annotate() { plain "$2" && printf '::%s::%s\n' "$1" "$text"; }
fail() { annotate error "$1" || true; exit 1; }

# output sets an output of the step. The value is one line.
output() { [ -z "${GITHUB_OUTPUT:-}" ] || printf '%s=%s\n' "$1" "$2" >>"$GITHUB_OUTPUT"; }

# check fails unless the whole value of an input matches a pattern.
check() { [[ $2 =~ ^($3)$ ]] || fail "$1 is \"$2\"; expected $4"; }

# call sends a request with a token and sets status and answer. The token reaches curl
# through a pipe, because every process can read its arguments.
call() {
  local reply
  reply=$(printf 'Authorization: Bearer %s\n' "$1" | curl -gsS --stderr - -H @- -w '\n%{http_code}' "${@:2}" |
    head -c 1000000 | tr -d '\0') || reply=${reply%$'\n'*}$'\n000'
  status=${reply##*$'\n'} answer=${reply%$'\n'*}
}

# explain sets problem to what is wrong with the answer, with the requestId that web gives.
explain() {
  problem=$(jq -r 'select(.error and .requestId) | "\(.error) (requestId \(.requestId))"' <<<"$answer" 2>/dev/null) || true
  problem="status $status, ${problem:-without requestId: ${answer:0:1000}}"
}

transient() { [[ $status =~ ^(000|429|5..)$ ]]; }

# mint gets a new token from GitHub. Otherwise it sets status and answer like call,
# without what GitHub said.
mint() {
  call "$ACTIONS_ID_TOKEN_REQUEST_TOKEN" --max-time 20 --get --data-urlencode "audience=$AUDIENCE" "$ACTIONS_ID_TOKEN_REQUEST_URL"
  token=$(printf '%s' "$answer" | jq -r .value 2>/dev/null) || true
  answer="GitHub answers $status and gives no token" status=000
  [[ $token =~ ^[A-Za-z0-9._-]{20,}$ ]] || return 1
  echo "::add-mask::$token"
  minted=$SECONDS fresh=true
}

read_inputs() {
  type curl jq >/dev/null 2>&1 || fail "curl and jq are required"
  if [ -z "${ACTIONS_ID_TOKEN_REQUEST_URL:-}" ] || [ -z "${ACTIONS_ID_TOKEN_REQUEST_TOKEN:-}" ]; then
    fail "the job cannot get a token; it needs permissions: id-token: write, which a pull request from a fork never has"
  fi
  ROLLOUT_URL=${ROLLOUT_URL:-} ROLLOUT_URL=${ROLLOUT_URL%/}
  AUDIENCE=${AUDIENCE:-$ROLLOUT_URL} WAIT=${WAIT:-5m} FAIL_ON_UNMATCHED=${FAIL_ON_UNMATCHED:-true}
  check url "$ROLLOUT_URL" 'https?://[^[:space:]]+' 'an address such as https://rollout.example.com'
  check fail-on-unmatched "$FAIL_ON_UNMATCHED" 'true|false' 'true or false'
  check wait "$WAIT" '([0-5]?[0-9])m|([0-2]?[0-9]{1,3}|3[0-5][0-9]{2})s?' 'less than an hour, such as 300s or 5m'
  limit=$((10#0${BASH_REMATCH[2]} * 60 + 10#0${BASH_REMATCH[3]}))
}

# read_images sets the body of the request, the query that follows it, and the images.
read_images() {
  local name=${IMAGE:-} words word named tags=()
  name=${name//[[:space:]]/}
  IFS=$', \t\r\n' read -r -d '' -a words <<<"${TAGS:-}" || true
  if [[ ${name##*/} == *:* ]]; then
    [ ${#words[@]} -eq 0 ] || fail "image has a tag, and tags are given as well; give the tag in one place"
    words=("${name##*:}") name=${name%:*}
  fi
  name=${name,,}
  for word in "${words[@]}"; do
    if [[ $word == *[/:]* ]]; then # a reference
      named=${word%:*}
      [ "${named,,}" = "$name" ] || { say "left out, because it is not a tag of $name: $word" && continue; }
    fi
    tags+=("${word##*:}")
  done
  [ ${#tags[@]} -gt 0 ] || fail "no tag of the image \"$name\" is given; give the image with its tag, or tags"
  { read -r body && read -r query && read -r images; } < <(printf '%s\n' "${tags[@]}" | jq -Rnr --arg name "$name" '
    [inputs] | unique | ({image: $name, tags: .} | tojson), (map("\($name):\(.)") | (map("image=" + @uri) | join("&")), join(" "))')
}

# request posts the body until it is accepted. Each attempt has a token of its own.
request() {
  local attempt
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    ((attempt == 1)) || sleep "$pause"
    if mint; then
      call "$token" --max-time 20 -H 'Content-Type: application/json' --data-raw "$body" "$ROLLOUT_URL/event"
    fi
    if [ "$status" = 202 ] && IFS=$'\t' read -r requested_at id < <(jq -r '[.requestedAt, .requestId] | @tsv' <<<"$answer" 2>/dev/null) &&
      [[ $requested_at =~ ^[0-9TZ:.-]{20,30}$ ]]; then
      return
    fi
    explain
    [ "$status" != 401 ] || fail "the token was refused; does the audience $AUDIENCE equal GITHUB_OIDC_AUDIENCE of web? $problem"
    transient || fail "the request for $images was refused: $problem"
    say "attempt $attempt of $attempts: $problem"
  done
  fail "the request for $images was not accepted after $attempts attempts: $problem"
}

# digest prints version, state, counts and pull policies of an answer, separated by tabs.
# shellcheck disable=SC2016 # these are variables of jq
digest='def sum(f): [.images[].clusters[] | f // 0] | add // 0;
  def list(f): [.images[].clusters[] | f // {} | to_entries[]] | group_by(.key) | map("\(map(.value) | add) \(.[0].key)") | join(", ");
  def part($name; $list): if $list == "" then "" else ", \($name): \($list)" end;
  if length == 1 then .[0] else error end |
  [(.version | @uri | if . == "" then error else . end), (.state | if IN("pending", "progressing", "complete", "failed", "unmatched") then . else error end),
    "\(sum(.matched)) matched, \(sum(.restarted)) restarted, \(sum(.complete)) complete, \(sum(.failed)) failed"
    + part("deferred"; list(.deferred)) + part("skipped"; list(.skipped))
    + part("no report yet"; [.images[].clusters | to_entries[] | select(.value.state == "pending").key] | unique | join(" "))
    + if all(.images[]; .clusters == {}) then ", no cluster is alive" else "" end
    + part("away"; .away // [] | join(" ")), list(.warnings)] | @tsv'

# summarize writes the table of the step summary.
summarize() {
  [ -n "${GITHUB_STEP_SUMMARY:-}" ] || return 0
  jq -r --arg about "$requested_at, requestId $id" '
    def cell: tostring | gsub("[^A-Za-z0-9._:/@, -]"; "");
    def row: "| " + (map(cell) | join(" | ")) + " |";
    def list: . // {} | to_entries | map("\(.value) \(.key)") | join(", ");
    "### Rollout: \(.state)\n\nRequested at \($about | cell)\n",
    (["Image", "Cluster", "State", "Matched", "Restarted", "Complete", "Failed", "Deferred", "Skipped"] | row), "|" + "---|" * 9,
    (.images[] | .image as $image | .clusters | to_entries[] | .key as $cluster | .value |
      [$image, $cluster, .state, .matched, .restarted, .complete, .failed, (.deferred | list), (.skipped | list)] | row),
    (.away // [] | .[] | ["", ., "away", "", "", "", "", "", ""] | row)' <<<"$report" >>"$GITHUB_STEP_SUMMARY"
}

# follow asks for the state until it is final, or for as long as wait says.
follow() {
  local begun=$SECONDS asked left seen='' version counts='' shown=''
  while left=$((limit - (SECONDS - begun))) && ((left > 0)); do
    asked=$SECONDS
    if ((SECONDS - minted < token_age)) || mint; then
      call "$token" --max-time $((poll + 15)) "$ROLLOUT_URL/rollout?$query&since=$requested_at&seen=$seen&wait=$((left < poll ? left : poll))s"
    fi
    if [ "$status" = 401 ] && ! $fresh; then # it has expired early
      minted=-$token_age
    elif [ "$status" != 200 ] || ! IFS=$'\t' read -r version state counts warnings < <(jq -rs "$digest" <<<"$answer" 2>/dev/null); then
      explain
      transient || fail "the rollout of $images cannot be followed: $problem"
      say "$problem"
      sleep "$pause"
    else
      fresh=false report=$answer outcome="$state: $counts"
      [ "$outcome" = "$shown" ] || say "$((SECONDS - begun))s $outcome"
      shown=$outcome
      [[ $state == p* ]] || return 0
      # web answers at once when too many jobs wait.
      [ "$version" != "$seen" ] || ((SECONDS - asked >= 2)) || sleep 2
      seen=$version
    fi
  done
}

read_inputs
read_images
request
output requested-at "$requested_at"
say "accepted: $images at $requested_at (requestId $id)"
state=accepted report='' warnings='' outcome='' problem=''
output state "$state"
((limit > 0)) || exit 0

follow
output state "$state"
[ -z "$report" ] || { output report "$(jq -c . <<<"$report")" && { summarize || true; }; }
[ -z "$warnings" ] || annotate warning "nodes may keep an old image, because of their imagePullPolicy: $warnings"
case $state in
  complete) ;;
  unmatched) [ "$FAIL_ON_UNMATCHED" = false ] || fail "nothing that runs $images is restarted: ${outcome#*: } (requestId $id)" ;;
  failed) fail "the rollout of $images $outcome; the worker's log names what failed (requestId $id)" ;;
  *) fail "the rollout of $images did not end within $WAIT, its state is ${outcome:-unknown, $problem} (requestId $id)" ;;
esac
