/* File locks of all kinds, exclusive and shared, of a parent and a child; and one who waits for each kind and must go on waiting. */
#include "workload.h"
#include <sys/file.h>

#define DIR_ "/tmp/locks"
static int flocked, shared_flock, posix, ofd, other[4];
static pid_t child, waiters[3];
static volatile struct { int got[3], child_ready; } *mem;

static struct flock range(int type, long start, long len) {
    return (struct flock){.l_type = (short)type, .l_whence = SEEK_SET, .l_start = start, .l_len = len};
}

static int file(const char *name) { return MUST(open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600)); }

/* What keeps a write lock of this range from being taken, as F_GETLK tells. */
static void holder(const char *what, int fd, int command, long start, long len, int type, long h_start, long h_len, pid_t pid) {
    struct flock l = range(F_WRLCK, start, len);
    MUST(fcntl(fd, command, &l));
    CHECK(l.l_type == type && (type == F_UNLCK || (l.l_start == h_start && l.l_len == h_len && l.l_pid == pid)),
          "%s: type %d, %ld+%ld of %d instead of type %d, %ld+%ld of %d", what, l.l_type, (long)l.l_start, (long)l.l_len, l.l_pid, type, h_start, h_len, pid);
}

static void run_child(void) {
    struct flock l = range(F_WRLCK, 500, 50);
    MUST(fcntl(posix, F_SETLK, &l));
    l = range(F_RDLCK, 700, 0);
    MUST(fcntl(posix, F_SETLK, &l));
    mem->child_ready = 1;
    for (;;) pause();
}

static void run_waiter(int which) {
    struct flock l = range(F_WRLCK, 10, 5);
    int got = which == 0 ? flock(other[0], LOCK_EX) : which == 1 ? fcntl(other[2], F_SETLKW, &l) : fcntl(other[3], F_OFD_SETLKW, &l);
    mem->got[which] = got == 0 ? 1 : -errno;
    for (;;) pause();
}

static void verify(void) {
    CHECK(flock(other[0], LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK, "flock: the exclusive one is gone");
    CHECK(flock(other[1], LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "flock: the shared one is gone");
    CHECK(flock(other[1], LOCK_SH | LOCK_NB) == 0, "flock: the shared one excludes others");
    flock(other[1], LOCK_UN);
    CHECK(flock(flocked, LOCK_EX | LOCK_NB) == 0, "flock: the holder's own is another's: %s", strerror(errno));
    /* F_OFD_GETLK asks as a description that holds nothing, so it sees the locks of this process too */
    holder("POSIX", other[2], F_OFD_GETLK, 12, 1, F_WRLCK, 10, 20, getpid());
    holder("POSIX, shared", other[2], F_OFD_GETLK, 110, 1, F_RDLCK, 100, 11, getpid());
    holder("POSIX, a hole", other[2], F_OFD_GETLK, 40, 50, F_UNLCK, 0, 0, 0);
    holder("POSIX, of the child", other[2], F_GETLK, 510, 1, F_WRLCK, 500, 50, child);
    holder("POSIX, of the child to the end", other[2], F_GETLK, 1L << 40, 1, F_RDLCK, 700, 0, child);
    holder("OFD", other[3], F_OFD_GETLK, 10, 1, F_WRLCK, 10, 5, -1);
    holder("OFD, shared", other[3], F_OFD_GETLK, 1000, 1, F_RDLCK, 1000, 0, -1);
    for (int i = 0; i < 3; i++) CHECK(mem->got[i] == 0, "waiter %d waits no more: %d", i, mem->got[i]);
    for (int i = 0; i < 3; i++) CHECK(kill(waiters[i], 0) == 0, "waiter %d is gone", i);
}

/* The locks go one after the other: everyone who waited gets his. */
static void finish(void) {
    flock(flocked, LOCK_UN);
    struct flock l = range(F_UNLCK, 0, 0);
    fcntl(posix, F_SETLK, &l);
    fcntl(ofd, F_OFD_SETLK, &l);
    for (int i = 0; i < 3; i++)
        for (int tries = 0; mem->got[i] == 0 && tries < 200; tries++) wl_sleep(0.01);
    for (int i = 0; i < 3; i++) CHECK(mem->got[i] == 1, "waiter %d did not get its lock: %d", i, mem->got[i]);
}

/* Everything as it is expected to be, with new waiters. */
static void set_up(void) {
    for (int i = 0; i < 3; i++) {
        kill(waiters[i], SIGKILL);
        waitpid(waiters[i], NULL, 0);
        mem->got[i] = 0;
    }
    MUST(flock(flocked, LOCK_EX));
    struct flock l = range(F_WRLCK, 10, 20);
    MUST(fcntl(posix, F_SETLK, &l));
    l = range(F_RDLCK, 100, 11);
    MUST(fcntl(posix, F_SETLK, &l));
    l = range(F_WRLCK, 10, 5);
    MUST(fcntl(ofd, F_OFD_SETLK, &l));
    l = range(F_RDLCK, 1000, 0);
    MUST(fcntl(ofd, F_OFD_SETLK, &l));
    for (int i = 0; i < 3; i++) {
        waiters[i] = MUST(fork());
        if (!waiters[i]) {
            close(flocked), close(ofd);
            other[i == 0 ? 0 : i + 1] = file(i == 0 ? DIR_ "/flock" : i == 1 ? DIR_ "/posix" : DIR_ "/ofd");
            run_waiter(i);
        }
    }
    wl_sleep(0.1);
}

static void verify_all(void) {
    verify();
    finish();
    set_up();
}

int main(void) {
    wl_init();
    mem = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    mkdir("/tmp", 0777);
    mkdir(DIR_, 0700);
    flocked = file(DIR_ "/flock"), other[0] = file(DIR_ "/flock");
    shared_flock = file(DIR_ "/shared"), other[1] = file(DIR_ "/shared");
    posix = file(DIR_ "/posix"), other[2] = file(DIR_ "/posix");
    ofd = file(DIR_ "/ofd"), other[3] = file(DIR_ "/ofd");
    MUST(flock(shared_flock, LOCK_SH));
    for (int i = 0; i < 3; i++) {
        waiters[i] = MUST(fork());
        if (!waiters[i])
            for (;;) pause();
    }
    child = MUST(fork());
    if (!child) {
        close(flocked), close(ofd);
        run_child();
    }
    while (!mem->child_ready) wl_sleep(0.01);
    set_up();
    wl_serve(verify_all);
}
