/* Parts of scoring on a CPU, forward alone: attention over a trie of sequences, the log of the summed exponentials of
   logits, and the sum of residuals with its norm.

   Elements are float32 or bfloat16; sums, and everything between a load and a store, are float32. Products of
   bfloat16 are of pairs with float32 sums if the processor has such instructions, otherwise of float32. What belongs
   to one token is computed in the same order whatever the number of threads: the bits are the same.

   The file includes itself once for each element type. Shapes: N tokens of a row, S sequences, H query heads, K
   key/value heads, G = H / K, E head width, Q queries of a block, X = G Q rows of its products, C keys, D width, V
   vocabulary. Sizes that end in p are padded to whole vectors. */

#ifndef ELEMENT

#include <stdio.h>
#include <stdlib.h>

#include "elements.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define PADDING 32
/* Rows of a block's products, about: enough to reuse keys from the cache, few enough for little masked work. */
#define BLOCK_ROWS 64

typedef float vector __attribute__((vector_size(4 * LANES)));

static inline int64_t padded(int64_t n) { return (n + PADDING - 1) / PADDING * PADDING; }

/* The arrays of a thread, consecutive in one allocation. */
typedef struct {
    char *memory, *at;
} arrays;

static inline arrays zeroed(int64_t bytes) {
    char *memory = calloc(bytes + 64, 1);
    if (!memory) {
        fprintf(stderr, "scoring: no memory for %lld bytes\n", (long long)bytes);
        abort();
    }
    return (arrays){memory, memory + (64 - (uintptr_t)memory % 64)};
}

static inline void *array(arrays *mem, int64_t bytes) {
    void *begin = mem->at;
    mem->at += (bytes + 63) / 64 * 64;
    return begin;
}

/* Weights e^(score - largest) of the first `keys` of a row, zeros up to `all`; returns their sum. */
#define SOFTMAX(STORED)                                                            \
    float largest = -INFINITY, sum = 0;                                            \
    int32_t some = least(padded(keys), all);                                       \
    for (int32_t c = keys; c < some; c++) score[c] = -INFINITY;                    \
    _Pragma("omp simd reduction(max : largest)") for (int32_t c = 0; c < some; c++) \
        largest = score[c] > largest ? score[c] : largest;                         \
    _Pragma("omp simd reduction(+ : sum)") for (int32_t c = 0; c < some; c++) {    \
        float e = exponential(score[c] - largest);                                 \
        sum += e;                                                                  \
        weight[c] = STORED(e);                                                     \
    }                                                                              \
    memset(weight + some, 0, (all - some) * sizeof *weight);                       \
    return sum;

#define ELEMENT float
#define TYPE float32
#define INNER float
#define FACTOR float
#define PAIR 1
#define LOAD(x) (x)
#define STORE(x) (x)
#define NARROW(x) (x)
#include __FILE__
#undef ELEMENT
#undef TYPE
#undef INNER
#undef FACTOR
#undef PAIR
#undef LOAD
#undef STORE
#undef NARROW

#define ELEMENT uint16_t
#define TYPE bfloat16
#define LOAD(x) from_bfloat16(x)
#define STORE(x) to_bfloat16(x)
#if defined(__AVX512BF16__)
#include <immintrin.h>

static inline __attribute__((always_inline)) vector multiply_pairs(vector sum, uint32_t a, const void *b) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
}
#define INNER uint16_t
#define FACTOR uint32_t
#define PAIR 2
#define NARROW(x) to_bfloat16(x)
#else
#define INNER float
#define FACTOR float
#define PAIR 1
#define NARROW(x) (x)
#endif
#include __FILE__

#else

typedef FACTOR NAME(factor) __attribute__((may_alias));

