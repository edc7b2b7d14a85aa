/* Has the one state that its argument names, which no image carries: a checkpoint is refused, and all must be as before. */
#include "workload.h"
#include <sched.h>
#include <sys/ptrace.h>

#define DISPATCH_ON 1

static volatile unsigned char selector; /* SYSCALL_DISPATCH_FILTER_ALLOW */
static volatile int is_there;
static volatile pid_t child;

static void rest(void) {
    for (;;) syscall(SYS_pause);
}

static void *alone(void *argument) {
    MUST(unshare((int)(intptr_t)argument));
    is_there = 1;
    rest();
    return NULL;
}

static void *sleeps_for_its_child(void *argument) {
    (void)argument;
    if ((child = vfork()) == 0) {
        child = (pid_t)syscall(SYS_getpid);
        is_there = 1;
        rest();
    }
    return NULL;
}

static int resting_child(void *argument) {
    (void)argument;
    rest();
    return 0;
}

static void made_with(int flags) {
    static char stack[64 * 1024] __attribute__((aligned(16)));
    child = MUST(clone(resting_child, stack + sizeof stack, flags | SIGCHLD, NULL));
}

static void threaded(void *(*run)(void *), int argument) {
    pthread_t thread;
    MUST0(pthread_create(&thread, NULL, run, (void *)(intptr_t)argument));
    while (!is_there) wl_sleep(0.005);
}

static void verify(void) {
    if (child) CHECK(kill(child, 0) == 0, "the child: %s", strerror(errno));
}

int main(int argc, char **argv) {
    const char *kind = argc > 1 ? argv[1] : "";
    wl_init();
    if (!strcmp(kind, "dispatch"))
        MUST(prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, DISPATCH_ON, 0, 0, &selector));
    else if (!strcmp(kind, "vfork"))
        threaded(sleeps_for_its_child, 0);
    else if (!strcmp(kind, "thread-fs"))
        threaded(alone, CLONE_FS);
    else if (!strcmp(kind, "thread-files"))
        threaded(alone, CLONE_FILES);
    else if (!strcmp(kind, "shared-memory"))
        made_with(CLONE_VM);
    else if (!strcmp(kind, "shared-handlers"))
        made_with(CLONE_VM | CLONE_SIGHAND);
    else if (!strcmp(kind, "shared-files"))
        made_with(CLONE_FILES);
    else if (!strcmp(kind, "shared-fs"))
        made_with(CLONE_FS);
    else if (!strcmp(kind, "pid-namespace"))
        made_with(CLONE_NEWPID);
    else if (!strcmp(kind, "pid-for-children"))
        MUST(unshare(CLONE_NEWPID));
    else if (!strcmp(kind, "time-for-children"))
        MUST(unshare(0x80 /* CLONE_NEWTIME */));
    else if (!strcmp(kind, "traced")) {
        made_with(0);
        MUST(ptrace(PTRACE_SEIZE, child, NULL, NULL));
    } else if (strcmp(kind, "nothing"))
        return 2;
    wl_serve(verify);
}
