#!/bin/bash
# The documented life of a container: run, checkpoint, create, restore. Its files are the host's own, read-only, under an overlay, so no
# container image is needed. Each command is printed as it is run. `make demo` calls this.
set -euo pipefail

bold='' blue='' plain=''
[ -t 1 ] && bold=$'\033[1m' blue=$'\033[36m' plain=$'\033[0m'
say()  { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }
echo_command() { printf '%s$ %s%s\n' "$blue" "$*" "$plain"; }
show() { echo_command "$@"; "$@"; }
fail() { echo "demo: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "this needs root: it makes a container"
work=$(mktemp -d /var/tmp/torpor-demo.XXXXXX)
export XDG_RUNTIME_DIR=$work/run        # the state of containers, so that this demo is alone
cleanup() {
    for id in asleep awake; do torpor delete --force "$id" > /dev/null 2>&1 || true; done
    umount "$work/bundle/rootfs" 2> /dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
cd "$work"

say "A bundle: the host's own files, read-only, with a layer above them for what the container writes."
show mkdir -p bundle/rootfs upper work
show mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work bundle/rootfs

say "The program: a Python interpreter that counts in memory, and has done so only since it was started."
cat > bundle/rootfs/counter.py <<'PROGRAM'
import os, time
started = time.strftime("%H:%M:%S")
count = 0
while True:
    count += 1
    print(f"count {count}, pid {os.getpid()}, started at {started}", flush=True)
    time.sleep(0.2)
PROGRAM
show cat bundle/rootfs/counter.py
show torpor spec --bundle bundle -- /usr/bin/python3.11 /counter.py
sed -i 's/"terminal": true/"terminal": false/' bundle/config.json

say "Run it."
echo_command 'torpor run --detach --bundle bundle asleep > before.log'
torpor run --detach --bundle bundle asleep < /dev/null > before.log 2>&1
sleep 2.5
show torpor list
show tail -n 2 before.log

say "Put it to sleep: everything it is goes into one file, and its processes are gone."
show torpor checkpoint --image-path=nap asleep
show ls -lh nap
echo_command 'torpor inspect nap | head -n 40'
torpor inspect nap > inspect.txt
head -n 40 inspect.txt
show torpor list
last=$(tail -n 1 before.log)
show tail -n 1 before.log
show torpor delete asleep

say "Nothing runs. Time passes."
sleep 2

say "Wake it up in a new container."
echo_command 'torpor create --bundle bundle awake > after.log'
torpor create --bundle bundle awake < /dev/null > after.log 2>&1
show torpor restore --detach --image-path=nap awake
sleep 1
show torpor list
show head -n 3 after.log

first=$(head -n 1 after.log)
number() { sed -E 's/^count ([0-9]+),.*/\1/' <<< "$1"; }
rest() { sed -E 's/^count [0-9]+, //' <<< "$1"; }
[ -n "$first" ] || fail "the restored program printed nothing"
[ "$(number "$first")" = "$(($(number "$last") + 1))" ] || fail "it did not go on where it was: '$last', then '$first'"
[ "$(rest "$first")" = "$(rest "$last")" ] || fail "it is another program: '$last', then '$first'"

say "It went on where it was: $(number "$last") before, $(number "$first") after; the same pid, and it never knew."
show torpor delete --force awake
