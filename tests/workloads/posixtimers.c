/* POSIX timers: ids with gaps, every way to be told, every clock, the time that was left, and signals of timers that are pending. */
#include "workload.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
enum { LONG, BOOT, REAL, QUIET, PROCESS_CPU, STOPPED, TICKING, TO_THREAD, BLOCKED, BLOCKED_ONCE, COUNT };
static int id[COUNT], thread_id, threaded;
static double left_was[COUNT] = {4000, 5000, 6000, 7000, 800, 0, 0, 0, 0, 0};
static double started, blocked_since;
static volatile int ticks, thread_ticks, wrong_tick;
static sem_t thread_ready;

/* the C library has handles of its own; here the kernel's ids matter */
static int create(clockid_t clock, int notify, int signal, int value, int thread) {
    struct sigevent e = {.sigev_notify = notify, .sigev_signo = signal, .sigev_value.sival_int = value};
    if (thread) e.sigev_notify_thread_id = thread;
    int made = -1;
    MUST(syscall(SYS_timer_create, clock, &e, &made));
    return made;
}

static struct timespec spec(double s) { return (struct timespec){(time_t)s, (long)((s - (double)(time_t)s) * 1e9)}; }
static double seconds(struct timespec t) { return (double)t.tv_sec + (double)t.tv_nsec / 1e9; }

static void arm(int which, double value, double interval) {
    struct itimerspec t = {spec(interval), spec(value)};
    MUST(syscall(SYS_timer_settime, id[which], 0, &t, NULL));
}

static void tick(int signal, siginfo_t *info, void *context) {
    (void)context;
    if (info->si_code != SI_TIMER || info->si_timerid != id[TICKING] || info->si_value.sival_int != 71) wrong_tick = signal;
    ticks++;
}

static void tick_in_thread(int signal, siginfo_t *info, void *context) {
    (void)context;
    if (gettid() != thread_id || info->si_timerid != id[TO_THREAD] || info->si_value.sival_int != 72) wrong_tick = signal;
    thread_ticks++;
}

static void *run_thread(void *unused) {
    (void)unused;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 4);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    thread_id = gettid();
    sem_post(&thread_ready);
    for (;;) pause();
    return NULL;
}

static void *run_ticker(void *unused) {
    (void)unused;
    for (;;) pause();
    return NULL;
}

static void on_event(union sigval value) { __atomic_add_fetch(&threaded, value.sival_int, __ATOMIC_SEQ_CST); }

static void start_blocked(void) {
    arm(BLOCKED, 0.03, 0.1);
    blocked_since = wl_now(CLOCK_MONOTONIC) + 0.03;
    arm(BLOCKED_ONCE, 0.01, 0);
    wl_sleep(0.05);
}

static int take(int signal, siginfo_t *info) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal);
    struct timespec now = {0, 0};
    return sigtimedwait(&set, info, &now);
}

static void check_blocked(void) {
    siginfo_t info;
    double since = wl_now(CLOCK_MONOTONIC) - blocked_since;
    int got = take(SIGRTMIN + 6, &info);
    CHECK(got == SIGRTMIN + 6 && info.si_code == SI_TIMER && info.si_timerid == id[BLOCKED] && info.si_value.sival_int == 73,
          "the pending signal of a timer: %d, code %d, timer %d, value %d", got, info.si_code, info.si_timerid, info.si_value.sival_int);
    CHECK(info.si_overrun <= since / 0.1 + 1, "the pending signal of a timer: overrun %d after %f s", info.si_overrun, since);
    got = take(SIGRTMIN + 6, &info);
    CHECK(got == -1, "the pending signal of a timer came twice");
    struct itimerspec now;
    MUST(syscall(SYS_timer_gettime, id[BLOCKED], &now));
    CHECK(seconds(now.it_value) > 0 && seconds(now.it_value) <= 0.1, "after a pending signal: %f s left", seconds(now.it_value));
    wl_sleep(0.22);
    got = take(SIGRTMIN + 6, &info);
    CHECK(got == SIGRTMIN + 6 && info.si_overrun >= 0 && info.si_overrun <= 2, "no beat after a pending signal: %d, overrun %d", got, info.si_overrun);
    got = take(SIGRTMIN + 7, &info);
    CHECK(got == SIGRTMIN + 7 && info.si_timerid == id[BLOCKED_ONCE] && info.si_value.sival_int == 74 && info.si_overrun == 0,
          "the pending signal of a single timer: %d, timer %d", got, info.si_timerid);
    CHECK(take(SIGRTMIN + 7, &info) == -1, "a single timer came twice");
    /* one that is taken away takes its signal along */
    arm(BLOCKED, 0, 0);
    start_blocked();
}

