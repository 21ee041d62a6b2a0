/* Matrix products of a training step in float32 on a CPU, with what comes before and after them: RMSNorm, SwiGLU,
   the residual stream, the loss of a row of logits.

   A thread takes some of the rows through all products of a function, a block of them at a time, so that what one
   product writes and the next reads is in its cache. The right-hand matrix, mostly weights, is copied into panels of two
   vectors of columns (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"), which all
   threads read. Each element of a product is one sum, in the order of its terms, in blocks of DEPTH: results do not
   depend on the number of threads.

   Shapes: N rows, D width, F feed-forward units, V vocabulary; a product c [M, N] = a [M, K] b [K, N]. */

#include <stdio.h>
#include <stdlib.h>

#include "elements.h"

/* With AVX-512, the products of torch's library are as fast, or faster. */
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)

#define ROWS 6
#define WIDE (2 * LANES)
/* Terms of a sum before it is stored: a panel of so many rows stays in the L1 cache. */
#define DEPTH 256
/* Rows of a block; of logits, which are many columns, fewer. */
#define BLOCK (120 / ROWS * ROWS)
#define HEAD_BLOCK (60 / ROWS * ROWS)
/* Rows of a left matrix that are further apart than this are copied together: a stride of a large power of two maps
   them all to the same few lines of the cache. */
#define APART 384
/* Rows that are copied into panels at a time, so that they are read from the L1 cache. */
#define PACK 16

typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

void rms_norm_float32(int64_t, int64_t, const float *, const float *, float, float *, float *);
void rms_norm_backward_float32(int64_t, int64_t, const float *, const float *, const float *, const float *, float *,
                               float *, int64_t);
void swiglu_float32(int64_t, int64_t, const float *, float *);
void swiglu_backward_float32(int64_t, int64_t, const float *, const float *, float *);
void cross_entropy_float32(int64_t, int64_t, float *, const int64_t *, float, int64_t, float *);

static float *floats(int64_t count) {
    float *memory = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64 + 64);
    if (!memory) {
        fprintf(stderr, "products: no memory for %lld numbers\n", (long long)count);
        abort();
    }
    return memory;
}

/* A matrix as it lies in memory: elements `row` apart between rows, `column` apart within a row. */
typedef struct {
    const float *at;
    int64_t row, column;
} matrix;

static inline matrix rows_of(const float *at, int64_t columns) { return (matrix){at, columns, 1}; }
static inline matrix transposed(const float *at, int64_t columns) { return (matrix){at, 1, columns}; }

static inline int64_t panels_of(int64_t N) { return (N + WIDE - 1) / WIDE; }

static float *panels(int64_t K, int64_t N) { return floats(panels_of(N) * K * WIDE); }

/* b [K, N] in panels [K, WIDE], zeros after its last column. Called by all threads, which share the rows. */
static void pack(int64_t K, int64_t N, matrix b, float *packed) {
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < K; begin += PACK) {
        int64_t end = least(begin + PACK, K);
        for (int64_t n = 0; n < N; n += WIDE) {
            float *to = packed + n * K;
            const float *from = b.at + n * b.column;
            int64_t width = least(WIDE, N - n);
            if (b.column == 1 && width == WIDE)
                for (int64_t p = begin; p < end; p++) memcpy(to + p * WIDE, from + p * b.row, WIDE * sizeof(float));
            else {
                for (int64_t l = 0; l < width; l++)
                    for (int64_t p = begin; p < end; p++) to[p * WIDE + l] = from[l * b.column + p * b.row];
                for (int64_t p = begin; p < end; p++)
                    for (int64_t l = width; l < WIDE; l++) to[p * WIDE + l] = 0;
            }
        }
    }
}

/* c = a b, or add + a b, for `rows` rows of a and one panel of b, with all sums in registers. */
static inline __attribute__((always_inline)) void tile(const int rows, int64_t P, const float *a, int64_t row,
                                                       int64_t step, const float *b, float *c, int64_t ldc,
                                                       const float *add, int64_t ldadd) {
    vector sum[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) __builtin_prefetch(c + i * ldc, 1);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        if (add) {
            sum[i][0] = *(const unaligned *)(add + i * ldadd);
            sum[i][1] = *(const unaligned *)(add + i * ldadd + LANES);
        } else
            sum[i][0] = sum[i][1] = (vector){0};
    }
