/* Causal attention, forward and backward, for training on a CPU (Vaswani et al. 2017).

   The queries of a head are processed in blocks, each with all keys up to it, so that the data of a block stay in the
   processor's cache. Matrix products are in float32, or of pairs of bfloat16 with float32 sums if the processor has
   such instructions (otherwise there is no attention in bfloat16 here). The weights are kept for the backward pass.
   One thread processes a key/value head, in the backward pass with all its query heads: results do not depend on the
   number of threads.

   Shapes: B batch, L length, H query heads, K key/value heads, G = H / K, S = H + 2 K, E head width, N = B K;
   block: Q queries, C keys up to its end. Sizes that end in p are padded with zeros: Lp, Cp and Ep to whole vectors. */

#ifndef ELEMENT

#include "elements.h"

#if defined(__AVX512F__)
#define TILE 4
#define COLUMNS 4
#define BLOCK 32
#define PADDING 32
#elif defined(__AVX__)
/* Of 16 registers, 12 for sums: with 8, a sum waits for the one before. A block is a whole number of tiles. */
#define TILE 6
#define COLUMNS 2
#define BLOCK 48
#define PADDING 16
#else
#define TILE 4
#define COLUMNS 4
#define BLOCK 32
#define PADDING 32
#endif

static inline int64_t padded(int64_t n) { return (n + PADDING - 1) / PADDING * PADDING; }

/* Number of elements of a head's weights: for each block, its queries times all keys up to it. */
int64_t attention_weights(int64_t L) {
    int64_t sum = 0;
    for (int64_t begin = 0; begin < L; begin += BLOCK) {
        int64_t end = least(begin + BLOCK, L);
        sum += (end - begin) * padded(end);
    }
    return sum;
}

#define ELEMENT float
#define TYPE float32
#define FACTOR float
#define PAIR 1
#define LOAD(x) (x)
#define STORE(x) (x)
#include __FILE__
#undef ELEMENT
#undef TYPE
#undef FACTOR
#undef PAIR
#undef LOAD
#undef STORE

#if defined(__AVX512BF16__)
#include <immintrin.h>

static inline __attribute__((always_inline)) vector multiply_pairs(vector sum, uint32_t a, const void *b) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
}

#define ELEMENT uint16_t
#define TYPE bfloat16
#define FACTOR uint32_t
#define PAIR 2
#define LOAD(x) from_bfloat16(x)
#define STORE(x) to_bfloat16(x)
#include __FILE__
#endif

#else

typedef FACTOR NAME(factor) __attribute__((may_alias));

/* c (+)= a b for some rows of a and vectors of columns of b, with all sums in registers. */
static inline __attribute__((always_inline)) void NAME(tile)(const int rows, const int columns, int64_t P,
                                                             const NAME(factor) * a, int64_t row, int64_t step,
                                                             const FACTOR *b, int64_t ldb, float *c, int64_t ldc,
                                                             int add) {
    vector sum[8][4];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) {
            if (add)
                memcpy(&sum[i][j], c + i * ldc + j * LANES, sizeof(vector));
            else
                sum[i][j] = (vector){0};
        }
#if PAIR == 1
#pragma GCC unroll 4
#endif
    for (int64_t p = 0; p < P; p++) {
#if PAIR == 1
        vector right[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) memcpy(&right[j], b + p * ldb + j * LANES, sizeof(vector));
#endif
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            FACTOR left = a[i * row + p * step];
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++)
#if PAIR == 1
                sum[i][j] += left * right[j];
#else
                sum[i][j] = multiply_pairs(sum[i][j], left, b + p * ldb + j * LANES);
#endif
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) memcpy(c + i * ldc + j * LANES, &sum[i][j], sizeof(vector));
}

/* c [M, N] = a b, or c + a b with `add`. b [P, N] holds factors; those of a are `row` apart between rows and `step`
   apart within a row. N is a multiple of the vector length. */
static void NAME(product)(int64_t M, int64_t N, int64_t P, const void *left, int64_t row, int64_t step, const FACTOR *b,
                          int64_t ldb, float *c, int64_t ldc, int add) {
    const NAME(factor) *a = left;
    int64_t j = 0;
#define TILES(ROWS, WIDE)                                                                              \
    for (; N - j >= (WIDE) * LANES; j += (WIDE) * LANES) {                                             \
        int64_t i = 0;                                                                                 \
        for (; i + (ROWS) <= M; i += (ROWS))                                                           \
            NAME(tile)(ROWS, WIDE, P, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc, add);  \
        for (; i + 2 <= M; i += 2)                                                                     \
            NAME(tile)(2, WIDE, P, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc, add);     \
        for (; i < M; i++)                                                                             \
            NAME(tile)(1, WIDE, P, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc, add);     \
    }
    TILES(TILE, COLUMNS)
    TILES(8, 2)
    TILES(8, 1)
#undef TILES
}

