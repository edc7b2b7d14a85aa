/* Files in memory: everything that a tmpfs can hold, POSIX shared memory and named semaphores, programs and open files on it. */
#include "workload.h"
#include <dirent.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/xattr.h>

static struct shared { int question, answer; unsigned char bytes[1 << 20]; } *shm;
static sem_t *asks, *answers;
static int open_file, deleted, path_only, listener;
static unsigned char *private_map;
static char *seen;
static size_t seen_used;

static void note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    seen = realloc(seen, seen_used + (1 << 13));
    seen_used += (size_t)vsnprintf(seen + seen_used, 1 << 13, format, args);
    va_end(args);
}

static uint64_t hash_of(const char *path) {
    uint64_t hash = 14695981039346656037ULL;
    static unsigned char bytes[1 << 16];
    int fd = open(path, O_RDONLY | O_NOATIME | O_CLOEXEC);
    ssize_t n;
    while (fd >= 0 && (n = read(fd, bytes, sizeof bytes)) > 0)
        for (ssize_t i = 0; i < n; i++) hash = (hash ^ bytes[i]) * 1099511628211ULL;
    close(fd);
    return hash;
}

static void note_attributes(const char *path) {
    char names[4096], value[4096];
    ssize_t length = llistxattr(path, names, sizeof names);
    for (ssize_t i = 0; i < length; i += (ssize_t)strlen(names + i) + 1) {
        ssize_t n = lgetxattr(path, names + i, value, sizeof value);
        note(" %s=", names + i);
        for (ssize_t b = 0; b < n; b++) note("%02x", (unsigned char)value[b]);
    }
}