#pragma GCC unroll 4
    for (int64_t p = 0; p < P; p++) {
        vector first = *(const vector *)(b + p * WIDE), second = *(const vector *)(b + p * WIDE + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float left = a[i * row + p * step];
            sum[i][0] += left * first;
            sum[i][1] += left * second;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        *(unaligned *)(c + i * ldc) = sum[i][0];
        *(unaligned *)(c + i * ldc + LANES) = sum[i][1];
    }
}

static __attribute__((noinline)) void tile_of_rows(int64_t P, const float *a, int64_t row, const float *b, float *c,
                                                   int64_t ldc, const float *add, int64_t ldadd) {
    tile(ROWS, P, a, row, 1, b, c, ldc, add, ldadd);
}

static __attribute__((noinline)) void tile_of_columns(int64_t P, const float *a, const float *b, float *c, int64_t ldc,
                                                      const float *add, int64_t ldadd) {
    tile(ROWS, P, a, 1, ROWS, b, c, ldc, add, ldadd);
}

/* The last rows, fewer than ROWS. */
static __attribute__((noinline)) void tile_of_few(int rows, int64_t P, const float *a, int64_t row, int64_t step,
                                                  const float *b, float *c, int64_t ldc, const float *add,
                                                  int64_t ldadd) {
#define FEWER(COUNT)                                          \
    if (rows & COUNT) {                                       \
        tile(COUNT, P, a, row, step, b, c, ldc, add, ldadd);  \
        a += COUNT * row;                                     \
        c += COUNT * ldc;                                     \
        if (add) add += COUNT * ldadd;                        \
    }
    FEWER(4)
    FEWER(2)
    FEWER(1)
#undef FEWER
}

/* One panel's columns of c for M rows of a; `a_panels`: these are in panels [P, ROWS], but for the last rows. */
static void column_of_tiles(int64_t M, int64_t P, matrix a, const float *a_panels, const float *b, float *c, int64_t ldc,
                            const float *add, int64_t ldadd) {
    for (int64_t i = 0; i < M; i += ROWS) {
        const float *left = a.at + i * a.row, *plus = add ? add + i * ldadd : 0;
        if (i + ROWS > M)
            tile_of_few(M - i, P, left, a.row, a.column, b, c + i * ldc, ldc, plus, ldadd);
        else if (a_panels)
            tile_of_columns(P, a_panels + i * P, b, c + i * ldc, ldc, plus, ldadd);
        else
            tile_of_rows(P, left, a.row, b, c + i * ldc, ldc, plus, ldadd);
    }
}

/* c [M, N] = a b (+ add) for at most BLOCK rows, the terms `first` to `last` of each sum; those before are in c.
   `copy` has room for [BLOCK, DEPTH + LANES]. */
static void block_product(int64_t M, int64_t N, int64_t K, int64_t first, int64_t last,
                          matrix a, const float *packed, float *c, const float *add, float *copy) {
    for (int64_t p = first; p < last; p += DEPTH) {
        int64_t P = least(DEPTH, last - p);
        matrix left = {a.at + p * a.column, a.row, a.column};
        const float *a_panels = 0;
        if (a.column != 1) {
            for (int64_t q = 0; q < P; q += PACK)
                for (int64_t i = 0; i + ROWS <= M; i += ROWS)
                    for (int64_t r = q; r < least(q + PACK, P); r++)
                        memcpy(copy + i * P + r * ROWS, left.at + r * a.column + i, ROWS * sizeof(float));
            a_panels = copy;
        } else if (a.row > APART) {
            for (int64_t i = 0; i < M; i++) memcpy(copy + i * (P + LANES), left.at + i * a.row, P * sizeof(float));
            left = rows_of(copy, P + LANES);
        }
        for (int64_t n = 0; n < N; n += WIDE) {
            const float *b = packed + n * K + p * WIDE, *plus = p ? c + n : add ? add + n : 0;
            if (n + WIDE <= N) {
                column_of_tiles(M, P, left, a_panels, b, c + n, N, plus, N);
                continue;
            }
            float edge[BLOCK * WIDE];
            int64_t width = N - n;
            for (int64_t i = 0; i < M; i++)
                for (int64_t l = 0; l < WIDE; l++) edge[i * WIDE + l] = plus && l < width ? plus[i * N + l] : 0;
            column_of_tiles(M, P, left, a_panels, b, edge, WIDE, edge, WIDE);
            for (int64_t i = 0; i < M; i++) memcpy(c + i * N + n, edge + i * WIDE, width * sizeof(float));
        }
    }
}

