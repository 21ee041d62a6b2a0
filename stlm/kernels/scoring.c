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

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MOST 8 /* rows of a product whose sums fit the registers, in two vectors */
#elif defined(__AVX__)
#define MOST 4
#else
#define MOST 4
#endif
/* Rows of a block's products, at most: two vectors. With more, more keys would be computed to be masked. */
#define BLOCK_ROWS 32

typedef int32_t integers __attribute__((vector_size(4 * LANES)));

static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* As arrays_of, all zero. */
static inline arrays zeroed(int64_t bytes) {
    char *memory = calloc(bytes + 64, 1);
    if (!memory) {
        fprintf(stderr, "scoring: no memory for %lld bytes\n", (long long)bytes);
        abort();
    }
    return (arrays){memory, memory + (64 - (uintptr_t)memory % 64)};
}

static inline vector loaded(const float *x) {
    vector y;
    memcpy(&y, x, sizeof y);
    return y;
}

static inline vector chosen(integers mask, vector a, vector b) {
    return (vector)((mask & (integers)a) | (~mask & (integers)b));
}

/* The larger ones; b where a is NaN. */
static inline vector larger(vector a, vector b) {
#if defined(__AVX512F__)
    return (vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return chosen(a > b, a, b);
#endif
}

/* exponential() of each. */
static inline vector exponentials(vector x) {
    vector shifted = x * 1.44269504f + 12583039.0f, n = shifted - 12583039.0f;
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector p = 1.381459124e-3f * r + 8.368716840e-3f;
    p = p * r + 4.166838820e-2f;
    p = p * r + 1.666652063e-1f;
    p = p * r + 4.999999345e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vector power = (vector)((integers)shifted << 23);
    return (vector)((integers)(p * power) & ~(x < -87.0f));
}

/* The sum of the weights e^(score - largest) of each of LANES rows; they replace the scores [keys, row]. A row sees
   fewer than `limit` keys; all rows see the first `common`. */
static inline void softmax(int64_t keys, int64_t common, const int32_t *limit, float *score, int64_t row, float *sums) {
    vector largest = (vector){0} - INFINITY, other = largest, sum = {0};
    integers limits;
    memcpy(&limits, limit, sizeof limits);
    for (int64_t c = common; c < keys; c++) {
        vector seen = chosen(limits > (int32_t)c, loaded(score + c * row), (vector){0} - INFINITY);
        memcpy(score + c * row, &seen, sizeof seen);
    }
    int64_t c = 0;
    for (; c + 1 < keys; c += 2) {
        largest = larger(loaded(score + c * row), largest);
        other = larger(loaded(score + (c + 1) * row), other);
    }
    if (c < keys) largest = larger(loaded(score + c * row), largest);
    largest = larger(other, largest);
    for (c = 0; c < keys; c++) {
        vector weight = exponentials(loaded(score + c * row) - largest);
        memcpy(score + c * row, &weight, sizeof weight);
        sum += weight;
    }
    memcpy(sums, &sum, sizeof sum);
}

#define ELEMENT float
#define TYPE float32
#define FACTOR float
#define PAIR 1
#define LOAD(x) (x)
#define STORE(x) (x)
#define NARROW(x) (x)
#include __FILE__
#undef ELEMENT
#undef TYPE
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
static inline __attribute__((always_inline)) vector multiply_pairs(vector sum, uint32_t a, const void *b) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
}
#define FACTOR uint32_t
#define PAIR 2
#define NARROW(x) to_bfloat16(x)
#else
#define FACTOR float
#define PAIR 1
#define NARROW(x) (x)
#endif
#include __FILE__

#else

typedef FACTOR NAME(factor) __attribute__((may_alias));

/* c = a b for some rows of a and vectors of columns of b, with all sums in registers. */
static inline __attribute__((always_inline)) void NAME(tile)(const int rows, const int columns, int64_t P,
                                                             const NAME(factor) * a, int64_t row, int64_t step,
                                                             const NAME(factor) * b, int64_t ldb, float *c,
                                                             int64_t ldc) {
    vector sum[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) sum[i][j] = (vector){0};
    for (int64_t p = 0; p < P; p++) {
#if PAIR == 1
        vector right[2];
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) memcpy(&right[j], b + p * ldb + j * LANES, sizeof(vector));
#endif
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            FACTOR left = a[i * row + p * step];
#pragma GCC unroll 2
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
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) memcpy(c + i * ldc + j * LANES, &sum[i][j], sizeof(vector));
}

/* c [M, N] = a b, where a [M, P] and b [P, N] hold factors; those of a are `row` apart between rows and `step` apart
   within a row. N is a multiple of the vector length. */
static void NAME(product)(int64_t M, int64_t N, int64_t P, const void *left, int64_t row, int64_t step,
                          const void *right, int64_t ldb, float *c, int64_t ldc) {
    const NAME(factor) *a = left, *b = right;
    int64_t j = 0;
#define ROWS(COUNT, WIDE)                                                                              \
    if (i + (COUNT) <= M) {                                                                            \
        NAME(tile)(COUNT, WIDE, P, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc);          \
        i += COUNT;                                                                                    \
    }
#define TILES(WIDE)                                                                                    \
    for (; N - j >= (WIDE) * LANES; j += (WIDE) * LANES) {                                             \
        int64_t i = 0;                                                                                 \
        for (; i + MOST <= M; i += MOST)                                                               \
            NAME(tile)(MOST, WIDE, P, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc);       \
        ROWS(4, WIDE) ROWS(2, WIDE) ROWS(1, WIDE)                                                      \
    }
    TILES(2)
    TILES(1)
#undef TILES
#undef ROWS
}

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

