/* For benches: processes with a heap of distinct words each, and what a thread of the first saw of the time.
 *
 *     gap MIB [processes=N] [huge] [quiet]
 *
 * SIGUSR1: every byte of every heap is checked; prints `OK GAP RESUMED`: the largest step of CLOCK_MONOTONIC since the last time, in seconds,
 * and the CLOCK_REALTIME at the end of the largest step of that clock, which is when the program went on after a restore. The thread spins;
 * with `quiet` it looks every half millisecond. SIGUSR2: one page of each hundred gets other words; prints DIRTY. `huge` asks for huge pages. */
#include "workload.h"

#define PAGE 4096

static double largest, longest, resumed;
static int quiet;
static unsigned char *heap;
static uint8_t *generation;
static size_t size;

static uint64_t word(size_t at) { return (at + 1 + ((uint64_t)generation[at / PAGE] << 40)) * 0x9e3779b97f4a7c15ULL; }

static void fill(size_t page) {
    for (size_t i = page * PAGE; i < (page + 1) * PAGE; i += 8) *(uint64_t *)(heap + i) = word(i);
}

static size_t wrong(void) {
    size_t found = 0;
    for (size_t i = 0; i < size; i += 8) found += *(uint64_t *)(heap + i) != word(i);
    return found;
}

static void *watch(void *argument) {
    (void)argument;
    double last = wl_now(CLOCK_MONOTONIC), last_real = wl_now(CLOCK_REALTIME);
    for (;;) {
        double now = wl_now(CLOCK_MONOTONIC), real = wl_now(CLOCK_REALTIME);
        if (now - last > largest) largest = now - last;
        if (real - last_real > longest) {
            longest = real - last_real;
            resumed = real;
        }
        last = now;
        last_real = real;
        if (quiet) wl_sleep(0.0005);
    }
    return NULL;
}

/* What the processes share. */
static struct {
    pthread_barrier_t barrier;
    size_t bad;
} *common;

static void allocate(int huge, int seed) {
    size_t pages = size / PAGE;
    heap = MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    generation = MUST(mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (huge) MUST(madvise(heap, size, MADV_HUGEPAGE));
    memset(generation, seed, pages);
    for (size_t page = 0; page < pages; page++) fill(page);
}

static void meet(void) { pthread_barrier_wait(&common->barrier); }

/* Each process checks its heap, all at once. */
static void check(void) {
    meet();
    __atomic_fetch_add(&common->bad, wrong(), __ATOMIC_SEQ_CST);
    meet();
}

int main(int argc, char **argv) {
    int processes = 1, huge = 0;
    wl_init();
    size = (size_t)(argc > 1 ? atol(argv[1]) : 16) << 20;
    for (int i = 2; i < argc; i++) {
        if (!strncmp(argv[i], "processes=", 10)) processes = atoi(argv[i] + 10);
        huge |= !strcmp(argv[i], "huge");
        quiet |= !strcmp(argv[i], "quiet");
    }
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGTERM);
    MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));
    common = MUST(mmap(NULL, sizeof *common, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    pthread_barrierattr_t shared;
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&common->barrier, &shared, (unsigned)processes);
    for (int i = 1; i < processes; i++) {
        if (MUST(fork()) == 0) {
            allocate(huge, i);
            for (meet();;) check();
        }
    }
    allocate(huge, 0);
    meet();
    pthread_t t;
    MUST0(pthread_create(&t, NULL, watch, NULL));
    wl_sleep(0.05);
    largest = longest = 0;
    dprintf(1, "READY\n");
    for (int next = 0;;) {
        int got;
        sigwait(&set, &got);
        if (got == SIGTERM) return 0;
        if (got == SIGUSR2) {
            for (size_t page = (size_t)(next++ % 100); page < size / PAGE; page += 100) {
                generation[page]++;
                fill(page);
            }
            dprintf(1, "DIRTY\n");
            continue;
        }
        double step = largest, end = resumed;
        common->bad = 0;
        check();
        dprintf(1, "%s %.6f %.6f\n", common->bad ? "FAIL" : "OK", step, end);
        largest = longest = 0;
    }
}
