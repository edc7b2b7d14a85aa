/* Mappings whose flags change all the time (madvise(2)) while their addresses stay: what was read of them a moment ago is never to be
 * trusted. Their bytes must come through in whatever state they are met. */
#include "workload.h"

#define PIECES 8
#define SIZE (64 * 1024)

static unsigned char *piece[PIECES];

static void *change(void *argument) {
    static const int advice[] = {MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_DONTFORK, MADV_DOFORK, MADV_DONTDUMP, MADV_DODUMP};
    (void)argument;
    for (unsigned n = 0;; n++) MUST(madvise(piece[n % PIECES], SIZE, advice[n / PIECES % 6]));
    return NULL;
}

static void verify(void) {
    for (int i = 0; i < PIECES; i++) {
        long wrong = wl_wrong(piece[i], SIZE, (uint64_t)i);
        CHECK(wrong < 0, "piece %d differs at %ld", i, wrong);
    }
}

int main(void) {
    wl_init();
    for (int i = 0; i < PIECES; i++) {
        /* with a hole behind it, so that the list of mappings stays the same */
        piece[i] = MUST(mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        MUST(munmap(piece[i] + SIZE, SIZE));
        wl_fill(piece[i], SIZE, (uint64_t)i);
    }
    pthread_t t;
    MUST0(pthread_create(&t, NULL, change, NULL));
    wl_serve(verify);
}