/* c = a b for some rows of a and vectors of columns of b, with all sums in registers. */
static inline __attribute__((always_inline)) void NAME(tile)(const int rows, const int columns, int64_t P,
                                                             const NAME(factor) * a, int64_t lda,
                                                             const NAME(factor) * b, int64_t ldb, float *c,
                                                             int64_t ldc) {
    vector sum[8][4];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) sum[i][j] = (vector){0};
    for (int64_t p = 0; p < P; p++) {
#if PAIR == 1
        vector right[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) memcpy(&right[j], b + p * ldb + j * LANES, sizeof(vector));
#endif
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            FACTOR left = a[i * lda + p];
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

/* c [M, N] = a b, where a [M, P] and b [P, N] hold factors; N is a multiple of the vector length. */
static void NAME(product)(int64_t M, int64_t N, int64_t P, const INNER *left, int64_t lda, const INNER *right,
                          int64_t ldb, float *c, int64_t ldc) {
    const NAME(factor) *a = (const void *)left, *b = (const void *)right;
    int64_t j = 0;
#define TILES(ROWS, WIDE)                                                             \
    for (; N - j >= (WIDE) * LANES; j += (WIDE) * LANES) {                            \
        int64_t i = 0;                                                                \
        for (; i + (ROWS) <= M; i += (ROWS))                                          \
            NAME(tile)(ROWS, WIDE, P, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc); \
        for (; i < M; i++) NAME(tile)(1, WIDE, P, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc); \
    }
#if LANES == 16
    TILES(8, 2)
#else
    TILES(4, 2)
#endif
    TILES(4, 1)
#undef TILES
}

static float NAME(softmax)(int32_t keys, int32_t all, float *score, INNER *weight) { SOFTMAX(NARROW) }

/* The E elements of a head as float32, scaled, rotated by the angles of cos and sin if given (Su et al. 2021). */
static inline void NAME(turned)(int64_t E, const ELEMENT *x, const float *cos, const float *sin, float scale, float *y) {
    int64_t half = cos ? E / 2 : 0;
#pragma omp simd
    for (int64_t e = 0; e < half; e++) {
        float first = scale * LOAD(x[e]), second = scale * LOAD(x[e + half]);
        y[e] = first * cos[e] + second * sin[e];
        y[e + half] = second * cos[e + half] + first * sin[e + half];
    }
#pragma omp simd
    for (int64_t e = 2 * half; e < E; e++) y[e] = scale * LOAD(x[e]);
}

/* y [n, H, E] at the tokens with a `place` in it (all in order if `place` is null): attention of each over the path
   that ends with it. Sequence s has `own[s]` tokens, consecutive in the row, after the first `shared[s]` of the path
   of sequence s - 1. q, k and v are addresses of the tokens' heads, consecutive for a token; tokens are `q_row`,
   `k_row` and `v_row` elements apart. Queries and keys are rotated if cosines and sines are given: `angles` apart.

   A thread processes one key/value head over consecutive sequences. Its keys and values are those of the current
   path, a stack: the next sequence replaces its end. */
void NAME(trie_attention)(int64_t S, int64_t H, int64_t K, int64_t E, int64_t q, int64_t k, int64_t v, int64_t q_row,
                          int64_t k_row, int64_t v_row, const float *cos, const float *sin, int64_t angles,
                          const int64_t *own, const int64_t *shared, const int64_t *place, float scale, ELEMENT *y) {
    int64_t G = H / K, N = 0, C = 0;
    for (int64_t s = 0; s < S; s++) {
        N += own[s];
        C = shared[s] + own[s] > C ? shared[s] + own[s] : C;
    }
    int64_t Cp = padded(C), Ep = padded(E), Ee = (E + PAIR - 1) / PAIR * PAIR;
    int64_t Q = BLOCK_ROWS / G > 1 ? BLOCK_ROWS / G : 1, X = G * Q;
    /* Threads that have no head of their own share the sequences of one, cut where the row's tokens are halved. */
    int64_t threads = omp_get_max_threads(), parts = K >= threads && K % threads == 0 ? 1 : threads;
#pragma omp parallel if (N * (H + 2 * K) * E > FEW)
    {
        int64_t sizes = 2 * Cp * (Ep + Ee) + X * (2 * Cp + Ep + Ee + 2) + E + C * 2 + 12 * 16;
        arrays mem = zeroed(sizes * sizeof(float));
        INNER *keys = array(&mem, Ee * Cp * sizeof *keys), *values = array(&mem, Cp * Ep * sizeof *values);
        INNER *queries = array(&mem, X * Ee * sizeof *queries), *weight = array(&mem, X * Cp * sizeof *weight);
        float *score = array(&mem, X * Cp * sizeof *score), *mixed = array(&mem, X * Ep * sizeof *mixed);
        float *head = array(&mem, E * sizeof *head), *sum = array(&mem, X * sizeof *sum);
        int64_t *path = array(&mem, C * sizeof *path);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < K * parts; unit++) {
            int64_t m = unit / parts, first = unit % parts * N / parts, end = (unit % parts + 1) * N / parts;
            const ELEMENT *qm = (const ELEMENT *)q + m * G * E;
            const ELEMENT *km = (const ELEMENT *)k + m * E, *vm = (const ELEMENT *)v + m * E;
            int64_t begin = 0, held = 0; /* the sequence's first token; how much of the path the stack holds */
            for (int64_t s = 0; s < S && begin < end; begin += own[s++]) {
                int64_t before = shared[s], length = before + own[s];
                for (int64_t i = 0; i < own[s]; i++) path[before + i] = begin + i;
                held = least(held, before);
                if (begin < first) continue;
                for (; held < length; held++) {
                    int64_t t = path[held];
                    NAME(turned)(E, km + t * k_row, cos ? cos + t * angles : 0, cos ? sin + t * angles : 0, 1, head);
                    for (int64_t e = 0; e < E; e++)
                        keys[e / PAIR * Cp * PAIR + held * PAIR + e % PAIR] = NARROW(head[e]);
                    const ELEMENT *from = vm + t * v_row;
                    INNER *to = values + held / PAIR * Ep * PAIR + held % PAIR;
                    for (int64_t e = 0; e < E; e++) to[e * PAIR] = NARROW(LOAD(from[e]));
#if PAIR == 2
                    if (held % 2 == 0) /* an odd path ends with a half pair, of weight zero: 0 times NaN is NaN */
                        for (int64_t e = 0; e < E; e++) to[e * PAIR + 1] = 0;
#endif
                }
                int64_t i = 0;
                while (i < own[s]) {
                    int64_t n = 0, last = 0, at[BLOCK_ROWS];
                    for (; i < own[s] && n < Q; i++)
                        if (!place || place[begin + i] >= 0) at[n++] = last = i;
                    if (!n) break;
                    int64_t seen = before + last + 1, all = padded(seen);
                    for (int64_t r = 0; r < n; r++) {
                        int64_t t = begin + at[r];
                        for (int64_t g = 0; g < G; g++) {
                            NAME(turned)(E, qm + t * q_row + g * E, cos ? cos + t * angles : 0,
                                         cos ? sin + t * angles : 0, scale, head);
                            INNER *to = queries + (r * G + g) * Ee;
                            for (int64_t e = 0; e < E; e++) to[e] = NARROW(head[e]);
                        }
                    }
                    NAME(product)(n * G, all, Ee / PAIR, queries, Ee / PAIR, keys, Cp, score, Cp);
                    for (int64_t x = 0; x < n * G; x++)
                        sum[x] = NAME(softmax)(before + at[x / G] + 1, all, score + x * Cp, weight + x * Cp);
                    NAME(product)(n * G, Ep, (seen + PAIR - 1) / PAIR, weight, Cp / PAIR, values, Ep, mixed, Ep);
                    for (int64_t r = 0; r < n; r++) {
                        int64_t t = begin + at[r];
                        ELEMENT *to = y + ((place ? place[t] : t) * H + m * G) * E;
                        for (int64_t g = 0; g < G; g++) {
                            float part = 1.0f / sum[r * G + g];
                            const float *from = mixed + (r * G + g) * Ep;
#pragma omp simd
                            for (int64_t e = 0; e < E; e++) to[g * E + e] = STORE(from[e] * part);
                        }
                    }
                }
            }
        }
        free(mem.memory);
    }
}

