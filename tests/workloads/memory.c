/* Memory: anonymous, of files and shared, with every protection, holes, flags and advice; the layout to the byte, as /proc/self/maps has it. */
#include "workload.h"
#include <malloc.h>
#include <setjmp.h>

#define PAGE 4096UL
static char *layout, *flags;
static sigjmp_buf back;
static void on_segv(int s) { (void)s; siglongjmp(back, 1); }

static struct area {
    const char *name;
    size_t pages;
    int prot, flags;
    const char *path;
    unsigned char *at;
} areas[] = {
    {.name = "anon rw", .pages = 300, .prot = PROT_READ | PROT_WRITE, .flags = MAP_PRIVATE | MAP_ANONYMOUS},
    {.name = "anon r", .pages = 7, .prot = PROT_READ, .flags = MAP_PRIVATE | MAP_ANONYMOUS},
    {.name = "anon none", .pages = 5, .prot = PROT_NONE, .flags = MAP_PRIVATE | MAP_ANONYMOUS},
    {.name = "anon rx", .pages = 3, .prot = PROT_READ | PROT_EXEC, .flags = MAP_PRIVATE | MAP_ANONYMOUS},
    {.name = "anon rwx", .pages = 3, .prot = PROT_READ | PROT_WRITE | PROT_EXEC, .flags = MAP_PRIVATE | MAP_ANONYMOUS},
    {.name = "anon w", .pages = 3, .prot = PROT_WRITE, .flags = MAP_PRIVATE | MAP_ANONYMOUS},
    {.name = "noreserve", .pages = 64, .prot = PROT_READ | PROT_WRITE, .flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE},
    {.name = "shared anon", .pages = 50, .prot = PROT_READ | PROT_WRITE, .flags = MAP_SHARED | MAP_ANONYMOUS},
    {.name = "shared anon r", .pages = 4, .prot = PROT_READ, .flags = MAP_SHARED | MAP_ANONYMOUS},
    {.name = "file private", .pages = 20, .prot = PROT_READ | PROT_WRITE, .flags = MAP_PRIVATE, .path = "/wl/private"},
    {.name = "file private r", .pages = 20, .prot = PROT_READ, .flags = MAP_PRIVATE, .path = "/wl/private2"},
    {.name = "file private none", .pages = 6, .prot = PROT_NONE, .flags = MAP_PRIVATE, .path = "/wl/private3"},
    {.name = "file shared", .pages = 20, .prot = PROT_READ | PROT_WRITE, .flags = MAP_SHARED, .path = "/wl/shared"},
    {.name = "file shared r", .pages = 6, .prot = PROT_READ, .flags = MAP_SHARED, .path = "/wl/shared2"},
};
#define AREAS (sizeof areas / sizeof *areas)
static unsigned char *zeros, *sparse, *shared_with_child, *wiped;
static pid_t child;

/* Lines of maps without device and inode, which another machine may number anew. */
static char *maps(void) {
    char *text = wl_slurp("/proc/self/maps", NULL), *out = calloc(1, strlen(text) + 1), *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char range[64], perms[8], offset[32], device[16], inode[32], path[512] = "";
        sscanf(line, "%63s %7s %31s %15s %31s %511[^\n]", range, perms, offset, device, inode, path);
        sprintf(out + strlen(out), "%s %s %s %s\n", range, perms, offset, path);
    }
    free(text);
    return out;
}

/* The flags of every area that a program can ask for: VmFlags less what the kernel keeps for itself. */
static char *vm_flags(void) {
    char *text = wl_slurp("/proc/self/smaps", NULL), *out = calloc(1, strlen(text) + 1), *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (strncmp(line, "VmFlags:", 8)) continue;
        char *word_save = NULL;
        for (char *w = strtok_r(line + 8, " ", &word_save); w; w = strtok_r(NULL, " ", &word_save))
            if (strcmp(w, "sd") && strcmp(w, "uw") && strcmp(w, "um") && strcmp(w, "ac") && strcmp(w, "lf")) sprintf(out + strlen(out), "%s ", w);
        strcat(out, "\n");
    }
    free(text);
    return out;
}

