/* Many: 500 threads that wait, each with its own id, and 200 children that wait, each with its own number; all answer when asked. */
#include "workload.h"

#define THREADS 500
#define CHILDREN 200

static struct member {
    pthread_t thread;
    pid_t tid;
    sem_t go;
} members[THREADS];
static sem_t done;
static struct child {
    pid_t pid;
    int ask[2], answer[2];
} children[CHILDREN];

static void *member(void *argument) {
    struct member *m = argument;
    m->tid = (pid_t)syscall(SYS_gettid);
    sem_post(&done);
    for (;;) {
        int r = sem_wait(&m->go);
        CHECK(r == 0, "sem_wait: %s", strerror(errno));
        CHECK(syscall(SYS_gettid) == m->tid && pthread_self() == m->thread, "thread %d is %ld", m->tid, syscall(SYS_gettid));
        sem_post(&done);
    }
    return NULL;
}

static void child(int number) {
    struct child *c = &children[number];
    pid_t parent = getppid(), me = getpid();
    char byte;
    for (;;) {
        ssize_t n = read(c->ask[0], &byte, 1);
        if (n != 1) _exit(n == 0 ? 0 : 1);
        byte = getpid() == me && getppid() == parent && syscall(SYS_getpid) == me ? (char)number : (char)~number;
        if (write(c->answer[1], &byte, 1) != 1) _exit(2);
    }
}

static void verify(void) {
    for (int i = 0; i < THREADS; i++) sem_post(&members[i].go);
    for (int i = 0; i < THREADS; i++) sem_wait(&done);
    for (int i = 0; i < CHILDREN; i++) {
        char byte = 0;
        MUST(write(children[i].ask[1], &byte, 1));
        ssize_t n = read(children[i].answer[0], &byte, 1);
        CHECK(n == 1 && byte == (char)i, "child %d answers %d (%zd)", i, byte, n);
        CHECK(kill(children[i].pid, 0) == 0, "child %d: %s", i, strerror(errno));
    }
}

int main(void) {
    wl_init();
    for (int i = 0; i < CHILDREN; i++) {
        MUST(pipe2(children[i].ask, O_CLOEXEC));
        MUST(pipe2(children[i].answer, O_CLOEXEC));
        if (!(children[i].pid = MUST(fork()))) {
            for (int j = 0; j <= i; j++) {
                close(children[j].ask[1]);
                close(children[j].answer[0]);
            }
            child(i);
        }
        close(children[i].ask[0]);
        close(children[i].answer[1]);
    }
    sem_init(&done, 0, 0);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 * 1024);
    for (int i = 0; i < THREADS; i++) {
        sem_init(&members[i].go, 0, 0);
        MUST0(pthread_create(&members[i].thread, &small, member, &members[i]));
    }
    for (int i = 0; i < THREADS; i++) sem_wait(&done);
    wl_serve(verify);
}
