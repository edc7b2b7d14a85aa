/* Resource limits, soft and hard, of two processes. */
#include "workload.h"
#include <sys/resource.h>

static struct rlimit was[RLIM_NLIMITS];
static struct { int question, answer; char difference[256]; } volatile *child;

static void check(char *text, size_t size) {
    for (int i = 0; i < (int)RLIM_NLIMITS; i++) {
        struct rlimit now;
        getrlimit((__rlimit_resource_t)i, &now);
        if (now.rlim_cur != was[i].rlim_cur || now.rlim_max != was[i].rlim_max) {
            snprintf(text, size, "limit %d is %lu/%lu, was %lu/%lu", i, now.rlim_cur, now.rlim_max, was[i].rlim_cur, was[i].rlim_max);
            return;
        }
    }
}

static void look(void) {
    for (int i = 0; i < (int)RLIM_NLIMITS; i++) getrlimit((__rlimit_resource_t)i, &was[i]);
}

static void lower(int what, rlim_t soft, rlim_t hard) {
    struct rlimit l = {soft, hard};
    MUST(setrlimit((__rlimit_resource_t)what, &l));
}

static void verify(void) {
    char text[256] = "";
    check(text, sizeof text);
    CHECK(!*text, "main: %s", text);
    child->difference[0] = 0;
    child->question++;
    for (int i = 0; i < 500 && child->answer != child->question; i++) wl_sleep(0.01);
    CHECK(child->answer == child->question, "the child does not answer");
    CHECK(!child->difference[0], "child: %s", (char *)child->difference);
}

int main(void) {
    wl_init();
    child = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!MUST(fork())) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        lower(RLIMIT_NOFILE, 77, 99);
        lower(RLIMIT_CPU, 100000, 200000);
        look();
        for (;;) {
            if (child->question != child->answer) {
                check((char *)child->difference, sizeof child->difference);
                child->answer = child->question;
            }
            wl_sleep(0.005);
        }
    }
    lower(RLIMIT_NOFILE, 123, 1000);
    lower(RLIMIT_CORE, 0, 0);
    lower(RLIMIT_STACK, 4 << 20, 6 << 20);
    lower(RLIMIT_FSIZE, 1 << 30, RLIM_INFINITY);
    lower(RLIMIT_AS, 1UL << 40, 1UL << 41);
    look();
    wl_serve(verify);
}
