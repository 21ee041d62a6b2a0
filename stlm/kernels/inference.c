/* A forward pass for generation on a CPU: new tokens of some rows of a cache, from their ids to logits.

   One token's pass reads every weight once and computes little with it: torch's operations for it take longer to call
   than to run in small models, and in large ones they do not read memory as fast as it can be read. Here all threads
   go through the whole pass together. Each computes some of the outputs of each matrix and waits for the others where
   it needs theirs.

   An output is the same to the bit for any number of threads, and for any number of tokens that are read at once.
   Everything is float32. `stlm/model/inference.py` makes the structures, of the same fields in the same order.

   Shapes: N new tokens, M of them with logits, D width, H query heads, K key/value heads, G = H / K, E head width,
   S = H + 2 K, F hidden units, V vocabulary, R width of the embedding, P places of a row of the cache, B its rows. */

#include "elements.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* Rows of a matrix, and tokens, in one step of a product: as many as the processor has registers for. */
#define ROWS 4
#if LANES == 16
#define TOKENS 4
#else
#define TOKENS 2
#endif
/* Tokens whose inputs stay in the processor's cache while a matrix is read once for all of them. */
#define CHUNK 64
/* Products for which a further thread is worth waking and waiting for. */
#define ENOUGH 200000
/* Threads divide outputs in whole lines of the cache. */
#define LINE 16

/* x W^T, W [Y, X], plus, with an adapter, scale x a^T b^T. Of low rank, W is the product of `weight` [Y, rank] and
   `right` [rank, X]. */
typedef struct {
    const float *weight, *right, *a, *b;
    int64_t rank, adapter_rank;
    double scale;
} matrix;

typedef struct {
    const float *gain, *bias;
} norm;

/* Vectors are null where the model has none. `values` [V, K E] are added to the token's values. */
typedef struct {
    norm attention_norm, ffn_norm;
    matrix qkv, out, up, down;
    const float *shift, *q_gain, *k_gain, *values;
} block;

/* The head in 8 bits: row v is `scales[v]` times `weight[v]` [R], and the product with x [R] is that of the head's own
   row up to `error[v]` |x|, what rounding adds in either product included. */
typedef struct {
    int8_t *weight;
    float *scales, *error;
} screen;

enum { SWIGLU, GELU, RELU2 };

typedef struct {
    int64_t D, H, K, E, F, V, R, layernorm, ffn;
    double eps, cap, embedding_scale;
    const float *embedding, *embedding_up, *positions, *cos, *sin, *output_down, *head;
    norm norm;
    const block *blocks;
    screen screen;
} model;

/* A cache's keys and values [layers, 2, B, K, P, E], and its rows before the shift [layers, B, P, S E]. */
typedef struct {
    int64_t B, P;
    float *kv, *unshifted;
} cache;

/* The sums of ROWS vectors, always in the same order: halves of a vector are added until one number is left. */
static inline void totals(const vector *v, float *sums) {
#if defined(__SSE2__)
    __m128 quad[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
#if LANES == 16
        __m512d all = _mm512_castps_pd((__m512)v[i]);
        __m256 half = _mm256_castpd_ps(_mm512_extractf64x4_pd(all, 1));
        half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), half);
#elif LANES == 8
        __m256 half = (__m256)v[i];
#endif
#if LANES == 4
        quad[i] = (__m128)v[i];
#else
        quad[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#endif
    }
    __m128 one = _mm_add_ps(_mm_movelh_ps(quad[0], quad[1]), _mm_movehl_ps(quad[1], quad[0]));
    __m128 two = _mm_add_ps(_mm_movelh_ps(quad[2], quad[3]), _mm_movehl_ps(quad[3], quad[2]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_shuffle_ps(one, two, 0x88), _mm_shuffle_ps(one, two, 0xdd)));
#else
    for (int i = 0; i < ROWS; i++) {
        float own[LANES];
        memcpy(own, v + i, sizeof own);
        for (int n = LANES / 2; n; n /= 2)
            for (int j = 0; j < n; j++) own[j] += own[j + n];
        sums[i] = own[0];
    }
