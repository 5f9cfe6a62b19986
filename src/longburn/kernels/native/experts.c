/* A mixture of experts for a few tokens, reading MXFP4 (or dense) weights once, at the memory's speed; and unpacking
 * MXFP4 for the matrix kernels that many tokens want.
 *
 * Sixteen bytes of a block are the codes of its 32 values. Widened to sixteen lanes, their low halves are the even
 * values and their high halves the odd ones, so the vector they are multiplied with is kept in that order too ("split").
 */

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "common.h"

#define BLOCK 32 /* values that share a scale */
#define BYTES 16 /* of their codes */
#define MXFP4 2  /* as `type`, of weights only */

#ifdef __AVX512F__ /* two steps that compilers do not find: sixteen bytes to sixteen lanes, a table of sixteen numbers */
static inline uvec lanes(const uint8_t *bytes) { return (uvec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)bytes)); }

static inline vec number(uvec code) {
    static const float numbers[16] __attribute__((aligned(64))) = {
        0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    return (vec)_mm512_permutexvar_ps((__m512i)code, _mm512_load_ps(numbers));
}
#else
static inline uvec lanes(const uint8_t *bytes) {
    uvec x;
    for (int i = 0; i < LANES; i++) x[i] = bytes[i];
    return x;
}

/* The number that the low four bits of each lane stand for. */
static inline vec number(uvec code) {
    uvec normal = ((code & 7) << 22) + 0x3f000000u; /* two bits of exponent, one of mantissa, put where fp32 has them */
    uvec small = (0 - (code & 1)) & 0x3f000000u;    /* without an exponent: 0 or 0.5 */
    uvec is_small = (uvec)((code & 6) == 0);
    return (vec)((normal & ~is_small) | (small & is_small) | (code & 8) << 28);
}
#endif

static inline void unpack(const uint8_t *codes, vec *even, vec *odd) {
    uvec code = lanes(codes);
    *even = number(code), *odd = number(code >> 4);
}

/* The scale of each scale byte: 2^(byte - 127), NaN for 255. */
static void fill_scales(float *scales) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t bits = byte == 255 ? 0x7fc00000u : byte ? byte << 23 : 0x00400000u;
        memcpy(scales + byte, &bits, 4);
    }
}

/* Where value i of a split vector stands. */
static inline int64_t split(int64_t i) { return i / BLOCK * BLOCK + i % 2 * (BLOCK / 2) + i % BLOCK / 2; }

