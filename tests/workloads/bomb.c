/* Threads and processes that begin and end all the time, several at once: at every moment some are being made and some are ending. */
#include "workload.h"

#define MAKERS 3
static volatile uint64_t made[MAKERS + 1];

static void *quick(void *argument) {
    volatile uint64_t spin = 0;
    for (int i = 0; i < 2000; i++) spin += (uintptr_t)argument;
    return (void *)(uintptr_t)(spin / 2000 + 1);
}

static void *make_threads(void *argument) {
    uintptr_t me = (uintptr_t)argument;
    for (;;) {
        pthread_t few[3];
        for (uintptr_t i = 0; i < 3; i++) MUST0(pthread_create(&few[i], NULL, quick, (void *)(me + i)));
        for (uintptr_t i = 0; i < 3; i++) {
            void *result = NULL;
            MUST0(pthread_join(few[i], &result));
            CHECK(result == (void *)(me + i + 1), "a thread returned %p", result);
        }
        made[me]++;
    }
    return NULL;
}

static void *make_processes(void *argument) {
    (void)argument;
    prctl(PR_SET_NAME, "sleep");
    for (;;) {
        pid_t child = MUST(fork());
        if (!child) {
            pid_t grandchild = fork();
            if (!grandchild) _exit(5);
            int status = 0;
            _exit(waitpid(grandchild, &status, 0) == grandchild && status == 5 << 8 ? 7 : 8);
        }
        int status = 0;
        pid_t got = waitpid(child, &status, 0);
        CHECK(got == child && status == 7 << 8, "waitpid(%d) is %d, status %x", child, got, status);
        made[MAKERS]++;
    }
    return NULL;
}

static void verify(void) {
    for (int i = 0; i <= MAKERS; i++) {
        uint64_t before = made[i];
        for (int n = 0; n < 500 && made[i] < before + 3; n++) wl_sleep(0.01);
        CHECK(made[i] >= before + 3, "maker %d makes no more", i);
    }
}

int main(void) {
    wl_init();
    pthread_t thread;
    for (uintptr_t i = 0; i < MAKERS; i++) MUST0(pthread_create(&thread, NULL, make_threads, (void *)i));
    MUST0(pthread_create(&thread, NULL, make_processes, NULL));
    wl_serve(verify);
}
