/* Elements and functions that the kernels share: float32 and bfloat16, exponentials, rounding, vectors, memory. */

#ifndef STLM_ELEMENTS_H
#define STLM_ELEMENTS_H

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* With fewer elements, waking threads costs more than it saves. */
#define FEW 16384

/* e^x for x up to 0: 2^n e^r with |r| at most half of ln 2, by a polynomial fitted for the smallest relative error,
   3e-9 (2e-7 with float32 rounding). Below -87, where float32 ends, the result is zero. NaN stays NaN: the last
   operation is a product, not a sum of bits, which would turn some NaN payloads into numbers. */
static inline float exponential(float x) {
    /* Adding 1.5 2^23 + 127 rounds to an integer; the lowest bits are then n + 127, the exponent of 2^n. */
    float shifted = x * 1.44269504f + 12583039.0f, n = shifted - 12583039.0f;
    /* ln 2 in two parts; the first has few digits, so that its product with n is exact. */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.381459124e-3f;
    p = p * r + 8.368716840e-3f;
    p = p * r + 4.166838820e-2f;
    p = p * r + 1.666652063e-1f;
    p = p * r + 4.999999345e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

/* 1 / (1 + e^-x), computed from the exponential of a negative number. */
static inline float sigmoid(float x) {
    float e = exponential(-fabsf(x)), inverse = 1.0f / (1.0f + e);
    return x < 0 ? e * inverse : inverse;
}

/* x sigmoid(x), with one rounding less. */
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

/* Rounds to nearest, ties to even. NaN stays NaN if its payload fits bfloat16, as for elements and results of
   arithmetic. A payload in the lower bits of float32 may be rounded to infinity or zero: see rms_norm. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Floats in a vector of the processor. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vector __attribute__((vector_size(4 * LANES)));

/* Arrays, consecutive in one allocation. */
typedef struct {
    char *memory, *at;
} arrays;

static inline arrays arrays_of(int64_t bytes) {
    char *memory = malloc(bytes + 64);
    if (!memory) {
        fprintf(stderr, "stlm kernels: no memory for %lld bytes\n", (long long)bytes);
        abort();
    }
    return (arrays){memory, memory + (64 - (uintptr_t)memory % 64)};
}

static inline void *array(arrays *mem, int64_t bytes) {
    void *begin = mem->at;
    mem->at += (bytes + 63) / 64 * 64;
    return begin;
}

/* The name of a function for an element type: f_float32. */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, TYPE)

#endif
