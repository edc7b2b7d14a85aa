/* Four threads write memory all the time. Each page holds the number of its last change, bytes that follow from that number and the
 * page's place, and a sum over both; a thread that comes back to a page checks all of it before it writes the next. So a page that is
 * old, zero, mixed of two moments or another's is found, whichever moment was saved. A table says what number each page must have. */
#include "workload.h"

enum { PAGE = 4096, WORDS = PAGE / 8, THREADS = 4, PAGES = 1024 };
static uint64_t (*memory)[WORDS];
static uint64_t expected[THREADS * PAGES];
static volatile uint64_t rounds[THREADS];

static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

static void check(long page) {
    uint64_t *words = memory[page], sum = 0, number = expected[page];
    if (!number) return;
    if (words[0] != number) wl_differs("page %ld holds change %lu instead of %lu", page, (unsigned long)words[0], (unsigned long)number);
    for (int i = 0; i < WORDS - 1; i++) sum = mix(sum ^ words[i]);
    if (words[WORDS - 1] != sum) wl_differs("page %ld has a wrong sum", page);
}

static void change(long page, uint64_t number) {
    uint64_t *words = memory[page], sum = 0;
    words[0] = number;
    for (int i = 1; i < WORDS - 1; i++) words[i] = mix(number * PAGES * THREADS + (uint64_t)page) + (uint64_t)i;
    for (int i = 0; i < WORDS - 1; i++) sum = mix(sum ^ words[i]);
    words[WORDS - 1] = sum;
    expected[page] = number;
}

static void *churn(void *which) {
    long first = (long)which * PAGES;
    for (uint64_t number = 1;; number++) {
        long page = first + (long)(mix(number + (uint64_t)which) % PAGES);
        check(page);
        change(page, number);
        rounds[(long)which] = number;
        /* leaves processors to others, also under a test that runs beside */
        if (number % 64 == 0) wl_sleep(0.001);
    }
    return NULL;
}

/* Every thread goes on, and has found nothing. */
static void verify(void) {
    for (int i = 0; i < THREADS; i++) {
        uint64_t before = rounds[i];
        for (int tries = 0; rounds[i] < before + 256 && tries < 2000; tries++) wl_sleep(0.005);
        CHECK(rounds[i] >= before + 256, "thread %d stands still", i);
    }
}

int main(void) {
    wl_init();
    memory = mmap(NULL, (size_t)THREADS * PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (long page = 0; page < THREADS * PAGES; page++) change(page, 1);
    for (long i = 0; i < THREADS; i++) {
        pthread_t thread;
        MUST0(pthread_create(&thread, NULL, churn, (void *)i));
    }
    wl_serve(verify);
}
