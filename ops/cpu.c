/* What a model computes besides its matmuls, on a CPU, with gradients. PyTorch takes several passes
   over memory for what is one pass here.

   ops/cpu.py compiles this file on first use and lists the C types of every parameter;
   tests/core/test_ops.py compares every function with plain PyTorch. Needs GCC 12 or newer for its
   vector types: 16 floats are one AVX-512 register, two of AVX2 or four of NEON. Each row is
   computed by one thread and in one order, so results do not depend on the number of threads.

   Names as in model.py: N rows, B rows of a cache, V vocabulary; dx is the gradient of x.

   -DFLOAT32: numbers are floats; otherwise bfloat16.
   -DHEAD_DIM=D -DGROUP=G: attention alone, for D a multiple of 32 and G query heads per key-value
   head. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

#ifdef FLOAT32
typedef float number;
static inline vector load(const number *x) { vector v; memcpy(&v, x, sizeof v); return v; }
static inline void store(number *x, vector v) { memcpy(x, &v, sizeof v); }
static inline vector nearest(vector v) { return v; }

static inline void load_pair(const number *x, vector *a, vector *b)
{
    *a = load(x), *b = load(x + LANES);
}

static inline void store_pair(number *x, vector a, vector b)
{
    store(x, a), store(x + LANES, b);
}
#else
typedef uint16_t number;  /* bfloat16: the upper half of a float */
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vector load(const number *x)
{
    halves h;
    memcpy(&h, x, sizeof h);
    return (vector)(__builtin_convertvector(h, ints) << 16);
}

/* The upper half holds the nearest bfloat16, ties to even, as in PyTorch. */
static inline ints rounded(vector v)
{
    return (ints)v + 0x7fff + (((ints)v >> 16) & 1);
}

static inline vector nearest(vector v) { return (vector)(rounded(v) & (int)0xffff0000); }

static inline void store(number *x, vector v)
{
    halves h = __builtin_convertvector(rounded(v) >> 16, halves);
    memcpy(x, &h, sizeof h);
}

/* 32 numbers as two vectors, the even and the odd ones: cheaper than in order, and a dot product
   does not care */
static inline void load_pair(const number *x, vector *a, vector *b)
{
    ints both;
    memcpy(&both, x, sizeof both);
    *a = (vector)(both << 16), *b = (vector)(both & (int)0xffff0000);
}

static inline void store_pair(number *x, vector a, vector b)
{
    ints both = ((rounded(a) >> 16) & 0xffff) | (rounded(b) & (int)0xffff0000);
    memcpy(x, &both, sizeof both);
}
#endif

static inline vector larger(vector a, vector b)
{
    ints more = a > b;
    return (vector)(((ints)a & more) | ((ints)b & ~more));
}

