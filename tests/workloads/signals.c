/* Signals: actions, masks of two threads, pending ones of the process and of a thread with their siginfo, alternate stacks. */
#include "workload.h"
#include <setjmp.h>

struct kernel_action {
    void *handler;
    unsigned long flags;
    void *restorer;
    uint64_t mask;
};

static struct kernel_action actions[65];
static char *stack_of_main, *stack_of_thread;
static volatile uintptr_t handler_stack;
static sigjmp_buf back;
static sem_t go, done;
static uint64_t mask_of_main, mask_of_thread;
static pthread_t thread;

static void on_usr2(int signal, siginfo_t *info, void *context) { (void)signal, (void)info, (void)context; }
static void on_segv(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info, (void)context;
    char here;
    handler_stack = (uintptr_t)&here;
    siglongjmp(back, 1);
}

static uint64_t current_mask(void) {
    uint64_t mask = 0;
    MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, sizeof mask));
    return mask;
}

/* Cause a fault and see on which stack its handler ran. */
static void fault_on(const char *who, char *stack) {
    handler_stack = 0;
    volatile uintptr_t nowhere = 8;
    if (!sigsetjmp(back, 1)) *(volatile int *)nowhere = 1;
    CHECK(handler_stack >= (uintptr_t)stack && handler_stack < (uintptr_t)stack + SIGSTKSZ * 4, "%s: handler not on the alternate stack", who);
}

static void use_stack(char **stack) {
    *stack = malloc((size_t)SIGSTKSZ * 4);
    stack_t alt = {.ss_sp = *stack, .ss_size = (size_t)SIGSTKSZ * 4};
    MUST(sigaltstack(&alt, NULL));
}

static void check_stack(const char *who, char *stack) {
    stack_t alt;
    MUST(sigaltstack(NULL, &alt));
    CHECK(alt.ss_sp == stack && alt.ss_size == (size_t)SIGSTKSZ * 4 && alt.ss_flags == 0, "%s: alternate stack %p+%zu flags %d", who, alt.ss_sp,
          alt.ss_size, alt.ss_flags);
}

static void queue_all(void) {
    for (int i = 0; i < 3; i++) MUST(sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = 100 + i}));
    MUST(sigqueue(getpid(), SIGRTMIN + 5, (union sigval){.sival_ptr = (void *)0x123456789abcUL}));
    MUST(kill(getpid(), SIGHUP));
    MUST0(pthread_sigqueue(thread, SIGRTMIN + 6, (union sigval){.sival_int = 777}));
    MUST(syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGWINCH));
}

static void expect(const char *who, int signal, int code, void *value) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal);
    siginfo_t info = {0};
    struct timespec zero = {0, 0};
    /* not by glibc, which makes SI_USER of SI_TKILL */
    int got = (int)syscall(SYS_rt_sigtimedwait, &set, &info, &zero, 8);
    CHECK(got == signal, "%s: signal %d is not pending (%s)", who, signal, strerror(errno));
    if (got != signal) return;
    CHECK(info.si_code == code, "%s: signal %d has code %d", who, signal, info.si_code);
    CHECK(info.si_pid == getpid() && info.si_uid == getuid(), "%s: signal %d is from pid %d uid %d", who, signal, info.si_pid, info.si_uid);
    if (code == SI_QUEUE) CHECK(info.si_value.sival_ptr == value, "%s: signal %d carries %p", who, signal, info.si_value.sival_ptr);
}

static void expect_nothing(const char *who) {
    sigset_t pending;
    MUST(sigpending(&pending));
    for (int s = 1; s <= 64; s++) {
        if (s == 32 || s == 33) continue;
        CHECK(sigismember(&pending, s) != 1 || s == SIGUSR1 || s == SIGTERM, "%s: signal %d is pending too much", who, s);
    }
}

static void *other(void *argument) {
    (void)argument;
    sigset_t set;
    sigfillset(&set);
    sigdelset(&set, SIGSEGV);
    sigdelset(&set, SIGURG);
    MUST0(pthread_sigmask(SIG_SETMASK, &set, NULL));
    mask_of_thread = current_mask();
    use_stack(&stack_of_thread);
    for (;;) {
        sem_post(&done);
        CHECK(sem_wait(&go) == 0, "sem_wait: %s", strerror(errno));
        CHECK(current_mask() == mask_of_thread, "thread: mask %lx, was %lx", current_mask(), mask_of_thread);
        check_stack("thread", stack_of_thread);
        expect("thread", SIGRTMIN + 6, SI_QUEUE, (void *)777);
        fault_on("thread", stack_of_thread);
    }
    return NULL;
}

static void verify(void) {
    for (int s = 1; s <= 64; s++) {
        struct kernel_action now = {0};
        if (syscall(SYS_rt_sigaction, s, NULL, &now, 8) != 0) continue;
        struct kernel_action *was = &actions[s];
        CHECK(now.handler == was->handler && now.flags == was->flags && now.mask == was->mask && now.restorer == was->restorer,
              "action of signal %d: %p flags %lx mask %lx", s, now.handler, now.flags, now.mask);
    }
    CHECK(current_mask() == mask_of_main, "main: mask %lx, was %lx", current_mask(), mask_of_main);
    check_stack("main", stack_of_main);
    sem_post(&go);
    sem_wait(&done);
    for (long i = 0; i < 3; i++) expect("process", SIGRTMIN + 3, SI_QUEUE, (void *)(100 + i));
    expect("process", SIGRTMIN + 5, SI_QUEUE, (void *)0x123456789abcUL);
    expect("process", SIGHUP, SI_USER, NULL);
    expect("main", SIGWINCH, SI_TKILL, NULL);
    expect_nothing("process");
    fault_on("main", stack_of_main);
    queue_all();
}

int main(void) {
    wl_init();
    struct sigaction act = {.sa_sigaction = on_usr2, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER};
    sigemptyset(&act.sa_mask);
    sigaddset(&act.sa_mask, SIGINT);
    sigaddset(&act.sa_mask, SIGRTMIN + 9);
    MUST(sigaction(SIGUSR2, &act, NULL));
    act.sa_flags = SA_SIGINFO | SA_RESETHAND;
    MUST(sigaction(SIGRTMIN + 1, &act, NULL));
    act.sa_flags = SA_SIGINFO | SA_NOCLDSTOP | SA_NOCLDWAIT;
    MUST(sigaction(SIGCHLD, &act, NULL));
    signal(SIGPIPE, SIG_IGN);
    signal(SIGRTMAX, SIG_IGN);
    struct sigaction segv = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    MUST(sigaction(SIGSEGV, &segv, NULL));

    sigset_t block;
    sigemptyset(&block);
    for (int i = 3; i <= 6; i++) sigaddset(&block, SIGRTMIN + i);
    sigaddset(&block, SIGHUP);
    sigaddset(&block, SIGWINCH);
    MUST0(pthread_sigmask(SIG_BLOCK, &block, NULL));
    use_stack(&stack_of_main);
    sem_init(&go, 0, 0);
    sem_init(&done, 0, 0);
    MUST0(pthread_create(&thread, NULL, other, NULL));
    sem_wait(&done);
    for (int s = 1; s <= 64; s++) (void)!syscall(SYS_rt_sigaction, s, NULL, &actions[s], 8);
    mask_of_main = current_mask();
    queue_all();
    wl_serve(verify);
}
