/* Decode on the CPU: what a step of one token (or a few) does, read at the memory's speed.
 *
 * A step reads every weight and every cached key once and does next to nothing with it, so the time is bytes over
 * bandwidth, as long as each core streams one contiguous range and nothing else is in the way. Plain C with the vector
 * extensions of gcc and clang; the widths below are lowered to what the machine has. Half precision is bf16, widened to
 * fp32 on load; every sum is fp32.
 *
 * Types: 0 is fp32, 1 is bf16.
 */

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

static inline float get(const void *p, int64_t i, int type) {
    return type ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static inline void put(void *p, int64_t i, int type, float x) {
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

#define ROWS 64 /* output rows a thread computes at a time */

static void linear(const void *w, const float *x, const void *bias, void *y, int64_t out, int64_t in, int type) {
#pragma omp parallel for schedule(static) if (out * in > 65536)
    for (int64_t block = 0; block < (out + ROWS - 1) / ROWS; block++) {
        int64_t start = block * ROWS, rows = out - start < ROWS ? out - start : ROWS;
        float sums[ROWS];
        if (type) linear_b16((const uint16_t *)w + start * in, x, sums, rows, in);
        else linear_f32((const float *)w + start * in, x, sums, rows, in);
        for (int64_t o = 0; o < rows; o++)
            put(y, start + o, type, sums[o] + (bias ? get(bias, start + o, type) : 0.0f));
    }
}

static const float *widened(const void *x, float *buffer, int64_t n, int type) {
    if (!type) return x;
    for (int64_t i = 0; i < n; i++) buffer[i] = widen(((const uint16_t *)x)[i]);
    return buffer;
}

void longburn_linear(const void *w, const void *x, const void *bias, void *y, int64_t out, int64_t in, int type) {
    float *buffer = malloc(4 * (size_t)in);
    linear(w, widened(x, buffer, in, type), bias, y, out, in, type);
    free(buffer);
}

static vec exp_neg(vec x);

/* silu(gate) * up, rounded to the type where a separate operation would round: after silu, and after the product. */
static void gated(const void *gate, const void *up, float *y, int64_t n, int type) {
    for (int64_t i = 0; i < n; i += LANES) {
        float g[LANES] __attribute__((aligned(64))), u[LANES];
        int64_t width = n - i < LANES ? n - i : LANES;
        for (int64_t l = 0; l < LANES; l++) g[l] = l < width ? get(gate, i + l, type) : 0, u[l] = l < width ? get(up, i + l, type) : 0;
        vec x = *(vec *)g, e = exp_neg((vec)((ivec)x | (int32_t)0x80000000)); /* exp(-|x|) */
        vec one = 1.0f + (vec){0}, top = (vec)(((ivec)one & (x >= 0.0f)) | ((ivec)e & (x < 0.0f)));
        vec s = x * top / (1.0f + e);
        for (int64_t l = 0; l < width; l++) {
            float v = (type ? widen(narrow(s[l])) : s[l]) * u[l];
            y[i + l] = type ? widen(narrow(v)) : v;
        }
    }
}

void longburn_swiglu(
    const void *gate_up, const void *gate_up_bias, const void *down, const void *bias, const void *x, void *y,
    int64_t out, int64_t hidden, int64_t in, int type) {
    float *buffer = malloc(4 * (size_t)(in + 3 * hidden));
    void *both = buffer + in;
    float *act = buffer + in + 2 * hidden;
    linear(gate_up, widened(x, buffer, in, type), gate_up_bias, both, 2 * hidden, in, type);
    gated(both, (char *)both + (type ? 2 : 4) * hidden, act, hidden, type);
    linear(down, act, bias, y, out, hidden, type);
    free(buffer);
}

/* y = x / sqrt(mean(x^2) + eps) * w, by rows; the product with w is formed after rounding x to its type, as in training. */
void longburn_rms_norm(const void *x, const void *w, void *y, int64_t rows, int64_t n, float eps, int type) {
    for (int64_t r = 0; r < rows; r++) {
        float squares = 0;
        for (int64_t i = 0; i < n; i++) {
            float v = get(x, r * n + i, type);
            squares += v * v;
        }
        float scale = 1.0f / sqrtf(squares / (float)n + eps);
        for (int64_t i = 0; i < n; i++) {
            float v = get(x, r * n + i, type) * scale;
            put(y, r * n + i, type, (type ? widen(narrow(v)) : v) * get(w, i, type));
        }
    }
}

/* exp for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], relative error below 2e-7; 0 far down. */
static vec exp_neg(vec x) {
    ivec dead = x < -87.0f;
    x = (vec)((ivec)x & ~dead);
    vec t = x * 1.44269504088896341f;
    ivec n = __builtin_convertvector(t - 0.5f, ivec); /* t <= 0, so truncation rounds to nearest */
    vec r = x - __builtin_convertvector(n, vec) * 0.693359375f + __builtin_convertvector(n, vec) * 2.12194440e-4f;
    vec p = 1.9875691500e-4f + (vec){0};
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits = (n + 127) << 23;
    return (vec)((ivec)(p * (vec)bits) & ~dead);
}

#define TILE 64     /* keys whose scores are formed before their values are read: their keys stay in the first cache */
#define QUERIES 16  /* at most: queries of one kv head in one call */

typedef struct {
    const void *q, *q_sink, *k, *v, *sinks, *slopes; /* q [B,H,T,D] contiguous; sinks, slopes fp32 [H] or null */
    const int64_t *q_pos, *k_pos;                    /* [B|1,T], [B|1,S] */
    void *out;                                       /* [B,H,T,D] */
    float *lse;                                      /* [B,H,T] */
    int64_t B, H, K, T, S, D;
    int64_t k_row, k_head, k_slot, v_row, v_head, v_slot; /* strides in elements */
    int64_t q_pos_row, k_pos_row;                         /* strides; 0 if shared by all rows */
    int64_t window, sink_tokens;                          /* window < 0: all keys */
    float scale;
    int type;
    int64_t splits; /* parts of the length; set by the shape alone, so that results do not depend on the threads */
} attend_args;

/* Rows of keys or values in fp32: where they stand, or widened into a buffer. */
typedef struct {
    const float *first;
    int64_t stride;
} tile;

static inline tile fp32_tile(const void *rows, int64_t stride, int64_t width, int64_t D, float *buffer, int type) {
    if (!type) return (tile){rows, stride};
    for (int64_t s = 0; s < width; s++)
        for (int64_t d = 0; d < D; d += LANES)
            *(vec *)(buffer + s * D + d) = load16((const uint16_t *)rows + s * stride + d);
    return (tile){buffer, D};
}

#define INLINE static inline __attribute__((always_inline))

INLINE float dot(const float *a, const float *b, int64_t D) {
    vec sum = {0};
    for (int64_t d = 0; d < D; d += LANES) sum += load32(a + d) * load32(b + d);
    return total(sum);
}

/* acc = acc * fade + sum over keys of weight * value; D is a constant where it matters, so that acc stays in registers. */
INLINE void weigh(tile v, const float *weights, const uint8_t *any, int64_t width, float fade, float *acc, int64_t D) {
    for (int64_t d0 = 0; d0 < D; d0 += 8 * LANES) {
        int64_t n = (D - d0 < 8 * LANES ? D - d0 : 8 * LANES) / LANES;
        vec sum[8];
        for (int64_t i = 0; i < n; i++) sum[i] = load32(acc + d0 + i * LANES) * fade;
        for (int64_t s = 0; s < width; s++) {
            if (!any[s]) continue; /* an unseen slot may hold NaN, and 0 * NaN is NaN */
            const float *value = v.first + s * v.stride + d0;
            for (int64_t i = 0; i < n; i++) sum[i] += load32(value + i * LANES) * weights[s];
        }
        for (int64_t i = 0; i < n; i++) *(vec_u *)(acc + d0 + i * LANES) = sum[i];
    }
}

/* Scores to weights relative to the new maximum; returns what the old sums fade by. */
static float soften(float *scores, int64_t width, float *m, float *l) {
    float top = *m;
    for (int64_t s = 0; s < width; s++) top = scores[s] > top ? scores[s] : top;
    if (top == -INFINITY) {
        memset(scores, 0, 4 * TILE);
        return 1.0f;
    }
    for (int64_t s = width; s < TILE; s++) scores[s] = -INFINITY;
    vec sum = {0};
    for (int64_t s = 0; s < TILE; s += LANES) {
        vec w = exp_neg(*(vec *)(scores + s) - top);
        *(vec *)(scores + s) = w;
        sum += w;
    }
    float fade = *m == -INFINITY ? 0.0f : *m == top ? 1.0f : expf(*m - top);
    *l = *l * fade + total(sum);
    *m = top;
    return fade;
}

/* One row, one kv head, keys s0 .. s1 - 1: for every query the running maximum, sum and weighted values. */
INLINE void attend_part(
    const attend_args *a, int64_t b, int64_t kv, int64_t s0, int64_t s1, float *m, float *l, float *acc, int64_t D, int type) {
    const int64_t T = a->T, G = a->H / a->K, n = G * T, bytes = type ? 2 : 4;
    const int64_t *q_pos = a->q_pos + b * a->q_pos_row, *k_pos = a->k_pos + b * a->k_pos_row;
    const char *k = (const char *)a->k + bytes * (b * a->k_row + kv * a->k_head);
    const char *v = (const char *)a->v + bytes * (b * a->v_row + kv * a->v_head);
    float q[2][QUERIES][D] __attribute__((aligned(64)));
    for (int64_t i = 0; i < n; i++) {
        int64_t at = ((b * a->H + kv * G + i / T) * T + i % T) * D;
        for (int64_t d = 0; d < D; d++) q[0][i][d] = get(a->q, at + d, type) * a->scale;
        if (a->q_sink)
            for (int64_t d = 0; d < D; d++) q[1][i][d] = get(a->q_sink, at + d, type) * a->scale;
        m[i] = -INFINITY, l[i] = 0;
    }
    memset(acc, 0, 4 * (size_t)(n * D));
    float scores[QUERIES][TILE] __attribute__((aligned(64))), buffer[type ? TILE : 1][D] __attribute__((aligned(64)));
    for (int64_t t0 = s0; t0 < s1; t0 += TILE) {
        const int64_t width = s1 - t0 < TILE ? s1 - t0 : TILE, *j = k_pos + t0;
        uint8_t any[TILE] = {0}, sees[QUERIES][TILE];
        int plain[QUERIES]; /* every key of the tile is seen by this query, and none is a sink with a query of its own */
        for (int64_t t = 0; t < T; t++) {
            const int64_t p = q_pos[t];
            int seen = 0, sinks = 0;
            for (int64_t s = 0; s < width; s++) {
                int sink = j[s] < a->sink_tokens;
                sees[t][s] = j[s] >= 0 && p >= j[s] && (a->window < 0 || p - j[s] < a->window || sink);
                any[s] |= sees[t][s], seen += sees[t][s], sinks += sink;
            }
            plain[t] = seen == width && !(sinks && a->q_sink);
        }
        for (int64_t s = 0; s < width; s++) prefetch(v + bytes * (t0 + s) * a->v_slot, bytes * D);
        tile keys = fp32_tile(k + bytes * t0 * a->k_slot, a->k_slot, width, D, *buffer, type);
        for (int64_t i = 0; i < n; i++) {
            const int64_t t = i % T, p = q_pos[t];
            for (int64_t s = 0; s < width; s++) scores[i][s] = dot(q[0][i], keys.first + s * keys.stride, D);
            if (!plain[t])
                for (int64_t s = 0; s < width; s++) {
                    if (!sees[t][s]) scores[i][s] = -INFINITY;
                    else if (a->q_sink && j[s] < a->sink_tokens)
                        scores[i][s] = dot(q[1][i], keys.first + s * keys.stride, D);
                }
            if (a->slopes)
                for (int64_t s = 0; s < width; s++)
                    if (sees[t][s]) scores[i][s] -= ((const float *)a->slopes)[kv * G + i / T] * (float)(p - j[s]);
        }
        for (int64_t s = TILE; s < TILE + width; s++) prefetch(k + bytes * (t0 + s) * a->k_slot, bytes * D);
        tile values = fp32_tile(v + bytes * t0 * a->v_slot, a->v_slot, width, D, *buffer, type);
        for (int64_t i = 0; i < n; i++) {
            float fade = soften(scores[i], width, m + i, l + i);
            weigh(values, scores[i], any, width, fade, acc + i * D, D);
        }
    }
}

#define ATTEND_PART(NAME, D, TYPE)                                                                                      \
    static void NAME(                                                                                                   \
        const attend_args *a, int64_t b, int64_t kv, int64_t s0, int64_t s1, float *m, float *l, float *acc) {          \
        attend_part(a, b, kv, s0, s1, m, l, acc, D, TYPE);                                                              \
    }
ATTEND_PART(attend_f32_64, 64, 0)
ATTEND_PART(attend_b16_64, 64, 1)
ATTEND_PART(attend_f32_128, 128, 0)
ATTEND_PART(attend_b16_128, 128, 1)
ATTEND_PART(attend_f32, a->D, 0)
ATTEND_PART(attend_b16, a->D, 1)

typedef void (*part)(const attend_args *, int64_t, int64_t, int64_t, int64_t, float *, float *, float *);

static part part_for(int64_t D, int type) {
    if (D == 64) return type ? attend_b16_64 : attend_f32_64;
    if (D == 128) return type ? attend_b16_128 : attend_f32_128;
    return type ? attend_b16 : attend_f32;
}

void longburn_attend(const attend_args *a) {
    const int64_t G = a->H / a->K, n = G * a->T, D = a->D, parts = a->splits, size = n * (D + 2);
    const int64_t step = (a->S + parts - 1) / parts, heads = a->B * a->K;
    float *scratch = malloc(4 * (size_t)(heads * parts * size));
    const part run = part_for(D, a->type);
#pragma omp parallel for schedule(static) if (heads * parts > 1 && heads * a->S * D > 8192)
    for (int64_t task = 0; task < heads * parts; task++) {
        int64_t head = task / parts, part = task % parts, s0 = part * step, s1 = s0 + step < a->S ? s0 + step : a->S;
        float *m = scratch + task * size;
        run(a, head / a->K, head % a->K, s0, s1, m, m + n, m + 2 * n);
    }
    for (int64_t head = 0; head < heads; head++) {
        for (int64_t i = 0; i < n; i++) {
            int64_t h = head % a->K * G + i / a->T, row = ((head / a->K) * a->H + h) * a->T + i % a->T;
            const float *first = scratch + head * parts * size;
            float top = a->sinks ? ((const float *)a->sinks)[h] : -INFINITY;
            for (int64_t p = 0; p < parts; p++) top = first[p * size + i] > top ? first[p * size + i] : top;
            float sum = a->sinks && top > -INFINITY ? expf(((const float *)a->sinks)[h] - top) : 0.0f;
            float weight[parts];
            for (int64_t p = 0; p < parts; p++) {
                float part = first[p * size + i];
                weight[p] = part == -INFINITY ? 0.0f : expf(part - top);
                sum += weight[p] * first[p * size + n + i];
            }
            for (int64_t d = 0; d < D; d++) {
                float x = 0;
                for (int64_t p = 0; p < parts; p++) x += weight[p] * first[p * size + 2 * n + i * D + d];
                put(a->out, row * D + d, a->type, sum > 0 ? x / sum : 0.0f);
            }
            a->lse[row] = sum > 0 ? top + logf(sum) : -INFINITY;
        }
    }
    free(scratch);
}
