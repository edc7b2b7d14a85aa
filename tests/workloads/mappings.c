/* What a mapping has beside its bytes, and what new ones will have: droppable, locked on fault, sealed, mergeable, on chosen nodes, with guard
 * pages; mlockall(MCL_FUTURE), set_mempolicy, PR_SET_MDWE. What the kernel has not is left out. */
#include "workload.h"

#include <sys/prctl.h>
#include <sys/syscall.h>

#define PAGE 4096
#define PAGES 8
#define SIZE (PAGES * PAGE)
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif
#define GUARD_INSTALL 102
#define SET_MDWE 65
#define GET_MDWE 66
#define BIND 2
#define PREFERRED 1
#define OF_ADDRESS 2

static unsigned char *droppable, *on_fault, *sealed, *mergeable, *bound, *guarded, *guarded_locked, *guarded_alone, *guarded_file;
static int has_policy, has_mdwe, requests[2], answers[2], probe[2];

static unsigned char *map(uint64_t seed, int flags) {
    /* between holes, so that it stays a mapping of its own */
    unsigned char *hole = MUST(mmap(NULL, SIZE + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    unsigned char *at = MUST(mmap(hole + PAGE, SIZE, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
    wl_fill(at, SIZE, seed);
    return at;
}

/* Whether the mapping that begins there has a flag in smaps. */
static int has(const void *at, const char *flag) {
    char *text = wl_slurp("/proc/self/smaps", NULL), start[32], wanted[8], *found;
    snprintf(start, sizeof start, "%lx-", (unsigned long)at);
    snprintf(wanted, sizeof wanted, " %s ", flag);
    int yes = 0;
    for (found = text; (found = strstr(found, start)); found++)
        if (found == text || found[-1] == '\n') break;
    if (found && (found = strstr(found, "VmFlags:"))) {
        *strchr(found, '\n') = 0;
        yes = strstr(found, wanted) != NULL;
    }
    free(text);
    return yes;
}

/* The kernel copies nothing out of a guard page. */
static int is_guard(const unsigned char *page) {
    char rest[PAGE];
    ssize_t n = write(probe[1], page, 16);
    if (n < 0) return errno == EFAULT;
    MUST(read(probe[0], rest, (size_t)n));
    return 0;
}

static void check_guards(const char *name, const unsigned char *at, long seed) {
    for (int i = 0; i < PAGES; i++) {
        int wanted = i == 2 || i == 3 || i == 6;
        CHECK(is_guard(at + i * PAGE) == wanted, "%s: page %d is %s", name, i, wanted ? "no guard" : "a guard");
        if (seed < 0 || wanted) continue;
        for (int k = 0; k < PAGE; k++)
            if (at[i * PAGE + k] != wl_byte((uint64_t)seed, (uint64_t)(i * PAGE + k))) {
                wl_differs("%s: byte %d of page %d", name, k, i);
                break;
            }
    }
}

static int guard(unsigned char *at) {
    return madvise(at + 2 * PAGE, 2 * PAGE, GUARD_INSTALL) || madvise(at + 6 * PAGE, PAGE, GUARD_INSTALL) ? -1 : 0;
}

/* What a new mapping is: 1 locked, 2 on fault. */
static int new_is(void) {
    void *page = MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    int is = has(page, "lo") | has(page, "lf") << 1;
    MUST(munmap(page, PAGE));
    return is;
}

static void verify(void) {
    if (droppable) CHECK(has(droppable, "dp"), "droppable memory is not");
    CHECK(has(on_fault, "lo") && has(on_fault, "lf"), "not locked on fault");
    CHECK(wl_wrong(on_fault, SIZE, 2) < 0, "locked memory differs");
    if (sealed) {
        CHECK(mprotect(sealed, PAGE, PROT_READ) == -1 && errno == EPERM, "not sealed: %s", strerror(errno));
        CHECK(wl_wrong(sealed, SIZE, 3) < 0, "sealed memory differs");
    }
    if (mergeable) CHECK(has(mergeable, "mg"), "not mergeable");
    CHECK(wl_wrong(bound, SIZE, 5) < 0, "bound memory differs");
    if (has_policy) {
        int mode = -1;
        unsigned long nodes[16] = {0};
        MUST(syscall(SYS_get_mempolicy, &mode, nodes, 1024, bound, OF_ADDRESS));
        CHECK(mode == BIND && nodes[0] == 1, "policy of a mapping: %d of %lx", mode, nodes[0]);
        MUST(syscall(SYS_get_mempolicy, &mode, nodes, 1024, guarded, OF_ADDRESS));
        CHECK(mode == 0, "policy of another mapping: %d", mode);
        MUST(syscall(SYS_get_mempolicy, &mode, nodes, 1024, 0, 0));
        CHECK(mode == PREFERRED && nodes[0] == 1, "policy: %d of %lx", mode, nodes[0]);
    }
    if (guarded) check_guards("guarded", guarded, 6);
    if (guarded_locked) {
        check_guards("guarded and locked", guarded_locked, 7);
        CHECK(has(guarded_locked, "lo"), "not locked");
    }
    if (guarded_alone) check_guards("guarded, not inherited", guarded_alone, 8);
    if (guarded_file) check_guards("guarded file", guarded_file, -1);
    CHECK(new_is() == 3, "a new mapping is %d, 3 wanted", new_is());
    char answer = 0;
    MUST(write(requests[1], "", 1));
    MUST(read(answers[0], &answer, 1));
    CHECK(answer == 1, "a new mapping of the child is %d, 1 wanted", answer);
    if (has_mdwe) {
        CHECK(prctl(GET_MDWE, 0, 0, 0, 0) == 1, "MDWE is %d", prctl(GET_MDWE, 0, 0, 0, 0));
        CHECK(mprotect(bound, PAGE, PROT_READ | PROT_EXEC) == -1 && errno == EACCES, "memory became executable");
    }
}

static void child(void) {
    char c;
    MUST(mlockall(MCL_FUTURE));
    while (read(requests[0], &c, 1) == 1) {
        c = (char)new_is();
        MUST(write(answers[1], &c, 1));
    }
    _exit(0);
}

int main(void) {
    wl_init();
    MUST(pipe(requests));
    MUST(pipe(answers));
    MUST(pipe(probe));
    if (MUST(fork()) == 0) {
        close(requests[1]);
        child();
    }
    void *at = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
    droppable = at == MAP_FAILED ? NULL : at;
    if (droppable) wl_fill(droppable, SIZE, 1);
    on_fault = map(2, MAP_PRIVATE);
    MUST(mlock2(on_fault, SIZE, MLOCK_ONFAULT));
    sealed = map(3, MAP_PRIVATE);
    if (syscall(462, sealed, SIZE, 0)) sealed = NULL;
    mergeable = map(4, MAP_PRIVATE);
    if (madvise(mergeable, SIZE, MADV_MERGEABLE)) mergeable = NULL;
    unsigned long node = 1;
    bound = map(5, MAP_PRIVATE);
    has_policy = !syscall(SYS_mbind, bound, SIZE, BIND, &node, 64, 0) && !syscall(SYS_set_mempolicy, PREFERRED, &node, 64);
    guarded = map(6, MAP_PRIVATE);
    if (guard(guarded)) guarded = NULL;
    if (guarded) {
        guarded_locked = map(7, MAP_PRIVATE);
        MUST(guard(guarded_locked));
        mlock(guarded_locked, SIZE);
        guarded_alone = map(8, MAP_PRIVATE);
        MUST(guard(guarded_alone));
        MUST(madvise(guarded_alone, SIZE, MADV_DONTFORK));
        int fd = MUST(open("/proc/self/exe", O_RDONLY));
        guarded_file = MUST(mmap(NULL, SIZE, PROT_READ, MAP_PRIVATE, fd, 0));
        close(fd);
        if (guard(guarded_file)) guarded_file = NULL;
    }
    MUST(mlockall(MCL_FUTURE | MCL_ONFAULT));
    has_mdwe = !prctl(SET_MDWE, 1, 0, 0, 0);
    wl_serve(verify);
}