/* Folds a vector onto its halves, quarters and so on, until every lane holds the result. */
#define FOLD(v, OP) \
    v = OP(v, PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    v = OP(v, PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    v = OP(v, PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    v = OP(v, PICK(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#define ADD(a, b) ((a) + (b))
static inline float sum(vector v) { FOLD(v, ADD) return v[0]; }
static inline float largest(vector v) { FOLD(v, larger) return v[0]; }

/* e^x with a relative error of about 1e-7 for x <= 88. Exactly 0 below -87, so that a masked logit
   never gets a probability. NaN for NaN. */
static inline vector exponential(vector x)
{
    ints dead = x < -87.0f;  /* not "alive = x >= -87": NaN must stay NaN */
    vector magic = (vector){0} + 12582912.0f;  /* 1.5 * 2^23: adding it rounds to a whole number */
    vector whole = (x * 1.44269504f + magic) - magic;
    /* x - whole * ln 2, with ln 2 in two parts */
    vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;  /* the polynomial of Cephes' expf */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ints power = (__builtin_convertvector(whole, ints) + 127) << 23;  /* 2^whole */
    return (vector)((ints)(p * (vector)power) & ~dead);
}

#ifndef HEAD_DIM

/* out = weight * round(x / rms(x)): out and x (N, C), weight (C,) */
void rms_norm(number *out, const number *x, const number *weight, int64_t N, int64_t C, float eps)
{
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        vector a, b, u, v, squares = {0}, more = {0};
        for (int64_t c = i * C; c < (i + 1) * C; c += 2 * LANES) {
            load_pair(x + c, &a, &b);
            squares += a * a, more += b * b;
        }
        float scale = 1 / sqrtf(sum(squares + more) / C + eps);
        for (int64_t c = 0; c < C; c += 2 * LANES) {
            load_pair(x + i * C + c, &a, &b);
            load_pair(weight + c, &u, &v);
            store_pair(out + i * C + c, u * nearest(a * scale), v * nearest(b * scale));
        }
    }
}

/* Gradients of rms_norm: dx (N, C), and dweight (ceil(N / stripe), C), one partial sum for each
   stripe of rows. A stripe belongs to one thread, so that sums do not depend on the number of
   threads. */
void rms_norm_backward(number *dx, float *dweight, const number *dout, const number *x,
                       const number *weight, int64_t N, int64_t C, float eps, int64_t stripe)
{
#pragma omp parallel for
    for (int64_t first = 0; first < N; first += stripe) {
        float *dw = dweight + first / stripe * C;
        memset(dw, 0, C * sizeof(float));
        for (int64_t i = first; i < N && i < first + stripe; i++) {
            const number *row = x + i * C, *d = dout + i * C;
            vector squares = {0}, products = {0};
            for (int64_t c = 0; c < C; c += LANES) {
                vector a = load(row + c);
                squares += a * a, products += a * load(d + c) * load(weight + c);
            }
            float scale = 1 / sqrtf(sum(squares) / C + eps);
            float mean = sum(products) / C * scale * scale;
            for (int64_t c = 0; c < C; c += LANES) {
                vector a = load(row + c), b = load(d + c), w;
                store(dx + i * C + c, (b * load(weight + c) - a * mean) * scale);
                memcpy(&w, dw + c, sizeof w);
                w += b * (a * scale);
                memcpy(dw + c, &w, sizeof w);
            }
        }
    }
}

/* RoPE in fp32: out (N, H, D) from x (N, H, D), whose rows lie `stride` numbers apart, with cos
   and sin (N, D / 2). Pairs are (d, d + D / 2). direction: 1, or -1 to rotate back, as the
   gradient does. */
void apply_rope(number *out, const number *x, const float *cos, const float *sin, int64_t N,
                int64_t H, int64_t D, int64_t stride, float direction)
{
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t d = 0; d < D / 2; d += LANES) {
                const number *low = x + i * stride + h * D + d;
                number *to = out + (i * H + h) * D + d;
                vector a = load(low), b = load(low + D / 2), c, s;
                memcpy(&c, cos + i * D / 2 + d, sizeof c);
                memcpy(&s, sin + i * D / 2 + d, sizeof s);
                s *= direction;
                store(to, a * c - b * s);
                store(to + D / 2, b * c + a * s);
            }
}

/* for x >= -88 */
static inline vector sigmoid(vector x) { return 1.0f / (exponential(-x) + 1.0f); }

/* x, or -88 below it, where x * sigmoid(x) is 0 in either number format; NaN stays NaN */
static inline vector clamped(vector x) { return larger((vector){0} - 88.0f, x); }

/* out = round(silu(gate)) * up, n numbers each */
void swiglu(number *out, const number *gate, const number *up, int64_t n)
{
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        vector a, b, u, v;
        load_pair(gate + i, &a, &b);
        load_pair(up + i, &u, &v);
        a = clamped(a), b = clamped(b);
        store_pair(out + i, nearest(a * sigmoid(a)) * u, nearest(b * sigmoid(b)) * v);
    }
}

void swiglu_backward(number *dgate, number *dup, const number *dout, const number *gate,
                     const number *up, int64_t n)
{
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += LANES) {
        vector a = clamped(load(gate + i)), d = load(dout + i), s = sigmoid(a);
        store(dgate + i, d * load(up + i) * s * (a * (1.0f - s) + 1.0f));
        store(dup + i, d * a * s);
    }
}

/* For each row of logits (N, V): its log-sum-exp to lse (N,), its target's log-prob to logps
   (N,). */
void token_logps(float *logps, float *lse, const number *logits, const int64_t *targets, int64_t N,
                 int64_t V)
{
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        vector most = (vector){0} - INFINITY, total = {0};
        for (int64_t j = i * V; j < (i + 1) * V; j += LANES)
            most = larger(load(logits + j), most);
        float top = largest(most);
        for (int64_t j = i * V; j < (i + 1) * V; j += LANES)
            total += exponential(load(logits + j) - top);
        lse[i] = top + logf(sum(total));
        vector target = load(logits + i * V + targets[i] / LANES * LANES);
        logps[i] = target[targets[i] % LANES] - lse[i];
    }
}

