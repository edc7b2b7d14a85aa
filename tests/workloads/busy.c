/* Busy in arithmetic that fills the vector registers and in vdso clock calls. The arithmetic is exact: a register, flag or mask that came
 * back wrong, at whatever instruction the program was stopped, gives another result. The clocks must never run back. */
#include "workload.h"
#include <immintrin.h>

#define THREADS 4
static volatile int wrong_results, backwards;
static volatile uint64_t rounds[THREADS], clock_calls;
static volatile double largest_gap;
static int have_avx512;

/* Sixteen accumulators kept in registers; integer lanes, so that the result is known exactly. */
__attribute__((target("avx2"), noinline)) static uint64_t avx2_round(uint64_t seed) {
    __m256i a[12];
    for (int i = 0; i < 12; i++) a[i] = _mm256_set1_epi64x((long long)(seed + (uint64_t)i));
    __m256d d = _mm256_set1_pd(1.0);
    for (int n = 0; n < 20000; n++) {
        for (int i = 0; i < 12; i++) {
            a[i] = _mm256_add_epi64(_mm256_xor_si256(a[i], _mm256_slli_epi64(a[i], 13)), _mm256_set1_epi64x(n));
            a[i] = _mm256_xor_si256(a[i], _mm256_srli_epi64(a[i], 7));
        }
        d = _mm256_add_pd(d, _mm256_set1_pd(0.5));
    }
    uint64_t lanes[4], sum = 0;
    for (int i = 0; i < 12; i++) {
        _mm256_storeu_si256((void *)lanes, a[i]);
        for (int l = 0; l < 4; l++) sum = sum * 31 + lanes[l];
    }
    double parts[4];
    _mm256_storeu_pd(parts, d);
    return sum ^ (uint64_t)(parts[0] + parts[1] + parts[2] + parts[3]);
}

__attribute__((target("avx512f"), noinline)) static uint64_t avx512_round(uint64_t seed) {
    __m512i a[24];
    for (int i = 0; i < 24; i++) a[i] = _mm512_set1_epi64((long long)(seed + (uint64_t)i));
    for (int n = 0; n < 10000; n++) {
        __mmask8 mask = (__mmask8)(n * 37 + 1);
        for (int i = 0; i < 24; i++) {
            a[i] = _mm512_mask_add_epi64(a[i], mask, _mm512_xor_si512(a[i], _mm512_slli_epi64(a[i], 13)), _mm512_set1_epi64(n));
            a[i] = _mm512_xor_si512(a[i], _mm512_srli_epi64(a[i], 7));
        }
    }
    uint64_t lanes[8], sum = 0;
    for (int i = 0; i < 24; i++) {
        _mm512_storeu_si512((void *)lanes, a[i]);
        for (int l = 0; l < 8; l++) sum = sum * 31 + lanes[l];
    }
    return sum;
}

/* x87 and the direction and rounding state besides. */
static uint64_t x87_round(uint64_t seed) {
    long double x = (long double)(seed % 1000), sum = 0;
    for (int n = 1; n < 20000; n++) {
        x = x * 1.0000001L + (long double)n;
        sum += x / 3.0L;
    }
    uint64_t bits[2] = {0, 0};
    memcpy(bits, &sum, 10);
    return bits[0] ^ bits[1];
}

static void *compute(void *argument) {
    int which = (int)(intptr_t)argument;
    uint64_t (*round)(uint64_t) = which % 3 == 0 ? avx2_round : which % 3 == 1 && have_avx512 ? avx512_round : x87_round;
    uint64_t expected[8];
    for (uint64_t s = 0; s < 8; s++) expected[s] = round(s * 12345 + 1);
    for (;;) {
        uint64_t s = rounds[which] % 8;
        if (round(s * 12345 + 1) != expected[s]) wrong_results++;
        rounds[which]++;
    }
    return NULL;
}

static void *clocks(void *argument) {
    (void)argument;
    double last = wl_now(CLOCK_MONOTONIC), last_boot = wl_now(CLOCK_BOOTTIME);
    for (;;) {
        for (int i = 0; i < 1000; i++) {
            double now = wl_now(CLOCK_MONOTONIC);
            if (now < last) backwards++;
            if (now - last > largest_gap) largest_gap = now - last;
            last = now;
        }
        double now = wl_now(CLOCK_BOOTTIME);
        if (now < last_boot) backwards++;
        last_boot = now;
        /* CLOCK_THREAD_CPUTIME_ID belongs to the kernel's thread, which is another one after a restore */
        (void)wl_now(CLOCK_THREAD_CPUTIME_ID);
        clock_calls += 1000;
    }
    return NULL;
}

static void verify(void) {
    uint64_t before[THREADS], calls = clock_calls;
    for (int i = 0; i < THREADS; i++) before[i] = rounds[i];
    for (int wait = 0; wait < 1000; wait++) {
        int all = clock_calls > calls;
        for (int i = 0; i < THREADS; i++) all = all && rounds[i] > before[i] + 1;
        if (all) break;
        wl_sleep(0.01);
    }
    for (int i = 0; i < THREADS; i++) CHECK(rounds[i] > before[i] + 1, "thread %d stands still", i);
    CHECK(clock_calls > calls, "the thread with the clocks stands still");
    CHECK(wrong_results == 0, "%d wrong results", wrong_results);
    CHECK(backwards == 0, "a clock ran back %d times", backwards);
}

int main(void) {
    wl_init();
    __builtin_cpu_init();
    have_avx512 = __builtin_cpu_supports("avx512f");
    if (!__builtin_cpu_supports("avx2")) {
        dprintf(1, "FAIL this processor has no AVX2\n");
        return 3;
    }
    pthread_t t;
    for (int i = 0; i < THREADS; i++) MUST0(pthread_create(&t, NULL, compute, (void *)(intptr_t)i));
    MUST0(pthread_create(&t, NULL, clocks, NULL));
    wl_serve(verify);
}
