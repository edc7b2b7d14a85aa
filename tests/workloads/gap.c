/* For benches: a heap of argv[1] MiB, and the largest gap that a thread busy with CLOCK_MONOTONIC saw since the last SIGUSR1. Every page is
 * touched now and then, so that copy-on-write costs what it costs. */
#include "workload.h"

static volatile double largest;
static unsigned char *heap;
static size_t size;

static void *watch(void *argument) {
    (void)argument;
    double last = wl_now(CLOCK_MONOTONIC);
    for (;;) {
        double now = wl_now(CLOCK_MONOTONIC);
        if (now - last > largest) largest = now - last;
        last = now;
    }
    return NULL;
}

int main(int argc, char **argv) {
    wl_init();
    size = (size_t)(argc > 1 ? atol(argv[1]) : 16) << 20;
    heap = MUST(mmap(NULL, size ? size : 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (size_t i = 0; i < size; i += 8) *(uint64_t *)(heap + i) = (i + 1) * 0x9e3779b97f4a7c15ULL;
    pthread_t t;
    MUST0(pthread_create(&t, NULL, watch, NULL));
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    wl_sleep(0.05);
    largest = 0;
    dprintf(1, "READY\n");
    for (;;) {
        int got;
        sigwait(&set, &got);
        if (got == SIGTERM) return 0;
        size_t wrong = 0;
        for (size_t i = 0; i < size; i += 4096) wrong += *(uint64_t *)(heap + i) != (i + 1) * 0x9e3779b97f4a7c15ULL;
        dprintf(1, "%s %.6f\n", wrong ? "FAIL" : "OK", largest);
        largest = 0;
    }
}
