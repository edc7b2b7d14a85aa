/* What every workload in C shares. A workload sets its state up, prints READY, and then, for each SIGUSR1, checks that its state is
 * exactly what it was and prints `OK` or `FAIL what differs; ...`. A check leaves the state as it found it, so it can be repeated after
 * every checkpoint and restore. SIGTERM ends the program with exit code 0. */
#ifndef WORKLOAD_H
#define WORKLOAD_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char wl_differences[8192];
static pthread_mutex_t wl_lock = PTHREAD_MUTEX_INITIALIZER;

/* Note a difference; may be called from any thread. */
__attribute__((format(printf, 1, 2), unused)) static void wl_differs(const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *c = text; *c; c++)
        if (*c == '\n') *c = ' ';
    pthread_mutex_lock(&wl_lock);
    size_t used = strlen(wl_differences);
    if (used + strlen(text) + 3 < sizeof wl_differences)
        sprintf(wl_differences + used, "%s%s", used ? "; " : "", text);
    pthread_mutex_unlock(&wl_lock);
}

#define CHECK(condition, ...)                          \
    do {                                               \
        if (!(condition)) wl_differs(__VA_ARGS__);     \
    } while (0)

/* A call that must work while setting up or checking. */
#define MUST(call)                                                                                          \
    ({                                                                                                      \
        __typeof__(call) wl_result = (call);                                                                \
        if ((long)wl_result == -1) {                                                                        \
            dprintf(1, "FAIL %s:%d: %s: %s\n", __FILE__, __LINE__, #call, strerror(errno));                 \
            _exit(3);                                                                                       \
        }                                                                                                   \
        wl_result;                                                                                          \
    })

/* The pthread functions return the error. */
#define MUST0(call)                                                                                         \
    do {                                                                                                    \
        int wl_error = (call);                                                                              \
        if (wl_error) {                                                                                     \
            dprintf(1, "FAIL %s:%d: %s: %s\n", __FILE__, __LINE__, #call, strerror(wl_error));              \
            _exit(3);                                                                                       \
        }                                                                                                   \
    } while (0)

__attribute__((unused)) static double wl_now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

__attribute__((unused)) static void wl_sleep(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&t, &t) == -1 && errno == EINTR) {}
}

/* A byte that depends on the place and on a seed. */
__attribute__((unused)) static unsigned char wl_byte(uint64_t seed, uint64_t place) {
    uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15ULL ^ (place + 1) * 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 31;
    x *= 0x94d049bb133111ebULL;
    return (unsigned char)(x >> 56);
}

__attribute__((unused)) static void wl_fill(void *at, size_t length, uint64_t seed) {
    for (size_t i = 0; i < length; i++) ((unsigned char *)at)[i] = wl_byte(seed, i);
}

/* -1 if all bytes are right, else the place of the first wrong one. */
__attribute__((unused)) static long wl_wrong(const void *at, size_t length, uint64_t seed) {
    for (size_t i = 0; i < length; i++)
        if (((const unsigned char *)at)[i] != wl_byte(seed, i)) return (long)i;
    return -1;
}

/* The whole of a small file (of /proc, for instance); NULL-terminated, length in *length. Caller frees. */
__attribute__((unused)) static char *wl_slurp(const char *path, size_t *length) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        wl_differs("open %s: %s", path, strerror(errno));
        char *empty = calloc(1, 1);
        if (length) *length = 0;
        return empty;
    }
    size_t used = 0, size = 1 << 16;
    char *text = malloc(size + 1);
    ssize_t n;
    while ((n = read(fd, text + used, size - used)) > 0) {
        used += (size_t)n;
        if (used == size) text = realloc(text, (size *= 2) + 1);
    }
    close(fd);
    text[used] = 0;
    if (length) *length = used;
    return text;
}

/* The value of a line `key: value` of /proc/self/status. Caller frees. */
__attribute__((unused)) static char *wl_status_of(const char *file, const char *key) {
    char *text = wl_slurp(file, NULL), *save = NULL, *found = NULL;
    size_t n = strlen(key);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        if (!strncmp(line, key, n) && line[n] == ':') found = strdup(line + n + 1 + strspn(line + n + 1, " \t"));
    free(text);
    return found ? found : strdup("(missing)");
}

/* Call before any thread is made, so that none of them takes the signals of the protocol. */
__attribute__((unused)) static void wl_init(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));
}

__attribute__((unused)) static void wl_serve(void (*verify)(void)) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    dprintf(1, "READY\n");
    for (int round = 1;; round++) {
        siginfo_t info;
        int got = sigwaitinfo(&set, &info);
        if (got == -1) {
            /* nobody sends this program a signal that has a handler in this thread: an EINTR here is one it should not have seen */
            wl_differs("sigwaitinfo: %s", strerror(errno));
            continue;
        }
        if (got == SIGTERM) exit(0);
        verify();
        if (wl_differences[0])
            dprintf(1, "FAIL %s\n", wl_differences);
        else
            dprintf(1, "OK %d\n", round);
        wl_differences[0] = 0;
    }
}
#endif