static void rows_product(int64_t M, int64_t N, int64_t K, const float *a, const float *packed, float *c,
                         const float *add, float *copy) {
    block_product(M, N, K, 0, K, rows_of(a, K), packed, c, add, copy);
}

static float *copies(void) { return floats(BLOCK * (DEPTH + LANES)); }

/* The rows of this thread, whole tiles of them: even parts, as the same work is done for each. */
typedef struct {
    int64_t begin, end;
} range;

static range share(int64_t count, int64_t unit) {
    int64_t units = (count + unit - 1) / unit, threads = omp_get_num_threads(), me = omp_get_thread_num();
    return (range){units * me / threads * unit, least(count, units * (me + 1) / threads * unit)};
}

#define EACH_BLOCK(ROWS_OF_BLOCK)                                                     \
    range mine = share(N, ROWS);                                                      \
    for (int64_t n = mine.begin, M; M = least(ROWS_OF_BLOCK, mine.end - n), n < mine.end; n += M)

/* y [N, Y] = x W^T (+ add), with `transpose` y [N, Y] = x W (+ add); W [Y, X] and [X, Y]. */
void product_float32(int64_t N, int64_t X, int64_t Y, const float *x, const float *w, int64_t transpose,
                     const float *add, float *y) {
    float *packed = panels(X, Y);
#pragma omp parallel if (N * X * Y > FEW)
    {
        pack(X, Y, transpose ? rows_of(w, Y) : transposed(w, X), packed);
        float *copy = copies();
        EACH_BLOCK(BLOCK) rows_product(M, Y, X, x + n * X, packed, y + n * Y, add ? add + n * Y : 0, copy);
        free(copy);
    }
    free(packed);
}

/* The gradient of a matrix: dw [Y, X] = dy^T x, with dy [N, Y] and x [N, X]. */
void product_weight_float32(int64_t N, int64_t X, int64_t Y, const float *dy, const float *x, float *dw) {
    float *packed = panels(N, X);
#pragma omp parallel if (N * X * Y > FEW)
    {
        pack(N, X, rows_of(x, X), packed);
        float *copy = copies();
        range rows = share(Y, ROWS);
        for (int64_t p = 0; p < N; p += DEPTH)
            for (int64_t y = rows.begin; y < rows.end; y += BLOCK)
                block_product(least(BLOCK, rows.end - y), X, N, p, least(p + DEPTH, N),
                              transposed(dy + y, Y), packed, dw + y * X, 0, copy);
        free(copy);
    }
    free(packed);
}

/* y [N, Y] = h W^T of the normalized h [N, D] = x / rms(x) * gain; see rms_norm. */
void norm_product_float32(int64_t N, int64_t D, int64_t Y, const float *x, const float *gain, float eps, float *inverse,
                          float *h, const float *w, float *y) {
    float *packed = panels(D, Y);
#pragma omp parallel if (N * D * Y > FEW)
    {
        pack(D, Y, transposed(w, D), packed);
        float *copy = copies();
        EACH_BLOCK(BLOCK) {
            rms_norm_float32(M, D, x + n * D, gain, eps, h + n * D, inverse + n);
            rows_product(M, Y, D, h + n * D, packed, y + n * Y, 0, copy);
        }
        free(copy);
    }
    free(packed);
}

/* dx += rest: the residual stream's own gradient, if there is one. */
static void add_rows(int64_t count, const float *rest, float *dx) {
    if (!rest) return;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) dx[i] += rest[i];
}

/* dx [N, D] of norm_product from dy, plus `rest` [N, D], if given; dgain [threads, D] as in rms_norm_backward. */
void norm_product_backward_float32(int64_t N, int64_t D, int64_t Y, const float *dy, const float *w, const float *x,
                                   const float *gain, const float *inverse, const float *rest, float *dx, float *dgain,
                                   int64_t threads) {
    float *packed = panels(Y, D);
#pragma omp parallel num_threads(threads) if (N * D * Y > FEW)
    {
        pack(Y, D, rows_of(w, D), packed);
        float *copy = copies(), *dh = floats(BLOCK * D), *sum = dgain + omp_get_thread_num() * D;
        EACH_BLOCK(BLOCK) {
            rows_product(M, D, Y, dy + n * Y, packed, dh, 0, copy);
            rms_norm_backward_float32(M, D, dh, x + n * D, gain, inverse + n, dx + n * D, sum, 1);
            add_rows(M * D, rest ? rest + n * D : 0, dx + n * D);
        }
        free(dh);
        free(copy);
    }
    free(packed);
}

