/* Passes over memory of a training step on a CPU, each one loop where torch runs several operations.

   Compiled on the machine that uses it (library.py), for the arithmetic that this has. Elements are float32 or
   bfloat16, sums and everything between a load and a store float32. Rows are split evenly among the threads,
   sums over rows are kept by thread and added in their order: the same threads give the same bits.

   The file includes itself once for each type of elements. Shapes: N rows, D width, F feed-forward units, V
   vocabulary; B batch, L length, H query heads, K key/value heads, G = H / K query heads a group, E head width,
   Q queries of a block. */

#ifndef ELEMENT

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* Fewer elements than this are not worth waking a thread for. */
#define FEW 16384

/* e^x for x up to 0: 2^n e^r with r within half of ln 2, by a polynomial fitted for the smallest relative error,
   3e-9; with the rounding of float32 2e-7. Below -87, where float32 ends, it is zero. */
static inline float exponential(float x) {
    float held = x < -87.0f ? -87.0f : x;
    /* Added to it, what is behind the point is rounded off, and the lowest bits are n. */
    float shifted = held * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    /* ln 2 in two parts, the first with few digits: n times it is exact. */
    float r = held - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.381459124e-3f;
    p = p * r + 8.368716840e-3f;
    p = p * r + 4.166838820e-2f;
    p = p * r + 1.666652063e-1f;
    p = p * r + 4.999999345e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits, power;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&power, &shifted, sizeof power);
    bits += power << 23;
    memcpy(&p, &bits, sizeof p);
    return x < -87.0f ? 0.0f : p;
}

/* 1 / (1 + e^-x), of the exponential of a number below 0. */
static inline float sigmoid(float x) {
    float e = exponential(-fabsf(x)), inverse = 1.0f / (1.0f + e);
    return x < 0 ? e * inverse : inverse;
}

/* x sigmoid(x), rounded once less. */
static inline float silu(float x) {
    float e = exponential(-fabsf(x));
    return (x < 0 ? x * e : x) / (1.0f + e);
}

static inline float tangent(float x) {
    float e = exponential(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

static inline float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* To the nearest, to even between two. What arithmetic makes not a number stays it. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* The next multiple of the elements of a wide register, so that loops have no rest, nearly always. */
static inline int64_t whole_vectors(int64_t n) { return (n + 31) / 32 * 32; }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where the row of a query head begins in an array of blocks: of each block of Q positions, the rows of its N
   key/value heads, of these the G heads, of these the positions. */
static inline int64_t block_row(int64_t B, int64_t L, int64_t K, int64_t G, int64_t Q, int64_t b, int64_t l, int64_t h) {
    int64_t begin = l / Q * Q, size = least(Q, L - begin);
    return B * K * G * begin + ((b * K + h / G) * G + h % G) * size + l - begin;
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, TYPE)

#define ELEMENT float
#define TYPE float32
#define LOAD(x) (x)
#define STORE(x) (x)
#include __FILE__
#undef ELEMENT
#undef TYPE
#undef LOAD
#undef STORE

#define ELEMENT uint16_t
#define TYPE bfloat16
#define LOAD(x) from_bfloat16(x)
#define STORE(x) to_bfloat16(x)
#include __FILE__

#else

/* y = x / rms(x) * gain of float32 rows; `inverse` [N] keeps 1 / rms(x) (Zhang and Sennrich 2019). */
void NAME(rms_norm)(int64_t N, int64_t D, const float *x, const float *gain, float eps, ELEMENT *y, float *inverse) {
#pragma omp parallel for schedule(static) if (N * D > FEW)
    for (int64_t n = 0; n < N; n++) {
        const float *xn = x + n * D;
        ELEMENT *yn = y + n * D;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < D; d++) squares += xn[d] * xn[d];
        float own = 1.0f / sqrtf(squares / D + eps);
        inverse[n] = own;
        for (int64_t d = 0; d < D; d++) yn[d] = STORE(xn[d] * own * gain[d]);
    }
}

/* Gradients of rms_norm; `dgain` [threads, D], zeros, gets each thread's part. */
void NAME(rms_norm_backward)(int64_t N, int64_t D, const ELEMENT *dy, const float *x, const float *gain,
                             const float *inverse, float *dx, float *dgain, int64_t threads) {
#pragma omp parallel num_threads(threads) if (N * D > FEW)
    {
        float *sum = dgain + omp_get_thread_num() * D;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const ELEMENT *dyn = dy + n * D;
            const float *xn = x + n * D;
            float *dxn = dx + n * D;
            float own = inverse[n], along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t d = 0; d < D; d++) along += LOAD(dyn[d]) * gain[d] * xn[d];
            along *= own * own / D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) {
                float slope = LOAD(dyn[d]);
                dxn[d] = own * (slope * gain[d] - xn[d] * along);
                sum[d] += slope * xn[d] * own;
            }
        }
    }
}

