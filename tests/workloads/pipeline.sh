# Four processes in a pipeline. The third is slow, so that the pipe between the first two is always full; the last checks that each number
# comes once and in order, and writes down how far it is.
cat > /wl/slow.sh <<'END'
n=0
while read -r line; do
    echo "$line"
    n=$((n + 1))
    [ $((n % 200)) = 0 ] && sleep 0.1
done
END
echo "0 fine" > /wl/status
seq 1 1000000000 | cat | sh /wl/slow.sh | awk '
    $1 != last + 1 { print last " then " $1 > "/wl/error"; close("/wl/error") }
    { last = $1 }
    NR % 100 == 0 { print last > "/wl/status.new"; close("/wl/status.new"); system("mv /wl/status.new /wl/status") }
' &
before=0
say() {
    # it must get on within ten seconds
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        read -r now rest < /wl/status
        [ "$now" -gt "$before" ] && break
        sleep 0.5
    done
    if [ -e /wl/error ]; then echo "FAIL $(cat /wl/error)"
    elif [ "$now" -le "$before" ]; then echo "FAIL the pipeline stands still at $now"
    else echo "OK $now"; fi
    before=$now
}
trap say USR1
trap 'exit 0' TERM
sleep 1
echo READY
while :; do wait; done