/* y [N, D] = (silu(gate) * up) W_down^T (+ x with `residual`), gate and up of the normalized x (Shazeer 2020). Kept for
   the backward pass: h [N, D] and `inverse` of the norm, gate_up [N, 2 F], and the product of both, `hidden` [N, F]. */
void feed_forward_float32(int64_t N, int64_t D, int64_t F, const float *x, const float *gain, float eps, float *inverse,
                          float *h, const float *w_gate_up, float *gate_up, float *hidden, const float *w_down,
                          int64_t residual, float *y) {
    float *first = panels(D, 2 * F), *second = panels(F, D);
#pragma omp parallel if (N * D * F > FEW)
    {
        pack(D, 2 * F, transposed(w_gate_up, D), first);
        pack(F, D, transposed(w_down, F), second);
        float *copy = copies();
        EACH_BLOCK(BLOCK) {
            rms_norm_float32(M, D, x + n * D, gain, eps, h + n * D, inverse + n);
            rows_product(M, 2 * F, D, h + n * D, first, gate_up + 2 * n * F, 0, copy);
            swiglu_float32(M, F, gate_up + 2 * n * F, hidden + n * F);
            rows_product(M, D, F, hidden + n * F, second, y + n * D, residual ? x + n * D : 0, copy);
        }
        free(copy);
    }
    free(first);
    free(second);
}

/* dgate_up [N, 2 F] and dx [N, D] of feed_forward from dy [N, D]; dgain as in rms_norm_backward. */
void feed_forward_backward_float32(int64_t N, int64_t D, int64_t F, const float *dy, const float *x, const float *gain,
                                   const float *inverse, const float *w_gate_up, const float *gate_up,
                                   const float *w_down, int64_t residual, float *dgate_up, float *dx, float *dgain,
                                   int64_t threads) {
    float *first = panels(2 * F, D), *second = panels(D, F);
#pragma omp parallel num_threads(threads) if (N * D * F > FEW)
    {
        pack(2 * F, D, rows_of(w_gate_up, D), first);
        pack(D, F, rows_of(w_down, F), second);
        float *copy = copies(), *dh = floats(BLOCK * D), *dhidden = floats(BLOCK * F);
        float *sum = dgain + omp_get_thread_num() * D;
        EACH_BLOCK(BLOCK) {
            rows_product(M, F, D, dy + n * D, second, dhidden, 0, copy);
            swiglu_backward_float32(M, F, dhidden, gate_up + 2 * n * F, dgate_up + 2 * n * F);
            rows_product(M, D, 2 * F, dgate_up + 2 * n * F, first, dh, 0, copy);
            rms_norm_backward_float32(M, D, dh, x + n * D, gain, inverse + n, dx + n * D, sum, 1);
            add_rows(M * D, residual ? dy + n * D : 0, dx + n * D);
        }
        free(dhidden);
        free(dh);
        free(copy);
    }
    free(first);
    free(second);
}

/* The losses [N] of logits x W^T, W [V, D]: see cross_entropy. With dx [N, D], `logits` [N, V] receives their
   gradients, and dx those of x. */
void head_loss_float32(int64_t N, int64_t D, int64_t V, const float *x, const float *w, const int64_t *targets,
                       float cap, float *logits, float *losses, float *dx) {
    float *first = panels(D, V), *second = dx ? panels(V, D) : 0;
#pragma omp parallel if (N * D * V > FEW)
    {
        pack(D, V, transposed(w, D), first);
        if (dx) pack(V, D, rows_of(w, D), second);
        float *copy = copies();
        EACH_BLOCK(HEAD_BLOCK) {
            rows_product(M, V, D, x + n * D, first, logits + n * V, 0, copy);
            cross_entropy_float32(M, V, logits + n * V, targets + n, cap, dx != 0, losses + n);
            if (dx) rows_product(M, D, V, logits + n * V, second, dx + n * D, 0, copy);
        }
        free(copy);
    }
    free(first);
    free(second);
}

#endif
