/* Processes that have descriptors or the working directory in common, and threads that have their own: whoever changes one changes it
 * for those and for nobody else. Each of them looks and acts for the main program, which tells it what to do. */
#include "workload.h"
#include <linux/futex.h>
#include <sched.h>
#include <sys/epoll.h>

enum { FILES, FS, BOTH, NEITHER, BELOW, BESIDE, BESIDE_TOO, THREAD_FILES, THREAD_FS, TASKS };
static const char *const names[TASKS] = {"files", "fs", "both", "neither", "below", "beside", "beside too", "thread with files", "thread with fs"};
enum { REST, INODE, CLOSE, DIRECTORY, GO, MASK, LOCK, READY_TO_READ };

static struct slot {
    int command; /* a futex; back to REST when the result is there */
    int argument;
    char path[64];
    long result;
    pid_t pid;
} *slots;

static long inode_of(const char *path, int fd) {
    struct stat s;
    return (path ? stat(path, &s) : fstat(fd, &s)) ? -errno : (long)s.st_ino;
}

/* Opens a file of its own and puts it at a number. */
static void open_at(int number, const char *path) {
    int fd = MUST(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    if (fd == number) return;
    MUST(dup2(fd, number));
    close(fd);
}

static long lock(int fd) {
    struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &all) ? -errno : 0;
}

static long act(struct slot *s) {
    switch (s->command) {
    case INODE: return inode_of(NULL, s->argument);
    case CLOSE: return close(s->argument) ? -errno : 0;
    case DIRECTORY: return inode_of(".", 0);
    case GO: return chdir(s->path) ? -errno : 0;
    case MASK: {
        mode_t old = umask(077);
        umask(old);
        return (long)old;
    }
    case LOCK: return lock(s->argument);
    case READY_TO_READ: {
        struct epoll_event event;
        return epoll_wait(s->argument, &event, 1, 0) == 1 ? event.data.fd : -1;
    }
    }
    open_at(s->argument, s->path);
    return 0;
}

static void serve(struct slot *s) {
    s->pid = (pid_t)syscall(SYS_gettid);
    for (;;) {
        int command = __atomic_load_n(&s->command, __ATOMIC_ACQUIRE);
        if (command == REST) {
            syscall(SYS_futex, &s->command, FUTEX_WAIT, REST, NULL, NULL, 0);
            continue;
        }
        s->result = act(s);
        __atomic_store_n(&s->command, REST, __ATOMIC_RELEASE);
        syscall(SYS_futex, &s->command, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
}

static long ask(int task, int command, int argument, const char *path) {
    struct slot *s = slots + task;
    s->argument = argument;
    if (path) strcpy(s->path, path);
    __atomic_store_n(&s->command, command, __ATOMIC_RELEASE);
    syscall(SYS_futex, &s->command, FUTEX_WAKE, 1, NULL, NULL, 0);
    while (__atomic_load_n(&s->command, __ATOMIC_ACQUIRE) == command) {
        struct timespec soon = {1, 0};
        syscall(SYS_futex, &s->command, FUTEX_WAIT, command, &soon, NULL, 0);
    }
    return s->result;
}

#define OPEN_AT 99

static void make(int task, int flags) {
    if (MUST(syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL)) == 0) serve(slots + task);
}

/* A process that has a child with what it has itself no more. */
static void make_between(void) {
    if (MUST(syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL)) == 0) {
        make(BELOW, CLONE_FILES);
        MUST(unshare(CLONE_FILES));
        serve(slots + NEITHER);
    }
}

static void *thread(void *argument) {
    int task = (int)(intptr_t)argument;
    if (task == THREAD_FILES) {
        MUST(unshare(CLONE_FILES));
        open_at(60, "/sharing.thread");
        int epoll = MUST(epoll_create1(EPOLL_CLOEXEC)), both[2];
        MUST(pipe(both));
        MUST(dup2(epoll, 61));
        MUST(dup2(both[0], 62));
        MUST(dup2(both[1], 63));
        close(epoll), close(both[0]), close(both[1]);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = 62};
        MUST(epoll_ctl(61, EPOLL_CTL_ADD, 62, &event));
        MUST(write(63, "x", 1));
        MUST(lock(60) ? (errno = EAGAIN, -1) : 0);
    } else {
        MUST(unshare(CLONE_FS));
        MUST(chdir("/sharing.d2"));
        umask(0027);
    }
    serve(slots + task);
    return NULL;
}

static int in(int task, const int *group) {
    for (; *group != -1; group++)
        if (*group == task) return 1;
    return 0;
}

/* Who has the file that is open at a number for some, and not for the others. */
static void check_files(const char *what, int number, const char *path, const int *group) {
    long wanted = inode_of(path, 0);
    for (int task = 0; task < TASKS; task++) {
        long got = ask(task, INODE, number, NULL);
        CHECK(got == (in(task, group) ? wanted : -EBADF), "%s: %s has inode %ld at %d, wanted %ld", what, names[task], got, number, wanted);
    }
}