#endif
}

static inline vector load(const float *x) {
    vector v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline vector load_some(const float *x, int64_t count) {
    vector v = {0};
    memcpy(&v, x, count * sizeof *x);
    return v;
}

/* Small integers as floats. The compiler's own conversion of such vectors takes many times as long. */
static inline vector from_bytes(const int8_t *x) {
#if LANES == 16
    return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)x)));
#elif defined(__AVX2__)
    return (vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)x)));
#else
    vector v;
    for (int i = 0; i < LANES; i++) v[i] = x[i];
    return v;
#endif
}

/* y [tokens, rows] (+)= factor x w^T. Each sum has one accumulator, whatever `rows` and `tokens` are. */
static inline __attribute__((always_inline)) void tile(const int rows, const int tokens, int64_t X, const float *w,
                                                       const float *x, int64_t ldx, float *y, int64_t ldy, int add,
                                                       float factor) {
    vector sum[TOKENS][ROWS];
#pragma GCC unroll 4
    for (int j = 0; j < tokens; j++)
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) sum[j][i] = (vector){0};
    int64_t k = 0;
    for (; k + LANES <= X; k += LANES) {
        vector right[TOKENS];
#pragma GCC unroll 4
        for (int j = 0; j < tokens; j++) right[j] = load(x + j * ldx + k);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            vector left = load(w + i * X + k);
            /* Where memory is the limit: the rows of the next tile. */
            if (tokens == 1) __builtin_prefetch(w + (i + rows) * X + k);
#pragma GCC unroll 4
            for (int j = 0; j < tokens; j++) sum[j][i] += left * right[j];
        }
    }
    if (k < X) {
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < tokens; j++)
                sum[j][i] += load_some(w + i * X + k, X - k) * load_some(x + j * ldx + k, X - k);
    }
#pragma GCC unroll 4
    for (int j = 0; j < tokens; j++) {
        float own[ROWS], *target = y + j * ldy;
        totals(sum[j], own);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) target[i] = add ? target[i] + factor * own[i] : factor * own[i];
    }
}

/* y [N, begin to end] (+)= factor x w^T, with x [N, X] and w [Y, X]. */
static void product(int64_t N, int64_t X, const float *w, const float *x, int64_t ldx, float *y, int64_t ldy,
                    int64_t begin, int64_t end, int add, float factor) {
    for (int64_t first = 0; first < N; first += CHUNK) {
        int64_t last = least(N, first + CHUNK);
        for (int64_t i = begin; i < end; i += ROWS) {
            const float *rows = w + i * X;
            int64_t n = first;
            if (i + ROWS > end) {
                for (; n < last; n++)
                    for (int64_t r = i; r < end; r++)
                        tile(1, 1, X, w + r * X, x + n * ldx, ldx, y + n * ldy + r, ldy, add, factor);
                continue;
            }
            for (; n + TOKENS <= last; n += TOKENS)
                tile(ROWS, TOKENS, X, rows, x + n * ldx, ldx, y + n * ldy + i, ldy, add, factor);
            for (; n < last; n++) tile(ROWS, 1, X, rows, x + n * ldx, ldx, y + n * ldy + i, ldy, add, factor);
        }
    }
}

/* y [N, begin to end] = x w, with x [N, X] and w [X, Y]. */
static void combination(int64_t N, int64_t X, int64_t Y, const float *w, const float *x, float *y, int64_t begin,
                        int64_t end) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t i = begin; i < end; i++) y[n * Y + i] = 0;
        for (int64_t k = 0; k < X; k++) {
            float factor = x[n * X + k];
            for (int64_t i = begin; i < end; i++) y[n * Y + i] += factor * w[k * Y + i];
        }
    }
}

/* The share of this thread in `total` outputs. */
static void share(int64_t total, int64_t *begin, int64_t *end) {
    int64_t lines = (total + LINE - 1) / LINE, t = omp_get_thread_num(), T = omp_get_num_threads();
    *begin = least(total, lines * t / T * LINE);
    *end = least(total, lines * (t + 1) / T * LINE);
}

