/* Syscall user dispatch: threads that catch their own system calls with SIGSYS, and let those from one piece of code through. One is
 * busy with its selector at "block" all the time, one sleeps in a call with its selector at "allow", one sleeps in a call from the piece
 * that is let through. A fourth has nothing of it. */
#include "workload.h"
#include <linux/prctl.h>
#include <sys/ucontext.h>

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif
#define ALLOW 0
#define BLOCK 1
#define ANSWER 4242

/* The code whose calls are let through: a call, and the return from the handler. */
long gate(long number, long a, long b, long c);
void gate_return(void);
extern char gate_start[], gate_end[];
__asm__(".text\n.balign 64\n"
        "gate_start:\n"
        ".globl gate\ngate: mov %rdi, %rax\n mov %rsi, %rdi\n mov %rdx, %rsi\n mov %rcx, %rdx\n xor %r10d, %r10d\n syscall\n ret\n"
        ".globl gate_return\ngate_return: mov $15, %eax\n syscall\n hlt\n"
        "gate_end:\n");

enum { BUSY, ASLEEP, INSIDE, FREE, THREADS };
static const char *const names[THREADS] = {"the busy thread", "the one that sleeps", "the one that sleeps inside", "the free one"};
static __thread volatile unsigned char selector;
static volatile unsigned long caught[THREADS], asked[THREADS];
static volatile int wrong[THREADS];
static __thread int me;
static int to[THREADS][2], from[THREADS][2];

static void handler(int signal, siginfo_t *info, void *context) {
    (void)signal;
    ucontext_t *c = context;
    caught[me]++;
    /* SYS_USER_DISPATCH */
    if (info->si_code != 2 || info->si_syscall != SYS_getppid) wrong[me]++;
    c->uc_mcontext.gregs[REG_RAX] = ANSWER;
}

static long plain_getppid(void) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(SYS_getppid) : "rcx", "r11", "memory");
    return result;
}

/* It is caught, or is not. */
static void ask(void) {
    long wanted = me == FREE ? getpid() == 1 ? 0 : -1 : ANSWER;
    if (plain_getppid() != wanted) wrong[me]++;
    asked[me]++;
}

static void *run(void *argument) {
    me = (int)(intptr_t)argument;
    size_t len = (size_t)(gate_end - gate_start);
    if (me != FREE) MUST(prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, gate_start, len, &selector));
    for (;;) {
        if (me == BUSY) {
            selector = BLOCK;
            for (int i = 0; i < 300; i++) {
                ask();
                for (volatile int spin = 0; spin < 2000; spin++) {}
            }
            struct timespec t = {0, 2000000};
            gate(SYS_nanosleep, (long)&t, 0, 0);
            continue;
        }
        char go;
        long got = me == INSIDE ? (selector = BLOCK, gate(SYS_read, to[me][0], (long)&go, 1)) : read(to[me][0], &go, 1);
        if (got != 1) wrong[me]++;
        selector = BLOCK;
        if (me == FREE) selector = ALLOW;
        ask();
        selector = ALLOW;
        if (write(from[me][1], &go, 1) != 1) wrong[me]++;
    }
    return NULL;
}

static void verify(void) {
    unsigned long before = asked[BUSY];
    for (int i = ASLEEP; i < THREADS; i++) {
        char byte = 'x';
        unsigned long was = caught[i];
        MUST(write(to[i][1], &byte, 1));
        MUST(read(from[i][0], &byte, 1));
        CHECK(caught[i] == was + (i != FREE), "%s caught %lu calls", names[i], caught[i] - was);
    }
    for (int wait = 0; wait < 1000 && asked[BUSY] < before + 300; wait++) wl_sleep(0.01);
    CHECK(asked[BUSY] >= before + 300, "%s stands still", names[BUSY]);
    for (int i = 0; i < THREADS; i++) CHECK(wrong[i] == 0, "%s: %d calls went wrong", names[i], wrong[i]);
    CHECK(caught[BUSY] + 1 >= asked[BUSY], "%s caught %lu calls of %lu", names[BUSY], caught[BUSY], asked[BUSY]);
}

int main(void) {
    wl_init();
    struct { void (*handler)(int, siginfo_t *, void *); unsigned long flags; void (*restorer)(void); uint64_t mask; } action = {
        handler, SA_SIGINFO | 0x04000000 /* SA_RESTORER */, gate_return, 0};
    MUST(syscall(SYS_rt_sigaction, SIGSYS, &action, NULL, 8));
    for (int i = 0; i < THREADS; i++) {
        pthread_t thread;
        MUST(pipe(to[i]));
        MUST(pipe(from[i]));
        MUST0(pthread_create(&thread, NULL, run, (void *)(intptr_t)i));
    }
    wl_serve(verify);
}