/* y[o] = sum_i w[o, i] x[i] with x split and groups blocks a row. */
static void linear_mxfp4(
    const uint8_t *codes, const uint8_t *bytes, const float *scales, const float *x, float *y, int64_t rows, int64_t groups) {
    for (int64_t o = 0; o < rows; o++, codes += BYTES * groups, bytes += groups) {
        vec sums[4] = {{0}};
        prefetch((const char *)bytes + AHEAD / BYTES, groups);
        int64_t g = 0;
        for (; g + 4 <= groups; g += 4) {
            prefetch(codes + BYTES * g + AHEAD, 4 * BYTES);
            for (int64_t i = 0; i < 4; i++) {
                vec even, odd;
                unpack(codes + BYTES * (g + i), &even, &odd);
                const float *part = x + BLOCK * (g + i);
                sums[i] += (even * load32(part) + odd * load32(part + LANES)) * scales[bytes[g + i]];
            }
        }
        for (; g < groups; g++) {
            vec even, odd;
            unpack(codes + BYTES * g, &even, &odd);
            sums[0] += (even * load32(x + BLOCK * g) + odd * load32(x + BLOCK * g + LANES)) * scales[bytes[g]];
        }
        y[o] = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

typedef struct {
    const void *data;      /* [E, out, in], or [E, out, in / 32, 16] for MXFP4 */
    const uint8_t *scales; /* MXFP4: [E, out, in / 32] */
    const void *bias;      /* [E, out] */
    int64_t out, in, type, bias_type;
} matrix;

typedef struct {
    const void *x;         /* [N, in], of type */
    const int64_t *chosen; /* [N, k] */
    const void *weights;   /* [N, k] */
    void *y;               /* [N, out], of type */
    int64_t *failed;       /* set to 1 if an expert does not exist (then nothing else is written), else to 0 */
    matrix gate_up, down;
    int64_t N, k, E, type, weights_type;
    double alpha, limit;
} experts_args;

/* y[o] = bias + row . x for rows first .. first + rows - 1 of an expert's matrix. */
static void some_rows(const matrix *w, int64_t expert, int64_t first, int64_t rows, const float *scales, const float *x, float *y) {
    const int64_t row = expert * w->out + first, groups = w->in / BLOCK;
    if (w->type == MXFP4)
        linear_mxfp4((const uint8_t *)w->data + row * groups * BYTES, w->scales + row * groups, scales, x, y, rows, groups);
    else if (w->type) linear_b16((const uint16_t *)w->data + row * w->in, x, y, rows, w->in);
    else linear_f32((const float *)w->data + row * w->in, x, y, rows, w->in);
    for (int64_t o = 0; o < rows; o++) y[o] += get(w->bias, row + o, w->bias_type);
}

#define ROWS 32 /* rows of one expert that a thread computes at a time, for all its tokens: they stay in the cache */

void longburn_experts(const experts_args *a) {
    const int64_t pairs = a->N * a->k, M = a->gate_up.in, I = a->down.in, out = a->down.out;
    const int64_t up_blocks = (2 * I + ROWS - 1) / ROWS, down_blocks = (out + ROWS - 1) / ROWS;
    const int split_x = a->gate_up.type == MXFP4, split_hidden = a->down.type == MXFP4;
    const float alpha = (float)a->alpha, limit = (float)a->limit;
    *a->failed = 0;
    for (int64_t p = 0; p < pairs; p++) *a->failed |= a->chosen[p] < 0 || a->chosen[p] >= a->E;
    if (*a->failed) return;

    int64_t *order = malloc(8 * (size_t)(2 * pairs + 1) + 4 * (size_t)(a->N * (M + out) + pairs * I));
    int64_t *starts = order + pairs, groups = 0; /* pairs of one expert stand together, so that its rows are read once */
    float *x = (float *)(starts + pairs + 1), *hidden = x + a->N * M, *y = hidden + pairs * I;
    for (int64_t p = 0; p < pairs; p++) {
        int64_t at = p;
        for (; at && a->chosen[order[at - 1]] > a->chosen[p]; at--) order[at] = order[at - 1];
        order[at] = p;
    }
    for (int64_t i = 0; i < pairs; i++)
        if (!i || a->chosen[order[i]] != a->chosen[order[i - 1]]) starts[groups++] = i;
    starts[groups] = pairs;
    for (int64_t n = 0; n < a->N; n++)
        for (int64_t i = 0; i < M; i++) x[n * M + (split_x ? split(i) : i)] = get(a->x, n * M + i, a->type);
    float scales[256];
    fill_scales(scales);

#pragma omp parallel if (pairs * I * M > 32768)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < groups * up_blocks; task++) {
            const int64_t first = task % up_blocks * ROWS, rows = 2 * I - first < ROWS ? 2 * I - first : ROWS;
            for (int64_t i = starts[task / up_blocks]; i < starts[task / up_blocks + 1]; i++) {
                const int64_t pair = order[i];
                float both[ROWS], *gated = hidden + pair * I;
                some_rows(&a->gate_up, a->chosen[pair], first, rows, scales, x + pair / a->k * M, both);
                for (int64_t r = 0; r < rows; r += 2) { /* even rows are gates; a NaN stays one */
                    float gate = both[r] > limit ? limit : both[r], up = both[r + 1];
                    up = up > limit ? limit : up < -limit ? -limit : up;
                    int64_t at = split_hidden ? split((first + r) / 2) : (first + r) / 2;
                    gated[at] = gate / (1.0f + expf(-alpha * gate)) * (up + 1.0f);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < down_blocks; task++) { /* a thread sums all experts of its rows, always in one order */
            const int64_t first = task * ROWS, rows = out - first < ROWS ? out - first : ROWS;
            for (int64_t n = 0; n < a->N; n++) memset(y + n * out + first, 0, 4 * (size_t)rows);
            for (int64_t i = 0; i < pairs; i++) {
                const int64_t pair = order[i], n = pair / a->k;
                const float weight = get(a->weights, pair, a->weights_type);
                float sums[ROWS];
                some_rows(&a->down, a->chosen[pair], first, rows, scales, hidden + pair * I, sums);
                for (int64_t r = 0; r < rows; r++) y[n * out + first + r] += weight * sums[r];
            }
            for (int64_t n = 0; n < a->N; n++)
                for (int64_t r = first; r < first + rows; r++) put(a->y, n * out + r, a->type, y[n * out + r]);
        }
    }
    free(order);
}

typedef struct {
    const uint8_t *codes, *scales; /* [blocks, 16], [blocks] */
    void *y;                       /* [blocks, 32] */
    int64_t blocks, type;
} dequantize_args;

void longburn_dequantize(const dequantize_args *a) {
    float scales[256];
    fill_scales(scales);
#pragma omp parallel for schedule(static) if (a->blocks > 4096)
    for (int64_t g = 0; g < a->blocks; g++) {
        prefetch(a->codes + BYTES * g + AHEAD, BYTES);
        vec even, odd;
        unpack(a->codes + BYTES * g, &even, &odd);
        even *= scales[a->scales[g]], odd *= scales[a->scales[g]];
        if (a->type) { /* the upper halves, the even one first: every value is a bf16 number */
            uvec both = (uvec)even >> 16 | ((uvec)odd & 0xffff0000u);
            memcpy((uint16_t *)a->y + BLOCK * g, &both, sizeof both);
        } else {
            float *row = (float *)a->y + BLOCK * g;
            for (int64_t i = 0; i < LANES; i++) row[2 * i] = even[i], row[2 * i + 1] = odd[i];
        }
    }
}

/* The codes of 32 values under a scale byte: the nearest magnitude, from half-way on to the even code. */
static void encode(const float *x, float inverse, uint8_t *codes) {
    for (int64_t i = 0; i < BLOCK; i++) {
        float size = fabsf(x[i]) * inverse;
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        codes[i] = (uint8_t)((size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f)
                             + (size >= 3.5f) + (size > 5.0f) + (bits >> 31) * 8);
    }
}

static int is_exact(const float *x, float scale, const uint8_t *codes) {
    static const float magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    int exact = 1;
    for (int64_t i = 0; i < BLOCK; i++) exact &= magnitudes[codes[i] & 7] * scale == fabsf(x[i]);
    return exact;
}

typedef struct {
    const void *x;           /* [blocks, 32] */
    const uint8_t *wished;   /* [blocks], or null: the scale byte to use where it is exact */
    uint8_t *codes, *scales; /* [blocks, 16], [blocks] */
    int64_t *failed;         /* set to the number of blocks that hold NaN or infinite values */
    int64_t blocks, type;
} quantize_args;

void longburn_quantize(const quantize_args *a) {
    float scales[256];
    fill_scales(scales);
    int64_t failed = 0;
#pragma omp parallel for schedule(static) reduction(+ : failed) if (a->blocks > 4096)
    for (int64_t g = 0; g < a->blocks; g++) {
        float x[BLOCK];
        uint32_t largest = 0; /* magnitudes as bits are in the order of the numbers, infinity and NaN last */
        for (int64_t i = 0; i < BLOCK; i++) {
            x[i] = get(a->x, g * BLOCK + i, (int)a->type);
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            bits &= 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        failed += largest >= 0x7f800000u;
        int64_t scale = (int64_t)(largest >> 23) - 2; /* floor(log2), biased; beyond the reach of a scale for subnormals */
        scale = scale < 0 ? 0 : scale > 254 ? 254 : scale;
        uint8_t codes[BLOCK], other[BLOCK];
        encode(x, scales[254 - scale], codes);
        if (a->wished && a->wished[g] != scale && a->wished[g] < 255) {
            encode(x, scales[254 - a->wished[g]], other);
            if (is_exact(x, scales[a->wished[g]], other)) scale = a->wished[g], memcpy(codes, other, BLOCK);
        }
        for (int64_t i = 0; i < BYTES; i++) a->codes[g * BYTES + i] = codes[2 * i] | (uint8_t)(codes[2 * i + 1] << 4);
        a->scales[g] = (uint8_t)scale;
    }
    *a->failed = failed;
}