/* Adds logits [N, V] to running sums: sum [N] of e^(logit - largest). `best` [N], if given, is the number of the
   largest logit, counted from `first`, of equal ones the first. Before the first call: largest -infinity, sum 0. */
void NAME(log_sum)(int64_t N, int64_t V, const ELEMENT *logits, int64_t first, float *largest, float *sum,
                   int64_t *best) {
#pragma omp parallel for schedule(static) if (N * V > FEW)
    for (int64_t n = 0; n < N; n++) {
        const ELEMENT *z = logits + n * V;
        float highest = -INFINITY, part = 0, before = largest[n];
        int32_t spoilt = 0;
#pragma omp simd reduction(max : highest) reduction(| : spoilt)
        for (int64_t v = 0; v < V; v++) {
            float logit = LOAD(z[v]);
            spoilt |= logit != logit;
            highest = logit > highest ? logit : highest;
        }
        if (best && highest > before) {
            int64_t v = 0;
            while (v < V && LOAD(z[v]) != highest) v++;
            best[n] = first + v;
        }
        highest = highest > before ? highest : before;
        if (highest == -INFINITY && !spoilt) continue; /* nothing but -infinity: the sum stays zero */
#pragma omp simd reduction(+ : part)
        for (int64_t v = 0; v < V; v++) part += exponential(LOAD(z[v]) - highest);
        largest[n] = highest;
        sum[n] = (before == -INFINITY ? 0 : sum[n] * exponential(before - highest)) + (spoilt ? NAN : part);
    }
}

/* total [N, D] = x + added, in float32, and its norm y = total / rms(total) * gain (Zhang and Sennrich 2019); without
   gain there is only the sum. `total` may be x. */
void NAME(add_norm)(int64_t N, int64_t D, const float *x, const ELEMENT *added, const float *gain, float eps,
                    float *total, ELEMENT *y) {
#pragma omp parallel for schedule(static) if (N * D > FEW)
    for (int64_t n = 0; n < N; n++) {
        const float *xn = x + n * D;
        const ELEMENT *an = added + n * D;
        float *tn = total + n * D, squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < D; d++) {
            float t = xn[d] + LOAD(an[d]);
            squares += t * t;
            tn[d] = t;
        }
        if (!gain) continue;
        ELEMENT *yn = y + n * D;
        float scale = 1.0f / sqrtf(squares / D + eps);
        for (int64_t d = 0; d < D; d++) yn[d] = STORE(tn[d] * scale * gain[d]);
        if (scale == scale) continue;
        for (int64_t d = 0; d < D; d++) yn[d] = STORE(NAN);
    }
}

#endif
