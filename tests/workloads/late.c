/* Memory that is checked by four threads while the main thread changes the mappings around it: given up in every way that madvise(2)
 * has, unmapped and mapped again, moved, forked, executed over, wiped in a child. Under a background restore every fault then meets
 * changes that are under way. Each check leaves all memory as it was. */
#include "workload.h"

enum { PAGE = 4096, THREADS = 4, OWN = 2048, ROUGH = 1024, CHUNK = 32, SHARED = 256, WIPED = 64, HUGE_BYTES = 8 << 20 };
static unsigned char *heap, *rough, *elsewhere, *shared, *wiped, *huge;

static void fill_page(unsigned char *page, uint64_t number) { wl_fill(page, PAGE, number * 6961 + 5); }

static int is_page(const unsigned char *page, uint64_t number) { return wl_wrong(page, PAGE, number * 6961 + 5) == -1; }

static int is_zero(const unsigned char *page) {
    for (int i = 0; i < PAGE; i++)
        if (page[i]) return 0;
    return 1;
}

/* In an order of its own, so that neighbours are seldom touched one after another. */
static void *check_own(void *which) {
    long first = (long)which * OWN;
    for (long i = 0; i < OWN; i++) {
        long page = first + (i * 769 + (long)which * 101) % OWN;
        CHECK(is_page(heap + page * PAGE, (uint64_t)page), "thread %ld: page %ld", (long)which, page);
    }
    return NULL;
}

static void check_child(int with_exec) {
    pid_t child = MUST(fork());
    if (!child) {
        int bad = 0;
        for (int i = 0; i < WIPED; i += 7) bad |= is_zero(wiped + i * PAGE) ? 0 : 1;
        for (int i = 3; i < THREADS * OWN; i += 311) bad |= is_page(heap + (size_t)i * PAGE, (uint64_t)i) ? 0 : 2;
        if (with_exec && !bad) {
            execl("/proc/self/exe", "late", "child", NULL);
            _exit(8);
        }
        _exit(bad);
    }
    int status;
    MUST(waitpid(child, &status, 0));
    CHECK(status == 0, "a child: wait status %x", status);
}

static void change(unsigned char *part, int first, int how) {
    for (int i = 0; i < CHUNK; i += 5)
        CHECK(is_page(part + i * PAGE, (uint64_t)(100000 + first + i)), "page %d before change %d", first + i, how);
    size_t length = CHUNK * PAGE;
    int zero = 1;
    if (how == 0) {
        MUST(madvise(part, length, MADV_DONTNEED));
    } else if (how == 1) {
        /* may keep what it held until memory is short: what was brought, or zero, nothing else */
        MUST(madvise(part, length, MADV_FREE));
        zero = 0;
        for (int i = 0; i < CHUNK; i++)
            CHECK(is_zero(part + i * PAGE) || is_page(part + i * PAGE, (uint64_t)(100000 + first + i)), "freed page %d", first + i);
    } else if (how == 2) {
        MUST(munmap(part, length));
        CHECK(mmap(part, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == part, "mmap: %s", strerror(errno));
    } else {
        zero = 0;
        CHECK(mremap(part, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere) == elsewhere, "mremap: %s", strerror(errno));
        for (int i = 0; i < CHUNK; i++)
            CHECK(is_page(elsewhere + i * PAGE, (uint64_t)(100000 + first + i)), "moved page %d", first + i);
        CHECK(mremap(elsewhere, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, part) == part, "mremap back: %s", strerror(errno));
        /* the place stays ours */
        CHECK(mmap(elsewhere, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == elsewhere, "mmap: %s", strerror(errno));
    }
    for (int i = 0; zero && i < CHUNK; i++)
        CHECK(is_zero(part + i * PAGE), "page %d is not zero after change %d", first + i, how);
    for (int i = 0; i < CHUNK; i++) fill_page(part + i * PAGE, (uint64_t)(100000 + first + i));
}

static void verify(void) {
    pthread_t threads[THREADS];
    for (long i = 0; i < THREADS; i++) MUST0(pthread_create(&threads[i], NULL, check_own, (void *)i));
    /* every fourth chunk in each way, from the end, where a filler comes last; what is between them is never touched before */
    for (int chunk = ROUGH / CHUNK - 1; chunk >= 0; chunk--) {
        change(rough + (size_t)chunk * CHUNK * PAGE, chunk * CHUNK, chunk % 4);
        if (chunk % 8 == 0) check_child(chunk % 16 == 0);
    }
    for (int i = 0; i < SHARED; i++) CHECK(is_page(shared + i * PAGE, (uint64_t)(200000 + i)), "shared page %d", i);
    MUST(madvise(shared + 16 * PAGE, 16 * PAGE, MADV_REMOVE));
    for (int i = 16; i < 32; i++) {
        CHECK(is_zero(shared + i * PAGE), "shared page %d after MADV_REMOVE", i);
        fill_page(shared + i * PAGE, (uint64_t)(200000 + i));
    }
    for (int i = 0; i < WIPED; i++) CHECK(is_page(wiped + i * PAGE, (uint64_t)(300000 + i)), "page %d that children do not get", i);
    for (int i = 0; i < HUGE_BYTES / PAGE; i += 3) CHECK(is_page(huge + (size_t)i * PAGE, (uint64_t)(400000 + i)), "page %d of huge ones", i);
    for (int i = 0; i < THREADS; i++) MUST0(pthread_join(threads[i], NULL));
}

static unsigned char *map(size_t pages, int flags) {
    unsigned char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    MUST(at == MAP_FAILED ? -1 : 0);
    return at;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "child")) return 0;
    wl_init();
    heap = map(THREADS * OWN, MAP_PRIVATE);
    for (int i = 0; i < THREADS * OWN; i++) fill_page(heap + (size_t)i * PAGE, (uint64_t)i);
    rough = map(ROUGH, MAP_PRIVATE);
    for (int i = 0; i < ROUGH; i++) fill_page(rough + (size_t)i * PAGE, (uint64_t)(100000 + i));
    elsewhere = mmap(NULL, CHUNK * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(elsewhere == MAP_FAILED ? -1 : 0);
    shared = map(SHARED, MAP_SHARED);
    for (int i = 0; i < SHARED; i++) fill_page(shared + i * PAGE, (uint64_t)(200000 + i));
    wiped = map(WIPED, MAP_PRIVATE);
    MUST(madvise(wiped, WIPED * PAGE, MADV_WIPEONFORK));
    for (int i = 0; i < WIPED; i++) fill_page(wiped + i * PAGE, (uint64_t)(300000 + i));
    huge = map(2 * HUGE_BYTES / PAGE, MAP_PRIVATE);
    huge = (unsigned char *)(((uintptr_t)huge + HUGE_BYTES - 1) & ~(uintptr_t)(HUGE_BYTES - 1));
    MUST(madvise(huge, HUGE_BYTES, MADV_HUGEPAGE));
    for (int i = 0; i < HUGE_BYTES / PAGE; i++) fill_page(huge + (size_t)i * PAGE, (uint64_t)(400000 + i));
    wl_serve(verify);
}