/* The gradient overwrites logits: dlogps * (onehot(target) - softmax(logits)). */
void token_logps_backward(number *logits, const float *dlogps, const float *lse,
                          const int64_t *targets, int64_t N, int64_t V)
{
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < V; j += LANES) {
            vector d = exponential(load(logits + i * V + j) - lse[i]) * -dlogps[i];
            if (j == targets[i] / LANES * LANES) d[targets[i] % LANES] += dlogps[i];
            store(logits + i * V + j, d);
        }
}

#define BLOCK 256

/* One block of logits as floats x (BLOCK,); positions beyond the vocabulary are -infinity. */
static inline void load_block(vector *x, const number *logits, int64_t left)
{
    for (int j = 0; j < BLOCK / LANES; j++, logits += LANES, left -= LANES)
        if (left >= LANES) x[j] = load(logits);
        else {
            number padded[LANES] = {0};
            if (left > 0) memcpy(padded, logits, left * sizeof(number));
            x[j] = load(padded);
            for (int l = left > 0 ? left : 0; l < LANES; l++) x[j][l] = -INFINITY;
        }
}

/* Index of the first of weights (n,) whose cumulative sum exceeds *target; the last positive one
   if rounding would step past it. *target is reduced by the weights before that index, so in the
   second case at least that token's weight remains. */
static inline int64_t inverse_cdf(const double *weights, int64_t n, double *target)
{
    int64_t chosen = 0;
    for (int64_t j = 0; j < n; j++)
        if (weights[j] > 0) {
            if (*target < weights[j]) return j;
            *target -= weights[chosen = j];
        }
    *target += weights[chosen];
    return chosen;
}

/* tokens (N,): the first whose cumulative softmax(logits / temperature) exceeds u (N,); logits
   (N, V). In two levels, as in sample.py: the block of 256 tokens first, then the token inside
   the block. */
void sample_token(int64_t *tokens, const number *logits, const double *u, int64_t N, int64_t V,
                  float temperature)
{
    int64_t blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        const number *row = logits + i * V;
        vector x[BLOCK / LANES], most = (vector){0} - INFINITY;
        double sums[blocks], inside[BLOCK], target = 0;
        for (int64_t b = 0; b < blocks; b++) {
            load_block(x, row + b * BLOCK, V - b * BLOCK);
            for (int j = 0; j < BLOCK / LANES; j++) most = larger(x[j], most);
        }
        float top = largest(most);
        for (int64_t b = 0; b < blocks; b++) {
            vector total = {0};
            load_block(x, row + b * BLOCK, V - b * BLOCK);
            for (int j = 0; j < BLOCK / LANES; j++)
                total += exponential((x[j] - top) / temperature);
            target += sums[b] = sum(total);
        }
        target *= u[i];
        int64_t block = inverse_cdf(sums, blocks, &target);
        load_block(x, row + block * BLOCK, V - block * BLOCK);
        for (int j = 0; j < BLOCK / LANES; j++) {
            vector weights = exponential((x[j] - top) / temperature);
            for (int l = 0; l < LANES; l++) inside[j * LANES + l] = weights[l];
        }
        tokens[i] = block * BLOCK + inverse_cdf(inside, BLOCK, &target);
    }
}

#else

enum { D = HEAD_DIM, G = GROUP };

/* Lane t is sum(v[t]): 16 sums at once take half of the shuffles of 16 calls of sum().
   Overwrites v. */