/* y [N, F] = silu(gate) * up of rows that hold the gates, then the ups (Shazeer 2020). */
void NAME(swiglu)(int64_t N, int64_t F, const ELEMENT *gate_up, ELEMENT *y) {
#pragma omp parallel for schedule(static) if (N * F > FEW)
    for (int64_t n = 0; n < N; n++) {
        const ELEMENT *gate = gate_up + 2 * n * F, *up = gate + F;
        ELEMENT *yn = y + n * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            yn[f] = STORE(silu(LOAD(gate[f])) * LOAD(up[f]));
        }
    }
}

void NAME(swiglu_backward)(int64_t N, int64_t F, const ELEMENT *dy, const ELEMENT *gate_up, ELEMENT *dgate_up) {
#pragma omp parallel for schedule(static) if (N * F > FEW)
    for (int64_t n = 0; n < N; n++) {
        const ELEMENT *gate = gate_up + 2 * n * F, *up = gate + F, *dyn = dy + n * F;
        ELEMENT *dgate = dgate_up + 2 * n * F, *dup = dgate + F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            float g = LOAD(gate[f]), open = sigmoid(g), slope = LOAD(dyn[f]);
            dgate[f] = STORE(slope * LOAD(up[f]) * open * (1.0f + g * (1.0f - open)));
            dup[f] = STORE(slope * g * open);
        }
    }
}

/* Cross-entropy `losses` [N], in nats, of logits [N, V]; with `gradient`, p - 1 for the target and p for others
   replace the logits. With `cap` c, logits z are c tanh(z / c), and the gradients those of z. */
void NAME(cross_entropy)(int64_t N, int64_t V, ELEMENT *logits, const int64_t *targets, float cap, int64_t gradient,
                         float *losses) {
#pragma omp parallel for schedule(static) if (N * V > FEW)
    for (int64_t n = 0; n < N; n++) {
        ELEMENT *z = logits + n * V;
        ELEMENT *wanted = z + targets[n];
        float largest = -INFINITY, sum = 0, target = LOAD(*wanted), slope = 1;
        if (cap) {
#pragma omp simd reduction(max : largest)
            for (int64_t v = 0; v < V; v++) {
                float own = cap * tangent(LOAD(z[v]) / cap);
                largest = own > largest ? own : largest;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t v = 0; v < V; v++) sum += exponential(cap * tangent(LOAD(z[v]) / cap) - largest);
            float bent = tangent(target / cap);
            target = cap * bent;
            slope = 1.0f - bent * bent;
        } else {
#pragma omp simd reduction(max : largest)
            for (int64_t v = 0; v < V; v++) {
                float own = LOAD(z[v]);
                largest = own > largest ? own : largest;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t v = 0; v < V; v++) sum += exponential(LOAD(z[v]) - largest);
        }
        losses[n] = largest + logf(sum) - target;
        if (!gradient) continue;
        float part = 1.0f / sum;
        if (cap) {
#pragma omp simd
            for (int64_t v = 0; v < V; v++) {
                float bent = tangent(LOAD(z[v]) / cap);
                z[v] = STORE(exponential(cap * bent - largest) * part * (1.0f - bent * bent));
            }
        } else {
#pragma omp simd
            for (int64_t v = 0; v < V; v++) z[v] = STORE(exponential(LOAD(z[v]) - largest) * part);
        }
        *wanted = STORE((exponential(target - largest) * part - 1.0f) * slope);
    }
}

