/* The rest of a decode step: what is neither a weight nor a key read. Small, but a step has hundreds of these. */

#include "common.h"

typedef struct {
    const int64_t *ids; /* [n] */
    const char *w;      /* [V, bytes] */
    char *y;            /* [n, bytes] */
    int64_t n, bytes;
} embed_args;

void longburn_embed(const embed_args *a) {
    for (int64_t i = 0; i < a->n; i++)
        memcpy(a->y + i * a->bytes, a->w + a->ids[i] * a->bytes, a->bytes);
}

typedef struct {
    const int64_t *x;
    int64_t *y;
    int64_t n, low, high;
} clamp_args;

void longburn_clamp(const clamp_args *a) {
    for (int64_t i = 0; i < a->n; i++) {
        int64_t x = a->x[i] < a->low ? a->low : a->x[i];
        a->y[i] = x > a->high ? a->high : x;
    }
}

typedef struct {
    const void *x, *z;
    void *y;
    int64_t n, type;
} add_args;

void longburn_add(const add_args *a) {
    for (int64_t i = 0; i < a->n; i++) put(a->y, i, a->type, get(a->x, i, a->type) + get(a->z, i, a->type));
}

typedef struct {
    const int64_t *positions; /* [n] */
    const double *frequency;  /* [R], radians a token, signed */
    float *cos, *sin;         /* [n,R] */
    int64_t n, R;
    double factor;
} angles_args;

void longburn_angles(const angles_args *a) {
    for (int64_t i = 0; i < a->n; i++) {
        for (int64_t r = 0; r < a->R; r++) {
            double phase = (double)a->positions[i] * a->frequency[r];
            a->cos[i * a->R + r] = (float)(cos(phase) * a->factor);
            a->sin[i * a->R + r] = (float)(sin(phase) * a->factor);
        }
    }
}

typedef struct {
    const void *x;          /* [B,H,T,D] */
    const float *cos, *sin; /* [B|1,T,R]; sin with the sign of the channel */
    void *y;                /* [B,H,T,D] contiguous */
    int64_t B, H, T, D, R;
    int64_t x_row, x_head, x_token; /* strides in elements */
    int64_t angle_row;              /* stride; 0 if shared by all rows */
    int64_t interleaved, type;
} rotate_args;

INLINE void rotate_token(const rotate_args *a, int64_t x, int64_t y, int64_t angle, int interleaved, int type) {
    const int64_t R = a->R, half = R / 2;
    const float *c = a->cos + angle, *s = a->sin + angle;
    if (interleaved)
        for (int64_t r = 0; r < R; r++)
            put(a->y, y + r, type, get(a->x, x + r, type) * c[r] + get(a->x, x + (r ^ 1), type) * s[r]);
    else {
        for (int64_t r = 0; r < half; r++)
            put(a->y, y + r, type, get(a->x, x + r, type) * c[r] + get(a->x, x + half + r, type) * s[r]);
        for (int64_t r = half; r < R; r++)
            put(a->y, y + r, type, get(a->x, x + r, type) * c[r] + get(a->x, x + r - half, type) * s[r]);
    }
    for (int64_t d = R; d < a->D; d++) put(a->y, y + d, type, get(a->x, x + d, type));
}

void longburn_rotate(const rotate_args *a) {
#pragma omp parallel for collapse(2) schedule(static) if (a->B * a->H * a->T * a->D > 65536)
    for (int64_t b = 0; b < a->B; b++)
        for (int64_t h = 0; h < a->H; h++)
            for (int64_t t = 0; t < a->T; t++) {
                int64_t x = b * a->x_row + h * a->x_head + t * a->x_token, y = ((b * a->H + h) * a->T + t) * a->D;
                int64_t angle = b * a->angle_row + t * a->R;
                if (a->interleaved) rotate_token(a, x, y, angle, 1, a->type);
                else if (a->type) rotate_token(a, x, y, angle, 0, 1);
                else rotate_token(a, x, y, angle, 0, 0);
            }
}

typedef struct {
    const char *k, *v;         /* [B,K,T], rows of `bytes` bytes */
    const int64_t *positions;  /* [B|1,T] */
    char *k_cache, *v_cache;   /* [B,K,slots] */
    int64_t *held;             /* [B|1,slots], the position in every slot */
    int64_t B, K, T, bytes;
    int64_t k_row, k_head, k_token, v_row, v_head, v_token; /* strides in bytes */
    int64_t cache_row, cache_head;                          /* strides in bytes, the same for both */
    int64_t position_row, held_row;                         /* strides in elements; 0 if shared by all rows */
    int64_t sink_tokens, ring;                              /* ring 0: the slot is the position */
} append_args;

/* The slot of position p is p below sink_tokens, else sink_tokens + (p - sink_tokens) % ring. */
void longburn_append(const append_args *a) {
    for (int64_t b = 0; b < a->B; b++) {
        const int64_t *positions = a->positions + b * a->position_row;
        int64_t newest = -1;
        for (int64_t t = 0; t < a->T; t++) newest = positions[t] > newest ? positions[t] : newest;
        for (int64_t t = 0; t < a->T; t++) {
            int64_t p = positions[t], slot = p;
            if (p < 0) continue;
            if (a->ring && p >= a->sink_tokens) {
                if (p <= newest - a->ring) continue; /* pushed out by a later token of the same call */
                slot = a->sink_tokens + (p - a->sink_tokens) % a->ring;
            }
            for (int64_t h = 0; h < a->K; h++) {
                int64_t to = b * a->cache_row + h * a->cache_head + slot * a->bytes;
                memcpy(a->k_cache + to, a->k + b * a->k_row + h * a->k_head + t * a->k_token, a->bytes);
                memcpy(a->v_cache + to, a->v + b * a->v_row + h * a->v_head + t * a->v_token, a->bytes);
            }
            a->held[b * a->held_row + slot] = p;
        }
    }
}

typedef struct {
    const void *logits; /* [n,E] */
    int64_t *chosen;    /* [n,k] */
    float *weights;     /* [n,k] */
    int64_t n, E, k, type;
} route_args;

/* The k largest logits of each row, largest first, the first of equals first, NaN before all; and their softmax. */
void longburn_route(const route_args *a) {
    for (int64_t i = 0; i < a->n; i++) {
        int64_t *chosen = a->chosen + i * a->k;
        float *weights = a->weights + i * a->k, rest[a->E], sum = 0;
        uint8_t taken[a->E];
        memset(taken, 0, a->E);
        for (int64_t e = 0; e < a->E; e++) rest[e] = get(a->logits, i * a->E + e, a->type);
        for (int64_t j = 0; j < a->k; j++) {
            int64_t best = -1;
            for (int64_t e = 0; e < a->E; e++)
                if (!taken[e] && (best < 0 || rest[e] > rest[best] || (isnan(rest[e]) && !isnan(rest[best])))) best = e;
            taken[best] = 1, chosen[j] = best, weights[j] = rest[best];
        }
        const float top = weights[0];
        for (int64_t j = 0; j < a->k; j++) sum += weights[j] = expf(weights[j] - top);
        for (int64_t j = 0; j < a->k; j++) weights[j] /= sum;
    }
}

typedef struct {
    void (*function)(const void *);
    const void *arguments;
} call;

typedef struct {
    const call *calls;
    int64_t n;
} replay_args;

/* A recorded step: the same calls on the same memory. What differs from step to step is what the memory holds. */
void longburn_replay(const replay_args *a) {
    for (int64_t i = 0; i < a->n; i++) a->calls[i].function(a->calls[i].arguments);
}
