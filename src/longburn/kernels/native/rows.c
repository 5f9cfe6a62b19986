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

/* y[o] = sum_i w[o, i] x[i] + b[o]; four rows at a time share the loads of x and keep four reads in flight. */
#define LINEAR_ROWS(NAME, T, LOAD, WIDEN)                                                        \
    static void NAME(const T *w, const float *x, float *y, int64_t rows, int64_t in) {           \
        int64_t o = 0;                                                                           \
        for (; o + 4 <= rows; o += 4) {                                                          \
            const T *a = w + o * in, *b = a + in, *c = b + in, *d = c + in;                      \
            vec sa = {0}, sb = {0}, sc = {0}, sd = {0};                                          \
            int64_t i = 0;                                                                       \
            for (; i + LANES <= in; i += LANES) {                                                \
                vec xi = load32(x + i);                                                          \
                sa += LOAD(a + i) * xi, sb += LOAD(b + i) * xi;                                  \
                sc += LOAD(c + i) * xi, sd += LOAD(d + i) * xi;                                  \
            }                                                                                    \
            float ta = total(sa), tb = total(sb), tc = total(sc), td = total(sd);                \
            for (; i < in; i++) {                                                                \
                ta += WIDEN(a[i]) * x[i], tb += WIDEN(b[i]) * x[i];                              \
                tc += WIDEN(c[i]) * x[i], td += WIDEN(d[i]) * x[i];                              \
            }                                                                                    \
            y[o] = ta, y[o + 1] = tb, y[o + 2] = tc, y[o + 3] = td;                              \
        }                                                                                        \
        for (; o < rows; o++) {                                                                  \
            const T *a = w + o * in;                                                             \
            vec sa = {0};                                                                        \
            int64_t i = 0;                                                                       \
            for (; i + LANES <= in; i += LANES) sa += LOAD(a + i) * load32(x + i);               \
            float ta = total(sa);                                                                \
            for (; i < in; i++) ta += WIDEN(a[i]) * x[i];                                        \
            y[o] = ta;                                                                           \
        }                                                                                        \
    }
#define SAME(x) (x)
LINEAR_ROWS(linear_f32, float, load32, SAME)
LINEAR_ROWS(linear_b16, uint16_t, load16, widen)

#define ROWS 64 /* output rows a thread computes at a time */