/* The inner factors of a matrix that has some: `inner` [N, rank + adapter_rank]. All threads call it. */
static void inner_factors(const matrix *m, int64_t N, int64_t X, const float *x, int64_t ldx, float *inner) {
    int64_t begin, end, width = m->rank + m->adapter_rank;
    if (!width) return;
    if (m->rank) {
        share(m->rank, &begin, &end);
        product(N, X, m->right, x, ldx, inner, width, begin, end, 0, 1);
    }
    if (m->adapter_rank) {
        share(m->adapter_rank, &begin, &end);
        product(N, X, m->a, x, ldx, inner + m->rank, width, begin, end, 0, 1);
    }
#pragma omp barrier
}

/* y [N, begin to end] (+)= m applied to x [N, X], after inner_factors. */
static void apply(const matrix *m, int64_t N, int64_t X, const float *x, int64_t ldx, const float *inner, float *y,
                  int64_t ldy, int64_t begin, int64_t end, int add) {
    int64_t width = m->rank + m->adapter_rank;
    if (m->rank)
        product(N, m->rank, m->weight, inner, width, y, ldy, begin, end, add, 1);
    else
        product(N, X, m->weight, x, ldx, y, ldy, begin, end, add, 1);
    if (m->adapter_rank)
        product(N, m->adapter_rank, m->b, inner + m->rank, width, y, ldy, begin, end, 1, m->scale);
}

/* y = x / rms(x) or (x - mean) / std(x), times the gain, plus the bias. */
static void normalize(int64_t D, const float *x, const norm *own, int layernorm, float eps, float *y) {
    float mean = 0, squares = 0;
    if (layernorm) {
#pragma omp simd reduction(+ : mean)
        for (int64_t d = 0; d < D; d++) mean += x[d];
        mean /= D;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; d++) squares += (x[d] - mean) * (x[d] - mean);
    float scale = 1.0f / sqrtf(squares / D + eps);
    if (own->bias)
        for (int64_t d = 0; d < D; d++) y[d] = (x[d] - mean) * scale * own->gain[d] + own->bias[d];
    else
        for (int64_t d = 0; d < D; d++) y[d] = (x[d] - mean) * scale * own->gain[d];
}

/* The normalized rows of x [N, D]: of one, each thread makes a copy of its own, for which none waits. */
static const float *normalized(const model *m, const norm *own, int64_t N, const float *x, float *mine, float *all) {
    if (N == 1) {
        normalize(m->D, x, own, m->layernorm, m->eps, mine);
        return mine;
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++)
        normalize(m->D, x + n * m->D, own, m->layernorm, m->eps, all + n * m->D);
    return all;
}

/* A head's query, key or value x [E]: the shifted one before is added, queries and keys are normalized and rotated. */
static void finish_head(const model *m, const float *x, const float *before, const float *shift, const float *gain,
                        const float *added, const float *cos, const float *sin, float *y) {
    int64_t E = m->E, half = E / 2;
    float own[E];
    for (int64_t e = 0; e < E; e++) own[e] = before ? x[e] + before[e] * shift[e] : x[e];
    if (added)
        for (int64_t e = 0; e < E; e++) own[e] += added[e];
    if (gain) normalize(E, own, &(norm){gain, 0}, 0, m->eps, own);
    if (!cos) {
        memcpy(y, own, E * sizeof *y);
        return;
    }
    for (int64_t e = 0; e < half; e++) {
        y[e] = own[e] * cos[e] + own[e + half] * sin[e];
        y[e + half] = own[e + half] * cos[e + half] + own[e] * sin[e + half];
    }
}

