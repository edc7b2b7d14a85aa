/* Memory that a background restore brings late: checked by the process, by a child that is made meanwhile, after it was moved, and
 * after a part of it was given up. Each check leaves the memory as it was. */
#include "workload.h"

enum { PAGES = 16384, PAGE = 4096 };
static unsigned char *heap;

static void fill_page(unsigned char *page, uint64_t number) { wl_fill(page, PAGE, number * 7919 + 1); }

static long wrong_in(unsigned char *base, int from, int to) {
    for (int i = from; i < to; i++)
        if (wl_wrong(base + (size_t)i * PAGE, PAGE, (uint64_t)i * 7919 + 1) != -1) return i;
    return -1;
}

static void verify(void) {
    /* a child that has the same memory, before most of it is there */
    pid_t child = MUST(fork());
    if (!child) _exit(wrong_in(heap, 0, PAGES) == -1 ? 0 : 1);
    /* given up: zero from now on, then as it was */
    unsigned char *part = heap + (size_t)1000 * PAGE;
    MUST(madvise(part, 100 * PAGE, MADV_DONTNEED));
    for (size_t i = 0; i < 100 * PAGE; i += 512) CHECK(part[i] == 0, "byte %zu of memory that was given up is %d", i, part[i]);
    for (int i = 0; i < 100; i++) fill_page(part + (size_t)i * PAGE, 1000 + i);
    /* moved and moved back */
    unsigned char *moved = mremap(heap + (size_t)8000 * PAGE, 500 * PAGE, 500 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
                                  heap + (size_t)(PAGES + 100) * PAGE);
    CHECK(moved != MAP_FAILED, "mremap: %s", strerror(errno));
    if (moved == MAP_FAILED) return;
    for (int i = 0; i < 500; i += 7)
        CHECK(wl_wrong(moved + (size_t)i * PAGE, PAGE, (uint64_t)(8000 + i) * 7919 + 1) == -1, "moved page %d", i);
    CHECK(mremap(moved, 500 * PAGE, 500 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, heap + (size_t)8000 * PAGE) != MAP_FAILED,
          "mremap back: %s", strerror(errno));
    long wrong = wrong_in(heap, 0, PAGES);
    CHECK(wrong == -1, "page %ld", wrong);
    int status;
    MUST(waitpid(child, &status, 0));
    CHECK(status == 0, "the child saw other memory (status %x)", status);
}

int main(void) {
    wl_init();
    /* room behind it, so that the place it is moved to is its own */
    heap = mmap(NULL, (size_t)(PAGES + 700) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < PAGES; i++) fill_page(heap + (size_t)i * PAGE, i);
    MUST(munmap(heap + (size_t)(PAGES + 100) * PAGE, 500 * PAGE));
    wl_serve(verify);
}
