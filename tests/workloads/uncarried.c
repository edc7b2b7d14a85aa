/* Has the one state that its argument names, which no image carries: a checkpoint is refused, and all must be as before. */
#include "workload.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/auxv.h>
#include <sys/ptrace.h>

#define DISPATCH_ON 1

static volatile int is_there;
static volatile pid_t child;

static void rest(void) {
    for (;;) syscall(SYS_pause);
}

static void *is_made(void *argument) {
    (void)argument;
    is_there = 1;
    rest();
    return NULL;
}

/* Two threads have in common what their process has not. */
static void *two_alone(void *argument) {
    MUST(unshare((int)(intptr_t)argument));
    pthread_t other;
    MUST0(pthread_create(&other, NULL, is_made, NULL));
    rest();
    return NULL;
}

static pid_t forked(int flags) { return (pid_t)MUST(syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL)); }

/* A child has a child with our descriptor table, gives it up, and makes another child for us that has its new one. */
static void crossed(void) {
    volatile int *made = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!(child = forked(CLONE_FILES))) {
        if (!forked(CLONE_FILES)) rest();
        MUST(unshare(CLONE_FILES));
        if (!forked(CLONE_FILES | CLONE_PARENT)) rest();
        *made = 1;
        rest();
    }
    while (!*made) wl_sleep(0.005);
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

/* Two children share memory that their parent has not. */
static void siblings(void) {
    volatile int *made = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!(child = forked(0))) {
        static char stack[64 * 1024] __attribute__((aligned(16)));
        MUST(clone(resting_child, stack + sizeof stack, CLONE_VM | CLONE_PARENT | SIGCHLD, NULL));
        *made = 1;
        rest();
    }
    while (!*made) wl_sleep(0.005);
}

static void made_with(int flags) {
    static char stack[64 * 1024] __attribute__((aligned(16)));
    child = MUST(clone(resting_child, stack + sizeof stack, flags | SIGCHLD, NULL));
}

static int faults, is_released;
static char *page;

/* The kernel itself waits for a page that nobody brings: no signal ends that, and no tracer. */
static void *sleeps_in_the_kernel(void *argument) {
    (void)argument;
    int file = MUST(open("/proc/self/exe", O_RDONLY));
    is_there = 1;
    ssize_t got = read(file, page, 4096);
    __atomic_store_n(&is_released, got == 4096 && !memcmp(page, "\177ELF", 4), __ATOMIC_RELEASE);
    rest();
    return NULL;
}

static void stuck(void) {
    faults = (int)MUST(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    struct uffdio_api api = {.api = UFFD_API};
    MUST(ioctl(faults, UFFDIO_API, &api));
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register all = {.range = {(uintptr_t)page, 4096}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    MUST(ioctl(faults, UFFDIO_REGISTER, &all));
}

/* Brings the page: the call goes on as if it had never been asked to stop. */
static void release(void) {
    struct uffdio_zeropage zero = {.range = {(uintptr_t)page, 4096}};
    MUST(ioctl(faults, UFFDIO_ZEROPAGE, &zero));
    for (int i = 0; i < 1000 && !__atomic_load_n(&is_released, __ATOMIC_ACQUIRE); i++) wl_sleep(0.005);
    CHECK(is_released, "the read that had to wait has not ended");
}

static void threaded(void *(*run)(void *), int argument) {
    pthread_t thread;
    MUST0(pthread_create(&thread, NULL, run, (void *)(intptr_t)argument));
    while (!is_there) wl_sleep(0.005);
}

static void verify(void) {
    if (child) CHECK(kill(child, 0) == 0, "the child: %s", strerror(errno));
    if (page && !is_released) release();
}

int main(int argc, char **argv) {
    const char *kind = argc > 1 ? argv[1] : "";
    wl_init();
    if (!strcmp(kind, "dispatch"))
        MUST(prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, DISPATCH_ON, 1, 1ul << 46, NULL));
    else if (!strcmp(kind, "io-uring")) {
        static char parameters[120];
        MUST(syscall(425 /* io_uring_setup */, 4, parameters));
    } else if (!strcmp(kind, "listener")) {
        static struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog program = {1, &allow};
        MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program));
    } else if (!strcmp(kind, "dispatch-read-only")) {
        void *selector = MUST(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        MUST(prctl(59, DISPATCH_ON, 0, 0, selector));
    } else if (!strcmp(kind, "vfork"))
        threaded(sleeps_for_its_child, 0);
    else if (!strcmp(kind, "threads-fs"))
        threaded(two_alone, CLONE_FS);
    else if (!strcmp(kind, "threads-files"))
        threaded(two_alone, CLONE_FILES);
    else if (!strcmp(kind, "crossed-files"))
        crossed();
    else if (!strcmp(kind, "shared-memory"))
        siblings();
    else if (!strcmp(kind, "stuck")) {
        stuck();
        threaded(sleeps_in_the_kernel, 0);
        MUST(poll(&(struct pollfd){.fd = faults, .events = POLLIN}, 1, -1));
    } else if (!strcmp(kind, "child"))
        made_with(0);
    else if (!strcmp(kind, "pid-namespace"))
        made_with(CLONE_NEWPID);
    else if (!strcmp(kind, "pid-for-children"))
        MUST(unshare(CLONE_NEWPID));
    else if (!strcmp(kind, "time-for-children"))
        MUST(unshare(0x80 /* CLONE_NEWTIME */));
    else if (!strcmp(kind, "traced")) {
        made_with(0);
        MUST(ptrace(PTRACE_SEIZE, child, NULL, NULL));
    } else if (!strcmp(kind, "vdso")) {
        int fd = MUST(open("/proc/self/mem", O_RDWR));
        MUST(pwrite(fd, "\xcc", 1, (off_t)getauxval(AT_SYSINFO_EHDR) + 4000));
        close(fd);
    } else if (strcmp(kind, "nothing"))
        return 2;
    wl_serve(verify);
}
