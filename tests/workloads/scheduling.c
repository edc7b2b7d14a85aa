/* How threads get their share of processors and disks, and switches that few programs set: policies, nice values, I/O priorities,
 * CPUs, membarrier, core dump filter, oom score, autogroup, time stamp counter, speculation. */
#include "workload.h"
#include <linux/ioprio.h>
#include <linux/membarrier.h>
#include <linux/sched.h>
#include <sched.h>
#include <sys/resource.h>

#ifndef MEMBARRIER_CMD_GET_REGISTRATIONS
#define MEMBARRIER_CMD_GET_REGISTRATIONS 512
#endif

/* linux/sched/types.h does not go together with the C library's sched.h */
struct sched_attr {
    uint32_t size, sched_policy;
    uint64_t sched_flags;
    int32_t sched_nice;
    uint32_t sched_priority;
    uint64_t sched_runtime, sched_deadline, sched_period;
    uint32_t sched_util_min, sched_util_max;
};

enum { FIFO, ROUND_ROBIN, BATCH, IDLE, DEADLINE, NICE, THREADS };
static struct sched_attr was[THREADS];
static int io_was[THREADS], slack_was[THREADS];
static cpu_set_t cpus_was[THREADS];
static pid_t tids[THREADS];
static sem_t up, never;
static char *core_filter, *oom, *autogroup;
static int registered, store_bypass, tsc_child_status;

static struct sched_attr of(pid_t tid) {
    struct sched_attr found = {0};
    MUST(syscall(SYS_sched_getattr, tid, &found, sizeof found, 0));
    return found;
}

static void become(struct sched_attr wanted) {
    wanted.size = sizeof wanted;
    MUST(syscall(SYS_sched_setattr, 0, &wanted, 0));
}

static void *thread(void *number) {
    switch ((long)number) {
    case FIFO: become((struct sched_attr){.sched_policy = SCHED_FIFO, .sched_priority = 7, .sched_flags = SCHED_FLAG_RESET_ON_FORK}); break;
    case ROUND_ROBIN: become((struct sched_attr){.sched_policy = SCHED_RR, .sched_priority = 3}); break;
    case BATCH: become((struct sched_attr){.sched_policy = SCHED_BATCH, .sched_nice = 4}); break;
    case IDLE: become((struct sched_attr){.sched_policy = SCHED_IDLE, .sched_nice = 9}); break;
    case DEADLINE:
        become((struct sched_attr){.sched_policy = SCHED_DEADLINE, .sched_runtime = 1000000, .sched_deadline = 20000000, .sched_period = 30000000});
        break;
    case NICE: {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(0, &one);
        MUST(setpriority(PRIO_PROCESS, 0, -3));
        MUST(syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 6)));
        MUST(sched_setaffinity(0, sizeof one, &one));
        MUST(prctl(PR_SET_TIMERSLACK, 777777));
        break;
    }
    }
    long me = (long)number;
    tids[me] = (pid_t)syscall(SYS_gettid);
    slack_was[me] = prctl(PR_GET_TIMERSLACK);
    sem_post(&up);
    for (;;) sem_wait(&never);
    return NULL;
}

static int io_of(pid_t tid) { return (int)syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid); }

static char *slack_of(pid_t tid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/timerslack_ns", tid);
    return wl_slurp(path, NULL);
}

static void same_file(const char *path, const char *before) {
    char *now = wl_slurp(path, NULL);
    CHECK(!strcmp(now, before), "%s is %s, was %s", path, now, before);
    free(now);
}

/* The number of the group is another one, its nice value is not. */
static const char *nice_of_group(const char *text) { return strstr(text, "nice") ?: text; }

/* A child inherits whether it may read the time stamp counter. */
static int read_counter(void) {
    pid_t child = MUST(fork());
    if (!child) {
        __builtin_ia32_rdtsc();
        _exit(0);
    }
    int status;
    MUST(waitpid(child, &status, 0));
    return status;
}

static void verify(void) {
    for (int i = 0; i < THREADS; i++) {
        struct sched_attr now = of(tids[i]);
        CHECK(!memcmp(&now, &was[i], sizeof now), "thread %d: policy %u nice %d priority %u flags %llx runtime %llu, were %u %d %u %llx %llu", i,
              now.sched_policy, now.sched_nice, now.sched_priority, (long long)now.sched_flags, (long long)now.sched_runtime, was[i].sched_policy,
              was[i].sched_nice, was[i].sched_priority, (long long)was[i].sched_flags, (long long)was[i].sched_runtime);
        CHECK(io_of(tids[i]) == io_was[i], "thread %d: I/O priority %d, was %d", i, io_of(tids[i]), io_was[i]);
        cpu_set_t cpus;
        MUST(sched_getaffinity(tids[i], sizeof cpus, &cpus));
        CHECK(CPU_EQUAL(&cpus, &cpus_was[i]), "thread %d: other CPUs", i);
        CHECK(atoi(slack_of(tids[i])) == slack_was[i], "thread %d: timer slack %s, was %d", i, slack_of(tids[i]), slack_was[i]);
    }
    same_file("/proc/self/coredump_filter", core_filter);
    same_file("/proc/self/oom_score_adj", oom);
    char *group = wl_slurp("/proc/self/autogroup", NULL);
    CHECK(!strcmp(nice_of_group(group), nice_of_group(autogroup)), "autogroup %s, was %s", group, autogroup);
    free(group);
    int now = (int)syscall(SYS_membarrier, MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0);
    CHECK(now == registered, "membarrier registrations %x, were %x", now, registered);
    CHECK(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) == 0, "membarrier: %s", strerror(errno));
    CHECK(prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0) == store_bypass, "speculation is %d, was %d",
          prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0), store_bypass);
    CHECK(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) == PR_MCE_KILL_EARLY, "memory errors: %d", prctl(PR_MCE_KILL_GET, 0, 0, 0, 0));
    CHECK(read_counter() == tsc_child_status, "reading the time stamp counter gives %x, gave %x", read_counter(), tsc_child_status);
}

static void write_file(const char *path, const char *text) {
    int fd = MUST(open(path, O_WRONLY | O_CLOEXEC));
    MUST(write(fd, text, strlen(text)));
    close(fd);
}

int main(void) {
    wl_init();
    sem_init(&up, 0, 0);
    sem_init(&never, 0, 0);
    for (long i = 0; i < THREADS; i++) {
        pthread_t id;
        MUST0(pthread_create(&id, NULL, thread, (void *)i));
        sem_wait(&up);
    }
    for (int i = 0; i < THREADS; i++) {
        was[i] = of(tids[i]);
        io_was[i] = io_of(tids[i]);
        MUST(sched_getaffinity(tids[i], sizeof cpus_was[i], &cpus_was[i]));
    }
    write_file("/proc/self/coredump_filter", "0x5f");
    write_file("/proc/self/oom_score_adj", "345");
    if (!access("/proc/self/autogroup", W_OK)) write_file("/proc/self/autogroup", "5");
    MUST(syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0));
    MUST(syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0));
    MUST(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
    /* where the processor has no such switch it stays as it is */
    (void)prctl(PR_SET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, PR_SPEC_DISABLE, 0, 0);
    MUST(prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
    core_filter = wl_slurp("/proc/self/coredump_filter", NULL);
    oom = wl_slurp("/proc/self/oom_score_adj", NULL);
    autogroup = wl_slurp("/proc/self/autogroup", NULL);
    registered = (int)MUST(syscall(SYS_membarrier, MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0));
    store_bypass = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0);
    tsc_child_status = read_counter();
    wl_serve(verify);
}