/* Attention of some query heads [heads, E] of one key/value head over its first C keys; score [heads, C]. */
static void attend(int64_t heads, int64_t E, int64_t C, const float *q, const float *keys, const float *values,
                   float *score, float *y) {
    product(heads, E, keys, q, E, score, C, 0, C, 0, 1.0f / sqrtf(E));
    for (int64_t h = 0; h < heads; h++) {
        float *s = score + h * C, largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t c = 0; c < C; c++) largest = s[c] > largest ? s[c] : largest;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; c++) {
            s[c] = exponential(s[c] - largest);
            sum += s[c];
        }
        float part = 1.0f / sum, *yh = y + h * E;
        int64_t e = 0;
        for (; e + 2 * LANES <= E; e += 2 * LANES) {
            vector first = {0}, second = {0};
            for (int64_t c = 0; c < C; c++) {
                first += s[c] * load(values + c * E + e);
                second += s[c] * load(values + c * E + e + LANES);
            }
            first *= part;
            second *= part;
            memcpy(yh + e, &first, sizeof first);
            memcpy(yh + e + LANES, &second, sizeof second);
        }
        for (; e < E; e += LANES) {
            int64_t some = least(LANES, E - e);
            vector mixed = {0};
            for (int64_t c = 0; c < C; c++) mixed += s[c] * load_some(values + c * E + e, some);
            mixed *= part;
            memcpy(yh + e, &mixed, some * sizeof *yh);
        }
    }
}

/* The hidden units [begin, end) in place of the ups, or of the gates, which come first where there are some. */
static void activate(const model *m, int64_t N, float *hidden, int64_t ld, int64_t begin, int64_t end) {
    for (int64_t n = 0; n < N; n++) {
        float *h = hidden + n * ld, *up = h + m->F;
        if (m->ffn == SWIGLU) {
#pragma omp simd
            for (int64_t f = begin; f < end; f++) h[f] = silu(h[f]) * up[f];
        } else if (m->ffn == GELU) {
            for (int64_t f = begin; f < end; f++) h[f] = 0.5f * h[f] * (1.0f + erff(h[f] * 0.70710678f));
        } else {
            for (int64_t f = begin; f < end; f++) h[f] = h[f] > 0 ? h[f] * h[f] : 0 * h[f];
        }
    }
}

/* The arrays of a pass, which all threads share; `scores` [threads, G, P], `copies` [threads, D] and `heaps` [threads,
   largest] are each thread's. */
typedef struct {
    float *x, *normal, *qkv, *mixed, *hidden, *inner, *kept, *scores, *copies, *heaps, least_of_largest;
} buffers;

/* The embeddings [N, D] of tokens, with their positions. All threads call it. */
static void embed(const model *m, int64_t N, const int64_t *tokens, const int64_t *positions, float *x) {
    int64_t begin, end, D = m->D;
    share(D, &begin, &end);
    for (int64_t n = 0; n < N; n++) {
        const float *own = m->embedding + tokens[n] * m->R;
        const float *position = m->positions ? m->positions + positions[n] * D : 0;
        float *xn = x + n * D, scale = m->embedding_scale;
        if (m->embedding_up)
            combination(1, m->R, D, m->embedding_up, own, xn, begin, end);
        else
            memcpy(xn + begin, own + begin, (end - begin) * sizeof *xn);
        if (position)
            for (int64_t d = begin; d < end; d++) xn[d] = xn[d] * scale + position[d];
    }
#pragma omp barrier
}