static void compare_lines(const char *what, const char *now, const char *was) {
    int number = 1;
    while (*now && *was) {
        size_t a = strcspn(now, "\n"), b = strcspn(was, "\n");
        if (a != b || memcmp(now, was, a)) {
            wl_differs("%s line %d is `%.*s`, was `%.*s`", what, number, (int)a, now, (int)b, was);
            return;
        }
        now += a + 1, was += b + 1, number++;
    }
    CHECK(!*now && !*was, "%s: more or fewer lines than %d: %.80s|%.80s", what, number, now, was);
}

static int faults(unsigned char *at, int write) {
    if (sigsetjmp(back, 1)) return 1;
    if (write) *(volatile unsigned char *)at = *(volatile unsigned char *)at;
    else (void)*(volatile unsigned char *)at;
    return 0;
}

static void check_area(struct area *a, size_t i) {
    long wrong;
    if (a->prot & PROT_READ) {
        CHECK(!faults(a->at, 0), "%s: cannot be read", a->name);
        wrong = wl_wrong(a->at, a->pages * PAGE, i);
        CHECK(wrong == -1, "%s: byte %ld is %d", a->name, wrong, a->at[wrong == -1 ? 0 : wrong]);
    } else {
        MUST(mprotect(a->at, a->pages * PAGE, PROT_READ));
        wrong = wl_wrong(a->at, a->pages * PAGE, i);
        CHECK(wrong == -1, "%s: byte %ld is %d", a->name, wrong, a->at[wrong == -1 ? 0 : wrong]);
        MUST(mprotect(a->at, a->pages * PAGE, a->prot));
    }
    if (a->prot == PROT_NONE) CHECK(faults(a->at, 0), "%s: can be read", a->name);
    if (!(a->prot & PROT_WRITE)) CHECK(faults(a->at, 1), "%s: can be written", a->name);
}

static void verify(void) {
    char *now = maps();
    compare_lines("maps", now, layout);
    free(now);
    now = vm_flags();
    compare_lines("VmFlags", now, flags);
    free(now);
    for (size_t i = 0; i < AREAS; i++) check_area(&areas[i], i);
    for (size_t i = 0; i < 256 * PAGE; i++)
        if (zeros[i]) {
            wl_differs("zeros: byte %zu is %d", i, zeros[i]);
            break;
        }
    for (size_t i = 0; i < 1000; i++) CHECK(sparse[i * 37 * PAGE] == wl_byte(99, i), "sparse: page %zu is %d", i * 37, sparse[i * 37 * PAGE]);
    CHECK(sparse[5 * PAGE] == 0, "sparse: a page that was never written has content");
    /* what a file has must be what the shared area has, both ways */
    struct area *file = &areas[12];
    int fd = MUST(open(file->path, O_RDWR));
    unsigned char b;
    MUST(pread(fd, &b, 1, 5));
    CHECK(b == file->at[5], "file shared: the file has %d", b);
    unsigned char other = b ^ 0xff;
    MUST(pwrite(fd, &other, 1, 5));
    CHECK(file->at[5] == other, "file shared: a write to the file is not seen");
    MUST(pwrite(fd, &b, 1, 5));
    close(fd);
    /* copy-on-write pages are not the file's */
    fd = MUST(open(areas[9].path, O_RDONLY));
    MUST(pread(fd, &b, 1, 5));
    CHECK(b == wl_byte(1009, 5), "file private: the file has changed");
    close(fd);
    /* memory shared with a child */
    unsigned before = *(volatile unsigned *)shared_with_child;
    wl_sleep(0.1);
    unsigned after = *(volatile unsigned *)shared_with_child;
    CHECK(after != before, "the child does not write to the shared memory any more");
    CHECK(wl_wrong(shared_with_child + PAGE, 3 * PAGE, 55) == -1, "shared with child: content");
    /* the heap still grows */
    unsigned char *heap = sbrk(0);
    CHECK(sbrk((intptr_t)PAGE) == heap && sbrk(-(intptr_t)PAGE) == heap + PAGE, "the program break does not move");
    if (!MUST(fork())) _exit(wiped[0] != 0 || areas[0].at[0] != wl_byte(0, 0));
    int status;
    MUST(wait(&status));
    CHECK(status == 0, "MADV_WIPEONFORK does not work: status %x", status);
}

