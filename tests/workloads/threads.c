/* Threads: tids, names, thread-local storage, stacks, rounding modes, a joinable thread that ends, and new threads afterwards. */
#include "workload.h"
#include <fenv.h>

#define THREADS 8
#define STACK_BYTES 65536

static __thread uint64_t local[64];
static __thread int *local_errno_place;

struct worker {
    pthread_t thread;
    pid_t tid;
    int index;
    sem_t go, done;
} workers[THREADS];

static void check_worker(struct worker *w, uint64_t *first_address, volatile unsigned char *stack) {
    CHECK(syscall(SYS_gettid) == w->tid, "thread %d: tid %ld, was %d", w->index, syscall(SYS_gettid), w->tid);
    CHECK(pthread_self() == w->thread, "thread %d: pthread_self changed", w->index);
    CHECK(local == first_address, "thread %d: thread-local storage moved", w->index);
    CHECK(local_errno_place == &errno, "thread %d: errno moved", w->index);
    for (int i = 0; i < 64; i++)
        CHECK(local[i] == (uint64_t)w->index * 1000003u + (uint64_t)i, "thread %d: local[%d] = %lu", w->index, i, local[i]);
    long wrong = wl_wrong((const void *)stack, STACK_BYTES, (uint64_t)w->index);
    CHECK(wrong == -1, "thread %d: stack byte %ld", w->index, wrong);
    static const int modes[4] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
    CHECK(fegetround() == modes[w->index % 4], "thread %d: rounding mode %d", w->index, fegetround());
    char name[16] = "", expected[16];
    prctl(PR_GET_NAME, name);
    snprintf(expected, sizeof expected, "worker-%d", w->index);
    CHECK(!strcmp(name, expected), "thread %d: name %s", w->index, name);
}

static void *work(void *argument) {
    struct worker *w = argument;
    static const int modes[4] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
    volatile unsigned char stack[STACK_BYTES];
    char name[16];
    w->tid = (pid_t)syscall(SYS_gettid);
    wl_fill((void *)stack, sizeof stack, (uint64_t)w->index);
    for (int i = 0; i < 64; i++) local[i] = (uint64_t)w->index * 1000003u + (uint64_t)i;
    local_errno_place = &errno;
    snprintf(name, sizeof name, "worker-%d", w->index);
    prctl(PR_SET_NAME, name);
    fesetround(modes[w->index % 4]);
    uint64_t *first_address = local;
    for (;;) {
        sem_post(&w->done);
        int r = sem_wait(&w->go);
        CHECK(r == 0, "thread %d: sem_wait: %s", w->index, strerror(errno));
        check_worker(w, first_address, stack);
    }
    return NULL;
}

static sem_t leave;
static pthread_t leaver;

static void *leave_when_told(void *argument) {
    sem_wait(&leave);
    return (void *)((uintptr_t)argument + 1);
}

static void *quick(void *argument) {
    local[0] = (uintptr_t)argument;
    return (void *)(uintptr_t)(local[0] * 2);
}

static void verify(void) {
    for (int i = 0; i < THREADS; i++) sem_post(&workers[i].go);
    for (int i = 0; i < THREADS; i++) sem_wait(&workers[i].done);
    void *result = NULL;
    /* the kernel clears this thread's tid word and wakes the joiner: set_tid_address must have survived */
    sem_post(&leave);
    MUST0(pthread_join(leaver, &result));
    CHECK(result == (void *)8, "the joined thread returned %p", result);
    MUST0(pthread_create(&leaver, NULL, leave_when_told, (void *)7));
    pthread_t fresh;
    MUST0(pthread_create(&fresh, NULL, quick, (void *)21));
    MUST0(pthread_join(fresh, &result));
    CHECK(result == (void *)42, "a new thread returned %p", result);
}

int main(void) {
    wl_init();
    sem_init(&leave, 0, 0);
    for (int i = 0; i < THREADS; i++) {
        workers[i].index = i;
        sem_init(&workers[i].go, 0, 0);
        sem_init(&workers[i].done, 0, 0);
        MUST0(pthread_create(&workers[i].thread, NULL, work, &workers[i]));
        sem_wait(&workers[i].done);
    }
    MUST0(pthread_create(&leaver, NULL, leave_when_told, (void *)7));
    wl_serve(verify);
}