/* The E elements of a head, scaled and rotated by the angles of cos and sin (Su et al. 2021); `way` -1 rotates back. */
#define TURN(LOADED)                                                                                     \
    int64_t half = cos ? E / 2 : 0;                                                                      \
    _Pragma("omp simd") for (int64_t e = 0; e < half; e++) {                                             \
        float first = scale * LOADED(x[e]), second = scale * LOADED(x[e + half]);                        \
        y[e] = STORE(first * cos[e] + way * second * sin[e]);                                            \
        y[e + half] = STORE(second * cos[e + half] + way * first * sin[e + half]);                       \
    }                                                                                                    \
    _Pragma("omp simd") for (int64_t e = 2 * half; e < E; e++) y[e] = STORE(scale * LOADED(x[e]));
#define SAME(x) (x)

static inline void NAME(turn)(int64_t E, const ELEMENT *x, const float *cos, const float *sin, float way, float scale,
                              ELEMENT *y) {
    TURN(LOAD)
}

static inline void NAME(turn_sums)(int64_t E, const float *x, const float *cos, const float *sin, float way,
                                   float scale, ELEMENT *y) {
    TURN(SAME)
}
#undef TURN
#undef SAME

/* The columns of rows [n, Ee], Ee a multiple of a factor, as a right operand: [Ee / PAIR, ldb], zeros from n on. */
static void NAME(columns_of)(int64_t n, int64_t Ee, const ELEMENT *rows, FACTOR *b, int64_t ldb) {
    const NAME(factor) *from = (const void *)rows;
    for (int64_t p = 0; p < Ee / PAIR; p++)
        for (int64_t l = 0; l < ldb; l++) b[p * ldb + l] = l < n ? from[l * (Ee / PAIR) + p] : 0;
}

/* Rows [n, E], `row` apart, as a right operand: [rows / PAIR, ldb], zeros after row n. */
static void NAME(rows_of)(int64_t n, int64_t rows, int64_t E, const ELEMENT *x, int64_t row, FACTOR *b, int64_t ldb) {
    for (int64_t l = 0; l < rows; l += PAIR) {
        FACTOR *to = b + l / PAIR * ldb;
        int64_t filled = l < n ? E : 0;
#if PAIR == 1
        memcpy(to, x + l * row, filled * sizeof *b);
#else
        const ELEMENT *one = x + l * row, *two = one + row;
        if (l + 1 < n) {
#pragma omp simd
            for (int64_t e = 0; e < filled; e++) to[e] = one[e] | (FACTOR)two[e] << 16;
        } else {
            for (int64_t e = 0; e < filled; e++) to[e] = one[e];
        }
#endif
        memset(to + filled, 0, (ldb - filled) * sizeof *b);
    }
}

/* Softmax of the first `keys` of a block's row, restricted to those in `seen` if it is given; others are zero. */
static void NAME(softmax)(int32_t keys, int32_t all, const uint8_t *seen, float *score, ELEMENT *weight) {
    float largest = -INFINITY, sum = 0;
    int32_t some = padded(keys);
    for (int32_t c = keys; c < some; c++) score[c] = -INFINITY;
    if (seen) {
        for (int32_t c = 0; c < keys; c++) score[c] = seen[c] ? score[c] : -INFINITY;
    }
#pragma omp simd reduction(max : largest)
    for (int32_t c = 0; c < some; c++) largest = score[c] > largest ? score[c] : largest;
#pragma omp simd reduction(+ : sum)
    for (int32_t c = 0; c < some; c++) {
        score[c] = exponential(score[c] - largest);
        sum += score[c];
    }
    float part = 1.0f / sum;
#pragma omp simd
    for (int32_t c = 0; c < some; c++) weight[c] = STORE(score[c] * part);
    memset(weight + some, 0, (all - some) * sizeof *weight);
}

/* y [B, L, H, E] from queries, keys and values `qkv` [B, L, S, E]. Queries and keys are rotated if cosines and sines
   [L, E] are given; those of consecutive batch rows are `next` elements apart. `sees` [B, L, L], if given, marks the
   visible keys. `weights` keeps [Q, Cp] of each block, block after block, head after head. */
