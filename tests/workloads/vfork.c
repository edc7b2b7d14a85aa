/* Two threads that start programs by vfork(2), whose children take their time before they do: they run in our memory, and a thread that
 * waits for such a child cannot be stopped. No child may be lost, and none of the calls may fail. */
#include "workload.h"

#define THREADS 2
static volatile int started[THREADS];

static void *starter(void *argument) {
    int me = (int)(intptr_t)argument;
    /* Named before it exists: what comes and goes has another name than we. */
    prctl(PR_SET_NAME, "sleep");
    for (;;) {
        volatile int mine = 0;
        pid_t child = vfork();
        if (child == 0) {
            struct timespec t = {0, 60 * 1000 * 1000};
            syscall(SYS_nanosleep, &t, NULL);
            mine = 42;
            execl("/bin/sleep", "sleep", "0.02", (char *)NULL);
            _exit(9);
        }
        if (child < 0) {
            wl_differs("vfork: %s", strerror(errno));
            return NULL;
        }
        CHECK(mine == 42, "the child's write is not there");
        int status = -1;
        pid_t got = waitpid(child, &status, 0);
        CHECK(got == child && status == 0, "waitpid(%d) is %d, status %x: %s", child, got, status, strerror(errno));
        started[me]++;
    }
}

static void verify(void) {
    for (int i = 0; i < THREADS; i++) {
        int before = started[i];
        for (int n = 0; n < 200 && started[i] < before + 2; n++) wl_sleep(0.02);
        CHECK(started[i] >= before + 2, "thread %d starts no more programs", i);
    }
}

int main(void) {
    wl_init();
    for (int i = 0; i < THREADS; i++) {
        pthread_t thread;
        MUST0(pthread_create(&thread, NULL, starter, (void *)(intptr_t)i));
    }
    wl_serve(verify);
}