/* A head's E elements at `x`, turned by the angles of cos and sin [E] (Su et al. 2021); `way` -1 turns back. */
#define TURN(LOADED)                                                        \
    int64_t half = E / 2;                                                   \
    if (!cos) {                                                             \
        for (int64_t e = 0; e < E; e++) y[e] = STORE(LOADED(x[e]));         \
        return;                                                             \
    }                                                                       \
    _Pragma("omp simd") for (int64_t e = 0; e < half; e++) {                \
        float first = LOADED(x[e]), second = LOADED(x[e + half]);           \
        y[e] = STORE(first * cos[e] + way * second * sin[e]);               \
        y[e + half] = STORE(second * cos[e + half] + way * first * sin[e + half]); \
    }
#define SAME(x) (x)

static inline void NAME(turn)(int64_t E, const ELEMENT *x, const float *cos, const float *sin, float way, ELEMENT *y) {
    TURN(LOAD)
}

static inline void NAME(turn_sum)(int64_t E, const float *x, const float *cos, const float *sin, float way,
                                  ELEMENT *y) {
    TURN(SAME)
}
#undef TURN
#undef SAME

/* Queries, keys and values [B, L, H + 2 K, E] into blocks of queries, keys [B K, L, E] and values; queries and keys
   rotated where there are cosines and sines, [L, E], those of row b `next` elements after those of the row before. */
void NAME(split_heads)(int64_t B, int64_t L, int64_t H, int64_t K, int64_t E, int64_t Q, const ELEMENT *qkv,
                       const float *cos, const float *sin, int64_t next, ELEMENT *q, ELEMENT *k, ELEMENT *v) {
    int64_t S = H + 2 * K, G = H / K;
#pragma omp parallel for collapse(2) schedule(static) if (B * L * S * E > FEW)
    for (int64_t b = 0; b < B; b++)
        for (int64_t l = 0; l < L; l++) {
            const ELEMENT *x = qkv + (b * L + l) * S * E;
            const float *c = cos ? cos + b * next + l * E : 0, *s = sin ? sin + b * next + l * E : 0;
            for (int64_t h = 0; h < H; h++) NAME(turn)(E, x + h * E, c, s, 1, q + block_row(B, L, K, G, Q, b, l, h) * E);
            for (int64_t m = 0; m < K; m++) {
                int64_t row = (b * K + m) * L + l;
                NAME(turn)(E, x + (H + m) * E, c, s, 1, k + row * E);
                memcpy(v + row * E, x + (H + K + m) * E, E * sizeof *v);
            }
        }
}

/* The way back for gradients: those of keys and values are sums in float32. */
void NAME(join_heads)(int64_t B, int64_t L, int64_t H, int64_t K, int64_t E, int64_t Q, const ELEMENT *dq,
                      const float *dk, const float *dv, const float *cos, const float *sin, int64_t next,
                      ELEMENT *dqkv) {
    int64_t S = H + 2 * K, G = H / K;
#pragma omp parallel for collapse(2) schedule(static) if (B * L * S * E > FEW)
    for (int64_t b = 0; b < B; b++)
        for (int64_t l = 0; l < L; l++) {
            ELEMENT *y = dqkv + (b * L + l) * S * E;
            const float *c = cos ? cos + b * next + l * E : 0, *s = sin ? sin + b * next + l * E : 0;
            for (int64_t h = 0; h < H; h++)
                NAME(turn)(E, dq + block_row(B, L, K, G, Q, b, l, h) * E, c, s, -1, y + h * E);
            for (int64_t m = 0; m < K; m++) {
                int64_t row = (b * K + m) * L + l;
                NAME(turn_sum)(E, dk + row * E, c, s, -1, y + (H + m) * E);
                NAME(turn_sum)(E, dv + row * E, 0, 0, 1, y + (H + K + m) * E);
            }
        }
}

