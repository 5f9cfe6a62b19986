/* Types, loads and stores that all kernels share. Half precision is bf16, widened to fp32 on load; every sum is fp32.
 *
 * `type` says what an array holds: 0 is fp32, 1 is bf16. Every function of the library takes one structure of pointers,
 * 64-bit integers and doubles, so that a call is an array of 64-bit words, which can be kept and made again (step.c).
 */

#ifndef LONGBURN_COMMON_H
#define LONGBURN_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_u __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_u __attribute__((vector_size(2 * LANES), aligned(2)));

static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint16_t narrow(float x) { /* round to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline vec load32(const float *p) { return *(const vec_u *)p; }

static inline vec load16(const uint16_t *p) {
    return (vec)(__builtin_convertvector(*(const half_u *)p, uvec) << 16);
}

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

static inline float total(vec v) { /* by halves: strict C would add the lanes one after the other */
    vec8 a, b;
    memcpy(&a, &v, 32), memcpy(&b, (const char *)&v + 32, 32);
    a += b;
    vec4 c, d;
    memcpy(&c, &a, 16), memcpy(&d, (const char *)&a + 16, 16);
    c += d;
    return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline float get(const void *p, int64_t i, int64_t type) {
    return type ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static inline void put(void *p, int64_t i, int64_t type, float x) {
    if (type) ((uint16_t *)p)[i] = narrow(x);
    else ((float *)p)[i] = x;
}

/* The hardware's own prefetching reads one stream per core at half of the memory's speed; asking this far ahead (bytes)
 * reads at all of it. A prefetch beyond the end of an array is ignored. */
#define AHEAD 4096
#define LINE 64

static inline void prefetch(const void *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch((const char *)p + i, 0, 3);
}

#define INLINE static inline __attribute__((always_inline))

/* y[o] = sum_i w[o, i] x[i], four partial sums at a time. */
#define LINEAR_ROWS(NAME, T, LOAD, WIDEN)                                                        \
    static void NAME(const T *w, const float *x, float *y, int64_t rows, int64_t in) {           \
        for (int64_t o = 0; o < rows; o++, w += in) {                                            \
            vec a = {0}, b = {0}, c = {0}, d = {0};                                              \
            int64_t i = 0;                                                                       \
            for (; i + 4 * LANES <= in; i += 4 * LANES) {                                        \
                prefetch((const char *)(w + i) + AHEAD, 4 * LANES * sizeof(T));                  \
                a += LOAD(w + i) * load32(x + i);                                                \
                b += LOAD(w + i + LANES) * load32(x + i + LANES);                                \
                c += LOAD(w + i + 2 * LANES) * load32(x + i + 2 * LANES);                        \
                d += LOAD(w + i + 3 * LANES) * load32(x + i + 3 * LANES);                        \
            }                                                                                    \
            for (; i + LANES <= in; i += LANES) a += LOAD(w + i) * load32(x + i);                \
            float sum = total((a + b) + (c + d));                                                \
            for (; i < in; i++) sum += WIDEN(w[i]) * x[i];                                       \
            y[o] = sum;                                                                          \
        }                                                                                        \
    }
#define SAME(x) (x)
LINEAR_ROWS(linear_f32, float, load32, SAME)
LINEAR_ROWS(linear_b16, uint16_t, load16, widen)

#endif