/* A head's elements as factors, `step` apart. */
static inline void NAME(spread)(int64_t E, const float *head, int64_t step, FACTOR *to) {
#if PAIR == 1
    for (int64_t e = 0; e < E; e++) to[e * step] = head[e];
#else
    for (int64_t e = 0; e + 1 < E; e += 2) to[e / 2 * step] = NARROW(head[e]) | (FACTOR)NARROW(head[e + 1]) << 16;
    if (E % 2) to[E / 2 * step] = NARROW(head[E - 1]);
#endif
}

/* Puts a head's elements at place c of the values; with pairs, an even place ends with zeros for the next. */
static inline void NAME(push)(int64_t E, const ELEMENT *x, int64_t c, FACTOR *values) {
    FACTOR *to = values + c / PAIR * E;
#if PAIR == 1
    for (int64_t e = 0; e < E; e++) to[e] = LOAD(x[e]);
#else
    if (c % 2)
        for (int64_t e = 0; e < E; e++) to[e] = (to[e] & 0xffff) | (FACTOR)x[e] << 16;
    else
        for (int64_t e = 0; e < E; e++) to[e] = x[e];
#endif
}

#if PAIR == 2
/* Weights [keys, row] as pairs of consecutive keys' [keys / 2, row]; with an odd number, the last one's second is 0. */
static void NAME(pairs)(int64_t keys, int64_t used, int64_t row, const float *weight, FACTOR *to) {
    for (int64_t c = 0; c < keys; c += 2) {
        const float *one = weight + c * row, *two = one + row;
        FACTOR *pair = to + c / 2 * row;
        if (c + 1 < keys)
            for (int64_t x = 0; x < used; x++) pair[x] = NARROW(one[x]) | (FACTOR)NARROW(two[x]) << 16;
        else
            for (int64_t x = 0; x < used; x++) pair[x] = NARROW(one[x]);
    }
}
#endif

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
    int64_t Ep = (E + PAIR - 1) / PAIR, Cp = (C + PAIR - 1) / PAIR; /* factors */
    int64_t Q = BLOCK_ROWS / G > 1 ? BLOCK_ROWS / G : 1, Xp = padded(G * Q);
    /* Threads that have no head of their own share the sequences of one, cut where the row's tokens are halved. */
    int64_t threads = omp_get_max_threads(), parts = K >= threads && K % threads == 0 ? 1 : threads;
#pragma omp parallel if (N * (H + 2 * K) * E > FEW)
    {
        int64_t sizes = C * Ep + Cp * E + Xp * (Ep + Cp + C + E + 2) + E + C * 2 + 12 * 16;
        arrays mem = zeroed(sizes * sizeof(float));
        FACTOR *keys = array(&mem, C * Ep * sizeof *keys), *values = array(&mem, Cp * E * sizeof *values);
        FACTOR *queries = array(&mem, Ep * Xp * sizeof *queries), *weights = array(&mem, Cp * Xp * sizeof *weights);
        float *score = array(&mem, C * Xp * sizeof *score), *mixed = array(&mem, E * Xp * sizeof *mixed);
        float *head = array(&mem, E * sizeof *head), *sum = array(&mem, Xp * sizeof *sum);
        int32_t *limit = array(&mem, Xp * sizeof *limit);
        int64_t *path = array(&mem, C * sizeof *path), at[BLOCK_ROWS];
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
                    NAME(spread)(E, head, 1, keys + held * Ep);
                    NAME(push)(E, vm + t * v_row, held, values);
                }
                for (int64_t i = 0; i < own[s];) {
                    int64_t n = 0;
                    for (; i < own[s] && n < Q; i++)
                        if (!place || place[begin + i] >= 0) at[n++] = i;
                    if (!n) break;
                    int64_t seen = before + at[n - 1] + 1, common = before + at[0] + 1;
                    for (int64_t r = 0; r < n; r++) {
                        int64_t t = begin + at[r];
                        const float *c = cos ? cos + t * angles : 0, *s_ = cos ? sin + t * angles : 0;
                        for (int64_t g = 0; g < G; g++) {
                            int64_t x = r * G + g;
                            limit[x] = before + at[r] + 1;
                            NAME(turned)(E, qm + t * q_row + g * E, c, s_, scale, head);
                            NAME(spread)(E, head, Xp, queries + x);
                        }
                    }
                    int64_t used = padded(n * G);
                    NAME(product)(seen, used, Ep, keys, Ep, 1, queries, Xp, score, Xp);
                    for (int64_t x = 0; x < used; x += LANES) softmax(seen, common, limit + x, score + x, Xp, sum + x);
                    const void *by = score;
#if PAIR == 2
                    NAME(pairs)(seen, used, Xp, score, weights);
                    by = weights;
#endif
                    NAME(product)(E, used, (seen + PAIR - 1) / PAIR, values, 1, E, by, Xp, mixed, Xp);
                    for (int64_t x = 0; x < n * G; x++) {
                        int64_t t = begin + at[x / G];
                        ELEMENT *to = y + ((place ? place[t] : t) * H + m * G + x % G) * E;
                        float part = 1.0f / sum[x];
                        for (int64_t e = 0; e < E; e++) to[e] = STORE(mixed[e * Xp + x] * part);
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
