/* Workers forked from a large parent: pages that they share by copy-on-write hold the right bytes in each, and are shared again, so that all of
 * them need little more memory than one. Some pages were written since, by the parent or by workers, some given up, some areas cut. */
#include "workload.h"

enum { PAGE = 4096, PAGES = 6144, WORKERS = 8, CHANGED = 16 };
static unsigned char *heap, *file, *brk_heap;
static int ask[WORKERS + 1][2], answer[WORKERS + 1][2];
static pid_t pids[WORKERS + 1];
static long pss_then;

static void fill_page(unsigned char *page, uint64_t seed) {
    for (int i = 0; i < PAGE; i += 8) *(uint64_t *)(page + i) = (seed + 1) * 0x9e3779b97f4a7c15ULL + (uint64_t)i;
}

static int is_page(const unsigned char *page, uint64_t seed) {
    for (int i = 0; i < PAGE; i += 8)
        if (*(const uint64_t *)(page + i) != (seed + 1) * 0x9e3779b97f4a7c15ULL + (uint64_t)i) return 0;
    return 1;
}

static int is_zero(const unsigned char *page) {
    for (int i = 0; i < PAGE; i++)
        if (page[i]) return 0;
    return 1;
}

static unsigned char *page(int n) { return heap + (size_t)n * PAGE; }

/* Whose pages these are: 0 is the parent, then the workers, then the child of the last one. */
static int first_own(int who) { return 1000 + who * 100; }

/* The number of the first page that is wrong, or -1. */
static long wrong(int who) {
    for (int n = 0; n < PAGES; n++) {
        if (who == 3 && n >= 6000) break; /* unmapped there */
        int own = n >= first_own(who) && n < first_own(who) + CHANGED;
        /* the child of the last worker was made when that had changed its pages */
        int inherited = who == WORKERS + 1 && n >= first_own(WORKERS) && n < first_own(WORKERS) + CHANGED;
        int given_up = (n == 500 + who) || (who == WORKERS + 1 && n == 500 + WORKERS) || (who == 0 && n >= 64 && n < 96);
        int right = given_up ? is_zero(page(n))
                    : own ? is_page(page(n), 100000 + (uint64_t)who)
                    : inherited ? is_page(page(n), 100000 + WORKERS)
                    : who == 0 && n < 64 ? is_page(page(n), 200000 + (uint64_t)n)
                    : is_page(page(n), (uint64_t)n);
        if (!right) return n;
    }
    for (int n = 0; n < 8; n++)
        if (!is_page(file + n * PAGE, n == 7 ? 300000 + (uint64_t)who : n < 4 ? 7000 + (uint64_t)n : 8000 + (uint64_t)n)) return 10000 + n;
    for (int n = 0; n < 32; n++)
        if (!is_page(brk_heap + n * PAGE, 9000 + (uint64_t)n)) return 20000 + n;
    return -1;
}

static void change(int who) {
    for (int i = 0; i < CHANGED; i++) fill_page(page(first_own(who) + i), 100000 + (uint64_t)who);
    MUST(madvise(page(500 + who), PAGE, MADV_DONTNEED));
    fill_page(file + 7 * PAGE, 300000 + (uint64_t)who);
    if (who == 3) MUST(munmap(page(6000), (PAGES - 6000) * PAGE));
    if (who == 4) MUST(mprotect(page(3000), 100 * PAGE, PROT_READ));
    if (who == 2) {
        unsigned char *more = MUST(sbrk(4 * PAGE));
        memset(more, 1, 4 * PAGE);
    }
}

static void work(int who) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    change(who);
    if (who == WORKERS) {
        pids[WORKERS] = MUST(fork());
        if (!pids[WORKERS]) {
            who = WORKERS + 1;
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            change(who);
        }
    }
    char byte;
    long result = wrong(who);
    MUST(write(answer[who - 1][1], &result, sizeof result));
    while (read(ask[who - 1][0], &byte, 1) == 1) {
        result = wrong(who);
        MUST(write(answer[who - 1][1], &result, sizeof result));
    }
    _exit(0);
}

static long pss_of(pid_t pid) {
    char path[64], *text, *line;
    sprintf(path, "/proc/%d/smaps_rollup", pid);
    text = wl_slurp(path, NULL);
    line = strstr(text, "\nPss:");
    long kb = line ? atol(line + 5) : 0;
    free(text);
    return kb;
}

static long pss(void) {
    long all = pss_of(getpid());
    /* pids are consecutive in a pid namespace of our own, but say so: all processes but the reader of smaps */
    for (pid_t pid = 1; pid < 64; pid++)
        if (pid != getpid() && !kill(pid, 0)) all += pss_of(pid);
    return all;
}

static void verify(void) {
    CHECK(wrong(0) == -1, "the parent: page %ld", wrong(0));
    for (int i = 0; i <= WORKERS; i++) {
        long result = -2;
        MUST(write(ask[i][1], "", 1));
        MUST(read(answer[i][0], &result, sizeof result));
        CHECK(result == -1, "worker %d: page %ld", i + 1, result);
    }
    if (!pss_then) pss_then = pss();
    long now = pss();
    CHECK(now < pss_then + 3000, "all together need %ld KiB of memory, %ld before", now, pss_then);
}

int main(void) {
    wl_init();
    brk_heap = MUST(sbrk(0));
    brk_heap += (PAGE - ((uintptr_t)brk_heap & (PAGE - 1))) & (PAGE - 1);
    MUST(brk(brk_heap + 32 * PAGE));
    for (int n = 0; n < 32; n++) fill_page(brk_heap + n * PAGE, 9000 + (uint64_t)n);
    heap = MUST(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (int n = 0; n < PAGES; n++) fill_page(page(n), (uint64_t)n);
    int fd = MUST(open("/wl/forked", O_CREAT | O_TRUNC | O_RDWR, 0600));
    unsigned char bytes[PAGE];
    for (int n = 0; n < 8; n++) {
        fill_page(bytes, 7000 + (uint64_t)n);
        MUST(write(fd, bytes, PAGE));
    }
    file = MUST(mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    close(fd);
    for (int n = 4; n < 8; n++) fill_page(file + n * PAGE, 8000 + (uint64_t)n);
    for (int i = 0; i <= WORKERS; i++) {
        MUST(pipe2(ask[i], O_CLOEXEC));
        MUST(pipe2(answer[i], O_CLOEXEC));
    }
    for (int i = 1; i <= WORKERS; i++)
        if (!(pids[i - 1] = MUST(fork()))) work(i);
    for (int i = 0; i <= WORKERS; i++) {
        long result;
        MUST(read(answer[i][0], &result, sizeof result));
        CHECK(result == -1, "worker %d: page %ld at once", i + 1, result);
    }
    change(0);
    for (int n = 0; n < 64; n++) fill_page(page(n), 200000 + (uint64_t)n);
    MUST(madvise(page(64), 32 * PAGE, MADV_DONTNEED));
    verify();
    wl_serve(verify);
}
