/* What ties descriptions to processes: owners of signal-driven I/O (F_SETOWN, F_SETSIG, O_ASYNC) that are a process, a thread, a group;
 * SO_PEERCRED of listening unix sockets; removed working directories. */
#include "workload.h"
#include <sys/socket.h>
#include <sys/un.h>

enum { TO_PROCESS, TO_THREAD, TO_GROUP, COUNT };
static int pair[COUNT][2], quiet[2], piped[2], listening, of_child;
static pid_t child, tid;
static sem_t ready;
static volatile struct { int ready, taken, asked; char answer[1000]; } *mem;

static struct f_owner_ex owner_of(int fd) {
    struct f_owner_ex o = {-1, -1};
    MUST(fcntl(fd, F_GETOWN_EX, &o));
    return o;
}

static void own(int fd, int type, pid_t pid, int signal, int async) {
    struct f_owner_ex o = {type, pid};
    MUST(fcntl(fd, F_SETOWN_EX, &o));
    if (signal) MUST(fcntl(fd, F_SETSIG, signal));
    if (async) MUST(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_ASYNC));
}

/* Tells of the signals that only this thread can take. */
static void *run_thread(void *unused) {
    (void)unused;
    tid = gettid();
    sem_post(&ready);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 10);
    for (;;) {
        siginfo_t info;
        if (sigwaitinfo(&set, &info) > 0) mem->taken = info.si_fd;
    }
    return NULL;
}

static int name(struct sockaddr_un *a, const char *text) {
    *a = (struct sockaddr_un){.sun_family = AF_UNIX};
    strcpy(a->sun_path + 1, text);
    return (int)(sizeof(sa_family_t) + 1 + strlen(text));
}

static int listener(const char *text) {
    struct sockaddr_un a;
    int s = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    MUST(bind(s, (struct sockaddr *)&a, (socklen_t)name(&a, text)));
    MUST(listen(s, 3));
    return s;
}

/* Who a client sees. */
static void check_peer(const char *text, int accepting, pid_t pid, uid_t uid) {
    struct sockaddr_un a;
    struct ucred who;
    socklen_t len = sizeof who;
    int s = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    int length = name(&a, text);
    MUST(connect(s, (struct sockaddr *)&a, (socklen_t)length));
    MUST(getsockopt(s, SOL_SOCKET, SO_PEERCRED, &who, &len));
    CHECK(who.pid == pid && who.uid == uid && who.gid == uid, "%s listens as process %d, user %d, group %d instead of %d, %d", text, who.pid, who.uid,
          who.gid, pid, uid);
    close(s);
    if (accepting >= 0) close(MUST(accept(accepting, NULL, NULL)));
}

/* The working directory. */
static void check_removed(const char *was, mode_t mode) {
    char here[200] = "";
    struct stat st;
    CHECK(readlink("/proc/self/cwd", here, sizeof here - 1) > 0 && !strcmp(here, was), "works in %s instead of %s", here, was);
    MUST(stat(".", &st));
    CHECK(st.st_nlink == 0 && (st.st_mode & 07777) == mode && st.st_uid == 0, "working directory: %d links, mode %o, user %d", (int)st.st_nlink,
          st.st_mode, st.st_uid);
    CHECK(open("new", O_CREAT | O_WRONLY, 0600) == -1 && errno == ENOENT, "a file can be made in a removed directory: %s", strerror(errno));
}

static void run_child(void) {
    mkdir("/tmp/gone", 0711);
    MUST(mkdir("/tmp/gone/deep", 0751));
    MUST(chdir("/tmp/gone/deep"));
    MUST(setgid(1234));
    MUST(setuid(1234));
    of_child = listener("of-child");
    mem->ready = 1;
    for (;;) {
        wl_sleep(0.01);
        if (!mem->asked) continue;
        wl_differences[0] = 0;
        close(MUST(accept(of_child, NULL, NULL)));
        check_removed("/tmp/gone/deep (deleted)", 0751);
        wl_differences[sizeof mem->answer - 1] = 0;
        strcpy((char *)mem->answer, wl_differences);
        mem->asked = 0;
    }
}

static void expect(int fd, int signal, const char *what) {
    MUST(write(pair[fd][1], "x", 1));
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal);
    siginfo_t info;
    struct timespec now = {1, 0};
    int got = sigtimedwait(&set, &info, &now);
    CHECK(got == signal, "%s: no signal: %s", what, strerror(errno));
    if (got == signal && signal >= SIGRTMIN)
        CHECK(info.si_code == POLL_IN && info.si_fd == pair[fd][0], "%s: code %d, descriptor %d", what, info.si_code, info.si_fd);
    char b;
    MUST(read(pair[fd][0], &b, 1));
}