/* All that can be seen of a tree, in the order in which it is listed; other file systems are left out. */
static void note_tree(const char *path, dev_t dev) {
    struct stat s;
    if (lstat(path, &s)) return note("%s: %s\n", path, strerror(errno));
    if (s.st_dev != dev) return note("%s mount\n", path);
    note("%s %o %u:%u %lu %lx", path, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_rdev);
    note(" %ld %ld", s.st_size, S_ISDIR(s.st_mode) ? 0 : s.st_blocks);
    bool is_mapped = strstr(path, "/shared") || strstr(path, "/sem.");
    /* a socket that is open gets a new file, which its directory shows; the first write to a mapped page is a change */
    if (!strstr(path, "/live") && !is_mapped) note(" %ld.%09ld", s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
    note_attributes(path);
    if (S_ISREG(s.st_mode) && !is_mapped) note(" %lx", hash_of(path));
    char target[256] = "";
    if (S_ISLNK(s.st_mode) && readlink(path, target, sizeof target - 1) > 0) note(" -> %s", target);
    note("\n");
    if (!S_ISDIR(s.st_mode)) return;
    DIR *directory = fdopendir(MUST(open(path, O_RDONLY | O_NOATIME | O_DIRECTORY)));
    struct dirent *d;
    char inner[8192];
    while ((d = readdir(directory)))
        if (strcmp(d->d_name, ".") && strcmp(d->d_name, "..")) {
            snprintf(inner, sizeof inner, "%s/%s", path, d->d_name);
            note_tree(inner, dev);
        }
    closedir(directory);
}

static void look(void) {
    static const char *const points[] = {"/dev", "/dev/shm", "/run", "/tmp"};
    seen_used = 0;
    for (size_t i = 0; i < sizeof points / sizeof *points; i++) {
        struct stat s;
        MUST(stat(points[i], &s));
        note_tree(points[i], s.st_dev);
    }
}

static void compare(const char *was) {
    const char *a = was, *b = seen;
    while (*a && *b) {
        size_t n = strcspn(a, "\n"), m = strcspn(b, "\n");
        if (n != m || memcmp(a, b, n)) {
            wl_differs("was [%.*s] is [%.*s]", (int)n, a, (int)m, b);
            return;
        }
        a += n + 1;
        b += m + 1;
    }
    CHECK(!*a && !*b, "%s: [%.80s]", *a ? "missing" : "too much", *a ? a : b);
}

/* Answers through memory that it has mapped itself. */
static void run_child(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = MUST(shm_open("/shared", O_RDWR, 0));
    struct shared *own = MUST(mmap(NULL, sizeof *own, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    for (;;) {
        if (sem_wait(asks)) continue;
        own->answer = own->question + 1000;
        sem_post(answers);
    }
}

static char *first;

static void verify(void) {
    look();
    compare(first);
    CHECK(wl_wrong(shm->bytes, sizeof shm->bytes, 21) == -1, "shared memory");
    shm->question++;
    sem_post(asks);
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += 5;
    CHECK(!sem_timedwait(answers, &limit), "the child does not answer: %s", strerror(errno));
    CHECK(shm->answer == shm->question + 1000, "the child's memory is another: %d", shm->answer);
    int value = -1;
    sem_t *again = sem_open("/unused", 0);
    CHECK(again != SEM_FAILED && !sem_getvalue(again, &value) && value == 7, "semaphore: %d", value);
    if (again != SEM_FAILED) sem_close(again);

    struct stat a, b;
    MUST(fstat(open_file, &a));
    MUST(stat("/tmp/open", &b));
    CHECK(a.st_ino == b.st_ino && a.st_dev == b.st_dev, "the open file is not the one with its name");
    CHECK(lseek(open_file, 0, SEEK_CUR) == 4321, "offset of the open file");
    MUST(fstat(path_only, &a));
    MUST(lstat("/run/inner/file", &b));
    CHECK(a.st_ino == b.st_ino, "O_PATH file");
    unsigned char bytes[5000];
    MUST(fstat(deleted, &a));
    CHECK(!a.st_nlink && pread(deleted, bytes, sizeof bytes, 0) == sizeof bytes && wl_wrong(bytes, sizeof bytes, 23) == -1, "deleted file");
    CHECK(wl_wrong(private_map, 4096, 22) == -1 && private_map[4096] == 'p', "private mapping");

    int client = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    struct sockaddr_un name = {AF_UNIX, "/run/live/socket"};
    CHECK(!connect(client, (struct sockaddr *)&name, sizeof name), "connect: %s", strerror(errno));
    close(MUST(accept(listener, NULL, NULL)));
    close(client);
}

static int filled(const char *path, mode_t mode, size_t length, uint64_t seed) {
    int fd = MUST(open(path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
    unsigned char *bytes = malloc(length + 1);
    wl_fill(bytes, length, seed);
    CHECK(write(fd, bytes, length) == (ssize_t)length, "write %s", path);
    free(bytes);
    MUST(fchmod(fd, mode));
    return fd;
}

static void make_files(void) {
    umask(0);
    MUST(mkdir("/run/inner", 03775));
    MUST(mkdir("/run/inner/empty", 0500));
    close(filled("/run/inner/file", 0640, 10000, 1));
    MUST(chown("/run/inner/file", 12, 34));
    MUST(link("/run/inner/file", "/run/second name"));
    MUST(link("/run/inner/file", "/run/inner/empty/third"));
    close(filled("/run/program", 06755, 5, 2));
    close(filled("/run/nothing", 0, 0, 0));
    MUST(symlink("/nowhere/at all", "/run/dangling"));
    MUST(symlink("../etc/passwd", "/run/inner/up"));
    MUST(lchown("/run/dangling", 1, 2));
    MUST(mkfifo("/run/fifo", 0622));
    MUST(mknod("/run/old socket", S_IFSOCK | 0700, 0));
    MUST(mknod("/run/whiteout", S_IFCHR | 0600, makedev(0, 0)));
    MUST(mknod("/dev/extra", S_IFCHR | 0640, makedev(1, 3)));
    MUST(mknod("/dev/block", S_IFBLK | 0600, makedev(7, 99)));
    MUST(link("/run/fifo", "/run/inner/fifo"));
    MUST(unlink("/dev/full"));
    MUST(chmod("/dev/tty", 0600));
    char name[300] = "/run/odd\n\xff\x01\"\\name";
    close(filled(name, 0600, 1, 3));
    memset(name + 5, 'x', 255);
    name[260] = 0;
    close(filled(name, 0600, 2, 3));

    int sparse = filled("/tmp/sparse", 0600, 100, 4);
    MUST(pwrite(sparse, "middle", 6, (50 << 20) + 1));
    MUST(ftruncate(sparse, 100 << 20));
    close(sparse);
    int reserved = MUST(open("/tmp/reserved", O_CREAT | O_RDWR, 0600));
    MUST0(posix_fallocate(reserved, 0, 3 << 20));
    MUST(pwrite(reserved, "written", 7, 1 << 20));
    close(reserved);
    close(filled("/tmp/large", 0600, (3 << 20) + 1234, 5));
    for (int i = 0; i < 300; i++) {
        sprintf(name, "/tmp/many-%d", i * 7919 % 300);
        close(filled(name, 0600, (size_t)i, (uint64_t)i));
    }
    for (int i = 0; i < 300; i += 3) {
        sprintf(name, "/tmp/many-%d", i);
        MUST(unlink(name));
    }
    char deep[4096] = "/tmp/deep";
    for (int i = 0; i < 100; i++) {
        MUST(mkdir(deep, 0755));
        strcat(deep, "/a directory in another one");
    }

    setxattr("/run/inner", "user.directory", "\0\xff binary", 9, 0);
    setxattr("/run/inner/file", "user.file", "value", 5, 0);
    /* user 5 may read and write; mask rw */
    static const unsigned char acl[] = {2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 6, 0, 5, 0, 0, 0, 4, 0, 4, 0,
                                        255, 255, 255, 255, 16, 0, 6, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255};
    MUST(setxattr("/tmp/large", "system.posix_acl_access", acl, sizeof acl, 0));
    MUST(setxattr("/run/inner/empty", "system.posix_acl_default", acl, sizeof acl, 0));
    /* CAP_NET_BIND_SERVICE, permitted and effective */
    static const unsigned char cap[20] = {1, 0, 0, 2, 0, 4};
    close(filled("/run/capable", 0755, 10, 6));
    MUST(setxattr("/run/capable", "security.capability", cap, sizeof cap, 0));
    struct timespec old[2] = {{1, 2}, {-3, 999999999}};
    MUST(utimensat(AT_FDCWD, "/run/nothing", old, 0));
    MUST(utimensat(AT_FDCWD, "/run/dangling", old, AT_SYMLINK_NOFOLLOW));
}

static void run_program_on_tmpfs(void) {
    size_t length;
    char *text = wl_slurp("/proc/self/exe", &length);
    int fd = MUST(open("/tmp/program", O_CREAT | O_WRONLY | O_CLOEXEC, 0755));
    MUST(write(fd, text, length));
    close(fd);
    free(text);
    if (!MUST(fork())) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl("/tmp/program", "program", "sleep", NULL);
        _exit(9);
    }
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "sleep"))
        for (;;) pause();
    wl_init();
    make_files();
    int fd = MUST(shm_open("/shared", O_CREAT | O_EXCL | O_RDWR, 0600));
    MUST(ftruncate(fd, sizeof *shm));
    shm = MUST(mmap(NULL, sizeof *shm, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    close(fd);
    wl_fill(shm->bytes, sizeof shm->bytes, 21);
    asks = sem_open("/asks", O_CREAT | O_EXCL, 0600, 0);
    answers = sem_open("/answers", O_CREAT | O_EXCL, 0600, 0);
    sem_t *unused = sem_open("/unused", O_CREAT | O_EXCL, 0600, 7);
    CHECK(asks != SEM_FAILED && answers != SEM_FAILED && unused != SEM_FAILED, "sem_open");
    sem_close(unused);
    if (!MUST(fork())) run_child();
    run_program_on_tmpfs();

    open_file = filled("/tmp/open", 0600, 20000, 22);
    lseek(open_file, 4321, SEEK_SET);
    private_map = MUST(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, open_file, 0));
    private_map[4096] = 'p';
    deleted = filled("/tmp/deleted", 0600, 5000, 23);
    MUST(unlink("/tmp/deleted"));
    path_only = MUST(open("/run/inner/file", O_PATH));
    MUST(mkdir("/run/live", 0755));
    listener = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    struct sockaddr_un name = {AF_UNIX, "/run/live/socket"};
    MUST(bind(listener, (struct sockaddr *)&name, sizeof name));
    MUST(listen(listener, 5));
    wl_sleep(0.2);
    look();
    first = strdup(seen);
    wl_serve(verify);
}