/* Attention's outputs [N, D] in b->mixed, given queries, keys and values in b->qkv, which it adds to the cache. */
static void attention(const model *m, const block *own, const cache *c, int64_t layer, int64_t N, const int64_t *tokens,
                      const int64_t *rows, const int64_t *positions, buffers *b) {
    int64_t H = m->H, K = m->K, E = m->E, G = H / K, S = H + 2 * K, P = c->P, T = omp_get_num_threads();
    float *unshifted = own->shift ? c->unshifted + layer * c->B * P * S * E : 0;
    float *kv[2] = {c->kv + 2 * layer * c->B * K * P * E, c->kv + (2 * layer + 1) * c->B * K * P * E};
    if (own->shift) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            memcpy(unshifted + (rows[n] * P + positions[n]) * S * E, b->qkv + n * S * E, S * E * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < N * S; unit++) {
        int64_t n = unit / S, s = unit % S, at = positions[n], kind = s < H ? 0 : s < H + K ? 1 : 2;
        float *x = b->qkv + (n * S + s) * E, *y = x;
        if (kind) y = kv[kind - 1] + ((rows[n] * K + s - H - (kind - 1) * K) * P + at) * E;
        const float *before = own->shift && at ? unshifted + ((rows[n] * P + at - 1) * S + s) * E : 0;
        const float *added = kind == 2 && own->values ? own->values + (tokens[n] * K + s - H - K) * E : 0;
        const float *gain = kind == 0 ? own->q_gain : kind == 1 ? own->k_gain : 0;
        int turned = m->cos && kind < 2;
        finish_head(m, x, before, before ? own->shift + s * E : 0, gain, added, turned ? m->cos + at * E : 0,
                    turned ? m->sin + at * E : 0, y);
    }
    /* With few key/value heads, the query heads of one are divided among threads. */
    int64_t parts = N * K < 2 * T ? G : 1;
    float *score = b->scores + omp_get_thread_num() * G * P;
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < N * K * parts; unit++) {
        int64_t n = unit / (K * parts), k = unit / parts % K, h = k * G + unit % parts * (G / parts);
        int64_t head = (rows[n] * K + k) * P * E;
        attend(G / parts, E, positions[n] + 1, b->qkv + (n * S + h) * E, kv[0] + head, kv[1] + head, score,
               b->mixed + (n * H + h) * E);
    }
}

/* The residual stream x [N, D] plus the feed-forward network's output. */
static void feed_forward(const model *m, const block *own, int64_t N, float *x, buffers *b) {
    int64_t begin, end, D = m->D, F = m->F, ld = m->ffn == SWIGLU ? 2 * F : F;
    float *mine = b->copies + omp_get_thread_num() * D;
    const float *normal = normalized(m, &own->ffn_norm, N, x, mine, b->normal);
    inner_factors(&own->up, N, D, normal, D, b->inner);
    share(F, &begin, &end);
    apply(&own->up, N, D, normal, D, b->inner, b->hidden, ld, begin, end, 0);
    if (m->ffn == SWIGLU) apply(&own->up, N, D, normal, D, b->inner, b->hidden, ld, F + begin, F + end, 0);
    activate(m, N, b->hidden, ld, begin, end);
#pragma omp barrier
    inner_factors(&own->down, N, F, b->hidden, ld, b->inner);
    share(D, &begin, &end);
    apply(&own->down, N, F, b->hidden, ld, b->inner, x, D, begin, end, 1);
#pragma omp barrier
}

/* Makes the screen of a head [V, R]. */
void make_screen(int64_t V, int64_t R, const float *head, const screen *own) {
    /* A sum of R products in float32, in any order, is off by at most so much of the product of the norms. */
    double rounding = (R + 16) * 0x1p-24;
#pragma omp parallel for schedule(static) if (V * R > FEW)
    for (int64_t v = 0; v < V; v++) {
        const float *row = head + v * R;
        float largest = 0, inverse;
        for (int64_t r = 0; r < R; r++) largest = fabsf(row[r]) > largest ? fabsf(row[r]) : largest;
        float scale = largest / 127;
        inverse = scale > 0 ? 1 / scale : 0;
        double squares = 0, coarse = 0, differences = 0;
        for (int64_t r = 0; r < R; r++) {
            int8_t near = row[r] == row[r] ? lrintf(row[r] * inverse) : 0;
            double rounded = (double)scale * near, difference = row[r] - rounded;
            own->weight[v * R + r] = near;
            squares += (double)row[r] * row[r];
            coarse += rounded * rounded;
            differences += difference * difference;
        }
        own->scales[v] = scale;
        own->error[v] = (sqrt(differences) + rounding * (sqrt(squares) + sqrt(coarse))) * (1 + 1e-6);
    }
}

