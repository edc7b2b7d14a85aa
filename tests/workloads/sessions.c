/* A process tree: sessions, process groups, grandchildren, an orphan, zombies with their statuses, and waiting for those that end later. */
#include "workload.h"

enum { PLAIN, GROUP, SAME_GROUP, SESSION, STOPPER, KINDS };
static struct { pid_t pid, group, session; } children[KINDS];
static pid_t exited, killed, grandchild_parent;
static volatile struct { pid_t grandchild, orphan; int grandchild_ticks; } *shared;

static pid_t make(int kind) {
    pid_t pid = MUST(fork());
    if (!pid) {
        sigset_t none;
        sigemptyset(&none);
        MUST0(pthread_sigmask(SIG_SETMASK, &none, NULL)); /* it must die of SIGTERM */
        if (kind == SESSION) setsid();
        else if (kind == GROUP) setpgid(0, 0);
        for (;;) pause();
    }
    if (kind == GROUP) setpgid(pid, pid);
    if (kind == SAME_GROUP) MUST(setpgid(pid, children[GROUP].pid));
    if (kind == SESSION)
        while (getsid(pid) != pid) wl_sleep(0.001);
    children[kind].pid = pid;
    children[kind].group = getpgid(pid);
    children[kind].session = getsid(pid);
    return pid;
}

static char state_of(pid_t pid) {
    char path[64], state = '?';
    sprintf(path, "/proc/%d/stat", pid);
    if (access(path, F_OK)) return '-';
    char *text = wl_slurp(path, NULL), *end = strrchr(text, ')');
    if (end) state = end[2];
    free(text);
    return state;
}

static pid_t parent_of(pid_t pid) {
    char path[64];
    sprintf(path, "/proc/%d/stat", pid);
    char *text = wl_slurp(path, NULL), *end = strrchr(text, ')');
    int parent = end ? atoi(end + 4) : -1;
    free(text);
    return parent;
}

static void make_zombies(void) {
    exited = MUST(fork());
    if (!exited) _exit(7);
    killed = MUST(fork());
    if (!killed)
        for (;;) pause();
    MUST(kill(killed, SIGKILL));
    while (state_of(exited) != 'Z' || state_of(killed) != 'Z') wl_sleep(0.001);
}

static void verify(void) {
    for (int i = 0; i < KINDS; i++) {
        CHECK(getpgid(children[i].pid) == children[i].group && getsid(children[i].pid) == children[i].session,
              "child %d: group %d session %d, were %d %d", i, getpgid(children[i].pid), getsid(children[i].pid), children[i].group,
              children[i].session);
        CHECK(parent_of(children[i].pid) == getpid(), "child %d: parent is %d", i, parent_of(children[i].pid));
        CHECK(i == STOPPER || state_of(children[i].pid) == 'S', "child %d: state %c", i, state_of(children[i].pid));
    }
    CHECK(state_of(children[STOPPER].pid) == 'T', "the stopped child: state %c", state_of(children[STOPPER].pid));
    CHECK(state_of(exited) == 'Z' && state_of(killed) == 'Z', "the zombies are %c and %c", state_of(exited), state_of(killed));
    int status = 0;
    pid_t got = waitpid(exited, &status, WNOHANG);
    CHECK(got == exited && WIFEXITED(status) && WEXITSTATUS(status) == 7, "zombie: wait gives %d status %x", got, status);
    got = waitpid(killed, &status, WNOHANG);
    CHECK(got == killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "killed zombie: wait gives %d status %x", got, status);
    CHECK(waitpid(-1, &status, WNOHANG) == 0, "wait gives a child that did not end");
    make_zombies();
    /* a child that ends now is told to its parent */
    pid_t plain = children[PLAIN].pid;
    MUST(kill(plain, SIGTERM));
    got = waitpid(plain, &status, 0);
    CHECK(got == plain && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM, "an ended child: wait gives %d status %x", got, status);
    make(PLAIN);
    /* a signal to the group reaches both members and nobody else */
    MUST(kill(-children[GROUP].pid, SIGTERM));
    for (int i = 0; i < 2; i++) {
        got = waitpid(-children[GROUP].pid, &status, 0);
        CHECK(got == children[GROUP].pid || got == children[SAME_GROUP].pid, "group: wait gives %d, %s", got, strerror(errno));
    }
    make(GROUP);
    make(SAME_GROUP);
    CHECK(parent_of(shared->grandchild) == grandchild_parent, "the grandchild's parent is %d", parent_of(shared->grandchild));
    CHECK(parent_of(shared->orphan) == 1, "the orphan's parent is %d", parent_of(shared->orphan));
    int before = shared->grandchild_ticks;
    wl_sleep(0.1);
    CHECK(shared->grandchild_ticks > before, "the grandchild stands still");
}

int main(void) {
    wl_init();
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < KINDS; i++) make(i);
    MUST(kill(children[STOPPER].pid, SIGSTOP));
    int status;
    MUST(waitpid(children[STOPPER].pid, &status, WUNTRACED));
    grandchild_parent = MUST(fork());
    if (!grandchild_parent) {
        setsid();
        if (!MUST(fork())) {
            setpgid(0, 0);
            shared->grandchild = getpid();
            for (;;) {
                shared->grandchild_ticks++;
                wl_sleep(0.005);
            }
        }
        for (;;) pause();
    }
    /* an orphan: its parent ends, and init, which is this program, inherits it */
    pid_t middle = MUST(fork());
    if (!middle) {
        pid_t pid = MUST(fork());
        if (!pid)
            for (;;) pause();
        shared->orphan = pid;
        _exit(0);
    }
    MUST(waitpid(middle, &status, 0));
    while (!shared->grandchild) wl_sleep(0.001);
    make_zombies();
    wl_serve(verify);
}