static const int mine[] = {FILES, BOTH, BELOW, THREAD_FS, -1}, beside[] = {BESIDE, BESIDE_TOO, -1}, alone[] = {THREAD_FILES, -1};
static const int here[] = {FS, BOTH, THREAD_FILES, -1};

static void verify(void) {
    check_files("at first", 50, "/sharing.main", mine);
    check_files("at first", 51, "/sharing.beside", beside);
    check_files("at first", 60, "/sharing.thread", alone);
    ask(FILES, OPEN_AT, 52, "/sharing.new");
    check_files("opened by a child", 52, "/sharing.new", mine);
    CHECK(inode_of(NULL, 52) == inode_of("/sharing.new", 0), "what a child has opened is not there");
    CHECK(!ask(BELOW, CLOSE, 52, NULL), "a grandchild cannot close it");
    CHECK(inode_of(NULL, 52) == -EBADF, "what a grandchild has closed is there");
    ask(BESIDE_TOO, OPEN_AT, 53, "/sharing.new");
    check_files("opened by one beside", 53, "/sharing.new", beside);
    CHECK(!ask(BESIDE, CLOSE, 53, NULL), "the other one cannot close it");
    ask(THREAD_FILES, OPEN_AT, 54, "/sharing.new");
    check_files("opened by a thread", 54, "/sharing.new", alone);
    CHECK(!ask(THREAD_FILES, CLOSE, 54, NULL), "the thread cannot close it");

    /* a lock belongs to the table, not to the process */
    CHECK(lock(50) == 0 && ask(FILES, LOCK, 50, NULL) == 0 && ask(BELOW, LOCK, 50, NULL) == 0, "a lock is not of all who share");
    int thread_file = MUST(open("/sharing.thread", O_RDWR));
    long got = lock(thread_file);
    CHECK(got == -EAGAIN || got == -EACCES, "the lock of the thread: %ld", got);
    close(thread_file);
    CHECK(ask(THREAD_FILES, READY_TO_READ, 61, NULL) == 62, "the epoll instance of the thread");

    long d1 = inode_of("/sharing.d1", 0), d2 = inode_of("/sharing.d2", 0);
    for (int task = 0; task < TASKS; task++) {
        long directory = ask(task, DIRECTORY, 0, NULL), mask = ask(task, MASK, 0, NULL);
        CHECK(directory == (task == THREAD_FS ? d2 : d1), "at first: %s is in %ld", names[task], directory);
        CHECK(mask == (task == THREAD_FS ? 0027 : 0022), "at first: %s has umask %lo", names[task], mask);
    }
    CHECK(!ask(FS, GO, 0, "/sharing.d2"), "a child cannot go");
    umask(0077);
    CHECK(inode_of(".", 0) == d2, "a child has not taken this process with it");
    for (int task = 0; task < TASKS; task++) {
        long directory = ask(task, DIRECTORY, 0, NULL), mask = ask(task, MASK, 0, NULL);
        CHECK(directory == (in(task, here) || task == THREAD_FS ? d2 : d1), "%s is in %ld", names[task], directory);
        CHECK(mask == (in(task, here) ? 0077 : task == THREAD_FS ? 0027 : 0022), "%s has umask %lo", names[task], mask);
    }
    MUST(chdir("/sharing.d1"));
    umask(0022);
}

int main(void) {
    wl_init();
    slots = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(mkdir("/sharing.d1", 0755));
    MUST(mkdir("/sharing.d2", 0755));
    MUST(chdir("/sharing.d1"));
    umask(0022);
    open_at(51, "/sharing.beside");
    make(BESIDE, CLONE_FILES);
    make(BESIDE_TOO, CLONE_FILES);
    MUST(unshare(CLONE_FILES));
    close(51);
    make(FILES, CLONE_FILES);
    make(FS, CLONE_FS);
    make(BOTH, CLONE_FILES | CLONE_FS);
    make_between();
    while (!slots[NEITHER].pid || !slots[BELOW].pid) wl_sleep(0.005);
    open_at(50, "/sharing.main");
    MUST(lock(50) ? (errno = EAGAIN, -1) : 0);
    pthread_t made;
    MUST0(pthread_create(&made, NULL, thread, (void *)(intptr_t)THREAD_FILES));
    while (!slots[THREAD_FILES].pid) wl_sleep(0.005);
    MUST0(pthread_create(&made, NULL, thread, (void *)(intptr_t)THREAD_FS));
    while (!slots[THREAD_FS].pid) wl_sleep(0.005);
    /* the thread began with all of them; it is not to have these */
    ask(THREAD_FILES, CLOSE, 50, NULL);
    wl_serve(verify);
}
