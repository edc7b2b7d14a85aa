/* Who a process is: user and group ids of all kinds, groups, capability sets, securebits, no_new_privs, and two seccomp filters. A second
 * thread has other credentials than the first. */
#include "workload.h"
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <stddef.h>
#include <sys/fsuid.h>

static const char *keys[] = {"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters"};
#define KEYS (sizeof keys / sizeof *keys)
static char *of_main[KEYS], *of_thread[KEYS];
static int securebits;
static sem_t go, done;
static char thread_file[64];

static void load_filter(int number, int error) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

static void set_caps(uint64_t effective, uint64_t permitted, uint64_t inheritable) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    for (int i = 0; i < 2; i++) {
        data[i].effective = (uint32_t)(effective >> (32 * i));
        data[i].permitted = (uint32_t)(permitted >> (32 * i));
        data[i].inheritable = (uint32_t)(inheritable >> (32 * i));
    }
    MUST(syscall(SYS_capset, &header, data));
}

static void look(const char *file, char **into) {
    for (size_t i = 0; i < KEYS; i++) into[i] = wl_status_of(file, keys[i]);
}

static void compare(const char *who, const char *file, char **was) {
    for (size_t i = 0; i < KEYS; i++) {
        char *now = wl_status_of(file, keys[i]);
        CHECK(!strcmp(now, was[i]), "%s: %s is %s, was %s", who, keys[i], now, was[i]);
        free(now);
    }
}

static void check_filters(const char *who, int sysinfo_error, int getcpu_error) {
    errno = 0;
    syscall(SYS_sysinfo, NULL);
    CHECK(errno == sysinfo_error, "%s: sysinfo gives %s", who, strerror(errno));
    errno = 0;
    syscall(SYS_getpriority, 99, 0);
    CHECK(errno == getcpu_error, "%s: getpriority gives %s", who, strerror(errno));
}

static void *other(void *argument) {
    (void)argument;
    snprintf(thread_file, sizeof thread_file, "/proc/self/task/%ld/status", syscall(SYS_gettid));
    setfsuid(777);
    set_caps(0, 1ULL << CAP_CHOWN, 0);
    sem_post(&done);
    sem_wait(&go);
    for (;;) {
        sem_post(&done);
        CHECK(sem_wait(&go) == 0, "sem_wait: %s", strerror(errno));
        compare("thread", thread_file, of_thread);
        check_filters("thread", 71, 72);
    }
    return NULL;
}

static int to_strict[2], from_strict[2];
static char strict_status[64];

/* A child in strict mode: all that it can do is read and write. Before the filters, which leave no way to it. */
static void start_strict(void) {
    MUST(pipe(to_strict));
    MUST(pipe(from_strict));
    pid_t child = MUST(fork());
    if (!child) {
        MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
        for (char byte; syscall(SYS_read, to_strict[0], &byte, 1) == 1;) {
            byte++;
            syscall(SYS_write, from_strict[1], &byte, 1);
        }
        syscall(SYS_exit, 0);
    }
    snprintf(strict_status, sizeof strict_status, "/proc/%d/status", child);
}

static void check_strict(void) {
    char byte = 'a';
    MUST(write(to_strict[1], &byte, 1));
    CHECK(read(from_strict[0], &byte, 1) == 1 && byte == 'b', "the child in strict mode answers %c", byte);
    char *mode = wl_status_of(strict_status, "Seccomp");
    CHECK(atoi(mode) == SECCOMP_MODE_STRICT, "the child in strict mode has mode %s", mode);
    free(mode);
}

static void verify(void) {
    check_strict();
    compare("main", "/proc/self/status", of_main);
    CHECK(prctl(PR_GET_SECUREBITS) == securebits, "securebits %x, were %x", prctl(PR_GET_SECUREBITS), securebits);
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1, "no_new_privs is off");
    check_filters("main", 71, 72);
    CHECK(prctl(PR_GET_DUMPABLE) == 1, "dumpable %d", prctl(PR_GET_DUMPABLE));
    sem_post(&go);
    sem_wait(&done);
}

int main(void) {
    wl_init();
    sem_init(&go, 0, 0);
    sem_init(&done, 0, 0);
    start_strict();
    uint64_t keep = 1ULL << CAP_CHOWN | 1ULL << CAP_KILL | 1ULL << CAP_NET_BIND_SERVICE;
    gid_t groups[] = {5, 17, 4242, 100000};
    MUST(setgroups(4, groups));
    MUST(prctl(PR_CAPBSET_DROP, CAP_MKNOD));
    MUST(prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | SECBIT_KEEP_CAPS | SECBIT_NO_CAP_AMBIENT_RAISE));
    MUST(setresgid(3, 4, 7));
    MUST(setresuid(1000, 1001, 1002));
    set_caps(1ULL << CAP_KILL, keep, 0);
    prctl(PR_SET_DUMPABLE, 1);
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    load_filter(SYS_sysinfo, 71);
    pthread_t thread;
    MUST0(pthread_create(&thread, NULL, other, NULL));
    sem_wait(&done);
    prctl(PR_SET_DUMPABLE, 1); /* the other thread has changed its ids since */
    /* the second filter goes to both threads */
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpriority, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 72),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
    sem_post(&go);
    sem_wait(&done);
    securebits = prctl(PR_GET_SECUREBITS);
    look("/proc/self/status", of_main);
    look(thread_file, of_thread);
    wl_serve(verify);
}
