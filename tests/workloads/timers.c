/* Interval timers: a long real one with the time that was left, virtual and profiling ones, and a child with a ticking one. */
#include "workload.h"
#include <sys/time.h>

#define LONG_SECONDS 4000.0
static double started;
static struct itimerval virtual_was, profile_was;
static volatile struct { volatile unsigned long ticks, interrupted; } *shared;
static pid_t child;

static double seconds(struct timeval t) { return (double)t.tv_sec + (double)t.tv_usec / 1e6; }
static void tick(int signal) { (void)signal; shared->ticks++; }

static void run_child(void) {
    signal(SIGALRM, tick);
    struct itimerval t = {{0, 20000}, {0, 20000}};
    MUST(setitimer(ITIMER_REAL, &t, NULL));
    for (;;) pause();
}

static void verify(void) {
    struct itimerval now;
    MUST(getitimer(ITIMER_REAL, &now));
    double left = seconds(now.it_value), passed = wl_now(CLOCK_MONOTONIC) - started;
    CHECK(seconds(now.it_interval) == 77.5, "real timer: interval %f", seconds(now.it_interval));
    CHECK(left <= LONG_SECONDS && left >= LONG_SECONDS - passed - 1, "real timer: %f s left after %f s", left, passed);
    MUST(getitimer(ITIMER_VIRTUAL, &now));
    CHECK(seconds(now.it_interval) == seconds(virtual_was.it_interval) && seconds(now.it_value) > 990 && seconds(now.it_value) <= 1000.1,
          "virtual timer: %f s left, interval %f", seconds(now.it_value), seconds(now.it_interval));
    MUST(getitimer(ITIMER_PROF, &now));
    CHECK(seconds(now.it_interval) == seconds(profile_was.it_interval) && seconds(now.it_value) > 1990 && seconds(now.it_value) <= 2000.1,
          "profiling timer: %f s left, interval %f", seconds(now.it_value), seconds(now.it_interval));
    unsigned long before = shared->ticks;
    wl_sleep(0.3);
    unsigned long grown = shared->ticks - before;
    CHECK(grown >= 5 && grown <= 25, "the child's 20 ms timer ticked %lu times in 300 ms", grown);
    CHECK(kill(child, 0) == 0, "the child is gone");
}

int main(void) {
    wl_init();
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    child = MUST(fork());
    if (!child) run_child();
    struct itimerval t = {{77, 500000}, {(time_t)LONG_SECONDS, 0}};
    signal(SIGALRM, SIG_IGN);
    started = wl_now(CLOCK_MONOTONIC);
    MUST(setitimer(ITIMER_REAL, &t, NULL));
    t = (struct itimerval){{11, 0}, {1000, 0}};
    MUST(setitimer(ITIMER_VIRTUAL, &t, NULL));
    virtual_was = t;
    t = (struct itimerval){{22, 0}, {2000, 0}};
    MUST(setitimer(ITIMER_PROF, &t, NULL));
    profile_was = t;
    wl_serve(verify);
}
