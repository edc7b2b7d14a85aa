/* Memory that changes between one checkpoint and the next, in every way that tracking of writes could miss. Each check first compares
 * all of it with what the round before has left, then changes it for the next: so an image that took a page from the wrong time is
 * found by the check after. A child of the same program, and one that another execve(2) has replaced, do the same. */
#include "workload.h"

enum { PAGE = 4096, PAGES = 512, FILE_PAGES = 16, BLOCK = 32 };

struct shared {
    sem_t go, done;
    int round, wrong;
    unsigned char pages[8][PAGE];
};

static unsigned char *heap;    /* [0,64) rewritten in part, [64,128) given up and filled in turn, the rest never touched */
static unsigned char *table;   /* a private mapping of a file */
static unsigned char *block;   /* moved there and back */
static unsigned char *again;   /* unmapped and mapped at the same place */
static unsigned char *one, *other; /* two mappings of a memfd */
static int memfd, executed = -1, feed[2];
static struct shared *forked, *replaced;
static int round_;

static uint64_t seed(int what, int page, int round) { return (uint64_t)what * 1000003 + (uint64_t)page * 101 + (uint64_t)round; }
static void fill(unsigned char *at, int what, int page, int round) { wl_fill(at, PAGE, seed(what, page, round)); }
static int is(const unsigned char *at, int what, int page, int round) { return wl_wrong(at, PAGE, seed(what, page, round)) == -1; }
static int is_zero(const unsigned char *at) {
    for (int i = 0; i < PAGE; i++)
        if (at[i]) return 0;
    return 1;
}

/* The round in which page `i` of the heap was last written: each round writes every eighth of the first 64. */
static int last_write(int i, int round) {
    if (i >= 64) return 0;
    for (int r = round; r > 0; r--)
        if (r % 8 == i % 8) return r;
    return 0;
}

static void change_heap(int round) {
    for (int i = 0; i < 64; i++)
        if (round % 8 == i % 8) {
            if (i % 2) {
                fill(heap + i * PAGE, 1, i, round);
            } else {
                /* written by the kernel */
                unsigned char page[PAGE];
                fill(page, 1, i, round);
                MUST(write(feed[1], page, PAGE));
                MUST(read(feed[0], heap + i * PAGE, PAGE));
            }
        }
    /* given up in odd rounds, filled in even ones; one page is made zero by hand */
    if (round % 2)
        MUST(madvise(heap + 64 * PAGE, 63 * PAGE, MADV_DONTNEED));
    else
        for (int i = 64; i < 127; i++) fill(heap + i * PAGE, 2, i, round);
    memset(heap + 127 * PAGE, round % 2 ? 0 : round, PAGE);
}

static int wrong_in_heap(int round) {
    for (int i = 0; i < PAGES; i++) {
        unsigned char *page = heap + i * PAGE;
        int right = i == 127              ? page[0] == (unsigned char)(round % 2 ? 0 : round) && page[PAGE - 1] == page[0]
                    : i < 64 || i > 127   ? is(page, 1, i, last_write(i, round))
                    : round % 2           ? is_zero(page)
                                          : is(page, 2, i, round);
        if (!right) return 1 + i;
    }
    return 0;
}

static void change_table(int round) {
    fill(table + PAGE, 3, 1, round);
    memset(table + 4 * PAGE, 0, PAGE);
    if (round % 2)
        MUST(madvise(table + 2 * PAGE, PAGE, MADV_DONTNEED));
    else
        fill(table + 2 * PAGE, 3, 2, round);
}