static void verify(void) {
    struct f_owner_ex o = owner_of(pair[TO_PROCESS][0]);
    CHECK(o.type == F_OWNER_PID && o.pid == getpid(), "owner: type %d, %d", o.type, o.pid);
    o = owner_of(pair[TO_THREAD][0]);
    CHECK(o.type == F_OWNER_TID && o.pid == tid, "owner thread: type %d, %d", o.type, o.pid);
    o = owner_of(pair[TO_GROUP][0]);
    CHECK(o.type == F_OWNER_PGRP && o.pid == getpgrp(), "owner group: type %d, %d", o.type, o.pid);
    o = owner_of(quiet[0]);
    CHECK(o.type == F_OWNER_PID && o.pid == child, "owner child: type %d, %d", o.type, o.pid);
    CHECK(fcntl(pair[TO_PROCESS][0], F_GETSIG) == SIGRTMIN + 8 && fcntl(quiet[0], F_GETSIG) == SIGRTMIN + 9, "signal of an owner");
    CHECK(fcntl(pair[TO_PROCESS][0], F_GETFL) & O_ASYNC && fcntl(pair[TO_GROUP][0], F_GETFL) & O_ASYNC, "O_ASYNC is gone");
    CHECK(!(fcntl(quiet[0], F_GETFL) & O_ASYNC), "O_ASYNC came by itself");
    uid_t uids[2] = {99, 99};
    MUST(fcntl(pair[TO_PROCESS][0], 17 /* F_GETOWNER_UIDS */, uids));
    CHECK(uids[0] == 0 && uids[1] == 0, "the owner was set by user %d", uids[0]);
    expect(TO_PROCESS, SIGRTMIN + 8, "process");
    expect(TO_GROUP, SIGIO, "group");
    mem->taken = -1;
    MUST(write(pair[TO_THREAD][1], "x", 1));
    for (int i = 0; i < 100 && mem->taken == -1; i++) wl_sleep(0.01);
    CHECK(mem->taken == pair[TO_THREAD][0], "thread: a signal for descriptor %d", mem->taken);
    char b;
    MUST(read(pair[TO_THREAD][0], &b, 1));
    check_peer("of-parent", listening, getpid(), 0);
    check_peer("of-child", -1, child, 1234);
    check_removed("/tmp/gone again (deleted)", 0700);
    mem->asked = 1;
    for (int i = 0; i < 200 && mem->asked; i++) wl_sleep(0.01);
    CHECK(!mem->asked && !mem->answer[0], "child: %s", (char *)mem->answer);
    CHECK(access("/tmp/gone", F_OK) == -1 && access("/tmp/gone again", F_OK) == -1, "a removed directory is back");
}

int main(void) {
    wl_init();
    mem = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    sem_init(&ready, 0, 0);
    sigset_t set;
    sigemptyset(&set);
    for (int i = 8; i <= 10; i++) sigaddset(&set, SIGRTMIN + i);
    sigaddset(&set, SIGIO);
    MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));
    MUST(setpgid(0, 0) == -1 && errno != EPERM ? -1 : 0);
    mkdir("/tmp", 0777);
    child = MUST(fork());
    if (!child) run_child();
    while (!mem->ready) wl_sleep(0.01);
    pthread_t thread;
    MUST0(pthread_create(&thread, NULL, run_thread, NULL));
    sem_wait(&ready);
    for (int i = 0; i < COUNT; i++) MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair[i]));
    MUST(pipe(quiet));
    MUST(pipe(piped));
    own(pair[TO_PROCESS][0], F_OWNER_PID, getpid(), SIGRTMIN + 8, 1);
    own(pair[TO_THREAD][0], F_OWNER_TID, tid, SIGRTMIN + 10, 1);
    own(pair[TO_GROUP][0], F_OWNER_PGRP, getpgrp(), 0, 1);
    own(quiet[0], F_OWNER_PID, child, SIGRTMIN + 9, 0);
    listening = listener("of-parent");
    MUST(rmdir("/tmp/gone/deep"));
    MUST(rmdir("/tmp/gone"));
    MUST(mkdir("/tmp/gone again", 0700));
    MUST(chdir("/tmp/gone again"));
    MUST(rmdir("/tmp/gone again"));
    wl_serve(verify);
}
