/* timerfd and signalfd: every clock, relative and absolute, with interval, ticks that nobody has read, cancel-on-set, in epoll; signals that
 * wait to be read through a signalfd. */
#include "workload.h"
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

enum { RELATIVE, BOOT, ABSOLUTE, DATED, CANCELLED_ON_SET, PERIODIC, EXPIRED, STOPPED, COUNT };
static int fd[COUNT], signals, nonblocking, set;
static double started, due, expected[COUNT];
static int clocks[COUNT] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_REALTIME, CLOCK_MONOTONIC,
                            CLOCK_MONOTONIC, CLOCK_REALTIME};
static char *flags[COUNT];

static struct timespec spec(double seconds) {
    return (struct timespec){(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
}
static double seconds(struct timespec t) { return (double)t.tv_sec + (double)t.tv_nsec / 1e9; }

static void arm(int which, int how, double value, double interval) {
    struct itimerspec t = {spec(interval), spec(value)};
    MUST(timerfd_settime(fd[which], how, &t, NULL));
}

static char *flags_of(int which) {
    char path[64];
    sprintf(path, "/proc/self/fdinfo/%d", fd[which]);
    return wl_status_of(path, "settime flags");
}

static uint64_t ticks_of(int which) {
    uint64_t n = 0;
    ssize_t got = read(fd[which], &n, 8);
    CHECK(got == 8 || (got == -1 && errno == EAGAIN), "timerfd %d: read: %s", which, strerror(errno));
    return got == 8 ? n : 0;
}

static void start_periodic(void) {
    arm(PERIODIC, 0, 0.01, 0.05);
    started = wl_now(CLOCK_MONOTONIC);
}

static void verify(void) {
    double passed = wl_now(CLOCK_MONOTONIC) - started;
    for (int i = 0; i < COUNT; i++) {
        struct itimerspec now;
        MUST(timerfd_gettime(fd[i], &now));
        double left = seconds(now.it_value);
        if (i == RELATIVE || i == BOOT || i == ABSOLUTE)
            CHECK(left <= expected[i] + 0.001 && left > expected[i] - wl_now(CLOCK_MONOTONIC) - 2, "timerfd %d: %f s left of %f", i, left, expected[i]);
        if (i == DATED || i == CANCELLED_ON_SET) {
            double at = wl_now(CLOCK_REALTIME) + left;
            CHECK(at > due - 0.01 && at < due + 0.01, "timerfd %d: expires at %f instead of %f", i, at, due);
        }
        CHECK(seconds(now.it_interval) == (i == PERIODIC ? 0.05 : i == RELATIVE ? 33.25 : 0), "timerfd %d: interval %f", i, seconds(now.it_interval));
        char *f = flags_of(i);
        CHECK(!strcmp(f, flags[i]), "timerfd %d: flags %s instead of %s", i, f, flags[i]);
        free(f);
    }
    struct itimerspec now;
    MUST(timerfd_gettime(fd[STOPPED], &now));
    CHECK(now.it_value.tv_sec == 0 && now.it_value.tv_nsec == 0, "timerfd: a stopped one runs");
    struct epoll_event events[COUNT];
    int n = epoll_wait(set, events, COUNT, 0);
    CHECK(n == 2, "epoll reports %d timers", n);
    uint64_t ticks = ticks_of(PERIODIC);
    CHECK(ticks >= 1 && (double)ticks <= passed / 0.05 + 2, "timerfd: %lu ticks in %f s", ticks, passed);
    /* the beat goes on */
    wl_sleep(0.12);
    ticks = ticks_of(PERIODIC);
    CHECK(ticks >= 2 && ticks <= 5, "timerfd: %lu ticks in 120 ms", ticks);
    ticks = ticks_of(EXPIRED);
    CHECK(ticks == 1, "timerfd: an expired one tells %lu ticks", ticks);
    arm(EXPIRED, 0, 0.001, 0);
    start_periodic();
    wl_sleep(0.02);

    struct signalfd_siginfo info;
    for (int i = 0; i < 3; i++) {
        ssize_t got = read(signals, &info, sizeof info);
        CHECK(got == sizeof info && info.ssi_signo == (uint32_t)SIGRTMIN + 2 && info.ssi_int == 100 + i && info.ssi_pid == (uint32_t)getpid(),
              "signalfd: signal %d (%u, %d)", i, info.ssi_signo, info.ssi_int);
    }
    CHECK(read(signals, &info, sizeof info) == -1 && errno == EAGAIN, "signalfd: one signal too many");
    CHECK(fcntl(signals, F_GETFL) & O_NONBLOCK, "signalfd: blocks");
    CHECK(fcntl(nonblocking, F_GETFL) & O_NONBLOCK, "timerfd: blocks");
    CHECK(fcntl(nonblocking, F_GETFD) & FD_CLOEXEC, "timerfd: is inherited");
    char path[64];
    sprintf(path, "/proc/self/fdinfo/%d", signals);
    char *mask = wl_status_of(path, "sigmask");
    CHECK(strtoul(mask, NULL, 16) == (1UL << (SIGRTMIN + 1) | 1UL << (SIGHUP - 1)), "signalfd: mask %s", mask);
    free(mask);
    for (int i = 0; i < 3; i++) MUST(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = 100 + i}));
}

int main(void) {
    wl_init();
    set = MUST(epoll_create1(0));
    for (int i = 0; i < COUNT; i++) {
        fd[i] = MUST(timerfd_create(clocks[i], TFD_NONBLOCK));
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
        MUST(epoll_ctl(set, EPOLL_CTL_ADD, fd[i], &e));
    }
    nonblocking = MUST(timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK | TFD_CLOEXEC));
    due = (double)(long)wl_now(CLOCK_REALTIME) + 5000;
    arm(RELATIVE, 0, expected[RELATIVE] = 1000, 33.25);
    arm(BOOT, 0, expected[BOOT] = 2000, 0);
    expected[ABSOLUTE] = 3000;
    arm(ABSOLUTE, TFD_TIMER_ABSTIME, wl_now(CLOCK_MONOTONIC) + 3000, 0);
    arm(DATED, TFD_TIMER_ABSTIME, due, 0);
    arm(CANCELLED_ON_SET, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, due, 0);
    arm(EXPIRED, 0, 0.001, 0);
    start_periodic();
    wl_sleep(0.02);
    for (int i = 0; i < COUNT; i++) flags[i] = flags_of(i);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN + 2);
    sigaddset(&mask, SIGHUP);
    MUST0(pthread_sigmask(SIG_BLOCK, &mask, NULL));
    signals = MUST(signalfd(-1, &mask, SFD_NONBLOCK));
    for (int i = 0; i < 3; i++) MUST(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = 100 + i}));
    wl_serve(verify);
}
