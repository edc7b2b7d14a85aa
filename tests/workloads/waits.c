/* Waits for a time that is told relative to their beginning: after a checkpoint and a restore they go on with what was left. The clock
 * rests with them, so each must end where it would have, and before a wait for a point in time shortly after that. */
#include "workload.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/select.h>

#define TIME 1.2
#define EARLY 0.5 /* a checkpoint comes not before this */
#define SPARE 0.4 /* less than EARLY: who begins anew ends later than this */

static struct timespec span(double seconds) {
    return (struct timespec){(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
}

static int do_nanosleep(void) { struct timespec t = span(TIME); return nanosleep(&t, NULL); }
static int do_nanosleep_rest(void) { struct timespec t = span(TIME), rest; return nanosleep(&t, &rest); }
static int do_clock(clockid_t clock) { struct timespec t = span(TIME); errno = clock_nanosleep(clock, 0, &t, NULL); return errno ? -1 : 0; }
static int do_clock_monotonic(void) { return do_clock(CLOCK_MONOTONIC); }
static int do_clock_boottime(void) { return do_clock(CLOCK_BOOTTIME); }
static int do_clock_realtime(void) { return do_clock(CLOCK_REALTIME); }
static int do_poll(void) { return poll(NULL, 0, (int)(TIME * 1000)); }
static int do_ppoll(void) { struct timespec t = span(TIME); return ppoll(NULL, 0, &t, NULL); }
static int do_select(void) {
    struct timeval t = {(time_t)TIME, (suseconds_t)((TIME - (double)(time_t)TIME) * 1e6)};
    return select(0, NULL, NULL, NULL, &t);
}
static int do_futex(void) {
    int word = 0;
    struct timespec t = span(TIME);
    int r = (int)syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
    return r == -1 && errno == ETIMEDOUT ? 0 : r;
}

static struct wait {
    const char *name;
    int (*wait)(void);
    double took;
    int result, error;
    volatile int ended;
    sem_t go, done;
} waits[] = {
    {.name = "nanosleep", .wait = do_nanosleep},
    {.name = "nanosleep with rest", .wait = do_nanosleep_rest},
    {.name = "clock_nanosleep(MONOTONIC)", .wait = do_clock_monotonic},
    {.name = "clock_nanosleep(BOOTTIME)", .wait = do_clock_boottime},
    {.name = "clock_nanosleep(REALTIME)", .wait = do_clock_realtime},
    {.name = "poll", .wait = do_poll},
    {.name = "ppoll", .wait = do_ppoll},
    {.name = "select", .wait = do_select},
    {.name = "futex", .wait = do_futex},
};
#define WAITS (sizeof waits / sizeof *waits)
static double last_began;

static void *run(void *argument) {
    struct wait *w = argument;
    for (;;) {
        sem_wait(&w->go);
        double began = wl_now(CLOCK_MONOTONIC);
        errno = 0;
        w->result = w->wait();
        w->error = errno;
        w->took = wl_now(CLOCK_MONOTONIC) - began;
        w->ended = 1;
        sem_post(&w->done);
    }
    return NULL;
}

static void begin(void) {
    for (size_t i = 0; i < WAITS; i++) {
        waits[i].ended = 0;
        sem_post(&waits[i].go);
    }
    last_began = wl_now(CLOCK_MONOTONIC);
    wl_sleep(EARLY);
}

static void verify(void) {
    struct timespec end = span(last_began + TIME + SPARE);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL) == EINTR) wl_differs("an absolute sleep was interrupted");
    for (size_t i = 0; i < WAITS; i++) CHECK(waits[i].ended, "%s has not ended %.1f s after its time", waits[i].name, SPARE);
    for (size_t i = 0; i < WAITS; i++) {
        struct wait *w = &waits[i];
        sem_wait(&w->done);
        CHECK(w->result == 0, "%s returned %d, %s", w->name, w->result, strerror(w->error));
        CHECK(w->took >= TIME - 0.001, "%s took %f s", w->name, w->took);
    }
    begin();
}

int main(void) {
    wl_init();
    for (size_t i = 0; i < WAITS; i++) {
        pthread_t thread;
        sem_init(&waits[i].go, 0, 0);
        sem_init(&waits[i].done, 0, 0);
        MUST0(pthread_create(&thread, NULL, run, &waits[i]));
    }
    begin();
    wl_serve(verify);
}