/* The products of ROWS rows of the screen with x [R]. */
static inline void coarse_tile(int64_t R, const int8_t *w, const float *x, float *y) {
    vector sum[ROWS] = {0};
    int64_t k = 0;
    for (; k + LANES <= R; k += LANES) {
        vector right = load(x + k);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) {
            sum[i] += from_bytes(w + i * R + k) * right;
        }
    }
    totals(sum, y);
    for (int i = 0; i < ROWS; i++)
        for (int64_t r = k; r < R; r++) y[i] += w[i * R + r] * x[r];
}

/* Puts a number into a heap of the `size` largest, of which the first is the least. */
static inline void push(float *heap, int64_t size, float number) {
    if (!(number > heap[0])) return;
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= number) break;
        heap[at] = heap[child];
    }
    heap[at] = number;
}

/* The logits [V] of the head's input x [R], the `largest` of them exactly: first from the screen, then from the head's
   own rows where they could be among the largest. The others are below these, within the screen's error. */
static void score_screened(const model *m, const float *x, float *logits, int64_t largest, buffers *b) {
    int64_t begin, end, R = m->R, T = omp_get_num_threads();
    double squares = 0;
    for (int64_t r = 0; r < R; r++) squares += (double)x[r] * x[r];
    float norm = sqrt(squares) * (1 + 1e-6), *heap = b->heaps + omp_get_thread_num() * largest;
    for (int64_t i = 0; i < largest; i++) heap[i] = -INFINITY;
    share(m->V, &begin, &end);
    for (int64_t v = begin; v < end; v += ROWS) {
        float coarse[ROWS];
        int64_t rows = least(ROWS, end - v);
        if (rows == ROWS)
            coarse_tile(R, m->screen.weight + v * R, x, coarse);
        else
            for (int64_t i = 0; i < rows; i++) {
                coarse[i] = 0;
                for (int64_t r = 0; r < R; r++) coarse[i] += m->screen.weight[(v + i) * R + r] * x[r];
            }
        for (int64_t i = 0; i < rows; i++) {
            logits[v + i] = coarse[i] * m->screen.scales[v + i];
            push(heap, largest, logits[v + i] - m->screen.error[v + i] * norm);
        }
    }
#pragma omp barrier
#pragma omp single
    {
        for (int64_t i = largest; i < T * largest; i++) push(b->heaps, largest, b->heaps[i]);
        b->least_of_largest = b->heaps[0];
    }
    /* So many logits are at least this: what is below it for certain is not among them. NaN is looked at. */
    for (int64_t v = begin; v < end; v++)
        if (!(logits[v] + m->screen.error[v] * norm < b->least_of_largest))
            product(1, R, m->head, x, R, logits, m->V, v, v + 1, 0, 1);
}

/* The logits [M, V] of residual vectors x [M, D]; with `largest`, see read_tokens. */
static void score(const model *m, int64_t M, const float *x, float *logits, int64_t largest, buffers *b) {
    int64_t begin, end, D = m->D, R = m->R;
    float *mine = b->copies + omp_get_thread_num() * D;
    const float *input = normalized(m, &m->norm, M, x, mine, b->normal);
    if (R != D) {
        share(R, &begin, &end);
        if (m->output_down)
            combination(M, D, R, m->output_down, input, b->hidden, begin, end);
        else
            product(M, D, m->embedding_up, input, D, b->hidden, R, begin, end, 0, 1);
        input = b->hidden;
#pragma omp barrier
    }
    if (largest) {
        score_screened(m, input, logits, largest, b);
        return;
    }
    share(m->V, &begin, &end);
    product(M, R, m->head, input, R, logits, m->V, begin, end, 0, 1);
    if (m->cap)
        for (int64_t i = 0; i < M; i++)
            for (int64_t v = begin; v < end; v++) {
                float *logit = logits + i * m->V + v;
                *logit = tanhf(*logit / (float)m->cap) * (float)m->cap;
            }
}