void NAME(attention)(int64_t B, int64_t L, int64_t H, int64_t K, int64_t E, const ELEMENT *qkv, const float *cos,
                     const float *sin, int64_t next, const uint8_t *sees, ELEMENT *y, ELEMENT *weights) {
    int64_t S = H + 2 * K, G = H / K, Lp = padded(L), Ep = padded(E), Ee = (E + PAIR - 1) / PAIR * PAIR;
    /* With fewer key/value heads than threads, the query heads of one are divided among threads. */
    int64_t parts = B * K < omp_get_max_threads() ? G : 1;
    int64_t head_weights = attention_weights(L);
    float scale = 1.0f / sqrtf(E);
#pragma omp parallel if (B * L * S * E > FEW)
    {
        int64_t sizes = Lp * Ee + BLOCK * Ee + 2 * (Lp * Ep) + BLOCK * (Lp + Ep) + 6 * 16;
        arrays mem = arrays_of(sizes * sizeof(float));
        ELEMENT *k = array(&mem, Lp * Ee * sizeof *k), *q = array(&mem, BLOCK * Ee * sizeof *q);
        FACTOR *keys = array(&mem, Ee / PAIR * Lp * sizeof *keys), *values = array(&mem, Lp / PAIR * Ep * sizeof *values);
        float *score = array(&mem, BLOCK * Lp * sizeof *score), *mixed = array(&mem, BLOCK * Ep * sizeof *mixed);
        memset(k, 0, Lp * Ee * sizeof *k);
        memset(q, 0, BLOCK * Ee * sizeof *q);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < B * K * parts; unit++) {
            int64_t n = unit / parts, b = n / K, m = n % K, first = unit % parts * (G / parts);
            const ELEMENT *row = qkv + b * L * S * E;
            const float *c = cos ? cos + b * next : 0, *s = sin ? sin + b * next : 0;
            for (int64_t l = 0; l < L; l++)
                NAME(turn)(E, row + (l * S + H + m) * E, c ? c + l * E : 0, s ? s + l * E : 0, 1, 1, k + l * Ee);
            NAME(columns_of)(L, Ee, k, keys, Lp);
            NAME(rows_of)(L, Lp, E, row + (H + K + m) * E, S * E, values, Ep);
            for (int64_t g = first; g < first + G / parts; g++) {
                int64_t h = m * G + g;
                ELEMENT *weight = weights + (n * G + g) * head_weights;
                for (int64_t begin = 0; begin < L; begin += BLOCK) {
                    int64_t Q = least(BLOCK, L - begin), Cp = padded(begin + Q);
                    for (int64_t r = 0; r < Q; r++) {
                        int64_t l = begin + r;
                        NAME(turn)(E, row + (l * S + h) * E, c ? c + l * E : 0, s ? s + l * E : 0, 1, scale, q + r * Ee);
                    }
                    NAME(product)(Q, Cp, Ee / PAIR, q, Ee / PAIR, 1, keys, Lp, score, Lp, 0);
                    for (int64_t r = 0; r < Q; r++) {
                        const uint8_t *seen = sees ? sees + (b * L + begin + r) * L : 0;
                        NAME(softmax)(begin + r + 1, Cp, seen, score + r * Lp, weight + r * Cp);
                    }
                    NAME(product)(Q, Ep, Cp / PAIR, weight, Cp / PAIR, 1, values, Ep, mixed, Ep, 0);
                    for (int64_t r = 0; r < Q; r++)
                        NAME(turn_sums)(E, mixed + r * Ep, 0, 0, 1, 1, y + ((b * L + begin + r) * H + h) * E);
                    weight += Q * Cp;
                }
            }
        }
        free(mem.memory);
    }
}

