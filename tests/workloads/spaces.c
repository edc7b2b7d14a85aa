/* Processes that use one address space: what one writes or maps is there for all, each with its own pid, descriptors and, but for one, signal
 * actions. They use none of the C library, since its memory is that of the main program. */
#include "workload.h"
#include <linux/futex.h>
#include <sched.h>

enum { PLAIN, ALIKE, BELOW, THREAD, FORKED, TASKS };
static const char *const names[TASKS] = {"plain child", "child with all in common", "grandchild", "thread of the child", "forked grandchild"};
enum { REST, PEEK, MAP, INODE, ACTION, WRONG, PID, UID };

struct slot {
    int command; /* a futex; back to REST when the result is there */
    long argument, result;
    volatile long beats;
};
static struct slot in_common[TASKS], *slots[TASKS];
static char stacks[TASKS][16384] __attribute__((aligned(16)));
static volatile long word = 11;
static pid_t pids[TASKS];

#define SIZE (40 << 20) /* enough to be read from a twin */
static unsigned char *bytes;

static long call(long nr, long a, long b, long c, long d, long e, long f) {
    long result;
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(result) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return result;
}

static long act(struct slot *s) {
    static unsigned long action[4];
    static struct stat about;
    switch (s->command) {
    case PEEK: return word;
    case MAP: return call(SYS_mmap, s->argument, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    case INODE: {
        long result = call(SYS_fstat, s->argument, (long)&about, 0, 0, 0, 0);
        return result ? result : (long)about.st_ino;
    }
    case ACTION: {
        long result = call(SYS_rt_sigaction, s->argument, 0, (long)action, 8, 0, 0);
        return result ? result : (long)action[0];
    }
    case WRONG: return wl_wrong(bytes, SIZE, (uint64_t)s->argument);
    case PID: return call(SYS_getpid, 0, 0, 0, 0, 0, 0);
    case UID: return call(SYS_getuid, 0, 0, 0, 0, 0, 0);
    }
    return -ENOSYS;
}

static void serve(int task) {
    struct slot *s = slots[task];
    struct timespec soon = {0, 20000000};
    for (;; s->beats++) {
        int command = __atomic_load_n(&s->command, __ATOMIC_ACQUIRE);
        if (command == REST) {
            call(SYS_futex, (long)&s->command, FUTEX_WAIT, REST, (long)&soon, 0, 0);
            continue;
        }
        s->result = act(s);
        __atomic_store_n(&s->command, REST, __ATOMIC_RELEASE);
        call(SYS_futex, (long)&s->command, FUTEX_WAKE, 1, 0, 0, 0);
    }
}

static long ask(int task, int command, long argument) {
    struct slot *s = slots[task];
    s->argument = argument;
    __atomic_store_n(&s->command, command, __ATOMIC_RELEASE);
    call(SYS_futex, (long)&s->command, FUTEX_WAKE, 1, 0, 0, 0);
    while (__atomic_load_n(&s->command, __ATOMIC_ACQUIRE) == command) {
        struct timespec soon = {1, 0};
        call(SYS_futex, (long)&s->command, FUTEX_WAIT, command, (long)&soon, 0, 0);
    }
    return s->result;
}

/* clone(2) on a stack of its own, without the C library in the child. */
static long born(int task, long flags, void (*run)(int)) {
    long result, top = (long)(stacks[task] + sizeof stacks[task]);
    register long r10 __asm__("r10") = 0, r8 __asm__("r8") = 0;
    __asm__ volatile("syscall\n\ttest %%rax, %%rax\n\tjnz 1f\n\tmov %[task], %%edi\n\tcall *%[run]\n1:"
                     : "=a"(result)
                     : "a"(SYS_clone), "D"(flags), "S"(top), "d"(0), "r"(r10), "r"(r8), [task] "b"(task), [run] "r"(run)
                     : "rcx", "r11", "memory");
    return result;
}

#define AS_THREAD (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_SYSVSEM)

/* The child that only has memory in common has a child of the same kind, a thread, and one that has a copy; it is another user. */
static void plain(int task) {
    pids[BELOW] = (pid_t)born(BELOW, CLONE_VM | SIGCHLD, serve);
    pids[THREAD] = (pid_t)born(THREAD, AS_THREAD | CLONE_THREAD, serve);
    pids[FORKED] = (pid_t)call(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);
    if (!pids[FORKED]) {
        word = 22;
        serve(FORKED);
    }
    call(SYS_setresuid, 1234, 1234, 1234, 0, 0, 0);
    call(SYS_prctl, PR_SET_DUMPABLE, 1, 0, 0, 0, 0);
    serve(task);
}

static void ends(int task) {
    (void)task;
    call(SYS_exit_group, 7, 0, 0, 0, 0, 0);
}

static void on_signal(int signal) { (void)signal; }

static void verify(void) {
    static int round;
    for (int task = 0; task < TASKS; task++) {
        long pid = ask(task, PID, 0), uid = ask(task, UID, 0), before = slots[task]->beats;
        CHECK(pid == pids[task == THREAD ? PLAIN : task], "%s: its pid is %ld, was %d", names[task], pid, pids[task]);
        CHECK(uid == (task == PLAIN ? 1234 : 0), "%s: its user is %ld", names[task], uid);
        wl_sleep(0.06);
        CHECK(slots[task]->beats > before, "%s stands still", names[task]);
    }
    word = 1000 + ++round;
    for (int task = 0; task < TASKS; task++) {
        long got = ask(task, PEEK, 0);
        CHECK(got == (task == FORKED ? 22 : word), "%s reads %ld", names[task], got);
    }
    long at = ask(BELOW, MAP, 0x300000000000);
    CHECK(at == 0x300000000000, "the grandchild maps: %ld", at);
    if (at == 0x300000000000) {
        *(volatile char *)at = 1;
        MUST(munmap((void *)at, 4096));
    }
    CHECK(wl_wrong(bytes, SIZE, 5) == -1, "the memory of all differs at %ld", wl_wrong(bytes, SIZE, 5));
    CHECK(ask(PLAIN, WRONG, 5) == -1 && ask(FORKED, WRONG, 5) == -1, "memory differs for a child");

    int file = MUST(open("/proc/self/exe", O_RDONLY));
    struct stat s;
    MUST(fstat(file, &s));
    CHECK(ask(ALIKE, INODE, file) == (long)s.st_ino, "descriptors are not in common");
    CHECK(ask(PLAIN, INODE, file) == -EBADF && ask(BELOW, INODE, file) == -EBADF, "descriptors are in common");
    close(file);

    signal(SIGUSR2, on_signal);
    CHECK(ask(ALIKE, ACTION, SIGUSR2) == (long)on_signal, "signal actions are not in common");
    CHECK(ask(PLAIN, ACTION, SIGUSR2) == 0 && ask(BELOW, ACTION, SIGUSR2) == 0, "signal actions are in common");
    signal(SIGUSR2, SIG_DFL);
    signal(SIGTRAP, on_signal);
    CHECK(ask(PLAIN, ACTION, SIGTRAP) == (long)SIG_IGN, "the action of SIGTRAP");
    signal(SIGTRAP, SIG_DFL);

    CHECK(prctl(PR_GET_DUMPABLE) == 1, "dumpable %d", prctl(PR_GET_DUMPABLE));
    int status = 0;
    CHECK(waitpid(-1, &status, WNOHANG) == 0, "a child has ended: %x", status);
    static char stack[16384] __attribute__((aligned(16)));
    (void)stack;
    pid_t child = (pid_t)MUST(clone((int (*)(void *))(void *)ends, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7, "a new child ends with %x", status);
}

int main(void) {
    wl_init();
    for (int task = 0; task < TASKS; task++) slots[task] = in_common + task;
    slots[FORKED] = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    bytes = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    wl_fill(bytes, SIZE, 5);
    signal(SIGTRAP, SIG_IGN);
    pids[PLAIN] = (pid_t)born(PLAIN, CLONE_VM | SIGCHLD, plain);
    pids[ALIKE] = (pid_t)born(ALIKE, AS_THREAD, serve);
    while (!slots[FORKED]->beats || !slots[THREAD]->beats || !slots[BELOW]->beats || !slots[PLAIN]->beats) wl_sleep(0.005);
    signal(SIGTRAP, SIG_DFL);
    wl_serve(verify);
}