/* Heads [B, L, H, E] into blocks, or with `back` the other way. */
void NAME(block_heads)(int64_t B, int64_t L, int64_t H, int64_t K, int64_t E, int64_t Q, ELEMENT *heads,
                       ELEMENT *blocks, int64_t back) {
#pragma omp parallel for collapse(2) schedule(static) if (B * L * H * E > FEW)
    for (int64_t b = 0; b < B; b++)
        for (int64_t l = 0; l < L; l++)
            for (int64_t h = 0; h < H; h++) {
                ELEMENT *head = heads + ((b * L + l) * H + h) * E;
                ELEMENT *own = blocks + block_row(B, L, K, H / K, Q, b, l, h) * E;
                memcpy(back ? head : own, back ? own : head, E * sizeof *own);
            }
}

/* softmax of a block's rows [N, G Q, C] in place: query q, the row's remainder by Q, sees C - Q + q + 1 keys,
   of these those that `sees` [B, L, L] names where it is given; all other weights are zero. */
void NAME(causal_softmax)(int64_t N, int64_t G, int64_t Q, int64_t C, const uint8_t *sees, int64_t K, int64_t L,
                          ELEMENT *x) {
#pragma omp parallel for schedule(static) if (N * G * Q * C > FEW)
    for (int64_t row = 0; row < N * G * Q; row++) {
        ELEMENT *own = x + row * C;
        int32_t q = row % Q, keys = C - Q + q + 1, all = least(whole_vectors(keys), C);
        float largest = -INFINITY, sum = 0, weight[all];
#pragma omp simd
        for (int32_t c = 0; c < all; c++) weight[c] = c < keys ? LOAD(own[c]) : -INFINITY;
        if (sees) {
            const uint8_t *seen = sees + (row / (G * Q * K) * L + C - Q + q) * L;
            for (int32_t c = 0; c < keys; c++) weight[c] = seen[c] ? weight[c] : -INFINITY;
        }
#pragma omp simd reduction(max : largest)
        for (int32_t c = 0; c < all; c++) largest = weight[c] > largest ? weight[c] : largest;
#pragma omp simd reduction(+ : sum)
        for (int32_t c = 0; c < all; c++) {
            weight[c] = exponential(weight[c] - largest);
            sum += weight[c];
        }
        float part = 1.0f / sum;
#pragma omp simd
        for (int32_t c = 0; c < all; c++) own[c] = STORE(weight[c] * part);
        memset(own + all, 0, (C - all) * sizeof *own);
    }
}

/* Gradients of causal_softmax: those of the weights, `dweight`, become those of x in place. */
void NAME(causal_softmax_backward)(int64_t N, int64_t G, int64_t Q, int64_t C, const ELEMENT *weight,
                                   ELEMENT *dweight) {
#pragma omp parallel for schedule(static) if (N * G * Q * C > FEW)
    for (int64_t row = 0; row < N * G * Q; row++) {
        const ELEMENT *w = weight + row * C;
        ELEMENT *own = dweight + row * C;
        int32_t all = least(whole_vectors(C - Q + row % Q + 1), C);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int32_t c = 0; c < all; c++) sum += LOAD(w[c]) * LOAD(own[c]);
#pragma omp simd
        for (int32_t c = 0; c < all; c++) own[c] = STORE(LOAD(w[c]) * (LOAD(own[c]) - sum));
        memset(own + all, 0, (C - all) * sizeof *own);
    }
}

#endif