static void change_places(int round) {
    unsigned char *to = round % 2 ? block + 2 * BLOCK * PAGE : block, *from = round % 2 ? block : block + 2 * BLOCK * PAGE;
    if (mremap(from, BLOCK * PAGE, BLOCK * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) wl_differs("mremap: %s", strerror(errno));
    fill(to, 4, 0, round);
    MUST(munmap(again, BLOCK * PAGE));
    if (mmap(again, BLOCK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != again)
        wl_differs("mmap: %s", strerror(errno));
    for (int i = 0; i < BLOCK; i += 2) fill(again + i * PAGE, 5, i, round);
}

static void change_shared(int round) {
    fill(other + PAGE, 6, 1, round);
    unsigned char page[PAGE];
    fill(page, 6, 2, round);
    MUST(pwrite(memfd, page, PAGE, 2 * PAGE));
}

static void check_table(int round) {
    /* a file has pages of spaces */
    CHECK(round == 0 || is(table + PAGE, 3, 1, round), "the changed page of a file");
    CHECK(round == 0 || is_zero(table + 4 * PAGE), "the zeroed page of a file");
    if (round % 2 || round == 0)
        CHECK(table[2 * PAGE] == ' ' && table[3 * PAGE - 1] == ' ', "the page of a file that was given up has %d", table[2 * PAGE]);
    else
        CHECK(is(table + 2 * PAGE, 3, 2, round), "the second changed page of a file");
    CHECK(table[3 * PAGE] == ' ', "the untouched page of a file");
}

static void check_places(int round) {
    unsigned char *at = round % 2 ? block + 2 * BLOCK * PAGE : block;
    CHECK(is(at, 4, 0, round), "the first page of what was moved");
    for (int i = 1; i < BLOCK; i++) CHECK(is(at + i * PAGE, 4, i, 0), "page %d of what was moved", i);
    for (int i = 0; i < BLOCK; i++)
        CHECK(i % 2 ? is_zero(again + i * PAGE) : is(again + i * PAGE, 5, i, round), "page %d of what was mapped again", i);
}

static void check_shared(int round) {
    CHECK(is(one + PAGE, 6, 1, round), "a page of a memfd that was written by another mapping");
    CHECK(is(one + 2 * PAGE, 6, 2, round), "a page of a memfd that was written by pwrite(2)");
    CHECK(is(one, 6, 0, 0), "a page of a memfd that was not written");
}

/* What a child does: it checks and changes the pages of its own, of which the parent's are copies. */
static void serve_child(struct shared *s, unsigned char *own) {
    for (;;) {
        while (sem_wait(&s->go) == -1) {}
        for (int i = 0; i < 8; i++)
            if (!is(own + i * PAGE, 7, i, i % 2 ? s->round : 0)) s->wrong = 1 + i;
        for (int i = 1; i < 8; i += 2) fill(own + i * PAGE, 7, i, s->round + 1);
        s->round++;
        sem_post(&s->done);
    }
}

static unsigned char *child_pages(int round) {
    unsigned char *own = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 8; i++) fill(own + i * PAGE, 7, i, i % 2 ? round : 0);
    return own;
}

static struct shared *share(int fd) {
    struct shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (s == MAP_FAILED) _exit(4);
    return s;
}

static void ask_child(struct shared *s, const char *which) {
    MUST(sem_post(&s->go));
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += 20;
    int got;
    while ((got = sem_timedwait(&s->done, &limit)) == -1 && errno == EINTR) {}
    CHECK(got == 0, "the %s child does not answer", which);
    CHECK(s->wrong == 0, "page %d of the %s child", s->wrong - 1, which);
    s->wrong = 0;
}

static pid_t start_child(struct shared *s, unsigned char *own) {
    pid_t child = MUST(fork());
    if (!child) {
        signal(SIGTERM, SIG_DFL);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve_child(s, own);
    }
    return child;
}

static pid_t start_program(int fd) {
    pid_t child = MUST(fork());
    if (!child) {
        char number[16];
        sprintf(number, "%d", fd);
        execl("/bin/tracked", "tracked", number, (char *)NULL);
        _exit(5);
    }
    return child;
}

static unsigned char *own_pages;
static pid_t child, program;

static void end(pid_t pid) {
    MUST(kill(pid, SIGKILL));
    MUST(waitpid(pid, NULL, 0));
}

static void verify(void) {
    int wrong = wrong_in_heap(round_);
    CHECK(!wrong, "page %d of the heap in round %d", wrong - 1, round_);
    check_table(round_);
    check_places(round_);
    check_shared(round_);
    ask_child(forked, "forked");
    ask_child(replaced, "executed");
    round_++;
    change_heap(round_);
    change_table(round_);
    change_places(round_);
    change_shared(round_);
    if (round_ % 3 == 0) {
        /* new ones, which nobody has seen before */
        end(child);
        end(program);
        for (int i = 1; i < 8; i += 2) fill(own_pages + i * PAGE, 7, i, forked->round);
        child = start_child(forked, own_pages);
        program = start_program(executed);
    }
}

int main(int argc, char **argv) {
    if (argc > 1) {
        struct shared *s = share(atoi(argv[1]));
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve_child(s, child_pages(s->round));
    }
    wl_init();
    heap = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < PAGES; i++) fill(heap + i * PAGE, 1, i, 0);
    for (int i = 64; i < 127; i++) fill(heap + i * PAGE, 2, i, 0);
    memset(heap + 127 * PAGE, 0, PAGE);
    MUST(pipe(feed));
    char page[PAGE];
    memset(page, ' ', PAGE);
    int fd = MUST(open("/table", O_RDWR | O_CREAT | O_TRUNC, 0600));
    for (int i = 0; i < FILE_PAGES; i++) MUST(write(fd, page, PAGE));
    table = mmap(NULL, FILE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    MUST(close(fd));
    block = mmap(NULL, 4 * BLOCK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < BLOCK; i++) fill(block + i * PAGE, 4, i, 0);
    again = mmap(NULL, BLOCK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < BLOCK; i += 2) fill(again + i * PAGE, 5, i, 0);
    memfd = MUST(memfd_create("two", MFD_CLOEXEC));
    MUST(ftruncate(memfd, 4 * PAGE));
    one = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    other = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    for (int i = 0; i < 3; i++) fill(one + i * PAGE, 6, i, 0);
    struct shared **both[] = {&forked, &replaced};
    for (int i = 0; i < 2; i++) {
        executed = MUST(memfd_create("child", 0));
        MUST(ftruncate(executed, sizeof(struct shared)));
        *both[i] = share(executed);
        sem_init(&(*both[i])->go, 1, 0);
        sem_init(&(*both[i])->done, 1, 0);
    }
    own_pages = child_pages(0);
    /* last, so that nothing else is mapped there */
    MUST(munmap(block + 2 * BLOCK * PAGE, BLOCK * PAGE));
    child = start_child(forked, own_pages);
    program = start_program(executed);
    wl_serve(verify);
}
