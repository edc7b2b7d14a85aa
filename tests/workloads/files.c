/* Open files: offsets, flags, descriptions shared by dup and across fork, directories, device nodes, O_PATH, high numbers. */
#include "workload.h"
#include <dirent.h>
#include <sys/sysmacros.h>

static int rw, dup_of_rw, separate, append, wronly, directory, null, zero, urandom, path_only, high, nonblock;
static volatile struct { int question, answer; long offset; int shares; } *child;
static char seen_entries[4096];
static int flags_of[2048];

static void run_child(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        if (child->question != child->answer) {
            child->offset = lseek(rw, 0, SEEK_CUR);
            lseek(rw, 3333, SEEK_SET);
            child->answer = child->question;
        }
        wl_sleep(0.005);
    }
}

static void check_offset(const char *what, int fd, long expected) {
    long now = lseek(fd, 0, SEEK_CUR);
    CHECK(now == expected, "%s: offset %ld, was %ld", what, now, expected);
}

static void verify(void) {
    for (int fd = 3; fd < 2048; fd++) {
        int now = fcntl(fd, F_GETFL);
        int value = now == -1 ? -1 : now | fcntl(fd, F_GETFD) << 28;
        CHECK(value == flags_of[fd], "fd %d: flags %x, were %x", fd, value, flags_of[fd]);
    }
    check_offset("rw", rw, 1111);
    check_offset("dup", dup_of_rw, 1111);
    check_offset("separate", separate, 5);
    lseek(dup_of_rw, 2222, SEEK_SET);
    check_offset("rw after the dup moved", rw, 2222);
    check_offset("separate after the dup moved", separate, 5);
    child->question++;
    for (int i = 0; i < 500 && child->answer != child->question; i++) wl_sleep(0.01);
    CHECK(child->answer == child->question, "the child does not answer");
    CHECK(child->offset == 2222, "the child sees offset %ld", child->offset);
    check_offset("rw after the child moved it", rw, 3333);
    lseek(rw, 1111, SEEK_SET);

    unsigned char bytes[5000];
    CHECK(pread(rw, bytes, sizeof bytes, 0) == sizeof bytes && wl_wrong(bytes, sizeof bytes, 9) == -1, "content");
    CHECK(write(separate, "x", 1) == -1 && errno == EBADF, "a read-only file can be written");
    CHECK(read(wronly, bytes, 1) == -1 && errno == EBADF, "a write-only file can be read");
    off_t end = lseek(append, 0, SEEK_END);
    lseek(append, 0, SEEK_SET);
    MUST(write(append, "abc", 3));
    CHECK(lseek(append, 0, SEEK_CUR) == end + 3, "O_APPEND does not append");
    MUST(ftruncate(append, end));
    lseek(append, 0, SEEK_SET);

    CHECK(read(null, bytes, 1) == 0, "/dev/null");
    CHECK(read(zero, bytes, 100) == 100 && bytes[99] == 0, "/dev/zero");
    CHECK(read(urandom, bytes, 16) == 16, "/dev/urandom");
    struct stat s;
    MUST(fstat(null, &s));
    CHECK(S_ISCHR(s.st_mode) && s.st_rdev == makedev(1, 3), "/dev/null is device %lx", s.st_rdev);
    MUST(fstat(path_only, &s));
    CHECK(S_ISREG(s.st_mode) && s.st_size == 5000, "O_PATH: mode %o size %ld", s.st_mode, s.st_size);
    CHECK(read(path_only, bytes, 1) == -1 && errno == EBADF, "O_PATH can be read");
    check_offset("high", high, 17);

    /* the directory goes on where it was: together with what was read before, each name comes once */
    off_t where = lseek(directory, 0, SEEK_CUR);
    char entries[8192], all[8192];
    strcpy(all, seen_entries);
    long n;
    while ((n = syscall(SYS_getdents64, directory, entries, sizeof entries)) > 0)
        for (long i = 0; i < n;) {
            struct dirent64 *d = (struct dirent64 *)(entries + i);
            strcat(strcat(all, d->d_name), " ");
            i += d->d_reclen;
        }
    for (int i = 0; i < 40; i++) {
        char name[16];
        sprintf(name, "entry-%02d ", i);
        char *first = strstr(all, name);
        CHECK(first && !strstr(first + 1, name), "directory entry %s: %s", name, first ? "twice" : "not seen");
    }
    lseek(directory, where, SEEK_SET);
}

int main(void) {
    wl_init();
    child = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    unsigned char bytes[5000];
    wl_fill(bytes, sizeof bytes, 9);
    rw = MUST(open("/wl/rw", O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0600));
    MUST(write(rw, bytes, sizeof bytes));
    lseek(rw, 1111, SEEK_SET);
    dup_of_rw = MUST(dup(rw));
    separate = MUST(open("/wl/rw", O_RDONLY));
    lseek(separate, 5, SEEK_SET);
    append = MUST(open("/wl/append", O_CREAT | O_TRUNC | O_WRONLY | O_APPEND | O_DSYNC, 0600));
    MUST(write(append, "0123456789", 10));
    lseek(append, 0, SEEK_SET);
    wronly = MUST(open("/wl/append", O_WRONLY | O_NOFOLLOW | O_NOATIME));
    nonblock = MUST(open("/wl/rw", O_RDWR | O_NONBLOCK | O_LARGEFILE));
    null = MUST(open("/dev/null", O_RDWR));
    zero = MUST(open("/dev/zero", O_RDONLY));
    urandom = MUST(open("/dev/urandom", O_RDONLY | O_NONBLOCK));
    path_only = MUST(open("/wl/rw", O_PATH));
    int temporary = MUST(open("/wl/rw", O_RDONLY));
    high = MUST(dup3(temporary, 1777, O_CLOEXEC));
    close(temporary);
    lseek(high, 17, SEEK_SET);
    (void)mkdir("/wl/directory", 0755);
    for (int i = 0; i < 40; i++) {
        char name[64];
        sprintf(name, "/wl/directory/entry-%02d", i);
        close(MUST(open(name, O_CREAT | O_WRONLY, 0600)));
    }
    directory = MUST(open("/wl/directory", O_RDONLY | O_DIRECTORY));
    char entries[400];
    long n = MUST(syscall(SYS_getdents64, directory, entries, sizeof entries));
    for (long i = 0; i < n;) {
        struct dirent64 *d = (struct dirent64 *)(entries + i);
        strcat(strcat(seen_entries, d->d_name), " ");
        i += d->d_reclen;
    }
    if (!MUST(fork())) run_child();
    for (int fd = 3; fd < 2048; fd++) {
        int now = fcntl(fd, F_GETFL);
        flags_of[fd] = now == -1 ? -1 : now | fcntl(fd, F_GETFD) << 28;
    }
    wl_serve(verify);
}