void longburn_linear(const void *w, const void *x, const void *bias, void *y, int64_t out, int64_t in, int type) {
    float *wide = malloc(4 * (size_t)in);
    for (int64_t i = 0; i < in; i++) wide[i] = get(x, i, type);
#pragma omp parallel for schedule(static) if (out * in > 65536)
    for (int64_t block = 0; block < (out + ROWS - 1) / ROWS; block++) {
        int64_t start = block * ROWS, rows = out - start < ROWS ? out - start : ROWS;
        float sums[ROWS];
        if (type) linear_b16((const uint16_t *)w + start * in, wide, sums, rows, in);
        else linear_f32((const float *)w + start * in, wide, sums, rows, in);
        for (int64_t o = 0; o < rows; o++)
            put(y, start + o, type, sums[o] + (bias ? get(bias, start + o, type) : 0.0f));
    }
    free(wide);
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
static inline vec exp_neg(vec x) {
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

#define TILE 64  /* keys whose scores are formed before their values are read */
#define QUERIES 16 /* at most: queries of one kv head in one call */

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

static inline vec load(const void *p, int64_t i, int type) {
    return type ? load16((const uint16_t *)p + i) : load32((const float *)p + i);
}

/* One row, one kv head, keys s0 .. s1 - 1: for every query the running maximum, sum and weighted values. */
static inline __attribute__((always_inline)) void attend_part(
    const attend_args *a, int64_t b, int64_t kv, int64_t s0, int64_t s1, float *m, float *l, float *acc, int type) {
    const int64_t D = a->D, T = a->T, G = a->H / a->K, n = G * T;
    const int64_t *q_pos = a->q_pos + b * a->q_pos_row, *k_pos = a->k_pos + b * a->k_pos_row;
    const char *k = (const char *)a->k + (type ? 2 : 4) * (b * a->k_row + kv * a->k_head);
    const char *v = (const char *)a->v + (type ? 2 : 4) * (b * a->v_row + kv * a->v_head);
    float q[2][QUERIES][256] __attribute__((aligned(64)));
    for (int64_t i = 0; i < n; i++) {
        int64_t at = ((b * a->H + kv * G + i / T) * T + i % T) * D;
        for (int64_t d = 0; d < D; d++) {
            q[0][i][d] = get(a->q, at + d, type) * a->scale;
            q[1][i][d] = a->q_sink ? get(a->q_sink, at + d, type) * a->scale : q[0][i][d];
        }
        m[i] = -INFINITY, l[i] = 0;
        memset(acc + i * D, 0, 4 * (size_t)D);
    }
    float scores[QUERIES][TILE] __attribute__((aligned(64)));
    for (int64_t t0 = s0; t0 < s1; t0 += TILE) {
        int64_t width = s1 - t0 < TILE ? s1 - t0 : TILE;
        uint8_t seen_by_any[TILE];
        for (int64_t s = 0; s < width; s++) {
            int64_t j = k_pos[t0 + s];
            int sink = j < a->sink_tokens, any = 0;
            const char *key = k + (type ? 2 : 4) * (t0 + s) * a->k_slot;
            for (int64_t t = 0; t < T; t++) {
                int64_t p = q_pos[t];
                int sees = j >= 0 && p >= j && (a->window < 0 || p - j < a->window || sink);
                any |= sees;
                for (int64_t g = 0; g < G; g++) {
                    int64_t i = g * T + t;
                    float score = -INFINITY;
                    if (sees) {
                        const float *query = q[sink][i];
                        vec sum = {0};
                        for (int64_t d = 0; d < D; d += LANES) sum += *(const vec *)(query + d) * load(key, d, type);
                        score = total(sum);
                        if (a->slopes) score -= ((const float *)a->slopes)[kv * G + g] * (float)(p - j);
                    }
                    scores[i][s] = score;
                }
            }
            seen_by_any[s] = (uint8_t)any; /* an unseen slot may hold NaN, and 0 * NaN is NaN: it is never read */
        }
        for (int64_t i = 0; i < n; i++) {
            float top = m[i];
            for (int64_t s = 0; s < width; s++) top = scores[i][s] > top ? scores[i][s] : top;
            for (int64_t s = width; s < TILE; s++) scores[i][s] = -INFINITY;
            if (top == -INFINITY) {
                memset(scores[i], 0, sizeof scores[i]);
                continue;
            }
            vec sum = {0};
            for (int64_t s = 0; s < TILE; s += LANES) {
                vec w = exp_neg(*(vec *)(scores[i] + s) - top);
                *(vec *)(scores[i] + s) = w;
                sum += w;
            }
            float fade = m[i] == -INFINITY ? 0.0f : expf(m[i] - top);
            if (fade != 1.0f)
                for (int64_t d = 0; d < D; d++) acc[i * D + d] *= fade;
            l[i] = l[i] * fade + total(sum);
            m[i] = top;
        }
        for (int64_t s = 0; s < width; s++) {
            if (!seen_by_any[s]) continue;
            const char *value = v + (type ? 2 : 4) * (t0 + s) * a->v_slot;
            for (int64_t d = 0; d < D; d += LANES) {
                vec x = load(value, d, type);
                for (int64_t i = 0; i < n; i++) *(vec_u *)(acc + i * D + d) += x * scores[i][s];
            }
        }
    }
}

static void attend_part_f32(const attend_args *a, int64_t b, int64_t kv, int64_t s0, int64_t s1, float *m, float *l, float *acc) {
    attend_part(a, b, kv, s0, s1, m, l, acc, 0);
}

static void attend_part_b16(const attend_args *a, int64_t b, int64_t kv, int64_t s0, int64_t s1, float *m, float *l, float *acc) {
    attend_part(a, b, kv, s0, s1, m, l, acc, 1);
}

void longburn_attend(const attend_args *a) {
    const int64_t G = a->H / a->K, n = G * a->T, D = a->D, parts = a->splits, size = n * (D + 2);
    const int64_t step = (a->S + parts - 1) / parts, heads = a->B * a->K;
    float *scratch = malloc(4 * (size_t)(heads * parts * size));
#pragma omp parallel for schedule(static) if (heads * parts > 1 && heads * a->S * D > 8192)
    for (int64_t task = 0; task < heads * parts; task++) {
        int64_t head = task / parts, part = task % parts, s0 = part * step, s1 = s0 + step < a->S ? s0 + step : a->S;
        float *m = scratch + task * size;
        (a->type ? attend_part_b16 : attend_part_f32)(a, head / a->K, head % a->K, s0, s1, m, m + n, m + 2 * n);
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
