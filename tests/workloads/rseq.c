/* rseq: glibc registered an area for each thread; the kernel must go on to keep it, and critical sections must still be aborted. */
#include "workload.h"
#include <sched.h>
#include <sys/rseq.h>

#define THREADS 3
static sem_t go[THREADS], done[THREADS];
static volatile int stop_spinning;

static struct rseq *mine(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

/* Busy inside a critical section: each preemption aborts it, and the abort handler counts. Anything else would lose increments. */
static volatile uint64_t sections, aborts;

static void critical_sections(void) {
    struct rseq *r = mine();
    while (!stop_spinning) {
        uint64_t spins = 2000;
        __asm__ volatile goto(
            ".pushsection __rseq_cs, \"aw\"\n"
            ".balign 32\n"
            "3: .long 0, 0\n"
            ".quad 1f, 2f - 1f, 4f\n"
            ".popsection\n"
            "leaq 3b(%%rip), %%rax\n"
            "movq %%rax, %[cs]\n"
            "1:\n"
            "movq %[spins], %%rcx\n"
            "5: decq %%rcx\n"
            "jnz 5b\n"
            "incq %[count]\n"
            "2:\n"
            ".pushsection __rseq_failure, \"ax\"\n"
            ".byte 0x0f, 0xb9, 0x3d\n"
            ".long 0x53053053\n"
            "4: jmp %l[aborted]\n"
            ".popsection\n"
            :
            : [cs] "m"(r->rseq_cs), [spins] "r"(spins), [count] "m"(sections)
            : "memory", "rax", "rcx", "cc"
            : aborted);
        continue;
    aborted:
        aborts++;
    }
}

static void *spin(void *argument) {
    (void)argument;
    critical_sections();
    return NULL;
}

static void check_here(const char *who) {
    struct rseq *r = mine();
    cpu_set_t all, one;
    MUST(sched_getaffinity(0, sizeof all, &all));
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &all)) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        MUST(sched_setaffinity(0, sizeof one, &one));
        CHECK((int)r->cpu_id == cpu && (int)r->cpu_id_start == cpu, "%s: rseq says cpu %d, it is %d", who, (int)r->cpu_id, cpu);
    }
    MUST(sched_setaffinity(0, sizeof all, &all));
    errno = 0;
    long again = syscall(SYS_rseq, (void *)r, 32, 0, RSEQ_SIG);
    CHECK(again == -1 && errno == EBUSY, "%s: registering the same area again gives %ld, %s", who, again, strerror(errno));
}

static void *work(void *argument) {
    int i = (int)(intptr_t)argument;
    char name[16];
    sprintf(name, "thread %d", i);
    for (;;) {
        sem_post(&done[i]);
        CHECK(sem_wait(&go[i]) == 0, "sem_wait: %s", strerror(errno));
        check_here(name);
    }
    return NULL;
}

static void verify(void) {
    check_here("main");
    for (int i = 0; i < THREADS; i++) {
        sem_post(&go[i]);
        sem_wait(&done[i]);
    }
    uint64_t before = sections;
    wl_sleep(0.1);
    CHECK(sections > before, "the spinning thread stands still");
}

int main(void) {
    wl_init();
    if (__rseq_size == 0) {
        dprintf(1, "FAIL glibc did not register rseq\n");
        return 3;
    }
    for (int i = 0; i < THREADS; i++) {
        sem_init(&go[i], 0, 0);
        sem_init(&done[i], 0, 0);
        pthread_t t;
        MUST0(pthread_create(&t, NULL, work, (void *)(intptr_t)i));
        sem_wait(&done[i]);
    }
    pthread_t t;
    MUST0(pthread_create(&t, NULL, spin, NULL));
    wl_serve(verify);
}