static void make_area(struct area *a, size_t i) {
    int fd = -1;
    if (a->path) {
        fd = MUST(open(a->path, O_CREAT | O_TRUNC | O_RDWR, 0600));
        unsigned char *bytes = malloc(a->pages * PAGE);
        wl_fill(bytes, a->pages * PAGE, i + ((a->flags & MAP_PRIVATE) && (a->prot & PROT_WRITE) ? 1000 : 0));
        MUST(write(fd, bytes, a->pages * PAGE));
        free(bytes);
    }
    a->at = MUST(mmap(NULL, a->pages * PAGE, a->path && !(a->prot & PROT_WRITE) ? a->prot : PROT_READ | PROT_WRITE, a->flags, fd, 0));
    if (fd >= 0) close(fd);
    if (!a->path || (a->prot & PROT_WRITE)) wl_fill(a->at, a->pages * PAGE, i);
    MUST(mprotect(a->at, a->pages * PAGE, a->prot));
}

int main(void) {
    wl_init();
    signal(SIGSEGV, on_segv);
    /* the program's own bookkeeping must not change the layout that it compares */
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    for (size_t i = 0; i < AREAS; i++) make_area(&areas[i], i);
    zeros = MUST(mmap(NULL, 256 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(zeros, 0, 128 * PAGE);
    sparse = MUST(mmap(NULL, 40000 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (size_t i = 0; i < 1000; i++) sparse[i * 37 * PAGE] = wl_byte(99, i);
    /* holes: an area with every second page unmapped, and a page in the middle with another protection */
    unsigned char *comb = MUST(mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(comb, 1, 64 * PAGE);
    for (size_t i = 1; i < 64; i += 2) MUST(munmap(comb + i * PAGE, PAGE));
    MUST(mprotect(areas[0].at + 100 * PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
    MUST(madvise(sparse + 64 * PAGE, 64 * PAGE, MADV_DONTDUMP));
    (void)madvise(sparse, 16 * PAGE, MADV_NOHUGEPAGE);
    (void)madvise(areas[7].at, 4 * PAGE, MADV_SEQUENTIAL);
    (void)madvise(areas[9].at, 4 * PAGE, MADV_RANDOM);
    unsigned char *locked = MUST(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(locked, 3, 4 * PAGE);
    MUST(mlock(locked, 4 * PAGE));
    wiped = MUST(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(wiped, 4, 4 * PAGE);
    MUST(madvise(wiped, 4 * PAGE, MADV_WIPEONFORK));
    unsigned char *not_forked = MUST(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(not_forked, 5, 4 * PAGE);
    MUST(madvise(not_forked, 4 * PAGE, MADV_DONTFORK));
    shared_with_child = MUST(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    wl_fill(shared_with_child + PAGE, 3 * PAGE, 55);
    child = MUST(fork());
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
            ++*(volatile unsigned *)shared_with_child;
            wl_sleep(0.005);
        }
    }
    /* the first rounds leave allocations behind; only then is the layout final */
    for (int i = 0; i < 4; i++) {
        char *old_layout = layout, *old_flags = flags;
        layout = maps();
        flags = vm_flags();
        free(old_layout);
        free(old_flags);
        if (i < 3) verify();
    }
    wl_differences[0] = 0;
    wl_serve(verify);
}
