/* A tree as it grows in the field: sessions whose leader has ended, orphans taken by init and by a subreaper, orphans of a session whose
 * leader lives, children that end with another signal than SIGCHLD, many siblings, a long line of descendants. */
#include "workload.h"
#include <linux/sched.h>
#include <sched.h>

#define SIBLINGS 100
#define DEPTH 40
#define KNOWN (SIBLINGS + DEPTH + 32)
struct known { pid_t pid, parent, group, session; int exit_signal; };
static volatile struct { struct known at[KNOWN]; int count; } *shared;
static pid_t quiet;

static struct known look(pid_t pid) {
    char path[64];
    sprintf(path, "/proc/%d/stat", pid);
    struct known k = {.pid = pid, .parent = -1};
    char *text = wl_slurp(path, NULL), *end = strrchr(text, ')');
    if (end) {
        sscanf(end + 4, "%d %d %d", &k.parent, &k.group, &k.session);
        for (int i = 0; end && i < 36; i++) end = strchr(end + 1, ' ');
        if (end) k.exit_signal = atoi(end + 1);
    }
    free(text);
    return k;
}

/* The process that calls it stays, and is known from now on by whatever it is when all are made. */
static void stay(void) {
    int n = __atomic_fetch_add(&shared->count, 1, __ATOMIC_SEQ_CST);
    shared->at[n].pid = getpid();
    for (;;) pause();
}

static void wait_for(int count) { while (shared->count < count) wl_sleep(0.001); }

static pid_t fork_with_signal(int signal) {
    struct clone_args args = {.exit_signal = (uint64_t)signal};
    return (pid_t)MUST(syscall(SYS_clone3, &args, sizeof args));
}

/* Leaves two orphans in a session, one in a group of its own whose leader stays, and a child of an orphan. */
static void leave_orphans(void) {
    if (!MUST(fork())) {
        if (!MUST(fork())) stay();
        stay();
    }
    if (!MUST(fork())) {
        setpgid(0, 0);
        stay();
    }
}

static void dead_session(void) {
    pid_t leader = MUST(fork());
    if (!leader) {
        setsid();
        leave_orphans();
        _exit(0);
    }
    MUST(waitpid(leader, NULL, 0));
}

static void living_session(void) {
    pid_t leader = MUST(fork());
    if (!leader) {
        setsid();
        pid_t middle = MUST(fork());
        if (!middle) {
            leave_orphans();
            _exit(0);
        }
        MUST(waitpid(middle, NULL, 0));
        stay();
    }
}

static void line(int depth) {
    if (MUST(fork())) return;
    if (depth > 1) line(depth - 1);
    stay();
}

static void verify(void) {
    for (int i = 0; i < shared->count; i++) {
        struct known was = shared->at[i], now = look(was.pid);
        CHECK(!memcmp(&was, &now, sizeof was), "process %d: parent %d group %d session %d signal %d, were %d %d %d %d", was.pid, now.parent,
              now.group, now.session, now.exit_signal, was.parent, was.group, was.session, was.exit_signal);
    }
    int status;
    CHECK(waitpid(-1, &status, WNOHANG) == 0, "wait gives a child that did not end");
    CHECK(waitpid(-1, &status, WNOHANG | __WCLONE) == 0, "wait gives a quiet child that did not end");
    /* who ends quietly is waited for quietly */
    MUST(kill(quiet, SIGKILL));
    CHECK(waitpid(quiet, &status, __WCLONE) == quiet && WTERMSIG(status) == SIGKILL, "the quiet child: status %x", status);
    sigset_t pending;
    MUST(sigpending(&pending));
    CHECK(!sigismember(&pending, SIGCHLD), "SIGCHLD for a quiet child");
    quiet = fork_with_signal(0);
    if (!quiet)
        for (;;) pause();
}

int main(void) {
    wl_init();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    dead_session();
    wait_for(3);
    living_session();
    wait_for(7);
    if (!MUST(fork())) {
        MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
        dead_session();
        living_session();
        stay();
    }
    wait_for(15);
    for (int i = 0; i < SIBLINGS; i++)
        if (!MUST(fork())) stay();
    line(DEPTH);
    if (!fork_with_signal(SIGUSR2)) stay();
    wait_for(16 + SIBLINGS + DEPTH);
    wl_sleep(0.05); /* orphans reach their last parent when the middle ones have ended, which was waited for */
    for (int i = 0; i < shared->count; i++) shared->at[i] = look(shared->at[i].pid);
    quiet = fork_with_signal(0);
    if (!quiet)
        for (;;) pause();
    siginfo_t info;
    struct timespec zero = {0, 0};
    while (sigtimedwait(&set, &info, &zero) > 0) {}
    wl_serve(verify);
}
