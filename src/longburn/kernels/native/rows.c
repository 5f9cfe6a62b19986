/* Decode on the CPU: what a step of one token (or a few) does, read at the memory's speed.
 *
 * A step reads every weight and every cached key once and does next to nothing with it, so the time is bytes over
 * bandwidth, as long as each core streams one contiguous range and nothing else is in the way. Plain C with the vector
 * extensions of gcc and clang; the widths below are lowered to what the machine has. Half precision is bf16, widened to
 * fp32 on load; every sum is fp32.
 *
 * Types: 0 is fp32, 1 is bf16.
 */

#include "common.h"

#define ROWS 64 /* output rows a thread computes at a time: their weights stay in its second cache for every row of x */

static void linear(
    const void *w, const float *x, const void *bias, void *y, int64_t n, int64_t out, int64_t in, int64_t type) {
#pragma omp parallel for schedule(static) if (out * in > 65536)
    for (int64_t block = 0; block < (out + ROWS - 1) / ROWS; block++) {
        int64_t start = block * ROWS, rows = out - start < ROWS ? out - start : ROWS;
        float sums[ROWS];
        for (int64_t i = 0; i < n; i++) {
            if (type) linear_b16((const uint16_t *)w + start * in, x + i * in, sums, rows, in);
            else linear_f32((const float *)w + start * in, x + i * in, sums, rows, in);
            for (int64_t o = 0; o < rows; o++)
                put(y, i * out + start + o, type, sums[o] + (bias ? get(bias, start + o, type) : 0.0f));
        }
    }
}

static const float *widened(const void *x, float *buffer, int64_t n, int64_t type) {
    if (!type) return x;
    for (int64_t i = 0; i < n; i++) buffer[i] = widen(((const uint16_t *)x)[i]);
    return buffer;
}

typedef struct {
    const void *w, *x, *bias; /* [out,in], [n,in], [out] or null */
    void *y;                  /* [n,out] */
    int64_t n, out, in, type;
} linear_args;

void longburn_linear(const linear_args *a) {
    float *buffer = malloc(4 * (size_t)(a->n * a->in));
    linear(a->w, widened(a->x, buffer, a->n * a->in, a->type), a->bias, a->y, a->n, a->out, a->in, a->type);
    free(buffer);
}

static vec exp_neg(vec x);

