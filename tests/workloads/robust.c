/* Robust mutexes: a lock held by a thread and by another process stays held, and is handed on with EOWNERDEAD when its owner dies. */
#include "workload.h"

static struct shared {
    pthread_mutex_t by_process, by_thread, normal;
    volatile int held;
} *shared;
static pid_t child;
static sem_t die, holding;
static pthread_t holder;

static void init_mutex(pthread_mutex_t *m) {
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    MUST0(pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST));
    MUST0(pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED));
    MUST0(pthread_mutex_init(m, &a));
}

static void *hold(void *argument) {
    (void)argument;
    pthread_mutex_lock(&shared->by_thread);
    sem_post(&holding);
    while (sem_wait(&die)) {}
    return NULL; /* without unlocking */
}

static void make_owners(void) {
    shared->held = 0;
    child = MUST(fork());
    if (!child) {
        pthread_mutex_lock(&shared->by_process);
        shared->held = 1;
        for (;;) pause();
    }
    MUST0(pthread_create(&holder, NULL, hold, NULL));
    sem_wait(&holding);
    while (!shared->held) wl_sleep(0.001);
}

static void take_over(const char *what, pthread_mutex_t *m) {
    int r = pthread_mutex_lock(m);
    CHECK(r == EOWNERDEAD, "%s: lock gives %s", what, strerror(r));
    if (r == EOWNERDEAD) MUST0(pthread_mutex_consistent(m));
    pthread_mutex_unlock(m);
}

static void verify(void) {
    int r = pthread_mutex_trylock(&shared->by_process);
    CHECK(r == EBUSY, "the child's lock: trylock gives %s", strerror(r));
    r = pthread_mutex_trylock(&shared->by_thread);
    CHECK(r == EBUSY, "the thread's lock: trylock gives %s", strerror(r));
    void *head = NULL;
    size_t length = 0;
    MUST(syscall(SYS_get_robust_list, 0, &head, &length));
    CHECK(head != NULL && length == 24, "robust list of main: %p, %zu", head, length);
    MUST(kill(child, SIGKILL));
    int status;
    MUST(waitpid(child, &status, 0));
    take_over("the child's lock", &shared->by_process);
    sem_post(&die);
    MUST0(pthread_join(holder, NULL));
    take_over("the thread's lock", &shared->by_thread);
    make_owners();
}

int main(void) {
    wl_init();
    shared = MUST(mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    init_mutex(&shared->by_process);
    init_mutex(&shared->by_thread);
    sem_init(&die, 0, 0);
    sem_init(&holding, 0, 0);
    make_owners();
    wl_serve(verify);
}
