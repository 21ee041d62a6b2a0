/* Memory-bound parts of a training step on a CPU, each in one loop where torch runs several operations.

   Compiled on the machine that uses it (library.py), for its instruction set. Elements are float32 or bfloat16;
   sums, and everything between a load and a store, are float32. Rows are split evenly among the threads; sums over
   rows are kept by each thread and added in the order of threads: the same number of threads gives the same bits.

   The file includes itself once for each element type. Shapes: N rows, D width, F feed-forward units, V
   vocabulary. */

#ifndef ELEMENT

#include "elements.h"

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
    int spoilt = 0;
    for (int64_t d = 0; d < D; d++) spoilt |= gain[d] != gain[d];
#pragma omp parallel for schedule(static) if (N * D > FEW)
    for (int64_t n = 0; n < N; n++) {
        const float *xn = x + n * D;
        ELEMENT *yn = y + n * D;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < D; d++) squares += xn[d] * xn[d];
        float scale = 1.0f / sqrtf(squares / D + eps);
        inverse[n] = scale;
        for (int64_t d = 0; d < D; d++) yn[d] = STORE(xn[d] * scale * gain[d]);
        if (scale == scale && !spoilt) continue;
        for (int64_t d = 0; d < D; d++) {
            float exact = xn[d] * scale * gain[d];
            if (exact != exact) yn[d] = STORE(NAN);
        }
    }
}

/* Gradients of rms_norm; `dgain` [threads, D], initially zero, receives the sum of each thread. */
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
            float scale = inverse[n], along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t d = 0; d < D; d++) along += LOAD(dyn[d]) * gain[d] * xn[d];
            along *= scale * scale / D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) {
                float slope = LOAD(dyn[d]);
                dxn[d] = scale * (slope * gain[d] - xn[d] * along);
                sum[d] += slope * xn[d] * scale;
            }
        }
    }
}

/* y [N, F] = silu(gate) * up; a row of `gate_up` has the gates, then the ups (Shazeer 2020). */
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

/* Cross-entropy `losses` [N], in nats, of logits [N, V]. With `gradient`, the logits are replaced by p - 1 for the
   target and p for the others. With `cap` c, logits z become c tanh(z / c), and gradients are those of z. */
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
                float logit = cap * tangent(LOAD(z[v]) / cap);
                largest = logit > largest ? logit : largest;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t v = 0; v < V; v++) sum += exponential(cap * tangent(LOAD(z[v]) / cap) - largest);
            float bent = tangent(target / cap);
            target = cap * bent;
            slope = 1.0f - bent * bent;
        } else {
#pragma omp simd reduction(max : largest)
            for (int64_t v = 0; v < V; v++) {
                float logit = LOAD(z[v]);
                largest = logit > largest ? logit : largest;
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

#endif