/* Reads tokens at `positions` of the cache's `rows`, all [N], which hold what comes before them: through the blocks
   from `first` to before `last`, on from their residual stream x [N, D], or from the embedding if `first` is 0. x then
   holds the stream after these blocks. With `logits` [M, V], those after the tokens with the indices `wanted` [M], in
   rising order; the stream of the other tokens is then not that after the last block. With `largest`, for which M must
   be 1 and the head have a screen, and no bound of logits, so many of the largest are exact, and the others below
   them. Tokens of one row come in order. */
void read_tokens(const model *m, const cache *c, int64_t first, int64_t last, int64_t N, const int64_t *tokens,
                 const int64_t *rows, const int64_t *positions, float *x, int64_t M, const int64_t *wanted,
                 float *logits, int64_t largest) {
    int64_t D = m->D, H = m->H, E = m->E, F = m->F, S = H + 2 * m->K, factors = 0;
    int64_t hidden = m->ffn == SWIGLU ? 2 * F : F;
    int64_t products = N * (last - first) * (S * E + D + hidden + F) * D + (logits ? M * m->V * m->R : 0);
    int64_t T = least(omp_get_max_threads(), 1 + products / ENOUGH);
    for (int64_t i = first; i < last; i++)
        for (int j = 0; j < 4; j++) {
            const matrix *own = (const matrix *[]){&m->blocks[i].qkv, &m->blocks[i].out, &m->blocks[i].up,
                                                   &m->blocks[i].down}[j];
            if (own->rank + own->adapter_rank > factors) factors = own->rank + own->adapter_rank;
        }
    if (hidden < m->R) hidden = m->R;
    int64_t sizes = N * (4 * D + S * E + hidden + factors) + T * (H / m->K * c->P + D + largest) + 10 * 16;
    arrays mem = arrays_of(sizes * sizeof(float));
    buffers b = {.x = array(&mem, N * D * sizeof(float)),
                 .normal = array(&mem, N * D * sizeof(float)),
                 .qkv = array(&mem, N * S * E * sizeof(float)),
                 .mixed = array(&mem, N * D * sizeof(float)),
                 .hidden = array(&mem, N * hidden * sizeof(float)),
                 .inner = array(&mem, N * factors * sizeof(float)),
                 .kept = array(&mem, N * D * sizeof(float)),
                 .scores = array(&mem, T * (H / m->K) * c->P * sizeof(float)),
                 .copies = array(&mem, T * D * sizeof(float)),
                 .heaps = array(&mem, T * largest * sizeof(float))};
    if (!x) x = b.x;
#pragma omp parallel num_threads(T)
    {
        int64_t begin, end, n = N;
        float *own_x = x, *mixed = b.mixed, *mine = b.copies + omp_get_thread_num() * D;
        if (first == 0) embed(m, N, tokens, positions, x);
        for (int64_t i = first; i < last; i++) {
            const block *own = m->blocks + i;
            const float *normal = normalized(m, &own->attention_norm, N, x, mine, b.normal);
            inner_factors(&own->qkv, N, D, normal, D, b.inner);
            share(S * E, &begin, &end);
            apply(&own->qkv, N, D, normal, D, b.inner, b.qkv, S * E, begin, end, 0);
#pragma omp barrier
            attention(m, own, c, i, N, tokens, rows, positions, &b);
            if (i + 1 == last && logits && M < N) {
                /* From here on, only the tokens with logits; in rising order, none is overwritten before it moves. */
#pragma omp single
                for (int64_t j = 0; j < M; j++) {
                    memmove(mixed + j * D, mixed + wanted[j] * D, D * sizeof(float));
                    memcpy(b.kept + j * D, x + wanted[j] * D, D * sizeof(float));
                }
                own_x = b.kept;
                n = M;
            }
            inner_factors(&own->out, n, D, mixed, D, b.inner);
            share(D, &begin, &end);
            apply(&own->out, n, D, mixed, D, b.inner, own_x, D, begin, end, 1);
#pragma omp barrier
            feed_forward(m, own, n, own_x, &b);
        }
        if (logits) score(m, M, own_x, logits, largest, &b);
    }
    free(mem.memory);
}