static void verify(void) {
    double passed = wl_now(CLOCK_MONOTONIC) - started;
    for (int i = 0; i <= STOPPED; i++) {
        struct itimerspec now;
        int got = (int)syscall(SYS_timer_gettime, id[i], &now);
        CHECK(got == 0, "timer %d: %s", id[i], strerror(errno));
        if (got) continue;
        double left = seconds(now.it_value);
        CHECK(left <= left_was[i] + 0.001 && left >= left_was[i] - passed - 2, "timer %d: %f s left of %f after %f", id[i], left, left_was[i], passed);
        CHECK(seconds(now.it_interval) == (i == LONG ? 12.5 : 0), "timer %d: interval %f", id[i], seconds(now.it_interval));
    }
    ticks = thread_ticks = threaded = 0;
    wl_sleep(0.3);
    CHECK(ticks >= 5 && ticks <= 40, "a 20 ms timer ticked %d times in 300 ms", ticks);
    CHECK(thread_ticks >= 5 && thread_ticks <= 40, "a thread's 20 ms timer ticked %d times in 300 ms", thread_ticks);
    CHECK(threaded >= 5 && threaded <= 40, "a SIGEV_THREAD timer of 20 ms ticked %d times in 300 ms", threaded);
    CHECK(!wrong_tick, "signal %d had the wrong thread, timer or value", wrong_tick);
    wrong_tick = 0;
    check_blocked();
    int next = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
    for (int i = 0; i < COUNT; i++) CHECK(next != id[i], "a new timer has the id of timer %d", i);
    MUST(syscall(SYS_timer_delete, next));
}

int main(void) {
    wl_init();
    sigset_t set;
    sigemptyset(&set);
    for (int i = 5; i <= 7; i++) sigaddset(&set, SIGRTMIN + i);
    pthread_t thread;
    sem_init(&thread_ready, 0, 0);
    MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));
    struct sigaction a = {.sa_sigaction = tick, .sa_flags = SA_SIGINFO | SA_RESTART};
    MUST(sigaction(SIGRTMIN + 4, &a, NULL));
    a.sa_sigaction = tick_in_thread;
    MUST(sigaction(SIGRTMIN + 3, &a, NULL));
    MUST0(pthread_create(&thread, NULL, run_thread, NULL));
    sem_wait(&thread_ready);
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 3);
    /* the main thread waits in sigwaitinfo, whose EINTR must not be of our making: ticks go to a thread of their own */
    sigaddset(&set, SIGRTMIN + 4);
    pthread_t ticker;
    MUST0(pthread_create(&ticker, NULL, run_ticker, NULL));
    MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));

    int gap[COUNT];
    clockid_t clock[COUNT] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID, CLOCK_MONOTONIC,
                              CLOCK_MONOTONIC, CLOCK_MONOTONIC, CLOCK_MONOTONIC, CLOCK_REALTIME};
    int notify[COUNT] = {SIGEV_SIGNAL, SIGEV_SIGNAL, SIGEV_SIGNAL, SIGEV_NONE, SIGEV_SIGNAL, SIGEV_SIGNAL,
                         SIGEV_SIGNAL, SIGEV_THREAD_ID, SIGEV_SIGNAL, SIGEV_SIGNAL};
    int signal[COUNT] = {SIGRTMIN + 5, SIGRTMIN + 5, SIGRTMIN + 5, 0, SIGRTMIN + 5, SIGRTMIN + 5, SIGRTMIN + 4, SIGRTMIN + 3, SIGRTMIN + 6, SIGRTMIN + 7};
    int value[COUNT] = {1, 2, 3, 4, 5, 6, 71, 72, 73, 74};
    for (int i = 0; i < COUNT; i++) {
        gap[i] = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
        id[i] = create(clock[i], notify[i], signal[i], value[i], notify[i] == SIGEV_THREAD_ID ? thread_id : 0);
    }
    for (int i = 0; i < COUNT; i++) MUST(syscall(SYS_timer_delete, gap[i]));
    for (int i = 0; i < STOPPED; i++) arm(i, left_was[i], i == LONG ? 12.5 : 0);
    started = wl_now(CLOCK_MONOTONIC);
    arm(TICKING, 0.02, 0.02);
    arm(TO_THREAD, 0.02, 0.02);
    timer_t by_library;
    struct sigevent e = {.sigev_notify = SIGEV_THREAD, .sigev_notify_function = on_event, .sigev_value.sival_int = 1};
    MUST(timer_create(CLOCK_MONOTONIC, &e, &by_library));
    struct itimerspec t = {spec(0.02), spec(0.02)};
    MUST(timer_settime(by_library, 0, &t, NULL));
    start_blocked();
    wl_serve(verify);
}
