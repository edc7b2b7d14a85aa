/* Monotonic clocks: they never go back, the vdso and the kernel agree about them, and what waits for a time of theirs comes at that time.
 * Each check leaves what the clocks show in /clocks, for a test that knows how long the container did not exist. */
#include "workload.h"
#include <sys/timerfd.h>

#define CLOCKS 3
static const clockid_t clocks[CLOCKS] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_RAW};
static double last[CLOCKS], due;
static timer_t timer;
static int timerfd;
static volatile int backwards;

static double by_call(clockid_t clock) {
    struct timespec t;
    MUST(syscall(SYS_clock_gettime, clock, &t));
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Never rests: it is stopped wherever it is, mostly inside the vdso. */
static void *watch(void *argument) {
    (void)argument;
    for (double before = 0;;) {
        double now = wl_now(CLOCK_MONOTONIC);
        if (now < before) backwards = 1;
        before = now;
    }
    return NULL;
}

static void *sleep_until(void *argument) {
    struct timespec t = *(struct timespec *)argument;
    intptr_t error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    return (void *)error;
}

static void sleep_a_little(void) {
    struct timespec t;
    MUST(clock_gettime(CLOCK_MONOTONIC, &t));
    t.tv_nsec += 20000000;
    if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
    double until = (double)t.tv_sec + (double)t.tv_nsec / 1e9;
    CHECK(sleep_until(&t) == NULL, "an absolute sleep failed");
    double now = wl_now(CLOCK_MONOTONIC);
    CHECK(now >= until, "an absolute sleep ended %f s early", until - now);
}

static void check_due(const char *what, double before, const struct itimerspec *left) {
    double span = (double)left->it_value.tv_sec + (double)left->it_value.tv_nsec / 1e9, after = wl_now(CLOCK_MONOTONIC);
    CHECK(after + span > due - 0.001 && before + span < due + 30, "%s: due at %f, would come between %f and %f", what, due, before + span, after + span);
}

static void verify(void) {
    for (int i = 0; i < CLOCKS; i++) {
        double first = wl_now(clocks[i]), second = by_call(clocks[i]), third = wl_now(clocks[i]);
        CHECK(first <= second && second <= third, "clock %d: vdso %f, kernel %f, vdso %f", clocks[i], first, second, third);
        CHECK(first >= last[i], "clock %d went back by %f s", clocks[i], last[i] - first);
        last[i] = third;
    }
    CHECK(!backwards, "CLOCK_MONOTONIC went back between two calls");
    struct itimerspec left;
    /* both clocks rest while the container does not exist: what is left of the one agrees with what the other shows.
     * We may have to wait for the processor between looking at one and at the other. */
    double before = wl_now(CLOCK_MONOTONIC);
    MUST(timer_gettime(timer, &left));
    check_due("POSIX timer", before, &left);
    before = wl_now(CLOCK_MONOTONIC);
    MUST(timerfd_gettime(timerfd, &left));
    check_due("timerfd", before, &left);
    sleep_a_little();
    FILE *f = fopen("/clocks", "w");
    fprintf(f, "%.9f %.9f %.9f\n", wl_now(CLOCK_REALTIME), wl_now(CLOCK_MONOTONIC), wl_now(CLOCK_BOOTTIME));
    fclose(f);
}

int main(void) {
    wl_init();
    struct sigevent none = {.sigev_notify = SIGEV_NONE};
    MUST(timer_create(CLOCK_MONOTONIC, &none, &timer));
    timerfd = MUST(timerfd_create(CLOCK_MONOTONIC, 0));
    due = wl_now(CLOCK_MONOTONIC) + 5000;
    struct itimerspec t = {.it_value = {(time_t)due, (long)((due - (double)(time_t)due) * 1e9)}};
    MUST(timer_settime(timer, TIMER_ABSTIME, &t, NULL));
    MUST(timerfd_settime(timerfd, TFD_TIMER_ABSTIME, &t, NULL));
    pthread_t thread;
    MUST0(pthread_create(&thread, NULL, watch, NULL));
    wl_serve(verify);
}
