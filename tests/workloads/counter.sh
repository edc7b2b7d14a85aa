# Counts ten times a second, in memory and in a file; answers SIGUSR1 with how far it is.
say() {
    if [ "$i" -ge "$last" ] && [ "$(cat /wl/count)" -ge "$((i - 1))" ]; then echo "OK $i"; else echo "FAIL counter is $i, was $last"; fi
    last=$i
}
trap say USR1
trap 'exit 0' TERM
i=0 last=0
echo 0 > /wl/count
echo READY
while :; do
    i=$((i + 1))
    echo $i > /wl/count
    sleep 0.1
done