/* silu(gate) * up, rounded to the type where a separate operation would round: after silu, and after the product. */
static void gated(const void *gate, const void *up, float *y, int64_t n, int64_t type) {
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

typedef struct {
    const void *gate_up; /* [n, 2 hidden], gate first */
    void *y;             /* [n, hidden] */
    int64_t n, hidden, type;
} gated_args;

void longburn_gated(const gated_args *a) {
    const int64_t hidden = a->hidden, bytes = a->type ? 2 : 4;
#pragma omp parallel for schedule(static) if (a->n * hidden > 16384)
    for (int64_t i = 0; i < a->n; i++) {
        const char *gate = (const char *)a->gate_up + 2 * i * hidden * bytes;
        if (!a->type) {
            gated(gate, gate + hidden * bytes, (float *)a->y + i * hidden, hidden, 0);
            continue;
        }
        float row[hidden];
        gated(gate, gate + hidden * bytes, row, hidden, 1);
        for (int64_t h = 0; h < hidden; h++) put(a->y, i * hidden + h, 1, row[h]);
    }
}

typedef struct {
    const void *gate_up, *gate_up_bias, *down, *bias, *x; /* [2 hidden,in], [2 hidden], [out,hidden], [out], [n,in] */
    void *y;                                              /* [n,out] */
    int64_t n, out, hidden, in, type;
} swiglu_args;

void longburn_swiglu(const swiglu_args *a) {
    const int64_t n = a->n, hidden = a->hidden, bytes = a->type ? 2 : 4;
    float *buffer = malloc(4 * (size_t)(n * (a->in + 3 * hidden)));
    char *both = (char *)(buffer + n * a->in);
    float *act = buffer + n * (a->in + 2 * hidden);
    linear(a->gate_up, widened(a->x, buffer, n * a->in, a->type), a->gate_up_bias, both, n, 2 * hidden, a->in, a->type);
    for (int64_t i = 0; i < n; i++) {
        const char *gate = both + 2 * i * hidden * bytes;
        gated(gate, gate + hidden * bytes, act + i * hidden, hidden, a->type);
    }
    linear(a->down, act, a->bias, a->y, n, a->out, hidden, a->type);
    free(buffer);
}

typedef struct {
    const void *x, *w; /* [rows,n], [n] */
    void *y;
    int64_t rows, n;
    double eps;
    int64_t round_last, type;
} rms_norm_args;

/* y = x / sqrt(mean(x^2) + eps) * w, by rows; unless round_last, x is rounded to its type before the product with w. */
void longburn_rms_norm(const rms_norm_args *a) {
    const int64_t n = a->n, type = a->type;
#pragma omp parallel for schedule(static) if (a->rows * n > 65536)
    for (int64_t r = 0; r < a->rows; r++) {
        float squares = 0;
        for (int64_t i = 0; i < n; i++) {
            float v = get(a->x, r * n + i, type);
            squares += v * v;
        }
        float scale = 1.0f / sqrtf(squares / (float)n + (float)a->eps);
        for (int64_t i = 0; i < n; i++) {
            float v = get(a->x, r * n + i, type) * scale;
            put(a->y, r * n + i, type, (type && !a->round_last ? widen(narrow(v)) : v) * get(a->w, i, type));
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
    const void *q, *q_sink, *k, *v, *sinks, *slopes; /* q [B,H,T,D]; sinks, slopes fp32 [H] or null */
    const int64_t *q_pos, *k_pos;                    /* [B|1,T], [B|1,S] */
    void *out;                                       /* [B,H,T,D] contiguous */
    float *lse;                                      /* [B,H,T] contiguous */
    int64_t B, H, K, T, S, D;
    int64_t q_row, q_head, q_token; /* strides in elements, the same for q_sink */
    int64_t k_row, k_head, k_slot, v_row, v_head, v_slot;
    int64_t q_pos_row, k_pos_row; /* strides; 0 if shared by all rows */
    int64_t window, sink_tokens;  /* window < 0: all keys */
    double scale;
    int64_t ascending; /* no slot holds a position below its own number: those beyond the newest query need no look */
    int64_t type;
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
        int64_t at = b * a->q_row + (kv * G + i / T) * a->q_head + i % T * a->q_token;
        for (int64_t d = 0; d < D; d++) q[0][i][d] = get(a->q, at + d, type) * (float)a->scale;
        if (a->q_sink)
            for (int64_t d = 0; d < D; d++) q[1][i][d] = get(a->q_sink, at + d, type) * (float)a->scale;
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

static part part_for(int64_t D, int64_t type) {
    if (D == 64) return type ? attend_b16_64 : attend_f32_64;
    if (D == 128) return type ? attend_b16_128 : attend_f32_128;
    return type ? attend_b16 : attend_f32;
}

#define SPLIT 512 /* at most so many keys in one part of the length */

/* Slots of the row that have to be looked at. It is the row's own number, so that its bits do not depend on others. */
static int64_t reach(const attend_args *a, int64_t b) {
    if (!a->ascending) return a->S;
    int64_t newest = -1;
    for (int64_t t = 0; t < a->T; t++) {
        int64_t p = a->q_pos[b * a->q_pos_row + t];
        newest = p > newest ? p : newest;
    }
    return newest + 1 < a->S ? newest + 1 : a->S;
}

void longburn_attend(const attend_args *a) {
    const int64_t G = a->H / a->K, n = G * a->T, D = a->D, size = n * (D + 2), heads = a->B * a->K;
    int64_t slots[a->B], most = 1;
    for (int64_t b = 0; b < a->B; b++) {
        slots[b] = reach(a, b);
        most = slots[b] > most ? slots[b] : most;
    }
    const int64_t parts = (most + SPLIT - 1) / SPLIT;
    float *scratch = malloc(4 * (size_t)(heads * parts * size));
    const part run = part_for(D, a->type);
#pragma omp parallel for schedule(static) if (heads * parts > 1 && heads * most * D > 8192)
    for (int64_t task = 0; task < heads * parts; task++) {
        int64_t head = task / parts, part = task % parts, S = slots[head / a->K], own = (S + SPLIT - 1) / SPLIT;
        if (part >= own) continue;
        int64_t step = (S + own - 1) / own, s0 = part * step, s1 = s0 + step < S ? s0 + step : S;
        float *m = scratch + task * size;
        run(a, head / a->K, head % a->K, s0, s1, m, m + n, m + 2 * n);
    }
    for (int64_t head = 0; head < heads; head++) {
        const int64_t own = (slots[head / a->K] + SPLIT - 1) / SPLIT;
        for (int64_t i = 0; i < n; i++) {
            int64_t h = head % a->K * G + i / a->T, row = ((head / a->K) * a->H + h) * a->T + i % a->T;
            const float *first = scratch + head * parts * size;
            float top = a->sinks ? ((const float *)a->sinks)[h] : -INFINITY;
            for (int64_t p = 0; p < own; p++) top = first[p * size + i] > top ? first[p * size + i] : top;
            float sum = a->sinks && top > -INFINITY ? expf(((const float *)a->sinks)[h] - top) : 0.0f;
            float weight[parts];
            for (int64_t p = 0; p < own; p++) {
                float part = first[p * size + i];
                weight[p] = part == -INFINITY ? 0.0f : expf(part - top);
                sum += weight[p] * first[p * size + n + i];
            }
            for (int64_t d = 0; d < D; d++) {
                float x = 0;
                for (int64_t p = 0; p < own; p++) x += weight[p] * first[p * size + 2 * n + i * D + d];
                put(a->out, row * D + d, a->type, sum > 0 ? x / sum : 0.0f);
            }
            a->lse[row] = sum > 0 ? top + logf(sum) : -INFINITY;
        }
    }
    free(scratch);
}

#define PARTS 4 /* at most, in one merge */

typedef struct {
    const void *out; /* [B,H,T,D] */
    const float *lse; /* [B,H,T] */
    int64_t out_row, out_head, out_token, lse_row, lse_head, lse_token; /* strides in elements */
} attended;

typedef struct {
    attended parts[PARTS];
    void *out;  /* [B,T,H,D] contiguous: as the output projection reads it */
    float *lse; /* [B,H,T] contiguous */
    int64_t n, B, H, T, D, type;
} merge_args;

/* Attention over disjoint sets of keys, weighted by their shares of the softmax. */
void longburn_merge(const merge_args *a) {
    const int64_t H = a->H, T = a->T, D = a->D;
#pragma omp parallel for collapse(2) schedule(static) if (a->B * H * T * D > 16384)
    for (int64_t b = 0; b < a->B; b++)
        for (int64_t t = 0; t < T; t++)
            for (int64_t h = 0; h < H; h++) {
                float lse[PARTS], weight[PARTS], top = -INFINITY, sum = 0;
                for (int64_t p = 0; p < a->n; p++) {
                    const attended *part = a->parts + p;
                    lse[p] = part->lse[b * part->lse_row + h * part->lse_head + t * part->lse_token];
                    top = lse[p] > top ? lse[p] : top;
                }
                for (int64_t p = 0; p < a->n; p++) sum += weight[p] = top > -INFINITY ? expf(lse[p] - top) : 0.0f;
                const int64_t to = ((b * T + t) * H + h) * D;
                float row[D];
                memset(row, 0, 4 * (size_t)D);
                for (int64_t p = 0; p < a->n; p++) {
                    const attended *part = a->parts + p;
                    if (weight[p] == 0) continue; /* a part that saw nothing may hold anything */
                    const int64_t from = b * part->out_row + h * part->out_head + t * part->out_token;
                    const float share = weight[p] / sum;
                    if (a->type) for (int64_t d = 0; d < D; d++) row[d] += share * widen(((const uint16_t *)part->out)[from + d]);
                    else for (int64_t d = 0; d < D; d++) row[d] += share * ((const float *)part->out)[from + d];
                }
                if (a->type) for (int64_t d = 0; d < D; d++) ((uint16_t *)a->out)[to + d] = narrow(row[d]);
                else memcpy((float *)a->out + to, row, 4 * (size_t)D);
                a->lse[(b * H + h) * T + t] = top > -INFINITY ? top + logf(sum) : -INFINITY;
            }
}
