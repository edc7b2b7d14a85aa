/* What a process is: name, directory, umask, executable, arguments, environment, auxiliary vector, and its place in the address space. */
#include "workload.h"
#include <sys/auxv.h>
#include <sys/personality.h>

static const char *files[] = {"/proc/self/comm", "/proc/self/cmdline", "/proc/self/environ", "/proc/self/auxv", "/proc/self/personality"};
#define FILES (sizeof files / sizeof *files)
static char *was[FILES];
static size_t lengths[FILES];
static char *exe, *cwd, *root;
static pid_t pid, parent, session, group;
static int dumpable, timer_slack, pdeathsig, oom, thp;

static char *link_of(const char *path) {
    static char text[4096];
    ssize_t n = readlink(path, text, sizeof text - 1);
    text[n < 0 ? 0 : n] = 0;
    return strdup(text);
}

static int oom_score(void) {
    char *text = wl_slurp("/proc/self/oom_score_adj", NULL);
    int value = atoi(text);
    free(text);
    return value;
}

static void check_text(const char *what, const char *now, const char *before) {
    CHECK(!strcmp(now, before), "%s is %s, was %s", what, now, before);
}

static void verify(void) {
    for (size_t i = 0; i < FILES; i++) {
        size_t n;
        char *now = wl_slurp(files[i], &n);
        CHECK(n == lengths[i] && !memcmp(now, was[i], n), "%s differs: %zu bytes, were %zu; begins %.40s", files[i], n, lengths[i], now);
        free(now);
    }
    check_text("exe", link_of("/proc/self/exe"), exe);
    check_text("cwd", link_of("/proc/self/cwd"), cwd);
    check_text("root", link_of("/proc/self/root"), root);
    CHECK(access("here-we-are", F_OK) == 0, "cwd is another directory");
    mode_t mask = umask(0);
    umask(mask);
    CHECK(mask == 0137, "umask %o", mask);
    CHECK(getpid() == pid && getppid() == parent && getsid(0) == session && getpgrp() == group, "ids: pid %d ppid %d sid %d pgrp %d", getpid(),
          getppid(), getsid(0), getpgrp());
    CHECK(prctl(PR_GET_DUMPABLE) == dumpable, "dumpable %d, was %d", prctl(PR_GET_DUMPABLE), dumpable);
    CHECK(prctl(PR_GET_TIMERSLACK) == timer_slack, "timer slack %d", prctl(PR_GET_TIMERSLACK));
    CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == thp, "THP disable %d", prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
    int now;
    MUST(prctl(PR_GET_PDEATHSIG, &now));
    CHECK(now == pdeathsig, "parent death signal %d", now);
    int subreaper;
    MUST(prctl(PR_GET_CHILD_SUBREAPER, &subreaper));
    CHECK(subreaper == 1, "not a child subreaper any more");
    CHECK(oom_score() == oom, "oom_score_adj %d, was %d", oom_score(), oom);
    CHECK(getauxval(AT_SYSINFO_EHDR) != 0, "no vdso");
    CHECK(!strcmp(getenv("CHANGED") ?: "", "after exec"), "environment variable CHANGED is %s", getenv("CHANGED"));
}

int main(int argc, char **argv) {
    wl_init();
    /* a title written over the arguments, as daemons do */
    for (int i = 1; i < argc; i++) memset(argv[i], 'a' + i, strlen(argv[i]));
    prctl(PR_SET_NAME, "i am (renamed) ");
    MUST(mkdir("/wl/deep", 0755) == -1 && errno != EEXIST ? -1 : 0);
    MUST(chdir("/wl/deep"));
    close(MUST(open("here-we-are", O_CREAT | O_WRONLY, 0644)));
    umask(0137);
    setenv("CHANGED", "after exec", 1);
    MUST(prctl(PR_SET_TIMERSLACK, 123456));
    MUST(prctl(PR_SET_PDEATHSIG, SIGUSR2));
    signal(SIGUSR2, SIG_IGN);
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    (void)prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    for (size_t i = 0; i < FILES; i++) was[i] = wl_slurp(files[i], &lengths[i]);
    exe = link_of("/proc/self/exe");
    cwd = link_of("/proc/self/cwd");
    root = link_of("/proc/self/root");
    pid = getpid(), parent = getppid(), session = getsid(0), group = getpgrp();
    dumpable = prctl(PR_GET_DUMPABLE);
    timer_slack = prctl(PR_GET_TIMERSLACK);
    thp = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
    prctl(PR_GET_PDEATHSIG, &pdeathsig);
    oom = oom_score();
    wl_serve(verify);
}
