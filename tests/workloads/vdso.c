/* Calls every function of the vdso, as the ELF file that the auxiliary vector points to names them, and compares them with the system
 * calls. A child does the same. No clock is read through the C library, which has noted where the functions were. */
#include "workload.h"
#include <elf.h>
#include <sys/auxv.h>
#include <sys/time.h>

#define SLACK 0.3

static int to_child[2], from_child[2];

static const void *function(const char *wanted) {
    const char *base = (const char *)getauxval(AT_SYSINFO_EHDR);
    const Elf64_Ehdr *header = (const void *)base;
    const Elf64_Phdr *segment = (const void *)(base + header->e_phoff);
    while (segment->p_type != PT_DYNAMIC) segment++;
    const char *names = NULL;
    const Elf64_Sym *symbols = NULL;
    for (const Elf64_Dyn *d = (const void *)(base + segment->p_vaddr); d->d_tag; d++) {
        if (d->d_tag == DT_STRTAB) names = base + d->d_un.d_ptr;
        if (d->d_tag == DT_SYMTAB) symbols = (const void *)(base + d->d_un.d_ptr);
    }
    for (const Elf64_Sym *s = symbols; (const char *)(s + 1) <= names; s++)
        if (!strcmp(names + s->st_name, wanted)) return base + s->st_value;
    return NULL;
}

static double seconds(struct timespec t) { return (double)t.tv_sec + (double)t.tv_nsec / 1e9; }

static void check_clock(clockid_t clock) {
    int (*clock_gettime_)(clockid_t, struct timespec *) = function("__vdso_clock_gettime");
    int (*clock_getres_)(clockid_t, struct timespec *) = function("__vdso_clock_getres");
    struct timespec before, now, after, is, should;
    syscall(SYS_clock_gettime, clock, &before);
    CHECK(clock_gettime_(clock, &now) == 0, "clock_gettime(%d)", clock);
    syscall(SYS_clock_gettime, clock, &after);
    CHECK(seconds(before) - 0.02 <= seconds(now) && seconds(now) <= seconds(after), "clock %d is %f, not %f to %f", clock, seconds(now),
          seconds(before), seconds(after));
    CHECK(clock_getres_(clock, &is) == 0, "clock_getres(%d)", clock);
    syscall(SYS_clock_getres, clock, &should);
    CHECK(is.tv_sec == should.tv_sec && is.tv_nsec == should.tv_nsec, "clock %d has a resolution of %f", clock, seconds(is));
}

static void check(void) {
    clockid_t clocks[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_RAW, CLOCK_REALTIME_COARSE, CLOCK_MONOTONIC_COARSE};
    for (size_t i = 0; i < sizeof clocks / sizeof *clocks; i++) check_clock(clocks[i]);
    int (*gettimeofday_)(struct timeval *, void *) = function("__vdso_gettimeofday");
    time_t (*time_)(time_t *) = function("__vdso_time");
    int (*getcpu_)(unsigned *, unsigned *, void *) = function("__vdso_getcpu");
    struct timespec real;
    struct timeval day;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &real);
    CHECK(gettimeofday_(&day, NULL) == 0, "gettimeofday");
    double late = (double)day.tv_sec + (double)day.tv_usec / 1e6 - seconds(real);
    CHECK(-0.001 <= late && late < SLACK, "gettimeofday is %f s late", late);
    time_t now = time_(NULL);
    CHECK(now == real.tv_sec || now == real.tv_sec + 1, "time is %ld, not %ld", (long)now, (long)real.tv_sec);
    unsigned cpu = 1u << 31;
    CHECK(getcpu_(&cpu, NULL, NULL) == 0 && cpu < (unsigned)sysconf(_SC_NPROCESSORS_CONF), "getcpu says %u", cpu);
    ssize_t (*getrandom_)(void *, size_t, unsigned, void *, size_t) = function("__vdso_getrandom");
    struct { uint32_t size, prot, flags, reserved[13]; } wants;
    if (!getrandom_) return;
    CHECK(getrandom_(NULL, 0, 0, &wants, ~0UL) == 0 && wants.size > 0, "getrandom tells no size");
    static void *state;
    if (!state) state = mmap(NULL, 4096, (int)wants.prot, (int)wants.flags, -1, 0);
    unsigned char bytes[32] = {0}, none[32] = {0};
    CHECK(getrandom_(bytes, sizeof bytes, 0, state, wants.size) == sizeof bytes && memcmp(bytes, none, sizeof bytes), "getrandom");
}

static void serve(void) {
    char go;
    while (read(to_child[0], &go, 1) == 1) {
        check();
        MUST(write(from_child[1], wl_differences, sizeof wl_differences));
        wl_differences[0] = 0;
    }
    _exit(0);
}

static void verify(void) {
    static char said[sizeof wl_differences];
    check();
    MUST(write(to_child[1], "g", 1));
    for (size_t got = 0; got < sizeof said;) got += (size_t)MUST(read(from_child[0], said + got, sizeof said - got));
    if (said[0]) wl_differs("child: %s", said);
}

int main(void) {
    wl_init();
    MUST(pipe(to_child));
    MUST(pipe(from_child));
    if (MUST(fork()) == 0) {
        close(to_child[1]);
        serve();
    }
    close(to_child[0]);
    wl_serve(verify);
}