static inline __attribute__((always_inline)) vector sums(vector *v)
{
    for (int i = 0; i < 8; i++)
        v[i] = PICK(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
             + PICK(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        v[i] = PICK(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
             + PICK(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        v[i] = PICK(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
             + PICK(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return PICK(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
         + PICK(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* One key-value head of one row: its queries q (G, D) attend to tokens first .. n - 1 of keys and
   values, which lie `stride` numbers apart -> out (G, D). 16 tokens at a time. One pass for the
   softmax: the sums so far are scaled down whenever a larger score turns up. */
static void attend_head(number *out, const number *q, const number *keys, const number *values,
                        int64_t first, int64_t n, int64_t stride)
{
    vector query[G][D / LANES], mixed[G][D / LANES];
    float top[G], total[G];
    for (int g = 0; g < G; g++) {
        top[g] = -INFINITY, total[g] = 0;
        for (int j = 0; j < D / LANES; j += 2) {
            load_pair(q + g * D + j * LANES, &query[g][j], &query[g][j + 1]);
            query[g][j] /= sqrtf(D), query[g][j + 1] /= sqrtf(D);
            mixed[g][j] = mixed[g][j + 1] = (vector){0};
        }
    }
    for (int64_t start = first; start < n; start += LANES) {
        int size = n - start < LANES ? n - start : LANES;
        vector dots[G][LANES], score[G];
        for (int t = 0; t < LANES; t++) {
            const number *key = keys + (t < size ? start + t : start) * stride;
            vector x[D / LANES];
            for (int j = 0; j < D / LANES; j += 2) {
                /* without the prefetch it waits for memory and is a fifth slower */
                __builtin_prefetch(key + LANES * stride + j * LANES);
                load_pair(key + j * LANES, &x[j], &x[j + 1]);
            }
            for (int g = 0; g < G; g++) {
                dots[g][t] = x[0] * query[g][0];
                for (int j = 1; j < D / LANES; j++) dots[g][t] += x[j] * query[g][j];
            }
        }
        for (int g = 0; g < G; g++) {
            score[g] = sums(dots[g]);
            for (int t = size; t < LANES; t++) score[g][t] = -INFINITY;
            float best = largest(score[g]);
            if (best > top[g]) {
                float shrink = expf(top[g] - best);
                top[g] = best, total[g] *= shrink;
                for (int j = 0; j < D / LANES; j++) mixed[g][j] *= shrink;
            }
            score[g] = exponential(score[g] - top[g]);
            total[g] += sum(score[g]);
        }
        for (int t = 0; t < size; t++)
            for (int j = 0; j < D / LANES; j += 2) {
                const number *value = values + (start + t) * stride + j * LANES;
                vector a, b;
                __builtin_prefetch(value + LANES * stride);
                load_pair(value, &a, &b);
                for (int g = 0; g < G; g++)
                    mixed[g][j] += a * score[g][t], mixed[g][j + 1] += b * score[g][t];
            }
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < D / LANES; j += 2)
            store_pair(out + g * D + j * LANES, mixed[g][j] / total[g], mixed[g][j + 1] / total[g]);
}

/* One new token for each of B rows: k and v (B, Hkv, D) are written to keys and values (B, T,
   Hkv, D) at lengths (B,); then q (B, Hkv * G, D) attends to that token and those before it, at
   most `window` of them -> out (B, Hkv * G, D). Rows of q, k and v lie q_stride, k_stride and
   v_stride apart. */
void attend(number *out, const number *q, const number *k, const number *v, number *keys,
            number *values, const int64_t *lengths, int64_t B, int64_t T, int64_t Hkv,
            int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t window)
{
#pragma omp parallel for collapse(2) schedule(dynamic, Hkv)
    for (int64_t i = 0; i < B; i++)
        for (int64_t h = 0; h < Hkv; h++) {
            int64_t n = lengths[i] + 1, stride = Hkv * D, row = (i * T * Hkv + h) * D;
            memcpy(keys + row + lengths[i] * stride, k + i * k_stride + h * D, D * sizeof(number));
            memcpy(values + row + lengths[i] * stride, v + i * v_stride + h * D,
                   D * sizeof(number));
            attend_head(out + (i * Hkv + h) * G * D, q + i * q_stride + h * G * D, keys + row,
                        values + row, n > window ? n - window : 0, n, stride);
        }
}

/* ---- causal attention inside sequences, and its gradient ----

   All in floats: the operands of one key-value head are copied, and small enough to stay in the
   CPU's cache. Queries go 32 at a time; their scores over all earlier keys are a (32, T) matrix. */

enum { TILE = 32 };

/* c (M, N) = a (M, n) b (n, N), or += if `more`; a[i][k] lies at a[i * a_row + k * a_column]. M
   must be a multiple of 8 and N of 32: each 8 x 32 tile of c is summed in registers. */
static void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_column,
                     const float *b, int64_t b_row, int64_t M, int64_t N, int64_t n, int more)
{
    for (int64_t j = 0; j < N; j += 2 * LANES)
        for (int64_t i = 0; i < M; i += 8) {
            vector left[8], right[8], x, y;
            for (int r = 0; r < 8; r++) {
                left[r] = right[r] = (vector){0};
                if (more) {
                    memcpy(&left[r], c + (i + r) * c_row + j, sizeof x);
                    memcpy(&right[r], c + (i + r) * c_row + j + LANES, sizeof x);
                }
            }
            for (int64_t k = 0; k < n; k++) {
                memcpy(&x, b + k * b_row + j, sizeof x);
                memcpy(&y, b + k * b_row + j + LANES, sizeof y);
                for (int r = 0; r < 8; r++) {
                    float w = a[(i + r) * a_row + k * a_column];
                    left[r] += x * w, right[r] += y * w;
                }
            }
            for (int r = 0; r < 8; r++) {
                memcpy(c + (i + r) * c_row + j, &left[r], sizeof x);
                memcpy(c + (i + r) * c_row + j + LANES, &right[r], sizeof x);
            }
        }
}

/* Rows (n, D) of numbers, `stride` apart, as floats times `scale`; zeros up to `padded` rows. */
static void unpack(float *out, const number *x, int64_t stride, int64_t n, int64_t padded,
                   float scale)
{
    for (int64_t t = 0; t < padded; t++)
        for (int d = 0; d < D; d += LANES) {
            vector v = t < n ? load(x + t * stride + d) * scale : (vector){0};
            memcpy(out + t * D + d, &v, sizeof v);
        }
}

/* the inverse of unpack */
static void pack(number *out, const float *x, int64_t stride, int64_t n, float scale)
{
    for (int64_t t = 0; t < n; t++)
        for (int d = 0; d < D; d += LANES) {
            vector v;
            memcpy(&v, x + t * D + d, sizeof v);
            store(out + t * stride + d, v * scale);
        }
}

static void transpose(float *out, const float *x, int64_t n)  /* (n, D) -> (D, n) */
{
    for (int64_t t = 0; t < n; t += LANES)
        for (int d = 0; d < D; d++)
            for (int l = 0; l < LANES; l++) out[d * n + t + l] = x[(t + l) * D + d];
}

/* Mask: which of the columns j .. j + 15 lie in first .. last. */
static inline ints between(int64_t j, int64_t first, int64_t last)
{
    ints column = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (int)j;
    return (column >= (int)first) & (column <= (int)last);
}

static inline float row_max(const float *row, int64_t first, int64_t last)
{
    vector most = (vector){0} - INFINITY, v;
    for (int64_t j = first / LANES * LANES; j <= last; j += LANES) {
        ints seen = between(j, first, last);
        memcpy(&v, row + j, sizeof v);
        most = larger((vector)(((ints)v & seen) | ((ints)((vector){0} - INFINITY) & ~seen)), most);
    }
    return largest(most);
}

/* Overwrites a row of scores (width,) with e^(score - shift) in columns first .. last and 0
   elsewhere; returns the sum. */
static inline float exponentials(float *row, int64_t width, int64_t first, int64_t last,
                                 float shift)
{
    vector total = {0}, v;
    for (int64_t j = 0; j < width; j += LANES) {
        memcpy(&v, row + j, sizeof v);
        v = (vector)((ints)exponential(v - shift) & between(j, first, last));
        memcpy(row + j, &v, sizeof v);
        total += v;
    }
    return sum(total);
}

/* q (N, H, D), k and v (N, Hkv, D) of S sequences that begin at starts (S + 1,) -> out (N, H,
   D), and lse (N, H), the log-sum-exp of each row of scores, for the backward pass */
void attend_packed(number *out, float *lse, const number *q, const number *k, const number *v,
                   const int64_t *starts, int64_t S, int64_t Hkv, int64_t window)
{
    int64_t H = Hkv * G;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t s = 0; s < S; s++)
        for (int64_t h = 0; h < Hkv; h++) {
            int64_t T = starts[s + 1] - starts[s];
            int64_t padded = (T + TILE - 1) / TILE * TILE, size = padded * D;
            float *keys = malloc((3 * size + TILE * (padded + 2 * D)) * sizeof(float));
            float *keys_t = keys + size, *values = keys_t + size, *scores = values + size;
            float *query = scores + TILE * padded, *mixed = query + TILE * D;
            float total[TILE];
            unpack(keys, k + (starts[s] * Hkv + h) * D, Hkv * D, T, padded, 1);
            unpack(values, v + (starts[s] * Hkv + h) * D, Hkv * D, T, padded, 1);
            transpose(keys_t, keys, padded);
            for (int64_t g = h * G; g < (h + 1) * G; g++)
                for (int64_t i = 0; i < T; i += TILE) {
                    int64_t token = starts[s] + i, n = T - i < TILE ? T - i : TILE;
                    int64_t from = i < window ? 0 : (i - window + 1) / TILE * TILE;
                    int64_t width = i + TILE - from;
                    unpack(query, q + (token * H + g) * D, H * D, n, TILE, 1 / sqrtf(D));
                    multiply(scores, padded, query, D, 1, keys_t + from, padded, TILE, width, D, 0);
                    for (int64_t r = 0; r < TILE; r++) {
                        int64_t last = i + r - from;
                        int64_t first = i + r < window ? 0 : i + r - window + 1 - from;
                        float top = row_max(scores + r * padded, first, last);
                        total[r] = exponentials(scores + r * padded, width, first, last, top);
                        if (r < n) lse[(token + r) * H + g] = top + logf(total[r]);
                    }
                    multiply(mixed, D, scores, padded, 1, values + from * D, D, TILE, D, width, 0);
                    for (int64_t r = 0; r < n; r++)
                        pack(out + ((token + r) * H + g) * D, mixed + r * D, 0, 1, 1 / total[r]);
                }
            free(keys);
        }
}

/* Gradients dq, dk, dv of attend_packed from dout. */
void attend_packed_backward(number *dq, number *dk, number *dv, const number *dout,
                            const number *q, const number *k, const number *v, const number *out,
                            const float *lse, const int64_t *starts, int64_t S, int64_t Hkv,
                            int64_t window)
{
    int64_t H = Hkv * G;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t s = 0; s < S; s++)
        for (int64_t h = 0; h < Hkv; h++) {
            int64_t T = starts[s + 1] - starts[s];
            int64_t padded = (T + TILE - 1) / TILE * TILE, size = padded * D;
            float *keys = malloc((6 * size + TILE * (2 * padded + 4 * D)) * sizeof(float));
            float *keys_t = keys + size, *values = keys_t + size, *values_t = values + size;
            float *dkeys = values_t + size, *dvalues = dkeys + size;
            float *p = dvalues + size, *dp = p + TILE * padded;
            float *query = dp + TILE * padded, *dmixed = query + TILE * D;
            float *mixed = dmixed + TILE * D, *dquery = mixed + TILE * D;
            unpack(keys, k + (starts[s] * Hkv + h) * D, Hkv * D, T, padded, 1);
            unpack(values, v + (starts[s] * Hkv + h) * D, Hkv * D, T, padded, 1);
            transpose(keys_t, keys, padded);
            transpose(values_t, values, padded);
            memset(dkeys, 0, 2 * size * sizeof(float));
            for (int64_t g = h * G; g < (h + 1) * G; g++)
                for (int64_t i = 0; i < T; i += TILE) {
                    int64_t token = starts[s] + i, n = T - i < TILE ? T - i : TILE;
                    int64_t from = i < window ? 0 : (i - window + 1) / TILE * TILE;
                    int64_t width = i + TILE - from;
                    unpack(query, q + (token * H + g) * D, H * D, n, TILE, 1 / sqrtf(D));
                    unpack(dmixed, dout + (token * H + g) * D, H * D, n, TILE, 1);
                    unpack(mixed, out + (token * H + g) * D, H * D, n, TILE, 1);
                    multiply(p, padded, query, D, 1, keys_t + from, padded, TILE, width, D, 0);
                    multiply(dp, padded, dmixed, D, 1, values_t + from, padded, TILE, width, D, 0);
                    for (int64_t r = 0; r < TILE; r++) {
                        int64_t last = i + r - from;
                        int64_t first = i + r < window ? 0 : i + r - window + 1 - from;
                        float *row = p + r * padded, *drow = dp + r * padded, delta = 0;
                        if (r >= n) last = -1;  /* beyond the sequence: every column is masked */
                        exponentials(row, width, first, last, r < n ? lse[(token + r) * H + g] : 0);
                        for (int d = 0; d < D; d++) delta += dmixed[r * D + d] * mixed[r * D + d];
                        for (int64_t j = 0; j < width; j++) drow[j] = row[j] * (drow[j] - delta);
                    }
                    multiply(dquery, D, dp, padded, 1, keys + from * D, D, TILE, D, width, 0);
                    multiply(dkeys + from * D, D, dp, 1, padded, query, D, width, D, TILE, 1);
                    multiply(dvalues + from * D, D, p, 1, padded, dmixed, D, width, D, TILE, 1);
                    pack(dq + (token * H + g) * D, dquery, H * D, n, 1 / sqrtf(D));
                }
            pack(dk + (starts[s] * Hkv + h) * D, dkeys, Hkv * D, T, 1);
            pack(dv + (starts[s] * Hkv + h) * D, dvalues, Hkv * D, T, 1);
            free(keys);
        }
}
#endif