/* dqkv [B, L, S, E], the gradients of the inputs of attention(), from those of its output. */
void NAME(attention_backward)(int64_t B, int64_t L, int64_t H, int64_t K, int64_t E, const ELEMENT *qkv,
                              const float *cos, const float *sin, int64_t next, const ELEMENT *dy,
                              const ELEMENT *weights, ELEMENT *dqkv) {
    int64_t S = H + 2 * K, G = H / K, Lp = padded(L), Ep = padded(E), Ee = (E + PAIR - 1) / PAIR * PAIR;
    int64_t head_weights = attention_weights(L);
    float scale = 1.0f / sqrtf(E);
#pragma omp parallel if (B * L * S * E > FEW)
    {
        int64_t sizes = 2 * (Lp * Ee) + 2 * (BLOCK * Ee) + 5 * (Lp * Ep) + 3 * (BLOCK * Ep) + 4 * (BLOCK * Lp) + 16 * 16;
        arrays mem = arrays_of(sizes * sizeof(float));
        ELEMENT *kv = array(&mem, Lp * Ee * sizeof *kv), *q = array(&mem, BLOCK * Ee * sizeof *q);
        ELEMENT *slope = array(&mem, BLOCK * Ee * sizeof *slope);
        FACTOR *keys = array(&mem, Lp / PAIR * Ep * sizeof *keys), *values = array(&mem, Ee / PAIR * Lp * sizeof *values);
        FACTOR *queries = array(&mem, BLOCK / PAIR * Ep * sizeof *queries);
        FACTOR *slopes = array(&mem, BLOCK / PAIR * Ep * sizeof *slopes);
        float *dweight = array(&mem, BLOCK * Lp * sizeof *dweight), *dq = array(&mem, BLOCK * Ep * sizeof *dq);
        ELEMENT *dscore = array(&mem, BLOCK * Lp * sizeof *dscore);
        FACTOR *pairs = array(&mem, BLOCK / PAIR * Lp * sizeof *pairs);
        float *dk = array(&mem, Lp * Ep * sizeof *dk), *dv = array(&mem, Lp * Ep * sizeof *dv);
        memset(kv, 0, Lp * Ee * sizeof *kv);
        memset(q, 0, BLOCK * Ee * sizeof *q);
        memset(slope, 0, BLOCK * Ee * sizeof *slope);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < B * K; n++) {
            int64_t b = n / K, m = n % K;
            const ELEMENT *row = qkv + b * L * S * E;
            ELEMENT *drow = dqkv + b * L * S * E;
            const float *c = cos ? cos + b * next : 0, *s = sin ? sin + b * next : 0;
            for (int64_t l = 0; l < L; l++) memcpy(kv + l * Ee, row + (l * S + H + K + m) * E, E * sizeof *kv);
            NAME(columns_of)(L, Ee, kv, values, Lp);
            for (int64_t l = 0; l < L; l++)
                NAME(turn)(E, row + (l * S + H + m) * E, c ? c + l * E : 0, s ? s + l * E : 0, 1, 1, kv + l * Ee);
            NAME(rows_of)(L, Lp, E, kv, Ee, keys, Ep);
            memset(dk, 0, Lp * Ep * sizeof *dk);
            memset(dv, 0, Lp * Ep * sizeof *dv);
            for (int64_t g = 0; g < G; g++) {
                int64_t h = m * G + g;
                const ELEMENT *weight = weights + (n * G + g) * head_weights;
                for (int64_t begin = 0; begin < L; begin += BLOCK) {
                    int64_t Q = least(BLOCK, L - begin), Cp = padded(begin + Q), rows = (Q + PAIR - 1) / PAIR * PAIR;
                    for (int64_t r = 0; r < Q; r++) {
                        int64_t l = begin + r;
                        NAME(turn)(E, row + (l * S + h) * E, c ? c + l * E : 0, s ? s + l * E : 0, 1, scale, q + r * Ee);
                        memcpy(slope + r * Ee, dy + ((b * L + l) * H + h) * E, E * sizeof *slope);
                    }
                    NAME(rows_of)(Q, rows, E, q, Ee, queries, Ep);
                    NAME(rows_of)(Q, rows, E, slope, Ee, slopes, Ep);
                    NAME(product)(Q, Cp, Ee / PAIR, slope, Ee / PAIR, 1, values, Lp, dweight, Lp, 0);
                    for (int64_t r = 0; r < Q; r++) {
                        const ELEMENT *w = weight + r * Cp;
                        float *dw = dweight + r * Lp, sum = 0;
                        ELEMENT *ds = dscore + r * Lp;
#pragma omp simd reduction(+ : sum)
                        for (int64_t k = 0; k < Cp; k++) sum += LOAD(w[k]) * dw[k];
#pragma omp simd
                        for (int64_t k = 0; k < Cp; k++) ds[k] = STORE(LOAD(w[k]) * (dw[k] - sum));
                    }
                    NAME(product)(Q, Ep, Cp / PAIR, dscore, Lp / PAIR, 1, keys, Ep, dq, Ep, 0);
                    for (int64_t r = 0; r < Q; r++) {
                        int64_t l = begin + r;
                        NAME(turn_sums)(E, dq + r * Ep, c ? c + l * E : 0, s ? s + l * E : 0, -1, scale,
                                        drow + (l * S + h) * E);
                    }
                    /* Products with the transposed matrix: a left factor is a pair of rows of one column. */
                    const void *left = weight, *right = dscore;
                    int64_t one = Cp, other = Lp;
#if PAIR != 1
                    NAME(rows_of)(Q, rows, Cp, weight, Cp, pairs, Lp);
                    left = pairs;
                    one = Lp;
#endif
                    NAME(product)(Cp, Ep, rows / PAIR, left, 1, one, slopes, Ep, dv, Ep, 1);
#if PAIR != 1
                    NAME(rows_of)(Q, rows, Cp, dscore, Lp, pairs, Lp);
                    right = pairs;
#endif
                    NAME(product)(Cp, Ep, rows / PAIR, right, 1, other, queries, Ep, dk, Ep, 1);
                    weight += Q * Cp;
                }
            }
            for (int64_t l = 0; l < L; l++) {
                NAME(turn_sums)(E, dk + l * Ep, c ? c + l * E : 0, s ? s + l * E : 0, -1, 1, drow + (l * S + H + m) * E);
                NAME(turn_sums)(E, dv + l * Ep, 0, 0, 1, 1, drow + (l * S + H + K + m) * E);
            }
        }
        free(mem.memory);
    }
}

#endif
