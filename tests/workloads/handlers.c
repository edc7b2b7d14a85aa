/* Threads that are in the middle of a signal handler, on the alternate stack, when they are stopped: registers of the code below it, which
 * the frame on that stack holds, must be right when the handler returns, and the stack must be in use before and free after. */
#include "workload.h"

#define THREADS 2
#define STACK (64 * 1024)

static volatile int leave[THREADS], inside[THREADS], returned[THREADS];
static __thread int me;

static void handler(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)context;
    stack_t now;
    volatile unsigned char local[4096];
    wl_fill((void *)local, sizeof local, (uint64_t)me);
    inside[me] = 1;
    if (me == 0)
        while (!leave[me]) {}
    else
        while (!leave[me]) wl_sleep(0.005);
    long wrong = wl_wrong((const void *)local, sizeof local, (uint64_t)me);
    CHECK(wrong == -1, "thread %d: byte %ld of the alternate stack", me, wrong);
    CHECK(info->si_code == SI_TKILL && info->si_pid == getpid(), "thread %d: siginfo", me);
    MUST(sigaltstack(NULL, &now));
    CHECK(now.ss_flags & SS_ONSTACK, "thread %d: flags %x inside the handler", me, now.ss_flags);
    leave[me] = 0;
}

/* Raises the signal with every callee-saved register, the vector registers and the x87 stack holding known values. */
static void raise_and_compare(void) {
    double x[8] = {1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5}, x_after[8];
    uint64_t v[2] = {0x1122334455667788, 0x99aabbccddeeff00}, v_after[2] = {0, 0}, kept[3] = {0, 0, 0};
    long tid = syscall(SYS_gettid), pid = getpid();
    __asm__ volatile(
        "fninit\n"
        "fldl 56(%[x])\nfldl 48(%[x])\nfldl 40(%[x])\nfldl 32(%[x])\nfldl 24(%[x])\nfldl 16(%[x])\nfldl 8(%[x])\nfldl (%[x])\n"
        "movdqu (%[v]), %%xmm15\n"
        "movq $0x1212, %%r12\nmovq $0x1313, %%r13\nmovq $0x1414, %%r14\n"
        "movq $234, %%rax\nmovq %[pid], %%rdi\nmovq %[tid], %%rsi\nmovq $12, %%rdx\n"
        "syscall\n"
        "movq %%r12, (%[kept])\nmovq %%r13, 8(%[kept])\nmovq %%r14, 16(%[kept])\n"
        "movdqu %%xmm15, (%[va])\n"
        "fstpl (%[xa])\nfstpl 8(%[xa])\nfstpl 16(%[xa])\nfstpl 24(%[xa])\nfstpl 32(%[xa])\nfstpl 40(%[xa])\nfstpl 48(%[xa])\nfstpl 56(%[xa])\n"
        :
        : [x] "r"(x), [xa] "r"(x_after), [v] "r"(v), [va] "r"(v_after), [kept] "r"(kept), [pid] "m"(pid), [tid] "m"(tid)
        : "rax", "rdi", "rsi", "rdx", "rcx", "r11", "r12", "r13", "r14", "xmm15", "memory");
    CHECK(!memcmp(x, x_after, sizeof x), "thread %d: the x87 stack", me);
    CHECK(!memcmp(v, v_after, sizeof v), "thread %d: xmm15", me);
    CHECK(kept[0] == 0x1212 && kept[1] == 0x1313 && kept[2] == 0x1414, "thread %d: r12-r14 %lx %lx %lx", me, kept[0], kept[1], kept[2]);
}

static void *run(void *argument) {
    me = (int)(intptr_t)argument;
    stack_t stack = {.ss_sp = malloc(STACK), .ss_size = STACK}, now;
    MUST(sigaltstack(&stack, NULL));
    for (;;) {
        raise_and_compare();
        MUST(sigaltstack(NULL, &now));
        CHECK(now.ss_flags == 0 && now.ss_sp == stack.ss_sp && now.ss_size == STACK, "thread %d: flags %x", me, now.ss_flags);
        returned[me] = 1;
    }
    return NULL;
}

static void await(volatile int *flag, const char *what) {
    for (int n = 0; n < 1000 && !*flag; n++) wl_sleep(0.005);
    CHECK(*flag, "no %s", what);
    *flag = 0;
}

static void verify(void) {
    for (int i = 0; i < THREADS; i++) {
        leave[i] = 1;
        await(&returned[i], "return of a handler");
        await(&inside[i], "new handler");
    }
}

int main(void) {
    wl_init();
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    MUST(sigaction(SIGUSR2, &action, NULL));
    for (int i = 0; i < THREADS; i++) {
        pthread_t thread;
        MUST0(pthread_create(&thread, NULL, run, (void *)(intptr_t)i));
        await(&inside[i], "handler");
    }
    wl_serve(verify);
}
