/* Mappings whose flags change all the time (madvise(2), mmap(2) in the same place) while the list of mappings stays the same, in a program
 * with enough memory that its flags are read before it is stopped. Whenever its thread has stood still it compares what smaps says with
 * what it last did: so an image with flags from before the stop is found as soon as it runs again. */
#include "workload.h"

enum { PIECES = 128, SIZE = 16 * 1024, LARGE = 64 << 20, STATES = 4 };

static const struct { int on, off; const char *letters; } advice[2] = {
    {MADV_DONTDUMP, MADV_DODUMP, " dd "},
    {MADV_SEQUENTIAL, MADV_NORMAL, " sr "},
};
static unsigned char *piece[PIECES], *large;
static volatile int state[PIECES]; /* bit 0: DONTDUMP, bit 1: SEQUENTIAL */
static volatile int asked;

static void set(int i, int bit, int on) {
    MUST(madvise(piece[i], SIZE, on ? advice[bit].on : advice[bit].off));
    state[i] = on ? state[i] | 1 << bit : state[i] & ~(1 << bit);
}

static void map(int i, void *at) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0);
    piece[i] = MUST(mmap(at, at ? SIZE : 2 * SIZE, PROT_READ | PROT_WRITE, flags, -1, 0));
    state[i] = 0;
    piece[i][0] = (unsigned char)i;
}

static int at_address(unsigned long start) {
    for (int i = 0; i < PIECES; i++)
        if ((unsigned long)piece[i] == start) return i;
    return -1;
}

/* How many pieces differ from what the kernel says of them, and one of those. */
static int differ(char *which, size_t size) {
    FILE *f = MUST(fopen("/proc/self/smaps", "r") ?: (FILE *)-1);
    char line[512];
    int at = -1, seen = 0, wrong = 0;
    while (fgets(line, sizeof line, f)) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx", &start, &end) == 2) at = at_address(start);
        if (at < 0 || strncmp(line, "VmFlags:", 8)) continue;
        seen++;
        for (int bit = 0; bit < 2; bit++) {
            int is = strstr(line, advice[bit].letters) != NULL, should = state[at] >> bit & 1;
            if (is != should) snprintf(which, size, "piece %d:%sis %d, not %d", at, advice[bit].letters, is, should), wrong++;
        }
    }
    fclose(f);
    if (seen != PIECES) snprintf(which, size, "%d pieces are seen", seen), wrong++;
    return wrong;
}

/* Once more if need be: one that was saved in the middle of the list goes on at the same byte of another. */
static void compare(void) {
    char which[64];
    for (int i = 0; i < 3; i++)
        if (!differ(which, sizeof which)) return;
    wl_differs("%s", which);
}

static void *change(void *argument) {
    (void)argument;
    double last = wl_now(CLOCK_MONOTONIC);
    for (unsigned n = 0;; n++) {
        /* the first ones stay: one of each kind is there that has not changed */
        int i = STATES + (int)(n % (PIECES - STATES));
        if (asked || wl_now(CLOCK_MONOTONIC) - last > 0.0005) {
            compare();
            asked = 0;
        }
        last = wl_now(CLOCK_MONOTONIC);
        if (n / PIECES % 8 == 7) map(i, piece[i]);
        else set(i, (int)(n / PIECES % 2), (int)(n / PIECES / 2 % 2));
    }
    return NULL;
}

static void verify(void) {
    asked = 1;
    while (asked) wl_sleep(0.001);
    for (int i = 0; i < PIECES; i++) CHECK(piece[i][0] == (unsigned char)i || piece[i][0] == 0, "piece %d", i);
    long wrong = wl_wrong(large, 1 << 20, 7);
    CHECK(wrong < 0, "memory differs at %ld", wrong);
}

int main(void) {
    wl_init();
    /* with holes around it, so that no piece becomes a part of it */
    large = MUST(mmap(NULL, LARGE + 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    MUST(mprotect(large, SIZE, PROT_NONE));
    MUST(mprotect(large + SIZE + LARGE, SIZE, PROT_NONE));
    large += SIZE;
    memset(large, 1, LARGE);
    wl_fill(large, 1 << 20, 7);
    for (int i = 0; i < PIECES; i++) {
        map(i, NULL);
        /* with a hole behind it, so that they do not become one */
        MUST(munmap(piece[i] + SIZE, SIZE));
        for (int bit = 0; bit < 2; bit++) set(i, bit, i >> bit & 1);
    }
    pthread_t t;
    MUST0(pthread_create(&t, NULL, change, NULL));
    wl_serve(verify);
}
